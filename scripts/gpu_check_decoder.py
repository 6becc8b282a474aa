"""``gpu_check.py``: the input-feeding decoder of a backend that has it, against its equations in float64."""

from typing import Any

import torch
from gpu_check_machine import Machine, Precision
from torch import Tensor

from sd_plugin import kernels
from sd_plugin.kernels import DecoderPatterns, DecoderWeights, Kept
from sd_plugin.patterns import draw_kept


def _fed_back(output: Kept) -> Kept:
    """Kept units of the feed: all at the first step, then those of the step before's output."""
    indices, size = output.indices, output.size
    missing = indices.new_full((output.steps - 1, size - output.width), size)
    first = torch.arange(size, dtype=torch.int32, device=indices.device).unsqueeze(0)
    return Kept(torch.cat([first, torch.cat([indices[:-1], missing], 1)]), size, 1.0, True)


def _equations(
    tensors: dict[str, Tensor], drops: dict[str, Tensor], lengths: Tensor, layers: int
) -> tuple[Tensor, ...]:
    """``y``, final states and attention, a step at a time; activations ``[T, B, ...]``."""
    h, c, feed = list(tensors["h0"]), list(tensors["c0"]), tensors["feed"]
    outputs, aligns = [], []
    beyond = torch.arange(tensors["memory"].shape[1], device=lengths.device) >= lengths.unsqueeze(1)
    for t, emb in enumerate(tensors["emb"]):
        x = torch.cat([emb, feed], 1)
        for layer in range(layers):
            gates = x @ tensors[f"weight_ih_{layer}"].t() + tensors[f"bias_ih_{layer}"] + tensors[f"bias_hh_{layer}"]
            gates = gates + (h[layer] * drops[f"recurrent_{layer}"][t]) @ tensors[f"weight_hh_{layer}"].t()
            i, f, g, o = gates.chunk(4, 1)
            c[layer] = f.sigmoid() * c[layer] + i.sigmoid() * g.tanh()
            h[layer] = o.sigmoid() * c[layer].tanh()
            x = h[layer] * drops["query" if layer == layers - 1 else f"between_{layer}"][t]
        scores = torch.einsum("bh,bsh->bs", x @ tensors["query"].t(), tensors["memory"])
        align = scores.masked_fill(beyond, -float("inf")).softmax(1)
        context = torch.einsum("bs,bsh->bh", align, tensors["memory"])
        feed = (torch.cat([context, x], 1) @ tensors["join"].t()).tanh() * drops["output"][t]
        outputs.append(feed)
        aligns.append(align)
    return torch.stack(outputs), torch.stack(h), torch.stack(c), torch.stack(aligns)


def decoder_case(
    machine: Machine, precision: Precision, sizes: tuple[int, ...], dropped: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """A decoder both ways, with Luong's general attention: ours, and its equations' in float64.

    Args:
        sizes: batch, steps, source length, embedding, hidden, layers.
    """
    batch, count, source, embed, hidden, layers = sizes
    shapes: dict[str, tuple[int, ...]] = {
        "emb": (count, batch, embed), "memory": (batch, source, hidden), "h0": (layers, batch, hidden),
        "c0": (layers, batch, hidden), "feed": (batch, hidden), "query": (hidden, hidden), "join": (hidden, 2 * hidden),
    }  # fmt: skip
    for layer in range(layers):
        inputs = hidden if layer else embed + hidden
        shapes |= {f"weight_ih_{layer}": (4 * hidden, inputs), f"weight_hh_{layer}": (4 * hidden, hidden)}
        shapes |= {f"bias_ih_{layer}": (4 * hidden,), f"bias_hh_{layer}": (4 * hidden,)}

    def drawn(shape: tuple[int, ...]) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.5
        return (torch.randn(shape) * scale).to(machine.device, precision.dtype)

    low = {name: drawn(shape) for name, shape in shapes.items()}
    names = [
        "query",
        "output",
        *(f"between_{n}" for n in range(layers - 1)),
        *(f"recurrent_{n}" for n in range(layers)),
    ]
    kept: dict[str, Any] = dict.fromkeys(["embedding", *names])
    if dropped:
        kept = {name: draw_kept(count, hidden, 0.3, device=machine.device) for name in names}
        kept["embedding"] = draw_kept(count, embed, 0.3, device=machine.device)
        low["emb"] = low["emb"] * kept["embedding"].multiplier(precision.dtype).unsqueeze(1)
    ones = torch.ones(count, 1, hidden, device=machine.device, dtype=torch.double)
    drops = {
        name: ones if kept[name] is None else kept[name].multiplier(torch.double).unsqueeze(1) for name in names
    }  # fmt: skip
    lengths = (torch.arange(batch) % source + 1).int().to(machine.device)

    high = {name: tensor.double().requires_grad_() for name, tensor in low.items()}
    gradients = [drawn(shape) for shape in ((count, batch, hidden), (layers, batch, hidden), (layers, batch, hidden))]
    with torch.enable_grad():
        right = _equations(high, drops, lengths, layers)
        loss = sum((a * b.double()).sum() for a, b in zip(right, gradients, strict=False))
        wanted = dict(zip(high, torch.autograd.grad(loss, list(high.values())), strict=True))
    if dropped:  # the gradient of a column that the dropout before will zero
        wanted["emb"] = wanted["emb"] * kept["embedding"].mask().unsqueeze(1)

    cells = tuple(
        kernels.lstm_pack(*(low[f"{name}_{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))
        for layer in range(layers)
    )
    weights = DecoderWeights(cells, kernels.gemm_pack(low["query"].t()), kernels.gemm_pack(low["join"].t()))
    patterns = DecoderPatterns(
        kept["embedding"].unscaled() if dropped else None,
        _fed_back(kept["output"]) if dropped else None,
        tuple(kept[f"between_{layer}"] for layer in range(layers - 1)),
        tuple(kept[f"recurrent_{layer}"] for layer in range(layers)),
        kept["query"],
        kept["output"],
    )
    operands = (low["emb"].transpose(0, 1), low["memory"], lengths, (low["h0"], low["c0"], low["feed"]))
    result = kernels.decoder_forward(weights, *operands, patterns)
    dy, dh_n, dc_n = gradients
    got = kernels.decoder_backward(
        weights, dy.transpose(0, 1), (dh_n, dc_n), None, *operands, result.saved, patterns
    )  # fmt: skip
    found = {
        "y": (result.y.transpose(0, 1), right[0]), "h_n": (result.h_n, right[1]), "c_n": (result.c_n, right[2]),
        "align": (result.align, right[3]), "demb": (got.emb.transpose(0, 1), wanted["emb"]),
        "dmemory": (got.memory, wanted["memory"]), "dh0": (got.h0, wanted["h0"]), "dc0": (got.c0, wanted["c0"]),
        "dfeed": (got.feed0, wanted["feed"]), "dquery": (got.query, wanted["query"]),
        "djoin": (got.join, wanted["join"]),
    }  # fmt: skip
    for layer, cell in enumerate(got.cells):
        for name, value in zip(("weight_ih", "weight_hh", "bias_ih"), cell, strict=True):
            found[f"d{name}_{layer}"] = (value, wanted[f"{name}_{layer}"])
    return {name: (value, exact.detach()) for name, (value, exact) in found.items()}
