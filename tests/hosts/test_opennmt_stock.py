"""OpenNMT-py's encoders and decoders with structured dropout, and what `sd_plugin.to_stock` makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

onmt = pytest.importorskip("onmt", reason="OpenNMT-py is not installed")

from sd_plugin import StackedStructuredLSTM, StructuredDropoutLSTM, stats, to_stock  # noqa: E402
from sd_plugin.patches import opennmt as patch  # noqa: E402

from . import opennmt_models as models  # noqa: E402

CASES: list[dict[str, Any]] = [
    {"input_feed": 0, "global_attention": "dot"},
    {"input_feed": 0, "global_attention": "mlp", "encoder_type": "sd_brnn"},
    {"input_feed": 1, "global_attention": "general"},
    {"input_feed": 1, "copy_attn": True, "coverage_attn": True},
]


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    patch.enable(replace=False)
    stats.reset()
    yield
    patch.disable()
    stats.reset()


class Annotated:
    """A class with what Python gives every one."""

    annotated: int


def pair(changes: dict[str, Any]) -> tuple[Any, Any]:
    """A structured model, and the stock one of the same options and parameters."""
    changes = {"dropout": [0.3], **changes}
    structured = models.build(models.options(**changes))
    encoder = str(changes.pop("encoder_type", "sd_rnn")).removeprefix("sd_")
    return structured, models.stock_twin(structured, encoder_type=encoder, **changes)


def parts(model: Any) -> dict[str, Any]:
    """Modules by name; those inside our dropouts and cells have the stock ones' names."""
    return dict(model.named_modules())


@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_every_public_attribute_is_that_of_the_stock_module(changes: dict[str, Any]) -> None:
    structured, stock = pair(changes)
    assert parts(structured).keys() == parts(stock).keys()
    overridden = {"forward", "update_dropout", "extra_repr", "from_opt", "__init__", "__setstate__"}
    # The decoder's steps, which the structured one takes together, and its start, which checks the number of layers.
    overridden |= {"_run_forward_pass", "init_state"}
    for name, theirs in parts(stock).items():
        ours = parts(structured)[name]
        for attribute in [a for a in dir(theirs) if not a.startswith("_")]:
            value, expected = getattr(ours, attribute), getattr(theirs, attribute)
            if inspect.ismethod(expected):
                assert attribute in overridden or value.__func__ is expected.__func__, (name, attribute)
            elif isinstance(expected, (str, int, float, bool)):
                assert type(value) is type(expected) and value == expected, (name, attribute)
            else:
                # A module of ours is one of the stock's, but for the stack of cells.
                stack = isinstance(value, StackedStructuredLSTM)
                assert stack or isinstance(value, type(expected)), (name, attribute)
        own = {key for cls in type(ours).__mro__ if cls not in type(theirs).__mro__ for key in vars(cls)}
        if not isinstance(ours, torch.nn.LSTM):
            of_python = set(vars(Annotated)) | set(vars(object))
            assert own & set(dir(type(theirs))) <= overridden | of_python, name


@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_to_stock_gives_the_hosts_own_model(changes: dict[str, Any]) -> None:
    structured, stock = pair(changes)
    models.run(structured)
    assert stats.sites()
    objects = parts(structured)
    assert to_stock(structured) is structured
    assert not any("sd_plugin" in type(module).__module__ for module in structured.modules())
    for name, module in parts(structured).items():
        theirs = parts(stock)[name]
        assert objects[name] is module
        assert type(module) is type(theirs), name
        # What a run leaves in a decoder is not there in the one that has not run.
        assert vars(module).keys() == vars(theirs).keys(), name
        assert not module._forward_hooks, name
    stats.reset()
    results = []
    for model in (structured, stock):
        torch.manual_seed(3)
        results.append(models.run(model))
    models.assert_same(*results)
    assert not stats.sites()
    # The host's schedule of dropout goes on.
    structured.update_dropout(0.1, 0.1)
    assert structured.encoder.rnn.dropout == 0.1


def test_the_stack_of_cells_is_made_stock_by_itself_too() -> None:
    structured, stock = pair({"input_feed": 1})
    assert isinstance(structured.decoder.rnn, StackedStructuredLSTM)
    to_stock(structured.decoder)
    assert type(structured.decoder) is type(stock.decoder)
    assert type(structured.decoder.rnn) is type(stock.decoder.rnn)
    # What is not inside it stays.
    assert isinstance(structured.encoder.rnn, StructuredDropoutLSTM)
