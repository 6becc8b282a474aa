"""``cuda_resources.py``: what the CUDA backend launches for the paper's layers and sizes, and the least it takes.

The backend runs on tensors without memory, with a driver that only notes what it is told.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sd_plugin.bench import precision as bench_precision
from sd_plugin.kernels import (
    DecoderInputs,
    DecoderPatterns,
    DecoderResultGradients,
    DecoderWeights,
    Kept,
    LSTMCall,
    LSTMResultGradients,
    PackedMatrix,
    PackedWeights,
    Steps,
    Wanted,
    cuda,
)
from sd_plugin.kernels.cuda import choices, driver, gemm, loss, lstm, packing, pattern, tiling
from sd_plugin.kernels.cuda import decoder as decoder_kernels
from sd_plugin.kernels.cuda.driver import Properties, Unit
from sd_plugin.kernels.cuda.precision import Precision
from sd_plugin.kernels.cuda.tiling import WARPS, Tile
from sd_plugin.patterns import kept_count

if TYPE_CHECKING:
    from torch import Tensor

H100 = Properties("H100", 132, 232448, (9, 0))
#: GPUs whose largest persistent layers are told: multiprocessors, and bytes of shared memory that a block may use.
DEVICES = (H100, Properties("A100", 108, 166912, (8, 0)), Properties("RTX 4090", 128, 101376, (8, 9)))
BATCHES = (10, 20, 64, 128)
#: Without a list of the paper: those of its columns. bfloat16 takes the registers and bytes of float16, nearly.
PRECISIONS = (Precision.STRICT, Precision.TF32, Precision.F16)
NAMES = {Precision.STRICT: "float32", Precision.TF32: "TF32", Precision.F16: "float16", Precision.BF16: "bfloat16"}


class Launch(NamedTuple):
    """What a driver is told, without the arguments."""

    unit: Unit
    function: str
    grid: int
    threads: int
    shared: int  #: bytes


class Recorder:
    """A driver that launches nothing, on tensors without memory."""

    device_type = "meta"

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def reason_unavailable(self) -> str | None:
        """Never."""
        return None

    def properties(self, device: torch.device) -> Properties:
        """Those of an H100."""
        return H100

    def launch(
        self, unit: Unit, function: str, device: torch.device, grid: int, threads: int, shared: int, *_: Any
    ) -> None:
        """Note it."""
        self.launches.append(Launch(unit, function, grid, threads, shared))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def recorded(run: Callable[[], object], precision: Precision) -> dict[str, Launch]:
    """The launches of ``run``, by function: the last of each; products skip."""
    allowed = precision is Precision.TF32
    ways = {choices.RECURRENCE: "auto", choices.PRODUCTS: "skip"}
    with driver.use(Recorder()) as made, bench_precision.tf32(cudnn=allowed, matmul=allowed), _environment(**ways):
        run()
    return {launch.function: launch for launch in made.launches}


def _empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _kept(steps: int, size: int, p: float) -> Kept:
    return Kept(_empty(steps, kept_count(size, p), dtype=torch.int32), size, 2.0)


# ---- LSTM layers -----------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer of the paper.

    Attributes:
        stack: the shape of ``scripts/gpu_check_machine.py`` that it is timed in.
        alone: all layers of that stack are like this one.
    """

    name: str
    hidden: int
    batch: int
    p: float
    stack: str
    alone: bool = True


LAYERS = (
    Layer("Zaremba medium", 650, 20, 0.5, "zaremba-medium"),
    Layer("Zaremba large", 1500, 20, 0.65, "zaremba-large"),
    Layer("AWD-LSTM", 1150, 20, 0.5, "awd-lstm", alone=False),
    Layer("AWD-LSTM, last", 400, 20, 0.5, "awd-lstm", alone=False),
    Layer("OpenNMT", 512, 64, 0.3, "opennmt"),
    Layer("NER", 100, 10, 0.5, "ner"),
)
#: What scripts/gpu_check.py calls a precision.
MEASURED_AS = {Precision.STRICT: "fp32", Precision.TF32: "tf32", Precision.F16: "fp16"}

#: Of an H100, estimated: microseconds of a barrier of all blocks; bytes a microsecond of memory, of the L2 cache.
BARRIER = 1.2
MEMORY_RATE, L2_RATE = 3.35e6, 5.5e6
#: Of one multiprocessor, each microsecond: bytes of shared memory, 128 a cycle; multiply-adds. The choice of a tile
#: uses them too, but for float32, of which it expects half: a floor is what all 128 lanes do in the same cycles.
SHARED_RATE = tiling._SHARED_BYTES
MULTIPLY_ADDS = {**tiling._MULTIPLY_ADDS, Precision.STRICT: SHARED_RATE}


class Work(NamedTuple):
    """Of a time step of a layer's pass, or of another kernel's launch.

    Attributes:
        flops: two for each multiply-add that is asked for; zero where they do not matter.
        l2: bytes that multiprocessors exchange through the L2 cache, or read again from it.
        memory: bytes that have to come from memory or go there, at least once.
        floor: microseconds that it takes at least; estimated.
    """

    flops: int
    l2: int
    memory: int
    floor: float


def _rounded_up(count: int, to: int) -> int:
    return -(-count // to) * to


def forward_work(tile: Tile, hidden: int, batch: int, kept: int) -> Work:
    """Of a time step of ``lstm_forward``.

    After the barrier every block reads the kept rows of ``h`` of its slice from L2 and multiplies them by its columns
    of the weight, which it reads from shared memory: the longest of the three. Rows of a weight that does not stay come
    from L2, too, but may be asked for before the barrier; what goes to memory and comes from it takes its own time.
    """
    size, slices = tile.precision.dtype.itemsize, tile.slices(batch)
    blocks, own = tile.parts(hidden) * slices, 4 * tile.units
    exchanged = blocks * kept * tile.batch * size
    streamed = 0 if tile.resident else slices * kept * 4 * hidden * size
    visited = _rounded_up(kept, WARPS * tile.depth)
    block = max(visited * own * tile.batch / MULTIPLY_ADDS[tile.precision], kept * own * size / SHARED_RATE)
    # The input's product, y, the operand of the weight gradient; gates and cells for the backward pass.
    memory = batch * hidden * (16 + 2 * size + 16) + slices * tile.batch * hidden * 4
    after = BARRIER + max(exchanged / slices / L2_RATE, block)
    floor = max(after, (exchanged + streamed) / L2_RATE, memory / MEMORY_RATE)
    return Work(2 * kept * 4 * hidden * batch, exchanged + streamed, memory, floor)


def backward_work(tile: Tile, hidden: int, batch: int, kept: int) -> Work:
    """Of a time step of ``lstm_backward``.

    Every block multiplies and writes its share of ``dh`` for all kept units; after the barrier it reads all shares for
    its own.
    """
    size, slices = tile.precision.dtype.itemsize, tile.slices(batch)
    blocks, own = tile.parts(hidden) * slices, 4 * tile.units
    shares = blocks * kept * tile.batch * 4
    streamed = 0 if tile.resident else slices * kept * 4 * hidden * size
    visited = _rounded_up(kept, WARPS * 16)
    block = max(visited * own * tile.batch / MULTIPLY_ADDS[tile.precision], kept * own * size / SHARED_RATE)
    # Gates and cells, dy, and the gradients of the gates.
    memory = batch * hidden * (16 + 4 + size + 4 * size)
    after = BARRIER + max(shares / slices / L2_RATE, block) + shares / slices / L2_RATE
    floor = max(after, (2 * shares + streamed) / L2_RATE, memory / MEMORY_RATE)
    return Work(2 * kept * 4 * hidden * batch, 2 * shares + streamed, memory, floor)


def broadcast_bytes(tile: Tile, hidden: int, batch: int) -> int:
    """Bytes through L2 of a step's backward pass if gradients of gates were sent instead: written once, read by all."""
    size = tile.precision.dtype.itemsize
    return tile.slices(batch) * (tile.parts(hidden) + 1) * 4 * hidden * tile.batch * size


def layer_launches(layer: Layer, precision: Precision, skipping: bool) -> dict[str, Launch]:
    """What a layer launches, forward and backward."""
    steps, batch, hidden, dtype = 2, layer.batch, layer.hidden, precision.dtype

    def run() -> None:
        weights = [_empty(4 * hidden, hidden, dtype=dtype) for _ in range(2)]
        biases = [_empty(4 * hidden, dtype=dtype) for _ in range(2)]
        packed = lstm.lstm_pack(*weights, *biases)
        x, state = _empty(steps, batch, hidden, dtype=dtype), _empty(batch, hidden, dtype=dtype)
        call = LSTMCall(recurrent=_kept(steps, hidden, layer.p) if skipping else None)
        y, *_, saved = lstm.lstm_forward(packed, x, (state, state), call)
        lstm.lstm_backward(packed, x, saved, LSTMResultGradients(y, state, state), call, Wanted())

    return recorded(run, precision)


def layers() -> list[dict[str, Any]]:
    """Every layer in every precision, dense and skipping: its tile, launches and work."""
    told = []
    for layer in LAYERS:
        for precision in PRECISIONS:
            for skipping in (False, True):
                kept = kept_count(layer.hidden, layer.p) if skipping else layer.hidden
                tile = tiling.choose(precision, layer.hidden, layer.batch, kept, skipping, H100)
                entry: dict[str, Any] = {**layer._asdict(), "precision": precision.name, "kept": kept}
                entry |= {"skipping": skipping, "persistent": tile is not None}
                if tile is not None:
                    found = layer_launches(layer, precision, skipping)
                    entry |= {"units": tile.units, "rows": tile.batch, "resident": tile.resident}
                    entry |= {"h_stages": tile.h_stages, "w_stages": tile.w_stages}
                    entry |= {"parts": tile.parts(layer.hidden), "slices": tile.slices(layer.batch)}
                    entry["broadcast"] = broadcast_bytes(tile, layer.hidden, layer.batch)
                    for way, work in (("forward", forward_work), ("backward", backward_work)):
                        launch = found[f"lstm_{way}"]
                        assert launch.unit == tile.unit()
                        entry[way] = described(launch, work(tile, layer.hidden, layer.batch, kept))
                told.append(entry)
    return told


def described(launch: Launch, work: Work) -> dict[str, Any]:
    """For the file."""
    sizes = {"grid": launch.grid, "threads": launch.threads, "shared": launch.shared}
    return {"unit": unit_key(launch.unit), **sizes, **work._asdict(), "floor": round(work.floor, 3)}


def unit_key(unit: Unit) -> str:
    return " ".join([unit.source, *(f"{name}={value}" for name, value in unit.defines)])


def unit_of(key: str) -> Unit:
    source, *defines = key.split()
    return Unit(source, tuple((name, int(value)) for name, _, value in (define.partition("=") for define in defines)))


# ---- the other kernels -----------------------------------------------------------------------------------------------

#: Of the products, packing and patterns: time steps, batch, units, outputs and dropout of Zaremba medium.
COUNT, BATCH, UNITS, OUTPUTS, P = 35, 20, 650, 2600, 0.5
PRODUCT_STACK = "zaremba-medium"
#: Of the loss: its rows, and its vocabulary.
ROWS, WORDS = 700, 10_000
#: Of the decoder: batch, source positions, units.
DECODER = (64, 25, 512)


def _floor(precision: Precision, flops: float, l2: float, memory: float) -> float:
    rate = 2 * MULTIPLY_ADDS[precision] * H100.multiprocessors
    return max(flops / rate, l2 / L2_RATE, memory / MEMORY_RATE)


def _work(precision: Precision, flops: int = 0, l2: int = 0, memory: int = 0) -> Work:
    return Work(flops, l2, memory, _floor(precision, flops, l2, memory))


def product_works(precision: Precision, launches: Mapping[str, Launch]) -> dict[str, Work]:
    """Of the products: a block reads its own rows of the weight and of the activations, other blocks the same again."""
    size, kept = precision.dtype.itemsize, kept_count(UNITS, P)
    rows, row_tiles = COUNT * BATCH, -(-BATCH // (8 * dict(launches["gemm_fp"].unit.defines)["SD_TILES"]))
    # Of one operand each: rows of the weight that steps keep, the weight, kept columns of x, all of dx, dy.
    of_steps, weight = COUNT * row_tiles * kept * OUTPUTS * size, UNITS * OUTPUTS * size
    x, dx, dy = rows * kept * size, rows * UNITS * size, rows * OUTPUTS * size
    flops = 2 * rows * kept * OUTPUTS
    units, columns = -(-UNITS // gemm._WG_UNITS), -(-OUTPUTS // gemm._WG_COLUMNS)
    return {
        "gemm_fp": _work(precision, flops, of_steps + -(-OUTPUTS // gemm._FP_COLUMNS) * x, weight + x + dy),
        "gemm_bp": _work(precision, flops, of_steps + -(-kept // gemm._BP_UNITS) * dy, weight + dy + dx + x),
        # Whatever the operands are, float32 arithmetic.
        "gemm_wg": _work(Precision.STRICT, flops, units * dy + columns * x, x + dy + weight),
        "keep_units": _work(precision, memory=x + dx),
    }


def product_launches(precision: Precision) -> dict[str, Launch]:
    """Of the three products, and of zeros put in place of what is dropped."""

    def run() -> None:
        x, dy = (_empty(COUNT, BATCH, n, dtype=precision.dtype) for n in (UNITS, OUTPUTS))
        weight, kept = gemm.gemm_pack(_empty(UNITS, OUTPUTS, dtype=precision.dtype)), _kept(COUNT, UNITS, P)
        gemm.gemm_fp(x, weight, kept, Steps(), None)
        gemm.gemm_bp(dy, weight, kept, Steps())
        gemm.gemm_wg(x, dy, kept, Steps())
        with _environment(**{choices.PRODUCTS: "dense"}):
            gemm.gemm_fp(x, weight, kept, Steps(), None)

    return recorded(run, precision)


def cell_launches(precision: Precision) -> dict[str, Launch]:
    """Of a layer that goes step by step."""

    def run() -> None:
        dtype = precision.dtype
        packed = lstm.lstm_pack(_empty(OUTPUTS, UNITS, dtype=dtype), _empty(OUTPUTS, UNITS, dtype=dtype), None, None)
        x, state = _empty(2, BATCH, UNITS, dtype=dtype), _empty(BATCH, UNITS, dtype=dtype)
        call = LSTMCall(recurrent=_kept(2, UNITS, P))
        with _environment(**{choices.RECURRENCE: "steps"}):
            y, *_, saved = lstm.lstm_forward(packed, x, (state, state), call)
            lstm.lstm_backward(packed, x, saved, LSTMResultGradients(y, state, state), call, Wanted())

    return recorded(run, precision)


def cell_works(precision: Precision) -> dict[str, Work]:
    """Of a time step; what the kernels before have written is in the L2 cache."""
    size, elements = precision.dtype.itemsize, BATCH * UNITS
    each = {
        "cell_operand": 4 + size,
        "cell_forward": 16 + 16 + 4 + 8 + size + 16 + 8,
        "cell_backward": 16 + 8 + size + 4 + 8 + 4 * size + 4 * size,
        "cell_receive": 4 + 4,
    }
    return {name: _work(precision, l2=elements * size_of_each) for name, size_of_each in each.items()}


def decoder_launches(precision: Precision) -> dict[str, Launch]:
    """Of a decoder of two layers with general attention."""

    def run() -> None:
        batch, source, hidden = DECODER
        dtype, count = precision.dtype, 2

        def cell(inputs: int) -> PackedWeights:
            weights = (_empty(4 * hidden, n, dtype=dtype) for n in (inputs, hidden))
            biases = (_empty(4 * hidden, dtype=dtype) for _ in range(2))
            data = lstm.lstm_pack(*weights, *biases)
            return PackedWeights(cuda.BACKEND, data, inputs, hidden, dtype, torch.device("meta"))

        def matrix(units: int) -> PackedMatrix:
            data = gemm.gemm_pack(_empty(units, hidden, dtype=dtype))
            return PackedMatrix(cuda.BACKEND, data, (units, hidden), dtype, torch.device("meta"))

        weights = DecoderWeights((cell(2 * hidden), cell(hidden)), matrix(hidden), matrix(2 * hidden))
        emb, memory = (_empty(batch, n, hidden, dtype=dtype) for n in (count, source))
        lengths, state = _empty(batch, dtype=torch.int32), _empty(2, batch, hidden, dtype=dtype)
        kept = _kept(count, hidden, 0.3)
        patterns = DecoderPatterns(kept, kept, (kept,), (kept, kept), kept, kept)
        inputs = DecoderInputs(emb, memory, lengths, state, state, state[0])
        y, h_n, c_n, _, saved = decoder_kernels.decoder_forward(weights, inputs, patterns)
        gradients = DecoderResultGradients(y, h_n, c_n)
        decoder_kernels.decoder_backward(weights, inputs, saved, gradients, patterns, True)

    return recorded(run, precision)


def decoder_works(precision: Precision) -> dict[str, Work]:
    """Of a time step (of a sequence: start and finish); keys and values stay in the L2 cache from step to step."""
    size, (batch, source, hidden) = precision.dtype.itemsize, DECODER
    units, positions = batch * hidden, batch * source
    attended, flops = 2 * positions * hidden * size, 4 * positions * hidden
    of_units = {
        "decoder_start": 2 * size,
        "decoder_finish": 4 + size,
        "decoder_cell_forward": 16 + 16 + 8 + 16 + 2 * size,
        "decoder_cell_backward": 16 + 8 + 4 + 4 + 8 + 4 * size,
    }
    works = {name: _work(precision, l2=units * each) for name, each in of_units.items()}
    of_forward = attended + units * (size + 4 + 3 * size) + positions * size
    of_backward = attended + units * (size + 4 + size + size + 4) + 2 * positions * size
    works["decoder_attend_forward"] = _work(Precision.STRICT, flops, of_forward)
    works["decoder_attend_backward"] = _work(Precision.STRICT, flops, of_backward)
    return works


def loss_launches(precision: Precision) -> dict[str, Launch]:
    """Of cross entropy."""

    def run() -> None:
        logits, target = _empty(ROWS, WORDS, dtype=precision.dtype), _empty(ROWS, dtype=torch.int64)
        of_rows, lse = loss.cross_entropy_forward(logits, target, -100, 0.1)
        loss.cross_entropy_backward(logits, target, -100, 0.1, lse, of_rows)

    return recorded(run, precision)


def loss_works(precision: Precision) -> dict[str, Work]:
    """Every logit is read once, and a gradient written."""
    size = ROWS * WORDS * precision.dtype.itemsize
    passes = {"cross_entropy_forward": size, "cross_entropy_backward": 2 * size}
    return {name: _work(precision, memory=memory) for name, memory in passes.items()}


def pattern_launches(precision: Precision) -> dict[str, Launch]:
    """Drawing and ordering kept units."""

    def run() -> None:
        pattern.kept_lists(_empty(COUNT, UNITS), kept_count(UNITS, P), P, 2.0)
        lstm.recurrent_of(_kept(COUNT, UNITS, P), COUNT, UNITS, precision)

    return recorded(run, precision)


def pattern_works(precision: Precision) -> dict[str, Work]:
    """Each entry is read or written once."""
    lists, units = COUNT * kept_count(UNITS, P) * 4, COUNT * UNITS * 4
    passes = {"kept_lists": units + lists + units, "order_kept": 2 * lists + units}
    return {name: _work(precision, memory=memory) for name, memory in passes.items()}


def packing_launches(precision: Precision) -> dict[str, Launch]:
    """Of a recurrent weight."""
    weight = _empty(OUTPUTS, UNITS, dtype=precision.dtype)
    return recorded(lambda: packing.by_units(weight, precision, groups=4), precision)


def packing_works(precision: Precision) -> dict[str, Work]:
    """Each entry is read and written once."""
    return {"pack_by_units": _work(precision, memory=2 * OUTPUTS * UNITS * precision.dtype.itemsize)}


class Group(NamedTuple):
    """Kernels told of together.

    Attributes:
        shape: of the operands, for the table.
        alike: they are the same whatever the precision.
    """

    shape: str
    launches: Callable[[Precision], dict[str, Launch]]
    works: Callable[[Precision, Mapping[str, Launch]], dict[str, Work]]
    precisions: Sequence[Precision] = PRECISIONS
    alike: bool = False


_OF_DECODER = "{} x {} of source x {}".format(*DECODER)
GROUPS = (
    Group(f"{COUNT} x {BATCH} x {UNITS} -> {OUTPUTS}, p {P}", product_launches, product_works),
    Group(f"{BATCH} x {UNITS}", cell_launches, lambda precision, _: cell_works(precision)),
    Group(_OF_DECODER, decoder_launches, lambda precision, _: decoder_works(precision)),
    Group(
        f"{ROWS} x {WORDS}",
        loss_launches,
        lambda precision, _: loss_works(precision),
        (Precision.STRICT, Precision.F16),
    ),
    Group(
        f"{COUNT} x {UNITS}",
        pattern_launches,
        lambda precision, _: pattern_works(precision),
        PRECISIONS[:1],
        alike=True,
    ),
    Group(f"{OUTPUTS} x {UNITS}", packing_launches, lambda precision, _: packing_works(precision)),
)


def kernels() -> list[dict[str, Any]]:
    """Every kernel but those of LSTM layers, at a typical shape: its launch and work."""
    told = []
    for group in GROUPS:
        for precision in group.precisions:
            launches = group.launches(precision)
            for name, work in group.works(precision, launches).items():
                entry = {"kernel": name, "shape": group.shape, "precision": precision.name}
                told.append({**entry, "any_precision": group.alike, **described(launches[name], work)})
    return told


def largest(device: Properties, precision: Precision, batch: int) -> int:
    """The most hidden units of a dense layer that is persistent on ``device``; 0 if none is."""
    found = [0]
    for tile in tiling.tiles(precision):
        most = device.multiprocessors // tile.slices(batch) * tile.units
        fits = (hidden for hidden in range(most, 0, -1) if tile.fits(hidden, batch, hidden, False, device))
        found.append(next(fits, 0))
    return max(found)


def launched() -> dict[str, Any]:
    """All that needs no compiler."""
    fits = [
        {
            "device": device.name,
            "precision": precision.name,
            "largest": [largest(device, precision, b) for b in BATCHES],
        }
        for device in DEVICES
        for precision in PRECISIONS
    ]
    rates = {"barrier_us": BARRIER, "memory_bytes_per_us": MEMORY_RATE, "l2_bytes_per_us": L2_RATE}
    rates["shared_bytes_per_us"] = SHARED_RATE
    multiply_adds = {precision.name: MULTIPLY_ADDS[precision] for precision in PRECISIONS}
    devices = {device.name: {**device._asdict(), "capability": list(device.capability)} for device in DEVICES}
    decided = choices.table()
    fractions: dict[str, dict[str, float]] = {}
    for (phase, precision), fraction in decided.largest_kept_fraction.items():
        fractions.setdefault(phase, {})[precision.name] = fraction
    return {
        "choices": {"source": decided.source, "largest_kept_fraction": fractions},
        "devices": devices,
        "rates": {**rates, "multiply_adds_per_us": multiply_adds},
        "batches": list(BATCHES),
        "fits": fits,
        "layers": layers(),
        "kernels": kernels(),
    }
