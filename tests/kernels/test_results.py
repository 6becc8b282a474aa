"""Results of the differentiable operations belong to the program: it may write into each of them, as into torch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as stock_cross_entropy
from torch.nn.functional import linear as stock_linear

from sd_plugin import functional, hints
from sd_plugin.attentional import attentional_decoder
from sd_plugin.cell import StackedStructuredLSTM, SteppedDropout
from sd_plugin.functional import LayerCall, Operand
from sd_plugin.kernels import Kept, Steps
from sd_plugin.loss import cross_entropy
from sd_plugin.patterns import draw_kept, draw_mask

from .. import truth
from ..more import more
from .cases import tensor_of

Dtypes = Callable[[str], list[torch.dtype]]
#: Largest error of a value of size about one.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1.5e-1, torch.float16: 2e-2}
COUNT, BATCH, UNITS, COLUMNS = 3, 4, 6, 5


def _assign(y: Tensor) -> Tensor:
    y[..., 1] = -1
    return y


def _mask(y: Tensor) -> Tensor:
    y[:, 0] = -float("inf")
    return y.softmax(-1).nan_to_num()


def _add(y: Tensor) -> Tensor:
    y += 1
    return y


#: What programs do to results in place; OpenNMT-py's copy attention assigns minus infinity.
WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "add": _add,
    "multiply": lambda y: y.mul_(2),
    "assign": _assign,
    "mask": _mask,
    "relu": torch.relu_,
    "module": nn.ReLU(inplace=True),
    "through a view": lambda y: y.view(-1).neg_().view(y.shape) if y.is_contiguous() else y.neg_(),
    "zero": lambda y: y.zero_(),
}


@dataclass
class Layout:
    """Where the rows of time steps lie, and the kept units of an activation."""

    steps: Steps
    rows: tuple[int, ...]
    locked: bool = False
    lengths: list[int] = field(default_factory=lambda: [COUNT] * BATCH)

    def from_padded(self, padded: Tensor) -> Tensor:
        """``[T, B, K]`` laid out like this."""
        if self.steps.batch_sizes is not None:
            return torch.cat([padded[t, :n] for t, n in enumerate(self.steps.batch_sizes)])
        return padded.transpose(0, 1) if self.steps.time_dim else padded

    def dropped(self, kept: Kept, x: Tensor) -> Tensor:
        """``x`` with its hint; its gradient is that of what it is made of."""
        y = x * self.steps.spread(kept.multiplier(x.dtype))
        return hints.attach(y, [hints.Part(kept)], self.steps)


LAYOUTS = {
    "time-major": Layout(Steps(0), (COUNT, BATCH)),
    "batch-first": Layout(Steps(1), (BATCH, COUNT)),
    "packed": Layout(Steps.packed([4, 3, 1]), (8,), lengths=[3, 2, 2, 1]),
    "locked": Layout(Steps(0), (COUNT, BATCH), locked=True),
}


def assert_same(found: list[Tensor | None], expected: list[Tensor | None], dtype: torch.dtype, told: str) -> None:
    for got, truth_ in zip(found, expected, strict=True):
        assert got is not None and truth_ is not None, told
        size = max(1.0, float(truth_.abs().max())) if truth_.numel() else 1.0
        assert float((got.double() - truth_.double()).abs().max()) <= TOLERANCE[dtype] * size, told


def loss_of(results: list[Tensor], seed: int) -> Tensor:
    """A sum of every element with weights of its own."""
    return torch.stack(
        [(y.double() * tensor_of(seed + i, *y.shape)).sum() for i, y in enumerate(results)]
    ).sum()  # fmt: skip


def leaves(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors to differentiate by, of that dtype's values."""
    return {
        name: (tensor_of(i, *shape) * 0.5).to(dtype).requires_grad_() for i, (name, shape) in enumerate(shapes.items())
    }


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in float64."""
    return {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}


def gradients(results: list[Tensor], leaves_: dict[str, Tensor]) -> list[Tensor]:
    """Of every leaf; zeros where it is not used."""
    found = torch.autograd.grad(loss_of(results, 7), list(leaves_.values()), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves_.values(), strict=True)]


def assert_free(
    dtypes: list[torch.dtype],
    shapes: dict[str, tuple[int, ...]],
    made: Callable[[dict[str, Tensor]], list[Tensor]],
    exact: Callable[[dict[str, Tensor]], list[Tensor]],
) -> None:
    """Each result can be written in each way, and then the gradients are those of the exact program in float64."""
    for dtype in dtypes:
        low = leaves(dtype, **shapes)
        high = doubled(low)
        # What a result may be used for is no matter of its dtype.
        writes = WRITES if dtype == dtypes[0] else {"mask": _mask}
        for which, (name, write) in itertools.product(range(len(exact(high))), writes.items()):
            found, expected = made(low), exact(high)
            for y in found:
                assert y._base is None, "a view, and not of an operation that torch knows"
            found[which] = write(found[which])
            expected[which] = write(expected[which].clone())
            assert_same(gradients(found, low), gradients(expected, high), dtype, f"{name} of result {which}")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_product_can_be_written_in_place(layout: Layout, biased: bool, dtypes_of: Dtypes) -> None:
    kept = draw_kept(COUNT, UNITS, 0.5, locked=layout.locked)
    shapes = {"x": (*layout.rows, UNITS), "weight": (COLUMNS, UNITS), "bias": (COLUMNS,)}

    def product(linear: Callable[..., Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
        x = layout.dropped(kept, tensors["x"])
        return [linear(x, tensors["weight"], tensors["bias"] if biased else None)]

    assert_free(dtypes_of("gemm_fp"), shapes, partial(product, functional.linear), partial(product, stock_linear))


def test_a_product_of_a_view_can_be_written_in_place(dtypes_of: Dtypes) -> None:
    """Rows without time steps, and an input without a hint."""
    kept = draw_kept(COUNT, UNITS, 0.5)
    for dtype in dtypes_of("gemm_fp"):
        for hinted in (True, False):
            tensors = leaves(dtype, x=(COUNT, BATCH, UNITS), weight=(COLUMNS, UNITS))
            for write in WRITES.values():
                grads = []
                for copied in (False, True):
                    x = tensors["x"] * 1
                    x = LAYOUTS["time-major"].dropped(kept, x) if hinted else x
                    y = functional.linear(x.view(-1, UNITS), tensors["weight"], native=False)
                    y = write(y.clone() if copied else y)
                    grads.append(list(torch.autograd.grad(loss_of([y], 7), list(tensors.values()))))
                assert_same(*grads, dtype, "")


@pytest.mark.parametrize(
    ("recurrent", "reverse"),
    [
        ("none", False), ("structured", True), ("random", False),
        *more(("none", True), ("structured", False), ("random", True)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_results_of_a_layer_can_be_written_in_place(
    layout: Layout, recurrent: str, reverse: bool, dtypes_of: Dtypes
) -> None:
    hidden, padded = 3, torch.arange(COUNT * BATCH).view(COUNT, BATCH, 1)
    kept = draw_kept(COUNT, UNITS, 0.5, locked=layout.locked)
    pattern = {
        "none": None,
        "structured": draw_kept(COUNT, hidden, 0.5, locked=layout.locked),
        "random": draw_mask(COUNT, BATCH, hidden, 0.5),
    }[recurrent]
    rows = layout.from_padded(padded).flatten()
    shapes = {
        "x": (*layout.rows, UNITS), "h0": (BATCH, hidden), "c0": (BATCH, hidden), "weight_ih": (4 * hidden, UNITS),
        "weight_hh": (4 * hidden, hidden), "bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,),
    }  # fmt: skip

    def layer(tensors: dict[str, Tensor]) -> list[Tensor]:
        x, h0, c0, *parameters = tensors.values()
        x = layout.dropped(kept, x)
        call = LayerCall(Operand.hinted(hints.lookup(x), x), Operand(pattern), layout.steps, reverse)
        return list(functional.lstm_layer(x, (h0, c0), tuple(parameters), call))  # type: ignore[arg-type]

    def exact(tensors: dict[str, Tensor]) -> list[Tensor]:
        x, h0, c0, *parameters = tensors.values()
        x = layout.dropped(kept, x).flatten(0, -2)
        whole = x.new_zeros(COUNT * BATCH, UNITS).index_put((rows,), x).view(COUNT, BATCH, UNITS)
        drop = truth.multiplier(pattern, COUNT, BATCH, hidden, torch.float64)
        y, h, c = truth.lstm_layer(whole, h0, c0, tuple(parameters), drop, layout.lengths, reverse)  # type: ignore[arg-type]
        return [layout.from_padded(y), h, c]

    assert_free(dtypes_of("lstm"), shapes, layer, exact)


@pytest.mark.parametrize("general", [False, True])
def test_results_of_a_decoder_can_be_written_in_place(backend: str, device: str, general: bool) -> None:
    """Kernel by kernel it equals a decoder in float64; here, a program that writes equals one that copies first."""
    dtype, hidden, source = torch.float32, 4, 3
    torch.manual_seed(0)
    stack = StackedStructuredLSTM(2, UNITS + hidden, hidden, dropout=0.5, recurrent_dropout=0.5, output_dropout=0.5)
    tensors = leaves(
        dtype, emb=(BATCH, COUNT, UNITS), memory=(BATCH, source, hidden), h0=(2, BATCH, hidden), c0=(2, BATCH, hidden),
        feed=(BATCH, hidden), query=(hidden, hidden), join=(hidden, 2 * hidden),
    )  # fmt: skip
    kept = draw_kept(COUNT, UNITS, 0.5)
    lengths = torch.full((BATCH,), source, dtype=torch.int32)
    wanted = [t for name, t in tensors.items() if general or name != "query"] + list(stack.parameters())
    for (name, write), which in itertools.product({"mask": _mask, "assign": _assign}.items(), range(4)):
        grads = []
        for copied in (False, True):
            torch.manual_seed(1)
            emb = LAYOUTS["batch-first"].dropped(kept, tensors["emb"])
            run = stack.start(COUNT, BATCH, emb)
            drop = SteppedDropout(draw_kept(COUNT, hidden, 0.5), "output")
            y, (h_n, c_n), align = attentional_decoder(
                run, emb, tensors["memory"], lengths, (tensors["h0"], tensors["c0"]), tensors["feed"], drop,
                tensors["query"] if general else None, tensors["join"],
            )  # fmt: skip
            results = [y, h_n, c_n, align]
            assert all(result._base is None for result in results)
            results[which] = write(results[which].clone() if copied else results[which])
            grads.append(list(torch.autograd.grad(loss_of(results, 7), wanted)))
        assert_same(*grads, dtype, f"{name} of result {which}")


def test_a_loss_can_be_written_in_place(dtypes_of: Dtypes) -> None:
    target = torch.tensor([1, 0, -100, 4])
    for dtype in dtypes_of("cross_entropy"):
        low = leaves(dtype, logits=(4, COLUMNS))
        high = doubled(low)

        def losses(tensors: dict[str, Tensor], function: Callable[..., Tensor]) -> list[Tensor]:
            return [function(tensors["logits"], target, reduction="none", label_smoothing=0.1).view(2, 2)]

        for name, write in WRITES.items():
            found = write(losses(low, cross_entropy)[0])
            expected = write(losses(high, stock_cross_entropy)[0].clone())
            got = torch.autograd.grad(loss_of([found], 7), list(low.values()))
            right = torch.autograd.grad(loss_of([expected], 7), list(high.values()))
            assert_same(list(got), list(right), dtype, name)
        assert cross_entropy(low["logits"], target, reduction="none")._base is None
