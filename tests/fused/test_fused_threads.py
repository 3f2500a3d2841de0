"""Slices of the vocabulary over threads: the dense result with any number of them, and a pool that is safe to share."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.divergences import ROWS
from support.fused import (
    DIFFERENTIABLE,
    EXACT,
    LOSSES,
    all_tokens,
    dense_divergence,
    dense_loss,
    dense_scores,
    dense_total,
    every_function,
    limits,
    mix,
    our_divergence,
    our_loss,
    our_scores,
    our_total,
    weights,
)
from support.oracles import HEADS, two_heads, value_and_gradients

from klft.fused import torch_backend, workers
from klft.fused.collectives import Collectives
from klft.fused.model_side import ModelSide
from klft.fused.plan import Limits, make_plan
from klft.heads import LMHead


@pytest.fixture(params=[1, 2, 3])
def count(request, monkeypatch):
    """So many threads, slices of one or two rows of the vocabulary."""
    before = torch.get_num_threads()
    monkeypatch.setitem(*limits(block_logits=5))
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_are_the_dense_ones(kind, count):
    for tokens, vocab in [(3, 13), (2, 7), (2, 1)]:
        two = two_heads(tokens, vocab, kind)
        truth = value_and_gradients(lambda *x, t=two: mix(dense_scores(t, *x)), two.leaves, weights(tokens))
        found = value_and_gradients(lambda *x, t=two: mix(our_scores(t, *x)), two.leaves, weights(tokens))
        torch.testing.assert_close(found, truth, **EXACT)
        loss = LOSSES["products_of_scores"]
        truth = value_and_gradients(dense_loss(two, loss), two.leaves, -3.7)
        torch.testing.assert_close(value_and_gradients(our_loss(two, loss), two.leaves, -3.7), truth, **EXACT)
        for name, params in ROWS:
            truth = value_and_gradients(dense_divergence(two, name, *params), two.leaves, weights(tokens))
            found = value_and_gradients(our_divergence(two, name, *params), two.leaves, weights(tokens))
            torch.testing.assert_close(found, truth, **EXACT)


def test_the_best_tokens_are_found_across_slices(count):
    two = two_heads(3, 13, "all")
    scores = our_scores(two, *two.leaves, top_k=5)
    dense = torch.softmax(two.logits(*two.leaves), -1).topk(5)
    torch.testing.assert_close(scores.top_p, dense.values, **EXACT)
    assert torch.equal(scores.top_ids, dense.indices)


@every_function
def test_suppressed_tokens_are_as_if_they_were_not_there(function, count):
    two, kept = two_heads(3, 13, "bias"), [0, *range(4, 11), 12]
    gone = [i for i in range(13) if i not in kept]  # some slices lose all their rows, some one of two
    for bias in (two.bias, two.ref_bias):
        bias -= 800  # its exponential is 0: a slice without a finite logit must have no say in what is subtracted
        bias[gone] = -torch.inf
    two.token_ids.copy_(torch.tensor([5, 0, 12]))
    few = two.only(kept)
    truth = value_and_gradients(dense_total(function, few), few.leaves)
    value, hidden, weight, bias = value_and_gradients(our_total(function, two, all_tokens(two)), two.leaves)
    torch.testing.assert_close([value, hidden, weight[kept], bias[kept]], truth, **EXACT)
    assert (weight[gone] == 0).all()
    assert (bias[gone] == 0).all()


@pytest.mark.parametrize("field", DIFFERENTIABLE)
def test_suppressed_slices_below_a_low_log_sum_exp(field, count):
    """exp(-lse) is no number there, and what a slice without a finite logit is multiplied with must be one."""
    two = two_heads(3, 13, "bias")
    two.bias -= 800
    two.bias[5:] = two.ref_bias[5:] = -torch.inf
    two.token_ids.copy_(torch.tensor([0, 4, 1]))
    few = two.only(list(range(5)))
    pick = lambda scores: getattr(scores, field).sum()
    truth = value_and_gradients(dense_loss(few, pick), few.leaves)
    for ours in (our_loss(two, pick), lambda *x: pick(our_scores(two, *x))):
        value, hidden, weight, bias = value_and_gradients(ours, two.leaves)
        torch.testing.assert_close([value, hidden, weight[:5], bias[:5]], truth, **EXACT)
        assert (weight[5:] == 0).all()
        assert (bias[5:] == 0).all()


@every_function
def test_a_run_repeats_itself_to_the_bit(function, count):
    two = two_heads(3, 13, "all")
    total = our_total(function, two, all_tokens(two))
    first = value_and_gradients(total, two.leaves)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(value_and_gradients(total, two.leaves), first, strict=True))


@every_function
def test_callers_in_threads_of_their_own(function, count):
    twos = [two_heads(3, 13, "all", seed=seed) for seed in range(4)]
    found = {}

    def work(i):
        torch.set_num_threads(count)
        two = twos[i]
        found[i] = [value_and_gradients(our_total(function, two, all_tokens(two)), two.leaves) for _ in range(5)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, two in enumerate(twos):
        truth = value_and_gradients(dense_total(function, two), two.leaves)
        for run in found[i]:
            torch.testing.assert_close(run, truth, **EXACT)


def test_a_loss_under_inference_mode(count):
    two = two_heads(3, 13, "all")
    truth = dense_scores(two, *two.leaves).reverse_kl
    with torch.inference_mode():
        torch.testing.assert_close(our_scores(two, *two.leaves).reverse_kl, truth, **EXACT)


# --- the pool --------------------------------------------------------------------------------------------------------


def test_jobs_run_at_once_in_order_and_each_with_its_share_of_torch(two_threads):
    meet = threading.Barrier(2, timeout=60)  # breaks if one job waits for the other

    def job(item):
        meet.wait()
        return item, threading.get_ident(), torch.get_num_threads()

    (a, first, n), (b, second, m) = workers.each(job, [10, 20])
    assert (a, b) == (10, 20)
    assert len({first, second, threading.get_ident()}) == 3
    assert (n, m) == (1, 1), "two threads that use two cores each would fight"
    assert torch.get_num_threads() == 2


def test_one_job_stays_in_its_thread(two_threads):
    assert workers.each(lambda item: (item, threading.get_ident()), [7]) == [(7, threading.get_ident())]
    assert workers.each(lambda item: item, []) == []


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
        workers.each(job, [0, 1, 2])
    assert sorted(ended) == [1, 2]
    assert workers.each(lambda item: item + 1, [1, 2]) == [2, 3]


def test_jobs_take_part_in_inference_mode_and_record_no_graph(two_threads):
    x = torch.ones(1, requires_grad=True)

    def job(_):
        return torch.is_inference_mode_enabled(), (x * 2).requires_grad

    assert workers.each(job, [0, 1]) == [(False, False)] * 2
    with torch.inference_mode():
        assert workers.each(job, [0, 1]) == [(True, False)] * 2
    assert workers.each(job, [0, 1]) == [(False, False)] * 2


def test_the_pool_follows_torch(two_threads):
    for total, jobs, each in ((2, 2, 1), (3, 3, 1), (8, 8, 1), (15, 7, 2), (17, 5, 3), (64, 8, 8)):
        torch.set_num_threads(total)
        assert workers.count() == jobs
        meet = threading.Barrier(jobs, timeout=60)

        def job(_, meet=meet):
            meet.wait()
            return torch.get_num_threads()

        assert workers.each(job, range(jobs)) == [each] * jobs
        assert torch.get_num_threads() == total
        later = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
        assert later == total, "a thread of the caller's own, begun later, has torch's threads"


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_has_a_pool_of_its_own(two_threads):
    assert workers.each(lambda item: item, [1, 2]) == [1, 2]
    child = os.fork()
    if not child:
        os._exit(0 if workers.each(lambda item: item + os.getpid() * 0, [1, 2]) == [1, 2] else 1)
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


def test_an_interrupted_caller_leaves_no_job_behind(two_threads, monkeypatch):
    begun, ended, go = [], [], threading.Event()

    def job(item):
        begun.append(item)
        go.wait(60)
        ended.append(item)

    def interrupted(futures):
        monkeypatch.undo()
        threading.Timer(0.2, go.set).start()
        raise KeyboardInterrupt

    workers.each(lambda item: item, [0, 1])
    monkeypatch.setattr(workers, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workers.each(job, range(9))
    assert sorted(begun) == sorted(ended)
    assert len(begun) < 9


def test_a_failed_call_keeps_nothing_alive(two_threads):
    class Large:
        pass

    def fail():
        large = Large()
        alive = weakref.ref(large)

        def job(item):
            assert large
            raise ValueError(item)

        with pytest.raises(ValueError, match=r"1|2"):
            workers.each(job, [1, 2])
        return alive

    gc.collect()
    gc.disable()
    try:
        assert fail()() is None, "only the garbage collector would free a failed call's tiles"
    finally:
        gc.enable()


def test_threads_that_cannot_be_started_are_done_without(monkeypatch):
    before, start, started = torch.get_num_threads(), threading.Thread.start, []

    def refuse(self):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    torch.set_num_threads(4)
    monkeypatch.setattr(workers, "_pool", None)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    try:
        assert workers.each(lambda item: item + 1, [1, 2, 3]) == [2, 3, 4]
        assert torch.get_num_threads() == 4
        started[0].join(60)
        assert not started[0].is_alive(), "it waits for those that never came"
    finally:
        torch.set_num_threads(before)


AT_THE_END = """
import atexit, threading, time, torch
from klft.fused import workers

torch.set_num_threads(2)
FIRST
def late():
    threading.main_thread().join()
    print("thread", workers.each(lambda item: item + 1, [1, 2]), flush=True)

atexit.register(lambda: print("atexit", workers.each(lambda item: item + 1, [1, 2]), flush=True))
threading.Thread(target=late).start()
"""


@pytest.mark.parametrize("first", ["", "workers.each(lambda item: item, [1, 2])"], ids=["new pool", "old pool"])
def test_python_on_its_way_out(first):
    run = [sys.executable, "-c", AT_THE_END.replace("FIRST", first)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["thread [2, 3]", "atexit [2, 3]", ""]
    assert done.stderr == ""


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 16])
def test_every_thread_has_a_part(tokens):
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        side = ModelSide(torch.zeros(tokens, 1), LMHead(torch.zeros(151_936, 1)), 1.0)
        limits = Limits(1 << 30, 512, 1 << 18)
        plan = make_plan(side, None, torch.zeros(tokens).long(), Collectives(None), torch_backend, [False] * 3, limits)
        shares = Counter()
        plan.for_each_block(lambda _, workspace: shares.update([id(workspace)]), plan.workspaces())
        if tokens > 1:
            assert len(shares) == 8
            assert len(set(shares.values())) == 1
        blocks = plan.geometry.vocab_blocks
        assert blocks[-1].stop == 151_936
        assert max(rows.stop - rows.start for rows in blocks) * tokens <= 1 << 18
    finally:
        torch.set_num_threads(before)
