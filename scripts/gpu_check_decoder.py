"""``gpu_check.py``: the input-feeding decoder of a backend that has it, against the reference in float64."""

from typing import Any

import torch
from gpu_check_machine import Machine, Precision
from torch import Tensor

from sd_plugin import kernels
from sd_plugin.kernels import DecoderInputs, DecoderPatterns, DecoderResultGradients, DecoderWeights, Kept
from sd_plugin.kernels.reference import BACKEND as REFERENCE
from sd_plugin.patterns import draw_kept


def _fed_back(output: Kept) -> Kept:
    """Kept units of the feed: all at the first step, then those of the step before's output."""
    indices, size = output.indices, output.size
    missing = indices.new_full((output.steps - 1, size - output.width), size)
    first = torch.arange(size, dtype=torch.int32, device=indices.device).unsqueeze(0)
    return Kept(torch.cat([first, torch.cat([indices[:-1], missing], 1)]), size, 1.0, True)


def _both_ways(
    tensors: dict[str, Tensor],
    gradients: list[Tensor],
    lengths: Tensor,
    patterns: DecoderPatterns,
    layers: int,
    backend: kernels.Backend,
) -> dict[str, Tensor]:
    """Results and gradients of a backend's decoder by name; activations ``[T, B, ...]``."""

    def matrix(name: str) -> kernels.PackedMatrix:
        weight = tensors[name].t()
        packed = backend.gemm_pack(weight)
        return kernels.PackedMatrix(backend, packed, (weight.shape[0], weight.shape[1]), weight.dtype, weight.device)

    cells = []
    for layer in range(layers):
        weights = [tensors[f"{name}_{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        (_, inputs), hidden = weights[0].shape, weights[1].shape[1]
        packed = backend.lstm_pack(*weights)
        cells.append(kernels.PackedWeights(backend, packed, inputs, hidden, weights[0].dtype, weights[0].device))
    decoder = DecoderWeights(tuple(cells), matrix("query"), matrix("join"))
    emb, memory, h0, c0, feed = (tensors[name] for name in ("emb", "memory", "h0", "c0", "feed"))
    operands = DecoderInputs(emb.transpose(0, 1), memory, lengths, h0, c0, feed)
    result = kernels.decoder_forward(decoder, operands, patterns)
    dy, dh_n, dc_n = gradients
    told = DecoderResultGradients(dy.transpose(0, 1), dh_n, dc_n)
    got = kernels.decoder_backward(decoder, operands, result.saved, told, patterns)
    assert got.query is not None
    assert got.join is not None
    found = {
        "y": result.y.transpose(0, 1), "h_n": result.h_n, "c_n": result.c_n, "align": result.align,
        "demb": got.emb.transpose(0, 1), "dmemory": got.memory, "dh0": got.h0, "dc0": got.c0, "dfeed": got.feed0,
        "dquery": got.query, "djoin": got.join,
    }  # fmt: skip
    for layer, cell in enumerate(got.cells):
        found |= {f"d{name}_{layer}": t for name, t in zip(("weight_ih", "weight_hh", "bias_ih"), cell, strict=True)}
    return found


def decoder_case(
    machine: Machine, precision: Precision, sizes: tuple[int, ...], dropped: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """A decoder both ways, with Luong's general attention: ours, and the reference's in float64.

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
    lengths = (torch.arange(batch) % source + 1).int().to(machine.device)

    gradients = [drawn(shape) for shape in ((count, batch, hidden), (layers, batch, hidden), (layers, batch, hidden))]
    patterns = DecoderPatterns(
        kept["embedding"].unscaled() if dropped else None,
        _fed_back(kept["output"]) if dropped else None,
        tuple(kept[f"between_{layer}"] for layer in range(layers - 1)),
        tuple(kept[f"recurrent_{layer}"] for layer in range(layers)),
        kept["query"],
        kept["output"],
    )
    backend = kernels.choose("lstm", machine.device, precision.dtype, counted=False)
    found = _both_ways(low, gradients, lengths, patterns, layers, backend)
    high = {name: tensor.double() for name, tensor in low.items()}
    exact = _both_ways(high, [d.double() for d in gradients], lengths, patterns, layers, REFERENCE)
    return {name: (found[name], exact[name]) for name in exact}
