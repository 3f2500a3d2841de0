"""Seconds of the phases and tokens per second, in the logs of training."""

import time

import pytest
import torch
from support import tiny

from klft.ppo.phases import Phases

CPU = torch.device("cpu")


def slow(completions, **_):
    time.sleep(0.2)
    return [0.0] * len(completions)


def test_each_log_has_the_seconds_of_its_phases(tmp_path):
    run = tiny.trainer(tmp_path, None, slow, max_steps=4, num_ppo_epochs=2, given={"eval_dataset": tiny.prompts(4)})
    start = time.perf_counter()
    run.train()
    whole = time.perf_counter() - start
    run.evaluate()
    logs = [log for log in run.state.log_history if "loss" in log]
    rollout = {f"time/{phase}/seconds" for phase in ("generate", "score", "reward")}
    assert [rollout <= log.keys() for log in logs] == [True, False, True, False]  # two steps per rollout
    assert all(log["time/train/seconds"] > 0 for log in logs)
    assert all(0.2 <= log["time/reward/seconds"] < 0.2 + whole / 2 for log in logs[::2])
    assert sum(v for log in logs for k, v in log.items() if k.startswith("time/")) < whole
    assert ["tokens_per_second" in log for log in logs] == [True, False, True, False]
    assert not any(name.startswith(("memory/", "eval_time/")) for log in run.state.log_history for name in log)


def test_tokens_per_second_counts_the_epochs_between_two_rollouts():
    phases = Phases()
    assert phases.take(5) == {}  # nothing was measured
    with phases("generate", CPU):
        time.sleep(0.05)
    assert phases.take(0).keys() == {"time/generate/seconds"}
    with phases("train", CPU):
        time.sleep(0.05)
    found = phases.take(50)
    assert found.keys() == {"time/train/seconds", "tokens_per_second"}
    assert found["tokens_per_second"] < 50 / 0.1
    assert phases.take(0) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CUDA allocator's peak")
def test_peak_memory_is_each_phases_own():
    phases, device = Phases(), torch.device("cuda")
    for name, gib in (("generate", 0.5), ("train", 0.25)):
        with phases(name, device):
            torch.empty(int(gib * 2**30), dtype=torch.uint8, device=device)
    found = phases.take(0)
    assert found["memory/generate/peak_gib"] - found["memory/train/peak_gib"] == pytest.approx(0.25, abs=0.01)
