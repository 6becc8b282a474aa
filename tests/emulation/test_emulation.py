"""The emulator itself: small kernels that are right under every schedule, and ones whose faults must be found."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch import Tensor

from sd_plugin.kernels.cpu import toolchain

from ..tolerances import assert_close, partial_sums
from . import emulator
from .emulator import EmulatedDriver, EmulationError, declared, mutants

if TYPE_CHECKING:
    from sd_plugin.kernels.cuda.driver import Argument

CPU = torch.device("cpu")
SEEDS = range(6)
NAN = float("nan")

pytestmark = pytest.mark.skipif(EmulatedDriver().reason_unavailable() is not None, reason="no C++ compiler")


class Unit(NamedTuple):
    """As the driver's."""

    source: str
    defines: tuple[tuple[str, int], ...] = ()


class Run:
    """Compiles ``source`` and launches its only kernel, ``f``."""

    def __init__(self, source: str, **settings: object) -> None:
        settings = {"read": lambda name: source, **settings}
        self.driver = EmulatedDriver(**settings)  # type: ignore[arg-type]

    def __call__(
        self,
        *arguments: Argument,
        grid: int = 1,
        threads: int = 32,
        shared: int = 0,
        cooperative: bool = False,
        seed: int | None = None,
        defines: tuple[tuple[str, int], ...] = (),
    ) -> None:
        if seed is not None:
            self.driver.seed = seed
        unit = Unit("test", defines)
        self.driver.launch(unit, "f", CPU, grid, threads, shared, arguments, cooperative)


def kernel(parameters: str, body: str, before: str = "") -> str:
    return f'{before}{before and chr(10)}extern "C" __global__ void f({parameters}) {{\n{body}\n}}\n'


# ---- faults in the order of threads ---------------------------------------------------------------------------------

REDUCTION = kernel(
    "const float* x, float* y",
    """
    SD_SHARED_MEMORY(memory);
    float* s = (float*)memory;
    const int i = threadIdx.x;
    for (int row = blockIdx.x; row < 6; row += gridDim.x) {
        s[i] = x[row * 256 + i];
        __syncthreads();
        for (int half = 128; half; half /= 2) {
            if (i < half) s[i] += s[i + half];
            __syncthreads();
        }
        if (i == 1) y[row] = s[0];
        __syncthreads();
    }
    """,
)

WARP_TRANSPOSE = kernel(
    "const float* x, float* y",
    """
    SD_SHARED_MEMORY(memory);
    const int lane = threadIdx.x % 32;
    float* s = (float*)memory + threadIdx.x / 32 * 32;
    for (int k = 0; k < 4; ++k) {
        s[lane] = x[k * 64 + threadIdx.x];
        __syncwarp();
        y[k * 64 + threadIdx.x] = s[31 - lane];
        __syncwarp();
    }
    """,
)

# Three buffers of 64 floats: the copies of two parts are under way while one is used.
PIPELINE = kernel(
    "const float* x, float* y, int parts",
    """
    SD_SHARED_MEMORY(memory);
    float* s = (float*)memory;
    const int i = threadIdx.x;
    for (int p = 0; p < 2; ++p) {
        cp_async_4(s + p * 64 + i, x + p * 64 + i, p < parts);
        cp_async_commit();
    }
    float sum = 0;
    for (int p = 0; p < parts; ++p) {
        cp_async_wait<1>();
        __syncthreads();
        sum += s[p % 3 * 64 + (i + 17) % 64];
        const bool valid = GUARD(p + 2 < parts);
        cp_async_4(s + (p + 2) % 3 * 64 + i, x + (p + 2) * 64 + i, valid);
        cp_async_commit();
    }
    y[i] = sum;
    """,
    "#define GUARD(condition) (condition)",
)

# Every block adds up what all blocks wrote in the step before.
STEPS = kernel(
    "float* x, unsigned* counters, int steps",
    """
    const int blocks = gridDim.x, own = blockIdx.x * 64 + threadIdx.x;
    for (int t = 0; t < steps; ++t) {
        float sum = 1;
        for (int b = 0; b < blocks; ++b) sum += load_shared_by_blocks(x + t * blocks * 64 + b * 64 + (own + 1) % 64);
        x[(t + 1) * blocks * 64 + own] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            announce(counters + t);
            await(counters + t, blocks);
        }
        __syncthreads();
    }
    """,
)


def run_reduction(source: str, seed: int, races: bool = False) -> bool:
    x, y = torch.arange(6 * 256, dtype=torch.float32).view(6, 256), torch.full((6,), NAN)
    Run(source, races=races)(x, y, grid=4, threads=256, shared=1024, seed=seed)
    return torch.equal(y, x.sum(1))


def run_transpose(source: str, seed: int, races: bool = False) -> bool:
    x, y = torch.arange(256.0).view(8, 32), torch.full((8, 32), NAN)
    Run(source, races=races)(x, y, threads=64, shared=256, seed=seed)
    return torch.equal(y, x.flip(1))


def run_pipeline(source: str, seed: int, races: bool = False) -> bool:
    right = True
    for parts in (1, 5):
        x, y = torch.arange(64.0 * parts).view(parts, 64), torch.full((64,), NAN)
        Run(source, races=races)(x, y, parts, threads=64, shared=768, seed=seed)
        right = right and torch.equal(y, x.sum(0).roll(-17))
    return right


def run_steps(source: str, seed: int, races: bool = False) -> bool:
    steps, blocks = 4, 5
    x, counters = torch.full((steps + 1, blocks, 64), NAN), torch.zeros(steps, dtype=torch.int32)
    x[0] = 1
    Run(source, races=races)(x, counters, steps, grid=blocks, threads=64, seed=seed, cooperative=True)
    truth = [1.0]
    for _ in range(steps):
        truth.append(1 + blocks * truth[-1])
    return torch.equal(x, torch.tensor(truth)[:, None, None].expand_as(x))


Case = tuple[str, Callable[..., bool]]
CASES: dict[str, Case] = {
    "reduction": (REDUCTION, run_reduction),
    "transpose": (WARP_TRANSPOSE, run_transpose),
    "pipeline": (PIPELINE, run_pipeline),
    "steps": (STEPS, run_steps),
}


@pytest.mark.parametrize("races", [False, True])
@pytest.mark.parametrize("seed", [0, *range(1, 20)])
@pytest.mark.parametrize("name", CASES)
def test_right_kernels_are_right_under_every_schedule(name: str, seed: int, races: bool) -> None:
    source, check = CASES[name]
    assert check(source, seed, races)


MUTANTS = [
    pytest.param(mutant.text, check, id=f"{name}-{mutant.line}-{mutant.name}")
    for name, (source, check) in CASES.items()
    for mutant in mutants(source)
]


@pytest.mark.parametrize(("text", "check"), MUTANTS)
def test_each_missing_thing_is_found(text: str, check: Callable[..., bool]) -> None:
    """Under most seeds: a test needs to try few of them."""
    found = 0
    for seed in range(1, 9):
        try:
            found += not check(text, seed)
        except EmulationError:
            found += 1
    assert found >= 4


def test_how_many_mutants_there_are() -> None:
    assert len(MUTANTS) == 3 + 2 + (2 + 2 + 1 + 2) + 4


RACE_ONLY = kernel(
    "const float* x, float* y",
    """
    SD_SHARED_MEMORY(memory);
    float* s = (float*)memory;
    // All write the same, so that no result tells.
    s[0] = x[0];
    y[threadIdx.x] = s[0];
    """,
)


def test_a_race_without_consequence_is_found_when_asked_for() -> None:
    x, y = torch.ones(1), torch.zeros(32)
    Run(RACE_ONLY)(x, y, shared=16)
    assert torch.equal(y, torch.ones(32))
    with pytest.raises(EmulationError, match=r"race: it (reads|writes) byte 0 of shared memory.*, line \d+ `"):
        Run(RACE_ONLY, races=True)(x, y, shared=16)


@pytest.mark.parametrize("name", ["reduction", "transpose"])
def test_missing_barriers_are_races_under_every_schedule(name: str) -> None:
    source, check = CASES[name]
    for mutant in mutants(source):
        for seed in (0, *SEEDS):
            with pytest.raises(EmulationError, match="race: "):
                check(mutant.text, seed, races=True)


def test_a_barrier_missing_after_a_wait_for_copies_is_a_race() -> None:
    (mutant,) = (m for m in mutants(PIPELINE) if m.name == "__syncthreads removed")
    with pytest.raises(EmulationError, match="race: "):
        run_pipeline(mutant.text, 0, races=True)


ORDER = kernel(
    "int* order, int* next",
    """
    __syncthreads();
    order[blockIdx.x * blockDim.x + threadIdx.x] = (*next)++;
    __syncthreads();
    """,
)


def orders(cooperative: bool, seeds: Sequence[int]) -> list[tuple[int, ...]]:
    found = []
    for seed in seeds:
        order, following = torch.zeros(3 * 64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        Run(ORDER)(order, following, grid=3, threads=64, cooperative=cooperative, seed=seed)
        assert sorted(order.tolist()) == list(range(192))
        found.append(tuple(order.tolist()))
    return found


@pytest.mark.parametrize("cooperative", [False, True])
def test_schedules_are_those_of_the_seed(cooperative: bool) -> None:
    first, again = orders(cooperative, range(1, 9)), orders(cooperative, range(1, 9))
    assert first == again
    assert len(set(first)) >= 6
    ((*plain,),) = orders(False, [0])
    assert plain[0] < plain[64] < plain[128]


def test_each_launch_has_its_own_schedule() -> None:
    run = Run(ORDER)
    seen = set()
    for _ in range(4):
        order, following = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        run(order, following, threads=64)
        seen.add(tuple(order.tolist()))
    assert len(seen) == 4


# ---- errors ---------------------------------------------------------------------------------------------------------

SHARED = "SD_SHARED_MEMORY(memory); float* s = (float*)memory; (void)s;"
# What the kernel f(const float* x, float* y, int n) does with tensors of 100 elements, 3 warps and 400 bytes.
ERRORS = {
    "a barrier that some pass by": (
        "if (threadIdx.x != 5) __syncthreads();\nif (threadIdx.x == 5) __syncwarp();",
        r"__syncthreads.*__syncwarp|__syncwarp.*__syncthreads",
    ),
    "a barrier that some leave": ("if (threadIdx.x == 5) return;\n__syncthreads();", "have ended|it ends while"),
    "two barriers": ("if (threadIdx.x < 5) __syncthreads();\nelse __syncthreads();", "wait in that of line"),
    "a shuffle that some leave": (
        "if (threadIdx.x != 5) y[0] = __shfl_xor_sync(0xffffffffu, 1.f, 1);",
        "have ended|it ends while",
    ),
    "a shuffle from nobody": (
        "if (threadIdx.x < 8) y[0] = __shfl_sync(0xffu, 1.f, 9);",
        "lane . read lane 9, which takes no part",
    ),
    "a mask of others": ("__syncwarp(0xf0u);", "leaves out the calling lane"),
    "different operations": (
        "unsigned r[2];\nif (threadIdx.x % 2) ldmatrix_x2(r, memory);\nelse ldmatrix_x2_trans(r, memory);",
        r"diverges: lane \d+ is at ldmatrix_x2",
    ),
    "waiting for ever": ("await((const unsigned*)y, 7);", r"deadlock: block 0: threads: 96 at await.*count 0 of 7"),
    "a trap": ("stop_unless(n == 1);\nstop_unless(n == 2);", r"line 4 `stop_unless\(n == 2\);`: trap"),
    "shared memory after its end": ("s[100] = 1;", r"byte 400 of the 400 of shared memory of block 0, line 3 `"),
    "shared memory far after its end": ("s[1000] = 1;", "byte 4000 of the 400 of shared memory"),
    "reading after the end": ("y[0] = s[100];", "byte 400 of the 400 of shared memory"),
    "shared memory before its beginning": ("s[-1] = 1;", "before the beginning of its shared memory"),
    "shared memory far before its beginning": ("s[-2000] = 1;", "byte -8000 of the 400 of shared memory"),
    "an argument after its end": ("y[100] = 1;", "byte 400 of the 400 of argument 1"),
    "an argument far after its end": ("y[100000 + n] = 1;", "byte 400004 of the 400 of argument 1"),
    "an argument read after its end": ("y[0] = x[100];", "byte 400 of the 400 of argument 0"),
    "an argument before its beginning": ("y[-1] = 1;", "before the beginning of argument 1"),
    "an argument read far before its beginning": ("y[0] = x[-2000];", "byte -8000 of the 400 of argument 0"),
    "a const argument": ("*(float*)x = 1;", "writes to argument 0, which it takes as const"),
    "a null pointer": ("if (threadIdx.x > 99) x = y;\ny = nullptr;\ny[0] = 1;", "null or misaligned"),
    "an index outside of an array": ("int a[4] = {1, 2, 3, 4};\ny[0] = a[n + 3];", r"line 4 `.*outside of an array"),
    "a misaligned vector": (
        "*(float4*)(y + 1) = make_float4(1, 2, 3, 4);",
        r"line 3 `.*: an access through a null or misaligned pointer",
    ),
    "an int overflow": ("y[0] = 2147483647 + n;", "an int overflows in a sum"),
    "division by zero": ("y[0] = 5 / (n - 1);", "division by zero"),
    "a big array": ("volatile char big[100000];\nbig[n] = 1;\nbig[0] = big[n];", "stack overflow"),
    "a copy to elsewhere": ("cp_async_16(s + 100, x, true);", "cp_async_16 to byte 400 of the 400 of shared memory"),
    "a copy to the last bytes": ("cp_async_16(s + 98, x, true);", "cp_async_16 to byte 392"),
    "a copy to a misaligned address": ("cp_async_16(s + 1, x, true);", "cp_async_16 to an address that is not aligned"),
    "a copy from a misaligned address": ("cp_async_16(s, x + 1, true);", "from an address that is not aligned"),
    "a small copy, misaligned": ("cp_async_4(s, (char*)x + 2, true);", "cp_async_4 from an address that is not al"),
    "a copy from elsewhere": (
        "cp_async_4(s + threadIdx.x, x + 100, true);\ncp_async_commit();\ncp_async_wait<0>();",
        r"line 3 `cp_async_4.*byte 400 of the 400 of argument 0",
    ),
    "a matrix elsewhere": ("unsigned r[2];\nldmatrix_x2(r, x);", "the row of lane 0 is not in shared memory"),
    "a matrix, misaligned": ("unsigned r[2];\nldmatrix_x2(r, s + 2);", "the row of lane 0 is not aligned"),
    "no end": ("for (volatile int i = 0; i < 2;) i = 1;", r"did not end in 0\.1 seconds"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_told(what: str) -> None:
    body, told = ERRORS[what]
    run = Run(kernel("const float* x, float* y, int n", f"{SHARED} // 2\n{body}"), seconds=0.1)
    for seed in SEEDS:
        x, y = torch.zeros(100), torch.zeros(100)
        with pytest.raises(EmulationError, match=rf"^kernel f.*(?s:.*)({told})"):
            run(x, y, 1, threads=96, shared=400, seed=seed)
        assert torch.equal(x, y)  # nothing reached them
    # The next launch is as if nothing had been.
    assert run_reduction(REDUCTION, 1)


def test_the_launch_is_checked() -> None:
    source = (
        'extern "C" __global__ void __launch_bounds__(2 * 32, 1)\nf(const float* x, half_bits* h, int n, float v) {}'
    )
    run = Run(source, multiprocessors=4)
    x, h = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)
    run(x, h, 1, 1.0, grid=5, threads=64, shared=232448)
    run(None, None, -(2**31), 1.0, grid=4, cooperative=True)
    run(x[:0], torch.empty(0, dtype=torch.float16), 1, 1.0)
    for told, arguments, settings in [
        ("blocks 5, not 1 to 4", (x, h, 1, 1.0), {"grid": 5, "cooperative": True}),
        ("blocks 0", (x, h, 1, 1.0), {"grid": 0}),
        ("threads 65, not 1 to 64", (x, h, 1, 1.0), {"threads": 65}),
        ("shared memory 232449", (x, h, 1, 1.0), {"shared": 232449}),
        ("takes 4 arguments, not 3", (x, h, 1), {}),
        ("argument 2: 2147483648 is no int", (x, h, 2**31, 1.0), {}),
        ("argument 2: float, where it takes an int", (x, h, 1.0, 1.0), {}),
        ("argument 3: int, where it takes a float", (x, h, 1, 1), {}),
        ("argument 2: Tensor, where it takes an int", (x, h, x, 1.0), {}),
        ("argument 0: int, where it takes a pointer", (1, h, 1, 1.0), {}),
        (r"argument 0: a tensor of torch\.bfloat16, where it takes torch\.float32", (h, h, 1, 1.0), {}),
        ("argument 0: a tensor on meta", (x.to("meta"), h, 1, 1.0), {}),
    ]:
        with pytest.raises(EmulationError, match=told):
            run(*arguments, **settings)  # type: ignore[arg-type]
    with pytest.raises(EmulationError, match="test has no kernel g"):
        run.driver.launch(Unit("test"), "g", CPU, 1, 32, 0, (), False)
    with pytest.raises(EmulationError, match=r"does not compile:[\s\S]*test\.cu:2:"):
        Run(kernel("", "no such thing"))()


def test_views_of_one_storage_keep_their_places() -> None:
    run = Run(kernel("const float* x, float* y, float* z", "const int i = threadIdx.x;\ny[i] = z[i] + x[i];"))
    memory = torch.arange(100.0)
    run(memory[3:], memory[50:], memory[60:])
    truth = torch.arange(100.0)
    # Thread by thread: the sums of the first ten are read by the next ones only where z and y overlap behind them.
    truth[50:82] = truth[60:92] + truth[3:35]
    assert torch.equal(memory[:50], truth[:50]) and torch.equal(memory[82:], truth[82:])
    assert torch.equal(memory[50:60], truth[50:60])


def test_shared_memory_is_no_number_at_first_in_each_block() -> None:
    source = kernel("float* y", f"{SHARED} y[blockIdx.x] = s[threadIdx.x];\n__syncthreads();\ns[threadIdx.x] = 1;")
    for seed in SEEDS:
        y = torch.zeros(20)
        Run(source)(y, grid=20, shared=128, seed=seed)
        assert bool(y.isnan().all())


# ---- asynchronous copies --------------------------------------------------------------------------------------------


def test_copies_are_not_there_before_they_are_waited_for() -> None:
    body = """
    SD_SHARED_MEMORY(memory);
    float* s = (float*)memory;
    s[threadIdx.x] = 5;
    cp_async_4(s + threadIdx.x, x + threadIdx.x, threadIdx.x % 2);
    cp_async_commit();
    y[threadIdx.x] = s[threadIdx.x];
    x[threadIdx.x] = 7;
    cp_async_wait<0>();
    z[threadIdx.x] = s[threadIdx.x];
    """
    run = Run(kernel("float* x, float* y, float* z", body))
    early = late = 0
    for seed in range(20):
        x, y, z = torch.full((32,), 3.0), torch.zeros(32), torch.zeros(32)
        run(x, y, z, shared=128, seed=seed)
        even, odd = z[::2], z[1::2]
        assert torch.equal(even, torch.zeros(16))
        # Read when it is copied: before the source is changed or after that.
        assert bool(((odd == 3) | (odd == 7)).all())
        assert bool((y.isnan() | (y == 3) | (y == 0)).all())
        early += int((odd == 3).sum())
        late += int((odd == 7).sum())
        assert seed > 0 or bool(y.isnan().all())
    assert early > 10
    assert late > 100


def test_copies_that_are_not_committed_or_not_waited_for() -> None:
    body = """
    SD_SHARED_MEMORY(memory);
    float* s = (float*)memory;
    for (int i = 0; i < 4; ++i) {
        cp_async_16(s + 4 * i, x + 4 * i, true);
        if (i < 3) cp_async_commit();
    }
    cp_async_wait<1>();
    for (int i = 0; i < 16; ++i) y[i] = s[i];
    """
    x, y = torch.arange(16.0), torch.zeros(16)
    Run(kernel("const float* x, float* y", body))(x, y, threads=1, shared=64, seed=0)
    assert torch.equal(y[:8], x[:8])
    assert bool(y[8:].isnan().all())


def test_sources_of_invalid_copies_are_not_read() -> None:
    body = """
    SD_SHARED_MEMORY(memory);
    cp_async_16(memory, (const char*)16, false);
    cp_async_commit();
    cp_async_wait<0>();
    y[0] = *(float*)memory;
    """
    for seed in SEEDS:
        y = torch.ones(1)
        Run(kernel("float* y", body))(y, threads=1, shared=16, seed=seed)
        assert y.item() == 0


# ---- what a warp does together --------------------------------------------------------------------------------------

# A product with operands loaded element by element, in the layouts that PTX defines.
PRODUCT = kernel(
    "const TYPE* a, const TYPE* b, float* c",
    """
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    unsigned ra[4], rb[2];
    float rc[4];
    for (int i = 0; i < 4; ++i) rc[i] = c[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
#ifdef HALF
    #define PAIR(x, y) ((unsigned)(x) | (unsigned)(y) << 16)
    for (int i = 0; i < 4; ++i) {
        const TYPE* p = a + (g + i % 2 * 8) * 16 + 2 * q + i / 2 * 8;
        ra[i] = PAIR(p[0], p[1]);
    }
    for (int i = 0; i < 2; ++i) {
        const TYPE* p = b + (2 * q + i * 8) * 8 + g;
        rb[i] = PAIR(p[0], p[8]);
    }
    PRODUCT(rc, ra, rb);
#else
    for (int i = 0; i < 4; ++i) ra[i] = ROUND(a[(g + i % 2 * 8) * 8 + q + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) rb[i] = ROUND(b[(q + i * 4) * 8 + g]);
    mma_tf32(rc, ra, rb);
#endif
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = rc[i];
    """,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_products(dtype: torch.dtype) -> None:
    product = {torch.float16: "mma_f16", torch.bfloat16: "mma_bf16"}[dtype]
    run = Run(f"#define HALF\n#define TYPE half_bits\n#define PRODUCT {product}\n{PRODUCT}")
    for seed in SEEDS:
        made = torch.Generator().manual_seed(seed)
        a, b = torch.randn(16, 16, generator=made).to(dtype), torch.randn(16, 8, generator=made).to(dtype)
        c = torch.randn(16, 8, generator=made)
        truth, sums = c.double() + a.double() @ b.double(), c.double().abs() + partial_sums(a, b)
        run(a, b, c, seed=seed)
        assert_close(c, truth, 17, depth=1, magnitude=sums, exact=True)


def tf32(x: Tensor, rounding: int) -> Tensor:
    return ((x.view(torch.int32) + rounding) & -0x2000).view(torch.float32).double()


@pytest.mark.parametrize("rounds", [True, False])
def test_tf32_products(rounds: bool) -> None:
    """The tensor cores cut off what is not rounded."""
    how = "tf32_bits" if rounds else "__float_as_uint"
    run = Run(f"#define TYPE float\n#define ROUND {how}\n{PRODUCT}")
    for seed in SEEDS:
        made = torch.Generator().manual_seed(seed)
        a, b = torch.randn(16, 8, generator=made), torch.randn(8, 8, generator=made)
        c = torch.randn(16, 8, generator=made)
        add = 0x1000 if rounds else 0
        truth, sums = c.double() + tf32(a, add) @ tf32(b, add), c.double().abs() + partial_sums(a, b)
        run(a, b, c, seed=seed)
        assert_close(c, truth, 9, depth=1, magnitude=sums, exact=True)


@pytest.mark.parametrize("matrices", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(matrices: int, transposed: bool) -> None:
    body = f"""
    SD_SHARED_MEMORY(memory);
    half_bits* s = (half_bits*)memory;
    // Rows lie 24 elements apart, those of the last matrix first.
    for (int i = threadIdx.x; i < {matrices} * 64; i += 32) s[({matrices} * 8 - 1 - i / 8) * 24 + i % 8] = x[i];
    __syncwarp();
    unsigned r[{matrices}];
    const int row = threadIdx.x % {matrices * 8};
    ldmatrix_x{matrices}{"_trans" if transposed else ""}(r, s + ({matrices} * 8 - 1 - row) * 24);
    for (int m = 0; m < {matrices}; ++m) y[m * 32 + threadIdx.x] = r[m];
    """
    run = Run(kernel("const half_bits* x, int* y", body))
    x = torch.arange(matrices * 64, dtype=torch.int16).view(matrices, 8, 8)
    for seed in SEEDS:
        y = torch.zeros(matrices, 32, dtype=torch.int32)
        run(x, y, shared=matrices * 8 * 48, seed=seed)
        # Lane 4 g + q: row g, columns 2 q and 2 q + 1.
        source = x.transpose(1, 2) if transposed else x
        pairs = source.reshape(matrices, 32, 2).int()
        assert torch.equal(y, pairs[..., 0] | pairs[..., 1] << 16)


def test_shuffles() -> None:
    body = """
    const int i = threadIdx.x;
    float sum = x[i];
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    y[i] = sum;
    y[64 + i] = __shfl_down_sync(0xffffffffu, x[i], 3);
    y[128 + i] = __shfl_sync(0xffffffffu, x[i], 35);
    if (i % 32 < 8) y[192 + i] = __shfl_xor_sync(0xffu, (int)x[i], 7);
    else if (i % 32 >= 24) y[192 + i] = __shfl_xor_sync(0xff000000u, x[i], 1);
    """
    run = Run(kernel("const float* x, float* y", body))
    x = torch.arange(64.0)
    lane = torch.arange(64) % 32
    for seed in SEEDS:
        y = torch.full((4, 64), NAN)
        run(x, y, threads=64, seed=seed)
        warps = x.view(2, 32)
        assert torch.equal(y[0].view(2, 32), warps.sum(1, keepdim=True).expand(2, 32))
        assert torch.equal(y[1], torch.where(lane + 3 < 32, x + 3, x))
        assert torch.equal(y[2].view(2, 32), warps[:, 3:4].expand(2, 32))
        assert torch.equal(y[3].view(2, 32)[:, :8], warps[:, :8].flip(1))
        assert torch.equal(y[3].view(2, 32)[:, 24:], warps[:, [25, 24, 27, 26, 29, 28, 31, 30]])


# ---- conversions ----------------------------------------------------------------------------------------------------

CONVERSIONS = kernel(
    "const float* x, half_bits* f16, half_bits* bf16, int* tf32, const half_bits* halves, float* back, int n, int m",
    """
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        f16[i] = float_to_f16(x[i]);
        bf16[i] = float_to_bf16(x[i]);
        tf32[i] = tf32_bits(x[i]);
    }
    for (int i = threadIdx.x; i < m; i += blockDim.x) back[i] = f16_to_float(halves[i]);
    """,
)


def same(got: Tensor, truth: Tensor) -> bool:
    """Bit for bit, but for which nan."""
    integer = {2: torch.int16, 4: torch.int32}[got.element_size()]
    return bool(((got.view(integer) == truth.view(integer)) | (got.isnan() & truth.isnan())).all())


def test_conversions() -> None:
    made = torch.Generator().manual_seed(0)
    halves = torch.arange(-(2**15), 2**15).to(torch.int16)
    exact = torch.cat([halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()])
    # Ties and their neighbours: between a value and the next, of each type.
    bits = exact.view(torch.int32)
    near = torch.cat([bits + offset for offset in (0, 1, -1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)])
    anything = torch.randint(-(2**31), 2**31, (200_000,), generator=made).to(torch.int32)
    # Around the subnormals of float16: half of its least, and its ties.
    small = (torch.arange(-4100, 4100) / 2 * 2.0**-24).float()
    x = torch.cat([near.view(torch.float32), anything.view(torch.float32), small, torch.randn(100_000, generator=made)])
    f16, bf16 = torch.zeros_like(x, dtype=torch.float16), torch.zeros_like(x, dtype=torch.bfloat16)
    rounded, back = torch.zeros_like(x, dtype=torch.int32), torch.zeros(2**16)

    Run(CONVERSIONS)(x, f16, bf16, rounded, halves, back, len(x), len(halves))

    assert same(f16, x.half())
    assert same(bf16, x.bfloat16())
    assert same(back, halves.view(torch.float16).float())
    got = rounded.view(torch.float32)
    assert not bool((rounded & 0x1FFF).any())
    assert torch.equal(got.isnan(), x.isnan()) and same(got[x.isinf()], x[x.isinf()])
    finite = x[x.isfinite()].double()
    # Half of the last of 11 bits, or of a subnormal's, more in magnitude, and cut off.
    step = torch.exp2(torch.frexp(finite).exponent.clamp(min=-125).double() - 11)
    truth = torch.trunc(finite / step + 0.5 * finite.sign()) * step
    assert torch.equal(got[x.isfinite()].double(), torch.where(truth.abs() < 2.0**128, truth, truth.sign() * torch.inf))


def test_arithmetic() -> None:
    body = """
    y[0] = min(3, 2) + max(-1, -2);
    y[1] = fmaxf(x[0], 2.f) + fminf(x[0], -1.f);
    y[2] = expf(x[1]);
    y[3] = tanhf(x[1]);
    y[4] = logf(x[1]);
    y[5] = sqrtf(x[1]);
    y[6] = fmaf(x[1], x[1], -x[2]);
    y[7] = __uint_as_float(__float_as_uint(x[1]) ^ 0x80000000u) + __ldg(x + 2) * 0 + __ldcg(x + 2) * 0;
    y[8] = sizeof(long long) + alignof(float4) + alignof(float2) + alignof(int4) + alignof(uint4);
    """
    x = torch.tensor([NAN, 0.3, 0.09])
    y = torch.zeros(9)
    Run(kernel("const float* x, float* y", body))(x, y, threads=1)
    f = x[1]
    fma = struct.unpack("f", struct.pack("f", f.item() * f.item() - x[2].item()))[0]
    truth = [1, 1, f.exp(), f.tanh(), f.log(), f.sqrt(), fma, -f, 8 + 16 + 8 + 16 + 16]
    assert_close(y, torch.tensor([float(t) for t in truth]), 1, depth=2)
    assert y[6] == fma


# ---- sources --------------------------------------------------------------------------------------------------------


def test_lines_and_defines_stay() -> None:
    source = kernel("float* y,  // where to\n  int n /* ) */", "y[0] = __LINE__ * 100 + n + WIDTH;")
    assert declared(source).count("\n") == source.count("\n")
    y = torch.zeros(1)
    Run(source)(y, 3, defines=(("WIDTH", 20),))
    assert y.item() == 323


def test_sources_are_transformed() -> None:
    y = torch.zeros(1)
    run = Run(kernel("float* y", "y[0] = 1;"), transform=lambda text: text.replace("= 1", "= 2"))
    run(y)
    assert y.item() == 2


def test_libraries_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = kernel("float* y", "y[0] = 1;")
    Run(source, cache=tmp_path)(torch.zeros(1))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert [name.partition("-")[0] for name in files] == ["runtime", "test"]
    monkeypatch.setattr(toolchain, "run", None)
    Run(source, cache=tmp_path)(torch.zeros(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_old_libraries_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "_MOST_LIBRARIES", 2)
    for index in range(4):
        Run(kernel("", f"// {index}"), cache=tmp_path)()
    assert len(list(tmp_path.glob("*.so"))) == 2


def test_another_way_to_switch_fibers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of processors for which there is no code here."""
    monkeypatch.setattr(emulator, "_RUNTIME_FLAGS", (*emulator._RUNTIME_FLAGS, "-DSD_EMULATOR_UCONTEXT"))
    for seed in (0, 1):
        x, y = torch.arange(6 * 256, dtype=torch.float32).view(6, 256), torch.full((6,), NAN)
        run = Run(REDUCTION, cache=tmp_path)
        run(x, y, grid=4, threads=256, shared=1024, seed=seed)
        assert torch.equal(y, x.sum(1))
        with pytest.raises(EmulationError, match=r"out of bounds: byte 10[0-9][0-9] of the 1008 of shared memory"):
            run(x, y, grid=4, threads=256, shared=1008, seed=seed)


SOURCE_OF_MUTANTS = """#define GUARD(condition) (condition)
static inline void announce(unsigned* counter, int by);  // __syncthreads();
extern "C" __global__ void f(float* y, int n) {
    if (n) __syncthreads(); else __syncthreads();
    /* __syncwarp(); */ __syncwarp(); cp_async_wait<N - 1>(); cp_async_commit();
    announce(counters(1,
                      2) + 3);
    await(y, (n + 1) * 2);
    stop_unless(n > 0);
    y[0] = GUARD(n < (3 + 4) && GUARD(n > 0)) ? 1 : 2;
}
"""


def test_mutants() -> None:
    found = [(m.line, m.name) for m in mutants(SOURCE_OF_MUTANTS)]
    assert found == [
        (4, "__syncthreads removed"),
        (4, "__syncthreads removed"),
        (5, "__syncwarp removed"),
        (5, "cp_async_wait removed"),
        (5, "cp_async_wait weakened"),
        (5, "cp_async_commit removed"),
        (6, "announce removed"),
        (8, "await removed"),
        (10, "guard is true"),
        (10, "guard is false"),
        (10, "guard is true"),
        (10, "guard is false"),
    ]
    changes = []
    for mutant in mutants(SOURCE_OF_MUTANTS):
        assert mutant.text.count("\n") == SOURCE_OF_MUTANTS.count("\n")
        lines = zip(mutant.text.splitlines(), SOURCE_OF_MUTANTS.splitlines(), strict=True)
        changes.append(next(new.strip() for new, old in lines if new != old))
    assert changes == [
        "if (n) (void)0; else __syncthreads();",
        "if (n) __syncthreads(); else (void)0;",
        "/* __syncwarp(); */ (void)0; cp_async_wait<N - 1>(); cp_async_commit();",
        "/* __syncwarp(); */ __syncwarp(); (void)0; cp_async_commit();",
        "/* __syncwarp(); */ __syncwarp(); cp_async_wait<(N - 1) + 1>(); cp_async_commit();",
        "/* __syncwarp(); */ __syncwarp(); cp_async_wait<N - 1>(); (void)0;",
        "(void)0",
        "(void)0;",
        "y[0] = true ? 1 : 2;",
        "y[0] = false ? 1 : 2;",
        "y[0] = GUARD(n < (3 + 4) && true) ? 1 : 2;",
        "y[0] = GUARD(n < (3 + 4) && false) ? 1 : 2;",
    ]
