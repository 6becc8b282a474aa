"""The compiled library and its C interface: its functions and structures, and Python's tensors as them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int, c_int32, c_int64, c_void_p
from dataclasses import replace
from functools import cache, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from ..storage import address
from . import toolchain
from .build import Built, build

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..kept import Kept
    from ..steps import Steps

SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}


class CSteps(ctypes.Structure):
    """Rows of each time step."""

    _fields_ = [("count", c_int32), ("batch", c_int32), ("rows", POINTER(c_int32))]


class CRows(ctypes.Structure):
    """An activation: where each step begins, and the stride of its rows, in elements."""

    _fields_ = [("data", c_void_p), ("start", POINTER(c_int64)), ("stride", c_int64)]


class CKept(ctypes.Structure):
    """Kept units of each step; no indices: all of them."""

    _fields_ = [
        ("indices", c_void_p),
        ("stride", c_int64),
        ("width", c_int32),
        ("size", c_int32),
        ("scale", c_double),
    ]


class CLSTM(ctypes.Structure):
    """One call of a layer, forward or backward."""

    _fields_ = [
        ("steps", CSteps),
        ("inputs", c_int32),
        ("hidden", c_int32),
        ("reverse", c_int32),
        ("w", c_void_p),
        ("u", c_void_p),
        ("bias", c_void_p),
        ("x", CRows),
        ("kept_input", CKept),
        ("kept_recurrent", CKept),
        ("mask", c_void_p),
        ("h0", c_void_p),
        ("c0", c_void_p),
        ("gates", c_void_p),
        ("cells", c_void_p),
        ("operand", c_void_p),
    ]


class CLSTMOut(ctypes.Structure):
    """Where a layer's results go."""

    _fields_ = [("y", CRows), ("h_n", c_void_p), ("c_n", c_void_p)]


class CLSTMGrad(ctypes.Structure):
    """Gradients given to a layer, and where its own go; null: not wanted."""

    _fields_ = [
        ("dy", CRows),
        ("dh_n", c_void_p),
        ("dc_n", c_void_p),
        ("dx", CRows),
        ("dh0", c_void_p),
        ("dc0", c_void_p),
        ("dw", c_void_p),
        ("du", c_void_p),
        ("dbias", c_void_p),
        ("dgates", CRows),
    ]


class CDecoder(ctypes.Structure):
    """One call of an input-feeding decoder, forward or backward."""

    _fields_ = [
        ("steps", CSteps),
        ("layers", c_int32),
        ("embed", c_int32),
        ("hidden", c_int32),
        ("source", c_int32),
        ("w", POINTER(c_void_p)),
        ("u", POINTER(c_void_p)),
        ("bias", POINTER(c_void_p)),
        ("w_in", c_void_p),
        ("w_out", c_void_p),
        ("emb", CRows),
        ("kept_input", POINTER(CKept)),
        ("kept_recurrent", POINTER(CKept)),
        ("kept_query", CKept),
        ("kept_out", CKept),
        ("mask_h", POINTER(c_void_p)),
        ("mask_between", POINTER(c_void_p)),
        ("mask_query", c_void_p),
        ("mask_out", c_void_p),
        ("memory", c_void_p),
        ("lengths", c_void_p),
        ("h0", c_void_p),
        ("c0", c_void_p),
        ("feed0", c_void_p),
        ("gates", POINTER(c_void_p)),
        ("cells", POINTER(c_void_p)),
        ("operand", POINTER(c_void_p)),
        ("input", POINTER(c_void_p)),
        ("query", c_void_p),
        ("scored", c_void_p),
        ("context", c_void_p),
        ("align", c_void_p),
        ("attended", c_void_p),
    ]


class CDecoderOut(ctypes.Structure):
    """Where a decoder's results go."""

    _fields_ = [("y", CRows), ("h_n", c_void_p), ("c_n", c_void_p)]


class CDecoderGrad(ctypes.Structure):
    """Gradients given to a decoder, and where its own go."""

    _fields_ = [
        ("dy", CRows),
        ("dh_n", c_void_p),
        ("dc_n", c_void_p),
        ("dalign", c_void_p),
        ("demb", CRows),
        ("dmemory", c_void_p),
        ("dh0", c_void_p),
        ("dc0", c_void_p),
        ("dfeed0", c_void_p),
        ("dw", POINTER(c_void_p)),
        ("du", POINTER(c_void_p)),
        ("dbias", POINTER(c_void_p)),
        ("dw_in", c_void_p),
        ("dw_out", c_void_p),
    ]


_P = c_void_p
SIGNATURES: dict[str, list[Any]] = {
    "sd_pack": [c_int, _P, c_int64, c_int, c_int64, c_int64, c_int, _P],
    "sd_gemm_fp": [c_int, POINTER(CSteps), POINTER(CRows), _P, c_int64, _P, POINTER(CKept), POINTER(CRows)],
    "sd_gemm_bp": [c_int, POINTER(CSteps), POINTER(CRows), _P, c_int64, POINTER(CKept), POINTER(CRows)],
    "sd_gemm_wg": [c_int, POINTER(CSteps), POINTER(CRows), POINTER(CRows), c_int64, POINTER(CKept), _P],
    "sd_cross_entropy_forward": [c_int, c_int64, c_int64, _P, c_int64, _P, c_int64, c_double, _P, _P],
    "sd_cross_entropy_backward": [c_int, c_int64, c_int64, _P, c_int64, _P, c_int64, c_double, _P, _P, _P],
    "sd_lstm_forward": [c_int, POINTER(CLSTM), POINTER(CLSTMOut)],
    "sd_lstm_backward": [c_int, POINTER(CLSTM), POINTER(CLSTMGrad)],
    "sd_decoder_forward": [c_int, POINTER(CDecoder), POINTER(CDecoderOut)],
    "sd_decoder_backward": [c_int, POINTER(CDecoder), POINTER(CDecoderGrad)],
}


#: The others: each takes and returns sizes.
_SIZES = ("sd_panel", "sd_padded_rows")


@cache
def built() -> Built:
    """The library of the CPU kernels, compiled when the cache does not have it.

    Raises:
        BuildError: it cannot be built or loaded here, or a variable's value is invalid. Not remembered: the next
            call tries again.
    """
    return build(exports=[f"{name}_{suffix}" for name in (*SIGNATURES, *_SIZES) for suffix in SUFFIXES.values()])


def load() -> ctypes.CDLL:
    """:func:`built`, by itself; errors as there."""
    return built().library


def describe() -> dict[str, str]:
    """The library in words, without absolute paths; builds it when necessary.

    Raises:
        BuildError: as :func:`built`.
    """
    found, openmp = built(), toolchain.openmp_runtime()
    return {
        "isa": found.isa,
        "compiler": found.target.version if found.target else "unknown (found in the cache)",
        "library": found.path.name,
        "openmp": openmp.name if openmp else "the compiler's",
        "sanitize": found.sanitize,
    }


@cache
def function(name: str, dtype: torch.dtype) -> Callable[..., int]:
    """The library's function of that name for that dtype.

    Raises:
        BuildError: the library cannot be built. The function itself raises MemoryError, or ValueError for kept units
            that do not ascend.
    """
    found = getattr(load(), f"{name}_{SUFFIXES[dtype]}")
    found.argtypes, found.restype = SIGNATURES[name], c_int
    found.errcheck = _check
    checked: Callable[..., int] = found
    return checked


def _check(result: int, called: Any, arguments: Any) -> int:
    if result == 1:
        raise MemoryError(f"{called.__name__}: out of memory for its scratch space")
    if result != 0:
        raise ValueError("kept units of a step must be strictly ascending, from 0 to size - 1")
    return result


@cache
def panel_width(dtype: torch.dtype) -> int:
    """Columns of a panel of packed weights."""
    return int(getattr(load(), f"sd_panel_{SUFFIXES[dtype]}")())


@cache
def padded_rows(rows: int, dtype: torch.dtype) -> int:
    """Rows that a panel of ``rows`` takes in memory."""
    found = getattr(load(), f"sd_padded_rows_{SUFFIXES[dtype]}")
    found.argtypes, found.restype = [c_int64], c_int64
    return int(found(rows))


def panels_of_layer(hidden: int, dtype: torch.dtype) -> int:
    """Panels of a layer's four gates: each holds the same quarter of its width of every gate."""
    width = panel_width(dtype) // 4
    return (hidden + width - 1) // width


@lru_cache(maxsize=256)
def _int32s(*values: int) -> Any:
    return (c_int32 * max(len(values), 1))(*values)


@lru_cache(maxsize=256)
def _strided(count: int, stride: int) -> Any:
    return (c_int64 * max(count, 1))(*(t * stride for t in range(count)))


@lru_cache(maxsize=256)
def _packed_starts(sizes: tuple[int, ...], stride: int) -> Any:
    firsts = [0, *accumulate(sizes)][: max(len(sizes), 1)]
    return (c_int64 * len(firsts))(*(first * stride for first in firsts))


def adjacent(x: Tensor) -> Tensor:
    """``x`` itself if its columns are adjacent in memory, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def c_rows(x: Tensor, steps: Steps) -> CRows:
    """``x``, whose columns must be adjacent, as the library takes it; valid while ``x`` lives."""
    if steps.batch_sizes is not None:
        stride = x.stride(0)
        return CRows(address(x), _packed_starts(steps.batch_sizes, stride), stride)
    start = _strided(x.shape[steps.time_dim], x.stride(steps.time_dim))
    return CRows(address(x), start, x.stride(1 - steps.time_dim))


def c_steps(x: Tensor, steps: Steps) -> CSteps:
    """The rows of each step of ``x``."""
    count, batch = steps.count(x), steps.batch(x)
    sizes = steps.batch_sizes if steps.batch_sizes is not None else (batch,) * count
    return CSteps(count, batch, _int32s(*sizes))


def c_kept(kept: Kept | None, size: int) -> tuple[CKept, Tensor | None]:
    """Kept units of ``size``, and the tensor that must live as long."""
    if kept is None:
        return CKept(None, 0, size, size, 1.0), None
    if kept.width == 0:  # no unit at all; a null pointer would mean all of them
        return c_kept(replace(kept, indices=kept.indices.new_full((kept.steps, 1), size), padded=True), size)
    indices = kept.indices if kept.indices.stride(1) == 1 or kept.width <= 1 else kept.indices.contiguous()
    stride = indices.stride(0) if kept.steps > 1 else max(kept.width, 1)
    return CKept(address(indices), stride, kept.width, size, kept.scale), indices


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's data; None is a null pointer."""
    return None if tensor is None else address(tensor)
