"""``gpu_check.py``: what decides the design of the kernels, measured one by one."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_check_cases import Layer, LayerRun
from gpu_check_machine import PRECISIONS, PRODUCTS, RECURRENCE, SHAPES, Machine, Precision, Shape, captured, shapes
from gpu_check_report import Section, one_line
from torch import Tensor, nn

from sd_plugin import kernels
from sd_plugin.bench import precision as bench_precision
from sd_plugin.bench.columns import PHASES
from sd_plugin.kernels.cuda import driver, sources
from sd_plugin.patterns import draw_kept

PROBES = driver.Unit("probes")

#: Kept fractions at which skipping is compared with a dense product.
FRACTIONS = (0.35, 0.5, 0.7, 0.9, 1.0)
ROUNDS = 500
_THREADS = 256


def ceilings(machine: Machine) -> dict[str, Any]:
    """Bandwidth of a copy, and of torch's matrix products."""
    x, y = torch.empty(2, 2**12 if machine.tiny else 2**28, device=machine.device)
    told: dict[str, Any] = {"copy_TBps": 2 * x.numel() * 4 / machine.us(lambda: y.copy_(x)) / 1e6}
    size = 32 if machine.tiny else 8192
    for precision in PRECISIONS:
        a, b = torch.randn(2, size, size, device=machine.device).to(precision.dtype)
        with precision.settings():
            told[f"{precision.name}_TFLOPs"] = 2 * size**3 / machine.us(partial(torch.mm, a, b), 5) / 1e6
    return told


def launches(machine: Machine) -> dict[str, Any]:
    """Microseconds that a launch keeps the host busy, ours and CuPy's own; and the device, in a graph and out of it."""
    like = torch.empty(1, device=machine.device)

    def ours() -> None:
        driver.launch(PROBES, "noop", like, 1, 32)

    # Few enough that the queue of launches is never full.
    told = {"ours_host_us": machine.host_us(ours, 500)}
    if machine.is_gpu:
        import cupy

        source = sources.read(PROBES.source)
        kernel = cupy.RawModule(code=source, options=driver.OPTIONS, backend="nvrtc").get_function("noop")
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            told["cupy_host_us"] = machine.host_us(lambda: kernel((1,), (32,), ()), 500)
    return {**told, "in_a_graph_us": machine.device_us(ours), "back_to_back_us": machine.us(ours)}


def barriers(machine: Machine) -> dict[str, Any]:
    """Microseconds of a barrier of all blocks: on one counter, and on a flag of each block that a warp polls."""
    rounds, most, told = 2 if machine.tiny else ROUNDS, machine.multiprocessors, {}
    for blocks in sorted({blocks for blocks in (16, 32, 64, 82, 125, 128) if blocks <= most} | {most}):
        words = torch.zeros(8 * blocks, dtype=torch.int32, device=machine.device)

        def run(name: str, *arguments: int, blocks: int = blocks, words: Tensor = words) -> None:
            words.zero_()
            driver.launch(PROBES, name, words, blocks, _THREADS, words, rounds, *arguments, cooperative=True)

        ways: dict[str, Callable[[], None]] = {
            "counter": partial(run, "barrier_counter"),
            "flags": partial(run, "barrier_flags", 1),
            "flags_apart": partial(run, "barrier_flags", 8),
        }
        told[f"{blocks} blocks"] = {f"{name}_us": machine.us(way, 5) / rounds for name, way in ways.items()}
    return told


def gathers(machine: Machine) -> dict[str, Any]:
    """Bandwidth at which all blocks read their columns of the kept rows of a recurrent weight, from the L2 cache."""
    blocks, repeat, told = machine.multiprocessors, 1 if machine.tiny else 50, {}
    sink = torch.zeros(1, device=machine.device)
    for name, shape in shapes(machine).items():
        hidden = max(hidden for _, hidden in shape.layers)
        matrix = torch.randn(hidden, 4 * hidden, device=machine.device)
        width = -(-hidden // blocks) * 4  # columns of 4 H, in fours
        for p in (0.0, shape.p):
            kept = draw_kept(1, hidden, p, device=machine.device).indices.contiguous()
            sizes = (kept.numel(), 4 * hidden, width, repeat)
            run = partial(
                driver.launch, PROBES, "gather_rows", matrix, blocks, _THREADS, matrix, kept, *sizes, sink
            )  # fmt: skip
            us = machine.us(run) / repeat
            told[f"{name}, p={p:g}"] = {"us_per_pass": us, "TBps": kept.numel() * 16 * hidden / us / 1e6}
    return told


def _per_step(us: float, shape: Shape) -> float:
    """Microseconds per layer and time step."""
    return us / (len(shape.layers) * shape.steps)


def stock_layers(machine: Machine, section: Section) -> dict[str, Any]:
    """``nn.LSTM`` alone: forward, and both ways, in microseconds per layer and time step."""
    told: dict[str, Any] = {}
    for name, shape in shapes(machine).items():
        for precision in PRECISIONS:
            if section.left() < 2.0:
                told["not_measured"] = f"{name} {precision.name} and what follows: no time left"
                return told
            try:
                told[f"{name} {precision.name}"] = _stock_layer(machine, precision, shape)
            except Exception as error:  # cuDNN has not every type everywhere
                told[f"{name} {precision.name}"] = one_line(error)
    return told


def _stock_layer(machine: Machine, precision: Precision, shape: Shape) -> dict[str, float]:
    # Matrix products outside of cuDNN stay as torch has them by default.
    with bench_precision.tf32(cudnn=precision.tf32, matmul=False):
        stack = [nn.LSTM(*sizes).to(machine.device, precision.dtype) for sizes in shape.layers]
        x = torch.randn(shape.steps, shape.batch, shape.layers[0][0], device=machine.device, dtype=precision.dtype)
        x.requires_grad_()

        def forward() -> Tensor:
            y = x
            for layer in stack:
                y, _ = layer(y)
            return y

        gradient = torch.randn_like(forward())
        parameters = [x, *(parameter for layer in stack for parameter in layer.parameters())]
        ways = {"forward": forward, "both": lambda: torch.autograd.grad(forward(), parameters, gradient)}
        return {way: _per_step(machine.us(run), shape) for way, run in ways.items()}


def our_layers(machine: Machine, section: Section, skipping: bool) -> dict[str, Any]:
    """Our layers as :func:`stock_layers`; ``both`` is forward and backward, ``pack`` what a training step adds once.

    ``device_forward`` and ``device_backward``: replayed as graphs, so without what Python takes.
    """
    told: dict[str, Any] = {}
    for name, shape in shapes(machine).items():
        for precision in PRECISIONS:
            if section.left() < 2.0:
                told["not_measured"] = f"{name} {precision.name} and what follows: no time left"
                return told
            try:
                told[f"{name} {precision.name}"] = _our_layer(machine, precision, shape, skipping)
            except Exception as error:  # such as a recurrence that is forced and does not fit
                told[f"{name} {precision.name}"] = one_line(error)
                if machine.is_broken():
                    raise
    wrong = [f"{name}: {found}" for name, found in told.items() if isinstance(found, str)]
    return {**told, "failed": wrong} if wrong and len(wrong) == len(told) else told


@torch.no_grad()
def _our_layer(machine: Machine, precision: Precision, shape: Shape, skipping: bool) -> dict[str, float]:
    with precision.settings():
        variant = "kept" if skipping else "dense"
        runs = [
            LayerRun.of(machine, precision.dtype, Layer(shape.steps, shape.batch, *sizes, shape.p), variant)
            for sizes in shape.layers
        ]
        packed = [run.pack() for run in runs]
        saved = [run.forward(pack).saved for run, pack in zip(runs, packed, strict=True)]
        ways: dict[str, Callable[[], object]] = {
            "forward": lambda: [run.forward(pack) for run, pack in zip(runs, packed, strict=True)],
            "backward": lambda: [run.backward(pack, kept) for run, pack, kept in zip(runs, packed, saved, strict=True)],
            "pack": lambda: [run.pack() for run in runs],
        }
        told = {way: _per_step(machine.us(run), shape) for way, run in ways.items()}
        told = {"forward": told["forward"], "both": told["forward"] + told["backward"], **told}
        for way in ("forward", "backward") if machine.is_gpu else ():
            graph = captured(ways[way])
            told[f"device_{way}"] = _per_step(machine.us(graph.replay), shape)
        return told


@torch.no_grad()
def host_costs(machine: Machine) -> dict[str, Any]:
    """Microseconds that one call keeps the host busy, at shapes whose work on the device is short."""
    run = LayerRun.of(machine, torch.float32, Layer(1, 4, 32, 32, 0.5), "kept")
    x, dy = run.operands["x"], torch.randn(1, 4, 64, device=machine.device)
    weight = torch.randn(64, 32, device=machine.device)
    with machine.ours():
        matrix, packed = kernels.gemm_pack(weight.t()), run.pack()
        saved = run.forward(packed).saved
        stock = nn.LSTM(32, 32).to(machine.device)
        calls: dict[str, Callable[[], object]] = {
            "gemm_fp": lambda: kernels.gemm_fp(x, matrix, run.kept),
            "gemm_bp": lambda: kernels.gemm_bp(dy, matrix, run.kept),
            "gemm_wg": lambda: kernels.gemm_wg(x, dy, run.kept),
            "lstm_pack": run.pack,
            "lstm_forward": lambda: run.forward(packed),
            "lstm_backward": lambda: run.backward(packed, saved),
            "draw_kept": lambda: draw_kept(35, 650, 0.5, device=machine.device),
            "torch.mm": lambda: torch.mm(x[0], weight.t()),
            "nn.LSTM forward": lambda: stock(x),
        }
        return {name: machine.host_us(call) for name, call in calls.items()}


def _product_shapes(machine: Machine) -> dict[str, tuple[int, int, int, int]]:
    """Steps, batch, units and outputs of products over all steps of a sequence."""
    if machine.tiny:
        return {"tiny": (3, 2, 10, 12)}
    widest = {name: max(hidden for _, hidden in shape.layers) for name, shape in SHAPES.items()}
    found = {name: (shape.steps, shape.batch, widest[name], 4 * widest[name]) for name, shape in SHAPES.items()}
    return {
        **found,
        "zaremba-medium projection": (35, 20, 650, 10_000),
        "zaremba-large projection": (35, 20, 1500, 10_000),
        "en-vi generator": (25, 64, 512, 7_700),
        "de-en generator": (25, 64, 512, 50_000),
    }


@torch.no_grad()
def products(machine: Machine, section: Section, precision: Precision) -> dict[str, Any]:
    """Device time of FP, BP and WG: cuBLAS on the whole operands, and ours that skip, at every kept fraction."""
    told: dict[str, Any] = {}
    with precision.settings(), machine.ours(**{PRODUCTS: "skip"}):
        for name, (count, batch, units, outputs) in _product_shapes(machine).items():
            if section.left() < 2.0:
                told["not_measured"] = f"{name} and what follows: no time left"
                break
            x = torch.randn(count, batch, units, device=machine.device).to(precision.dtype)
            dy = torch.randn(count, batch, outputs, device=machine.device).to(precision.dtype)
            weight = torch.randn(outputs, units, device=machine.device).to(precision.dtype)
            packed, rows, drows = kernels.gemm_pack(weight.t()), x.flatten(0, 1), dy.flatten(0, 1)
            dense: dict[str, Callable[[], object]] = {
                "FP": partial(torch.mm, rows, weight.t()),
                "BP": partial(torch.mm, drows, weight),
                "WG": partial(torch.mm, drows.t(), rows),
            }
            found: dict[str, Any] = {phase: {"dense": machine.device_us(run)} for phase, run in dense.items()}
            for fraction in FRACTIONS:
                kept = draw_kept(count, units, 1.0 - fraction, device=machine.device)
                ours: dict[str, Callable[[], object]] = {
                    "FP": partial(kernels.gemm_fp, x, packed, kept),
                    "BP": partial(kernels.gemm_bp, dy, packed, kept),
                    "WG": partial(kernels.gemm_wg, x, dy, kept),
                }
                for phase, run in ours.items():
                    found[phase][f"{fraction:g}"] = machine.device_us(run)
            told[name] = found
    return told


def thresholds(machine: Machine, measured: dict[str, Any]) -> dict[str, Any]:
    """From :func:`products` of each precision: up to which kept fraction skipping wins.

    Returns:
        ``suggested``: precision -> phase -> the largest fraction at which skipping is faster in the geometric mean of
        all shapes; 0 where it never is. ``choices``: that as the backend's ``choices.json`` has it. ``by_shape``: the
        same for each shape.
    """
    suggested: dict[str, dict[str, float]] = {}
    by_shape: dict[str, dict[str, dict[str, float]]] = {}
    for precision, shapes_of in measured.items():
        found = {name: phases for name, phases in shapes_of.items() if isinstance(phases, dict) and "FP" in phases}
        if not found:
            continue
        by_shape[precision] = {
            name: {phase: _largest_win([phases[phase]]) for phase in PHASES} for name, phases in found.items()
        }
        suggested[precision] = {phase: _largest_win([phases[phase] for phases in found.values()]) for phase in PHASES}
    if not suggested:
        return {"skipped": "no products were measured"}
    names = {precision.name: precision.of_backend for precision in PRECISIONS}
    choices = {
        phase.lower(): {names[precision]: found[phase] for precision, found in suggested.items()} for phase in PHASES
    }
    source = torch.cuda.get_device_name(machine.device) if machine.is_gpu else "no GPU"
    told = {"source": source, "largest_kept_fraction": choices}
    return {"suggested": suggested, "choices": told, "by_shape": by_shape}


def _largest_win(times: list[dict[str, float]]) -> float:
    wins = [
        fraction
        for fraction in FRACTIONS
        if statistics.geometric_mean([time["dense"] / time[f"{fraction:g}"] for time in times]) > 1.0
    ]
    return max(wins, default=0.0)


def check(section: Section, machine: Machine) -> None:
    """All of it, what decides most first."""
    if driver.driver().device_type == machine.device.type:
        section.part("launch", partial(launches, machine))
        section.part("grid barrier", partial(barriers, machine))
        section.part("gathered rows from L2", partial(gathers, machine))
    section.part("host", partial(host_costs, machine))
    section.part("stock nn.LSTM", partial(stock_layers, machine, section))
    for way in ("auto", "persistent", "steps"):
        for skipping in (False, True):
            name = f"our layer, {way}, {'skipping' if skipping else 'dense'}"
            with machine.ours(**{RECURRENCE: way}):
                section.part(name, partial(our_layers, machine, section, skipping))
        if way == "auto":
            # Before what nobody would choose.
            measured = {}
            for precision in PRECISIONS:
                found = section.part(f"products, {precision.name}", partial(products, machine, section, precision))
                measured[precision.name] = found
            section.part("thresholds", partial(thresholds, machine, measured))
