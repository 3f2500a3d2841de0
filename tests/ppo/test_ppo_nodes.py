"""PPO on two machines, a launcher on each: what one launcher with two processes trains.

Both machines are this one: the launchers meet on the loopback interface, and share a filesystem, as real ones must.
Run as a script, this file is what each of the processes does; it ends as the recipes do.
"""

import os
import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
from support import tiny
from support.processes import launch, launch_nodes

from klft.exits import exit_codes

STEPS = 6


def trained(folder, resume=None, **changed):
    """Six steps on two rollouts of four; a checkpoint after the third is in the midst of the first."""
    run = tiny.trainer(
        folder, **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3.0} | changed,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, num_ppo_epochs=2, num_mini_batches=2,
        kl_log_tokens=1, log_completions=True,
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume)
    logs = [{k: v for k, v in log.items() if k != "epoch"} for log in tiny.step_logs(run)]
    return {"parameters": tiny.parameters(run.model), "logs": logs, "random": torch.get_rng_state()}


def apart(folder, rank):
    """Each process with an output_dir of its own, as where the machines share no filesystem."""
    try:
        trained(folder / f"apart-{rank}", max_steps=3)
    except RuntimeError as error:
        return str(error)


def worker(name, folder):
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    found = {"local": local, "whole": trained(folder / name)}
    # What two machines saved at step 3 is gone on with by two machines and by one.
    found["rest"] = trained(folder / f"rest-{name}", str(folder / "two" / "checkpoint-3"))
    found["apart"] = apart(folder, rank) if name == "two" else None
    torch.save(found, folder / f"{name}.{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(what each process found, by number of launchers; the launchers' ends; the folder)"""
    folder = tmp_path_factory.mktemp("nodes")
    ends = launch_nodes(__file__, "two", folder, folder=folder, timeout=300)
    said = "\n".join(end.stderr[-4000:] for end in ends)
    assert [end.returncode for end in ends] == [0, 0], said
    one = launch(__file__, "one", folder, timeout=300)
    assert one.returncode == 0, one.stderr[-6000:]
    found = {n: [torch.load(folder / f"{n}.{r}.pt", weights_only=False) for r in (0, 1)] for n in ("one", "two")}
    return found, ends, folder


def largest_difference(mine, theirs):
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


@pytest.mark.slow
def test_two_launchers_train_what_one_trains(runs, tmp_path):
    """To the bit, as a sum of two numbers has no order. Of more processes it has: gloo and NCCL choose their rings by
    which process lives where, and float32 sums differ in their last bits then."""
    found, _, _ = runs
    assert [each["local"] for each in found["one"]] == [0, 1]
    assert [each["local"] for each in found["two"]] == [0, 0], "each is the first of its machine"
    start = tiny.parameters(tiny.trainer(tmp_path).model)
    for one, two in zip(found["one"], found["two"], strict=True):
        assert largest_difference(one["whole"]["parameters"], start) > 1e-2
        assert largest_difference(one["whole"]["parameters"], two["whole"]["parameters"]) <= 1e-6
        assert torch.equal(one["whole"]["random"], two["whole"]["random"])
    mine, theirs = (found[name][0]["whole"]["logs"] for name in ("one", "two"))
    assert len(mine) == STEPS
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two"])
def test_a_checkpoint_of_two_machines_resumes(name, runs):
    found, _, _ = runs
    for whole, each in zip(found["two"], found[name], strict=True):
        assert largest_difference(whole["whole"]["parameters"], each["rest"]["parameters"]) <= 1e-6
        assert torch.equal(whole["whole"]["random"], each["rest"]["random"])


@pytest.mark.slow
def test_only_the_main_process_writes(runs):
    _, ends, folder = runs
    mine, theirs = (
        sorted(p.relative_to(folder / name).as_posix() for p in (folder / name).rglob("*") if p.is_file())
        for name in ("one", "two")
    )
    assert mine == theirs
    assert "checkpoint-3/klft/rollout_1.safetensors" in theirs
    assert [*(folder / "node-0").iterdir(), *(folder / "node-1").iterdir()] == []
    assert [end.stdout.count("completions at step") > 0 for end in ends] == [True, False]


@pytest.mark.slow
def test_machines_without_a_filesystem_in_common_are_told_at_the_first_checkpoint(runs):
    found, _, folder = runs
    for rank, each in enumerate(found["two"]):
        assert "checkpoint-3 could not be saved" in each["apart"], rank
        assert "output_dir must lie on a filesystem that all machines share" in each["apart"]
        assert list((folder / f"apart-{rank}").glob("*checkpoint*")) == []


if __name__ == "__main__":
    with exit_codes():
        worker(sys.argv[1], Path(sys.argv[2]))
