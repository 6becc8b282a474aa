"""The columns, precisions and phases of every table and file. Standard library only."""

from __future__ import annotations

STOCK = "stock"
DENSE = "ours-dense"
NR_ST = "nr_st"
NR_RH_ST = "nr_rh_st"

#: What is measured, in the order of the tables; the last two are also modes of the library.
COLUMNS = (STOCK, DENSE, NR_ST, NR_RH_ST)
#: Columns whose products skip dropped units.
SKIPPING = (NR_ST, NR_RH_ST)
#: Names as tables and figures write them.
LABELS = {STOCK: "stock", DENSE: "ours, dense", NR_ST: "NR+ST", NR_RH_ST: "NR+RH+ST"}

TF32 = "tf32"
FP32 = "fp32"
FP16 = "fp16"
BF16 = "bf16"

#: Numerical settings that columns are measured under (:mod:`.precision`), in the order of the tables.
PRECISIONS = (TF32, FP32, FP16, BF16)
PRECISION_LABELS = {TF32: "fp32+TF32", FP32: "fp32", FP16: "fp16", BF16: "bf16"}
#: Those that a kind of device has, and those measured where none is asked for: the first is torch's own default there.
VALID_PRECISIONS = {"cpu": (FP32,), "cuda": PRECISIONS}
DEFAULT_PRECISIONS = {"cpu": (FP32,), "cuda": (TF32, FP32, FP16)}

#: Forward product, input gradient, weight gradient.
PHASES = ("FP", "BP", "WG")
