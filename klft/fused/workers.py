"""CPU workers: Python threads that each run single-threaded torch operations and meet once, at the end.

torch's intra-op pool has a barrier after every operation; for operations of microseconds that barrier dominates, up to
eighty times the work where another process wants a core (benchmarks/README.md).
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

MAX_WORKERS = 8  # more would queue for the GIL; with more cores each worker gets several intra-op threads
_lock = threading.Lock()
_pool: tuple[tuple[int, int], ThreadPoolExecutor] | None = None


def _intra_op_threads() -> int:
    """torch threads of one worker."""
    return -(-torch.get_num_threads() // MAX_WORKERS)


def count() -> int:
    """Number of workers."""
    return torch.get_num_threads() // _intra_op_threads()


def _limit(threads: int) -> None:
    torch.get_num_threads()  # the first call in a thread undoes what was set before it
    torch.set_num_threads(threads)


def _executor() -> ThreadPoolExecutor:
    """The pool of this process (a fork has none of its parent's threads) for this number of torch threads."""
    global _pool
    total, workers = torch.get_num_threads(), count()
    with _lock:
        if _pool is None or _pool[0] != (os.getpid(), total):
            pool = ThreadPoolExecutor(workers, "klft", _limit, (_intra_op_threads(),))
            barrier = threading.Barrier(workers)
            try:
                wait([pool.submit(barrier.wait) for _ in range(workers)])
            except BaseException:
                barrier.abort()  # or the threads that did start would wait for the others for ever
                pool.shutdown(wait=False)
                raise
            finally:
                torch.set_num_threads(total)  # a worker's call also set what threads to come will have
            _pool = (os.getpid(), total), pool
        return _pool[1]


def each(job: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """[job(item) for item in items], concurrently. Raises what a job raises, after all have ended.

    An interrupt (Ctrl-C) waits for the jobs that have begun and cancels the others.
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
            pool = _executor()
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
    # Popped: a reference to the future that raises would keep the tiles alive, in a cycle, until garbage collection.
    futures.reverse()
    return [futures.pop().result() for _ in range(len(futures))] + here
