"""Files and folders that are there whole or not at all: each is written aside, under a name of this process, and then renamed.

A process that dies in between leaves what it wrote; the next one on the same machine that writes the same file takes that away.
"""

import json
import os
import platform
import re
import shutil
from pathlib import Path


def aside(path: Path) -> Path:
    """Where this process may write what will be `path`: nothing is there, and no other process writes there."""
    here = f".{path.name}.{platform.node()}"
    for left in path.parent.glob(".*"):
        owner = re.fullmatch(rf"{re.escape(here)}\.(\d+)\.\w+", left.name)
        if owner and (int(owner[1]) == os.getpid() or not alive(int(owner[1]))):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f"{here}.{os.getpid()}.partial")


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # 0 is no signal: it only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def replace_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader finds the old one or the new one, whole."""
    written = aside(path)
    written.write_text(text)
    os.replace(written, path)


def write_json(path: Path, value: dict, indent: int | None = 2) -> None:
    """The same with a value as JSON."""
    replace_text(path, json.dumps(value, indent=indent) + "\n")
