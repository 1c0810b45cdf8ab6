"""Checkpoints: whole or absent, damage is found, nothing but safetensors and JSON, Hugging Face's keys both ways."""

import json
import math
import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomrt import checkpoint
from nanomrt.config import UserError
from nanomrt.model import Llama


def same(a: Llama, b: Llama) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def step(model: Llama, optimizer: torch.optim.Optimizer) -> None:
    """One update with a gradient that depends on nothing but the parameters."""
    optimizer.zero_grad()
    sum((p**3).sum() + p.sum() for p in model.parameters()).backward()
    optimizer.step()


@pytest.mark.parametrize("variant", [{}, {"tie_word_embeddings": False}, {"attention_bias": True}, {"qk_norm": True}])
def test_weights_and_config_survive(tmp_path, config, task, variant):
    """A model read back is the same function, for each architecture that the config can name."""
    model = Llama(replace(config, **variant)).initialise(torch.Generator().manual_seed(1))
    checkpoint.save(tmp_path / "step-000001", model, task.tokenizer, {"eos_token_id": task.close_answer})
    loaded = checkpoint.load_model(tmp_path / "step-000001")
    assert loaded.config == model.config
    assert same(loaded, model)


def test_the_folder_is_what_hugging_face_expects(tmp_path, model, task):
    checkpoint.save(tmp_path / "a", model, task.tokenizer, {"eos_token_id": task.close_answer})
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["num_key_value_heads"] == 2


def test_the_optimiser_goes_on_bit_for_bit(tmp_path, model, config, task):
    """Two steps in a row equal one step, save, load, one step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    step(model, optimizer)
    checkpoint.save(tmp_path / "step-000001", model, task.tokenizer, {}, optimizer, {"step": 1})
    step(model, optimizer)

    loaded = checkpoint.load_model(tmp_path / "step-000001")
    resumed = torch.optim.AdamW(loaded.parameters(), lr=1e-2, fused=True)
    assert checkpoint.load_training(tmp_path / "step-000001", resumed) == {"step": 1}
    step(loaded, resumed)
    assert same(loaded, model)


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path, model, task):
    for _ in range(2):
        checkpoint.save(tmp_path / "step-000001", model, task.tokenizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("hurt, message", [
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]), "not what was written"),
    (lambda f: (f / "optimizer.safetensors").unlink(), "missing"),
    (lambda f: (f / "manifest.json").write_text("{"), "unreadable"),
    (lambda f: (f / "manifest.json").write_text("[]"), "unreadable"),
])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, model, task, capsys, hurt, message):
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    for name in ("step-000001", "step-000002"):
        checkpoint.save(tmp_path / name, model, task.tokenizer, {}, optimizer)
    hurt(tmp_path / "step-000002")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000001"
    warning = capsys.readouterr().err
    assert "step-000002" in warning and message in warning


def test_the_newest_is_the_one_with_the_largest_number(tmp_path, model, task):
    """Whose name has one more digit than six is no earlier."""
    for name in ("step-999999", "step-1000000"):
        checkpoint.save(tmp_path / name, model, task.tokenizer, {})
    assert checkpoint.newest(tmp_path) == tmp_path / "step-1000000"


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path, model, task, monkeypatch):
    """Whatever moment the process dies at, the folder that has its name is whole."""
    checkpoint.save(tmp_path / "step-000001", model, task.tokenizer, {})

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_flush", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "step-000002", model, task.tokenizer, {})
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000001"


def test_two_processes_may_save_the_same_checkpoint(tmp_path, model, task, monkeypatch):
    """The second begins before the first has ended, which does not disturb it: whoever comes last is what stays."""
    other, flush = Llama(model.config).initialise(torch.Generator().manual_seed(1)), checkpoint._flush
    me = os.getpid()

    def meanwhile(path):
        monkeypatch.setattr(checkpoint, "_flush", flush)
        monkeypatch.setattr(os, "getpid", os.getppid)  # a process that is alive
        checkpoint.save(tmp_path / "warm", other, task.tokenizer, {})
        monkeypatch.setattr(os, "getpid", lambda: me)

    monkeypatch.setattr(checkpoint, "_flush", meanwhile)
    checkpoint.save(tmp_path / "warm", model, task.tokenizer, {})
    assert same(checkpoint.load_model(tmp_path / "warm"), model) and checkpoint.damage(tmp_path / "warm") is None
    assert [path.name for path in tmp_path.iterdir()] == ["warm"]


def test_what_a_killed_process_left_is_taken_away(tmp_path, model, task):
    """By the next one that saves the same checkpoint; what a living process writes stays, and so does what is none of ours: on
    another machine its process may live."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = platform.node()
    names = [f".warm.{here}.{dead.pid}.partial", f".warm.{here}.{dead.pid}.replaced", f".warm.{here}.{os.getppid()}.partial",
             ".warm.mine.partial", f".warmer.{here}.{dead.pid}.partial", f".warm.else-{here}.{dead.pid}.partial"]
    for name in names:
        (tmp_path / name).mkdir()
    checkpoint.save(tmp_path / "warm", model, task.tokenizer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[2:], "warm"])


def test_without_a_good_checkpoint_the_error_names_the_fix(tmp_path):
    with pytest.raises(UserError, match="train first"):
        checkpoint.newest(tmp_path)
    with pytest.raises(UserError, match="config.json"):
        checkpoint.load_model(tmp_path)


def edit_config(folder: Path, **keys) -> None:
    """Change keys of a checkpoint's config.json; None takes one away."""
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("hurt, message", [
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "cannot be loaded .*another"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
    (lambda f: (f / "config.json").write_text("[]"), "describes no model"),
    (lambda f: edit_config(f, model_type="gpt2"), "model_type='gpt2' is not supported"),
    (lambda f: edit_config(f, hidden_size=None), "its config.json describes no model .*hidden_size"),
    (lambda f: edit_config(f, hidden_size="wide"), "its config.json describes no model"),
    (lambda f: edit_config(f, hidden_size=-8), "its config.json describes no model"),
    (lambda f: edit_config(f, vocab_size=5), r"its weights are not those of a Llama .*lm_head.weight \(\d+, 32\) shows"),
    (lambda f: edit_config(f, num_hidden_layers=1), r"its weights are not those .*model.layers.1"),
    (lambda f: save_file({}, f / "model.safetensors"), "its weights are not those"),
    (lambda f: save_file({name: weight * math.nan for name, weight in load_file(f / "model.safetensors").items()},
                         f / "model.safetensors"), "not finite, its training diverged: take an earlier checkpoint"),
])
def test_what_is_no_model_is_an_error_that_names_the_folder(tmp_path, model, task, hurt, message):
    checkpoint.save(tmp_path / "step-000001", model, task.tokenizer, {})
    hurt(tmp_path / "step-000001")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'step-000001'}:? .*{message}"):
        checkpoint.load_model(tmp_path / "step-000001")


def test_training_does_not_go_on_without_its_optimiser(tmp_path, model, task):
    checkpoint.save(tmp_path / "a", model, task.tokenizer, {})
    with pytest.raises(UserError, match=f"{tmp_path / 'a'} has no optimizer.safetensors: --init_from="):
        checkpoint.load_training(tmp_path / "a", torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gpt2"}, "gpt2"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "RoPE scaling"),
    ({"attention_bias": True}, "attention_bias"),
    ({"use_sliding_window": True}, "use_sliding_window"), ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
])
def test_unsupported_models_are_refused_by_name(config, change, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.from_hf(checkpoint.to_hf(config) | change)


def test_hugging_face_configs_are_understood(config):
    """Old and new places of rope_theta, and the defaults that Hugging Face leaves out."""
    raw = checkpoint.to_hf(config)
    del raw["rope_theta"], raw["head_dim"]
    read = checkpoint.from_hf(raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert read.rope_theta == 5e5 and read.head_dim == config.hidden_size // config.num_attention_heads
    assert checkpoint.from_hf(raw | {"attention_dropout": 0.1}) == checkpoint.from_hf(raw)  # whoever is trained on is not dropped


def test_what_hugging_face_leaves_out_has_its_defaults(config):
    """One key/value head for each head, an epsilon of 1e-6, untied embeddings; and a Qwen2 has biases without saying so."""
    raw = checkpoint.to_hf(replace(config, attention_bias=True))
    assert raw["model_type"] == "qwen2"
    for name in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "rope_theta"):
        del raw[name]
    read = checkpoint.from_hf(raw)
    assert read == replace(config, attention_bias=True, num_key_value_heads=config.num_attention_heads, rms_norm_eps=1e-6,
                           tie_word_embeddings=False, rope_theta=10_000.0)


def test_only_tied_embeddings_stand_for_a_head(tmp_path, config, task):
    """An untied model whose file has no head is not taken for a tied one."""
    checkpoint.save(tmp_path / "a", Llama(replace(config, tie_word_embeddings=False)), task.tokenizer, {})
    weights = load_file(tmp_path / "a/model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "a/model.safetensors")
    with pytest.raises(ValueError, match="its weights are not those .*lm_head"):
        checkpoint.load_model(tmp_path / "a")
