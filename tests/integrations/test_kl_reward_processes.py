"""KLReward on two processes (gloo). Run as a script, this file is what each of them does."""

import os
import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
from support import rloo, tiny
from support.processes import launch, leave

from klft import AdaptiveKL
from klft.integrations import KLReward

COEF = 0.3
CONTROLLERS = {"constant": lambda: COEF, "adaptive": lambda: AdaptiveKL(COEF, target=0.5, horizon=40)}
RUNS = ("beta", "neither", *CONTROLLERS)


def worker(folder):
    path, rank = str(folder / "reference"), os.environ["RANK"]
    for name in RUNS:
        rewards = [tiny.mixed]
        if name in CONTROLLERS:
            rewards.append(KLReward(rloo.reference(path), coef=CONTROLLERS[name]()))
        run = rloo.trainer(folder, rloo.policy(path), rewards, beta=COEF if name == "beta" else 0.0)
        if name in CONTROLLERS:
            rewards[1].bind(run)
        run.train()
        torch.save(
            {
                "parameters": tiny.parameters(run.model),
                "logs": [log for log in run.state.log_history if "loss" in log],
                "coef": rewards[1].penalty.coef if name in CONTROLLERS else None,
            },
            folder / f"{name}.{rank}.pt",
        )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each process found, by name of the run."""
    folder = tmp_path_factory.mktemp("two")
    rloo.saved(folder)
    done = launch(__file__, folder, timeout=200)
    paths = {name: [folder / f"{name}.{rank}.pt" for rank in range(2)] for name in RUNS}
    assert all(p.exists() for pair in paths.values() for p in pair), done.stderr[-6000:]
    return {name: [torch.load(p, weights_only=False) for p in pair] for name, pair in paths.items()}


def difference(a, b):
    return max(float((a["parameters"][name] - b["parameters"][name]).abs().max()) for name in a["parameters"])


@pytest.mark.slow
def test_kl_reward_is_beta_on_two_processes(both):
    beta, ours = both["beta"][0], both["constant"][0]
    assert difference(ours, beta) < 1e-5
    assert difference(both["neither"][0], beta) > 1e-3
    assert difference(*both["constant"]) == 0.0
    # The mean over the tokens of both, in which one may have more than the other.
    assert [log["kl/k1/mean"] for log in ours["logs"]] == pytest.approx([log["kl"] for log in beta["logs"]], rel=1e-4)


def test_processes_have_one_coefficient(both):
    first, second = both["adaptive"]
    assert first["coef"] == second["coef"]
    assert first["coef"] == pytest.approx(COEF * (1 + 0.2 * 8 / 40) ** 4), "it has seen all eight sequences"
    assert difference(first, second) == 0.0


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    leave()
