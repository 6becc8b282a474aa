"""The whole-sequence decoder against one written out step by step in float64, gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sd_plugin.kernels import (
    DecoderInputs,
    DecoderPatterns,
    DecoderResultGradients,
    DecoderWeights,
    Kept,
    decoder_backward,
    decoder_forward,
    gemm_pack,
    lstm_pack,
)

from .. import truth
from ..tolerances import assert_close
from .cases import examples, kept_units, noise_of, tensor_of


def exact(
    tensors: dict[str, Tensor], lengths: list[int], drops: dict[str, Tensor], layers: int, general: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The decoder's equations, a step at a time; everything ``[T, B, ...]``."""
    h, c, feed = list(tensors["h0"]), list(tensors["c0"]), tensors["feed"]
    outputs, aligns = [], []
    for t, emb_t in enumerate(tensors["emb"]):
        x = torch.cat([emb_t * drops["embedding"][t], feed], 1)
        for layer in range(layers):
            weights = [tensors[f"{name}_{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            dropped = h[layer] * drops[f"recurrent_{layer}"][t]
            gates = x @ weights[0].t() + dropped @ weights[1].t() + weights[2] + weights[3]
            i, f, g, o = gates.chunk(4, 1)
            c[layer] = f.sigmoid() * c[layer] + i.sigmoid() * g.tanh()
            h[layer] = o.sigmoid() * c[layer].tanh()
            x = h[layer] * drops["query" if layer == layers - 1 else f"between_{layer}"][t]
        scored = x @ tensors["w_in"].t() if general else x
        scores = torch.einsum("bh,bsh->bs", scored, tensors["memory"])
        beyond = torch.arange(scores.shape[1]) >= torch.tensor(lengths).unsqueeze(1)
        align = scores.masked_fill(beyond, -float("inf")).softmax(1)
        context = torch.einsum("bs,bsh->bh", align, tensors["memory"])
        feed = (torch.cat([context, x], 1) @ tensors["w_out"].t()).tanh() * drops["output"][t]
        outputs.append(feed)
        aligns.append(align)
    return torch.stack(outputs), torch.stack(h), torch.stack(c), torch.stack(aligns)


def fed_back(output: Kept | Tensor | None, size: int) -> Kept | None:
    """Kept units of the feed: everything at the first step, then those of the step before."""
    if not isinstance(output, Kept):
        return None
    missing = output.indices.new_full((output.steps - 1, size - output.width), size)
    rest = torch.cat([output.indices[:-1], missing], 1)
    return Kept(torch.cat([torch.arange(size, dtype=torch.int32).unsqueeze(0), rest]), size, 1.0, True)


@settings(max_examples=examples(60))
@given(
    data=st.data(), layers=st.integers(1, 3), count=st.integers(1, 4), batch=st.integers(1, 5), embed=st.integers(1, 5),
    hidden=st.integers(1, 20), source=st.integers(1, 6), seed=st.integers(0, 10**6), general=st.booleans(),
    with_align=st.booleans(),
)  # fmt: skip
def test_forward_and_backward(
    backend: str, device: str, dtypes_of: Callable[[str], list[torch.dtype]], data: st.DataObject, layers: int,
    count: int, batch: int, embed: int, hidden: int, source: int, seed: int, general: bool, with_align: bool,
) -> None:  # fmt: skip
    dtype = data.draw(st.sampled_from(dtypes_of("lstm")))
    lengths = data.draw(st.lists(st.integers(1, source), min_size=batch, max_size=batch))
    names = {
        "embedding": embed, "query": hidden, "output": hidden,
        **{f"between_{layer}": hidden for layer in range(layers - 1)},
        **{f"recurrent_{layer}": hidden for layer in range(layers)},
    }  # fmt: skip
    kept: dict[str, Any] = {name: data.draw(kept_units(count, size)) for name, size in names.items()}
    if data.draw(st.booleans(), "at random"):
        for name in names:
            if name != "embedding" and data.draw(st.booleans()):
                kept[name] = (noise_of(seed, count, batch, hidden) < 0.5).double() * 2
    shapes: dict[str, tuple[int, ...]] = {
        "emb": (count, batch, embed), "memory": (batch, source, hidden), "h0": (layers, batch, hidden),
        "c0": (layers, batch, hidden), "feed": (batch, hidden), "w_in": (hidden, hidden), "w_out": (hidden, 2 * hidden),
        "dy": (count, batch, hidden), "dh_n": (layers, batch, hidden), "dc_n": (layers, batch, hidden),
        "dalign": (count, batch, source),
    }  # fmt: skip
    for layer in range(layers):
        inputs = hidden if layer else embed + hidden
        shapes |= {f"weight_ih_{layer}": (4 * hidden, inputs), f"weight_hh_{layer}": (4 * hidden, hidden)}
        shapes |= {f"bias_ih_{layer}": (4 * hidden,), f"bias_hh_{layer}": (4 * hidden,)}
    low = {
        name: (tensor_of(seed + i, *shape) * (0.7 if len(shape) > 2 else 0.4)).to(dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }
    high = {name: tensor.detach().clone().double().requires_grad_() for name, tensor in low.items()}
    if kept["embedding"] is not None:
        kept["embedding"] = kept["embedding"].unscaled()  # the embedding arrives with its scale
    drops = {name: truth.multiplier(kept[name], count, batch, size, torch.float64) for name, size in names.items()}
    y, h_n, c_n, align = exact(high, lengths, drops, layers, general)
    loss = (y * high["dy"]).sum() + (h_n * high["dh_n"]).sum() + (c_n * high["dc_n"]).sum()
    if with_align:
        loss = loss + (align * high["dalign"]).sum()
    wanted = [name for name in shapes if not name.startswith("d") and (general or name != "w_in")]
    grads = dict(zip(wanted, torch.autograd.grad(loss, [high[name] for name in wanted]), strict=True))

    weights = DecoderWeights(
        tuple(
            lstm_pack(*(low[f"{name}_{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))
            for layer in range(layers)
        ),
        gemm_pack(low["w_in"].t()) if general else None,
        gemm_pack(low["w_out"].t()),
    )
    patterns = DecoderPatterns(
        kept["embedding"],
        fed_back(kept["output"], hidden),
        tuple(kept[f"between_{layer}"] for layer in range(layers - 1)),
        tuple(kept[f"recurrent_{layer}"] for layer in range(layers)),
        kept["query"],
        kept["output"],
    )
    spans = torch.tensor(lengths, dtype=torch.int32)
    inputs = DecoderInputs(
        low["emb"].transpose(0, 1), low["memory"], spans, low["h0"], low["c0"], low["feed"]
    )  # fmt: skip
    result = decoder_forward(weights, inputs, patterns)
    gradients = DecoderResultGradients(
        low["dy"].transpose(0, 1), low["dh_n"], low["dc_n"], low["dalign"] if with_align else None
    )  # fmt: skip
    got = decoder_backward(weights, inputs, result.saved, gradients, patterns)

    def check(name: str, value: Tensor, expected: Tensor) -> None:
        assert value.dtype == dtype
        # Cells, scores, context and output, one after the other at every step of either pass.
        depth = 2 * (layers + 3) * (count + 1)
        assert_close(value, expected, embed + 4 * hidden + source, depth, exact=True, name=name)

    check("y", result.y.transpose(0, 1), y)
    for name, value, expected in (("h_n", result.h_n, h_n), ("c_n", result.c_n, c_n), ("align", result.align, align)):
        check(name, value, expected)
    check("demb", got.emb.transpose(0, 1), grads["emb"])
    for name, value in (
        ("memory", got.memory), ("h0", got.h0), ("c0", got.c0), ("feed", got.feed0), ("w_out", got.join),
        *((("w_in", got.query),) if general else ()),
    ):  # fmt: skip
        assert value is not None
        check(f"d{name}", value, grads[name])
    for layer, cell in enumerate(got.cells):
        for name, value in zip(("weight_ih", "weight_hh", "bias_ih"), cell, strict=True):
            check(f"d{name}_{layer}", value, grads[f"{name}_{layer}"])


def test_shapes_are_checked(backend: str) -> None:
    cell = lstm_pack(torch.ones(16, 7), torch.ones(16, 4))
    weights = DecoderWeights((cell,), None, gemm_pack(torch.ones(8, 4)))
    nothing = DecoderPatterns(None, None, (), (None,), None, None)
    state = torch.ones(1, 2, 4)
    inputs = DecoderInputs(
        torch.ones(2, 5, 3), torch.ones(2, 6, 4), torch.tensor([6, 1]), state, state, torch.ones(2, 4)
    )  # fmt: skip
    result = decoder_forward(weights, inputs, nothing)
    with pytest.raises(ValueError, match=r"memory must be \[2, S, 4\], got \(2, 6, 5\)"):
        decoder_forward(weights, inputs._replace(memory=torch.ones(2, 6, 5)), nothing)
    with pytest.raises(ValueError, match="layer 0 takes 7 inputs, must take 8"):
        decoder_forward(weights, inputs._replace(emb=torch.ones(2, 5, 4)), nothing)
    with pytest.raises(ValueError, match=r"feed must be \[2, 4\]"):
        decoder_forward(weights, inputs._replace(feed0=torch.ones(3, 4)), nothing)
    with pytest.raises(ValueError, match=r"join must be \[8, 4\], got \[4, 4\]"):
        decoder_forward(weights._replace(join=gemm_pack(torch.ones(4, 4))), inputs, nothing)
    with pytest.raises(ValueError, match="1 layers take as many recurrent patterns"):
        decoder_forward(weights, inputs, DecoderPatterns(None, None, (), (), None, None))
    with pytest.raises(TypeError, match=r"another operand torch\.float64"):
        decoder_forward(weights, inputs._replace(memory=inputs.memory.double()), nothing)
    query = gemm_pack(torch.ones(4, 4))._replace(dtype=torch.float64)
    with pytest.raises(TypeError, match=r"another operand torch\.float64"):
        decoder_forward(weights._replace(query=query), inputs, nothing)
    kept = Kept.all(4, 4)
    with pytest.raises(ValueError, match="kept units are 4 steps of 4, the product has 5 of 4"):
        decoder_forward(weights, inputs, DecoderPatterns(None, None, (), (kept,), None, None))
    right = DecoderResultGradients(*result[:4])
    decoder_backward(weights, inputs, result.saved, right, nothing)
    for name, wrong in (("dy", {"y": state}), ("dh_n", {"h_n": state[0]}), ("dalign", {"align": state})):
        with pytest.raises(ValueError, match=f"{name} must be"):
            decoder_backward(weights, inputs, result.saved, right._replace(**wrong), nothing)


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_to_attend_to_and_nothing_to_say(backend: str, device: str, count: int) -> None:
    """A source of no positions gives a context of zeros, and an empty target the states that it got."""
    weights = DecoderWeights(
        (lstm_pack(torch.ones(16, 7, device=device), torch.ones(16, 4, device=device)),),
        None,
        gemm_pack(torch.ones(8, 4, device=device)),
    )
    nothing = DecoderPatterns(None, None, (), (None,), None, None)
    state = torch.ones(1, 2, 4, device=device)
    inputs = DecoderInputs(
        torch.ones(2, count, 3, device=device), torch.ones(2, 6, 4, device=device),
        torch.tensor([6, 0], dtype=torch.int32, device=device), state, state, torch.ones(2, 4, device=device),
    )  # fmt: skip
    result = decoder_forward(weights, inputs, nothing)
    got = decoder_backward(weights, inputs, result.saved, DecoderResultGradients(*result[:4]), nothing)
    assert torch.equal(result.align[:, 1], torch.zeros(count, 6, device=device))
    flat = [*result[:4], *got[:5], *got.cells[0], got.join]
    assert all(bool(tensor.isfinite().all()) for tensor in flat if tensor is not None)
    if not count:
        assert torch.equal(result.h_n, state)
        assert torch.equal(got.h0, state)
