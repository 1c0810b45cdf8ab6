"""Every launch of the kernels, compiled ahead of time for the GPUs that they are for: no GPU is needed.

The host code runs as it is, on small tensors of a CPU that it takes for a GPU's, with the tiles that it chooses there. A stand-in
for the driver compiles each launch as Triton would, and nothing runs. Whether a launch is possible and what decides its speed can
be read off the result: the shared memory that it needs, spilled registers, matrix instructions, tiles fetched by the copy engine
(TMA). `tests/test_triton.py` runs this file in a process of its own, without the interpreter: every tile on each architecture
that it serves (those of fp32, which are for checks, on sm_80, where least fits), and the shapes of `config/`. More are `rare` and
left to

    python -m pytest tests/compiled.py       all of them; -m rare: these alone
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from kernels import hardware
from kernels.attention import TILES, Tile, attention_backward, attention_forward
from kernels.decode import branch_attention
from kernels.decode import tile_of as tile_of_decoding
from kernels.elementwise import rms_norm, rms_norm_backward, swiglu, swiglu_backward, turn
from kernels.logprob import STORED, logprobs_backward, logprobs_forward, token_loss
from kernels.logprob import tile_of as tile_of_logprob

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED = {80: 101_376, 90: 232_448, 100: 232_448}  # bytes a program may have; sm_80 has more, but sm_86 and sm_89 share its tiles
TENSOR_COLUMNS = 512  # of sm_100's memory for matrix instructions
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
TABLES = {80: "narrow", 90: "hopper", 100: "blackwell"}  # of 16 bit; that of fp32 serves them all
HALF, FULL = torch.bfloat16, torch.float32  # fp16 differs in the type of its operands alone
rare = lambda *values: pytest.param(*values, marks=pytest.mark.rare)


class Launch(NamedTuple):
    name: str  # of the kernel
    constants: dict
    binary: CompiledKernel


class Driver:
    """Stands in for the driver of a GPU: Triton asks it what to compile for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a kernel keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launches(monkeypatch) -> Callable[..., list[Launch]]:
    """launches(arch, function, …): what function(…) launches, compiled for that architecture."""
    run, found = JITFunction.run, []

    def record(kernel, *arguments, warmup, **options):
        binary = run(kernel, *arguments, warmup=True, **options)
        found.append(Launch(kernel.fn.__name__, options, binary))
        return binary

    def compile_for(arch: int, function: Callable[..., object], *arguments) -> list[Launch]:
        properties = SimpleNamespace(major=arch // 10, shared_memory_per_block_optin=SHARED[arch])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(arch))
        found.clear()
        function(*arguments)
        return list(found)

    monkeypatch.setattr(JITFunction, "run", record)
    choose = hardware.generation.__wrapped__  # without its cache
    monkeypatch.setattr(hardware, "generation", lambda device: choose(torch.device("cuda")))
    return compile_for


def stack_bytes(binary: CompiledKernel, folder: Path) -> int:
    """Of a thread, in the machine code. Registers that are spilled lie there, and nothing else in these kernels does."""
    (folder / "cubin").write_bytes(binary.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", folder / "cubin"], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def assert_fast(launch: Launch, arch: int, folder: Path, rows: int = 0, fetched: bool = False) -> None:
    """It fits, spills nothing, makes each product, of `rows` rows, with the best instruction, has its tiles `fetched` or not."""
    metadata, ptx, which = launch.binary.metadata, launch.binary.asm["ptx"], f"{launch.name} {launch.constants} for sm_{arch}"
    assert metadata.shared <= SHARED[arch] and (metadata.tmem_size or 0) <= TENSOR_COLUMNS, which
    assert stack_bytes(launch.binary, folder) == 0, which
    if rows:
        products = launch.binary.asm["ttir"].count("tt.dot ")
        assert ptx.count(MATRIX[arch] if rows >= 64 else "mma.sync") >= products > 0, which  # the larger take 64 rows and more
    assert (ptx.count("cp.async.bulk.tensor") > 0) == fetched, which


def zeros(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# --- attention ---


def attend(N: int, G: int, D: int, dtype: torch.dtype = HALF) -> None:
    q, k, starts = zeros(N, 2 * G, D, dtype=dtype), zeros(N, 2, D, dtype=dtype), torch.tensor([0, N])
    out, lse = attention_forward(q, k, k, starts, N, 0.1)
    attention_backward(q, k, k, out, lse, q, starts, N, 0.1)


EXACT = ((1, 16), (1, 32), (4, 64), (1, 128), (1, 256))
ATTENTION = [
    *((arch, HALF, G, D) for arch in SHARED for G, D in ((7, 16), (2, 32), (4, 64), (2, 128), (4, 256))),
    *((80, FULL, G, D) for G, D in EXACT), (90, torch.float16, 4, 64),
]


@pytest.mark.parametrize("arch, dtype, G, D", [
    *ATTENTION, *(rare(arch, HALF, G, D) for arch in SHARED for G, D in ((1, 32), (1, 64), (7, 64), (1, 128), (6, 128))),
    *(rare(arch, FULL, G, D) for arch in (90, 100) for G, D in EXACT),
], ids=str)
def test_attention(arch, dtype, G, D, launches, tmp_path):
    """Forward, dQ, dK and dV. G counts: it is a constant of the last one's loop."""
    found, half = launches(arch, attend, 40, G, D, dtype), dtype != FULL
    assert [launch.name for launch in found] == ["forward_kernel", "dq_kernel", "dkdv_kernel"]
    for launch in found:
        if (launch.name, half, D) == ("dq_kernel", False, 256):
            continue  # it spills in any tile
        rows = launch.constants["BN" if launch.name == "dkdv_kernel" else "BM"]
        assert_fast(launch, arch, tmp_path, rows * half, fetched=half and arch >= 90)


def test_tiles_divide_each_other():
    """Or the border between masked and wholly visible tiles would run through a tile."""
    for table in TILES.values():
        assert all(BM % BN == 0 for name in ("forward", "dq") for BM, BN, *_ in table[name].values())
        assert all(BN % BM == 0 for BM, BN, *_ in table["dkdv"].values())


# --- log-probabilities ---


def score(N: int, V: int, dtype: torch.dtype = HALF, C: int = 64) -> None:
    hidden, weight, targets = zeros(N, C, dtype=dtype), zeros(V, C, dtype=dtype), zeros(N, dtype=torch.int64)
    logprob, entropy, lse = logprobs_forward(hidden, weight, targets, 1.0)
    logprobs_backward(hidden, weight, targets, lse, entropy, logprob, entropy, 1.0, True, True)


def score_once(N: int, V: int, dtype: torch.dtype = HALF) -> None:
    hidden, weight, targets = zeros(N, 64, dtype=dtype), zeros(V, 64, dtype=dtype), zeros(N, dtype=torch.int64)
    token_loss(hidden.requires_grad_(), weight, targets, 1.0, lambda logprob, entropy, rows: logprob.sum())


# A vocabulary that 16 divides has binaries of its own: those of the benchmark. The ones of config/ are none.
LOGPROB = [*((arch, HALF, score, 1000) for arch in SHARED), *((arch, HALF, score_once, 1008) for arch in SHARED),
           (80, FULL, score, 1000), (80, FULL, score_once, 1008)]


@pytest.mark.parametrize("arch, dtype, function, V", [
    *LOGPROB, *(rare(arch, HALF, score, 1008) for arch in SHARED), rare(80, FULL, score, 1008),
    *(rare(arch, FULL, score, 1000) for arch in (90, 100)), *(rare(arch, FULL, score_once, 1008) for arch in (90, 100)),
], ids=lambda x: getattr(x, "__name__", str(x)))
def test_logprob(arch, dtype, function, V, launches, tmp_path):
    """Forward, the merging of its splits, and dz: from logits computed once more, or as they were stored."""
    found, half = launches(arch, function, 20, V, dtype), dtype != FULL
    assert [launch.name for launch in found] == ["forward_kernel", "merge_kernel", "dz_kernel"]
    for launch in found:
        products = launch.name == "forward_kernel" or (launch.name == "dz_kernel" and function is score)
        assert_fast(launch, arch, tmp_path, launch.constants["BM"] * (products and half), products and half and arch >= 90)


def test_odd_widths(launches, tmp_path):
    """Numbers are loaded one by one, and still nothing spills."""
    for launch in launches(80, score, 20, 1000, HALF, 77):
        assert_fast(launch, 80, tmp_path)


# --- decoding ---


def decode(rows: int, cached: int, own: int, G: int, D: int, dtype: torch.dtype = HALF) -> None:
    q, prefix, suffix = (zeros(*shape, D, dtype=dtype) for shape in ((rows, 2 * G), (1, 2, cached), (rows, 2, own)))
    index, positions, limit = (zeros(*shape, dtype=torch.int32) for shape in ((rows,), (1, cached), (1, rows)))
    branch_attention(q, prefix, prefix, positions, limit, index[None], index, suffix, suffix, index + own)


DECODE = [
    *((arch, HALF, G, D) for arch in SHARED for G, D in ((2, 32), (3, 256))), (90, HALF, 4, 64), (90, HALF, 6, 128),
    (80, FULL, 4, 16), (80, FULL, 4, 256),
]


@pytest.mark.parametrize("arch, dtype, G, D", [
    *DECODE, *(rare(arch, HALF, 4, D) for arch in SHARED for D in (16, 80)),
    *(rare(arch, HALF, G, D) for arch in (80, 100) for G, D in ((4, 64), (6, 128))),
    *(rare(arch, FULL, 4, D) for arch in (90, 100) for D in (16, 256)),
    *(rare(arch, FULL, 4, 64) for arch in SHARED), *(rare(80, FULL, G, D) for G, D in ((4, 32), (6, 128))),
], ids=str)
def test_decode(arch, dtype, G, D, launches, tmp_path):
    """A shared prefix, a row's own suffix, and the merging of their chunks."""
    found = launches(arch, decode, 3, 20, 4, G, D, dtype)
    assert [launch.name for launch in found] == ["chunk_kernel", "chunk_kernel", "merge_kernel"]
    for launch in found:
        assert_fast(launch, arch, tmp_path, launch.constants.get("BR", 0) * (dtype != FULL))


# --- norms, rotations, SwiGLU ---


def between_products(N: int, C: int, D: int, dtype: torch.dtype = HALF) -> None:
    stream, weight, heads = (zeros(*shape, dtype=FULL) for shape in ((N, C), (C,), (N, 2, 1, D)))
    x, wide = zeros(N, 2, D, dtype=dtype), zeros(N, 4 * C, dtype=dtype)
    normed = rms_norm(stream, weight, 1e-6, dtype)
    rms_norm_backward(stream, weight, normed, 1e-6)
    turn(x, *heads.unbind(1), False)
    swiglu(wide, wide)
    swiglu_backward(wide, wide, wide)


def of_heads(N: int, D: int, dtype: torch.dtype = HALF) -> None:
    x, weight, angles = (zeros(*shape, dtype=type_) for *shape, type_ in (
        (N, 4, D, dtype), (D, FULL), (N, 2, 1, D, FULL)))
    rms_norm_backward(x, weight, rms_norm(x, weight, 1e-6, dtype), 1e-6)
    turn(x, *angles.unbind(1), False)


def assert_moves_16_bytes(launch: Launch) -> None:
    """A load and a store. But a narrow row's weight, and what it adds to the weight's gradient, are less for each thread."""
    moves = set(re.findall(r"(?:ld|st)\.global\S*", launch.binary.asm["ptx"]))
    if launch.name.startswith("rms_norm") and launch.constants["COLUMNS"] < 512:  # 4 numbers for each of 128 threads
        moves -= {f"{move}.global.{size}b32" for move in ("ld", "st") for size in ("", "v2.")}
    assert moves == {"ld.global.v4.b32", "st.global.v4.b32"}, (launch.name, moves)


@pytest.mark.parametrize("arch, dtype, C, D", [
    *((arch, HALF, C, D) for arch in SHARED for C, D in ((128, 32), (512, 64))), (90, HALF, 1536, 128), (90, HALF, 8192, 256),
    (80, FULL, 1536, 128), *(rare(arch, HALF, 1536, 128) for arch in (80, 100)),
], ids=str)
def test_elementwise(arch, dtype, C, D, launches, tmp_path):
    """Bound by memory: nothing spills, and tensors are read and written 16 bytes at a time."""
    found = launches(arch, between_products, 40, C, D, dtype)
    assert [launch.name for launch in found] == ["rms_norm_kernel", "rms_norm_backward_kernel", "rotate_kernel", "swiglu_kernel",
                                                 "swiglu_backward_kernel"]
    for launch in found:
        assert_fast(launch, arch, tmp_path)
        assert_moves_16_bytes(launch)


@pytest.mark.parametrize("arch, dtype, D", [
    *((arch, HALF, 32) for arch in SHARED), (90, HALF, 64), *(rare(arch, HALF, D) for arch in SHARED for D in (16, 128, 256)),
    *(rare(arch, HALF, 64) for arch in (80, 100)), *(rare(80, FULL, D) for D in (32, 64, 128)),
], ids=str)
def test_elementwise_of_heads(arch, dtype, D, launches, tmp_path):
    """qk_norm, and the rotation after it."""
    found = launches(arch, of_heads, 40, D, dtype)
    assert [launch.name for launch in found] == ["rms_norm_kernel", "rms_norm_backward_kernel", "rotate_kernel"]
    for launch in found:
        assert_fast(launch, arch, tmp_path)
        assert_moves_16_bytes(launch)


# --- How often ---


def test_sizes_are_no_constants(launches):
    """Twenty different numbers of tokens, rows and cached entries compile each kernel once."""
    def everything(N: int) -> list[CompiledKernel]:
        found = launches(90, attend, N, 4, 64) + launches(90, score, N, 1000) + launches(90, score_once, N, 1008)
        found += launches(90, between_products, N, 64, 32)
        return [launch.binary for launch in found + launches(90, decode, N, 2 * N + 1, N, 6, 128)]

    first = everything(1)
    for N in (2, 8, 15, 16, 17, 32, 64, 100, *range(127, 138), 257):
        assert all(a is b for a, b in zip(everything(N), first, strict=True)), N


# --- Which ---


def test_every_tile_is_compiled_by_default(monkeypatch):
    """Each row of each table is launched by a case that is not rare, on each architecture that it serves, or, of fp32, on one."""
    found = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, grid, warmup, **constants: found.append(
        constants | {"kernel": f"{kernel.fn.__module__}.{kernel.fn.__name__}"}))
    assert set(TILES) == {*TABLES.values(), "fp32"}
    for arch, own in TABLES.items():
        monkeypatch.setattr(hardware, "generation", lambda device, own=own: own)
        cases = lambda every, arch=arch: (rest for where, *rest in every if where == arch)
        found.clear()
        for dtype, G, D in cases(ATTENTION):
            attend(40, G, D, dtype)
        for dtype, function, V in cases(LOGPROB):
            function(20, V, dtype)
        for dtype, G, D in cases(DECODE):
            decode(3, 20, 4, G, D, dtype)
        row = lambda kernel, tile, **more: {"kernel": f"kernels.{kernel}_kernel", **tile._asdict(), **more}
        tables, dtypes = ((own, "fp32"), (HALF, FULL)) if arch == 80 else ((own,), (HALF,))
        rows = [row(f"attention.{name}", Tile(*tile), D=D)
                for table in tables for name, tiles in TILES[table].items() for D, tile in tiles.items()]
        rows.append(row("logprob.dz", STORED))
        for dtype in dtypes:
            rows.append(row("logprob.dz", tile_of_logprob(zeros(1, 16, dtype=dtype))))
            for flag in (True, False):
                rows.append(row("logprob.forward", tile_of_logprob(zeros(1, 16, dtype=dtype), stored=flag)))
                rows += [row("decode.chunk", tile_of_decoding(zeros(1, 1, D, dtype=dtype), shared=flag)) for D in (128, 256)]
        assert [row for row in rows if not any(row.items() <= constants.items() for constants in found)] == [], arch
