"""Two real processes of which one hangs, fails or is killed: all end within seconds, with the reason last.

Run as a script, this file is what each process does.
"""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
from support import tiny
from support.processes import environment

from klft.exits import exit_codes
from klft.ppo.checkpoint import what_is_wrong

pytestmark = pytest.mark.faults
TIMEOUT, SECONDS = 2.0, 10.0  # what a reward function may take; how soon all must have ended
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]


def cause(what):
    """What goes wrong on rank 1."""
    print(f"cause at {time.time()}", flush=True)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise ZeroDivisionError("the reward service is gone")
    if what == "exit":
        sys.exit("bye")
    while what == "stubborn":
        with suppress(BaseException):
            time.sleep(300)
    time.sleep(300)


def reward(what):
    def here(trainer_state):
        return os.environ["RANK"] == "1" and trainer_state.global_step >= 2

    def judge(completions, trainer_state, **_):
        if here(trainer_state) and what in ("hang", "stubborn", "raise", "kill", "exit"):
            cause(what)
        if here(trainer_state) and what == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "slow":
            print(f"step {trainer_state.global_step}", flush=True)
            time.sleep(0.3)
        if what == "peer":  # rank 0 dies while rank 1 sleeps, in no collective
            if os.environ["RANK"] == "0" and trainer_state.global_step >= 2:
                cause("kill")
            time.sleep(300 if here(trainer_state) else 0)
        return [0.0] * len(completions)

    async def judge_async(completions, trainer_state, **_):
        if here(trainer_state):
            print(f"cause at {time.time()}", flush=True)
            await asyncio.sleep(300)
        return [0.0] * len(completions)

    return judge_async if what == "async" else judge


def worker(what, folder):
    steps = 400 if what == "slow" else 5
    limit = TIMEOUT if what in ("hang", "async", "stubborn") else None
    run = tiny.trainer(
        folder, None, reward(what), max_steps=steps, reward_timeout=limit, save_strategy="steps", save_steps=1.0,
        save_total_limit=2,
    )  # fmt: skip
    run.train()


# ---- how they are started ----------------------------------------------------------------------------------------


def finish(processes, timeout=120):
    """(exit codes, what each said on stdout, on stderr, when the last one ended)."""
    said = [process.communicate(timeout=timeout) for process in processes]
    ended = time.time()
    return [p.returncode for p in processes], [out for out, _ in said], [err for _, err in said], ended


def start(command, **variables):
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "KLFT_TEST_THREADS": "1"} | variables
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables),
        start_new_session=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def launched(*arguments):
    return start([*LAUNCH, "--num_processes", "2", __file__, *map(str, arguments)])


def apart(*arguments):
    """Both ranks without a launcher: nobody ends one when the other has."""
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, __file__, *map(str, arguments)]
    return [start(command, RANK=str(rank), LOCAL_RANK=str(rank), **ranks) for rank in (0, 1)]


def seconds(text, ended):
    (when,) = re.findall(r"cause at ([\d.]+)", text)
    return ended - float(when)


def last_line(text):
    return [line.strip() for line in text.splitlines() if line.strip(" =-")][-1]


HANGS = r"TimeoutError: rank 1: reward function 'judge\w*' has not returned within 2 seconds"


# ---- the tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["hang", "async", "stubborn"])
def test_a_reward_function_that_hangs_ends_all_with_the_reason_last(what, tmp_path):
    (code,), (out,), (err,), ended = finish([launched(what, tmp_path)])
    assert code == 1
    assert re.match(HANGS, last_line(err)), err[-3000:]
    assert seconds(out, ended) < TIMEOUT + SECONDS


@pytest.mark.parametrize("what", ["hang", "stubborn"])
def test_without_a_launcher_too(what, tmp_path):
    codes, out, err, ended = finish(apart(what, tmp_path))
    assert codes == [1, 1]
    assert re.match(HANGS, last_line(err[1]))
    gone = "LostRank: another process of this run is gone"
    assert re.match(HANGS if what == "hang" else f"klft.exits.{gone}", last_line(err[0])), err[0][-3000:]
    assert seconds("".join(out), ended) < TIMEOUT + SECONDS


def test_an_error_on_one_rank_is_the_last_that_the_launcher_says(tmp_path):
    (code,), (out,), (err,), ended = finish([launched("raise", tmp_path)])
    assert (code, last_line(err)) == (1, "ZeroDivisionError: the reward service is gone")
    assert "in cause" in err
    assert seconds(out, ended) < SECONDS


def test_a_reward_function_that_exits_on_one_rank_ends_all_and_is_named(tmp_path):
    codes, out, err, ended = finish(apart("exit", tmp_path))
    assert codes == [1, 1]
    said = "RuntimeError: a call inside training tried to exit the process (code bye)"
    assert [last_line(text) for text in err] == [said, said]
    assert "rank 1 failed" in err[0]
    assert "in cause" in err[0]
    assert seconds("".join(out), ended) < SECONDS


def test_a_killed_rank_ends_the_other_in_one_line_that_names_the_checkpoint(tmp_path):
    codes, out, err, ended = finish(apart("kill", tmp_path))
    assert codes == [1, -signal.SIGKILL]
    last = last_line(err[0])
    assert "LostRank: another process of this run is gone: its last lines say why, unless it was killed." in last
    assert last.endswith(f"The last good checkpoint is {tmp_path}/checkpoint-2.")
    assert seconds(out[1], ended) < SECONDS


@pytest.mark.parametrize("what", ["kill", "peer"])
def test_a_killed_rank_ends_the_other_under_the_launcher(what, tmp_path):
    (code,), (out,), (err,), ended = finish([launched(what, tmp_path)])
    assert code == 1
    assert re.search(r"Signal 9 \(SIGKILL\) received", last_line(err)), err[-3000:]
    assert seconds(out, ended) < SECONDS


def test_sigterm_to_one_rank_saves_on_both_and_exits_with_143(tmp_path):
    codes, _, err, _ = finish(apart("sigterm", tmp_path))
    assert codes == [143, 143], err[0][-3000:]
    assert what_is_wrong(tmp_path / "checkpoint-3") is None
    assert not (tmp_path / "checkpoint-4").exists()
    assert "ended by SIGTERM. The last good checkpoint is" in last_line(err[0])


def steps_done(process, count):
    """Wait until so many steps have begun."""
    while count > 0:
        count -= process.stdout.readline().startswith("step ")


def test_sigterm_to_the_launcher_saves(tmp_path):
    process = launched("slow", tmp_path)
    steps_done(process, 6)
    process.send_signal(signal.SIGTERM)
    (code,), _, (err,), _ = finish([process])
    assert code == 1, "the launcher's"
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert what_is_wrong(newest) is None
    assert f"ended by SIGTERM. The last good checkpoint is {newest}." in err


@pytest.mark.parametrize("to", ["group", "launcher"])
def test_ctrl_c_through_the_launcher_is_one_line(to, tmp_path):
    process = launched("slow", tmp_path)
    steps_done(process, 4)
    (os.killpg if to == "group" else os.kill)(process.pid, signal.SIGINT)
    _, _, (err,), _ = finish([process])
    assert err.count("error: interrupted (Ctrl-C)") == 1
    of_ours = [line for line in err.splitlines() if str(Path(__file__).parent) in line or "klft/" in line]
    assert of_ours == [], "no traceback of a rank"


def test_two_launchers_end_cleanly(tmp_path):
    port = free_port()
    command = [*LAUNCH[:4], "--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
    command += ["--main_process_port", port]
    launchers = [start([*command, "--machine_rank", str(n), __file__, "train", str(tmp_path)]) for n in (0, 1)]
    codes, _, err, _ = finish(launchers)
    assert codes == [0, 0], err
    assert not any("terminate called" in text for text in err)


if __name__ == "__main__":
    with exit_codes():
        worker(sys.argv[1], Path(sys.argv[2]))
