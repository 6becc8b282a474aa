"""``gpu_check.py``: every public kernel against float64, and where else it has to work: graphs, streams, compilers."""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_check_cases import (
    Case,
    LayerRun,
    decoder_cases,
    layer_cases,
    layers,
    loss_cases,
    product_case,
    product_cases,
    products,
)
from gpu_check_machine import PRECISIONS, PRODUCTS, RECURRENCE, Machine, Precision, captured
from gpu_check_processes import run
from gpu_check_report import Section, one_line
from torch import Tensor, nn

from sd_plugin import StructuredDropoutLSTM, kernels
from sd_plugin.bench.precision import refusal
from sd_plugin.kernels import BackendError

#: Largest error allowed, relative to the largest entry of a result. TF32 has float16's mantissa.
TOLERANCE = {
    "product": {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1.6e-2},
    "layer": {"fp32": 3e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 8e-2},
}
TESTS = ["-q", "tests/kernels", "-m", "not slow", "-k", "cuda", "-p", "no:cacheprovider"]


@dataclass
class Verdict:
    """What many cases of one kind came to.

    Attributes:
        worst: result -> largest error of all cases; failed: those beyond ``tolerance``, or that raised.
        not_run: cases that no time was left for.
    """

    tolerance: float
    cases: int = 0
    not_run: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)

    def compare(self, case: str, results: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take the results of a case: what was got, and what is right."""
        for name, (got, right) in results.items():
            error = largest_error(got, right)
            self.worst[name] = max(self.worst.get(name, 0.0), error)
            if not error <= self.tolerance:
                self.failed.append(f"{case}, {name}: {error:.2g}")

    def describe(self) -> dict[str, Any]:
        """For the file."""
        told: dict[str, Any] = {"passed": not self.failed, "cases": self.cases, "tolerance": self.tolerance}
        told["worst"] = self.worst
        for name in ("not_run", "failed", "unsupported"):
            if value := getattr(self, name):
                told[name] = value if isinstance(value, int) else value[:20]
        return told


def largest_error(got: Tensor, right: Tensor) -> float:
    """Of any entry, relative to the largest one that is right; infinite where one is not a number.

    All results are of size about one: where every one is nearly zero, the error is relative to little, not to them.
    """
    if got.shape != right.shape:
        raise ValueError(f"shape {tuple(got.shape)} must be {tuple(right.shape)}")
    if not got.numel():
        return 0.0
    error = (got.double() - right.double()).abs().max() / right.abs().max().clamp_min(1e-3)
    return error.nan_to_num(float("inf"), float("inf")).item()


def judged(seconds: float, machine: Machine, precision: Precision, cases: Iterator[Case], kind: str) -> dict[str, Any]:
    """All cases, as far as ``seconds`` allow."""
    torch.manual_seed(1)
    end = time.monotonic() + seconds
    verdict = Verdict(TOLERANCE[kind][precision.name])
    with torch.no_grad(), precision.settings():
        for name, case in cases:
            if time.monotonic() > end:
                verdict.not_run += 1
                continue
            try:
                verdict.compare(name, case())
                verdict.cases += 1
            except BackendError as error:
                if kernels.status()[machine.backend] is not None:
                    raise  # it can do nothing at all
                if one_line(error) not in verdict.unsupported:
                    verdict.unsupported.append(one_line(error))
            except Exception as error:
                verdict.failed.append(f"{name}: {one_line(error)}")
                if machine.is_broken():
                    break
    return verdict.describe()


def deterministic(machine: Machine) -> dict[str, Any]:
    """Two runs on the same operands are the same to the bit."""
    wrong = []
    for precision in PRECISIONS:
        with torch.no_grad(), precision.settings(), machine.ours():
            for sizes in layers(machine):
                run = LayerRun.of(machine, precision.dtype, sizes, "kept")
                first, second = run(), run()
                wrong += [f"{precision.name}, {sizes}, {name}" for name in first if not same(first[name], second[name])]
            for of_product in products(machine)[:2]:
                torch.manual_seed(1)
                one = product_case(machine, precision, of_product, "kept")
                torch.manual_seed(1)
                two = product_case(machine, precision, of_product, "kept")
                wrong += [f"{precision.name}, product, {name}" for name in one if not same(one[name][0], two[name][0])]
    return {"passed": not wrong, "failed": wrong}


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit."""
    return bool(torch.equal(a, b))


def in_a_graph(machine: Machine) -> dict[str, Any]:
    """Captured once, replayed on other inputs: the results of a plain run."""
    wrong = []
    few = (min(layers(machine), key=lambda sizes: sizes.hidden), max(layers(machine), key=lambda sizes: sizes.hidden))
    for precision in PRECISIONS:
        for sizes, variant in product(few, ("dense", "kept")):
            with torch.no_grad(), precision.settings(), machine.ours():
                run = LayerRun.of(machine, precision.dtype, sizes, variant)
                kept: dict[str, Tensor] = {}
                graph = captured(lambda run=run, kept=kept: kept.update(run()))
                for tensor in run.operands.values():
                    tensor.copy_(tensor.flip(0))
                graph.replay()
                machine.synchronize()
                plain = run()
                case = f"{precision.name}, {sizes}, {variant}"
                wrong += [f"{case}, {name}" for name in plain if not same(plain[name], kept[name])]
    return {"passed": not wrong, "failed": wrong}


def on_a_stream(machine: Machine) -> dict[str, Any]:
    """A stream that is not the default one, whose operands are still being made when the kernels are launched."""
    stream, wrong = torch.cuda.Stream(), []
    for precision in PRECISIONS:
        with torch.no_grad(), precision.settings(), machine.ours():
            run = LayerRun.of(machine, precision.dtype, layers(machine)[0], "kept")
            plain, x = run(), run.operands["x"].clone()
            run.operands["x"].fill_(float("nan"))
            machine.synchronize()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
                run.operands["x"].copy_(x)
                other = run()
            stream.synchronize()
            wrong += [f"{precision.name}, {name}" for name in plain if not same(plain[name], other[name])]
    return {"passed": not wrong, "failed": wrong}


class Model(nn.Module):
    """A structured LSTM with something of torch's own on either side."""

    def __init__(self, hidden: int, **options: Any) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(hidden, hidden), nn.Linear(hidden, 3)
        self.lstm = StructuredDropoutLSTM(hidden, hidden, 2, native=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.lstm(self.before(x).relu())[0])


def compiled(machine: Machine) -> dict[str, Any]:
    """``torch.compile`` around a structured LSTM: the same gradients without dropout, finite ones with it."""
    if not machine.is_gpu:
        return compiled_by(machine, "eager")
    try:
        return compiled_by(machine, "inductor")
    except Exception as error:
        # It needs compilers that not every machine has; what Dynamo makes of our functions shows without them, too.
        return {"inductor": one_line(error), **compiled_by(machine, "aot_eager")}


def compiled_by(machine: Machine, compiler: str) -> dict[str, Any]:
    """As :func:`compiled`, by one of the compilers."""
    torch.manual_seed(1)
    torch._dynamo.reset()
    hidden = 8 if machine.tiny else 96
    x = torch.randn(5, 4, hidden, device=machine.device)
    verdict = Verdict(TOLERANCE["layer"]["tf32"])
    with machine.ours():
        model = Model(hidden).to(machine.device)
        plain, quick = model(x), torch.compile(model, fullgraph=False, backend=compiler)(x)
        parameters = dict(model.named_parameters())
        right, got = (torch.autograd.grad(y.square().sum(), list(parameters.values())) for y in (plain, quick))
        verdict.compare("compiled", {"y": (quick.detach(), plain.detach())})
        verdict.compare("compiled", dict(zip(parameters, zip(got, right, strict=True), strict=True)))
        dropping = Model(hidden, dropout=0.5, recurrent_dropout=0.5).to(machine.device)
        torch.compile(dropping, fullgraph=False, backend=compiler)(x).square().sum().backward()
        if not all(parameter.grad.isfinite().all() for parameter in dropping.parameters()):
            verdict.failed.append("with dropout: gradients are not finite")
    verdict.cases = 2
    return {"compiler": compiler, **verdict.describe()}


def as_stock(machine: Machine, autocast: torch.dtype | None) -> dict[str, Any]:
    """The module without dropout against ``nn.LSTM`` on the same parameters: values and gradients."""
    if autocast is not None and (reason := refusal(autocast, machine.device)):
        return {"skipped": reason}
    torch.manual_seed(1)
    verdict = Verdict(TOLERANCE["layer"]["fp32" if autocast is None else "bf16"])
    hidden, lengths = 8 if machine.tiny else 200, torch.tensor([7, 7, 4, 2, 1])
    for options in ({}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True, "bias": False}):
        stock = nn.LSTM(hidden, hidden, **options).to(machine.device)
        ours = StructuredDropoutLSTM.from_lstm(stock, native=False)
        rows = (5, 7) if stock.batch_first else (7, 5)
        x = torch.randn(*rows, hidden, device=machine.device, requires_grad=True)
        for packed in (False, True):
            input = nn.utils.rnn.pack_padded_sequence(x, lengths, stock.batch_first) if packed else x
            results = []
            for module in (ours, stock):
                amp = torch.autocast(machine.device.type, autocast, enabled=autocast is not None)
                with PRECISIONS[0].settings(), machine.ours():
                    with amp:
                        y, (h, c) = module(input)
                    data = y.data if packed else y
                    total = data.float().square().sum() + h.float().sum() + c.float().square().sum()
                    grads = torch.autograd.grad(total, [x, *stock.parameters()], retain_graph=True)
                results.append((data.detach(), *grads))
            names = ["y", "dx", *(f"d{name}" for name, _ in stock.named_parameters())]
            case = f"{'packed' if packed else 'tensor'} {options}"
            verdict.compare(case, dict(zip(names, zip(*results, strict=True), strict=True)))
            verdict.cases += 1
    return verdict.describe()


def own_tests(seconds: float) -> dict[str, Any]:
    """The kernel tests of the repository, for the backend."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", *TESTS, f"--basetemp={folder}/pytest"]
        try:
            status, printed = run(command, seconds, cwd=root)
        except subprocess.TimeoutExpired:
            return {"skipped": f"not done within {seconds:.0f} s"}
    lines = printed.strip().splitlines()
    told = {"passed": status == 0, "summary": lines[-1] if lines else ""}
    wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return told if status == 0 else {**told, "failed": wrong[:20] or [f"exit status {status}"]}


def check(section: Section, machine: Machine) -> None:
    """All of it, what matters most first."""
    kinds: list[tuple[str, Callable[[Machine, Precision], Iterator[Case]], str, dict[str, str]]] = [
        ("layers", layer_cases, "layer", {RECURRENCE: "auto"}),
        ("products", product_cases, "product", {PRODUCTS: "auto"}),
        ("loss", loss_cases, "product", {}),
        ("products, skip", product_cases, "product", {PRODUCTS: "skip"}),
        ("layers, steps", layer_cases, "layer", {RECURRENCE: "steps"}),
        ("layers, persistent", layer_cases, "layer", {RECURRENCE: "persistent"}),
        ("products, dense", product_cases, "product", {PRODUCTS: "dense"}),
        ("decoder", decoder_cases, "layer", {}),
    ]
    section.part("module against nn.LSTM", partial(as_stock, machine, None))
    half = torch.float16 if machine.is_gpu else torch.bfloat16
    section.part("module against nn.LSTM, autocast", partial(as_stock, machine, half))
    section.part("deterministic", partial(deterministic, machine))
    if machine.is_gpu:
        section.part("in a CUDA graph", partial(in_a_graph, machine))
        section.part("on another stream", partial(on_a_stream, machine))
    runs = [(*kind, precision) for kind in kinds for precision in PRECISIONS]
    for i, (name, cases, kind, forced, precision) in enumerate(runs):
        if name == "decoder" and not _decodes_at_once(machine, precision):
            continue
        # None takes the time of all the others, the first of which compile what later ones find compiled.
        seconds = max(1.0, min(section.left(), 4 * section.left() / (len(runs) - i)))
        with machine.ours(**forced):
            run = partial(judged, seconds, machine, precision, cases(machine, precision), kind)
            section.part(f"{name}, {precision.name}", run, limit=seconds)
    section.part("torch.compile", partial(compiled, machine), at_least=20.0 if machine.is_gpu else 1.0)
    if machine.is_gpu:
        section.part("the repository's tests", lambda: own_tests(section.left()), 30.0, math.inf)


def _decodes_at_once(machine: Machine, precision: Precision) -> bool:
    try:
        with machine.ours():
            return kernels.decodes_at_once(machine.device, precision.dtype)
    except BackendError:
        return False
