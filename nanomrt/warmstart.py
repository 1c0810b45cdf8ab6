"""The warm start: supervised learning of traces, and the gates that it must pass before RL begins.

Countdown's are search traces with flaws, learned from nothing; GSM8K's are people's solutions, learned by a pretrained model. RL
from a policy that can't check its own attempts teaches nothing, so what matters is measured on its own samples first: are
intermediate results right, does `yes` mean yes, and does an answer follow from a solved trace?

Batches are drawn in random order and the loss is divided by a constant: batches sorted by length, each averaged over its
own tokens, would weigh short traces more and teach the model to stop early.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import kernels
from data.task import Task
from nanomrt import checkpoint, report
from nanomrt.config import TASK_KEYS, RunConfig, UserError
from nanomrt.model import Llama, ModelConfig, Packed, micro_batches
from nanomrt.rollout import roll_out, training_sampling
from nanomrt.tokenizer import Tokenizer


def warm_optimizers(model: Llama, config: RunConfig) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for everything else: embeddings are no linear maps, norms no matrices. Without a
    learning rate for Muon, AdamW for all: it has pretrained them."""
    is_hidden = lambda name, p: p.ndim == 2 and "layers" in name and config.warm_muon_lr > 0
    hidden = [p for name, p in model.named_parameters() if is_hidden(name, p)]
    other = [p for name, p in model.named_parameters() if not is_hidden(name, p)]
    muon = [torch.optim.Muon(hidden, lr=config.warm_muon_lr, weight_decay=0.0)] if hidden else []
    return [*muon, torch.optim.AdamW(other, lr=config.warm_adamw_lr, weight_decay=0.0, betas=(0.9, 0.95))]


class Fp32(TorchFunctionMode):
    """Inside, what asks for bfloat16 gets a copy in fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0].to(torch.float32, copy=True) if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


def muon_precision(device: torch.device) -> AbstractContextManager:
    """PyTorch's Muon orthogonalises in bf16, which takes a CPU without AVX-512 12 times as long as fp32: half of a warm start."""
    fast = device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return nullcontext() if fast else Fp32()


STAGES = ("warm", "warm again")  # of `warm_steps` each: checking is learned suddenly, and who fails a gate gets a second stage


def warm_start(model: Llama, task: Task, config: RunConfig, stage: str = STAGES[0]) -> Iterator[torch.Tensor]:
    """Train `model` in place; yields the loss of each step, (). Problems and traces are those of this stage. Reading a
    loss waits for a GPU; while none is read, the GPU works and the next traces are written meanwhile."""
    device = model.device
    rng = random.Random(f"{config.seed}/{stage}")
    problems = task.draws("train", f"{config.seed}/{stage}")
    optimizers = warm_optimizers(model, config)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peak = [group["lr"] for group in groups]
    scale = 1 / (config.warm_batch * task.trace_tokens)  # the constant normaliser
    for step in range(config.warm_steps):
        rows, weights = [], []
        for problem in islice(problems, config.warm_batch):
            prompt, (response, weight) = task.prompt(problem), task.warm_trace(problem, rng)
            rows.append(prompt + response)
            weights.append([0.0] * len(prompt) + weight)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for part in micro_batches(torch.tensor([len(row) for row in rows]), config.micro_batch_tokens):
            loss += learn(model, [rows[i] for i in part], [weights[i] for i in part], scale)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        done = step / config.warm_steps
        share = min(1.0, (step + 1) / 20, (1 - done) / 0.5)  # of the peak rate: up over 20 steps, down over the second half
        for group, lr in zip(groups, peak):
            group["lr"] = lr * share
        with muon_precision(device):
            for optimizer in optimizers:
                optimizer.step()
        yield loss


def learn(model: Llama, rows: Sequence[list[int]], weights: Sequence[list[float]], scale: float) -> torch.Tensor:
    """Add the gradient of some token sequences to what is there. Returns their loss, (): minus the weighted log-probs, scaled."""
    device = model.device
    tokens = torch.tensor([token for row in rows for token in row], device=device)  # (N,)
    packed = Packed.of(torch.tensor([len(row) for row in rows], device=device))
    weight = torch.tensor([w for row in weights for w in row], device=device)  # (N,)
    weighted = weight.nonzero().squeeze(1)  # never a sequence's first token
    hidden = model(tokens, packed.position_ids, packed)  # (N,C)
    logprob, _ = kernels.token_logprobs(hidden[weighted - 1], model.head, tokens[weighted], 1.0)
    loss = -(logprob * weight[weighted]).sum() * scale
    loss.backward()
    return loss.detach()


PRETRAINED = ("config.json", "model.safetensors", "tokenizer.json")  # the files of a model that are read
# Besides trace_* and warm_*: what the data, the network and its training depend on.
SHAPING_KEYS = ("task", "seed", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "qk_norm", "max_position_embeddings", "grad_clip")


def gates(model: Llama, task: Task, config: RunConfig) -> dict[str, tuple[float, float]]:
    """(measured, required) of each gate, on the model's own rollouts of validation problems."""
    problems = task.problems("validation", config.eval_problems, "gates")
    rollouts = roll_out(model, task, problems, 1, training_sampling(task, config), torch.Generator().manual_seed(config.seed))
    measured = task.audit(rollouts.problems, rollouts.responses(), rollouts.reward)
    return {name: (value, getattr(config, f"gate_{name}")) for name, value in measured.items()}


def shaping(config: RunConfig) -> dict:
    """The keys that shape a warm start, with their values, and hashes of the files that some of them name."""
    keys = {name: value for name, value in asdict(config).items()
            if name.startswith(("trace_", "warm_")) or name in (*SHAPING_KEYS, *TASK_KEYS[config.task])}
    data = [Path(config.data_dir) / name for name in ("train.jsonl", "test.jsonl")]  # what the test asks is not learned
    named = [*data, *map(Path(config.warm_from).joinpath, PRETRAINED)] if config.warm_from else []
    return keys | {str(path): checkpoint.sha256(path) for path in named if path.is_file()}


def warm_folder(config: RunConfig, stage: str = STAGES[0]) -> Path:
    """Where a stage of this config's warm start is cached; its name is a hash of what shapes it, so runs that differ in RL share
    it."""
    digest = hashlib.sha256(json.dumps(shaping(config), sort_keys=True).encode()).hexdigest()[:10]
    return Path(config.out_dir) / f"{stage.replace(' ', '-')}-{digest}"


def untrained(task: Task, config: RunConfig) -> Llama:
    """What the warm start trains: a new network, or the pretrained one with the task's tags. Raises UserError if that can't be
    loaded."""
    if not config.warm_from:
        shape = {f.name: getattr(config, f.name) for f in fields(ModelConfig) if hasattr(config, f.name)}
        return Llama(ModelConfig(len(task.tokenizer), **shape)).initialise(torch.Generator().manual_seed(config.seed))
    folder = Path(config.warm_from)
    model, known = checkpoint.load_model(folder), len(Tokenizer.load(folder / "tokenizer.json"))
    if model.config.vocab_size < known:
        raise UserError(f"{folder}: its tokenizer has {known} tokens, its model {model.config.vocab_size}: take another model")
    check_context(model, folder, config)
    return with_vocabulary(model, known, len(task.tokenizer))


def check_context(model: Llama, folder: Path, config: RunConfig) -> None:
    """Raises UserError if what a run feeds may be longer than the context of its model, which is from `folder`."""
    if (most := model.config.max_position_embeddings) < config.longest_context:
        raise UserError(f"{folder} has a context of {most} tokens, but prompt + budget + answer can take "
                        f"{config.longest_context}: {config.shorten}")


def with_vocabulary(model: Llama, known: int, size: int) -> Llama:
    """The same model for a vocabulary of `size` tokens. The first `known` keep their embeddings; each other one begins as their
    mean, which is likelier than a random one to be somewhere that the layers can read. Rows that no token had are dropped."""
    weights = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = weights[name][:known]
        weights[name] = torch.cat([rows, rows.mean(0, keepdim=True).expand(size - known, -1)])
    grown = Llama(replace(model.config, vocab_size=size))
    grown.load_state_dict(weights)
    return grown


def failed_gates(model: Llama, task: Task, config: RunConfig) -> list[str]:
    """Show the gates; what to do about each that failed."""
    failed = []
    for name, (measured, required) in gates(model, task, config).items():
        print(f"  gate {name:<16} {measured:.3f}  (needs {required:.2f})  {'ok' if measured >= required else 'FAILED'}")
        failed += [task.GATE_ADVICE[name]] if measured < required else []
    return failed


def cached_warm_start(task: Task, config: RunConfig, device: str, force: bool) -> Path:
    """The checkpoint folder of the first stage of this config's warm start that passes the gates. A stage is trained if it isn't
    there, and saved. Raises UserError with advice if a gate fails after the last, unless `force`, which takes the first."""
    model = None
    for stage in STAGES:
        folder = warm_folder(config, stage)
        if checkpoint.damage(folder) is None:
            print(f"warm start: {folder}, trained before")
            model = checkpoint.load_model(folder, device)
        else:
            report.check_writable(folder)
            model = (model or untrained(task, config)).to(device)
            with tqdm(total=config.warm_steps, desc=stage.replace("warm", "warm start"), unit="step", mininterval=2.0) as bar:
                for loss in warm_start(model, task, config, stage):
                    if bar.n % 10 == 0:  # reading a loss waits for the device
                        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                    bar.update()
            if not checkpoint.finite(model.parameters()):
                raise UserError("the warm start diverged: lower warm_muon_lr or warm_adamw_lr")
            checkpoint.save(folder, model, task.tokenizer, {"eos_token_id": task.close_answer}, state={"config": shaping(config)})
        failed = failed_gates(model, task, config)
        if not failed or force:
            return folder
    raise UserError("the warm start is not ready for RL: " + "; ".join(failed) + ". --force goes on regardless")
