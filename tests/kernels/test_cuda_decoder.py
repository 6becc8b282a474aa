"""The CUDA decoder, emulated on the CPU: what the tests of every backend's decoder leave out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sd_plugin.kernels import (
    BackendError,
    DecoderGradients,
    DecoderInputs,
    DecoderPatterns,
    DecoderResult,
    DecoderResultGradients,
    DecoderWeights,
    Kept,
    decoder_backward,
    decoder_forward,
    gemm_pack,
    lstm_pack,
)
from sd_plugin.kernels.cuda import choices
from sd_plugin.kernels.cuda.precision import Precision

from .. import truth
from ..emulation.emulator import EmulatedDriver
from ..tolerances import assert_close
from .cases import noise_of, rounded, strided, tensor_of
from .conftest import emulated_cuda
from .test_decoder_kernels import exact, fed_back

pytestmark = pytest.mark.skipif(EmulatedDriver().reason_unavailable() is not None, reason="no C++ compiler")

PRECISIONS = pytest.mark.parametrize("precision", list(Precision), ids=lambda precision: precision.name)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDriver]:
    """The backend is forced, and runs on CPU tensors."""
    with emulated_cuda(monkeypatch) as found:
        monkeypatch.setenv("SD_PLUGIN_BACKEND", "cuda")
        yield found


@dataclass(frozen=True)
class Case:
    """A call of both passes. Dropout is at random where ``masks``, and structured elsewhere; None: nothing dropped."""

    precision: Precision = Precision.STRICT
    layers: int = 2
    count: int = 3
    batch: int = 3
    embed: int = 5
    hidden: int = 8
    source: int = 6
    lengths: tuple[int, ...] | None = None
    general: bool = True
    dropped: bool = True
    masks: bool = False
    with_align: bool = True
    time_dim: int = 1
    bias: bool = True

    @property
    def names(self) -> dict[str, int]:
        """Where units are dropped, and of how many."""
        hidden = {f"between_{layer}": self.hidden for layer in range(self.layers - 1)}
        hidden |= {f"recurrent_{layer}": self.hidden for layer in range(self.layers)}
        return {"embedding": self.embed, "query": self.hidden, "output": self.hidden, **hidden}

    @property
    def terms(self) -> int:
        """Of the longest sum."""
        return self.embed + 4 * self.hidden + self.source

    @property
    def depth(self) -> int:
        """Cells, scores, context and output, one after the other at every step of either pass."""
        return 2 * (self.layers + 3) * (self.count + 1)

    def spans(self) -> list[int]:
        """Source lengths; some are shorter than the source."""
        return list(self.lengths or (max(1, self.source - b) for b in range(self.batch)))

    def kept(self) -> dict[str, Any]:
        """A pattern of every name."""
        found: dict[str, Any] = dict.fromkeys(self.names)
        for seed, (name, size) in enumerate(self.names.items() if self.dropped else ()):
            noise = noise_of(seed, self.count, size)
            if self.masks and name != "embedding":
                found[name] = (noise_of(seed, self.count, self.batch, size) < 0.6).float() / 0.6
            elif seed % 2:
                # As many as there are.
                width = max(1, size * 2 // 3)
                found[name] = Kept(noise.argsort(1)[:, :width].sort(1).values.int(), size, size / width)
            else:
                units = torch.where(noise < 0.6, torch.arange(size), size).sort(1).values.int()
                found[name] = Kept(units, size, 1 / 0.6, True)
        if found["embedding"] is not None:
            found["embedding"] = found["embedding"].unscaled()
        return found

    def patterns(self, kept: dict[str, Any]) -> DecoderPatterns:
        """As the decoder takes them."""
        return DecoderPatterns(
            kept["embedding"], fed_back(kept["output"], self.hidden) if self.count else None,
            tuple(kept[f"between_{layer}"] for layer in range(self.layers - 1)),
            tuple(kept[f"recurrent_{layer}"] for layer in range(self.layers)), kept["query"], kept["output"],
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """Operands and gradients of the results, activations ``[T, B, K]``."""
        hidden, of_output = self.hidden, (self.count, self.batch, self.hidden)
        of_state = (self.layers, self.batch, hidden)
        shapes: dict[str, tuple[int, ...]] = {
            "emb": (self.count, self.batch, self.embed), "memory": (self.batch, self.source, hidden), "h0": of_state,
            "c0": of_state, "feed": (self.batch, hidden), "w_in": (hidden, hidden), "w_out": (hidden, 2 * hidden),
            "dy": of_output, "dh_n": of_state, "dc_n": of_state, "dalign": (self.count, self.batch, self.source),
        }  # fmt: skip
        for layer in range(self.layers):
            inputs = hidden if layer else self.embed + hidden
            shapes |= {f"weight_ih_{layer}": (4 * hidden, inputs), f"weight_hh_{layer}": (4 * hidden, hidden)}
            shapes |= {f"bias_ih_{layer}": (4 * hidden,), f"bias_hh_{layer}": (4 * hidden,)}
        found = {}
        for seed, (name, shape) in enumerate(shapes.items()):
            weight = name.startswith(("w", "b"))
            size = 0.7 * min(1.0, (8 / hidden) ** 0.5) if weight else 0.5
            found[name] = (tensor_of(seed, *shape) * size).to(self.precision.dtype)
            if name.startswith("bias") and not self.bias:
                found[name].zero_()
        return found


@dataclass
class Run:
    """A case with what both passes gave."""

    result: DecoderResult
    gradients: DecoderGradients

    def named(self) -> dict[str, Tensor]:
        """Everything that they gave, activations ``[T, B, K]``."""
        got, grads = self.result, self.gradients
        found = {
            "y": got.y.transpose(0, 1), "h_n": got.h_n, "c_n": got.c_n, "align": got.align,
            "demb": grads.emb.transpose(0, 1), "dmemory": grads.memory, "dh0": grads.h0, "dc0": grads.c0,
            "dfeed": grads.feed0,
        }  # fmt: skip
        for layer, cell in enumerate(grads.cells):
            found |= dict(zip((f"dweight_ih_{layer}", f"dweight_hh_{layer}", f"dbias_ih_{layer}"), cell, strict=True))
        found |= {} if grads.query is None else {"dw_in": grads.query}
        return found | ({} if grads.join is None else {"dw_out": grads.join})


def run(
    case: Case,
    tensors: dict[str, Tensor] | None = None,
    patterns: DecoderPatterns | None = None,
    weights_wanted: bool = True,
    lengths: list[int] | None = None,
) -> Run:
    """Both passes of the backend, on the case's tensors and patterns where there are no others."""
    low = case.tensors() if tensors is None else tensors
    patterns = case.patterns(case.kept()) if patterns is None else patterns
    flags, allowed = torch.backends.cudnn, torch.backends.cudnn.allow_tf32
    flags.allow_tf32 = case.precision is Precision.TF32
    try:
        cells = []
        for layer in range(case.layers):
            biases = (low[f"bias_ih_{layer}"], low[f"bias_hh_{layer}"]) if case.bias else ()
            cells.append(lstm_pack(low[f"weight_ih_{layer}"], low[f"weight_hh_{layer}"], *biases))
    finally:
        flags.allow_tf32 = allowed
    query = gemm_pack(low["w_in"].t()) if case.general else None
    weights = DecoderWeights(tuple(cells), query, gemm_pack(low["w_out"].t()))
    emb, dy = low["emb"].transpose(0, 1), low["dy"].transpose(0, 1)
    if case.time_dim:
        emb, dy = emb.contiguous(), dy.contiguous()
    spans = torch.tensor(case.spans() if lengths is None else lengths, dtype=torch.int32)
    inputs = DecoderInputs(emb, low["memory"], spans, low["h0"], low["c0"], low["feed"])
    result = decoder_forward(weights, inputs, patterns)
    told = DecoderResultGradients(dy, low["dh_n"], low["dc_n"], low["dalign"] if case.with_align else None)
    return Run(result, decoder_backward(weights, inputs, result.saved, told, patterns, weights_wanted))


def expected_of(case: Case, low: dict[str, Tensor], kept: dict[str, Any]) -> dict[str, Tensor]:
    """What :meth:`Run.named` should be, in float64, by autograd."""
    high = {name: tensor.double().requires_grad_() for name, tensor in low.items()}
    sizes = case.names.items()
    drops = {n: truth.multiplier(kept[n], case.count, case.batch, size, torch.float64) for n, size in sizes}
    y, h_n, c_n, align = exact(high, case.spans(), drops, case.layers, case.general)
    loss = (y * high["dy"]).sum() + (h_n * high["dh_n"]).sum() + (c_n * high["dc_n"]).sum()
    if case.with_align:
        loss = loss + (align * high["dalign"]).sum()
    wanted = [name for name in high if name[0] != "d" and "bias_hh" not in name and (case.general or name != "w_in")]
    grads = torch.autograd.grad(loss, [high[name] for name in wanted], allow_unused=True)
    found = {"y": y, "h_n": h_n, "c_n": c_n, "align": align}
    for name, grad in zip(wanted, grads, strict=True):
        found[f"d{name}"] = torch.zeros_like(high[name]) if grad is None else grad
    return {name: tensor.detach() for name, tensor in found.items()}


def check(case: Case, got: Run, low: dict[str, Tensor], kept: dict[str, Any]) -> None:
    named, expected = got.named(), expected_of(case, low, kept)
    assert named.keys() == expected.keys()
    for name, value in expected.items():
        assert named[name].dtype == case.precision.dtype
        assert_close(
            named[name], value, case.terms, case.depth, operands=rounded(case.precision), exact=True, name=name
        )


@PRECISIONS
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(layers=1, general=False, time_dim=0, with_align=False),
        # Columns of the gates are padded in half types, and nothing is a multiple of what a thread loads.
        Case(layers=3, hidden=7, masks=True, bias=False),
        # More columns than threads and more rows than blocks of a cell; sums of several groups of threads.
        Case(layers=1, count=2, hidden=72, source=11, batch=5),
        Case(layers=1, count=2, hidden=5, source=70, batch=2, embed=3, general=False),
        Case(dropped=False, time_dim=0),
        Case(count=1, batch=1, source=1, masks=True),
    ],
    ids=["both", "dot", "tails", "wide", "long", "dense", "least"],
)
def test_forward_and_backward(emulated: EmulatedDriver, precision: Precision, case: Case) -> None:
    case = replace(case, precision=precision)
    low, kept = case.tensors(), case.kept()
    check(case, run(case, low, case.patterns(kept)), low, kept)


def test_many_units(emulated: EmulatedDriver) -> None:
    """A thread of the attention has several columns."""
    case = Case(layers=1, count=1, batch=1, hidden=518, source=3)
    low, kept = case.tensors(), case.kept()
    check(case, run(case, low, case.patterns(kept)), low, kept)


@pytest.mark.parametrize("time_dim", [0, 1])
def test_no_steps(emulated: EmulatedDriver, time_dim: int) -> None:
    case = Case(count=0, time_dim=time_dim)
    low, kept = case.tensors(), case.kept()
    for patterns in (case.patterns(kept), case.patterns(dict.fromkeys(kept))):
        got = run(case, low, patterns).named()
        for name, same in (("h_n", "h0"), ("c_n", "c0"), ("dh0", "dh_n"), ("dc0", "dc_n")):
            assert torch.equal(got.pop(name), low[same])
        assert got["y"].shape == (0, case.batch, case.hidden)
        assert not any(bool(tensor.any()) for tensor in got.values())


def test_no_source_position_is_no_context(emulated: EmulatedDriver) -> None:
    """As if the memory were zeros, but for the attention itself, and for gradients of the memory: there are none."""
    case = Case(general=False, with_align=False, lengths=(6, 1, 4))
    low = case.tensors()
    low["memory"][1] = 0
    one, nothing = run(case, low).named(), run(case, low, lengths=[6, 0, 4]).named()
    assert not nothing["align"][:, 1].any()
    assert not nothing["dmemory"][1].any()
    for name in one.keys() - {"align", "dmemory"}:
        assert torch.equal(one[name], nothing[name]), name


@pytest.mark.parametrize("products", ["skip", "dense"])
def test_what_is_dropped_is_not_read(emulated: EmulatedDriver, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choices.PRODUCTS, products)
    case = Case(time_dim=0)
    kept = case.kept()
    patterns = case.patterns(kept)
    assert patterns.feed is not None
    # Fewer units of the initial feed than there are, and of every later one.
    patterns = replace(patterns, feed=Kept(torch.tensor([[1, 5], [0, 5], [5, 8]]).int(), 8, 3.0, True))
    low = case.tensors()
    clean = {name: tensor.clone() for name, tensor in low.items()}
    dropped = truth.multiplier(kept["embedding"], case.count, case.batch, case.embed, torch.float32) == 0
    low["emb"][dropped], clean["emb"][dropped] = float("nan"), 0
    low["feed"][:, [0, 2]], clean["feed"][:, [0, 2, 3, 4, 6, 7]] = float("inf"), 0
    got, same = run(case, low, patterns).named(), run(case, clean, patterns).named()
    for name, value in same.items():
        assert torch.equal(got[name], value), name
    assert not got["demb"][dropped].any()
    assert not got["dfeed"][:, [0, 2, 3, 4, 6, 7]].any()
    assert bool(got["dfeed"][:, [1, 5]].all())


def test_pattern_of_the_feed_applies_at_every_step(emulated: EmulatedDriver) -> None:
    """The same as an output dropped like that, but for the output itself."""
    case = Case(layers=1, batch=2)
    nothing, low = dict.fromkeys(case.kept()), case.tensors()
    kept = Kept(torch.tensor([[1, 6, 8, 8], [0, 2, 3, 7], [0, 1, 2, 3]]).int(), 8, 1.0, True)
    feed = fed_back(kept, 8)
    low["dy"] *= kept.multiplier(torch.float32).unsqueeze(1)
    got = run(case, low, replace(case.patterns(nothing), feed=feed)).named()
    same = run(case, low, case.patterns({**nothing, "output": kept})).named()
    assert bool(got.pop("y").all())
    assert not same.pop("y").all()
    for name, value in same.items():
        assert_close(got[name], value, case.terms, case.depth, name=name)


def test_operands_of_any_strides(emulated: EmulatedDriver) -> None:
    case = Case(general=False)
    low = case.tensors()
    same = run(case, low).named()
    for kind in ("gaps", "transposed"):
        got = run(case, {name: strided(tensor, kind) for name, tensor in low.items()}).named()
        for name, value in same.items():
            assert_close(got[name], value, case.terms, case.depth, name=name)
    # Rows that do not begin at multiples of 16 bytes.
    memory = low["memory"]
    shifted = torch.cat([memory.new_zeros(1), memory.flatten(), memory.new_zeros(3)])[1:-3].view(memory.shape)
    for name, value in run(case, {**low, "memory": shifted}).named().items():
        assert_close(value, same[name], case.terms, case.depth, name=name)


def test_multipliers_of_other_dtypes_and_lists_of_other_strides(emulated: EmulatedDriver) -> None:
    case = Case(masks=True)
    kept, low = case.kept(), case.tensors()
    other = {name: mask.double() if isinstance(mask, Tensor) else mask for name, mask in kept.items()}
    every = kept["embedding"]
    other["embedding"] = replace(every, indices=strided(every.indices.float(), "transposed").int())
    check(case, run(case, low, case.patterns(other)), low, kept)


@PRECISIONS
def test_the_same_bits_at_every_run_and_no_races(emulated: EmulatedDriver, precision: Precision) -> None:
    emulated.races = True
    case = Case(precision, layers=1, count=2, hidden=40)
    one = run(case).named()
    emulated.seed = 7
    for name, value in run(case).named().items():
        assert torch.equal(one[name], value), name


@pytest.mark.parametrize("layers", [1, 3])
def test_launches_of_a_step(emulated: EmulatedDriver, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel and a product for each layer and for the attention, in each direction."""
    products = []
    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given, **named: (products.append(1), plain(*given, **named))[1])
    counts = []
    for count in (2, 3):
        before = emulated.launches, len(products)
        run(Case(layers=layers, count=count))
        counts.append((emulated.launches - before[0], len(products) - before[1]))
    assert tuple(b - a for a, b in zip(*counts, strict=True)) == (2 * (layers + 1), 2 * (layers + 1))


def test_gradients_of_weights_only_where_wanted(emulated: EmulatedDriver) -> None:
    case = Case()
    every, some = run(case), run(case, weights_wanted=False)
    assert (some.gradients.cells, some.gradients.query, some.gradients.join) == ((), None, None)
    for name, value in some.named().items():
        assert torch.equal(every.named()[name], value)


def test_results_are_not_what_is_kept_for_the_backward_pass(emulated: EmulatedDriver) -> None:
    result = run(Case(dropped=False)).result
    kept = {tensor.untyped_storage().data_ptr() for tensor in result.saved if isinstance(tensor, Tensor)}
    assert kept.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in (result.y, result.h_n, result.c_n))


def test_a_source_that_does_not_fit(emulated: EmulatedDriver) -> None:
    emulated.shared_memory = 99 * 1024
    run(Case(layers=1, count=1, batch=1, source=5000, hidden=4, general=False))
    with pytest.raises(BackendError, match="no attention over 20000 positions of 4 units"):
        run(Case(layers=1, count=1, batch=1, source=20000, hidden=4, general=False))


def test_gradients_of_operands_are_not_recorded(emulated: EmulatedDriver) -> None:
    case = Case()
    low = case.tensors()
    got = run(case, {name: tensor.requires_grad_() for name, tensor in low.items()})
    assert not any(tensor.requires_grad for tensor in got.named().values())
