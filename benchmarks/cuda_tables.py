"""``cuda_resources.py``: its Markdown tables, from its JSON file and from those of ``scripts/gpu_check.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cuda_work import MEASURED_AS, NAMES, PRODUCT_STACK, P

from sd_plugin.errors import UsageError
from sd_plugin.kernels.cuda.precision import Precision

#: Kind of the files of ``scripts/gpu_check.py``.
MEASURED_KIND = "sd-plugin gpu check"
UNMEASURED = "unmeasured"


class Measured(NamedTuple):
    """A file of ``scripts/gpu_check.py``."""

    name: str
    gpu: str
    sections: Mapping[str, Any]

    def find(self, section: str, part: str, *keys: str) -> float | None:
        """A number of it, if it was measured."""
        found: Any = self.sections.get(section, {}).get("parts", {}).get(part)
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def measurements(folder: Path) -> list[Measured]:
    """All of ``folder``; rehearsals and other files are left out."""
    found = []
    for path in sorted(folder.glob("gpu_check_*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("kind") == MEASURED_KIND and not document["rehearsal"]:
            found.append(Measured(path.name, document["machine"].get("gpu") or path.stem, document["sections"]))
    return found


def _table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heading, ["---"] * len(heading), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _kib(size: int) -> str:
    return f"{size / 1024:.0f}" if size >= 10_240 else f"{size / 1024:.1f}"


def _mega(number: float) -> str:
    return f"{number / 1e6:.3g}" if number < 999.5e6 else f"{number / 1e6:,.0f}"


def _us(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.1f}"


def _titles(measured: Sequence[Measured]) -> list[str]:
    return [f"measured, µs, {one.gpu}" for one in measured] or ["measured, µs"]


def _cells(measured: Sequence[Measured], tell: Callable[[Measured], str]) -> list[str]:
    return [tell(one) for one in measured] or [UNMEASURED]


def _registers(document: Mapping[str, Any], entry: Mapping[str, Any], kernel: str) -> str:
    needs = document["compiled"][entry["unit"]][kernel]
    return " / ".join(str(needs[str(architecture)][0]) for architecture in document["architectures"])


def _operands(precision: str) -> str:
    return NAMES[Precision[precision]]


def compiler_table(document: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """Who compiled, and whether anything is in local memory."""
    nvrtc, compiled = document["nvrtc"], document["compiled"]
    architectures = " and ".join(f"sm_{architecture}" for architecture in document["architectures"])
    wrong = [
        f"{kernel} of `{unit}` on sm_{architecture}: {needs[1]} bytes of stack, {needs[2]} of spills"
        for unit, of_unit in compiled.items()
        for kernel, of_kernel in of_unit.items()
        for architecture, needs in of_kernel.items()
        if needs[1] or needs[2]
    ]
    said = "; ".join(wrong) if wrong else "no kernel spills registers or has a stack"
    return (
        f"NVRTC {nvrtc['version']} (`{nvrtc['package']}`), {architectures}, the {len(compiled)} translation units of "
        f"these tables: {said}."
    )


def choices_table(document: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """Up to which kept fraction products skip."""
    fractions, source = document["choices"]["largest_kept_fraction"], document["choices"]["source"]
    precisions = list(next(iter(fractions.values())))
    names = {"fp": "FP, `y = x W`", "bp": "BP, `dx = dy W'`", "wg": "WG, `dW = x' dy`"}
    rows = [
        [names[phase], *(f"{of_phase[name]:g}" if of_phase[name] else "never" for name in precisions)]
        for phase, of_phase in fractions.items()
    ]
    return _table([f"source: {source}", *map(_operands, precisions)], rows)


def tiles_table(document: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """Registers of each tile of the persistent kernels."""
    rows: dict[tuple[object, ...], list[str]] = {}
    for layer in document["layers"]:
        if layer["persistent"]:
            forward = layer["forward"]
            key = (
                _operands(layer["precision"]), f"{layer['units']} x {layer['rows']}",
                "stays" if layer["resident"] else "streamed", layer["h_stages"],
                "-" if layer["resident"] else layer["w_stages"],
                _registers(document, forward, "lstm_forward"), _registers(document, forward, "lstm_backward"),
            )  # fmt: skip
            used = rows.setdefault(key, [])
            if str(layer["hidden"]) not in used:
                used.append(str(layer["hidden"]))
    heading = ["operands", "units x rows of a block", "weight", "chunks of `h`", "chunks of the weight",
               "registers, `lstm_forward`, sm_80 / sm_90", "`lstm_backward`", "H"]  # fmt: skip
    order = sorted(rows, key=lambda key: [*NAMES.values()].index(str(key[0])))
    return _table(heading, [[*key, ", ".join(rows[key])] for key in order])


def layers_table(document: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """Launches and work of each layer, per time step."""
    rows = []
    for layer in document["layers"]:
        name = f"{layer['name']}, {layer['hidden']}, B {layer['batch']}"
        start = [name, _operands(layer["precision"]), layer["kept"] if layer["skipping"] else "all"]
        part = f"our layer, auto, {'skipping' if layer['skipping'] else 'dense'}"
        of_stack = f"{layer['stack']} {MEASURED_AS[Precision[layer['precision']]]}"

        def tell(one: Measured, part: str = part, of_stack: str = of_stack, alone: bool = layer["alone"]) -> str:
            times = [one.find("micro", part, of_stack, f"device_{way}") for way in ("forward", "backward")]
            if None in times:
                return UNMEASURED
            return " / ".join(_us(time) for time in times if time is not None) + ("" if alone else " (stack)")

        if not layer["persistent"]:
            rows.append([*start, "step by step", *"----", "-", *_cells(measured, tell)])
            continue
        passes = [layer[way] for way in ("forward", "backward")]
        rows.append([
            *start, f"{layer['units']} x {layer['rows']}", f"{layer['parts']} x {layer['slices']}",
            " / ".join(_kib(one["shared"]) for one in passes), _mega(passes[0]["flops"]),
            " / ".join(_mega(one["l2"]) for one in passes), " / ".join(_mega(one["memory"]) for one in passes),
            " / ".join(_us(one["floor"]) for one in passes), *_cells(measured, tell),
        ])  # fmt: skip
    heading = ["layer", "operands", "kept", "units x rows", "blocks", "shared memory, KiB", "MFLOP", "L2, MB",
               "memory, MB", "floor, µs, estimated", *_titles(measured)]  # fmt: skip
    return _table(heading, rows)


def shares_table(document: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """Shares of dh against gradients of gates, as bytes through L2."""
    found: dict[tuple[str, str], dict[bool, Any]] = {}
    for layer in document["layers"]:
        if layer["persistent"] and layer["precision"] != Precision.TF32.name:
            key = (f"{layer['name']}, {layer['hidden']}, B {layer['batch']}", _operands(layer["precision"]))
            found.setdefault(key, {})[layer["skipping"]] = layer

    def shares(layer: Mapping[str, Any]) -> int:
        return 2 * 4 * layer["parts"] * layer["slices"] * layer["kept"] * layer["rows"]  # type: ignore[no-any-return]

    rows = [
        [*key, _mega(ways[False]["broadcast"]), _mega(shares(ways[False])), _mega(ways[True]["broadcast"]),
         _mega(shares(ways[True])), f"{ways[True]['broadcast'] / shares(ways[True]):.1f}x"]
        for key, ways in found.items()
    ]  # fmt: skip
    heading = ["layer", "operands", "all units: `dgates` to all, MB", "shares of `dh`, MB",
               "kept units: `dgates` to all, MB", "shares of `dh`, MB", "ratio, kept"]  # fmt: skip
    return _table(heading, rows)


def kernels_table(document: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """The other kernels."""
    rows = []
    fraction = f"{1.0 - P:g}"
    for entry in document["kernels"]:
        keys = (f"products, {MEASURED_AS[Precision[entry['precision']]]}", PRODUCT_STACK)
        phase = entry["kernel"].removeprefix("gemm_").upper()

        def tell(one: Measured, keys: tuple[str, str] = keys, phase: str = phase) -> str:
            found = one.find("micro", *keys, phase, fraction)
            return UNMEASURED if found is None else _us(found)

        rows.append([
            f"`{entry['kernel']}`", "any" if entry["any_precision"] else _operands(entry["precision"]), entry["shape"],
            f"{entry['grid']:,} x {entry['threads']}", _registers(document, entry, entry["kernel"]),
            _kib(entry["shared"]) if entry["shared"] else "-", _mega(entry["flops"]) if entry["flops"] else "-",
            _mega(entry["l2"]) if entry["l2"] else "-", _mega(entry["memory"]) if entry["memory"] else "-",
            _us(entry["floor"]), *_cells(measured, tell),
        ])  # fmt: skip
    heading = [
        "kernel", "operands", "shape", "blocks x threads", "registers, sm_80 / sm_90", "shared memory, KiB", "MFLOP",
        "L2, MB", "memory, MB", "floor, µs, estimated", *_titles(measured),
    ]  # fmt: skip
    return _table(heading, rows)


def rates_table(document: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """What the floors are made of."""
    rates, multiprocessors = document["rates"], document["devices"]["H100"]["multiprocessors"]

    def most(one: Measured, part: str, key: str, best: Callable[..., float]) -> str:
        parts = one.sections.get("micro", {}).get("parts", {}).get(part)
        names = parts if isinstance(parts, Mapping) else {}
        found = [value for name in names if (value := one.find("micro", part, name, key)) is not None]
        return UNMEASURED if not found else f"{best(found):.3g}"

    def copied(one: Measured) -> str:
        found = one.find("device", "ceilings", "copy_TBps")
        return UNMEASURED if found is None else f"{found:.3g}"

    rows = [
        ["barrier of all blocks, µs", f"{rates['barrier_us']:g}",
         *_cells(measured, lambda one: most(one, "grid barrier", "counter_us", max))],
        ["memory, TB/s", f"{rates['memory_bytes_per_us'] / 1e6:g}", *_cells(measured, copied)],
        ["L2 cache, TB/s", f"{rates['l2_bytes_per_us'] / 1e6:g}",
         *_cells(measured, lambda one: most(one, "gathered rows from L2", "TBps", max))],
        ["shared memory of a multiprocessor, TB/s", f"{rates['shared_bytes_per_us'] / 1e6:g}",
         *_cells(measured, lambda one: UNMEASURED)],
    ]  # fmt: skip
    for precision, rate in rates["multiply_adds_per_us"].items():
        told = f"TFLOP/s of a multiprocessor, {_operands(precision)}"
        rows.append([told, f"{2 * rate / 1e6:g}", *_cells(measured, lambda one: UNMEASURED)])
    titles = [f"measured, {one.gpu}" for one in measured] or ["measured"]
    return _table([f"H100, {multiprocessors} multiprocessors", "estimated", *titles], rows)


def fits_table(document: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """The largest layers of the persistent kernels."""
    rows = []
    for entry in document["fits"]:
        device = document["devices"][entry["device"]]
        about = f"{entry['device']} ({device['multiprocessors']} multiprocessors, {_kib(device['shared_memory'])} KiB)"
        rows.append(
            [about, _operands(entry["precision"]), *(f"{most:,}" if most else "none" for most in entry["largest"])]
        )
    return _table(["GPU", "operands", *(f"B {batch}" for batch in document["batches"])], rows)


def measured_table(document: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """Whether any of this has been on a GPU."""
    if not measured:
        return "**No time here has been measured on a GPU.** Columns say so: unmeasured."
    told = "; ".join(f"{one.gpu}, [{one.name}](../benchmarks/results/{one.name})" for one in measured)
    return f"Measured by `scripts/gpu_check.py`: {told}. What is in none of these files says so: unmeasured."


#: Name of a table's marks -> what makes it.
TABLES: dict[str, Callable[[Mapping[str, Any], Sequence[Measured]], str]] = {
    "what is measured": measured_table,
    "the choices": choices_table,
    "the compiler": compiler_table,
    "the rates": rates_table,
    "the layers": layers_table,
    "the shares": shares_table,
    "the tiles": tiles_table,
    "the other kernels": kernels_table,
    "the largest layers": fits_table,
}


def updated(text: str, document: Mapping[str, Any], measured: Sequence[Measured], name: str) -> str:
    """``text`` with every table made anew.

    Raises:
        UsageError: marks are missing.
    """
    for title, make in TABLES.items():
        begin, end = f"<!-- table of {title}: begin -->", f"<!-- table of {title}: end -->"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise UsageError(f"--into {name}: it has no {begin} and {end}")
        text = f"{before}{begin}\n{make(document, measured)}\n{end}{after}"
    return text
