"""Test files that are run as scripts, by processes of their own: what these find, and how accelerate starts them."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def environment(**changed: str) -> dict[str, str]:
    """That of this process; a script in a folder of tests/ finds `conftest` and `support` with it, as a test does."""
    found = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": found} | changed


def launch(
    script: str, *arguments: Any, processes: int = 2, timeout: float, cwd: Path | None = None, **changed: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script in so many processes on the CPU, as accelerate does; what it said, and how it ended."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
        "--main_process_port", "0", script, *map(str, arguments),
    ]  # fmt: skip
    few = environment(ACCELERATE_USE_CPU="true", KLFT_TEST_THREADS="1", OMP_NUM_THREADS="1", **changed)
    return subprocess.run(command, capture_output=True, text=True, env=few, timeout=timeout, cwd=cwd)


def launch_nodes(
    script: str, *arguments: Any, folder: Path, options: Sequence[str] = ("--multi_gpu",), timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a script as two machines do, which are both this one: two launchers of one process each, in node-0 and
    node-1 of `folder`, that meet on the loopback interface. What each launcher said, and how it ended.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    few = environment(ACCELERATE_USE_CPU="true", KLFT_TEST_THREADS="1", OMP_NUM_THREADS="1")

    def node(rank: int) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable, "-m", "accelerate.commands.launch", *options, "--num_machines", "2", "--machine_rank",
            str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--num_processes", "2",
            script, *map(str, arguments),
        ]  # fmt: skip
        cwd = folder / f"node-{rank}"
        cwd.mkdir(exist_ok=True)
        return subprocess.run(command, capture_output=True, text=True, env=few, timeout=timeout, cwd=cwd)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(node, range(2)))


def python(
    script: str, *arguments: Any, timeout: float, cwd: Path | None = None, **changed: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own; what it said, and how it ended."""
    command = [sys.executable, script, *map(str, arguments)]
    few = environment(**changed)
    return subprocess.run(command, capture_output=True, text=True, env=few, timeout=timeout, cwd=cwd)


def leave() -> None:
    """The last thing a launched script does: gloo's threads may abort an interpreter's end, a destroyed group's too."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
