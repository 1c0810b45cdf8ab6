"""Every shipped tile of every kernel, compiled ahead of time for the GPUs that it is for: no GPU is needed.

Asserts what decides speed and can be read off the machine code: shared memory that fits, no register spills, matrix
instructions. `tests/test_triton.py` runs this file in a process of its own, without the interpreter.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention import TILES as ATTENTION
from kernels.attention import dkdv_kernel, dq_kernel
from kernels.attention import forward_kernel as attention_kernel
from kernels.decode import chunk_kernel, merge_kernel
from kernels.logprob import STORED, dz_kernel
from kernels.logprob import TILES as LOGPROB
from kernels.logprob import forward_kernel as logprob_kernel
from kernels.logprob import merge_kernel as logprob_merge_kernel

CUOBJDUMP = Path(os.path.dirname(triton.__file__)) / "backends/nvidia/bin/cuobjdump"
SHARED = {80: 101_376, 90: 232_448, 100: 232_448}  # bytes; sm_80's tiles also serve sm_86 and sm_89, which have this much
POINTERS = {"cu_seqlens": "*i64", "targets": "*i64", "group": "*i64", "place": "*i64", "stored": "*fp16"}
FP32 = ("lse", "delta", "part_m", "part_l", "part_t", "part_out", "part_lse", "target_z", "logprob", "entropy", "g", "e", "unseen")
COUNTS = ("N", "V", "M", "L", "R", "first", "first_part", "parts")  # any whole number
DIVISIBLE = [["tt.divisibility", 16]]


def compiled(kernel, arch: int, tmp_path, dtype: str = "bf16", descriptors: dict | None = None, absent=(), warps: int = 4,
             stages: int = 1, **constants) -> dict:
    """Compile as a launch would; `descriptors` by name, with their block; arguments in `absent` are None."""
    signature, given, attributes = {}, dict(constants), {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in absent or (name.endswith("_desc") and not descriptors):
            signature[name] = "constexpr"
            given.setdefault(name, None)
        elif name.endswith("_desc"):
            signature[name] = f"tensordesc<{dtype}[{','.join(map(str, descriptors[name]))}]>"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in COUNTS:
            signature[name] = "i32"
        else:
            strided = "stride" in name or name == "C"
            signature[name] = "i32" if strided else POINTERS.get(name, "*fp32" if name in FP32 else f"*{dtype}")
            attributes[(i,)] = DIVISIBLE
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=warps, num_stages=stages))
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    show = lambda what: subprocess.run([CUOBJDUMP, what, path], capture_output=True, text=True, check=True).stdout
    assert binary.metadata.shared <= SHARED[arch]
    assert re.search(r"STACK:(\d+)", show("-res-usage"))[1] == "0"
    return {name: len(re.findall(name, show("-sass"))) for name in ("HGMMA", "HMMA", "UTMALDG")}


def assert_matrix_instructions(found: dict, arch: int, loads_tiles: bool) -> None:
    assert found["HGMMA"] + found["HMMA"] > 0  # sm_100's is called UTCHMMA
    assert (found["UTMALDG"] > 0) == loads_tiles


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("kernel, name", [(attention_kernel, "forward"), (dq_kernel, "dq"), (dkdv_kernel, "dkdv")],
                         ids=["forward", "dq", "dkdv"])
@pytest.mark.parametrize("arch, table, dtype", [(90, "wide", "bf16"), (100, "blackwell", "bf16"), (80, "narrow", "bf16"),
                                                (80, "fp32", "fp32")])
def test_attention(arch, table, dtype, kernel, name, head_dim, tmp_path):
    """Forward and backward. fp16 differs from bf16 in the type of its operands alone."""
    if head_dim < 64 and table != "narrow":
        pytest.skip("the tiles of head dim 64 with less to hold")
    BM, BN, warps, stages = ATTENTION[table][name][head_dim]
    rows = {"q_desc": (BM, head_dim), "grad_desc": (BM, head_dim), "k_desc": (BN, head_dim), "v_desc": (BN, head_dim)}
    found = compiled(kernel, arch, tmp_path, dtype, rows if arch >= 90 else None, warps=warps, stages=stages, G=4, D=head_dim,
                     BM=BM, BN=BN)
    if dtype != "fp32":
        assert_matrix_instructions(found, arch, arch >= 90)


@pytest.mark.parametrize("stored", [False, True], ids=["two passes", "one pass"])
@pytest.mark.parametrize("kernel", [logprob_kernel, dz_kernel], ids=["forward", "dz"])
@pytest.mark.parametrize("arch, table, dtype", [(90, "hopper", "bf16"), (100, "wide", "bf16"), (80, "narrow", "bf16"),
                                                (80, "fp32", "fp32")])
def test_logprob(arch, table, dtype, kernel, stored, tmp_path):
    """Forward and dz, with and without stored logits."""
    if stored and kernel is dz_kernel:
        BM, BV, BK, warps, stages = STORED
    else:
        BM, BV, BK, warps, stages = LOGPROB["wide" if stored and table == "hopper" else table]
    tiles = {"h_desc": (BM, BK), "w_desc": (BV, BK)} if arch >= 90 else None
    found = compiled(kernel, arch, tmp_path, dtype, tiles, () if stored else ("stored",), warps, stages, BM=BM, BV=BV, BK=BK)
    if dtype != "fp32" and not (stored and kernel is dz_kernel):
        assert_matrix_instructions(found, arch, arch >= 90)


@pytest.mark.parametrize("head_dim, shared, BR, BN, warps", [(64, True, 64, 64, 8), (128, True, 64, 64, 8), (256, True, 16, 32, 4),
                                                             (128, False, 16, 64, 4), (256, False, 16, 32, 4)])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_decode(arch, head_dim, shared, BR, BN, warps, tmp_path):
    """A shared prefix and a row's own suffix."""
    absent = () if shared else ("unseen", "group", "place")
    found = compiled(chunk_kernel, arch, tmp_path, absent=absent, warps=warps, stages=2, G=6, K=2, D=head_dim, BD=head_dim,
                     CHUNK=512, BR=BR, BN=BN)
    assert_matrix_instructions(found, arch, False)


def test_merging(tmp_path):
    """The kernels that join parts."""
    compiled(logprob_merge_kernel, 80, tmp_path, SPLITS=8, BM=128)
    compiled(merge_kernel, 80, tmp_path, D=128, BD=128, warps=1)
