"""What a backend does: the calls, what they take and return, with shapes and dtypes, said once.

:class:`Backend` is implemented completely by :mod:`.reference`, which defines what is right; the others override what
they do faster. Arguments are checked (:mod:`.ops`, :mod:`.decoder`) before a backend sees them.

Sizes: ``T`` time steps, ``B`` rows of a step, ``I`` inputs, ``H`` hidden units, ``K`` units of any operand, ``N``
columns of a product, ``S`` source positions. An activation is ``[T, B, K]``, ``[B, T, K]`` or packed ``[R, K]``, as its
:class:`Steps` says, with any strides. Weights are K-major, ``[K, N]``: a dropped unit is one row that is skipped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .kept import Kept
from .steps import TIME_MAJOR, Steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    #: What a dropout does to the operand of a product: its kept units ``[T, k]`` with their scale, a multiplier
    #: ``[T, B, K]`` (random dropout: nothing is skipped), or nothing.
    Pattern = Kept | Tensor | None


class PackedMatrix(NamedTuple):
    """A weight in the layout of the backend that will multiply it.

    A snapshot: pack again after the weight has changed.
    """

    backend: Backend
    data: Any  #: as :meth:`Backend.gemm_pack` returns it
    shape: tuple[int, int]  #: ``(K, N)``
    dtype: torch.dtype
    device: torch.device


class PackedWeights(NamedTuple):
    """An LSTM layer's weights in the layout of the backend that will multiply them.

    A snapshot: pack again after the parameters have changed.
    """

    backend: Backend
    data: Any  #: as :meth:`Backend.lstm_pack` returns it
    input_size: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device


class LSTMCall(NamedTuple):
    """How an LSTM layer is run over a sequence: both passes are told the same."""

    #: Columns of the input that are not zero, ``[T, k]`` of ``I``; None: any. The input carries its scale already (the
    #: scale of ``input`` is applied on top: :meth:`Kept.unscaled`).
    input: Kept | None = None
    #: Recurrent dropout, of ``h_{t-1}`` inside its product.
    recurrent: Pattern = None
    steps: Steps = TIME_MAJOR
    reverse: bool = False  #: run from the last step to the first


class LSTMResult(NamedTuple):
    """What an LSTM layer's forward pass returns."""

    y: Tensor  #: ``h_t`` of every row, ``H`` columns, undropped
    h_n: Tensor  #: ``[B, H]``
    c_n: Tensor  #: ``[B, H]``
    saved: Any  #: for the backward pass of the same backend alone


class LSTMResultGradients(NamedTuple):
    """Gradients of an LSTM layer's results, in their shapes."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor


class Wanted(NamedTuple):
    """Which gradients of a layer are worth computing; those of the initial state always are.

    Those of the gates are for whoever makes one product for the weights' gradients of several calls.
    """

    x: bool = True
    weight_ih: bool = True
    weight_hh: bool = True
    bias: bool = True
    gates: bool = False


class LSTMGradients(NamedTuple):
    """Gradients in the shapes of what they belong to; None where not wanted."""

    x: Tensor | None
    h0: Tensor
    c0: Tensor
    weight_ih: Tensor | None  #: ``[4H, I]``
    weight_hh: Tensor | None  #: ``[4H, H]``
    bias: Tensor | None  #: ``[4H]``, of either bias
    gates: Tensor | None  #: ``4H`` columns for every row, of the pre-activations of i, f, g, o


class DecoderWeights(NamedTuple):
    """What an attentional decoder multiplies by, packed."""

    cells: tuple[PackedWeights, ...]  #: of each layer; the first takes ``[embedding, feed]``, ``[4H, E + H]``
    query: PackedMatrix | None  #: ``[H, H]`` of Luong's general attention; None for dot
    join: PackedMatrix  #: ``[2H, H]``, of ``[context, query]``


class DecoderInputs(NamedTuple):
    """What an attentional decoder runs on."""

    emb: Tensor  #: ``[B, T, E]`` target embeddings, dropped and scaled already
    memory: Tensor  #: ``[B, S, H]``, the encoder's output
    lengths: Tensor  #: ``[B]`` int32, source positions that count
    h0: Tensor  #: ``[layers, B, H]``
    c0: Tensor  #: ``[layers, B, H]``
    feed0: Tensor  #: ``[B, H]``, the initial input feed


@dataclass(frozen=True)
class DecoderPatterns:
    """What is dropped at every product of a decoder, ``[T, k]`` each; None: nothing.

    Attributes:
        embedding: columns of the embedding that are not zero; they carry their scale.
        feed: of the previous step's output, for each step; of step 0 those of the initial feed. Unscaled.
        between: dropout of each layer's output but the last, on its way to the next layer; ``layers - 1`` of them.
        recurrent: dropout of each layer's ``h_{t-1}`` inside its product.
        query: dropout of the last layer's output.
        output: dropout of the decoder's output, which is also what is fed back.
    """

    embedding: Kept | None
    feed: Kept | None
    between: tuple[Pattern, ...]
    recurrent: tuple[Pattern, ...]
    query: Pattern
    output: Pattern


class DecoderResult(NamedTuple):
    """What a decoder's forward pass returns."""

    y: Tensor  #: ``[B, T, H]`` the decoder's output, dropped
    h_n: Tensor  #: ``[layers, B, H]``
    c_n: Tensor  #: ``[layers, B, H]``
    align: Tensor  #: ``[T, B, S]`` attention over the source, rows summing to one
    saved: Any  #: for the backward pass of the same backend alone


class DecoderResultGradients(NamedTuple):
    """Gradients of a decoder's results, in their shapes."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor
    align: Tensor | None = None


class DecoderGradients(NamedTuple):
    """Gradients of a decoder, in the shapes of what they belong to."""

    emb: Tensor
    memory: Tensor
    h0: Tensor
    c0: Tensor
    feed0: Tensor
    #: ``weight_ih``, ``weight_hh`` and the bias of each layer; empty where not wanted
    cells: tuple[tuple[Tensor, Tensor, Tensor], ...]
    query: Tensor | None  #: ``[H, H]``, as the host's linear layer holds it
    join: Tensor | None  #: ``[H, 2H]``, likewise


class Backend(ABC):
    """Kernels for one kind of device.

    Results of forward passes are memory of their own: no views, since torch forbids to write into a view that an
    autograd function returns, and not the memory of what a backward pass reads, since a write there would go unseen.
    They have the dtype of the activations; sums of half types are float32. Nothing here is differentiable by itself.
    """

    name: str
    #: The decoder in one piece is faster than its steps one by one.
    decodes_at_once: bool = True

    @abstractmethod
    def reason_unavailable(self) -> str | None:
        """Why it cannot run on this machine (no compiler, no GPU, ...); None when it can."""

    @abstractmethod
    def reason_unsupported(self, operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot do this call; None when it can.

        Args:
            operation: ``gemm_fp``, ``gemm_bp``, ``gemm_wg``, ``lstm``, ``cross_entropy`` or ``kept_lists``.
        """

    def describe(self) -> dict[str, str]:
        """How it was built, in words without absolute paths."""
        return {}

    @abstractmethod
    def kept_lists(self, noise: Tensor, count: int | None, p: float, scale: float) -> tuple[Tensor, Tensor | None]:
        """See :func:`sd_plugin.kernels.kept_lists`."""

    @abstractmethod
    def gemm_pack(self, weight_t: Tensor) -> Any:
        """A weight ``[K, N]`` in the backend's own layout; never a view of it."""

    @abstractmethod
    def gemm_fp(self, x: Tensor, weight: Any, kept: Kept | None, steps: Steps, bias: Tensor | None) -> Tensor:
        """See :func:`sd_plugin.kernels.gemm_fp`; ``weight`` is packed."""

    @abstractmethod
    def gemm_bp(self, dy: Tensor, weight: Any, kept: Kept | None, steps: Steps) -> Tensor:
        """See :func:`sd_plugin.kernels.gemm_bp`; ``weight`` is packed."""

    @abstractmethod
    def gemm_wg(self, x: Tensor, dy: Tensor, kept: Kept | None, steps: Steps) -> Tensor:
        """See :func:`sd_plugin.kernels.gemm_wg`."""

    @abstractmethod
    def cross_entropy_forward(
        self, logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """See :func:`sd_plugin.kernels.cross_entropy_forward`."""

    @abstractmethod
    def cross_entropy_backward(
        self, logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, lse: Tensor, scale: Tensor
    ) -> Tensor:
        """See :func:`sd_plugin.kernels.cross_entropy_backward`."""

    @abstractmethod
    def lstm_pack(self, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> Any:
        """A layer's parameters in the backend's own layout."""

    @abstractmethod
    def lstm_forward(self, packed: Any, x: Tensor, state: tuple[Tensor, Tensor], call: LSTMCall) -> LSTMResult:
        """See :func:`sd_plugin.kernels.lstm_forward`; ``packed`` is as :meth:`lstm_pack` returns it."""

    @abstractmethod
    def lstm_backward(
        self, packed: Any, x: Tensor, saved: Any, gradients: LSTMResultGradients, call: LSTMCall, wanted: Wanted
    ) -> LSTMGradients:
        """See :func:`sd_plugin.kernels.lstm_backward`; ``packed`` is as :meth:`lstm_pack` returns it."""

    @abstractmethod
    def decoder_forward(
        self, weights: DecoderWeights, inputs: DecoderInputs, patterns: DecoderPatterns
    ) -> DecoderResult:
        """See :func:`sd_plugin.kernels.decoder_forward`."""

    @abstractmethod
    def decoder_backward(
        self,
        weights: DecoderWeights,
        inputs: DecoderInputs,
        saved: Any,
        gradients: DecoderResultGradients,
        patterns: DecoderPatterns,
        weights_wanted: bool,
    ) -> DecoderGradients:
        """See :func:`sd_plugin.kernels.decoder_backward`."""
