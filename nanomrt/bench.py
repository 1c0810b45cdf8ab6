"""How fast sampling and a whole GRPO step are: beside their own matrix products, beside the same work without shared prefixes,
and beside Hugging Face's `generate` and TRL's `GRPOTrainer` where `transformers` and `trl` are installed.

    python -m nanomrt.bench             tables on the screen and results/sampler-<machine>.json
    python -m nanomrt.bench --dry-run   the same program on tiny sizes, in seconds

decode   prompts of 8 tokens, up to 12 rows of each as in RL, 70 new tokens a row, nobody stops: tokens per second. `products`
         is the floor: the same linear layers and nothing else. `alone` gives every row a prompt of its own. On a GPU also
         without CUDA graphs.
forks    64 traces of 108 tokens, 12 forced answers of 8 tokens in each: branches of the cached trace, against the same answers
         with every context prefilled again.
step     what an MRT step samples: 32 x 12 traces of 1 … 12 episodes of 9 tokens, and an answer forced at the end of each.
grpo     a whole step of GRPO: 32 x 12 rollouts of 70 tokens, which nobody ends, and the update; sampled tokens per second.

Providers take turns (TRL's trainer comes last, by itself), each figure is the median of the repetitions, and weights and tokens
are random. Timing belongs here and never in a test.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import train
from data.countdown import Countdown
from nanomrt import checkpoint
from nanomrt.config import RunConfig
from nanomrt.cudagraph import Recording, recording
from nanomrt.model import Llama, ModelConfig
from nanomrt.mrt import Batch, outcome_credit
from nanomrt.report import write_json
from nanomrt.run import commit
from nanomrt.sampler import Branches, Samples, Sampling, Segments, generate, prefill

PROMPT, NEW, GROUP = 8, 70, 12  # tokens, tokens, rows of one prompt
TRACE, ANSWER, FORKS, EPISODE = 108, 8, 12, 9
OURS = "nanomrt"


def small_llama(task: Countdown, device: str) -> Llama:
    """0.34M parameters, like the model of the published figures for a CPU."""
    config = ModelConfig(vocab_size=len(task.tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=3, num_key_value_heads=3, head_dim=32, max_position_embeddings=256)
    return Llama(config).initialise(torch.Generator().manual_seed(0)).to(device)


def medians(providers: dict[str, Callable[[], object]], repeats: int, label: str) -> dict[str, float]:
    """Seconds of each provider: one call to warm up, then all in turn, `repeats` times. One that fails is left out, with a line
    that says why: the others go on."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for name, call in tqdm([*providers.items()] * (repeats + 1), desc=label, leave=False):
        if name not in seconds:
            continue
        began = time.perf_counter()
        try:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as problem:  # whatever a peer dies of
            if name.startswith(OURS):
                raise
            tqdm.write(f"{label}, {name}: not available: {str(problem) or type(problem).__name__}", file=sys.stderr)
            del seconds[name]
            continue
        seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def random_rows(model: Llama, rows: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator).tolist()


# --- Providers ---


def ours(model: Llama, prompts: list[list[int]], rows: int) -> Callable[[], Samples]:
    """Prefill of the prompts and `NEW` sampled tokens for each of `rows` rows; no token stops."""
    owner = [r * len(prompts) // rows for r in range(rows)]
    branches = Branches.of(owner, [PROMPT - 1] * rows, [prompts[i][-1:] for i in owner], model.device,
                           torch.Generator().manual_seed(2))
    return lambda: generate(model, prefill(model, prompts), branches, Sampling(NEW, ()), keep=False)


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


def hugging_face(model: Llama, task: Countdown, prompts: list[list[int]], **options) -> Callable[[], object] | None:
    """`generate` of transformers with the same weights and the same sampling; None where it is not installed.
    options: such as cache_implementation="static", with which it compiles on a GPU."""
    theirs = their_llama(model, task)
    if theirs is None:
        return None
    ids = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(ids)
    return lambda: theirs.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=NEW, min_new_tokens=NEW,
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


def grpo_step(model: Llama, prompts: list[list[int]]) -> Callable[[], object]:
    """Rollouts and the update of train.py; rewards are arbitrary."""
    at_a_time = 2048 if model.device.type == "cpu" else 8192  # what suits the device, as in config/small.py
    config = RunConfig(steps=10**6, thinking_budget=NEW, micro_batch_tokens=at_a_time, learning_rate=1e-9)  # so the weights stay
    run = SimpleNamespace(config=config, step=0, ledger=Counter(), accept_gradient=lambda norm: True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rows = len(prompts) * GROUP
    sample, owner = ours(model, prompts, rows), torch.arange(len(prompts)).repeat_interleave(GROUP)

    def step() -> None:
        samples, device = sample(), model.device
        context = torch.tensor([prompts[i][:-1] for i in owner], device=device)
        tokens, before = torch.cat([context, samples.tokens], 1), torch.zeros_like(context)
        batch = Batch(tokens.flatten(), torch.full((rows,), tokens.shape[1], device=device),
                      torch.cat([before.bool(), samples.is_action], 1).flatten(),
                      torch.cat([before.float(), samples.logprobs], 1).flatten(), tokens.sum(1).float() % 2, owner.to(device),
                      torch.ones(rows, dtype=torch.bool, device=device))
        train.update(model, optimizer, batch, outcome_credit(batch, None, config), None, run)

    return step


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


# --- Tables ---


def decode_rows(model: Llama, task: Countdown, batches: list[int], repeats: int) -> list[dict]:
    rows = []
    for batch in batches:
        prompts = random_rows(model, batch, PROMPT)
        shared = prompts[: -(-batch // GROUP)]
        repeated = [shared[r * len(shared) // batch] for r in range(batch)]
        providers = {"nanomrt": ours(model, shared, batch), "nanomrt, alone": ours(model, prompts, batch),
                     "products": products(model, batch), "Hugging Face generate": hugging_face(model, task, repeated)}
        if model.device.type == "cuda":
            static = hugging_face(model, task, repeated, cache_implementation="static")
            providers["Hugging Face generate, static cache, compiled"] = static
            providers["Hugging Face generate_batch"] = continuous_batching(model, task, repeated)
            providers["nanomrt, no CUDA graphs"] = launched(providers["nanomrt"])
        seconds = medians({name: call for name, call in providers.items() if call}, repeats, f"decode, batch {batch}")
        rows += [{"case": f"batch {batch}", "provider": name, "seconds": value, "tokens_per_second": batch * NEW / value,
                  "times_nanomrt": value / seconds["nanomrt"], "share_of_floor": seconds["products"] / value}
                 for name, value in seconds.items()]
    return rows


def fork_rows(model: Llama, count: int, repeats: int) -> list[dict]:
    traces = random_rows(model, count, TRACE)
    places = [(t, TRACE * (j + 1) // FORKS) for t in range(count) for j in range(FORKS)]
    seconds = medians({"branches of the trace": forked(model, prefill(model, traces), places),
                       "prefilled again": prefilled_again(model, traces, places)}, repeats, "forks")
    return [{"case": f"{count} x {FORKS} forks", "provider": name, "seconds": value,
             "tokens_per_second": len(places) * ANSWER / value, "times_nanomrt": value / seconds["branches of the trace"]}
            for name, value in seconds.items()]


def step_rows(model: Llama, count: int, repeats: int) -> list[dict]:
    """Traces and forced answers of an MRT step with `count` prompts."""
    R, prompts = count * GROUP, random_rows(model, count, PROMPT)
    owner, generator = [r // GROUP for r in range(R)], torch.Generator().manual_seed(3)
    branches = Branches.of(owner, [PROMPT - 1] * R, [prompts[i][-1:] for i in owner], model.device, generator)
    episodes = torch.randint(1, TRACE // EPISODE + 1, (R,), generator=generator)
    sampling = Sampling((EPISODE * episodes).to(model.device), ())
    traces = lambda: generate(model, prefill(model, prompts), branches, sampling)
    places = [(r, PROMPT + EPISODE * (j + 1)) for r, n in enumerate(episodes.tolist()) for j in range(n)]
    answers = forked(model, traces().segments(), places)
    seconds = medians({"traces": traces, "forced answers": answers}, repeats, "step")
    tokens = {"traces": EPISODE * int(episodes.sum()), "forced answers": len(places) * ANSWER}
    return [{"case": f"step of {R} traces, {len(places)} forks", "provider": name, "seconds": value,
             "tokens_per_second": tokens[name] / value, "times_nanomrt": value / seconds["traces"]}
            for name, value in seconds.items()]


def grpo_rows(model: Llama, task: Countdown, count: int, repeats: int) -> list[dict]:
    prompts = random_rows(model, count, PROMPT)
    seconds = medians({"nanomrt": grpo_step(model, prompts)}, repeats, "GRPO step")
    try:
        seconds["TRL GRPOTrainer"] = trl_steps(model, task, prompts, repeats)
    except Exception as problem:  # whatever it dies of
        print(f"TRL GRPOTrainer: not available: {problem}", file=sys.stderr)
    return [{"case": f"GRPO step of {count * GROUP} rollouts", "provider": name, "seconds": value,
             "tokens_per_second": count * GROUP * NEW / value, "times_nanomrt": value / seconds["nanomrt"]}
            for name, value in seconds.items() if value]


def table(rows: list[dict]) -> str:
    lines = ["| case | provider | ms | tokens/s | x our time |", "|---|---|---|---|---|"]
    lines += [f"| {row['case']} | {row['provider']} | {1e3 * row['seconds']:.1f} | {row['tokens_per_second']:,.0f} | "
              f"{row['times_nanomrt']:.2f} |" for row in rows]
    return "\n".join(lines)


def main(argv: list[str]) -> Path:
    parser = argparse.ArgumentParser(prog="python -m nanomrt.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: everything but the figures")
    parser.add_argument("--repeats", type=int, default=7, help="calls of each provider, of which the median counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, help="folder of the JSON file (default: results; a dry run: a temporary one)")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    task = Countdown(RunConfig())
    model = small_llama(task, device)
    batches, count, repeats = ([1, 2], 2, 1) if arguments.dry_run else ([1, 64, 384], 64, arguments.repeats)
    home = Path(__file__).parents[1] / "results"
    folder = arguments.out or (Path(tempfile.mkdtemp(prefix="bench-")) if arguments.dry_run else home)
    folder.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name().replace(" ", "-").lower() if device == "cuda" else f"cpu{torch.get_num_threads()}"
    path = folder / f"sampler-{machine}.json"
    found = {"rows": [], "torch": torch.__version__, "commit": commit(), "machine": machine, "cores": os.cpu_count(),
             "python": platform.python_version()}
    for part in (partial(decode_rows, model, task, batches, repeats), partial(fork_rows, model, count, repeats),
                 partial(step_rows, model, -(-count // 2), repeats), partial(grpo_rows, model, task, -(-count // 2), repeats)):
        found["rows"] += part()
        write_json(path, found)  # what is measured stays, whatever comes next
    print(table(found["rows"]))
    return path


if __name__ == "__main__":
    print(f"\n{main(sys.argv[1:])}")
