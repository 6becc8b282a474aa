"""Tensors whose values lie nowhere: shapes come out of them, or one sentence, and never the end of the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sd_plugin import FusedCrossEntropyLoss, StructuredDropout, StructuredDropoutLSTM, StructuredLinear, kernels
from sd_plugin.kernels import Steps, gemm_fp

from ..more import more

STEPS, BATCH, UNITS, CLASSES = 3, 2, 6, 7


class Model(nn.Module):
    """Dropout, LSTM, projection and loss."""

    def __init__(self, sampling: str = "exact", **options: Any) -> None:
        super().__init__()
        self.dropout = StructuredDropout(0.5, sampling=sampling)
        self.lstm = StructuredDropoutLSTM(
            UNITS, 4, 2, dropout=0.5, recurrent_dropout=0.5, output_dropout=0.3, sampling=sampling, **options
        )
        self.linear = StructuredLinear(4 * (1 + self.lstm.bidirectional), CLASSES)
        self.criterion = FusedCrossEntropyLoss()

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, (h, c) = self.lstm(self.dropout(x))
        scores = self.linear(y)
        return y, h, c, self.criterion(scores.flatten(0, 1), target)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(STEPS, BATCH, UNITS), torch.zeros(STEPS * BATCH, dtype=torch.long)


@pytest.mark.parametrize(
    ("bidirectional", "sampling", "mode"),
    [
        # Any two of them together.
        (False, "exact", "nr_rh_st"), (True, "bernoulli", "nr_rh_st"),
        (False, "bernoulli", "random"), (True, "exact", "random"),
        *more(
            (False, "bernoulli", "nr_rh_st"), (True, "exact", "nr_rh_st"),
            (False, "exact", "random"), (True, "bernoulli", "random"),
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
@pytest.mark.filterwarnings("error")
def test_shapes_of_a_training_step(where: Callable[[], Any], bidirectional: bool, sampling: str, mode: str) -> None:
    expected = Model(sampling, bidirectional=bidirectional, mode=mode)(*inputs())
    with where():
        model = Model(sampling, bidirectional=bidirectional, mode=mode)
        found = model(*inputs())
        found[-1].backward()
    for got, right in zip(found, expected, strict=True):
        assert (got.shape, got.dtype) == (right.shape, right.dtype)
        assert not kernels.has_memory(got)
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape


def test_a_forced_backend_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_PLUGIN_BACKEND", "cpu")
    with FakeTensorMode():
        dropped = StructuredDropout(0.5)
        with pytest.raises(kernels.BackendError, match="SD_PLUGIN_BACKEND=cpu cannot do kept_lists: a FakeTensor has"):
            dropped(torch.randn(STEPS, BATCH, UNITS))
    monkeypatch.setenv("SD_PLUGIN_BACKEND", "reference")
    with FakeTensorMode():
        assert Model()(*inputs())[-1].shape == ()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_no_address_is_taken_of_what_has_none() -> None:
    """A backend that was chosen for real operands is given others: with its weights packed, say."""
    weight = kernels.gemm_pack(torch.randn(UNITS, CLASSES))
    for x, kind in ((torch.randn(STEPS, BATCH, UNITS, device="meta"), "meta tensor"), (fake(), "FakeTensor")):
        packed = weight._replace(device=x.device)
        if packed.backend.name == "cpu":
            with pytest.raises(RuntimeError, match=rf"need values in memory, got a {kind} of shape \[\d+"):
                gemm_fp(x, packed, None, Steps(0))
    model = Model()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="need values in memory"):
        model(*inputs())


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.randn(STEPS, BATCH, UNITS)


REFUSED: dict[str, Callable[[], Any]] = {
    "vmap": lambda: torch.vmap(lambda x: StructuredDropout(0.5)(x), randomness="different")(
        torch.randn(5, STEPS, BATCH, UNITS)
    ),
    "grad": lambda: torch.func.grad(lambda x: Model()(x, inputs()[1])[-1])(inputs()[0]),
    "jvp": lambda: torch.func.jvp(lambda x: Model()(x, inputs()[1])[-1], inputs()[:1], inputs()[:1]),
    "functional_call": lambda: _functional_call(
        StructuredDropoutLSTM(UNITS, 4, recurrent_dropout=0.5), lambda y: y[0], inputs()[0]
    ),
    # Nothing is drawn within the transform, which wraps the parameters alone.
    "product of a dropped tensor": lambda: _functional_call(
        StructuredLinear(UNITS, 4), lambda y: y, StructuredDropout(0.5)(inputs()[0])
    ),
    "layer that drops nothing": lambda: _functional_call(
        StructuredDropoutLSTM(UNITS, 4, native=False), lambda y: y[0], inputs()[0]
    ),
    "batched layer": lambda: _batched(lambda x: StructuredDropoutLSTM(UNITS, 4, recurrent_dropout=0.5)(x)[0]),
    "batched product": lambda: _batched(lambda x: StructuredLinear(UNITS, 4)(StructuredDropout(0.5)(x))),
    "batched loss": lambda: _batched(
        lambda x: FusedCrossEntropyLoss(reduction="none")(x.flatten(0, 1), inputs()[1] % UNITS)
    ),
}


def _functional_call(model: nn.Module, result: Callable[[Any], Tensor], x: Tensor) -> Any:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    call = torch.func.functional_call
    return torch.func.grad(lambda given: result(call(model, given, (x,))).sum())(parameters)


def _batched(function: Callable[[Tensor], Tensor]) -> Any:
    x = inputs()[0].requires_grad_()
    y = function(x)
    return torch.autograd.grad(y, x, torch.randn(5, *y.shape), is_grads_batched=True)


@pytest.mark.parametrize("program", REFUSED.values(), ids=REFUSED)
def test_transforms_are_refused_in_one_sentence(program: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"cannot see through torch\.func transforms .* or is_grads_batched=True"):
        program()


def test_transforms_work_where_nothing_is_dropped() -> None:
    model = Model().eval()
    x = torch.randn(5, STEPS, BATCH, UNITS)
    y = torch.vmap(lambda one: model.linear(model.dropout(one)[..., :4]))(x)
    torch.testing.assert_close(y, model.linear(x[..., :4]))


def test_the_loss_is_torchs_own_within_a_transform() -> None:
    scores, targets = torch.randn(BATCH, CLASSES), torch.randint(0, CLASSES, (5, BATCH))
    found = torch.vmap(lambda target: FusedCrossEntropyLoss()(scores, target))(targets)
    expected = torch.vmap(lambda target: nn.functional.cross_entropy(scores, target))(targets)
    torch.testing.assert_close(found, expected)


def test_empty_tensors_have_memory_of_no_size() -> None:
    assert kernels.has_memory(torch.empty(3, 0)) and kernels.place(torch.empty(3, 0)) == 0
    assert not kernels.has_memory(torch.empty(3, 0, device="meta"))
    assert not kernels.has_memory(torch.eye(3).to_sparse())
    x = torch.ones(3)
    assert kernels.has_memory(x) and kernels.place(x) == x.data_ptr()


def test_modes_that_watch_operations_do_not_disturb() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    expected = Model()(*inputs())[-1]
    torch.manual_seed(0)
    with FlopCounterMode(display=False):
        loss = Model()(*inputs())[-1]
        loss.backward()
    torch.testing.assert_close(loss, expected)
