"""Every launch of the kernels, compiled ahead of time for the GPUs that they are for: no GPU is needed.

The host code runs as it is, on small tensors of a CPU that it takes for a GPU's, with the tiles that it chooses there. A stand-in
for the driver compiles each launch as Triton would, and nothing runs. Whether a launch is possible and what decides its speed can
be read off the result: the shared memory that it needs, spilled registers, matrix instructions, tiles fetched by the copy engine
(TMA). `tests/test_triton.py` runs this file in a process of its own, without the interpreter.
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
from kernels.attention import TILES, attention_backward, attention_forward
from kernels.decode import branch_attention
from kernels.elementwise import rms_norm, rms_norm_backward, swiglu, swiglu_backward, turn
from kernels.logprob import logprobs_backward, logprobs_forward, token_loss

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED = {80: 101_376, 90: 232_448, 100: 232_448}  # bytes a program may have; sm_80 has more, but sm_86 and sm_89 share its tiles
TENSOR_COLUMNS = 512  # of sm_100's memory for matrix instructions
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
HALF = torch.bfloat16  # fp16 differs in the type of its operands alone


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
    """It fits, spills nothing, multiplies `rows` rows at a time with the best instruction, has its tiles `fetched` or not."""
    metadata, ptx, which = launch.binary.metadata, launch.binary.asm["ptx"], f"{launch.name} {launch.constants} for sm_{arch}"
    assert metadata.shared <= SHARED[arch] and (metadata.tmem_size or 0) <= TENSOR_COLUMNS, which
    assert stack_bytes(launch.binary, folder) == 0, which
    if rows:
        assert ptx.count(MATRIX[arch] if rows >= 64 else "mma.sync") > 0, which  # the larger ones take 64 rows and more
    assert (ptx.count("cp.async.bulk.tensor") > 0) == fetched, which


def zeros(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# --- attention ---


def attend(N: int, D: int, dtype: torch.dtype = HALF) -> None:
    q, k, starts = zeros(N, 8, D, dtype=dtype), zeros(N, 2, D, dtype=dtype), torch.tensor([0, N])
    out, lse = attention_forward(q, k, k, starts, N, 0.1)
    attention_backward(q, k, k, out, lse, q, starts, N, 0.1)


@pytest.mark.parametrize("arch, dtype, D", [
    *((arch, HALF, D) for arch in SHARED for D in (64, 128, 256)),
    (100, HALF, 16),  # the other tiles of 16 and 32 are those of 64 and have less to hold
    *((80, torch.float32, D) for D in (32, 64)),
], ids=str)
def test_attention(arch, dtype, D, launches, tmp_path):
    """Forward, dQ, dK and dV."""
    found, half = launches(arch, attend, 40, D, dtype), dtype == HALF
    assert [launch.name for launch in found] == ["forward_kernel", "dq_kernel", "dkdv_kernel"]
    for launch in found:
        rows = launch.constants["BN" if launch.name == "dkdv_kernel" else "BM"]
        assert_fast(launch, arch, tmp_path, rows * half, fetched=half and arch >= 90)


def test_tiles_divide_each_other():
    """Or the border between masked and wholly visible tiles would run through a tile."""
    for table in TILES.values():
        assert all(BM % BN == 0 for name in ("forward", "dq") for BM, BN, *_ in table[name].values())
        assert all(BN % BM == 0 for BM, BN, *_ in table["dkdv"].values())


# --- log-probabilities ---


def score(N: int, dtype: torch.dtype = HALF, C: int = 64) -> None:
    hidden, weight, targets = zeros(N, C, dtype=dtype), zeros(1000, C, dtype=dtype), zeros(N, dtype=torch.int64)
    logprob, entropy, lse = logprobs_forward(hidden, weight, targets, 1.0)
    logprobs_backward(hidden, weight, targets, lse, entropy, logprob, entropy, 1.0, True, True)


def score_once(N: int, dtype: torch.dtype = HALF) -> None:
    hidden, weight, targets = zeros(N, 64, dtype=dtype), zeros(1000, 64, dtype=dtype), zeros(N, dtype=torch.int64)
    token_loss(hidden.requires_grad_(), weight, targets, 1.0, lambda logprob, entropy, rows: logprob.sum())


@pytest.mark.parametrize("function", [score, score_once], ids=["two passes", "one pass"])
@pytest.mark.parametrize("arch, dtype", [(80, HALF), (90, HALF), (100, HALF), (80, torch.float32)], ids=str)
def test_logprob(arch, dtype, function, launches, tmp_path):
    """Forward, the merging of its splits, and dz: from logits computed once more, or as they were stored."""
    found, half = launches(arch, function, 20, dtype), dtype == HALF
    assert [launch.name for launch in found] == ["forward_kernel", "merge_kernel", "dz_kernel"]
    for launch in found:
        products = launch.name == "forward_kernel" or (launch.name == "dz_kernel" and function is score)
        assert_fast(launch, arch, tmp_path, launch.constants["BM"] * (products and half), products and half and arch >= 90)


def test_odd_widths(launches, tmp_path):
    """Numbers are loaded one by one, and still nothing spills."""
    for launch in launches(80, score, 20, HALF, 77):
        assert_fast(launch, 80, tmp_path)


# --- decoding ---


def decode(rows: int, cached: int, own: int, D: int, dtype: torch.dtype = HALF) -> None:
    q, prefix, suffix = (zeros(*shape, D, dtype=dtype) for shape in ((rows, 12), (1, 2, cached), (rows, 2, own)))
    index, unseen = zeros(rows, dtype=torch.int64), zeros(1, rows, cached, dtype=torch.float32)
    branch_attention(q, prefix, prefix, unseen, index[None], index, suffix, suffix, index + own)


@pytest.mark.parametrize("arch, dtype, D", [*((arch, HALF, D) for arch in SHARED for D in (128, 256)), (80, torch.float32, 128)],
                         ids=str)
def test_decode(arch, dtype, D, launches, tmp_path):
    """A shared prefix, a row's own suffix, and the merging of their chunks."""
    found = launches(arch, decode, 3, 20, 4, D, dtype)
    assert [launch.name for launch in found] == ["chunk_kernel", "chunk_kernel", "merge_kernel"]
    for launch in found:
        assert_fast(launch, arch, tmp_path, launch.constants.get("BR", 0) * (dtype == HALF))


# --- norms, rotations, SwiGLU ---


def between_products(N: int, C: int, D: int, dtype: torch.dtype = HALF) -> None:
    stream, weight, heads = (zeros(*shape, dtype=torch.float32) for shape in ((N, C), (C,), (N, 2, 1, D)))
    x, wide = zeros(N, 2, D, dtype=dtype), zeros(N, 4 * C, dtype=dtype)
    normed = rms_norm(stream, weight, 1e-6, dtype)
    rms_norm_backward(stream, weight, normed, 1e-6)
    turn(x, *heads.unbind(1), False)
    swiglu(wide, wide)
    swiglu_backward(wide, wide, wide)


@pytest.mark.parametrize("arch, dtype, C, D", [*((arch, HALF, 1536, 128) for arch in SHARED), (90, HALF, 512, 64),
                                               (90, HALF, 8192, 256), (80, torch.float32, 1536, 128)], ids=str)
def test_elementwise(arch, dtype, C, D, launches, tmp_path):
    """Bound by memory: nothing spills, and tensors are read and written 16 bytes at a time."""
    found = launches(arch, between_products, 40, C, D, dtype)
    assert [launch.name for launch in found] == ["rms_norm_kernel", "rms_norm_backward_kernel", "rotate_kernel", "swiglu_kernel",
                                                 "swiglu_backward_kernel"]
    for launch in found:
        assert_fast(launch, arch, tmp_path)
        moves = set(re.findall(r"(?:ld|st)\.global\S*", launch.binary.asm["ptx"]))
        assert moves == {"ld.global.v4.b32", "st.global.v4.b32"}, (launch.name, moves)


# --- How often ---


def test_sizes_are_no_constants(launches):
    """Twenty different numbers of tokens, rows and cached entries compile each kernel once."""
    def everything(N: int) -> list[CompiledKernel]:
        found = launches(90, attend, N, 64) + launches(90, score, N) + launches(90, score_once, N)
        found += launches(90, between_products, N, 64, 32)
        return [launch.binary for launch in found + launches(90, decode, N, 2 * N + 1, N, 64)]

    first = everything(1)
    for N in (2, 8, 15, 16, 17, 32, 64, 100, *range(127, 138), 257):
        assert all(a is b for a, b in zip(everything(N), first, strict=True)), N
