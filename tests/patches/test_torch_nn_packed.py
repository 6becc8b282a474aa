"""Dropout of a packed sequence's data, which is 2-D: its time steps are those of the packed sequence."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import sd_plugin
from sd_plugin import hints, stats
from sd_plugin.patches.torch_nn._packed import rows

pytestmark = pytest.mark.usefixtures("unpatched")

K = 16


def pack(lengths: list[int], width: int = K) -> PackedSequence:
    padded = torch.randn(max(lengths), len(lengths), width)
    return pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False)


def by_step(packed: PackedSequence, data: Tensor) -> list[Tensor]:
    return list(data.split(packed.batch_sizes.tolist()))


class Highway(nn.Module):
    """As stanza has it: layers of one LSTM each, around each a gated shortcut, dropout between them in place."""

    def __init__(self, layers: int, p: float) -> None:
        super().__init__()
        self.lstm = nn.ModuleList(nn.LSTM(K, K // 2, bidirectional=True) for _ in range(layers))
        self.highway = nn.ModuleList(nn.Linear(K, K) for _ in range(layers))
        self.gate = nn.ModuleList(nn.Linear(K, K) for _ in range(layers))
        self.drop = nn.Dropout(p, inplace=True)

    def forward(self, input: PackedSequence) -> PackedSequence:
        for layer, lstm in enumerate(self.lstm):
            if layer > 0:
                input = PackedSequence(self.drop(input.data), *input[1:])
            h, _ = lstm(input)
            shortcut = torch.sigmoid(self.gate[layer](input.data)) * self.highway[layer](input.data)
            input = PackedSequence(h.data + shortcut, *input[1:])
        return input


@pytest.mark.parametrize("mode", ["nr_st", "nr_rh_st"])
def test_a_highway_lstm_skips_everywhere(mode: str) -> None:
    sd_plugin.enable("torch_nn", mode=mode)
    model, packed = Highway(3, 0.25), pack([5, 2, 4])
    model(packed).data.square().sum().backward()
    recurrent = {f"lstm 16x8.l0{end}.recurrent" for end in ("", "_reverse")} if mode == "nr_rh_st" else set()
    assert set(stats.sites()) == {"dropout 16", *recurrent}
    dropout = stats.sites()["dropout 16"]
    assert (dropout.drawn, dropout.used, dropout.units, dropout.dropped) == (2, 2, 2 * 5 * 16, 2 * 5 * 4)
    # Of each layer but the first: both directions' gates, gate and highway; forward, input's and weights' gradient.
    assert dropout.dense == 2 * 3 * 11 * 16 * (2 * 4 * 8 + 2 * 16)
    assert dropout.skipped == dropout.dense // 4
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_highway_lstm_computes_what_torch_does_with_what_was_dropped() -> None:
    model, packed = Highway(2, 0.5), pack([5, 2, 4])
    dropped: list[Tensor] = []
    model.drop.register_forward_hook(lambda module, x, y: dropped.append((y != 0).detach()))
    sd_plugin.enable("torch_nn", mode="nr_st")
    found = model(packed).data
    gradients = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    sd_plugin.disable("torch_nn")
    model.drop = type("Same", (nn.Module,), {"forward": lambda self, x: x * dropped[0] * 2})()
    expected = model(packed).data
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-4)


@pytest.fixture
def patched(unpatched: None) -> None:
    """Once for all examples."""
    sd_plugin.enable("torch_nn")


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), p=st.floats(0.05, 0.95), inplace=st.booleans())
def test_units_are_dropped_for_all_rows_of_a_step(patched: None, lengths: list[int], p: float, inplace: bool) -> None:
    lstm, packed = nn.LSTM(K, 3), pack(lengths)
    data = packed.data
    data.fill_(1.0)
    y = nn.Dropout(p, inplace)(data)
    assert (y is data) is inplace
    kept = max(1, round((1 - p) * K))
    for step in by_step(packed, y):
        assert torch.equal(step, step[:1].expand_as(step))
        assert int((step[0] != 0).sum()) == kept
    assert hints.lookup(y) is not None
    del lstm


@pytest.mark.parametrize(
    "make",
    [
        lambda packed: packed,
        lambda packed: PackedSequence(packed.data * 2, packed.batch_sizes),
        lambda packed: pack_sequence([torch.ones(5, K), torch.ones(2, K)]),
        lambda packed: nn.LSTM(K, K)(packed)[0],
        lambda packed: nn.GRU(K, K)(packed)[0],
        lambda packed: packed.to(torch.float64),
        lambda packed: pickle.loads(pickle.dumps(packed)),
    ],
    ids=["packed", "made by hand", "pack_sequence", "LSTM", "GRU", "converted", "unpickled"],
)
def test_packed_sequences_are_known_however_they_came_about(make: Any) -> None:
    sd_plugin.enable("torch_nn", mode="nr_st")
    lstm, packed = nn.LSTM(K, 3), make(pack([5, 2, 4]))
    assert type(packed) is PackedSequence
    assert hints.lookup(nn.Dropout(0.5)(packed.data)) is not None
    del lstm


@pytest.mark.parametrize(
    "make",
    [
        lambda packed: packed.data.clone(),
        lambda packed: packed.data.relu(),
        lambda packed: pad_packed_sequence(packed)[0][0],
        lambda packed: PackedSequence(packed.data, torch.tensor([1, 2, 3])).data,
        lambda packed: PackedSequence(packed.data, torch.tensor([3, 3])).data,
        lambda packed: pack([3, 2], 7).data,
    ],
    ids=["copy", "result", "padded", "increasing", "too few", "other width"],
)
def test_other_2d_activations_are_torchs_own(make: Any) -> None:
    sd_plugin.enable("torch_nn")
    lstm, data = nn.LSTM(K, 3), make(pack([5, 2, 4]))
    torch.manual_seed(1)
    found = nn.Dropout(0.5)(data)
    sd_plugin.disable("torch_nn")
    torch.manual_seed(1)
    assert torch.equal(found, nn.Dropout(0.5)(data))
    assert not stats.sites()
    del lstm


def test_no_packed_sequence_is_kept_alive() -> None:
    sd_plugin.enable("torch_nn")
    gc.collect()
    for _ in range(50):
        packed, _ = nn.LSTM(K, K)(pack([5, 2, 4]))
        packed.data.sum().backward()
    del packed
    gc.collect()
    assert not rows._known


def test_nothing_is_stored_in_a_packed_sequence() -> None:
    sd_plugin.enable("torch_nn")
    packed = pack([5, 2, 4])
    assert not packed.data.__dict__
    assert b"sd_plugin" not in pickle.dumps(packed)
    assert type(packed) is PackedSequence and packed.is_cuda is False
    sd_plugin.disable("torch_nn")
    assert "sd_plugin" not in vars(PackedSequence)["__new__"].__func__.__module__
