"""What the host code of the kernels must know of a GPU: which tiles fit it, and whether a copy engine fetches them."""

from functools import cache

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634  # exponentials are powers of 2: exp(x) = 2^(x log2 e)
LN2 = tl.constexpr(0.6931471805599453)


@cache
def generation(device: torch.device) -> str:
    """hopper (sm_90) and blackwell (sm_100) have 227 KiB of shared memory for a program and a copy engine, TMA. All else is
    taken to be narrow, with 99: sm_120, which has the engine and no room, sm_80, which has 163, and the interpreter."""
    if device.type != "cuda":
        return "narrow"
    properties = torch.cuda.get_device_properties(device)
    if properties.shared_memory_per_block_optin < 227 * 1024:
        return "narrow"
    return "hopper" if properties.major == 9 else "blackwell"


def tiles_for(x: Tensor) -> str:
    """The name of the tables of tiles for numbers like these where they lie."""
    return "fp32" if x.dtype == torch.float32 else generation(x.device)


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor | None:
    """With which the copy engine fetches tiles of x (N,…), whose rows hold their numbers side by side; None where pointers have
    to do."""
    if tiles_for(x) in ("fp32", "narrow"):
        return None
    return TensorDescriptor(x, [len(x), x.shape[1:].numel()], [x.stride(0), 1], [rows, columns])
