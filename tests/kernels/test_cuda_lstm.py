"""The persistent LSTM kernels of every tile, and layers step by step, against float64; and how a tile is chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_plugin.kernels import (
    BackendError,
    Kept,
    LSTMCall,
    LSTMResultGradients,
    Steps,
    Wanted,
    lstm_backward,
    lstm_forward,
    lstm_pack,
)
from sd_plugin.kernels.cuda import choices, driver, lstm, tiling
from sd_plugin.kernels.cuda.driver import Properties
from sd_plugin.kernels.cuda.precision import Precision
from sd_plugin.kernels.cuda.tiling import Tile
from sd_plugin.kernels.reference import BACKEND as REFERENCE

from ..emulation.emulator import EmulatedDriver
from ..tolerances import assert_close
from .cases import kept_units, layouts, noise_of, rounded, tensor_of
from .conftest import emulated_cuda

H100 = Properties("H100", 132, 232448, (9, 0))

#: Half types that differ in one instruction.
HALVES = (Precision.F16, Precision.BF16)


def _tiles() -> list[Tile]:
    """Every shape of a tile in every precision, with one of its rings and halves of one type, each in turn.

    Compiling takes longest. What is left out are other combinations of the same numbers; tests/nvrtc compiles all.
    """
    shapes: dict[tuple[object, int, int], list[Tile]] = {}
    for precision in Precision:
        for tile in tiling.tiles(precision):
            if tile.fits(40, 70, 40, True, H100):
                key = ("half" if precision in HALVES else precision, tile.units, tile.tiles)
                shapes.setdefault(key, []).append(tile)
    return [found[turn % len(found)] for turn, found in enumerate(shapes.values())]


TILES = _tiles()


@pytest.mark.exhaustive
@settings(max_examples=4 * len(TILES))
@given(
    data=st.data(), tile=st.sampled_from(TILES), layout=layouts(max_batch=20), hidden=st.integers(1, 40) | st.just(130),
    seed=st.integers(0, 10**6), reverse=st.booleans(),
)  # fmt: skip
def test_every_tile(
    data: st.DataObject, tile: Tile, layout: object, hidden: int, seed: int, reverse: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    precision, inputs = tile.precision, 3
    pattern = data.draw(kept_units(layout.count, hidden) | st.just("mask"))
    if pattern == "mask":
        pattern = (noise_of(seed, layout.count, layout.batch, hidden) < 0.5).to(precision.dtype) * 2
    shapes = {
        "weight_ih": (4 * hidden, inputs), "weight_hh": (4 * hidden, hidden), "bias_ih": (4 * hidden,),
        "bias_hh": (4 * hidden,), "x": layout.rows(inputs), "dy": layout.rows(hidden),
        **dict.fromkeys(("h0", "c0", "dh_n", "dc_n"), (layout.batch, hidden)),
    }  # fmt: skip
    # Small weights, so that no error grows from step to step.
    sizes = {"weight_hh": 0.5 * hidden**-0.5}
    low = {
        name: (tensor_of(seed + i, *shape) * sizes.get(name, 0.5)).to(precision.dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }
    high = {name: tensor.double() for name, tensor in low.items()}
    masked = pattern.double() if isinstance(pattern, torch.Tensor) else pattern
    call = LSTMCall(None, masked, layout.steps, reverse)
    exact = REFERENCE.lstm_pack(high["weight_ih"], high["weight_hh"], high["bias_ih"], high["bias_hh"])
    y, h_n, c_n, saved = REFERENCE.lstm_forward(exact, high["x"], (high["h0"], high["c0"]), call)
    gradients = LSTMResultGradients(high["dy"], high["dh_n"], high["dc_n"])
    expected = REFERENCE.lstm_backward(exact, high["x"], saved, gradients, call, Wanted(gates=True))

    monkeypatch.setattr(choices, "recurrence", lambda best: tile)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision is Precision.TF32)
    call = LSTMCall(None, pattern, layout.steps, reverse)
    with driver.use(EmulatedDriver(seed=seed)):
        packed = lstm.lstm_pack(low["weight_ih"], low["weight_hh"], low["bias_ih"], low["bias_hh"])
        result = lstm.lstm_forward(packed, low["x"], (low["h0"], low["c0"]), call)
        gradients = LSTMResultGradients(low["dy"], low["dh_n"], low["dc_n"])
        grads = lstm.lstm_backward(packed, low["x"], result.saved, gradients, call, Wanted(gates=True))

    for got, right in zip((*result[:3], *grads), (y, h_n, c_n, *expected), strict=True):
        assert got.dtype == precision.dtype
        assert_close(got, right, inputs + 4 * hidden, 2 * (layout.count + 1), operands=rounded(precision), exact=True)


def small_layer() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, Kept]:
    weights = [tensor_of(0, 44, 5).float() * 0.3, tensor_of(1, 44, 11).float() * 0.3]
    kept = Kept(tensor_of(2, 4, 11).argsort(1)[:, :6].sort(1).values.int(), 11, 11 / 6)
    return weights, tensor_of(3, 4, 9, 5).float(), torch.zeros(9, 11), kept


@pytest.mark.parametrize("way", ["persistent", "steps"])
def test_results_are_the_same_bits_at_every_run(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which blocks and warps get to run."""
    monkeypatch.setenv("SD_PLUGIN_CUDA_RECURRENCE", way)
    monkeypatch.setenv("SD_PLUGIN_BACKEND", "cuda")
    weights, x, zeros, kept = small_layer()
    runs = []
    with emulated_cuda(monkeypatch) as emulated:
        for seed in (0, 1, 2):
            emulated.seed = seed
            packed = lstm_pack(*weights)
            result = lstm_forward(packed, x, (zeros, zeros), LSTMCall(recurrent=kept))
            grads = lstm_backward(
                packed, x, result.saved, LSTMResultGradients(result.y, zeros, zeros), LSTMCall(recurrent=kept)
            )
            runs.append([result.y, grads.x, grads.weight_ih, grads.weight_hh, grads.bias])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_the_way_can_be_forced_and_a_wrong_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_PLUGIN_BACKEND", "cuda")
    weights, x, zeros, kept = small_layer()
    with emulated_cuda(monkeypatch) as emulated:
        packed = lstm_pack(*weights)
        monkeypatch.setenv("SD_PLUGIN_CUDA_RECURRENCE", "persistent")
        emulated.multiprocessors = 0
        with pytest.raises(BackendError, match="SD_PLUGIN_CUDA_RECURRENCE=persistent: the layer does not fit this GPU"):
            lstm_forward(packed, x, (zeros, zeros), LSTMCall(recurrent=kept))
        monkeypatch.setenv("SD_PLUGIN_CUDA_RECURRENCE", "auto")
        # Where nothing fits, layers go step by step.
        assert lstm_forward(packed, x, (zeros, zeros), LSTMCall(recurrent=kept)).saved.tile is None
        monkeypatch.setenv("SD_PLUGIN_CUDA_RECURRENCE", "sideways")
        with pytest.raises(BackendError, match="SD_PLUGIN_CUDA_RECURRENCE=sideways is not valid; valid: auto, persis"):
            lstm_forward(packed, x, (zeros, zeros), LSTMCall(recurrent=kept))


@pytest.mark.parametrize(
    ("hidden", "batch", "count"),
    [(650, 20, 325), (650, 20, 650), (1500, 20, 525), (1500, 20, 1500), (1150, 20, 575), (512, 64, 358), (100, 10, 50)],
)
@pytest.mark.parametrize("precision", Precision)
def test_the_paper_s_layers_are_persistent_on_an_h100(
    precision: Precision, hidden: int, batch: int, count: int
) -> None:
    tile = tiling.choose(precision, hidden, batch, count, count < hidden, H100)
    assert tile is not None
    assert tile.fits(hidden, batch, count, count < hidden, H100)
    blocks = tile.parts(hidden) * tile.slices(batch)
    assert 20 <= blocks <= 132, "neither more blocks than run at once nor few of them"


@pytest.mark.parametrize(("hidden", "count"), [(1150, 575), (1500, 525), (1500, 1500)])
@pytest.mark.parametrize("precision", Precision)
def test_less_shared_memory_has_room_for_them_too(precision: Precision, hidden: int, count: int) -> None:
    a100 = Properties("A100", 108, 166912, (8, 0))
    assert tiling.choose(precision, hidden, 20, count, count < hidden, a100) is not None


def test_rows_of_layouts_tell_where_steps_lie() -> None:
    from sd_plugin.kernels.cuda.rows import rows_of

    x = torch.zeros(7, 3)
    packed = rows_of(x, Steps.packed([4, 2, 1]))
    assert (packed.first.tolist(), packed.active.tolist(), packed.stride) == ([0, 4, 6], [4, 2, 1], 1)
    x = torch.zeros(2, 5, 3)
    major, first = rows_of(x, Steps(0)), rows_of(x, Steps(1))
    assert (major.first.tolist(), major.active.tolist(), major.stride) == ([0, 5], [5, 5], 1)
    assert (first.first.tolist(), first.active.tolist(), first.stride) == ([0, 1, 2, 3, 4], [2] * 5, 5)
