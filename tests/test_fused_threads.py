"""Slices of the vocabulary over threads: the dense result with any number of them, and a pool that is safe to share."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from oracles import HEADS, two_heads, value_and_gradients
from test_divergences import ROWS
from test_fused import (
    EXACT,
    LOSSES,
    all_tokens,
    dense_divergence,
    dense_loss,
    dense_scores,
    dense_total,
    every_function,
    mix,
    our_divergence,
    our_loss,
    our_scores,
    our_total,
    weights,
)

from klft import fused
from klft.fused import threads


@pytest.fixture(params=[1, 2, 3])
def count(request, monkeypatch):
    """So many threads, slices of one or two rows of the vocabulary."""
    before = torch.get_num_threads()
    monkeypatch.setattr(fused, "CPU_SLICE", 5)
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
    few = replace(
        two, weight=two.weight[kept], bias=two.bias[kept], ref_weight=two.ref_weight[kept],
        ref_bias=two.ref_bias[kept], token_ids=torch.tensor([kept.index(i) for i in two.token_ids]),
    )  # fmt: skip
    truth = value_and_gradients(dense_total(function, few), few.leaves)
    value, hidden, weight, bias = value_and_gradients(our_total(function, two, all_tokens(two)), two.leaves)
    torch.testing.assert_close([value, hidden, weight[kept], bias[kept]], truth, **EXACT)
    assert (weight[gone] == 0).all()
    assert (bias[gone] == 0).all()


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
