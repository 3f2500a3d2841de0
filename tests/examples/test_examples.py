"""Each example runs as it stands, in a folder of its own, without a hub, in a few steps."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import environment

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def test_there_are_examples():
    assert EXAMPLES


RUN = [pytest.param(p, marks=pytest.mark.slow) if p.stem == "own_loop" else p for p in EXAMPLES]  # see test_own_loop.py


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    command = [sys.executable, str(path), "--max_steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"step +2: .*KL \d", done.stdout), done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 60
