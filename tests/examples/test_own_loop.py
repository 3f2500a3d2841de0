"""examples/own_loop.py: on one process and on two, on a model made on the spot; the controller brings the KL back."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import environment, launch

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_loop.py"


def kls(said):
    return [float(nats) for nats in re.findall(r"KL ([\d.]+) nats", said)]


def test_own_loop_learns_within_its_kl():
    command = [sys.executable, str(EXAMPLE)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), timeout=300)
    assert run.returncode == 0, run.stderr
    assert "problem " not in run.stdout
    assert len(kls(run.stdout)) == 6
    highest = max(kls(run.stdout))
    assert abs(kls(run.stdout)[-1] - 2) < (highest - 2) / 2  # the controller's target is 2
    first, *_, last = (float(nll) for nll in re.findall(r"NLL ([\d.]+)", run.stdout))
    assert last < first - 0.5


@pytest.mark.slow
def test_own_loop_on_two_processes():
    run = launch(str(EXAMPLE), "--max_steps", "10", processes=2, timeout=300)
    assert run.returncode == 0, run.stderr
    assert len(kls(run.stdout)) == 1
