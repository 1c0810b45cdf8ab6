"""Checkpoint folders in the Hugging Face layout: safetensors and JSON, nothing that could run code.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json
    optimizer.safetensors  trainer.json      what an interrupted run needs besides the weights
    manifest.json                            SHA-256 of every file above

A folder is written aside (nanomrt/files.py), flushed to the disk and renamed, so a checkpoint that has its name is whole. The
manifest catches what happens to it later. `newest` passes over a damaged one, says so, and takes the one before.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanomrt.config import UserError
from nanomrt.files import aside, write_json
from nanomrt.model import Llama, ModelConfig
from nanomrt.tokenizer import Tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def save(folder: Path, model: Llama, tokenizer: Tokenizer, generation: dict, optimizer: torch.optim.Optimizer | None = None,
         state: dict | None = None) -> None:
    """Write a checkpoint, all of it or none. `state` is JSON: step, counters, whatever `load_training` should return."""
    written = aside(folder)
    written.mkdir(parents=True)
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]  # the same tensor as the embedding; Hugging Face leaves it out too
    save_file(weights, written / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(written / "tokenizer.json")
    write_json(written / "config.json", to_hf(model.config))
    write_json(written / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                                   "model_max_length": model.config.max_position_embeddings})
    write_json(written / "generation_config.json", generation)
    if optimizer is not None:
        save_file(_flatten(optimizer), written / "optimizer.safetensors")
    write_json(written / "trainer.json", state or {})
    write_json(written / "manifest.json", {path.name: sha256(path) for path in sorted(written.iterdir())})
    for path in (*written.iterdir(), written):
        _flush(path)
    replaced = written.with_suffix(".replaced")
    with suppress(FileNotFoundError):  # nothing to replace, or another process has just begun to
        folder.rename(replaced)
    written.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((folder / "manifest.json").read_text()).items()
    except (OSError, ValueError, AttributeError):
        return "manifest.json is missing or unreadable"
    for name, digest in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is not what was written"
    return None


def newest(checkpoints: Path) -> Path:
    """The newest good checkpoint among step-… folders; names every damaged one on stderr. Raises UserError."""
    for folder in sorted(checkpoints.glob("step-*"), key=lambda folder: (len(folder.name), folder.name), reverse=True):
        problem = damage(folder)
        if problem is None:
            return folder
        print(f"warning: checkpoint {folder} is damaged ({problem}); using the one before", file=sys.stderr)
    raise UserError(f"no good checkpoint in {checkpoints}: train first, with python train.py config/small.py")


def load_model(folder: Path, device: str | torch.device = "cpu", kind: type[Llama] = Llama) -> Llama:
    """A model from a checkpoint folder, ours or Hugging Face's (one model.safetensors). Raises UserError when a file is
    missing or damaged, does not fit the other, or asks for what is not supported."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no checkpoint folder: it has no {name} (weights in several files, or in "
                                    "pytorch_model.bin: load them with transformers, and save_pretrained(folder, "
                                    "max_shard_size='100GB'))")
    try:
        model = kind(from_hf(json.loads((folder / "config.json").read_text())))
        weights = load_file(folder / "model.safetensors")
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded ({error}): take another checkpoint") from None
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder}: its config.json describes no model ({error!r}): take another checkpoint") from None
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    if misfit := min(_shapes(model.state_dict()) ^ _shapes(weights), default=None):
        raise UserError(f"{folder}: its weights are not those of a {kind.__name__} of its config.json, as {misfit} shows: take "
                        "another checkpoint")
    if not finite(weights.values()):
        raise UserError(f"{folder} holds weights that are not finite, its training diverged: take an earlier checkpoint, or "
                        "train anew with a lower learning rate")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.to(device)


def load_training(folder: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Restore the optimiser in place and return the saved state. Raises UserError if only weights were saved."""
    if not (folder / "optimizer.safetensors").is_file():
        raise UserError(f"{folder} has no optimizer.safetensors: --init_from={folder} begins a new run with its weights")
    tensors = load_file(folder / "optimizer.safetensors")
    template = optimizer.state_dict()
    template["state"] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        template["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(template)
    return json.loads((folder / "trainer.json").read_text())


def to_hf(config: ModelConfig) -> dict:
    """The config under Hugging Face's keys. Norms on q and k make it a Qwen3, biases a Qwen2, otherwise it is a Llama."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    shape = {name: value for name, value in asdict(config).items() if name != "qk_norm"}
    return {"architectures": [ARCHITECTURES[kind]], "model_type": kind, "hidden_act": "silu", "torch_dtype": "float32",
            **shape}


def from_hf(config: dict) -> ModelConfig:
    """Read Hugging Face's keys. Raises UserError for what this model does not do; but for dropout, which it does without."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"model_type={kind!r} is not supported; these are: {', '.join(ARCHITECTURES)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"RoPE scaling {rope} is not supported: only plain rotary positions are")
    if kind == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
        raise UserError("a Llama with attention_bias or mlp_bias is not supported: it has a bias on o_proj or in the MLP")
    if config.get("use_sliding_window"):
        raise UserError("use_sliding_window is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act={config['hidden_act']!r} is not supported: only silu is")
    heads = config["num_attention_heads"]
    return ModelConfig(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"], num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        max_position_embeddings=config["max_position_embeddings"],
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6), tie_word_embeddings=config.get("tie_word_embeddings", False),
        attention_bias=kind == "qwen2" or bool(config.get("attention_bias")), qk_norm=kind == "qwen3")


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """'<parameter index>.<state name>' -> tensor."""
    return {f"{index}.{key}": value.cpu().contiguous() for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()}


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether there is no nan and no inf: a policy with one in its weights says nothing that could be sampled."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _shapes(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
