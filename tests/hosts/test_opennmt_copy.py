"""OpenNMT-py's copy attention in all its variants, trained with dropout by the host's own generator and loss."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("onmt", reason="OpenNMT-py is not installed")

from sd_plugin import hints, stats
from sd_plugin.patches import opennmt as patch

from ..more import more
from . import opennmt_models as models

STEPS = 10
VARIANTS: list[dict[str, Any]] = [
    {},
    {"copy_attn_type": "dot"},
    {"copy_attn_type": "mlp"},
    {"global_attention": "mlp"},
    {"global_attention": "dot", "copy_attn_type": "general"},
    {"copy_attn_force": True},
    {"copy_loss_by_seqlength": True},
    {"reuse_copy_attn": True},
    {"coverage_attn": True, "lambda_coverage": 0.5, "reuse_copy_attn": True},
    {"share_embeddings": True, "share_decoder_embeddings": True, "word_vec_size": models.HIDDEN},
    {"context_gate": "both"},
    {"encoder_type": "sd_brnn", "reuse_copy_attn": True, "copy_attn_force": True},
]
#: Each is in one of those, with something else.
ALONE: list[dict[str, Any]] = [
    {"coverage_attn": True, "lambda_coverage": 0.5},
    {"share_decoder_embeddings": True, "word_vec_size": models.HIDDEN},
    {"share_embeddings": True, "word_vec_size": models.HIDDEN},
]


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    patch.enable(replace=False)
    stats.reset()
    yield
    patch.disable()
    stats.reset()


def batch_to_copy() -> dict[str, Any]:
    """Sentences whose target repeats words of the source, some of them in no vocabulary, as the host makes a batch."""
    from onmt.inputters.text_utils import _addcopykeys, numericalize, tensorify

    choose = random.Random(5)
    vocabs, examples = models.vocabs(), []
    for line in range(6):
        words = [choose.choice([f"w{choose.randrange(10)}", f"name{line}"]) for _ in range(choose.randint(3, 7))]
        copied = " ".join(words[: choose.randint(2, len(words))])
        example = {"src": {"src": " ".join(words)}, "tgt": {"tgt": copied}, "cid": "corpus", "cid_line_number": line}
        examples.append(_addcopykeys(vocabs, numericalize(vocabs, example)))
    examples.sort(key=lambda example: -len(example["src"]["src_ids"]))
    return tensorify(vocabs, [(example, i) for i, example in enumerate(examples)], "cpu")  # type: ignore[no-any-return]


def train(structured: bool, lambda_coverage: float = 0.0, **changes: Any) -> list[float]:
    """Losses of some steps with dropout."""
    import onmt
    from onmt.utils.loss import LossCompute

    if not structured:
        types = {"encoder_type": changes.pop("encoder_type", "sd_rnn").removeprefix("sd_"), "decoder_type": "rnn"}
        changes.update(types)
    opt = models.options(dropout=[0.3], copy_attn=True, **changes)
    model, vocab = models.build(opt, torch.float32), models.vocabs()["tgt"]
    pad, unk = vocab["<blank>"], vocab["<unk>"]
    criterion = onmt.modules.CopyGeneratorLoss(len(vocab), opt.copy_attn_force, unk_index=unk, ignore_index=pad)
    compute = LossCompute(criterion, model.generator, copy_attn=True, lambda_coverage=lambda_coverage, vocab=vocab)
    optimizer, batch, losses = torch.optim.Adam(model.parameters(), 0.02), batch_to_copy(), []
    torch.manual_seed(1)
    for _ in range(STEPS):
        out, attns = model(batch["src"], batch["tgt"], batch["srclen"])
        # As the host's trainer hands them over.
        loss, _ = compute(batch, out, attns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "changes", [*VARIANTS, *more(*ALONE)], ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "plain"
)
def test_copy_attention_trains(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stock = train(False, **changes)
    assert stock[-1] < stock[0], "this variant trains in the host itself"
    losses = train(True, **changes)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert sum(site.skipped for site in stats.sites().values()) > 0
    # And it is no other training than with dense products.
    monkeypatch.setattr(hints, "lookup", lambda tensor: None)
    dense = train(True, **changes)
    assert dense == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("changes", [{"input_feed": 0}, {"input_feed": 0, "reuse_copy_attn": True}])
def test_what_the_host_cannot_do_fails_alike(changes: dict[str, Any]) -> None:
    """Without input feeding it has no copy attention."""
    raised = []
    for structured in (False, True):
        with pytest.raises((AssertionError, KeyError)) as caught:
            train(structured, **changes)
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]
