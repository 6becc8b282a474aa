"""Under ``torch.compile`` the library's operations run as they are: one break of the graph around each, none inside."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor, nn

from sd_plugin import StructuredDropout, StructuredDropoutLSTM, StructuredLinear, stats

from .. import counted
from ..tolerances import assert_close


class Model(nn.Module):
    """Ordinary operations before, between and after ours."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 8)
        self.drop = StructuredDropout(0.5, site="compiled.input")
        self.lstm = StructuredDropoutLSTM(8, 10, 2, dropout=0.5, recurrent_dropout=0.5, output_dropout=0.5)
        self.after = StructuredLinear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.drop(torch.relu(self.before(x))))
        return self.after(y).square().mean()


def test_compiled_training_is_the_same_and_loses_no_hint() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(5, 3, 6)
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for run in (model, compiled, compiled):
        torch.manual_seed(1)
        stats.reset()
        model.zero_grad()
        loss = run(x)
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        assert stats.sites()
        assert all(site.used == site.drawn == 1 for site in counted.sites().values())
    for loss, grads in results[1:]:
        assert_close(loss, results[0][0])
        for grad, expected in zip(grads, results[0][1], strict=True):
            assert_close(grad, expected)


class Products(nn.Module):
    """Without an LSTM: torch compiles no function that calls an ``nn.LSTM``, of which ours is one."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.drop, self.after = nn.Linear(6, 8), StructuredDropout(0.5), StructuredLinear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.drop(torch.relu(self.before(x)))).square().mean()


def test_the_graph_breaks_around_our_operations_only() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def collect(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, x = Products(), torch.randn(5, 3, 6)
    model(x)
    torch.compile(model, backend=collect)(x)
    calls = [node.target for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")]
    assert 1 <= len(graphs) <= 4
    # What stands before and after is compiled; nothing of a product, a pattern or a counter is.
    names = " ".join(str(target) for target in calls)
    assert "relu" in names
    assert "square" in names
    assert "rand" not in names
    assert "topk" not in names


def test_a_program_that_compiles_nothing_does_not_import_the_compiler() -> None:
    program = (
        "import sys, torch, sd_plugin; lstm = sd_plugin.StructuredDropoutLSTM(3, 4, recurrent_dropout=0.5);"
        "lstm(torch.ones(2, 1, 3))[0].sum().backward(); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.splitlines()[0] == "False"
