"""How fast the kernels are, beside their peers, in one run on one machine.

    python -m kernels.bench                      everything; writes results/kernels-<gpu>.json and .png, prints the tables
    python -m kernels.bench --only logprob       one of the four files of kernels
    python -m kernels.bench --quick              a few shapes, fewer repetitions
    python -m kernels.bench --dry-run            tiny shapes on a CPU: shows that the program works and measures nothing

A dry run takes the reference for nanomrt; with TRITON_INTERPRET=1 before it, in half a minute, the kernels themselves.

A number means little without its neighbours, so every table holds the peers of the same minute, and the first rows are what
this machine gives at best: its copy bandwidth and its rate of bf16 matrix products. `floor ms` is what the bytes or FLOPs of a
row's task take at that rate. Goals, minimum / target, stand beside what they are for. Method:
- The providers of a case take turns, so that heat and clocks treat them alike; the median of their times counts, of as many as
  `repeats` says.
- Before each measurement the L2 cache is overwritten, and the device waits a moment: the host runs ahead as it does in
  training, and CUDA events time kernels, not Python.
- `backward` is timed alone, on a graph made just before. Inputs and upstream gradients are random.
- FLOPs are those of the task and not of the provider: visible (query, key) pairs of the true lengths, so that padding costs
  and does not count. Forward 4 D per pair and head; backward 2.5 times that. Log-prob: 2 N V C forward, 6 N V C with backward.
  Only a row's share of the matrix product's rate counts what its provider computes: 8 N V C if the logits twice.
- Decoding is bound by bytes: GB/s count each cached key and value once, however often a provider reads it. So are norms,
  rotations and SwiGLU, for which each number that goes in or comes out counts once.
- Padding a pack, FlexAttention's block mask, and a prefix copied for every branch are made before the clock starts: presents to
  the peers.
- nanomrt also computes the entropy; the peers compute log p only. `max error` is log p's against float64, on up to 256 rows.
"""

import argparse
import importlib
import inspect
import os
import re
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import kernels
from kernels import reference
from nanomrt.config import UserError, command
from nanomrt.files import write_json
from nanomrt.report import COLOURS, blank_figure
from nanomrt.run import commit

FLUSH = 256 * 1024**2  # bytes written before each measurement: several times the L2 of any GPU so far
AHEAD = 5_000_000  # clock cycles, about 3 milliseconds, by which the host runs ahead of the device
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
OURS, FLASH, CUDNN, EFFICIENT = "nanomrt", "SDPA FLASH", "SDPA CUDNN", "SDPA EFFICIENT"
FLEX, UNSHARED = "FlexAttention", "same kernel, nothing shared"

# Minimum and target TFLOP/s of attention on one H200, set before anything was measured, as all goals were. By pass, head dim and
# length of a sequence.
TFLOPS = {
    (FORWARD, 64, 1024): (270, 310), (FORWARD, 64, 4096): (345, 385), (FORWARD, 64, 16384): (365, 405),
    (FORWARD, 128, 1024): (280, 350), (FORWARD, 128, 4096): (390, 460), (FORWARD, 128, 16384): (420, 500),
    (BACKWARD, 64, 1024): (150, 190), (BACKWARD, 64, 4096): (220, 270), (BACKWARD, 64, 16384): (250, 300),
    (BACKWARD, 128, 1024): (140, 190), (BACKWARD, 128, 4096): (230, 280), (BACKWARD, 128, 16384): (260, 310),
}
Goals = dict[str, dict[str, tuple[float, ...]]]  # by pass, what of it ("tflops", "share", "error", or a peer), (minimum, target)


class Call(NamedTuple):
    """A provider made ready for a case."""

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    upstream: Tensor  # the gradient of what `forward` returns
    logprob: Callable[[], Tensor] | None = None  # where `forward` returns a loss: backward's work is done in it
    recomputes: bool = False  # the logits, in backward
    note: str = ""


class Provider(NamedTuple):
    name: str
    prepare: Callable[["Case"], Call]
    needs: Callable[["Case"], int] = lambda case: 0  # bytes at its peak, where that may be too much


@dataclass(frozen=True)
class Case:
    """What all providers of one block of rows compute. Attention is q (N,H,D), k and v (N,K,D) of packed sequences with these
    lengths; log-prob is hidden (N,C), weight (V,C), targets (N,); decoding is what `branch_attention` takes, for rows that see
    these lengths; the others are arguments of the function that the name begins with."""

    name: str
    inputs: tuple[Tensor, ...]
    upstream: Tensor
    flops: dict[str, float]  # by pass
    lengths: tuple[int, ...] = ()
    bytes: dict[str, int] | None = None  # by pass, that have to be moved, where they decide the time
    goals: Goals = field(default_factory=dict)

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        """Some rows, and their log p in float64."""
        hidden, weight, targets = (x.detach() for x in self.inputs)
        rows = torch.arange(0, len(hidden), -(-len(hidden) // 256), device=hidden.device)
        logp = (hidden[rows].double() @ weight.double().T).log_softmax(-1)  # (n,V)
        return rows, logp.gather(1, targets[rows, None]).squeeze(1)


# --- Attention ---


def attention_flops(lengths: Sequence[int], H: int, D: int) -> dict[str, float]:
    """Multiplications and additions of causal attention over sequences of these lengths.

    >>> attention_flops((2,), H=1, D=8)  # three visible pairs
    {'forward': 96, 'backward': 240.0, 'forward + backward': 336.0}
    """
    forward = 4 * H * D * sum(T * (T + 1) // 2 for T in lengths)
    return {FORWARD: forward, BACKWARD: 2.5 * forward, BOTH: 3.5 * forward}


def lognormal_lengths(total: int, median: int, longest: int) -> tuple[int, ...]:
    """Lengths like those of sampled answers: many short, few long. They sum to `total`."""
    generator, lengths = torch.Generator().manual_seed(0), []
    while sum(lengths) < total:
        length = int(median * torch.randn((), generator=generator).mul(0.8).exp())
        lengths.append(min(max(length, 1), longest, total - sum(lengths)))
    return tuple(lengths)


def attention_goals(lengths: Sequence[int], D: int) -> Goals:
    """Relative to peers, and for some shapes in TFLOP/s. A pack should take no longer than padded, or cut into blocks."""
    if len(set(lengths)) > 1:
        return {phase: dict.fromkeys((FLASH, CUDNN, EFFICIENT, FLEX), (1.0,)) for phase in (FORWARD, BACKWARD)}
    goals = {FORWARD: {FLASH: (1.25,), **({CUDNN: (0.95,)} if D == 64 else {})}, BACKWARD: {FLASH: (0.9,)}}
    for phase, found in goals.items():
        if goal := TFLOPS.get((phase, D, lengths[0])):
            found["tflops"] = goal
    return goals


def attention_case(name: str, lengths: tuple[int, ...], H: int, K: int, D: int, device: str, dtype: torch.dtype) -> Case:
    draw = random_tensors(device, dtype)
    q, k, v, upstream = (draw(sum(lengths), heads, D) for heads in (H, K, K, H))
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    return Case(f"{name}, H {H} K {K} D {D}", inputs, upstream, attention_flops(lengths, H, D), lengths,
                goals=attention_goals(lengths, D))


def starts(case: Case, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *case.lengths], device=case.upstream.device).cumsum(0).to(dtype)  # (B+1,)


def ours(case: Case) -> Call:
    attention = kernels.fused_attention if fused(case) else reference.attention
    return Call(partial(attention, *case.inputs, starts(case), max(case.lengths)), case.inputs, case.upstream)


def sdpa(backend: str, case: Case) -> Call:
    """One back end of `scaled_dot_product_attention`; packs are padded to their longest sequence."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    pad = lambda x: torch.nn.utils.rnn.pad_sequence(x.detach().split(case.lengths), batch_first=True).flatten(0, 1)
    packed = (*case.inputs, case.upstream)
    *leaves, upstream = map(pad, packed) if len(set(case.lengths)) > 1 else packed
    leaves, rows = [x.detach().requires_grad_() for x in leaves], len(case.lengths)
    heads = lambda x: x.unflatten(0, (rows, -1)).transpose(1, 2)  # (B,heads,T,D)
    G = leaves[0].shape[1] // leaves[1].shape[1]

    def forward(repeat: int) -> Tensor:
        q, k, v = map(heads, leaves)
        k, v = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (k, v))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=repeat < G)

    try:
        forward(1)
        repeat = 1
    except RuntimeError:  # not every back end knows shared heads
        repeat = G
    return Call(partial(forward, repeat), leaves, heads(upstream), note=f"heads repeated {G} times" * (repeat > 1))


def varlen(case: Case) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    known, longest, cu = inspect.signature(varlen_attn).parameters, max(case.lengths), starts(case, torch.int32)
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}  # it was renamed in 2.11
    options |= {"enable_gqa": True} if "enable_gqa" in known else {}
    return Call(lambda: varlen_attn(*case.inputs, cu, cu, longest, longest, **options), case.inputs, case.upstream)


def flex(case: Case) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if len(set(case.lengths)) == 1:
        raise NotImplementedError("measured on packs only")
    N, gpu = len(case.upstream), case.upstream.is_cuda
    document = torch.repeat_interleave(torch.tensor(case.lengths)).to(case.upstream.device)  # (N,)
    visible = lambda b, h, i, j: (document[i] == document[j]) & (i >= j)
    mask = create_block_mask(visible, None, None, N, N, device=case.upstream.device, _compile=gpu)
    attend, heads = torch.compile(flex_attention, dynamic=False) if gpu else flex_attention, lambda x: x.transpose(0, 1)[None]
    return Call(lambda: attend(*map(heads, case.inputs), block_mask=mask, enable_gqa=True), case.inputs, heads(case.upstream))


ATTENTION = [Provider(OURS, ours), Provider(FLASH, partial(sdpa, "FLASH_ATTENTION")),
             Provider(CUDNN, partial(sdpa, "CUDNN_ATTENTION")), Provider(EFFICIENT, partial(sdpa, "EFFICIENT_ATTENTION")),
             Provider("varlen_attn", varlen), Provider(FLEX, flex)]


# --- Log-probabilities of tokens ---


def logprob_case(N: int, C: int, V: int, device: str, dtype: torch.dtype) -> Case:
    draw, once = random_tensors(device, dtype), 2 * N * V * C
    hidden, weight = draw(N, C).requires_grad_(), draw(V, C).mul_(2 * C**-0.5).requires_grad_()  # logits spread by 2
    targets = torch.randint(V, (N,), device=device)
    error = {"error": (1e-3, 2e-4)}  # here the minimum is the most that it may be
    return Case(f"N {N} C {C} V {V}", (hidden, weight, targets), draw(N).float(), {FORWARD: once, BOTH: 3 * once},
                goals={FORWARD: {"tflops": (480, 600), **error}, BOTH: {"tflops": (500, 600), **error}})


def two_pass(case: Case) -> Call:
    function = kernels.fused_token_logprobs if fused(case) else reference.token_logprobs
    return Call(lambda: function(*case.inputs, 1.0)[0], case.inputs[:2], case.upstream, recomputes=fused(case))


def one_pass(case: Case) -> Call:
    if not fused(case):
        raise NotImplementedError("needs a GPU, or TRITON_INTERPRET=1")
    from kernels.logprob import token_loss

    loss = lambda logprob, entropy, rows: (logprob * case.upstream[rows]).sum()
    run = lambda: token_loss(*case.inputs, 1.0, loss)
    return Call(lambda: run()[0], case.inputs[:2], torch.ones_like(case.upstream[0]), logprob=lambda: run()[1])


def naive(compiled: bool, case: Case) -> Call:
    def logprob(hidden, weight, targets):
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    function = torch.compile(logprob, dynamic=False) if compiled and case.upstream.is_cuda else logprob
    return Call(lambda: function(*case.inputs), case.inputs[:2], case.upstream)


def naive_bytes(case: Case) -> int:
    """Logits in bf16, then float logits, log_softmax and two gradients of it; the allocator holds about 12 bytes of each."""
    return 12 * case.flops[FORWARD] // (2 * case.inputs[0].shape[1])


def cut_cross_entropy(case: Case) -> Call:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return Call(lambda: -function(*case.inputs, reduction="none"), case.inputs[:2], case.upstream, recomputes=True)


def liger(case: Case) -> Call:
    """It computes its gradient in forward, for a plain sum of log p: there is no gradient of each token's own."""
    function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return Call(lambda: -function(*case.inputs, reduction="sum"), case.inputs[:2], torch.ones_like(case.upstream[0]),
                logprob=lambda: -function(*case.inputs, reduction="none"), note="equal weights only")


LOGPROB = [Provider(OURS, two_pass), Provider(f"{OURS}, one pass", one_pass),
           Provider("naive", partial(naive, False), naive_bytes), Provider("naive, compiled", partial(naive, True), naive_bytes),
           Provider("cut-cross-entropy", cut_cross_entropy), Provider("Liger", liger)]


# --- Decoding ---


def decode_case(S: int, M: int, L: int, t: int, H: int, K: int, D: int, device: str, dtype: torch.dtype) -> Case:
    """One token for each of the M branches of S segments, over L shared entries and t of its own."""
    draw, R = random_tensors(device, dtype), S * M
    place = torch.arange(R, device=device)
    prefix, suffix = [draw(S, K, L, D) for _ in "kv"], [draw(R, K, t, D) for _ in "kv"]
    positions, limit = torch.arange(L, device=device).expand(S, L).contiguous(), torch.full((S, M), L, device=device)
    inputs = (draw(R, H, D), *prefix, positions.int(), limit.int(), place.view(S, M), place, *suffix,
              torch.full((R,), t, device=device))
    flops = {FORWARD: 4 * H * D * R * (L + t)}
    goals = {"share": (0.75, 0.88), **({UNSHARED: (5.0, 6.5)} if M == 16 else {})}
    return Case(f"{S} x {M} branches, {L} + {t} entries, H {H} K {K} D {D}", inputs, inputs[0], flops, (L + t,) * R,
                {FORWARD: sum(x.nbytes for x in (*prefix, *suffix))}, {FORWARD: goals})


def decode(shared: bool, case: Case) -> Call:
    attend = kernels.fused_branch_attention if fused(case) else reference.branch_attention
    q, *prefix, limit, group, place, suffix_k, suffix_v, length = case.inputs
    if not shared:  # (R,K,L,D), (R,K,L,D), (R,L), (R,1), (R,1)
        prefix = [x.repeat_interleave(group.shape[1], 0) for x in prefix]
        limit, group = limit.flatten()[:, None], group.flatten()[:, None]
    return Call(lambda: attend(q, *prefix, limit, group, place, suffix_k, suffix_v, length), (), case.upstream)


def decode_sdpa(case: Case) -> Call:
    q, *prefix, _, _, group, _, suffix_k, suffix_v, _ = case.inputs
    join = lambda a, b: torch.cat([a.repeat_interleave(group.shape[1], 0), b], 2)  # (R,K,L+t,D)
    k, v = map(join, prefix, (suffix_k, suffix_v))
    return Call(lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True), (), case.upstream)


def copies(case: Case) -> int:
    """Bytes of the prefixes, once for every branch and once more while they are joined to its own entries."""
    return 4 * case.inputs[1].nbytes * case.inputs[5].shape[1]


DECODE = [Provider(OURS, partial(decode, True)), Provider(UNSHARED, partial(decode, False), copies),
          Provider("SDPA, nothing shared", decode_sdpa, copies)]


# --- Norms, rotations, SwiGLU ---


def elementwise_case(name: str, N: int, width: tuple[int, ...], device: str, dtype: torch.dtype) -> Case:
    """`rms_norm` of N fp32 rows, `rotate` of N x H heads, `swiglu`: inputs and outputs as they are in training."""
    draw, fp32 = random_tensors(device, dtype), random_tensors(device, torch.float32)
    x = (fp32 if name == "rms_norm" else draw)(N, *width).requires_grad_()
    rest = {"rms_norm": lambda: (fp32(width[-1]).requires_grad_(), 1e-6, dtype),
            "rotate": lambda: fp32(2, N, 1, width[-1]).unbind(),
            "swiglu": lambda: (draw(N, *width).requires_grad_(),)}[name]()
    inputs, upstream = (x, *rest), draw(N, *width)
    learned = sum(y.nbytes for y in inputs if isinstance(y, Tensor) and y.requires_grad)
    # Forward reads what it gets and writes the result; backward reads all that and writes a gradient for each.
    moved = {FORWARD: learned + upstream.nbytes, BACKWARD: 2 * learned + upstream.nbytes}
    if name == "rotate":  # half of cos and of sin; and what was turned is not needed to turn back
        moved[FORWARD] += rest[0].nbytes
        moved[BACKWARD] = moved[FORWARD]
    shape = " x ".join(map(str, (N, *width)))
    return Case(f"{name}, {shape}", inputs, upstream, {FORWARD: 0, BACKWARD: 0}, bytes=moved)


def elementwise(kind: str, case: Case) -> Call:
    name = case.name.split(",")[0]
    function = getattr(reference, name)
    if kind == OURS:
        function = getattr(kernels, f"fused_{name}") if fused(case) else function
    elif kind == "compiled" and case.upstream.is_cuda:
        function = torch.compile(function, dynamic=False)
    leaves = [x for x in case.inputs if isinstance(x, Tensor) and x.requires_grad]
    return Call(lambda: function(*case.inputs), leaves, case.upstream)


ELEMENTWISE = [Provider(OURS, partial(elementwise, OURS)), Provider("PyTorch", partial(elementwise, "PyTorch")),
               Provider("PyTorch, compiled", partial(elementwise, "compiled"))]


# --- Measuring ---


def random_tensors(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device, dtype=dtype)


def fused(case: Case) -> bool:
    """Whether Triton runs there: on a GPU, or in the interpreter."""
    return case.upstream.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def passes(call: Call) -> dict[str, tuple[Callable[[], object], Callable[[object], object]]]:
    """By pass: what comes before the clock starts, and what is timed, given that."""
    backward = lambda out: torch.autograd.grad(out, call.leaves, call.upstream)
    every = {FORWARD: (lambda: None, lambda _: call.forward()), BACKWARD: (call.forward, backward),
             BOTH: (lambda: None, lambda _: backward(call.forward()))}
    return every if call.logprob is None else {BOTH: every[BOTH]}


def stopwatch(before: Callable[[], object], run: Callable[[object], object], flush: Tensor) -> float:
    """Milliseconds of `run(before())`: of the device where there is one, else on the wall."""
    given = before()
    flush.zero_()
    if not flush.is_cuda:
        began = time.perf_counter()
        run(given)
        return 1000 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    begin.record()
    run(given)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(runs: Sequence[tuple], device: str, least: int, most: int) -> list[list[float]]:
    """Milliseconds of each (before, run), taken in turn `most` times, or at least `least` times and for 2 seconds. None at all
    where memory ran out."""
    flush = torch.empty(FLUSH if device == "cuda" else 1, dtype=torch.uint8, device=device)
    times, failed = [[] for _ in runs], set()
    enough = lambda i: i in failed or len(times[i]) >= most or (len(times[i]) >= least and sum(times[i]) >= 2000)
    while rest := [i for i in range(len(runs)) if not enough(i)]:
        for i in rest:
            try:
                times[i].append(stopwatch(*runs[i], flush))
            except torch.OutOfMemoryError:
                failed.add(i)
    return [[] if i in failed else ms for i, ms in enumerate(times)]


def peak_memory(before: Callable[[], object], run: Callable[[object], object], device: str) -> int | None:
    """Bytes above what lies there already, at the worst moment of the second run (the first one compiles)."""
    run(before())
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    lying = torch.cuda.memory_allocated()
    run(before())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - lying


def bench(case: Case, providers: Sequence[Provider], device: str, least: int, most: int) -> list[dict]:
    """The rows of a case. A provider that fails has one row, with the reason."""
    rows, runs = [], []
    torch.compiler.reset()  # or the shapes of all cases would add up to its limit of recompilations
    for provider in providers:
        row, reason = {"case": case.name, "provider": provider.name, "bytes": None}, None
        needed, free = provider.needs(case), torch.cuda.mem_get_info()[0] if device == "cuda" else sys.maxsize
        try:
            if needed > free:
                raise torch.OutOfMemoryError(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
            call, found = provider.prepare(case), []
            row["note"] = call.note
            if not case.lengths and not case.bytes:
                with torch.no_grad():
                    some, exact = case.exact
                    row["error"] = float(((call.logprob or call.forward)()[some].double() - exact).abs().max())
            for phase, run in passes(call).items():
                if phase in case.flops:
                    flops = case.flops[phase] + (case.flops[FORWARD] if call.recomputes and phase != FORWARD else 0)
                    found.append((row | {"pass": phase, "flops": flops, "task_flops": case.flops[phase],
                                         "bytes": case.bytes and case.bytes[phase], "extra_bytes": peak_memory(*run, device),
                                         "goals": case.goals.get(phase, {}) if provider.name.startswith(OURS) else {}}, run))
        except Exception as problem:  # whatever a peer dies of: the others go on
            reason = textwrap.shorten(str(problem) or type(problem).__name__, 90, placeholder=" …")
        if reason is None:
            rows += [row for row, _ in found]
            runs += [run for _, run in found]
        else:
            rows.append(row | {"pass": None, "reason": f"not available: {reason}"})
        if device == "cuda":
            torch.cuda.empty_cache()
    measured = iter(measure(runs, device, least, most))
    for row in rows:
        if row["pass"]:
            times = next(measured)
            row["ms"], row["repeats"] = statistics.median(times) if times else None, len(times)
            row |= {"tflops": row["task_flops"] / row["ms"] / 1e9} if row["ms"] else {"reason": "not available: out of memory"}
            row |= {"gbs": row["bytes"] / row["ms"] / 1e6} if row["bytes"] and row["ms"] else {}
    return rows


def compare(rows: Sequence[dict], matmul: float, copy: float) -> None:
    """Fill in the floor; the share of the matmul or copy rate, what is computed twice included; and how many times as fast as the
    best peer of its case and pass a row is, and as those that `against` lists if it is ours."""
    timed = [row for row in rows if row.get("ms")]
    for row in timed:
        peers = {other["provider"]: other["ms"] for other in timed if (other["case"], other["pass"]) == (row["case"], row["pass"])
                 and not other["provider"].startswith(OURS)}
        row["floor_ms"] = row["bytes"] / copy / 1e6 if row["bytes"] else row["task_flops"] / matmul / 1e9
        row["share"] = row["gbs"] / copy if "gbs" in row else row["flops"] / row["ms"] / 1e9 / matmul
        row["ratio"] = min(peers.values()) / row["ms"] if peers else None
        if row["provider"].startswith(OURS):
            row["against"] = {name: ms / row["ms"] for name, ms in peers.items() if name in (FLASH, CUDNN, *row["goals"])}


def gpu_name(device: str) -> tuple[str, str]:
    """The GPU's name, and as part of a file's name."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "dry run on a CPU"
    return gpu, re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def machine(device: str, dtype: torch.dtype, least: int, most: int) -> list[dict]:
    """What the hardware gives at best: GB/s of a copy (bytes read and written), TFLOP/s of a large matrix product."""
    small = device != "cuda"
    draw, n = random_tensors(device, dtype), 64 if small else 8192
    source, a, b = draw(1024 if small else 2**29), draw(n, n), draw(n, n)
    target = torch.empty_like(source)
    nothing = lambda: None
    runs = [(nothing, lambda _: target.copy_(source)), (nothing, lambda _: a @ b)]
    copy, matmul = map(statistics.median, measure(runs, device, least, most))
    return [{"what": "copy", "value": 2 * source.nbytes / copy / 1e6, "unit": "GB/s"},
            {"what": f"{str(dtype).removeprefix('torch.')} matmul, {n} x {n} x {n}", "value": 2 * n**3 / matmul / 1e9,
             "unit": "TFLOP/s"}]


# --- Showing ---


def beside_goal(value: float, row: dict, what: str, show: Callable[[float], str]) -> str:
    """A value and, in brackets, what was to be reached.

    >>> beside_goal(0.8, {"goals": {"share": (0.75, 0.88)}}, "share", "{:.0%}".format)
    '80% (goal 75% / 88%)'
    """
    goal = row["goals"].get(what)
    return show(value) + (f" (goal {' / '.join(map(show, goal))})" if goal else "")


COLUMNS = {
    "case": lambda row: row["case"],
    "provider": lambda row: row["provider"] + (f" ({row['note']})" if row.get("note") else ""),
    "pass": lambda row: row["pass"],
    "ms": lambda row: f"{row['ms']:.3f}" if row.get("ms") else row["reason"],
    "floor ms": lambda row: f"{row['floor_ms']:.3f}",
    "repeats": lambda row: str(row["repeats"] or ""),
    "TFLOP/s": lambda row: beside_goal(row["tflops"], row, "tflops", "{:.0f}".format) * bool(row["task_flops"]),
    "of matmul": lambda row: f"{row['share']:.0%}" * (not row["bytes"]),
    "GB/s": lambda row: f"{row['gbs']:.0f}",
    "of copy": lambda row: beside_goal(row["share"], row, "share", "{:.0%}".format) * bool(row["bytes"]),
    "extra MiB": lambda row: f"{row['extra_bytes'] / 2**20:.0f}",
    "of best peer's speed": lambda row: f"{row['ratio']:.2f}",
    "of a peer's speed": lambda row: ", ".join(
        f"{name} {beside_goal(ratio, row, name, '{:.2f}'.format)}" for name, ratio in row["against"].items()),
    "max error": lambda row: beside_goal(row["error"], row, "error", "{:.0e}".format),
}


# By kernel, the passes that the figure shows.
SHOWN = {"attention": (FORWARD, BACKWARD), "logprob": (FORWARD, BOTH), "decode": (FORWARD,),
         "elementwise": (FORWARD, BACKWARD)}


def table(rows: Sequence[dict], columns: dict[str, Callable[[dict], str]] = COLUMNS) -> str:
    """Markdown. A cell whose number is missing shows `-`; a column in which all are missing is left out.

    >>> print(table([{"what": "copy", "value": 3.0}, {"what": "sum", "value": None}],
    ...             {"what": lambda row: row["what"], "GB/s": lambda row: f"{row['value']:.1f}", "ms": lambda row: row["ms"]}))
    | what | GB/s |
    |------|------|
    | copy | 3.0  |
    | sum  | -    |
    """
    def cell(show: Callable[[dict], str], row: dict) -> str:
        try:
            return show(row) or "-"
        except (KeyError, TypeError):
            return "-"

    shown = [[name, *(cell(show, row).replace("|", "/") for row in rows)] for name, show in columns.items()]
    shown = [column for column in shown if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in shown]
    lines = [f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths))} |" for line in zip(*shown)]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def figure(path: Path, tables: dict[str, list[dict]], matmul: float, copy: float) -> None:
    """TFLOP/s or GB/s of every provider and case, a panel for each pass; a tick is our goal's minimum, dashed is what the machine
    gives at best."""
    panels = {(kind, phase): [row for row in rows if row["pass"] == phase and row.get("ms")] for kind, rows in tables.items()
              for phase in SHOWN[kind]}
    drawing = blank_figure(12, 3.2 * len(panels))
    for axes, ((kind, phase), rows) in zip(drawing.subplots(len(panels), squeeze=False).flat, panels.items()):
        cases, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "provider"))
        width = 0.8 / max(len(names), 1)
        bound_by_bytes = kind in ("decode", "elementwise")
        rate, best, unit = ("gbs", copy, "GB/s") if bound_by_bytes else ("tflops", matmul, "TFLOP/s")
        for row in rows:
            i = names.index(row["provider"])
            x = cases.index(row["case"]) + (i - (len(names) - 1) / 2) * width
            axes.bar(x, row[rate], width, color=COLOURS[i % len(COLOURS)])
            if goal := row["goals"].get("tflops"):
                axes.hlines(goal[0], x - width / 2, x + width / 2, color="black", linewidth=1.5)
        for i, name in enumerate(names):
            axes.bar(0, 0, color=COLOURS[i % len(COLOURS)], label=name)
        axes.axhline(best, color="0.4", linewidth=1, linestyle="--")
        axes.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=7)
        axes.set(title=f"{kind}, {phase}", ylabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, ncols=len(names) or 1, loc="upper left")
    drawing.savefig(path, dpi=150)


# --- The program ---


def plan(device: str, dtype: torch.dtype, quick: bool) -> dict[str, tuple[list[Provider], list[Callable[[], Case]]]]:
    """By kernel: its providers, and its cases, not made yet."""
    if device != "cuda":
        packs = {"3 x 5": (5,) * 3, "pack of 20": lognormal_lengths(20, 8, 16)}
        heads, rows, vocabularies, forks = [(2, 1, 16)], [6], [(16, 40)], [(2, 3, 7, 2, 2, 1, 16)]
        between = [("rms_norm", 5, (16,)), ("rotate", 5, (2, 16)), ("swiglu", 5, (24,))]
    else:
        packs = {f"16k tokens, S {S}": (S,) * (16384 // S) for S in ((4096,) if quick else (1024, 4096, 16384))}
        packs["64k pack"] = lognormal_lengths(65536, 1024, 8192)
        heads = [(16, 8, 128)] if quick else [(32, 8, 64), (16, 8, 128), (12, 2, 128)]
        rows = [16384] if quick else [4096, 16384, 65536]
        vocabularies = [(1536, 151936)] if quick else [(896, 151936), (1536, 151936), (2048, 128256)]
        forks = [(S, M, 4096, 256, 12, 2, 128) for S, M in ([(64, 16)] if quick else [(64, 16), (1, 64), (64, 1)])]
        between = [("rms_norm", 8192, (1536,)), ("rotate", 8192, (12, 128)), ("swiglu", 8192, (8960,))]
        between += [] if quick else [("rms_norm", 8192, (4096,)), ("swiglu", 384, (1280,))]
    return {"attention": (ATTENTION, [partial(attention_case, name, lengths, *shape, device, dtype)
                                      for name, lengths in packs.items() for shape in heads]),
            "logprob": (LOGPROB, [partial(logprob_case, N, C, V, device, dtype) for C, V in vocabularies for N in rows]),
            "decode": (DECODE, [partial(decode_case, *shape, device, dtype) for shape in forks]),
            "elementwise": (ELEMENTWISE, [partial(elementwise_case, *shape, device, dtype) for shape in between])}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Time the kernels and their peers.")
    parser.add_argument("--only", choices=tuple(SHOWN), help="one file of kernels (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few shapes, 10 repetitions")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: exercises the program, measures nothing")
    parser.add_argument("--out", type=Path, help="folder of the .json and .png (default: results; a dry run: a temporary one)")
    args = parser.parse_args(argv)
    if not (args.dry_run or torch.cuda.is_available()):
        raise UserError("the benchmark needs a CUDA device; python -m kernels.bench --dry-run walks through it without one")
    device, dtype = ("cpu", torch.float32) if args.dry_run else ("cuda", torch.bfloat16)
    least, most = (1, 1) if args.dry_run else (10, 10) if args.quick else (10, 30)
    home = Path(__file__).parents[1] / "results"
    folder = args.out or (Path(tempfile.mkdtemp(prefix="bench-")) if args.dry_run else home)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)

    best = machine(device, dtype, least, most)
    copy, matmul = (row["value"] for row in best)
    print(table(best, {"machine": lambda row: row["what"], "rate": lambda row: f"{row['value']:.4g} {row['unit']}"}), flush=True)
    chosen = {kind: part for kind, part in plan(device, dtype, args.quick).items() if args.only in (None, kind)}
    tables = {kind: [] for kind in chosen}
    gpu, slug = gpu_name(device)
    name = "-".join(filter(None, ["kernels", slug, args.only, args.quick and "quick"]))
    versions = {package: getattr(sys.modules.get(package), "__version__", None) for package in ("torch", "triton")}
    found = {"gpu": gpu, "versions": versions, "commit": commit(), "machine": best, "rows": tables}
    with tqdm(total=sum(len(cases) for _, cases in chosen.values()), unit="case") as bar:
        for kind, (providers, cases) in chosen.items():
            for make in cases:
                case = make()
                bar.set_description(case.name)
                tables[kind] += bench(case, providers, device, least, most)
                del case  # its tensors make room for the next one's
                write_json(folder / f"{name}.json", found)  # what is measured stays, whatever comes next
                bar.update()
    for kind, rows in tables.items():
        compare(rows, matmul, copy)
        print(f"\n### {kind}\n\n{table(rows)}")

    write_json(folder / f"{name}.json", found)
    figure(folder / f"{name}.png", tables, matmul, copy)
    print(f"\n{folder / name}.json and .png")
    failed = [row for rows in tables.values() for row in rows if row["provider"] == OURS and "reason" in row]
    return 1 if failed else 0


if __name__ == "__main__":
    command(main)
