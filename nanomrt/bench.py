"""How fast sampling and a whole GRPO step are: beside their own matrix products, beside the same work without shared prefixes,
and beside Hugging Face's `generate` and TRL's `GRPOTrainer` where `transformers` and `trl` are installed.

    python -m nanomrt.bench                   tables on the screen and results/sampler-<machine>.json
    python -m nanomrt.bench --only roofline   one part
    python -m nanomrt.bench --dry-run         the same program on tiny sizes, in seconds

decode    prompts of 8 tokens, up to 12 rows of each as in RL, 70 new tokens a row, nobody stops: tokens per second. `products`
          is the floor: the same linear layers and nothing else. `alone` gives every row a prompt of its own. On a GPU also
          without CUDA graphs. `ragged` is RL's real case: each row has 1 … 70 new tokens; `generate` goes on to the longest.
forks     64 traces of 108 tokens, 12 forced answers of 8 tokens in each: branches of the cached trace, against the same answers
          with every context prefilled again.
step      an MRT step in GRPO's schedule: 32 x 12 traces of 1 … 12 episodes of 9 tokens, an answer forced at the end of each, and
          the update. Without forced answers it is a GRPO step: their share is the price of MRT.
grpo      a whole step of GRPO: 32 x 12 rollouts of 70 tokens, which nobody ends, and the update; sampled tokens per second.
roofline  only on a GPU: a decoding step of a 1.5B model over long random contexts, against `step_floor` at the rates of a copy
          and a matrix product that are measured just before; and 64 prefixes of 16 rows against a prefix for every row.

Providers take turns (TRL's trainer comes last, by itself), each figure is the median of the repetitions, and weights and tokens
are random. Timing belongs here and never in a test.
"""

import argparse
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm

import train
from data.countdown import Countdown
from kernels.bench import machine, table
from kernels.profile import QWEN_1_5B, TINY
from nanomrt import checkpoint
from nanomrt.config import RunConfig
from nanomrt.cudagraph import Recording, recording
from nanomrt.files import write_json
from nanomrt.model import Llama, ModelConfig, compute_dtype, mixed_precision
from nanomrt.mrt import Batch, outcome_credit
from nanomrt.run import commit, processor
from nanomrt.sampler import Branches, Rows, Samples, Sampling, Segments, Slots, decode, generate, new_cache, prefill

PROMPT, NEW, GROUP = 8, 70, 12  # tokens, tokens, rows of one prompt
TRACE, ANSWER, FORKS, EPISODE = 108, 8, 12, 9
STEPS = 32  # of decoding, that the roofline part times together
PARTS = ("decode", "forks", "step", "grpo", "roofline")
PEERS = GENERATE, STATIC, PAGED, TRL = (
    "Hugging Face generate", "Hugging Face generate, static cache, compiled", "Hugging Face generate_batch", "TRL GRPOTrainer")
GOALS = {1: (0.60, 0.75), 64: (0.45, 0.60), 256: (0.50, 0.65)}  # rows: minimum and target share of a step's floor


def small_llama(task: Countdown, device: str) -> Llama:
    """0.34M parameters: on a CPU what stands around the products decides, as in config/small.py."""
    config = ModelConfig(vocab_size=len(task.tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=3, num_key_value_heads=3, head_dim=32, max_position_embeddings=256)
    return Llama(config).initialise(torch.Generator().manual_seed(0)).to(device)


# --- Timing ---


class TooSlow(BaseException):
    """Not an `Exception`: libraries catch those and go on."""


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call, and of what it leaves to the GPU."""
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass
class Timing:
    """How often providers are called, and which peers are not, or not any more."""

    repeats: int
    limit: float = 60.0  # seconds
    without: set[str] = field(default_factory=set)

    def attempt(self, label: str, peer: str, call: Callable[[], object]) -> object:
        """What `call` returns; None from a peer that is left out. One that fails, or is not done after `limit` seconds, is left
        out from then on, with a line that says why: the others go on. The alarm interrupts Python between two instructions: it
        has to wait for a call of a library that hangs."""
        if peer in self.without:
            return None

        def ring(*_) -> None:
            raise TooSlow(f"not done after {self.limit:g} s")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, self.limit)
        try:
            return call()
        except (Exception, TooSlow) as problem:  # whatever a peer dies of
            self.without.add(peer)
            tqdm.write(f"{label}, {peer}: left out from here on: {str(problem) or type(problem).__name__}", file=sys.stderr)
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def medians(self, label: str, providers: dict[str, Callable[[], object]],
                peers: dict[str, Callable[[], Callable[[], object] | None]] | None = None) -> dict[str, float]:
        """Seconds of each provider: one call to warm up, then all in turn, `repeats` times. peers: what makes their calls, None
        where they are not installed."""
        clocks = {name: partial(timed, call) for name, call in providers.items()}
        for name, prepare in (peers or {}).items():
            if call := self.attempt(label, name, prepare):
                clocks[name] = partial(self.attempt, label, name, partial(timed, call))
        seconds: dict[str, list[float]] = {name: [] for name in clocks}
        for name, clock in tqdm([*clocks.items()] * (self.repeats + 1), desc=label, leave=False):
            seconds[name].append(clock())
        return {name: statistics.median(values[1:]) for name, values in seconds.items() if name not in self.without}


def random_rows(model: Llama, rows: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator).tolist()


# --- Providers ---


def ours(model: Llama, prompts: list[list[int]], budgets: Tensor) -> Callable[[], Samples]:
    """Prefill of the prompts and budgets[r] (R,) sampled tokens for each row; no token stops."""
    R, sampling = len(budgets), Sampling(budgets.to(model.device), ())
    owner = [r * len(prompts) // R for r in range(R)]
    branches = Branches.of(owner, [PROMPT - 1] * R, [prompts[i][-1:] for i in owner], model.device,
                           torch.Generator().manual_seed(2))
    return lambda: generate(model, prefill(model, prompts), branches, sampling, keep=False)


@torch.no_grad()
def products(model: Llama, rows: int) -> Callable[[], object]:
    """The linear layers and the head of NEW decoding steps, and nothing else; on a GPU they are replayed as our steps are."""
    weights = [m.weight.to(model.head.dtype) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=w.device, dtype=w.dtype) for w in weights}
    once = lambda: [torch.nn.functional.linear(inputs[weight.shape[1]], weight) for weight in weights]

    @torch.no_grad()
    def multiply() -> None:
        with recording(once, model.device) as step:
            for _ in range(NEW):
                step()

    return multiply


def their_llama(model: Llama, task: Countdown):
    """The same weights as a model of transformers; None where it is not installed."""
    try:
        from transformers import LlamaForCausalLM
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "model", model, task.tokenizer, {})
        return LlamaForCausalLM.from_pretrained(Path(folder) / "model").to(model.device, model.head.dtype)


def continuous_batching(model: Llama, task: Countdown, prompts: list[list[int]]) -> Callable[[], object] | None:
    """transformers' paged sampler, whose slots are refilled, too. On a CPU it takes 20 s for 64 rows: it is left out there."""
    theirs = their_llama(model, task)
    if theirs is None:
        return None
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)

    def call() -> None:
        outputs = theirs.generate_batch(inputs=prompts, generation_config=config, progress_bar=False).values()
        if (found := sum(len(output.generated_tokens) for output in outputs)) != len(prompts) * NEW:
            raise RuntimeError(f"{found} tokens instead of {len(prompts) * NEW}")

    return call


def hugging_face(model: Llama, task: Countdown, prompts: list[list[int]], new: int, **options) -> Callable[[], object] | None:
    """`generate` of transformers with the same weights and the same sampling, `new` tokens for every row; None where it is not
    installed. options: such as cache_implementation="static", with which it compiles on a GPU."""
    theirs = their_llama(model, task)
    if theirs is None:
        return None
    ids = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(ids)
    return lambda: theirs.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new,
                                   pad_token_id=0, eos_token_id=None, **options)


def launched(call: Callable[[], object]) -> Callable[[], object]:
    """The same, with every kernel launched by itself instead of CUDA graphs."""
    def without_graphs() -> None:
        capture, Recording.capture = Recording.capture, lambda self: None
        try:
            call()
        finally:
            Recording.capture = capture

    return without_graphs


def forked(model: Llama, segments: Segments, places: list[tuple[int, int]]) -> Callable[[], object]:
    """Answers as branches of traces that are cached already, as in training."""
    branches = Branches.of([t for t, _ in places], [p for _, p in places], [[1, 2]] * len(places), model.device)
    return lambda: generate(model, segments, branches, Sampling(ANSWER, (), 0.0), keep=False)


def prefilled_again(model: Llama, traces: list[list[int]], places: list[tuple[int, int]]) -> Callable[[], object]:
    """The same answers, each from a context of its own."""
    contexts = [traces[t][:p] for t, p in places]
    branches = Branches.of(range(len(places)), [p for _, p in places], [[1, 2]] * len(places), model.device)
    return lambda: generate(model, prefill(model, contexts), branches, Sampling(ANSWER, (), 0.0), keep=False)


def updating(model: Llama, prompts: list[list[int]], owner: list[int]) -> Callable[[Samples], object]:
    """The update of train.py on rollouts of these prompts; rewards are arbitrary, and the weights stay."""
    at_a_time = 2048 if model.device.type == "cpu" else 8192  # what suits the device, as in config/small.py
    config = RunConfig(steps=10**6, thinking_budget=NEW, micro_batch_tokens=at_a_time, learning_rate=1e-9)
    run = SimpleNamespace(config=config, step=0, ledger=Counter(), accept_gradient=lambda norm: True)
    optimizer, device = torch.optim.AdamW(model.parameters(), fused=True), model.device
    context = torch.tensor([prompts[i][:-1] for i in owner], device=device)  # (R,P-1)
    group = torch.tensor(owner, device=device)  # (R,)

    def update(samples: Samples) -> None:
        step = torch.arange(samples.tokens.shape[1], device=device)  # (T,)
        there = torch.cat([torch.ones_like(context), step < samples.lengths[:, None]], 1).bool()  # (R,P-1+T)
        tokens, before = torch.cat([context, samples.tokens], 1), torch.zeros_like(context)
        batch = Batch(tokens[there], there.sum(1), torch.cat([before.bool(), samples.is_action], 1)[there],
                      torch.cat([before.float(), samples.logprobs], 1)[there], tokens.sum(1).float() % 2, group,
                      torch.ones_like(group, dtype=torch.bool))
        train.update(model, optimizer, batch, outcome_credit(batch, None, config), None, run)

    return update


def grpo_step(model: Llama, prompts: list[list[int]]) -> Callable[[], object]:
    """Rollouts of one length, and the update."""
    sample = ours(model, prompts, torch.full((len(prompts) * GROUP,), NEW))
    update = updating(model, prompts, [i for i in range(len(prompts)) for _ in range(GROUP)])
    return lambda: update(sample())


def trl_steps(model: Llama, task: Countdown, prompts: list[list[int]], repeats: int) -> float | None:
    """Median seconds of a step of TRL's GRPOTrainer after the first; None where it is not installed."""
    try:
        from datasets import Dataset
        from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return None
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "model", model, task.tokenizer, {})
        theirs = LlamaForCausalLM.from_pretrained(Path(folder) / "model")
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
        tokenizer.pad_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens([0, task.close_answer])
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=len(prompts) * GROUP, num_generations=GROUP, max_completion_length=NEW,
            generation_kwargs={"min_new_tokens": NEW}, top_k=0, beta=0.0, max_steps=repeats + 1, learning_rate=1e-9,
            use_cpu=model.device.type == "cpu", bf16=model.device.type == "cuda", gradient_checkpointing=False,
            save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True)
        GRPOTrainer(model=theirs, args=config, processing_class=tokenizer, callbacks=[Clock()],
                    reward_funcs=lambda completion_ids, **_: [sum(ids) % 2 for ids in completion_ids],
                    train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in prompts]})).train()
    return statistics.median(b - a for a, b in zip(ends, ends[1:]))


def step_floor(model: Llama, rows: int, entries: float, copy: float, matmul: float) -> float:
    """Least seconds of a decoding step: products read each weight once, or take as long as their arithmetic; then attention reads
    `entries` cached tokens once. copy: bytes/s; matmul: FLOP/s.

    A weight has the bytes of the type that is multiplied: bf16 on a GPU, because `mixed_precision` copies the fp32 weights once
    and not in every step. A tied embedding counts once, as the head; the lines that are looked up, norms and biases don't."""
    config, size = model.config, compute_dtype(model.device).itemsize
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # keys and values of a token
    return max(weights * size / copy, 2 * rows * weights / matmul) + entries * cached * size / copy


@torch.no_grad()
def step_seconds(model: Llama, S: int, M: int, L: int, t: int, timing: Timing, label: str) -> float:
    """Seconds of a decoding step for M rows of each of S prefixes of L random tokens, with t random tokens of their own. What
    `generate` does once a call, such as recording the step, is left out of it."""
    R, T, device = S * M, t + STEPS + 1, model.device  # one token more than is ever said: nobody finishes
    segments = Segments(*(new_cache(model, S, L).normal_() for _ in "kv"), torch.arange(L, device=device).expand(S, L))
    branches = Branches.of([r // M for r in range(R)], [L] * R, [[1]] * R, device, torch.Generator().manual_seed(2))
    sampling, nothing = Sampling(T - 1, ()), torch.empty(0, 1, dtype=torch.int64, device=device)
    rows, slots, head = Rows.of(branches, sampling), Slots(model, segments, branches, T, R, keep=False), model.head
    for cache in (slots.keys, slots.values):
        cache.normal_()
    slots.reserve(T)
    with mixed_precision(device), recording(lambda: decode(model, head, rows, slots, nothing, sampling), device) as step:
        def steps() -> None:
            rows.last.fill_(t)
            for _ in range(STEPS):
                step()

        return timing.medians(label, {"step": steps})["step"] / STEPS


# --- Tables ---


def decode_rows(model: Llama, task: Countdown, cases: dict[str, Tensor], timing: Timing) -> list[dict]:
    """cases: by name, how many tokens each row says. No others count, though a peer may have to sample more."""
    rows = []
    for case, budgets in cases.items():
        batch, tokens, longest = len(budgets), int(budgets.sum()), int(budgets.max())
        ragged = tokens < batch * NEW
        prompts = random_rows(model, batch, PROMPT)
        shared = prompts[: -(-batch // GROUP)]
        repeated = [shared[r * len(shared) // batch] for r in range(batch)]
        providers = {"nanomrt": ours(model, shared, budgets), "nanomrt, alone": ours(model, prompts, budgets)}
        peers = {GENERATE: partial(hugging_face, model, task, repeated, longest)}
        if not ragged:
            providers["products"] = products(model, batch)
        if model.device.type == "cuda":
            providers["nanomrt, no CUDA graphs"] = launched(providers["nanomrt"])
            peers[STATIC] = partial(peers[GENERATE], cache_implementation="static")
            if not ragged:  # it knows no budgets of single rows
                peers[PAGED] = partial(continuous_batching, model, task, repeated)
        seconds = timing.medians(f"decode, {case}", providers, peers)
        rows += [{"case": case, "provider": name, "seconds": value, "tokens_per_second": tokens / value,
                  "times_nanomrt": value / seconds["nanomrt"], "share_of_floor": None if ragged else seconds["products"] / value}
                 for name, value in seconds.items()]
    return rows


def fork_rows(model: Llama, count: int, timing: Timing) -> list[dict]:
    traces = random_rows(model, count, TRACE)
    places = [(t, TRACE * (j + 1) // FORKS) for t in range(count) for j in range(FORKS)]
    seconds = timing.medians("forks", {"branches of the trace": forked(model, prefill(model, traces), places),
                                       "prefilled again": prefilled_again(model, traces, places)})
    return [{"case": f"{count} x {FORKS} forks", "provider": name, "seconds": value,
             "tokens_per_second": len(places) * ANSWER / value, "times_nanomrt": value / seconds["branches of the trace"]}
            for name, value in seconds.items()]


def step_rows(model: Llama, count: int, timing: Timing) -> list[dict]:
    """Traces, forced answers and the update of an MRT step with `count` prompts, in GRPO's schedule: one pass."""
    R, prompts = count * GROUP, random_rows(model, count, PROMPT)
    owner, generator = [r // GROUP for r in range(R)], torch.Generator().manual_seed(3)
    branches = Branches.of(owner, [PROMPT - 1] * R, [prompts[i][-1:] for i in owner], model.device, generator)
    episodes = torch.randint(1, TRACE // EPISODE + 1, (R,), generator=generator)
    sampling = Sampling((EPISODE * episodes).to(model.device), ())
    traces = lambda: generate(model, prefill(model, prompts), branches, sampling)
    places = [(r, PROMPT + EPISODE * (j + 1)) for r, n in enumerate(episodes.tolist()) for j in range(n)]
    sampled, update = traces(), updating(model, prompts, owner)
    seconds = timing.medians("step", {"traces": traces, "forced answers": forked(model, sampled.segments(), places),
                                      "update": lambda: update(sampled)})
    trained = EPISODE * int(episodes.sum())
    tokens = {"traces": trained, "forced answers": len(places) * ANSWER, "update": trained}
    return [{"case": f"step of {R} traces, {len(places)} forks", "provider": name, "seconds": value,
             "tokens_per_second": tokens[name] / value, "times_nanomrt": value / seconds["traces"],
             "share_of_step": value / sum(seconds.values())}
            for name, value in seconds.items()]


def grpo_rows(model: Llama, task: Countdown, count: int, timing: Timing) -> list[dict]:
    prompts = random_rows(model, count, PROMPT)
    seconds = timing.medians("GRPO step", {"nanomrt": grpo_step(model, prompts)})
    seconds[TRL] = timing.attempt("GRPO step", TRL, partial(trl_steps, model, task, prompts, timing.repeats))
    return [{"case": f"GRPO step of {count * GROUP} rollouts", "provider": name, "seconds": value,
             "tokens_per_second": count * GROUP * NEW / value, "times_nanomrt": value / seconds["nanomrt"]}
            for name, value in seconds.items() if value]


def roofline_rows(config: ModelConfig, device: str, shapes: list[tuple[int, int, int, int]], timing: Timing) -> list[dict]:
    """shapes: prefixes, rows of each, tokens of a prefix, tokens of a row's own. Rows that share are also measured with nothing
    shared, against the same floor, if there is room for it."""
    copy, matmul = (row["value"] for row in machine(device, compute_dtype(torch.device(device)), 10, 30))
    with torch.device(device):
        model = Llama(config)  # whatever the weights are
    rows = []
    for S, M, L, t in shapes:
        case, R, seconds = f"roofline, {S} x {M} rows, {L} + {t} tokens", S * M, {}
        floor = step_floor(model, R, S * L + R * (t + (STEPS + 1) / 2), 1e9 * copy, 1e12 * matmul)  # a new token is read, too
        try:
            seconds["nanomrt"] = step_seconds(model, S, M, L, t, timing, case)
            if M > 1:
                seconds["nanomrt, nothing shared"] = step_seconds(model, R, 1, L, t, timing, f"{case}, nothing shared")
        except torch.OutOfMemoryError:
            print(f"{case}: no room for {'more' if seconds else 'it'}", file=sys.stderr)
        rows += [{"case": case, "provider": name, "seconds": value, "tokens_per_second": R / value,
                  "times_nanomrt": value / seconds["nanomrt"], "share_of_floor": floor / value, "goal": GOALS.get(R),
                  "copy_gbs": copy, "matmul_tflops": matmul} for name, value in seconds.items()]
    return rows


COLUMNS = {
    "case": lambda row: row["case"],
    "provider": lambda row: row["provider"],
    "ms": lambda row: f"{1e3 * row['seconds']:.2f}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "x our time": lambda row: f"{row['times_nanomrt']:.2f}",
    "of the step": lambda row: f"{row['share_of_step']:.0%}",
    "of the floor": lambda row: f"{row['share_of_floor']:.0%}",
    "goal": lambda row: "{:.0%} / {:.0%}".format(*row["goal"]),
}


# --- The program ---


def versions() -> dict[str, str]:
    """Of the packages that are timed here and installed; none is imported for it."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "trl"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def main(argv: list[str]) -> Path:
    parser = argparse.ArgumentParser(prog="python -m nanomrt.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--without", nargs="+", choices=PEERS, default=[], metavar="PEER",
                        help=f"peers to leave out, of: {'; '.join(PEERS)}")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a peer may take for a call, compiling in the first "
                        "one too, and a trainer for all its steps: then it is interrupted, or, where that can't be done, waited "
                        "for, and in either case not called again (0: no limit)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: everything but the figures")
    parser.add_argument("--repeats", type=int, default=7, help="calls of each provider, of which the median counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, help="folder of the JSON file (default: results; a dry run: a temporary one)")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, dry = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"), arguments.dry_run
    chosen = [part for part in PARTS if arguments.only in (None, part) and (part != "roofline" or device == "cuda" or dry)]
    if not chosen:
        parser.error("the roofline needs a CUDA device; with --dry-run a tiny model walks through it without one")
    task = Countdown(RunConfig())
    model, timing = small_llama(task, device), Timing(1 if dry else arguments.repeats, arguments.limit, set(arguments.without))
    batches, count, half = ([2], 2, 1) if dry else ([1, 64, 256, 384], 64, 32)
    cases = {f"batch {batch}": torch.full((batch,), NEW) for batch in batches}
    cases[f"batch {batches[-1]}, ragged"] = torch.randint(1, NEW + 1, batches[-1:], generator=torch.Generator().manual_seed(4))
    shapes = [(2, 1, 8, 0), (2, 3, 8, 4)] if dry else [(1, 1, 1024, 0), (64, 1, 1024, 0), (256, 1, 1024, 0), (256, 1, 4096, 0),
                                                       (64, 16, 4096, 256)]
    home = Path(__file__).parents[1] / "results"
    folder = arguments.out or (Path(tempfile.mkdtemp(prefix="bench-")) if dry else home)
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name().replace(" ", "-").lower() if device == "cuda" else f"cpu{torch.get_num_threads()}"
    path = folder / f"{'-'.join(filter(None, ['sampler', name, arguments.only]))}.json"
    found = {"rows": [], "versions": versions(), "commit": commit(), "machine": name, "processor": processor(),
             "cores": os.cpu_count()}
    parts = {"decode": partial(decode_rows, model, task, cases), "forks": partial(fork_rows, model, count),
             "step": partial(step_rows, model, half), "grpo": partial(grpo_rows, model, task, half),
             "roofline": partial(roofline_rows, TINY if dry else QWEN_1_5B, device, shapes)}
    for part in chosen:
        found["rows"] += parts[part](timing)
        write_json(path, found)  # what is measured stays, whatever comes next
    print(table(found["rows"], COLUMNS))
    return path


if __name__ == "__main__":
    print(f"\n{main(sys.argv[1:])}")
