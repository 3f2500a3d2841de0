"""The event loop of async reward functions: one for a trainer's life, in a thread of its own.

A client that a reward function keeps (httpx, aiohttp), its locks and its tasks belong to the loop they were first used
in. The thread is its own because a notebook's already runs a loop, in which nothing could be waited for.
"""

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Sequence
from typing import Any


class RewardLoop:
    """Runs awaitables. Starts with the first ones; ends with the object, or with the interpreter."""

    def __init__(self):
        self._loop: asyncio.AbstractEventLoop | None = None

    def results(self, awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
        """What they return, run together. The first exception is raised, KeyboardInterrupt too; the others end."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_serve, args=(self._loop,), name="klft-rewards", daemon=True)
            thread.start()
            weakref.finalize(self, _stop, self._loop, thread)
        future = asyncio.run_coroutine_threadsafe(_all(awaitables), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C while waiting: what is under way ends too
            raise


async def _all(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """The thread: the loop until it is stopped, then its end as asyncio.run makes it."""
    asyncio.set_event_loop(loop)
    stopped = False
    while not stopped:
        try:
            loop.run_forever()
            stopped = True
        except (KeyboardInterrupt, SystemExit):
            pass  # a task's: asyncio leaves its loop with it, and hands it to who awaits the task once the loop goes on
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if thread.is_alive():
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():  # the garbage collector runs anywhere
            thread.join(timeout=5)
