"""Jobs for threads that each work alone and wait for the others once, at the end.

Torch shares every operation out over its threads and waits for all of them after each. Where an operation takes
microseconds and anything else wants a core, that waiting costs more than the work: up to eighty times as much (see
benchmarks/README.md).
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

MOST = 8  # more would queue for Python's lock; beyond it each thread shares its operations out over a few of torch's
_lock = threading.Lock()
_pool: tuple[tuple[int, int], ThreadPoolExecutor] | None = None


def count() -> int:
    """How many jobs run at once."""
    return min(torch.get_num_threads(), MOST)


def _limit(threads: int) -> None:
    torch.get_num_threads()  # the first call in a thread undoes what was set before it
    torch.set_num_threads(threads)


def _workers() -> ThreadPoolExecutor:
    """The pool of this process (a fork has none of its parent's threads) for this number of threads."""
    global _pool
    total, workers = torch.get_num_threads(), count()
    with _lock:
        if _pool is None or _pool[0] != (os.getpid(), total):
            pool = ThreadPoolExecutor(workers, "klft", _limit, (total // workers,))
            meet = threading.Barrier(workers)
            wait([pool.submit(meet.wait) for _ in range(workers)])
            torch.set_num_threads(total)  # a worker's call also set what threads to come will have
            _pool = (os.getpid(), total), pool
        return _pool[1]


def each(job: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """[job(item) for item in items], at once. Raises what a job raises, when all have ended."""
    if len(items) < 2:
        return [job(item) for item in items]
    inference = torch.is_inference_mode_enabled()

    def run(item: Any) -> Any:
        with torch.inference_mode(inference), torch.no_grad():
            return job(item)

    futures = [_workers().submit(run, item) for item in items]
    wait(futures)
    return [future.result() for future in futures]
