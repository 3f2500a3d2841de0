"""Forty times a two-process run is killed at a random moment and resumed: it arrives where the uninterrupted one does.

One rank or both, while a checkpoint is written, while completions are made, while training, in the first pass over the
prompts, the second and the third. A run is two processes forked from one that has imported everything: starting them
takes a fraction of a second, and they know each other as launched processes do.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import conftest  # noqa: F401 - also for the script
import pytest
import torch
from support import tiny
from support.processes import python

from klft.ppo.checkpoint import checkpoints, what_is_wrong

STEPS = 12  # of 4 prompts each, of 16: three passes
PATIENCE = 60  # seconds in which the rank that is left ends


def step_lines(history):
    """Log lines without what a clock says."""
    timed = ("runtime", "per_second", "time", "flos")
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in history if "loss" in line]


def train(folder):
    """One rank: resumed where there is a checkpoint."""
    args = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1.0,
        "logging_steps": 1, "save_total_limit": 3, "kl_log_tokens": 2,
    }  # fmt: skip
    run = tiny.trainer(folder, None, tiny.mixed, tiny.prompts(16), **args)
    run.train(resume_from_checkpoint=True if any(folder.glob("checkpoint-*")) else None)
    if run.is_world_process_zero():
        torch.save((tiny.parameters(run.model), step_lines(run.state.log_history)), folder / "end.tmp")
        os.replace(folder / "end.tmp", folder / "end.pt")  # this process may be killed here too


def rank_process(folder, rank, port):
    """Forks a rank; its id. What it says goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        said = os.open(folder.with_name(f"{folder.name}-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        train(folder)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def launch(folder):
    folder.mkdir(exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [rank_process(folder, rank, port) for rank in range(2)]


def ended(pid, seconds):
    """The exit status, or None for one that is still there after so long."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def moment(folder, chance):
    """Waits for a random one, after one to three more checkpoints; its name. No longer than the run lasts."""
    kind, wanted = chance.choice(["starting", *["saving", "saved", "between"] * 2]), chance.randint(1, 3)
    before, seen = {p.name for p in folder.glob("*checkpoint-*")}, set()  # a kill may have left one half written
    until = time.monotonic() + (chance.uniform(0, 1.5) if kind == "starting" else 60)
    while time.monotonic() < until and not (folder / "end.pt").exists():
        seen |= {p.name for p in folder.glob("checkpoint-*")} - before
        writing = {p.name for p in folder.glob("tmp-checkpoint-*")} - before
        if kind != "starting" and (len(seen) >= wanted or (kind == "saving" and writing and len(seen) >= wanted - 1)):
            break
        time.sleep(0.002)
    time.sleep({"saving": chance.uniform(0, 0.02), "between": chance.uniform(0, 0.4)}.get(kind, 0.0))
    return kind


def killed_once(folder, chance):
    """(moment, who, problem or None) of one launch that is killed."""
    pids = launch(folder)
    kind, victims = moment(folder, chance), chance.choice([[0], [1], [0, 1]])
    for rank in victims:
        os.kill(pids[rank], signal.SIGKILL)
    statuses = []
    for pid in pids:
        status = ended(pid, 5 if kind == "starting" else 20)
        if status is None:  # it may wait for the others to come; a launcher sends it this as soon as one is gone
            os.kill(pid, signal.SIGTERM)
            status = ended(pid, PATIENCE)
        statuses.append(status)
    problem = None
    for rank, status in enumerate(statuses):
        if status is None:
            os.kill(pids[rank], signal.SIGKILL)
            os.waitpid(pids[rank], 0)
            problem = f"rank {rank} was still there {PATIENCE} s later"
    return kind, victims, problem


def soak(folder, kills):
    """Prints a line of JSON per kill, and at each end whether it is that of the uninterrupted run."""
    whole, killed, chance = folder / "whole", folder / "killed", random.Random(1)
    assert [ended(pid, 300) for pid in launch(whole)] == [0, 0], (folder / "whole-0.txt").read_text()[-3000:]
    parameters, lines = torch.load(whole / "end.pt")

    def compare():
        found, found_lines = torch.load(killed / "end.pt")
        damaged = [str(p) for p in checkpoints(killed) if what_is_wrong(p)]
        unequal = tiny.unequal(found, parameters)
        other = [(a, b) for a, b in zip(found_lines, lines, strict=False) if a != b][:1]
        equal = not unequal and not other and len(found_lines) == len(lines) and not damaged
        print(
            json.dumps({"end": equal, "unequal": unequal[:3], "lines": str(other)[:500], "damaged": damaged}),
            flush=True,
        )
        shutil.rmtree(killed)

    for _ in range(kills):
        kind, victims, problem = killed_once(killed, chance)
        step = max([int(p.name.rpartition("-")[2]) for p in checkpoints(killed)], default=0)
        print(json.dumps({"kill": kind, "ranks": victims, "step": step, "problem": problem}), flush=True)
        if (killed / "end.pt").exists():
            compare()
    statuses = [ended(pid, 300) for pid in launch(killed)]
    assert statuses == [0, 0], (statuses, (folder / "killed-0.txt").read_text()[-3000:])
    compare()


@pytest.mark.parametrize("kills", [pytest.param(40, marks=pytest.mark.faults)])
def test_every_resume_is_the_uninterrupted_run(tmp_path, kills):
    said = python(__file__, tmp_path, kills, timeout=590)
    assert said.returncode == 0, (said.stdout[-1500:], said.stderr[-3000:])
    lines = [json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")]
    kills_made, ends = [x for x in lines if "kill" in x], [x for x in lines if "end" in x]
    assert len(kills_made) == kills
    assert not [x for x in kills_made if x["problem"]]
    assert ends, said.stdout
    assert all(x["end"] for x in ends), ends
    assert {x["kill"] for x in kills_made} == {"starting", "saving", "saved", "between"}
    assert {len(x["ranks"]) for x in kills_made} == {1, 2}
    assert {(x["step"] - 1) // 4 for x in kills_made if x["step"]} >= {0, 1, 2}  # in all three passes


if __name__ == "__main__":
    soak(Path(sys.argv[1]), int(sys.argv[2]))
