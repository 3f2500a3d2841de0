"""A pool of threads that is safe to share."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from klft.fused import threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_jobs_run_at_once_in_order_and_each_with_its_share_of_torch(two_threads):
    meet = threading.Barrier(2, timeout=60)  # breaks if one job waits for the other

    def job(item):
        meet.wait()
        return item, threading.get_ident(), torch.get_num_threads()

    (a, first, n), (b, second, m) = threads.each(job, [10, 20])
    assert (a, b) == (10, 20)
    assert len({first, second, threading.get_ident()}) == 3
    assert (n, m) == (1, 1), "two threads that use two cores each would fight"
    assert torch.get_num_threads() == 2


def test_one_job_stays_in_its_thread(two_threads):
    assert threads.each(lambda item: (item, threading.get_ident()), [7]) == [(7, threading.get_ident())]
    assert threads.each(lambda item: item, []) == []


def test_a_failing_job_is_raised_when_all_have_ended(two_threads):
    go, ended = threading.Event(), []

    def job(item):
        if item == 0:
            go.set()
            raise ValueError("no")
        go.wait(60)
        time.sleep(0.2)  # a caller that does not wait would be gone by now
        ended.append(item)

    with pytest.raises(ValueError, match="no"):
        threads.each(job, [0, 1, 2])
    assert sorted(ended) == [1, 2]
    assert threads.each(lambda item: item + 1, [1, 2]) == [2, 3]


def test_jobs_take_part_in_inference_mode_and_record_no_graph(two_threads):
    x = torch.ones(1, requires_grad=True)

    def job(_):
        return torch.is_inference_mode_enabled(), (x * 2).requires_grad

    assert threads.each(job, [0, 1]) == [(False, False)] * 2
    with torch.inference_mode():
        assert threads.each(job, [0, 1]) == [(True, False)] * 2
    assert threads.each(job, [0, 1]) == [(False, False)] * 2


def test_the_pool_follows_torch(two_threads):
    for total, each in ((2, 1), (3, 1), (17, 2)):
        torch.set_num_threads(total)
        workers = threads.count()
        meet = threading.Barrier(workers, timeout=60)

        def job(_, meet=meet):
            meet.wait()
            return torch.get_num_threads()

        assert threads.each(job, range(workers)) == [each] * min(total, threads.MOST)
        assert torch.get_num_threads() == total
        later = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
        assert later == total, "a thread of the caller's own, begun later, has torch's threads"


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_has_a_pool_of_its_own(two_threads):
    assert threads.each(lambda item: item, [1, 2]) == [1, 2]
    child = os.fork()
    if not child:
        os._exit(0 if threads.each(lambda item: item + os.getpid() * 0, [1, 2]) == [1, 2] else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for its parent's threads")
    assert os.waitstatus_to_exitcode(status) == 0
