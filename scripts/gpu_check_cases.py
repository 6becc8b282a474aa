"""``gpu_check.py``: every kernel in many sizes and layouts, ours and its definition in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_check_decoder import decoder_case
from gpu_check_machine import Machine, Precision, shapes
from torch import Tensor

from sd_plugin import kernels
from sd_plugin.kernels import TIME_MAJOR, Kept, LSTMCall, LSTMResultGradients, Steps
from sd_plugin.patterns import draw_kept, draw_mask


class Product(NamedTuple):
    """Sizes of a matrix product."""

    count: int
    batch: int
    units: int
    outputs: int
    p: float


class Layer(NamedTuple):
    """Sizes of an LSTM layer."""

    count: int
    batch: int
    inputs: int
    hidden: int
    p: float


ODD_PRODUCTS = (Product(3, 3, 37, 53, 0.5), Product(2, 1, 65, 129, 0.3), Product(2, 1, 1, 1, 0.0))
ODD_LAYERS = (Layer(3, 3, 37, 53, 0.5), Layer(4, 33, 65, 67, 0.3), Layer(2, 1, 1, 1, 0.0))
VARIANTS = ("dense", "kept", "padded", "locked", "packed", "batch-first")


def products(machine: Machine) -> list[Product]:
    """Sizes of all products, of few steps."""
    if machine.tiny:
        return list(ODD_PRODUCTS)
    steps = 4
    found = {
        Product(steps, shape.batch, units, 4 * hidden, shape.p)
        for shape in shapes(machine).values()
        for inputs, hidden in shape.layers
        for units in (inputs, hidden)
    }
    return [*sorted(found), Product(steps, 20, 650, 10_000, 0.5), Product(2, 64, 512, 50_000, 0.3), *ODD_PRODUCTS]


def layers(machine: Machine) -> list[Layer]:
    """Sizes of all layers, of few steps; one of many, and of a batch that is larger than any block's part."""
    if machine.tiny:
        return list(ODD_LAYERS)
    found = {
        Layer(6, shape.batch, *sizes, shape.p) for shape in shapes(machine).values() for sizes in shape.layers
    }  # fmt: skip
    return [*sorted(found), Layer(70, 20, 400, 1150, 0.5), Layer(3, 130, 96, 200, 0.5), *ODD_LAYERS]


def _steps_of(variant: str, count: int, batch: int) -> tuple[Steps, tuple[int, ...]]:
    """The layout, and the shape of an activation's rows."""
    if variant == "packed":
        sizes = [max(1, batch - t * max(1, batch // count)) for t in range(count)]
        return Steps.packed(sizes), (sum(sizes),)
    if variant == "batch-first":
        return Steps(1), (batch, count)
    return TIME_MAJOR, (count, batch)


def _kept(variant: str, count: int, size: int, p: float, device: torch.device) -> Kept | None:
    if variant == "dense":
        return None
    sampling = "bernoulli" if variant == "padded" else "exact"
    return draw_kept(count, size, p, locked=variant == "locked", sampling=sampling, device=device)


def _spoiled(x: Tensor, kept: Kept | None, steps: Steps) -> Tensor:
    """``x`` with what must not be read set to what would show."""
    return x if kept is None else x.masked_fill(~steps.spread(kept.mask()), float("nan"))


def _normal(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    # Drawn on the CPU: a generator there gives the same numbers on every machine.
    return (torch.randn(shape) * scale).to(device, dtype)


def product_case(
    machine: Machine, precision: Precision, sizes: Product, variant: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """FP, BP and WG of one product: ours, and the definition's in float64."""
    steps, rows = _steps_of(variant, sizes.count, sizes.batch)
    normal = partial(_normal, machine.device, precision.dtype)
    kept = _kept(variant, sizes.count, sizes.units, sizes.p, machine.device)
    x, dy = _spoiled(normal(*rows, sizes.units), kept, steps), normal(*rows, sizes.outputs)
    # As the host holds it, and handed over as the transposed view that hosts hand over.
    weight = normal(sizes.outputs, sizes.units, scale=sizes.units**-0.5)
    bias = normal(sizes.outputs) if variant != "dense" else None

    def run(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        packed = kernels.gemm_pack(weight.t())
        return (
            kernels.gemm_fp(x, packed, kept, steps, bias),
            kernels.gemm_bp(dy, packed, kept, steps),
            kernels.gemm_wg(x, dy, kept, steps),
        )

    got = run(x, dy, weight, bias)
    with machine.exact():
        right = run(x.double(), dy.double(), weight.double(), None if bias is None else bias.double())
    return dict(zip(("FP", "BP", "WG"), zip(got, right, strict=True), strict=True))


@dataclass
class LayerRun:
    """An LSTM layer's operands, and its two passes."""

    operands: dict[str, Tensor]
    steps: Steps
    kept: Kept | None = None
    pattern: Kept | Tensor | None = None
    reverse: bool = False

    @classmethod
    def of(cls, machine: Machine, dtype: torch.dtype, sizes: Layer, variant: str, reverse: bool = False) -> "LayerRun":
        """Random operands; ``variant`` as of products, or ``random``: a multiplier on the recurrent state."""
        count, batch, inputs, hidden, p = sizes
        steps, rows = _steps_of(variant, count, batch)
        normal = partial(_normal, machine.device, dtype)
        kept = pattern = None
        if variant == "random":
            pattern = draw_mask(count, batch, hidden, p, device=machine.device, dtype=dtype)
        else:
            kept = _kept(variant, count, inputs, p, machine.device)
            pattern = _kept(variant, count, hidden, p, machine.device)
        x = normal(*rows, inputs)
        if kept is not None:
            x, kept = x * steps.spread(kept.multiplier(dtype)), kept.unscaled()
        operands = {
            "weight_ih": normal(4 * hidden, inputs, scale=inputs**-0.5),
            "weight_hh": normal(4 * hidden, hidden, scale=hidden**-0.5),
            "bias_ih": normal(4 * hidden, scale=0.3),
            "bias_hh": normal(4 * hidden, scale=0.3),
            "x": x,
            "h0": normal(batch, hidden, scale=0.5),
            "c0": normal(batch, hidden),
            "dy": normal(*rows, hidden),
            "dh_n": normal(batch, hidden),
            "dc_n": normal(batch, hidden),
        }
        return cls(operands, steps, kept, pattern, reverse)

    def exact(self) -> "LayerRun":
        """The same in float64."""
        pattern = self.pattern.double() if isinstance(self.pattern, Tensor) else self.pattern
        operands = {name: tensor.double() for name, tensor in self.operands.items()}
        return LayerRun(operands, self.steps, self.kept, pattern, self.reverse)

    @property
    def call(self) -> LSTMCall:
        """What both passes are told."""
        return LSTMCall(self.kept, self.pattern, self.steps, self.reverse)

    def pack(self) -> kernels.PackedWeights:
        """The weights as our kernels want them."""
        return kernels.lstm_pack(*(self.operands[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))

    def forward(self, packed: kernels.PackedWeights) -> kernels.LSTMResult:
        """The forward pass."""
        x, h0, c0 = (self.operands[name] for name in ("x", "h0", "c0"))
        return kernels.lstm_forward(packed, x, (h0, c0), self.call)

    def backward(self, packed: kernels.PackedWeights, saved: Any) -> kernels.LSTMGradients:
        """The backward pass."""
        dy, dh_n, dc_n, x = (self.operands[name] for name in ("dy", "dh_n", "dc_n", "x"))
        return kernels.lstm_backward(packed, x, saved, LSTMResultGradients(dy, dh_n, dc_n), self.call)

    def __call__(self) -> dict[str, Tensor]:
        """Both passes; every result by its name."""
        packed = self.pack()
        result = self.forward(packed)
        grads = self.backward(packed, result.saved)
        named = {f"d{name}": tensor for name, tensor in grads._asdict().items() if tensor is not None}
        return {"y": result.y, "h_n": result.h_n, "c_n": result.c_n, **named}


def layer_case(
    machine: Machine, precision: Precision, sizes: Layer, variant: str, reverse: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """A layer both ways: ours, and the definition's in float64."""
    run = LayerRun.of(machine, precision.dtype, sizes, variant, reverse)
    got = run()
    with machine.exact():
        right = run.exact()()
    return {name: (tensor, right[name]) for name, tensor in got.items()}


def loss_case(
    machine: Machine, precision: Precision, rows: int, columns: int, smoothing: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Cross entropy both ways; some rows are ignored."""
    logits = _normal(machine.device, precision.dtype, rows, columns, scale=3.0)
    target = torch.randint(columns, (rows,)).masked_fill(torch.rand(rows) < 0.2, -100).to(machine.device)
    scale = _normal(machine.device, torch.float32, rows)

    def run(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        loss, lse = kernels.cross_entropy_forward(logits, target, -100, smoothing)
        return loss, kernels.cross_entropy_backward(logits, target, -100, smoothing, lse, scale)

    got = run(logits, scale.to(precision.dtype))
    with machine.exact():
        right = run(logits.double(), scale.to(precision.dtype).double())
    return dict(zip(("loss", "dlogits"), zip(got, right, strict=True), strict=True))


Case = tuple[str, Callable[[], dict[str, tuple[Tensor, Tensor]]]]


def product_cases(machine: Machine, precision: Precision) -> Iterator[Case]:
    """Products of all sizes and layouts."""
    for sizes in products(machine):
        for variant in VARIANTS:
            yield (
                f"{'x'.join(map(str, sizes[:4]))} {variant}",
                partial(product_case, machine, precision, sizes, variant),
            )


def layer_cases(machine: Machine, precision: Precision) -> Iterator[Case]:
    """Layers of all sizes and layouts, in both directions."""
    for sizes in layers(machine):
        for variant in (*VARIANTS, "random"):
            for reverse in (False, True):
                name = f"{'x'.join(map(str, sizes[:4]))} {variant}{' reverse' * reverse}"
                yield name, partial(layer_case, machine, precision, sizes, variant, reverse)


def loss_cases(machine: Machine, precision: Precision) -> Iterator[Case]:
    """Cross entropy."""
    wide = (
        ((5, 11), (3, 2), (33, 1025)) if machine.tiny else ((700, 10_000), (400, 50_000), (145, 11), (3, 2), (33, 1025))
    )
    for rows, columns in wide:
        for smoothing in (0.0, 0.1):
            yield f"{rows}x{columns} {smoothing}", partial(loss_case, machine, precision, rows, columns, smoothing)


def decoder_cases(machine: Machine, precision: Precision) -> Iterator[Case]:
    """Decoders in one piece."""
    for sizes in ((2, 3, 4, 5, 6, 3),) if machine.tiny else ((64, 5, 25, 512, 512, 2), (3, 4, 7, 37, 53, 2)):
        for dropped in (False, True):
            name = f"{'x'.join(map(str, sizes))}{' kept' * dropped}"
            yield name, partial(decoder_case, machine, precision, sizes, dropped)
