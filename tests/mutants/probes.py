"""Short runs of the emulated CUDA kernels that fail if anything about them is wrong: each is a function that raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sd_plugin.kernels import (
    Kept,
    LSTMCall,
    LSTMResultGradients,
    Steps,
    Wanted,
    cross_entropy_backward,
    cross_entropy_forward,
    gemm_bp,
    gemm_fp,
    gemm_pack,
    gemm_wg,
)
from sd_plugin.kernels.cuda import choices, lstm, packing, pattern, precision
from sd_plugin.kernels.cuda.precision import Precision
from sd_plugin.kernels.cuda.tiling import Tile
from sd_plugin.kernels.reference import BACKEND as REFERENCE

from ..emulation.emulator import EmulatedDriver
from ..kernels import test_cuda_decoder
from ..kernels.cases import rounded
from ..kernels.test_cuda_decoder import Case
from ..tolerances import assert_close

Probe = Callable[[], None]
_STEPS = Steps.packed((11, 11, 6, 2))
_INPUTS = 3


@contextmanager
def in_precision(wanted: Precision) -> Iterator[None]:
    """Layers and products take float32 operands in this precision."""
    with mock.patch.object(precision, "_allows_tf32", return_value=wanted is Precision.TF32):
        yield


@dataclass(frozen=True)
class Layer:
    """One layer's operands and, in float64, its results.

    Attributes:
        operands: by name; expected: of the forward pass and then of the backward pass.
    """

    operands: dict[str, Any]
    expected: list[Tensor]

    @classmethod
    @cache
    def of(cls, wanted: Precision, hidden: int, kind: str, reverse: bool) -> Layer:
        """A layer with a recurrent pattern that is ``kept``, ``padded``, a ``mask`` or ``none``."""
        generator = torch.Generator().manual_seed(hidden)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * 0.7).to(wanted.dtype)

        steps, batch, rows = len(_STEPS.batch_sizes or ()), 11, 30
        weights = [normal(4 * hidden, _INPUTS), normal(4 * hidden, hidden) * hidden**-0.5]
        weights += [normal(4 * hidden), normal(4 * hidden)]
        noise = torch.rand(steps, hidden, generator=generator)
        pattern_h: Any = None
        if kind == "mask":
            pattern_h = (torch.rand(steps, batch, hidden, generator=generator) < 0.5).to(wanted.dtype) * 2
        elif kind != "none":
            count = hidden // 2 + 1 if kind == "kept" else None
            indices, _ = REFERENCE.kept_lists(noise, count, 0.4, 1.0)
            pattern_h = Kept(indices, hidden, 1.75, padded=kind == "padded")
        states = [normal(batch, hidden) for _ in range(4)]
        operands = {
            "weights": weights, "x": normal(rows, _INPUTS), "states": states, "dy": normal(rows, hidden),
            "pattern": pattern_h, "reverse": reverse,
        }  # fmt: skip
        high = {
            name: [v.double() for v in value] if isinstance(value, list) else value.double()
            if isinstance(value, Tensor) else value
            for name, value in operands.items()
        }  # fmt: skip
        return cls(operands, _run(REFERENCE, high))


def _run(backend: Any, layer: dict[str, Any]) -> list[Tensor]:
    """Results of the forward and of the backward pass."""
    packed = backend.lstm_pack(*layer["weights"])
    h0, c0, dh_n, dc_n = layer["states"]
    call = LSTMCall(None, layer["pattern"], _STEPS, layer["reverse"])
    y, h_n, c_n, saved = backend.lstm_forward(packed, layer["x"], (h0, c0), call)
    gradients = LSTMResultGradients(layer["dy"], dh_n, dc_n)
    grads = backend.lstm_backward(packed, layer["x"], saved, gradients, call, Wanted(gates=True))
    return [y, h_n, c_n, *grads]


def layer(wanted: Precision, tile: Tile | None, hidden: int, kind: str, reverse: bool = False) -> Probe:
    """A layer in persistent kernels of ``tile``, or step by step."""

    def probe() -> None:
        expected = Layer.of(wanted, hidden, kind, reverse)
        with in_precision(wanted), mock.patch.object(choices, "recurrence", return_value=tile):
            got = _run(lstm, expected.operands)
        for index, (result, exact) in enumerate(zip(got, expected.expected, strict=True)):
            terms, depth = _INPUTS + 4 * hidden, 2 * (len(_STEPS.batch_sizes or ()) + 1)
            assert_close(result, exact, terms, depth, operands=rounded(wanted), exact=True, name=f"result {index}")

    return probe


def persistent() -> list[Probe]:
    """Every kind of tile: parts and slices that are not full, rings that turn, steps with few chunks."""
    found = []
    for wanted in (Precision.STRICT, Precision.TF32, Precision.F16):
        for units, tiles in ((12, 1), (4, 2)):
            for stages in (12, 0):
                tile = Tile(wanted, units, tiles, stages)
                found += [layer(wanted, tile, 22, "kept"), layer(wanted, tile, 22, "mask", reverse=True)]
    # More chunks than the rings have stages.
    found += [layer(Precision.TF32, Tile(Precision.TF32, 12, 1, stages), 530, "none") for stages in (4, 12)]
    found += [layer(Precision.STRICT, Tile(Precision.STRICT, 16, 2, stages), 30, "padded") for stages in (8, 0)]
    return found


def step_by_step() -> list[Probe]:
    """Cells between products."""
    # An odd number of units leaves columns of zeros in half precision.
    found = [layer(wanted, None, 23, kind) for wanted in (Precision.STRICT, Precision.F16) for kind in ("kept", "mask")]
    return [*found, layer(Precision.STRICT, None, 22, "none", reverse=True)]


def draws(units: int, count: int | None) -> Probe:
    """Kept units from noise, with ties."""

    def probe() -> None:
        noise = (torch.rand(3, units, generator=torch.Generator().manual_seed(units)) * 50).floor() / 50
        p = 0.5
        kept, factors = pattern.kept_lists(noise, count, p, 2.0)
        if count is None:
            expected = noise >= p
        else:
            # The first of equals.
            order = noise.sort(dim=1, descending=True, stable=True).indices[:, :count]
            expected = torch.zeros(3, units, dtype=torch.bool).scatter_(1, order, True)
        assert bool(((kept >= 0) & (kept <= units)).all())
        assert torch.equal(Kept(kept, units, padded=True).mask(), expected)
        assert torch.equal(kept.sort(1).values, kept)
        assert factors is not None and torch.equal(factors, expected * 2.0)

    return probe


def orders(units: int, count: int, wanted: Precision) -> Probe:
    """Kept units sorted for the banks of shared memory, from a list with entries that name none."""

    def probe() -> None:
        generator = torch.Generator().manual_seed(count)
        chosen = (
            torch.stack([torch.randperm(units, generator=generator)[:count] for _ in range(3)]).sort(1).values.int()
        )
        chosen[0, -2:], chosen[1, 0] = units, -1
        listed = lstm.recurrent_of(Kept(chosen, units, 2.0, padded=True), 3, units, wanted)
        classes = 8 if wanted.dtype.itemsize == 2 else 4
        assert listed.order is not None and listed.factors is not None
        for step, row in enumerate(listed.order.tolist()):
            valid = sorted(u for u in chosen[step].tolist() if 0 <= u < units)
            assert sorted(u for u in row if u != units) == valid
            assert row[len(valid) :] == [units] * (count - len(valid))
            full = min(sum(u % classes == c for u in valid) for c in range(classes))
            rounds = [row[classes * i : classes * (i + 1)] for i in range(full)]
            assert all(sorted(u % classes for u in turn) == list(range(classes)) for turn in rounds)
            expected = torch.zeros(units)
            expected[valid] = 2.0
            assert torch.equal(listed.factors[step], expected)

    return probe


def packs(outputs: int, units: int, groups: int) -> Probe:
    """A weight by rows of units."""

    def probe() -> None:
        weight = torch.randn(outputs, units, generator=torch.Generator().manual_seed(units))
        packed = packing.by_units(weight, Precision.STRICT, groups)
        expected = weight.view(groups, outputs // groups, units).transpose(0, 1).reshape(outputs, units).t()
        assert torch.equal(packed[:, :outputs], expected)
        assert not packed[:, outputs:].any()

    return probe


def patterns() -> list[Probe]:
    """What is drawn, sorted and packed."""
    found = [draws(units, count) for units, count in ((300, 150), (7, 3), (300, None), (520, 519), (33, 0))]
    found += [orders(units, count, wanted) for units, count in ((37, 20), (300, 299)) for wanted in Precision]
    return [*found, packs(44, 37, 4), packs(35, 70, 1), packs(64, 64, 1)]


def product(wanted: Precision, steps: Steps, rows: tuple[int, ...], units: int, outputs: int, kind: str) -> Probe:
    """The three products of a pattern, skipping and with zeros in place of dropped units, which hold NaN here."""

    def probe() -> None:
        generator = torch.Generator().manual_seed(units)
        count = steps.count(torch.empty(*rows, 0))
        noise = torch.rand(1 if kind == "locked" else count, units, generator=generator)
        indices, _ = REFERENCE.kept_lists(noise, None if kind == "padded" else units // 2 + 1, 0.4, 1.0)
        if kind == "wild":
            indices[0, 0], indices[-1, -1] = -3, units + 5
        kept = Kept(indices.expand(count, -1), units, 1.75, padded=kind == "padded")
        valid = (kept.indices >= 0) & (kept.indices < units)
        exact = Kept(torch.where(valid, kept.indices, units).sort(1).values, units, 1.75, padded=True)
        x, dy = (torch.randn(*rows, n, generator=generator).to(wanted.dtype) for n in (units, outputs))
        weight = torch.randn(units, outputs, generator=generator).to(wanted.dtype)
        bias = torch.randn(outputs, generator=generator).to(wanted.dtype)
        dropped = steps.spread(exact.mask()).expand_as(x)
        x = torch.where(dropped, x, float("nan"))
        high = [tensor.double() for tensor in (x, dy, weight, bias)]
        expected = [
            REFERENCE.gemm_fp(high[0], high[2], exact, steps, high[3]),
            REFERENCE.gemm_bp(high[1], high[2], exact, steps),
            REFERENCE.gemm_wg(high[0], high[1], exact, steps),
        ]
        for way in ("skip", "dense"):
            with in_precision(wanted), mock.patch.dict("os.environ", SD_PLUGIN_CUDA_PRODUCTS=way):
                packed = gemm_pack(weight)
                got = [gemm_fp(x, packed, kept, steps, bias), gemm_bp(dy, packed, kept, steps)]
                got.append(gemm_wg(x, dy, kept, steps))
            terms = max(units, outputs, x[..., 0].numel())
            for name, result, right in zip(("fp", "bp", "wg"), got, expected, strict=True):
                assert_close(result, right, terms, depth=2, operands=rounded(wanted), exact=True, name=f"{name}, {way}")

    return probe


def products() -> list[Probe]:
    """Tiles that are not full, several of them, more steps than are looked up at once."""
    packed, major, first = Steps.packed((70, 13, 3)), Steps(0), Steps(1)
    found = []
    for wanted in (Precision.STRICT, Precision.TF32, Precision.F16):
        found += [
            product(wanted, packed, (86,), 150, 139, "padded"),
            product(wanted, major, (3, 20), 70, 260, "wild"),
            product(wanted, first, (9, 2), 37, 21, "locked"),
        ]
    return [*found, product(Precision.STRICT, major, (140, 1), 9, 5, "padded"), unsorted]


def unsorted() -> None:
    """A list that does not ascend gives no result worth having, and reads and writes nothing else."""
    units = 1000
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(units, generator=generator) for _ in range(2)]).int()
    indices[:, ::3] -= 10**6
    kept = Kept(indices, units)
    with mock.patch.dict("os.environ", SD_PLUGIN_CUDA_PRODUCTS="skip"):
        gemm_wg(torch.ones(2, 3, units), torch.ones(2, 3, 5), kept)


def cross_entropy(dtype: torch.dtype, rows: int, columns: int) -> Probe:
    """The loss and its gradient, with a target that is ignored."""

    def probe() -> None:
        generator = torch.Generator().manual_seed(columns)
        logits = (torch.randn(rows, columns + 1, generator=generator) * 5).to(dtype)[:, 1:]
        target = torch.randint(columns, (rows,), generator=generator)
        target[0] = -100
        scale = torch.randn(rows, generator=generator).to(dtype)
        told = (target, -100, 0.1)
        loss, lse = REFERENCE.cross_entropy_forward(logits.double(), *told)
        gradient = REFERENCE.cross_entropy_backward(logits.double(), *told, lse, scale.double())
        got, got_lse = cross_entropy_forward(logits, *told)
        model = {"terms": columns, "depth": 1, "magnitude": float(logits.abs().max()), "exact": True}
        assert_close(got, loss, name="loss", **model)
        assert_close(cross_entropy_backward(logits, *told, got_lse, scale), gradient, name="gradient", **model)

    return probe


def losses() -> list[Probe]:
    """Rows shorter and longer than what the threads take at once."""
    return [cross_entropy(dtype, 3, n) for dtype in (torch.float32, torch.float16) for n in (3, 41, 700, 5000)]


def decoder(case: Case) -> Probe:
    """The decoder, both passes."""

    def probe() -> None:
        low, kept = case.tensors(), case.kept()
        test_cuda_decoder.check(case, test_cuda_decoder.run(case), low, kept)

    return probe


def decoders() -> list[Probe]:
    """Both attentions, sources with a tail, more units than threads."""
    return [
        decoder(Case()),
        decoder(Case(Precision.F16, source=70, batch=5, masks=True, time_dim=0)),
        decoder(Case(Precision.TF32, layers=1, general=False, hidden=13, source=37)),
        decoder(Case(hidden=600, layers=1, count=2, source=3)),
        # A pattern of what is fed back that is not the output's.
        lambda: test_cuda_decoder.test_pattern_of_the_feed_applies_at_every_step(EmulatedDriver()),
    ]
