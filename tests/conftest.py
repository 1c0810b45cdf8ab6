"""Fixtures of all tests: a small random Llama, the default task, and the processes that prove the Triton kernels."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.countdown import Countdown
from nanomrt.config import RunConfig
from nanomrt.model import Llama, ModelConfig

torch.set_num_threads(1)  # the models of the tests are too small to share out

TRITON = {  # TRITON_INTERPRET, and which of a file's tests
    "interpreted.py": ("1", []),
    "compiled.py": ("0", ["-m", "not rare"]),
    "test_gpu.py": ("1", ["-k", "97 or 77 or 9-2 or nan_ or few or other_t or elementwise_a and not 5000"]),
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def task() -> Countdown:
    return Countdown(RunConfig())


@pytest.fixture
def config(task) -> ModelConfig:
    return ModelConfig(vocab_size=len(task.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)


@pytest.fixture
def model(config) -> Llama:
    return Llama(config).initialise(torch.Generator().manual_seed(0))


@pytest.fixture(scope="session", autouse=True)
def triton_processes(request, tmp_path_factory) -> Iterator[dict[str, tuple[subprocess.Popen, Path]]]:
    """Those of test_triton.py, if it is to run. By file: its process, and where that writes."""
    started, tests = {}, Path(__file__).parent
    for name in TRITON if any(item.path.name == "test_triton.py" for item in request.session.items) else ():
        output = tmp_path_factory.mktemp("output") / "all"
        interpret, which = TRITON[name]
        command = [sys.executable, "-m", "pytest", tests / name, *which, "--tb=short", "--color=no", "-p", "no:cacheprovider"]
        environment = {**os.environ, **ONE_THREAD, "TRITON_INTERPRET": interpret, "PYTEST_ADDOPTS": ""}
        with output.open("w") as file:
            started[name] = subprocess.Popen(command, cwd=tests.parent, env=environment, stdout=file, stderr=file,
                                             preexec_fn=lambda: os.nice(10)), output  # this process takes longest, and goes first
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()
