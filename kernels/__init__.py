"""Sparse matrix products and LSTM layers that skip dropped units. Knows no host program and no ``nn.Module``.

Functions dispatch to a backend by the operands' device; ``SD_PLUGIN_BACKEND`` forces one
(see :mod:`sd_plugin.kernels.dispatch`). ``reference`` is the specification of them all. They are not differentiable
by themselves: call them under ``torch.no_grad``, or use :mod:`sd_plugin.functional`.
"""

from .contract import (
    Backend,
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
    PackedMatrix,
    PackedWeights,
    Wanted,
)
from .decoder import decoder_backward, decoder_forward, decodes_at_once
from .dispatch import BACKENDS, BackendError, choose, choose_for, fallbacks, forced, status
from .kept import Kept
from .ops import (
    cross_entropy_backward,
    cross_entropy_forward,
    gemm_bp,
    gemm_fp,
    gemm_pack,
    gemm_wg,
    kept_lists,
    lstm_backward,
    lstm_forward,
    lstm_pack,
)
from .steps import TIME_MAJOR, Steps
from .storage import has_memory, place, refuse_transforms

__all__ = [
    "BACKENDS",
    "TIME_MAJOR",
    "Backend",
    "BackendError",
    "DecoderGradients",
    "DecoderInputs",
    "DecoderPatterns",
    "DecoderResult",
    "DecoderResultGradients",
    "DecoderWeights",
    "Kept",
    "LSTMCall",
    "LSTMGradients",
    "LSTMResult",
    "LSTMResultGradients",
    "PackedMatrix",
    "PackedWeights",
    "Steps",
    "Wanted",
    "choose",
    "choose_for",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "decoder_backward",
    "decoder_forward",
    "decodes_at_once",
    "fallbacks",
    "forced",
    "gemm_bp",
    "gemm_fp",
    "gemm_pack",
    "gemm_wg",
    "has_memory",
    "kept_lists",
    "lstm_backward",
    "lstm_forward",
    "lstm_pack",
    "place",
    "refuse_transforms",
    "status",
]
