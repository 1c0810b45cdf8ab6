"""The proofs of the Triton kernels that need no GPU: `interpreted.py`, what they compute; `compiled.py`, what becomes of them.

Triton decides when it is imported whether it interprets or compiles. So each has a process of its own, and they run side by side.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="there is no Triton for this platform")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TESTS = Path(__file__).parent
ENVIRONMENTS = {"interpreted.py": {"TRITON_INTERPRET": "1"}, "compiled.py": {"TRITON_INTERPRET": "0"}}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # the matrices are too small to share out


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[dict[str, tuple[subprocess.Popen, Path]]]:
    """By file: its process, and where that writes."""
    started = {}
    for name, variables in ENVIRONMENTS.items():
        output = tmp_path_factory.mktemp("output") / "all"
        command = [sys.executable, "-m", "pytest", TESTS / name, "--tb=short", "--color=no", "-p", "no:cacheprovider"]
        environment = {**os.environ, **ONE_THREAD, **variables, "PYTEST_ADDOPTS": ""}
        with output.open("w") as file:
            started[name] = subprocess.Popen(command, cwd=TESTS.parent, env=environment, stdout=file, stderr=file), output
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_in_a_process_of_its_own(name, processes):
    """All of its tests pass, and none is skipped."""
    if name == "compiled.py" and not CUOBJDUMP.exists():
        pytest.skip("this Triton comes without cuobjdump, which shows the registers that a kernel spills")
    process, output = processes[name]
    status, text = process.wait(), output.read_text()
    summary = text.strip().splitlines()[-1]
    if status or " passed" not in summary or "skipped" in summary:
        pytest.fail(f"{name} ended with status {status}\n{text}", pytrace=False)
