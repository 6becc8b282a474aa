"""Builds small OpenNMT-py models for the tests, stock and structured, from the host's own options."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from sd_plugin.patches import opennmt as patch

from ..tolerances import assert_close

VOCAB = 23
HIDDEN = 12


def options(**changes: Any) -> Namespace:
    """Model options as ``onmt_train`` would have them after parsing and validation."""
    import onmt.opts
    from onmt.utils.parse import ArgumentParser

    opt = ArgumentParser.defaults(onmt.opts.model_opts)
    values = {
        "encoder_type": "sd_rnn",
        "decoder_type": "sd_rnn",
        "rnn_type": "LSTM",
        "layers": 2,
        "hidden_size": HIDDEN,
        "word_vec_size": 10,
        "dropout": [0.0],
        "optim": "sgd",
        "update_vocab": False,
        "freeze_word_vecs_enc": False,
        "freeze_word_vecs_dec": False,
        "gpu_ranks": [],
    }
    opt.__dict__.update({**values, **changes})
    ArgumentParser.update_model_opts(opt)
    ArgumentParser.validate_model_opts(opt)
    return opt


def vocabs() -> dict[str, Any]:
    """The same small vocabulary on both sides."""
    from onmt.inputters.inputter import dict_to_vocabs

    words = ["<unk>", "<blank>", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB - 4))]
    return dict_to_vocabs({"src": words, "tgt": words, "data_task": "seq2seq", "decoder_start_token": "<s>"})


def build(opt: Namespace, dtype: torch.dtype = torch.float64) -> Any:
    """The model of ``opt`` with reproducible parameters, in training mode."""
    from onmt.model_builder import build_base_model

    model = build_base_model(opt, vocabs()).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=dtype) * 0.6 - 0.3)
    return model.train()


def stock_twin(structured: Any, **changes: Any) -> Any:
    """The host's own model of the same options, with the same parameters."""
    patch.disable()
    try:
        types = {"encoder_type": changes.pop("encoder_type", "rnn"), "decoder_type": "rnn"}
        twin = build(options(**types, **changes))
    finally:
        patch.enable(replace=False)
    torch.nn.Module.load_state_dict(twin, structured.state_dict())
    return twin


def batch(rows: int = 4, source: int = 6, target: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source ``[B, S, 1]``, target ``[B, T, 1]`` and source lengths, one of them full."""
    generator = torch.Generator().manual_seed(11)
    src = torch.randint(4, VOCAB, (rows, source, 1), generator=generator)
    tgt = torch.randint(4, VOCAB, (rows, target, 1), generator=generator)
    lengths = torch.randint(1, source + 1, (rows,), generator=generator)
    lengths[1] = source
    return src, tgt, lengths


def run(model: Any) -> dict[str, torch.Tensor]:
    """One training step's outputs, attentions and gradients by name."""
    src, tgt, lengths = batch()
    model.zero_grad()
    out, attns = model(src, tgt, lengths)
    flat = out.contiguous().view(-1, out.size(2))
    copies = hasattr(model.generator, "linear_copy")
    scores = torch.log_softmax((model.generator.linear if copies else model.generator)(flat), -1)
    if copies:
        scores = scores + torch.nn.functional.logsigmoid(model.generator.linear_copy(flat))
    weights = torch.linspace(-1, 1, scores.numel(), dtype=scores.dtype).view_as(scores)
    loss = (scores * weights).sum() + sum((a * a).sum() for a in attns.values())
    loss.backward()
    results = {"out": out.detach(), "loss": loss.detach()}
    results.update({f"attn.{k}": v.detach() for k, v in attns.items()})
    results.update({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    return results


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every result of one run equals that of another, which has the same ones."""
    assert_close(found, expected, depth=40)
