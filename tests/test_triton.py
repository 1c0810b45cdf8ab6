"""The proofs of the Triton kernels that need no GPU: `interpreted.py`, what they compute; `compiled.py`, what becomes of them;
and some of `test_gpu.py`, that these tests themselves work.

Triton decides when it is imported whether it interprets or compiles. So each has a process of its own. They are started with the
first test of all (`conftest.py`), run beside the others, and are waited for here.
"""

from pathlib import Path

import pytest
from conftest import TRITON

triton = pytest.importorskip("triton", reason="there is no Triton for this platform")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@pytest.mark.parametrize("name", TRITON)
def test_in_a_process_of_its_own(name, triton_processes):
    """All of its tests pass, and none is skipped."""
    if name == "compiled.py" and not CUOBJDUMP.exists():
        pytest.skip("this Triton comes without cuobjdump, which shows the registers that a kernel spills")
    process, output = triton_processes[name]
    status, text = process.wait(), output.read_text()
    summary = text.strip().splitlines()[-1]
    if status or " passed" not in summary or "skipped" in summary:
        pytest.fail(f"{name} ended with status {status}\n{text}", pytrace=False)
