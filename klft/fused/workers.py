"""Jobs for threads that each work alone and wait for the others once, at the end.

Torch shares every operation out over its threads and waits for all of them after each. Where an operation takes
microseconds and anything else wants a core, that waiting costs more than the work: up to eighty times as much (see
benchmarks/README.md).
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

MOST = 8  # more would queue for Python's lock; with more cores each job shares its operations out over a few of them
_lock = threading.Lock()
_pool: tuple[tuple[int, int], ThreadPoolExecutor] | None = None


def _share() -> int:
    """How many of torch's threads a job has to itself."""
    return -(-torch.get_num_threads() // MOST)


def count() -> int:
    """How many jobs run at once."""
    return torch.get_num_threads() // _share()


def _limit(threads: int) -> None:
    torch.get_num_threads()  # the first call in a thread undoes what was set before it
    torch.set_num_threads(threads)


def _workers() -> ThreadPoolExecutor:
    """The pool of this process (a fork has none of its parent's threads) for this number of threads."""
    global _pool
    total, workers = torch.get_num_threads(), count()
    with _lock:
        if _pool is None or _pool[0] != (os.getpid(), total):
            pool = ThreadPoolExecutor(workers, "klft", _limit, (_share(),))
            meet = threading.Barrier(workers)
            try:
                wait([pool.submit(meet.wait) for _ in range(workers)])
            except BaseException:
                meet.abort()  # or those that came would wait for the others for ever
                pool.shutdown(wait=False)
                raise
            finally:
                torch.set_num_threads(total)  # a worker's call also set what threads to come will have
            _pool = (os.getpid(), total), pool
        return _pool[1]


def each(job: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """[job(item) for item in items], at once. Raises what a job raises, when all have ended.

    Whoever is interrupted (Ctrl-C) waits for the jobs that have begun; the others never do.
    """
    if len(items) < 2:
        return [job(item) for item in items]
    inference = torch.is_inference_mode_enabled()

    def run(item: Any) -> Any:
        with torch.inference_mode(inference), torch.no_grad():
            return job(item)

    futures: list[Future[Any]] = []
    try:
        try:
            pool = _workers()
            for item in items:
                futures.append(pool.submit(run, item))
        except RuntimeError:  # Python is on its way out, or the system has no thread to give
            pass
        here = [run(item) for item in items[len(futures) :]]
        wait(futures)
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)
        raise
    # Popped: a name for the future whose error this raises would tie the tiles to it until the garbage is collected.
    futures.reverse()
    return [futures.pop().result() for _ in range(len(futures))] + here
