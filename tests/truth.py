"""What the library is held to: an LSTM written out row by row, differentiable, in the tensors' own dtype."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_plugin.kernels import Kept


def multiplier(pattern: Kept | Tensor | None, steps: int, batch: int, size: int, dtype: torch.dtype) -> Tensor:
    """A pattern as ``[T, B, size]`` factors."""
    if pattern is None:
        return torch.ones(steps, batch, size, dtype=dtype)
    if isinstance(pattern, Tensor):
        return pattern.to(dtype)
    return pattern.multiplier(dtype).unsqueeze(1).expand(steps, batch, size)


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    drop_h: Tensor,
    lengths: list[int],
    reverse: bool = False,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer over padded ``[T, B, I]``, each sequence on its own; rows past a sequence's end are zero.

    Args:
        drop_h: ``[T, B, H]`` factors on ``h_{t-1}`` in its product.
        offset: ``[T, B, 4H]``, added to the gates' pre-activations, whose gradient is its own.
    """
    weight_ih, weight_hh, *biases = weights
    bias = sum(b for b in biases if b is not None)
    steps, batch = x.shape[:2]
    outputs, hs, cs = [], [], []
    for b in range(batch):
        h, c = h0[b], c0[b]
        rows = [torch.zeros_like(h) for _ in range(steps)]
        for t in sorted(range(lengths[b]), reverse=reverse):
            pre = weight_ih @ x[t, b] + weight_hh @ (h * drop_h[t, b]) + bias
            i, f, g, o = (pre if offset is None else pre + offset[t, b]).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            rows[t] = h
        outputs.append(torch.stack(rows) if rows else h.new_zeros(0, h.shape[0]))
        hs.append(h)
        cs.append(c)
    if not outputs:
        return h0.new_zeros(steps, 0, h0.shape[1]), h0, c0
    return torch.stack(outputs, 1), torch.stack(hs), torch.stack(cs)


@dataclass
class Drops:
    """``[T, B, size]`` factors at each place where a stack of layers drops units."""

    input: Tensor
    output: Tensor
    between: list[Tensor] = field(default_factory=list)
    recurrent: list[Tensor] = field(default_factory=list)


def lstm(
    x: Tensor, h0: Tensor, c0: Tensor, parameters: dict[str, Tensor], drops: Drops, lengths: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of layers over padded ``[T, B, I]``; ``parameters`` as ``nn.LSTM`` names them."""
    suffixes = [name.removeprefix("weight_ih_") for name in parameters if name.startswith("weight_ih_")]
    directions = 2 if any(suffix.endswith("_reverse") for suffix in suffixes) else 1
    x = x * drops.input
    finals = []
    for layer in range(len(suffixes) // directions):
        if layer:
            x = x * drops.between[layer - 1]
        outputs = []
        for direction in range(directions):
            n = layer * directions + direction
            weights = tuple(
                parameters.get(f"{name}_{suffixes[n]}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            y, *final = lstm_layer(x, h0[n], c0[n], weights, drops.recurrent[n], lengths, bool(direction))
            outputs.append(y)
            finals.append(final)
        x = torch.cat(outputs, -1)
    return x * drops.output, torch.stack([h for h, _ in finals]), torch.stack([c for _, c in finals])
