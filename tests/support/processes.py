"""Test files that are run as scripts, by processes of their own: what these find, and how accelerate starts them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def environment(**changed: str) -> dict[str, str]:
    """That of this process; a script in a folder of tests/ finds `conftest` and `support` with it, as a test does."""
    found = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": found} | changed


def launch(script: str, *arguments: Any, processes: int = 2, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs a script in so many processes on the CPU, as accelerate does; what it said, and how it ended."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
        "--main_process_port", "0", script, *map(str, arguments),
    ]  # fmt: skip
    few = environment(ACCELERATE_USE_CPU="true", KLFT_TEST_THREADS="1", OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, env=few, timeout=timeout)


def python(script: str, *arguments: Any, timeout: float, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own; what it said, and how it ended."""
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=timeout, cwd=cwd)


def leave() -> None:
    """The last thing a launched script does: gloo's threads may abort an interpreter's end, a destroyed group's too."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
