"""What torch's tools make of our modules: docs/tools.md, row by row.

In eval mode they are torch's own; in training they run as they are, or are refused in one sentence with the remedy.
"""

from __future__ import annotations

import copy
import inspect
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from sd_plugin import (
    FusedCrossEntropyLoss,
    StructuredDropout,
    StructuredDropoutLSTM,
    StructuredLinear,
    convert,
    stats,
    to_stock,
)

from ..more import more

REMEDY = r"sd_plugin\.to_stock\(model\)"
DOCUMENT = Path(__file__).parents[2] / "docs" / "tools.md"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    # Of torch's own tracing of an nn.LSTM.
    pytest.mark.filterwarnings("ignore:.*the batch size.*"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class One(nn.Module):
    """A program around a module that takes one tensor, with operations before and after."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 2) + 1


class Loss(nn.Module):
    """The same around a criterion."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.inner(x * 2, target) + 1


class Recurrent(nn.Module):
    """The same around an LSTM, from a given state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.inner(x * 2, (h, c))
        return y + 1, h, c


def program(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A program around a module of ours, and its arguments."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4)
    if kind == "StructuredLinear":
        return One(StructuredLinear(4, 6)), (x,)
    if kind == "StructuredDropout":
        return One(StructuredDropout(0.5)), (x,)
    if kind == "FusedCrossEntropyLoss":
        return Loss(FusedCrossEntropyLoss(label_smoothing=0.1)), (torch.randn(6, 7), torch.arange(6))
    lstm = StructuredDropoutLSTM(4, 6, 2, dropout=0.5, recurrent_dropout=0.5, output_dropout=0.5)
    return Recurrent(lstm), (x, torch.randn(2, 3, 6), torch.randn(2, 3, 6))


KINDS = ["StructuredLinear", "StructuredDropout", "StructuredDropoutLSTM", "FusedCrossEntropyLoss"]

Tool = Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., Any]]


def script(model: nn.Module, arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    loaded: Callable[..., Any] = torch.jit.load(file)
    return loaded


def export(model: nn.Module, arguments: tuple[Tensor, ...], strict: bool) -> Callable[..., Any]:
    exported: Callable[..., Any] = torch.export.export(model, arguments, strict=strict).module()
    return exported


TOOLS: dict[str, Tool] = {
    "torch.jit.script": script,
    "torch.jit.trace": lambda model, arguments: torch.jit.trace(model, arguments),
    "torch.fx.symbolic_trace": lambda model, arguments: torch.fx.symbolic_trace(model),
    "torch.export, strict": lambda model, arguments: export(model, arguments, strict=True),
    "torch.export": lambda model, arguments: export(model, arguments, strict=False),
    "torch.compile": lambda model, arguments: torch.compile(model, backend="aot_eager"),
    "torch.compile, fullgraph": lambda model, arguments: torch.compile(model, backend="eager", fullgraph=True),
    "make_fx": lambda model, arguments: make_fx(model)(*arguments),
    "meta device": lambda model, arguments: copy.deepcopy(model).to("meta"),
}

#: those whose refusal is our own error, as it is
RECORDS = ("torch.jit.trace", "torch.export", "make_fx")
DROPPING = ("StructuredDropout", "StructuredDropoutLSTM")


class PlainLSTM(nn.LSTM):
    """A subclass that changes nothing."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, hx)


def stock(model: nn.Module) -> Any:
    return to_stock(copy.deepcopy(model))


def shapes(made: Any) -> list[torch.Size]:
    return [x.shape for x in torch.utils._pytree.tree_leaves(made)]


def torch_cannot(tool: str, kind: str) -> bool:
    """torch itself compiles no LSTM, and an old version exports, when strict, no subclass with a ``forward``."""
    if kind != "StructuredDropoutLSTM" or tool not in ("torch.compile, fullgraph", "torch.export, strict"):
        return False
    model, arguments = program(kind)
    model.eval().inner = PlainLSTM(4, 6, 2)
    try:
        TOOLS[tool](model, arguments)(*arguments)
    except Exception:
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tool", TOOLS)
def test_in_eval_mode_they_are_torchs(tool: str, kind: str) -> None:
    model, arguments = program(kind)
    model.eval()
    if torch_cannot(tool, kind):
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch raises of its own
            TOOLS[tool](model, arguments)(*arguments)
        return
    if tool == "meta device":
        arguments = tuple(x.to("meta") for x in arguments)
        made, expected = TOOLS[tool](model, arguments)(*arguments), stock(model).to("meta")(*arguments)
        assert shapes(made) == shapes(expected)
        return
    made = TOOLS[tool](model, arguments)
    for _ in range(2):
        torch.testing.assert_close(made(*arguments), stock(model)(*arguments))
        # Not a constant of the recording.
        arguments = (arguments[0] * 3 - 1, *arguments[1:])
    assert not stats.sites()


def refused(tool: str, kind: str) -> bool:
    """Training this module under this tool is an error."""
    if tool == "torch.compile, fullgraph":
        return kind != "FusedCrossEntropyLoss"
    if tool == "torch.export, strict" and kind == "StructuredLinear":
        # An older torch does not tell that it exports.
        return not hasattr(torch.compiler, "is_exporting")
    return kind in DROPPING and tool not in ("torch.compile", "torch.fx.symbolic_trace", "meta device")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tool", TOOLS)
def test_in_training_they_run_or_are_refused_in_one_sentence(tool: str, kind: str) -> None:
    model, arguments = program(kind)
    if tool == "meta device":
        arguments = tuple(x.to("meta") for x in arguments)
    if not refused(tool, kind):
        made = TOOLS[tool](model, arguments)
        torch.manual_seed(1)
        found = made(*arguments)
        torch.manual_seed(1)
        expected = copy.deepcopy(model).to(arguments[0].device)(*arguments)
        if tool == "meta device":
            assert shapes(found) == shapes(expected)
        else:
            torch.testing.assert_close(found, expected)
        return
    with pytest.raises(Exception) as caught:  # noqa: PT011 - torch's compilers wrap what is raised in their own
        TOOLS[tool](model, arguments)(*arguments)
    if tool in RECORDS:
        assert type(caught.value) is RuntimeError and "\n" not in str(caught.value)
    compiles = tool.startswith("torch.compile") or "strict" in tool
    # Of the LSTM torch itself says that it compiles none; and an old one takes no reason.
    takes_reason = "reason" in inspect.signature(torch._dynamo.disable).parameters
    if not compiles or (takes_reason and not (kind == "StructuredDropoutLSTM" and "compile" in tool)):
        assert re.search(REMEDY, str(caught.value))
    # And the remedy is one.
    if not torch_cannot(tool, kind):
        TOOLS[tool](stock(model), arguments)(*arguments)


def test_the_document_says_the_same() -> None:
    rows = [
        line.split("|")[1:-1]
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith(("| `torch.", "| `make_fx"))
    ]
    told = {cells[0].strip().replace("`", ""): [cell.strip() for cell in cells[1:]] for cells in rows}
    for tool in TOOLS:
        if tool == "meta device":
            continue
        evaluated, trained = told[tool]
        assert evaluated.startswith("torch's own")
        assert trained.startswith("error" if any(refused(tool, kind) for kind in DROPPING) else "ours"), tool


@pytest.mark.parametrize("kind", ["StructuredLinear", "StructuredDropoutLSTM", "FusedCrossEntropyLoss"])
def test_a_module_by_itself_is_recorded_as_torchs(kind: str) -> None:
    model, arguments = program(kind)
    inner: Any = model.eval().inner
    if kind == "StructuredDropoutLSTM":
        # torch.fx records none of torch's either.
        made = torch.export.export(inner, arguments[:1], strict=False).module()
        torch.testing.assert_close(made(arguments[0]), stock(inner)(arguments[0]))
        return
    for tool in ("torch.fx.symbolic_trace", "torch.jit.script", "torch.compile, fullgraph"):
        torch.testing.assert_close(TOOLS[tool](inner, arguments)(*arguments), stock(inner)(*arguments))


def test_a_recorded_graph_trains_and_skips() -> None:
    """``torch.fx`` keeps our modules whole, as it keeps torch's."""
    torch.manual_seed(0)
    model = nn.Sequential(StructuredDropout(0.5), StructuredLinear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(5, 3, 4)
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 4
    results = []
    for run in (model, graph):
        stats.reset()
        model.zero_grad()
        torch.manual_seed(1)
        run(x).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert stats.sites()["dropout"].skipped > 0
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    graph.eval()
    assert torch.equal(graph(x), model.eval()(x))


@pytest.mark.parametrize("kind", ["StructuredDropout", "StructuredDropoutLSTM"])
def test_torch_fx_does_not_record_a_dropout_by_itself(kind: str) -> None:
    model, _ = program(kind)
    with pytest.raises(RuntimeError, match=f"^torch.fx cannot record a {kind} by itself in training: .*{REMEDY}"):
        torch.fx.symbolic_trace(model.inner)


class Packed(nn.Module):
    """An LSTM of packed sequences."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, packed: PackedSequence) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        y, state = self.inner(packed)
        return y, state


class Bare(nn.Module):
    """An LSTM without a given state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.inner(x)
        return y, state


@pytest.mark.parametrize(
    ("batch_first", "bidirectional", "bias"),
    [
        # Any two of them together.
        (False, False, True), (False, True, False), (True, False, False), (True, True, True),
        *more((False, False, False), (False, True, True), (True, False, True), (True, True, False)),
    ],
)  # fmt: skip
def test_a_scripted_lstm_takes_every_input_that_torchs_does(batch_first: bool, bidirectional: bool, bias: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, bool] = {"batch_first": batch_first, "bidirectional": bidirectional, "bias": bias}
    ours = convert(nn.LSTM(4, 6, 2, dropout=0.5, **options), recurrent_dropout=0.5).eval()
    theirs = stock(ours)
    x = torch.randn(3, 5, 4) if batch_first else torch.randn(5, 3, 4)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 4]), batch_first, enforce_sorted=False)
    for wrapper, argument in ((Bare, x), (Bare, x[0]), (Packed, packed)):
        found, expected = torch.jit.script(wrapper(ours))(argument), wrapper(theirs)(argument)
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    directions = 1 + bidirectional
    h, c = torch.randn(2, 2 * directions, 3, 6)
    torch.testing.assert_close(torch.jit.script(Recurrent(ours))(x, h, c), Recurrent(theirs)(x, h, c))
    unbatched = x[0] if batch_first else x[:, 0]
    found = torch.jit.script(Recurrent(ours))(unbatched, h[:, 0], c[:, 0])
    torch.testing.assert_close(found, Recurrent(theirs)(unbatched, h[:, 0], c[:, 0]))
    with pytest.raises(Exception, match="input_size"):
        torch.jit.script(Bare(ours))(x[..., :3])


def test_a_scripted_model_that_is_trained_says_so_and_one_that_drops_nothing_trains() -> None:
    scripted = torch.jit.script(program("StructuredDropoutLSTM")[0].eval()).train()
    arguments = program("StructuredDropoutLSTM")[1]
    with pytest.raises(Exception, match=f"a scripted StructuredDropoutLSTM is for evaluation: {REMEDY}"):
        scripted(*arguments)
    model = Recurrent(StructuredDropoutLSTM(4, 6, 2, dropout=0.5, mode="random"))
    torch.manual_seed(1)
    expected = stock(model)(*arguments)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.jit.script(model)(*arguments), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_torch_func(kind: str) -> None:
    model, arguments = program(kind)

    def total(model: nn.Module, x: Tensor) -> Tensor:
        made = model(x, *arguments[1:])
        return (made[0] if isinstance(made, tuple) else made).square().sum()

    found = torch.func.grad(lambda x: total(model.eval(), x))(arguments[0])
    torch.testing.assert_close(found, torch.func.grad(lambda x: total(stock(model).eval(), x))(arguments[0]))
    if kind in DROPPING:
        with pytest.raises(RuntimeError, match=f"torch.func transforms .*{REMEDY}"):
            torch.func.grad(lambda x: total(model.train(), x))(arguments[0])


def test_a_subclass_of_tensor_that_only_carries_attributes_trains() -> None:
    """As fastai's do."""

    class Carrying(Tensor):
        """Operations are torch's."""

    torch.manual_seed(0)
    lstm = StructuredDropoutLSTM(4, 6, recurrent_dropout=0.5)
    y = lstm(torch.randn(5, 3, 4).as_subclass(Carrying))[0]
    y.sum().backward()
    assert stats.sites()["lstm.l0.recurrent"].skipped > 0


def test_nothing_is_said_where_torch_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = copy.deepcopy(program("StructuredLinear")[0])
        assert not hasattr(copied.inner, "qconfig")
