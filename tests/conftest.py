"""Fixtures of all tests: a small random Llama and the default task."""

import pytest
import torch

from data.countdown import Countdown
from nanomrt.model import Llama, ModelConfig

torch.set_num_threads(1)  # the models of the tests are too small to share out


@pytest.fixture(scope="session")
def task() -> Countdown:
    return Countdown()


@pytest.fixture
def config(task) -> ModelConfig:
    return ModelConfig(vocab_size=len(task.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)


@pytest.fixture
def model(config) -> Llama:
    return Llama(config).initialise(torch.Generator().manual_seed(0))
