"""How a process ends: time limits that interrupt, or end it; exit codes; the reason in the launcher's file."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import tiny
from support.processes import environment

from klft import exits
from klft.ppo.rewards import call_reward_functions


def never():
    return "never said"


def raises(error):
    raise error


def test_no_limit_and_a_call_in_time():
    for seconds in (None, 30):
        assert exits.within(seconds, never, lambda: 5) == 5
        for error in (ValueError("kept"), KeyboardInterrupt()):  # Ctrl-C is no timeout
            with pytest.raises(type(error)) as caught:
                exits.within(seconds, never, lambda error=error: raises(error))
            assert caught.value is error


def sleeps():
    time.sleep(60)


def waits():
    threading.Event().wait(60)


def retries():
    for _ in range(60):
        with contextlib.suppress(Exception):
            time.sleep(60)


def converts():
    try:
        time.sleep(60)
    except BaseException as error:
        raise ValueError("something else") from error


def swallows():
    with contextlib.suppress(BaseException):
        time.sleep(60)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["default", "ignored"])
@pytest.mark.parametrize("call", [sleeps, waits, retries, converts, swallows])
def test_a_call_that_hangs_is_interrupted_where_it_waits(call, handler):
    before, start = signal.signal(signal.SIGINT, handler), time.monotonic()
    with pytest.raises(TimeoutError, match=r"^the call has not returned within 0\.2 seconds$"):
        exits.within(0.2, lambda: "the call", call)
    assert time.monotonic() - start < 5
    time.sleep(0.1)  # nothing comes later
    assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, before)


def test_a_call_that_ends_at_its_limit_never_interrupts_what_follows():
    ended = 0
    for _ in range(200):
        with contextlib.suppress(TimeoutError):
            exits.within(0.005, never, lambda: time.sleep(0.0049))
            ended += 1
        sum(range(10000))
    assert 0 < ended < 200, "both happened"


STUBBORN = """
import sys, time, threading
from klft import exits
exits.GRACE = 0.3
def stubborn():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
def limited():
    exits.within(0.2, lambda: "rank 0: reward function 'stubborn'", stubborn)
print("what was printed before", end="")
if sys.argv[1] == "thread":
    thread = threading.Thread(target=limited); thread.start(); thread.join()
limited()
"""


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_call_that_does_not_give_way_ends_with_the_process(where, tmp_path):
    path = tmp_path / "error.json"
    command = [sys.executable, "-c", STUBBORN, where]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, env=environment(TORCHELASTIC_ERROR_FILE=str(path))
    )
    assert (done.returncode, done.stdout) == (1, "what was printed before")
    *stack, last = done.stderr.splitlines()
    assert last.startswith("TimeoutError: rank 0: reward function 'stubborn' has not returned within 0.2 seconds, nor")
    assert "stubborn" in "".join(stack), "where it hangs"
    assert json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"].endswith(last)


# ---- reward functions --------------------------------------------------------------------------------------------


def hangs(completions, **_):
    time.sleep(60)


async def hangs_async(completions, **_):
    import asyncio

    await asyncio.sleep(60)


async def blocks_the_loop(completions, **_):
    time.sleep(2)


async def quick(completions, **_):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("functions", "named"),
    [
        ([tiny.nothing, hangs, quick], "'hangs'"),
        ([quick, hangs_async, tiny.nothing], "'hangs_async'"),
        ([quick, blocks_the_loop], "'blocks_the_loop'"),
        ([hangs_async, hangs_async], "'hangs_async', 'hangs_async_2'"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine 'quick' was never awaited")  # a sync function hung before its turn
def test_a_reward_function_that_hangs_is_named_with_seconds_and_rank(functions, named):
    start = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        call_reward_functions(functions, ["p"], ["c"], [[3]], {}, timeout=0.3, rank=5)
    assert str(caught.value) == f"rank 5: reward function {named} has not returned within 0.3 seconds"
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), True, "3"])
def test_reward_timeout_is_a_number_of_seconds(wrong, tmp_path):
    with pytest.raises(ValueError, match="reward_timeout must be"):
        tiny.config(tmp_path, reward_timeout=wrong)


def test_training_ends_where_a_reward_function_hangs(tmp_path):
    calls = []

    def judge(completions, **_):
        calls.append(1)
        if len(calls) == 2:
            time.sleep(60)
        return [0.0] * len(completions)

    with pytest.raises(TimeoutError, match=r"rank 0: reward function 'judge' has not returned within 0\.5 seconds"):
        tiny.trainer(tmp_path, None, judge, max_steps=3, reward_timeout=0.5).train()
    tiny.trainer(tmp_path, max_steps=1, reward_timeout=30.0).train()  # the folder is free again


# ---- exit codes --------------------------------------------------------------------------------------------------


def ended(body, **variables):
    program = "import sys, os, signal, time\nfrom klft.exits import exit_codes\nwith exit_codes():\n    "
    command = [sys.executable, "-c", program + body + "\nprint('after')"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(**variables))


def test_success_goes_on_and_exits_with_zero():
    done = ended("print('inside')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "inside\nafter\n", "")


def test_a_failure_keeps_its_traceback_with_the_reason_last(tmp_path):
    path = tmp_path / "error.json"
    done = ended("print('inside'); 1 / 0", TORCHELASTIC_ERROR_FILE=str(path))
    assert (done.returncode, done.stdout) == (1, "inside\n")
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    recorded = json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"]
    assert recorded.endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize("what", ["raise ValueError", "sys.exit"])
def test_no_control_character_of_a_failure_reaches_the_terminal_or_the_launchers_report(what, tmp_path):
    path = tmp_path / "error.json"
    done = ended(f"{what}('\\x1b[2J\\x9b1m é\\nof two lines\\u202e')", TORCHELASTIC_ERROR_FILE=str(path))
    assert done.returncode == 1
    assert done.stderr.endswith("\\x1b[2J\\x9b1m é\nof two lines\\u202e\n")
    assert "\x1b" not in done.stderr
    if what == "raise ValueError":
        recorded = json.loads(path.read_text())["message"]
        assert recorded["message"] == recorded["extraInfo"]["py_callstack"]
        assert recorded["message"].endswith("ValueError: \\x1b[2J\\x9b1m é\nof two lines\\u202e")


def test_a_console_that_cannot_show_a_character_changes_nothing():
    done = ended("print('a \u2192 b'); print('é', file=sys.stderr)", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a \\u2192 b\nafter\n", "\\xe9\n")


@pytest.mark.parametrize(("rank", "said"), [(0, "\nerror: interrupted (Ctrl-C)\n"), (1, "")])
def test_ctrl_c_is_one_line_from_rank_0_however_often_it_is_sent(rank, said):
    twice = "os.kill(os.getpid(), signal.SIGINT)\n    "
    cleanup = "time.sleep(0.2)\n        print('cleaned up')"
    done = ended(f"try:\n        {twice}finally:\n        {twice}    {cleanup}", RANK=str(rank))
    assert (done.returncode, done.stderr, done.stdout) == (130, said, "cleaned up\n")


@pytest.mark.parametrize(("exit", "code"), [("3", 3), ("143", 143), ("None", 0), ("'text'", 1)])
def test_codes_that_are_asked_for_are_kept(exit, code):
    assert ended(f"sys.exit({exit})").returncode == code


def test_a_reason_needs_a_launcher_and_a_disk(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    exits.record_reason("not written")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "folder"))
    exits.record_reason("not written either")
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    with pytest.raises(ZeroDivisionError), exits.reasons_recorded():
        1 / 0  # noqa: B018
    message = json.loads(path.read_text())["message"]
    assert message["message"].endswith("ZeroDivisionError: division by zero")
    assert abs(int(message["extraInfo"]["timestamp"]) - time.time()) < 5


def test_a_users_connection_error_is_no_lost_rank():
    for error in (ConnectionResetError("Connection reset by peer"), RuntimeError("Connection closed by peer")):
        with pytest.raises(type(error)) as caught, exits.reasons_recorded():
            raise error
        assert caught.value is error
