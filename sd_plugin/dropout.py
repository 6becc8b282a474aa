"""Dropout as a module: any case of the paper's Fig. 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _capture, functional
from ._compile import opaque
from .kernels import Steps
from .patterns import Case, check_probability, check_sampling


class StructuredDropout(nn.Dropout):
    """Drops whole units for all of the batch, new ones at every time step (Case III), or as another case says.

    The result is a dense tensor with a hint that lets :class:`StructuredLinear` and
    :class:`StructuredDropoutLSTM` skip the dropped units. In eval mode, or with ``p = 0``, the identity.

    Args:
        p: probability that a unit is dropped, in [0, 1). May be changed at any time, as ``nn.Dropout``'s.
        case: ``"III"`` (default) or another case of Fig. 1.
        batch_first: input is ``[B, T, K]`` instead of ``[T, B, K]``.
        sampling: ``"exact"`` or ``"bernoulli"``; see :func:`sd_plugin.patterns.draw_kept`.
        site: name in the report.

    Shape:
        ``[T, B, K]`` or ``[B, T, K]``; two dimensions ``[B, K]`` are one time step. Output as input.

    Raises:
        ValueError: an argument is out of range, or the input has other dimensions.
    """

    def __init__(
        self,
        p: float = 0.5,
        case: Case | str = Case.III,
        batch_first: bool = False,
        sampling: str = "exact",
        site: str = "dropout",
    ) -> None:
        super().__init__(check_probability(p))
        self.case = Case(case)
        self.batch_first = batch_first
        self.sampling = check_sampling(sampling)
        self.site = site

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        # (torch.jit.script compiles what is left without this branch.)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._drop(input)
        raise RuntimeError("a scripted StructuredDropout is for evaluation: sd_plugin.to_stock(model) before scripting")

    def _drop(self, input: Tensor) -> Tensor:
        if isinstance(input, _capture.Proxy):
            return _capture.as_node(self, super().forward, True, input)  # type: ignore[no-any-return]
        return self._drop_units(input)

    @opaque
    def _drop_units(self, input: Tensor) -> Tensor:
        _capture.refuse_recording(self)
        if input.dim() not in (2, 3):
            raise ValueError(f"StructuredDropout takes 2 or 3 dimensions, got shape {tuple(input.shape)}")
        steps = Steps.packed(input.shape[:1]) if input.dim() == 2 else Steps(int(self.batch_first))
        return functional.dropout(input, self.p, self.case, steps, sampling=self.sampling, site=self.site)

    def extra_repr(self) -> str:
        return f"p={self.p}, case={self.case.value}, sampling={self.sampling}"
