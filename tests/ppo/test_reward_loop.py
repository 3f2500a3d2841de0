"""Async reward functions: one event loop for the trainer's life, whatever is raised in it, in a notebook too."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import tiny
from support.processes import environment

from klft.ppo.reward_loop import RewardLoop


class Client:
    """Like httpx's or aiohttp's: bound to the loop it was first used in, with a task of its own and a lock."""

    __name__ = "client"

    def __init__(self):
        self.loops, self.alive, self.closed = [], None, False
        self.lock = asyncio.Lock()

    async def _keep_alive(self):
        try:
            await asyncio.sleep(1e6)
        finally:
            self.closed = True

    async def __call__(self, completions, **_):
        loop = asyncio.get_running_loop()
        if self.alive is None:
            self.alive = loop.create_task(self._keep_alive())
            self.connection = loop.create_future()
        self.loops.append(id(loop))
        assert not self.alive.done(), "what runs in the background goes on between the rollouts"
        assert not self.connection.done()

        async def one(text):
            async with self.lock:  # contended, so that it is bound to the loop
                await asyncio.sleep(0)
                return float(len(text))

        waiting = asyncio.ensure_future(self.connection)  # raises in another loop than its own
        scores = await asyncio.gather(*map(one, completions))
        waiting.cancel()
        self.connection = loop.create_future()
        return scores


def reward_threads():
    return [t for t in threading.enumerate() if t.name == "klft-rewards"]


def test_a_kept_client_works_in_every_rollout_and_in_the_evaluation_and_is_closed_at_the_end(tmp_path):
    gc.collect()
    before = len(reward_threads())
    client = Client()
    run = tiny.trainer(tmp_path, None, client, given={"eval_dataset": tiny.prompts(4)}, max_steps=3)
    run.train()
    run.evaluate()
    run.args.output_dir = str(tmp_path / "again")
    run.train()
    assert len(client.loops) == 7
    assert len(set(client.loops)) == 1
    assert len(reward_threads()) == before + 1
    del run
    gc.collect()
    assert len(reward_threads()) == before
    assert client.closed, "its task was cancelled and waited for"


def test_within_a_running_loop_as_in_a_notebook(tmp_path):
    async def cell():
        tiny.trainer(tmp_path, None, Client(), max_steps=2).train()

    asyncio.run(cell())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, asyncio.CancelledError])
@pytest.mark.parametrize("nested", [False, True])
def test_exceptions_pass_and_the_loop_goes_on(error, nested):
    loop, ended = RewardLoop(), []

    async def fails():
        await asyncio.sleep(0)
        raise error("this one")

    async def within():
        await asyncio.get_running_loop().create_task(fails())

    async def long():
        try:
            await asyncio.sleep(1e6)
        finally:
            ended.append(True)

    with pytest.raises(BaseException) as caught:  # noqa: PT011
        loop.results([within() if nested else fails(), long()])
    assert type(caught.value).__name__ == error.__name__
    assert ended == [True]

    async def fine():
        return 3

    assert loop.results([fine()]) == [3]


def child():
    """Waits in a reward function for ever."""

    async def waits(**_):
        print("waiting", flush=True)
        await asyncio.sleep(1e6)

    RewardLoop().results([waits()])


def test_ctrl_c_ends_a_run_that_waits_for_a_reward():
    process = subprocess.Popen(
        [sys.executable, __file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode in (130, -signal.SIGINT), said
    assert "KeyboardInterrupt" in said


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's job in the background would ignore
    child()
