"""The rows of the paper's tables: what each trains, how long, and the figures that the paper has for it.

Source: Sarma et al. 2021 (arXiv 2106.12089), Tables 1 to 3 and Fig. 3, which shows the validation perplexities of
``table1/medium/*`` by epoch. ``small/*`` are not in the paper: the same comparison on a corpus that trains in minutes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sd_plugin.errors import UsageError

MODES = {"random": "NR+Random", "nr_st": "NR+ST", "nr_rh_st": "NR+RH+ST"}
#: Name of a metric -> how tables write it.
METRICS = {
    "valid_perplexity": "valid perplexity",
    "test_perplexity": "test perplexity",
    "test_bleu": "BLEU",
    "valid_f1": "valid F1",
    "test_f1": "test F1",
}


class Row(BaseModel):
    """A row of a table: one model, trained in one mode.

    Attributes:
        name: ``TABLE/MODEL/MODE``.
        title: the model, as tables write it.
        system: the module of ``systems`` that runs it.
        config: a file of ``configs/``, by its path from the root; None where the host has no such file.
        data: the corpus, a name that scripts/get_data.py knows and folder below ``data``.
        length: of the paper's training, in ``unit``; for ``small`` rows, that of the configuration.
        seed: unless another is asked for: the host's own default.
        metrics: what the table shows, the decisive one last.
        paper: the paper's figures by metric; speedup: its training speed, relative to ``random``.
        workload: of ``sd-plugin bench``, whose steps are the same; steps: of one unit.
        notes: what a reader of the result must know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    system: Literal["zaremba", "awd_lstm", "opennmt", "targer"]
    mode: Literal["random", "nr_st", "nr_rh_st"]
    config: str | None = None
    data: str
    length: int = Field(gt=0)
    unit: Literal["epochs", "steps"]
    seed: int
    metrics: tuple[str, ...]
    paper: Mapping[str, float] = {}
    speedup: float | None = None
    workload: str | None = None
    steps: int = 1
    notes: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """The name without the mode: rows that are compared with each other share it."""
        return self.name.rpartition("/")[0]

    @property
    def label(self) -> str:
        """Model and mode, for the eyes."""
        return f"{self.title}, {MODES[self.mode]}"


_PERPLEXITIES = ("valid_perplexity", "test_perplexity")

#: (valid, test) perplexity and speedup, by model and mode.
_TABLE_1 = {
    "medium": {"random": (86.20, 82.70, None), "nr_st": (86.60, 83.01, 1.17), "nr_rh_st": (83.64, 80.84, 1.45)},
    "large": {"random": (82.20, 78.40, None), "nr_st": (85.42, 82.39, 1.27), "nr_rh_st": (79.38, 76.05, 1.64)},
    "awd-lstm": {"random": (63.31, 61.21, None), "nr_rh_st": (63.95, 61.77, 1.38)},
}
#: BLEU and speedup.
_TABLE_2 = {
    "deen": {"random": (28.13, None), "nr_st": (27.54, 1.17), "nr_rh_st": (28.46, 1.31)},
    "envi": {"random": (25.26, None), "nr_st": (26.08, 1.09), "nr_rh_st": (26.20, 1.23)},
}
#: F1 and speedup.
_TABLE_3 = {"random": (89.26, None), "nr_st": (89.32, 1.21), "nr_rh_st": (89.49, 1.39)}
#: Ending of a configuration's name, by mode.
_ENDINGS = {"random": "", "nr_st": "_nr_st", "nr_rh_st": "_sd"}

# 929,589 words with the ends of lines, in 20 columns: of 35 words each, and of 68.25 on average.
_ZAREMBA_STEPS, _AWD_STEPS = 1327, 681


def _language_models() -> Iterable[Row]:
    for model, length in (("medium", 39), ("large", 55)):
        for mode, (valid, test, speedup) in _TABLE_1[model].items():
            yield Row(
                name=f"table1/{model}/{mode}",
                title=f"Zaremba {model}",
                system="zaremba",
                mode=mode,
                config=f"configs/zaremba_{model}.yaml",
                data="ptb",
                length=length,
                unit="epochs",
                seed=1234,
                metrics=_PERPLEXITIES,
                paper={"valid_perplexity": valid, "test_perplexity": test},
                speedup=speedup,
                workload=f"zaremba-{model}",
                steps=_ZAREMBA_STEPS,
            )
    for mode, (valid, test, speedup) in _TABLE_1["awd-lstm"].items():
        yield Row(
            name=f"table1/awd-lstm/{mode}",
            title="AWD-LSTM",
            system="awd_lstm",
            mode=mode,
            data="ptb",
            length=100,
            unit="epochs",
            seed=1111,
            metrics=_PERPLEXITIES,
            paper={"valid_perplexity": valid, "test_perplexity": test},
            speedup=speedup,
            workload="awd-lstm",
            steps=_AWD_STEPS,
        )


def _translation() -> Iterable[Row]:
    for pair, title, data in (("deen", "OpenNMT De-En", "iwslt14-de-en"), ("envi", "OpenNMT En-Vi", "iwslt15-en-vi")):
        for mode, (bleu, speedup) in _TABLE_2[pair].items():
            yield Row(
                name=f"table2/{pair}/{mode}",
                title=title,
                system="opennmt",
                mode=mode,
                config=f"configs/iwslt_{pair}{_ENDINGS[mode]}.yaml",
                data=data,
                length=65_000,
                unit="steps",
                seed=1234,
                metrics=("valid_perplexity", "test_bleu"),
                paper={"test_bleu": bleu},
                speedup=speedup,
                workload=f"opennmt-{pair}",
                notes=("the paper does not name its optimizer; here Adam at 0.001",),
            )
    for mode in MODES:
        yield Row(
            name=f"small/multi30k/{mode}",
            title="OpenNMT Multi30k De-En",
            system="opennmt",
            mode=mode,
            config=f"configs/multi30k{_ENDINGS[mode]}.yaml",
            data="multi30k",
            length=5_000,
            unit="steps",
            seed=1234,
            metrics=("valid_perplexity", "test_bleu"),
        )


def _entities() -> Iterable[Row]:
    for mode, (f1, speedup) in _TABLE_3.items():
        yield Row(
            name=f"table3/ner/{mode}",
            title="NER (targer)",
            system="targer",
            mode=mode,
            data="conll2003",
            length=60,
            unit="epochs",
            seed=42,
            metrics=("valid_f1", "test_f1"),
            paper={"test_f1": f1},
            speedup=speedup,
        )


#: Every row, in the order of the paper's tables.
ROWS: tuple[Row, ...] = (*_language_models(), *_translation(), *_entities())
#: Other names of rows: Fig. 3 is drawn from these.
ALIASES = {"fig3": "table1/medium"}


def read(path: Path) -> tuple[Row, ...]:
    """Rows of a JSON file, a list of objects with the attributes of :class:`Row`.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    try:
        return TypeAdapter(tuple[Row, ...]).validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def select(names: Iterable[str], rows: Iterable[Row] = ROWS) -> list[Row]:
    """The rows that names stand for, each once: the name of a row, or what it begins with (``table1/medium``).

    Raises:
        UsageError: a name stands for none.
    """
    known, found = {row.name: row for row in rows}, {}
    for name in names:
        wanted = ALIASES.get(name.strip("/").split("/")[0], "")
        wanted = "/".join([wanted, *name.strip("/").split("/")[1:]]) if wanted else name.strip("/")
        matching = [row for row in known.values() if f"{row.name}/".startswith(f"{wanted}/")]
        if not matching:
            groups = dict.fromkeys(row.group for row in known.values())
            modes = ", ".join(dict.fromkeys(row.mode for row in known.values()))
            raise UsageError(f"unknown row {name!r}; there are {', '.join(groups)}, each with /MODE of {modes}")
        found.update({row.name: row for row in matching})
    return list(found.values())
