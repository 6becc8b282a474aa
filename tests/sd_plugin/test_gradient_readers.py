"""Whoever reads the gradient of a dropped tensor gets all of it: training is that of dense products with zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from sd_plugin import StackedStructuredLSTM, StructuredDropout, StructuredDropoutLSTM, StructuredLinear, hints, stats
from sd_plugin.attentional import attentional_decoder
from sd_plugin.cell import SteppedDropout
from sd_plugin.kernels import TIME_MAJOR, Steps
from sd_plugin.patterns import draw_kept

STEPS, BATCH, UNITS = 3, 4, 8


def normalised(gradient: Tensor) -> Tensor:
    """What gradient-clipping hooks do: all of the gradient counts."""
    return gradient / gradient.norm()


class _Identity(torch.autograd.Function):
    """Somebody's own operation that returns a view and looks at the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return normalised(gradient)


class Product(nn.Module):
    """A product of a dropped tensor; ``result`` is summed up with weights of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.next: nn.Module = StructuredLinear(UNITS, 5)
        elif kind == "lstm":
            self.next = StructuredDropoutLSTM(UNITS, 5, recurrent_dropout=0.5)
        elif kind == "cell":
            self.next = StackedStructuredLSTM(1, UNITS + 2, 5, recurrent_dropout=0.5)
        else:
            self.next = StackedStructuredLSTM(1, UNITS + 5, 5, dropout=0.5, recurrent_dropout=0.5)
            self.join = nn.Parameter(torch.randn(5, 10))
            self.memory = torch.randn(BATCH, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        next_: Any = self.next
        if self.kind == "linear":
            return self.next(x)  # type: ignore[no-any-return]
        if self.kind == "lstm":
            return self.next(x)[0]  # type: ignore[no-any-return]
        state = (x.new_zeros(1, BATCH, 5), x.new_zeros(1, BATCH, 5))
        if self.kind == "cell":
            run, outputs = next_.start(STEPS, BATCH, x), []
            for t, row in enumerate(hints.unbind(x, TIME_MAJOR)):
                y, state = run.step(t, hints.cat([row, x.new_ones(BATCH, 2)]), state)
                outputs.append(y)
            return torch.stack(outputs)
        emb = x.transpose(0, 1).contiguous()
        hints.carry(x, TIME_MAJOR, emb, Steps(1))
        run, lengths = next_.start(STEPS, BATCH, emb), torch.full((BATCH,), 3, dtype=torch.int32)
        feed, drop = x.new_zeros(BATCH, 5), SteppedDropout(draw_kept(STEPS, 5, 0.5), "output")
        return attentional_decoder(run, emb, self.memory, lengths, state, feed, drop, None, self.join)[0]


PRODUCTS = ["linear", "lstm", "cell", "decoder"]


def _hook_module(model: Product) -> None:
    model.next.register_full_backward_hook(lambda module, given, got: tuple(map(normalised, given)))


#: (before, after): what is done to the dropped tensor before and after the product; the first returns its operand.
Way = tuple[Callable[[Tensor, list[Tensor]], Tensor], Callable[[Tensor, list[Tensor]], Any]]


def _same(x: Tensor, kept: list[Tensor]) -> Tensor:
    return x


def _nothing(x: Tensor, kept: list[Tensor]) -> None:
    return None


def _hook(x: Tensor, kept: list[Tensor]) -> Tensor:
    x.register_hook(normalised)
    return x


def _retain(x: Tensor, kept: list[Tensor]) -> Tensor:
    x.retain_grad()
    kept.append(x)
    return x


def _view(x: Tensor) -> Tensor:
    return x.view(STEPS, BATCH, UNITS)


def _keep(x: Tensor, kept: list[Tensor]) -> Tensor:
    kept.append(x)
    return x


def _first(do: Callable[[Tensor, list[Tensor]], Any]) -> Callable[[Tensor, list[Tensor]], Any]:
    """After the product, to the tensor that was kept before it."""
    return lambda x, kept: do(kept[0], kept)


WAYS: dict[str, Way] = {
    "hook before": (_hook, _nothing),
    "hook after": (_same, _hook),
    "retain before": (_retain, _nothing),
    "retain after": (_same, _retain),
    "hook before a view": (lambda x, kept: _view(_hook(x, kept)), _nothing),
    "hook after a view": (lambda x, kept: _view(x), _hook),
    "retain after a view": (lambda x, kept: _view(x), _retain),
    "hook of a view": (lambda x, kept: _hook(_view(x), kept), _nothing),
    "hook of a view after": (lambda x, kept: _keep(_view(x), kept), _first(_hook)),
    "hook of a view after, which dies": (
        lambda x, kept: _keep(_view(x), kept),
        lambda x, kept: _hook(kept.pop(), kept) is None,
    ),
    "retain of a view": (lambda x, kept: _retain(_view(x), kept), _nothing),
    "retain of a view after": (lambda x, kept: _keep(_view(x), kept), _first(_retain)),
    "hook between views": (lambda x, kept: _view(_hook(x.view(-1, UNITS), kept)), _nothing),
    "hook between views after": (lambda x, kept: _view(_keep(x.view(-1, UNITS), kept)), _first(_hook)),
    "retain between views after": (lambda x, kept: _view(_keep(x.view(-1, UNITS), kept)), _first(_retain)),
    "function of Python": (lambda x, kept: _Identity.apply(x), _nothing),
    "multi-grad hook": (
        lambda x, kept: register_multi_grad_hook([x], lambda gradients: kept.append(gradients[0].clone())) and x,
        _nothing,
    ),
}


@contextmanager
def dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without hints: products with zeros in them."""
    with monkeypatch.context() as patched:
        patched.setattr(hints, "lookup", lambda tensor: None)
        yield


def train(kind: str, way: Way, prepare: Callable[[Product], None] = lambda model: None) -> list[Tensor]:
    """Some steps; losses, what was read of gradients, and the parameters in the end."""
    torch.manual_seed(3)
    first, dropout, model = nn.Linear(UNITS, UNITS), StructuredDropout(0.5), Product(kind)
    layers = nn.ModuleList([first, dropout, model]).double().train()
    if kind == "decoder":
        model.memory = model.memory.double()
    prepare(model)
    optimizer = torch.optim.SGD(layers.parameters(), 0.1)
    inputs, seen = torch.randn(STEPS, BATCH, UNITS, dtype=torch.float64), []
    for step in range(3):
        torch.manual_seed(step)
        kept: list[Tensor] = []
        x = dropout(first(inputs))
        y = model(way[0](x, kept))
        way[1](x, kept)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grads = [t if t.grad_fn is None else t.grad for t in kept if t.grad_fn is None or t.retains_grad]
        seen += [loss.detach(), *(grad for grad in grads if grad is not None)]
    return [*seen, *(parameter.detach() for parameter in layers.parameters())]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("way", WAYS)
def test_training_is_that_of_dense_products(way: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "dies" in way and kind not in ("linear", "lstm"):
        pytest.skip("what a product is not given itself can be asked for as long as it lives")
    found = train(kind, WAYS[way])
    assert stats.sites()["dropout"].skipped > 0
    with dense(monkeypatch):
        assert_same(found, train(kind, WAYS[way]))


@pytest.mark.parametrize("kind", ["linear", "lstm"])
def test_a_full_backward_hook_of_the_next_module_sees_the_whole_gradient(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = train(kind, (_same, _nothing), _hook_module)
    assert stats.sites()["dropout"].skipped > 0
    with dense(monkeypatch):
        assert_same(found, train(kind, (_same, _nothing), _hook_module))


@pytest.mark.parametrize("kind", ["linear", "lstm"])
def test_so_does_one_of_the_dropout(kind: str) -> None:
    torch.manual_seed(0)
    dropout, model = StructuredDropout(0.5).double(), Product(kind).double()
    seen: list[Tensor] = []
    dropout.register_full_backward_hook(lambda module, given, got: seen.append(got[0]))
    model(dropout(torch.randn(STEPS, BATCH, UNITS, dtype=torch.float64, requires_grad=True))).sum().backward()
    assert (seen[0] != 0).all()


def test_a_leaf_with_a_hook_gets_its_whole_gradient() -> None:
    torch.manual_seed(0)
    layer, seen = StructuredLinear(UNITS, 5, dtype=torch.float64), []
    x = StructuredDropout(0.5)(torch.randn(STEPS, BATCH, UNITS, dtype=torch.float64)).requires_grad_()
    x.register_post_accumulate_grad_hook(lambda tensor: seen.append(tensor.grad.clone()))
    layer(x).sum().backward()
    torch.testing.assert_close(seen[0], layer.weight.sum(0).detach().expand_as(x))


def test_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the product gets a copy of the tensor, which has no hook."""
    torch.manual_seed(0)
    layer, source = StructuredLinear(UNITS, 5), torch.randn(STEPS, BATCH, UNITS, requires_grad=True)
    gradients = []
    for skipping in (True, False):
        torch.manual_seed(1)
        x = StructuredDropout(0.5)(source)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x if skipping else x + 0)
        x.retain_grad()
        y.float().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=2e-2)
    assert stats.sites()["dropout"].skipped > 0


def test_nobody_reads_and_nothing_is_lost() -> None:
    """Skipped in all three products where there is no view, or one."""
    for shape in ((STEPS, BATCH, UNITS), (-1, UNITS)):
        stats.reset()
        x = StructuredDropout(0.5)(torch.randn(STEPS, BATCH, UNITS, requires_grad=True))
        StructuredLinear(UNITS, 5)(x.view(shape) if len(shape) == 2 else x).sum().backward()
        site = stats.sites()["dropout"]
        assert site.dense == 3 * STEPS * BATCH * UNITS * 5 and site.skipped * 2 == site.dense
        x = StructuredDropout(0.5)(torch.randn(STEPS, BATCH, UNITS, requires_grad=True))
        x.register_hook(lambda gradient: gradient)
        StructuredLinear(UNITS, 5)(x).sum().backward()
        assert site.dense == 6 * STEPS * BATCH * UNITS * 5 and site.skipped * 12 == site.dense * 5
