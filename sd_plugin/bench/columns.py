"""The columns and phases of every table and file. Standard library only."""

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

#: Forward product, input gradient, weight gradient.
PHASES = ("FP", "BP", "WG")
