"""Where a training step of a 1.5B model spends its time, operation by operation: what one more fusion could save at most.

    python -m kernels.profile             writes results/profile-<gpu>.json, prints the table
    python -m kernels.profile --dry-run   a tiny model on a CPU: shows that the program works and measures nothing

The step is forward and backward of the clipped loss over one packed micro-batch, as in train.py. Times are those of PyTorch's
profiler, each operation's own kernels only, backward included; shares are of their sum. Matrix products inside of the log-prob's
backward count as products. MFU is the model's FLOPs (6 per parameter and token, and attention's) against the wall clock of a step
without the profiler and the rate of a large bf16 matrix product.

`floor` is the least that everything but products, attention and log-probs could take: what a norm, a rotation, a SwiGLU or a
residual sum reads and writes moves once, in the type it has, forward and backward; and each weight is cast once, and its gradient
back. What stands above the floor is what fusing could save; a file of kernels has to be worth 5 % of a step.
"""

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import kernels
from kernels.bench import attention_flops, gpu_name, lognormal_lengths, machine, table
from nanomrt.config import UserError, command
from nanomrt.files import write_json
from nanomrt.model import Llama, ModelConfig, Packed
from nanomrt.mrt import clipped_loss
from nanomrt.run import commit

QWEN_1_5B = ModelConfig(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                        num_key_value_heads=2, head_dim=128, max_position_embeddings=32768, attention_bias=True)
TINY = ModelConfig(vocab_size=118, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=1, head_dim=16, max_position_embeddings=128, attention_bias=True)
GROUPS = {  # the first pattern that an operation's name matches
    "products": r"aten::(mm|addmm|bmm)$",
    "attention": r"nanomrt::attention|scaled_dot_product",
    "log-probs": r"nanomrt::token_logprobs|log_softmax",
    "norms": r"rms_norm|layer_norm|rsqrt|aten::mean",  # but the sum over the parts of a weight's gradient: that is `aten::sum`
    "rotations": r"nanomrt::rotate",
    "SwiGLU": r"silu|swiglu",
    "casts and copies": r"aten::(copy_|_to_copy|cat|roll|contiguous|clone)",
    "rest": r"",  # the residual sums; embedding; loss
}
PRODUCTS = ("products", "attention", "log-probs")  # all other groups are elementwise work


def training_step(model: Llama, tokens: Tensor, packed: Packed) -> None:
    """Forward and backward of the clipped loss, as for one micro-batch of train.py."""
    model.zero_grad(set_to_none=True)
    hidden = model(tokens, packed.position_ids, packed)
    logprob, _ = kernels.token_logprobs(hidden[:-1], model.head, tokens[1:], 1.0)
    advantage = torch.ones_like(logprob)
    clipped_loss(logprob, logprob.detach(), advantage, advantage / len(logprob), 0.2, 0.28).backward()


def floor_bytes(config: ModelConfig, tokens: int, parameters: int) -> int:
    """Least traffic of a step's elementwise operations, in bytes: see the module's docstring. The residual stream has four
    bytes a number, all else two; the products' weights are cast from four to two, and their gradients back."""
    C, F, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads + config.num_key_value_heads
    # Bytes forward + backward. A layer has two norms and two residual sums.
    norms = 2 * (6 + 10) * C  # reads x, writes y; reads x and y's gradient, writes x's
    residual = 2 * (10 + 18) * C  # reads both, writes the sum; casts its gradient for the branch, adds to it what comes back
    rotation = (4 + 4) * heads * config.head_dim
    swiglu = (6 + 10) * F  # reads gate and up, writes y; reads them and y's gradient, writes theirs
    casts = 2 * (4 + 2) * parameters
    return tokens * config.num_hidden_layers * (norms + residual + rotation + swiglu) + casts


def flops(model: Llama, lengths: tuple[int, ...]) -> float:
    """Of the products and of attention, forward and backward. A tied embedding is multiplied once: as the head."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name)
    weights += config.vocab_size * config.hidden_size * config.tie_word_embeddings
    passes = attention_flops(lengths, config.num_attention_heads, config.head_dim)
    return 6 * weights * sum(lengths) + config.num_hidden_layers * (passes["forward"] + passes["backward"])


def group_of(operation: str) -> str:
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, operation))


def by_operation(run: Callable[[], None], device: str) -> list[dict]:
    """(operation, group, ms, calls) of one run, slowest first; on a GPU the time of its kernels, else the host's."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as recorded:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    # The forward pass of an operator of ours runs under a name that PyTorch gives its autograd function.
    plain = lambda name: re.sub(r"^GeneratedBackwardFor_([a-z]+)_(\w+)_default$", r"\1::\2", name)
    own = (lambda event: event.self_device_time_total) if device == "cuda" else (lambda event: event.self_cpu_time_total)
    # On a GPU each kernel is an event as well, whose time its operation on the CPU has already; and so may have what the profiler
    # does in between ("Command Buffer Full"), whose name no operation has.
    rows: dict[str, dict] = {}
    for event in recorded.key_averages():
        name = plain(event.key)
        if own(event) > 0 and event.device_type == DeviceType.CPU and "::" in name:
            row = rows.setdefault(name, {"operation": name, "group": group_of(name), "ms": 0.0, "calls": 0})
            row["ms"], row["calls"] = row["ms"] + own(event) / 1e3, max(row["calls"], event.count)
    return sorted(rows.values(), key=lambda row: -row["ms"])


def wall_clock(run: Callable[[], None], device: str, repeats: int) -> float:
    """Median ms of a step."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[1:])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="packed tokens of the micro-batch")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU: exercises the program, measures nothing")
    parser.add_argument("--out", type=Path, help="folder of the .json (default: results; a dry run: a temporary one)")
    args = parser.parse_args(argv)
    if not (args.dry_run or torch.cuda.is_available()):
        raise UserError("the profile needs a CUDA device; python -m kernels.profile --dry-run walks through it without one")
    device, dtype = ("cpu", torch.float32) if args.dry_run else ("cuda", torch.bfloat16)
    config, tokens = (TINY, 64) if args.dry_run else (QWEN_1_5B, args.tokens)
    lengths = lognormal_lengths(tokens, tokens // 8, tokens // 2)
    with torch.device(device):
        model = Llama(config)  # whatever the weights are: on a CPU it would take half a minute to draw them
    drawn = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).to(device)
    packed = Packed.of(torch.tensor(lengths, device=device))
    run = lambda: training_step(model, drawn, packed)

    ms = wall_clock(run, device, 1 if args.dry_run else 10)
    rows = by_operation(run, device)
    copy, matmul = (row["value"] for row in machine(device, dtype, *((1, 1) if args.dry_run else (10, 30))))
    busy = sum(row["ms"] for row in rows)
    groups = [{"group": group, "ms": sum(row["ms"] for row in rows if row["group"] == group)} for group in GROUPS]
    other = sum(row["ms"] for row in groups if row["group"] not in PRODUCTS)
    summary = {"ms": ms, "mfu": flops(model, lengths) / ms / 1e9 / matmul, "busy_ms": busy, "elementwise_ms": other,
               "floor_ms": floor_bytes(config, tokens, sum(p.numel() for p in model.parameters())) / copy / 1e6}
    share = lambda row: f"{row['ms'] / busy:.1%}"
    print(table(groups, {"group": lambda row: row["group"], "ms": lambda row: f"{row['ms']:.2f}", "share": share}))
    print("\n" + table(rows[:20], {"operation": lambda row: row["operation"], "group": lambda row: row["group"],
                                   "calls": lambda row: str(row["calls"]), "ms": lambda row: f"{row['ms']:.2f}", "share": share}))
    print(f"\na step: {ms:.1f} ms, MFU {summary['mfu']:.0%} (goal at 32k tokens 45%), {tokens / ms * 1e3:,.0f} tokens/s; "
          f"kernels {busy:.1f} ms, of which elementwise {other:.1f} ms against a floor of {summary['floor_ms']:.1f} ms")

    gpu, slug = gpu_name(device)
    folder = args.out or (Path(tempfile.mkdtemp(prefix="profile-")) if args.dry_run else Path(__file__).parents[1] / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"profile-{slug}.json"
    write_json(path, {"gpu": gpu, "torch": torch.__version__, "commit": commit(), "tokens": tokens, **summary, "groups": groups,
                      "operations": rows})
    print(path)
    return 0


if __name__ == "__main__":
    command(main)
