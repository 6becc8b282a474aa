"""The reference backend: plain torch, any device, any floating dtype. It defines what correct means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..contract import Backend
from . import decoder, gemm, loss, lstm, pattern

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..contract import (
        DecoderGradients,
        DecoderInputs,
        DecoderPatterns,
        DecoderResult,
        DecoderResultGradients,
        DecoderWeights,
        LSTMCall,
        LSTMGradients,
        LSTMResult,
        LSTMResultGradients,
        Wanted,
    )
    from ..kept import Kept
    from ..steps import Steps


class Reference(Backend):
    """Every call, by the equations. A subclass overrides what its device does faster, packing and products together."""

    name = "reference"
    decodes_at_once = False

    def reason_unavailable(self) -> str | None:
        """Why this backend cannot run on this machine: never."""
        return None

    def reason_unsupported(self, operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype.is_floating_point else f"{operation} needs a floating-point dtype, got {dtype}"

    # What is packed and saved is each backend's own, so that subclasses take others than these functions do.

    def kept_lists(self, noise: Tensor, count: int | None, p: float, scale: float) -> tuple[Tensor, Tensor | None]:
        return pattern.kept_lists(noise, count, p, scale)

    def gemm_pack(self, weight_t: Tensor) -> Any:
        return gemm.gemm_pack(weight_t)

    def gemm_fp(self, x: Tensor, weight: Any, kept: Kept | None, steps: Steps, bias: Tensor | None) -> Tensor:
        return gemm.gemm_fp(x, weight, kept, steps, bias)

    def gemm_bp(self, dy: Tensor, weight: Any, kept: Kept | None, steps: Steps) -> Tensor:
        return gemm.gemm_bp(dy, weight, kept, steps)

    def gemm_wg(self, x: Tensor, dy: Tensor, kept: Kept | None, steps: Steps) -> Tensor:
        return gemm.gemm_wg(x, dy, kept, steps)

    def cross_entropy_forward(
        self, logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        return loss.cross_entropy_forward(logits, target, ignore_index, label_smoothing)

    def cross_entropy_backward(
        self, logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, lse: Tensor, scale: Tensor
    ) -> Tensor:
        return loss.cross_entropy_backward(logits, target, ignore_index, label_smoothing, lse, scale)

    def lstm_pack(self, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> Any:
        return lstm.lstm_pack(weight_ih, weight_hh, bias_ih, bias_hh)

    def lstm_forward(self, packed: Any, x: Tensor, state: tuple[Tensor, Tensor], call: LSTMCall) -> LSTMResult:
        return lstm.lstm_forward(packed, x, state, call)

    def lstm_backward(
        self, packed: Any, x: Tensor, saved: Any, gradients: LSTMResultGradients, call: LSTMCall, wanted: Wanted
    ) -> LSTMGradients:
        return lstm.lstm_backward(packed, x, saved, gradients, call, wanted)

    def decoder_forward(
        self, weights: DecoderWeights, inputs: DecoderInputs, patterns: DecoderPatterns
    ) -> DecoderResult:
        return decoder.decoder_forward(weights, inputs, patterns)

    def decoder_backward(
        self,
        weights: DecoderWeights,
        inputs: DecoderInputs,
        saved: Any,
        gradients: DecoderResultGradients,
        patterns: DecoderPatterns,
        weights_wanted: bool,
    ) -> DecoderGradients:
        return decoder.decoder_backward(weights, inputs, saved, gradients, patterns, weights_wanted)
