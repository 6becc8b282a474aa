"""Kept units drawn from noise, against what the noise says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_plugin.kernels import Kept, kept_lists

from .cases import noise_of

SIZES = st.sampled_from([1, 2, 7, 31, 32, 33, 255, 256, 257, 300, 650])


@given(steps=st.integers(0, 3), size=SIZES, share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_exact_sampling_keeps_those_with_the_most_noise(
    backend: str, device: str, steps: int, size: int, share: float, seed: int
) -> None:
    noise, count = noise_of(seed, steps, size).float(), round(share * size)
    indices, factors = kept_lists(noise.to(device), count, 0.5, 1.75)
    expected = noise.sort(1, descending=True).indices[:, :count].sort(1).values.int()
    assert indices.dtype == torch.int32
    assert torch.equal(indices.cpu(), expected)
    if factors is not None:
        assert torch.equal(factors.cpu(), Kept(expected, size, 1.75).multiplier(torch.float32))


@given(steps=st.integers(0, 3), size=SIZES, p=st.floats(0, 0.99), seed=st.integers(0, 10**6))
def test_bernoulli_sampling_keeps_those_of_at_least_p(
    backend: str, device: str, steps: int, size: int, p: float, seed: int
) -> None:
    # Halves of what they were and more: some are p itself.
    noise = noise_of(seed, steps, size).float()
    noise[:, ::3] = p
    indices, factors = kept_lists(noise.to(device), None, p, 1.75)
    keep = noise >= torch.tensor(p, dtype=torch.float32)
    assert torch.equal(Kept(indices.cpu(), size, padded=True).mask(), keep)
    assert torch.equal(indices.sort(1).values, indices)
    if factors is not None:
        assert torch.equal(factors.cpu(), keep * 1.75)


@given(size=SIZES, levels=st.integers(1, 4), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_equal_noise_still_keeps_that_many(
    backend: str, device: str, size: int, levels: int, share: float, seed: int
) -> None:
    noise, count = (noise_of(seed, 2, size) * levels).floor().float() / levels, round(share * size)
    indices, _ = kept_lists(noise.to(device), count, 0.5, 1.0)
    kept = Kept(indices.cpu(), size).mask()
    assert kept.sum(1).tolist() == [count, count]
    # Nothing that was dropped has more than anything that was kept.
    least = noise.masked_fill(~kept, 2).amin(1, keepdim=True)
    assert bool((noise.masked_fill(kept, -1) <= least).all())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="need noise"):
        kept_lists(torch.rand(2, 3), 4, 0.5, 1.0)
    with pytest.raises(ValueError, match="need noise"):
        kept_lists(torch.rand(3), 2, 0.5, 1.0)
