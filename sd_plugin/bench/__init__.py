"""``sd-plugin bench``: whole training steps and their matrix products, timed side by side, written as JSON.

Four columns of each workload are measured interleaved in one process: the stock model, this library's kernels with
nothing skipped, NR+ST and NR+RH+ST. So what fusion gives is told apart from what skipping gives.

| module | idea |
|---|---|
| :mod:`.columns` | the columns, precisions and phases of a table |
| :mod:`.precision` | what a precision means to torch |
| :mod:`.workload` | what a workload is: its training step, its products |
| :mod:`.layers` | the modules that differ from column to column |
| :mod:`.zaremba`, :mod:`.awd_lstm`, :mod:`.opennmt`, :mod:`.ner` | the paper's systems |
| :mod:`.timing` | interleaved repeats |
| :mod:`.phases`, :mod:`.sweeps`, :mod:`.memory` | what is measured beside the step |
| :mod:`.machine`, :mod:`.folders`, :mod:`.results` | where it ran, without its folders, and the file |
| :mod:`.summary` | ratios, bounds and tables from a file; standard library only |
| :mod:`.command`, :mod:`.cli`, :mod:`.runner` | the program |
"""
