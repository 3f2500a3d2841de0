"""What a caller of fused/ may get wrong, and is told: kept scores, NaN gradients, shards and ranks that do not fit."""

import subprocess
import sys
import warnings

import pytest
import torch
from support.oracles import two_heads
from support.processes import environment

import klft
from klft import LMHead, VocabShard


def inputs(tokens=700, vocab=11):
    two = two_heads(tokens, vocab)
    return (
        two.hidden.float().detach().requires_grad_(),
        LMHead(two.weight.float().detach().requires_grad_()),
        torch.arange(tokens) % vocab,
        two.ref_hidden.float().detach(),
        LMHead(two.ref_weight.float().detach()),
    )


def test_scores_that_are_kept_say_so_when_they_are_read_late():
    kept = []

    def loss_fn(scores):
        kept.append(scores)
        return scores.logp.sum()

    klft.fused_token_loss(loss_fn, *inputs())
    assert len(kept) > 1, "more than one chunk"
    for scores in kept:
        with pytest.raises(RuntimeError, match=r"reverse_kl was read after loss_fn had returned"):
            scores.reverse_kl  # noqa: B018
        assert scores.logp.isfinite().all()  # what was read in time stays


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 2.0])
def test_a_backward_never_runs_the_loss_again(factor):
    calls = []

    def loss_fn(scores):
        calls.append(1)
        return scores.reverse_kl.sum()

    hidden, *others = inputs(tokens=5)
    (klft.fused_token_loss(loss_fn, hidden, *others) * factor).backward()
    assert len(calls) == 1
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all()) == (factor == 2.0)


def test_constants_of_another_length_and_constants_that_are_none():
    hidden, head, ids, *_ = inputs(tokens=5)
    loss_fn = lambda s, a: (s.logp * a).sum()
    with pytest.raises(ValueError, match=r"per_token\[0\] has 4 entries.*5 tokens.*\[mask\]") as error:
        klft.fused_token_loss(loss_fn, hidden, head, ids, per_token=[torch.ones(4)])
    assert "etach" not in str(error.value)
    with pytest.raises(ValueError, match=r"per_token\[1\] requires a gradient.*Detach it"):
        klft.fused_token_loss(loss_fn, hidden, head, ids, per_token=[torch.ones(5), torch.ones(5, requires_grad=True)])
    with pytest.raises(ValueError, match=r"per_token\[0\] has no entries.*5 tokens"):
        klft.fused_token_loss(loss_fn, hidden, head, ids, per_token=[torch.ones(())])


SILENT = {
    "detached": (lambda s: s.logp.detach().sum(), 1),
    "the reference's": (lambda s: s.ref_logp.sum(), 1),
    "of weight 0": (lambda s: s.logp.sum() * 0 + 1, 0),
}


@pytest.mark.parametrize(("loss_fn", "warned"), SILENT.values(), ids=SILENT)
def test_a_loss_without_a_gradient_says_so(loss_fn, warned):
    hidden, *others = inputs()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        klft.fused_token_loss(loss_fn, hidden, *others).backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert len(said) == warned, "once for all chunks"
    assert all("no gradient" in str(w.message) and "detach" in str(w.message) for w in said)


def test_a_loss_that_is_only_looked_at_says_nothing():
    hidden, head, *others = inputs()
    loss_fn = lambda s: s.logp.detach().sum()
    with torch.no_grad():
        klft.fused_token_loss(loss_fn, hidden, head, *others)
    klft.fused_token_loss(loss_fn, hidden.detach(), LMHead(head.weight.detach()), *others)
    hidden, head, ids, *_ = inputs(tokens=0)
    klft.fused_token_loss(lambda _: torch.zeros(()), hidden, head, ids)


def test_part_of_a_vocabulary_needs_someone_with_the_rest():
    hidden, head, ids, *_ = inputs(tokens=5)
    with pytest.raises(ValueError, match=r"start=4.*no other process"):
        klft.token_scores(hidden, LMHead(head.weight[4:], shard=VocabShard(4, 11, 11)), ids)
    whole = klft.token_scores(hidden, LMHead(head.weight, shard=VocabShard(0, 11, 11)), ids)
    assert torch.equal(whole.logp, klft.token_scores(hidden, head, ids).logp)


@pytest.mark.parametrize("what", ["scores", "divergence", "loss"])
def test_hidden_states_of_a_rollout_made_in_inference_mode(what):
    hidden, head, ids, ref_hidden, ref_head = inputs(tokens=5)
    with torch.inference_mode():
        made = hidden.detach() * 1
    assert made.is_inference()

    def value(hidden):
        if what == "scores":
            return klft.token_scores(hidden, head, ids, ref_hidden, ref_head).reverse_kl.sum()
        if what == "divergence":
            return klft.linear_divergence(hidden, head, ref_hidden, ref_head).sum()
        return klft.fused_token_loss(lambda s: s.reverse_kl.sum(), hidden, head, ids, ref_hidden, ref_head)

    (gradient,) = torch.autograd.grad(value(made), [head.weight])
    (expected,) = torch.autograd.grad(value(hidden), [head.weight])
    torch.testing.assert_close(gradient, expected)


RANK = """
import os, sys, torch, torch.distributed as dist, klft
from datetime import timedelta
folder, rank, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120))
shard = klft.VocabShard.even(6, own_tokens=True)
hidden = torch.ones(3, 2, requires_grad=what != "hidden" or rank == 0)
weight = torch.ones(3, 2, requires_grad=what == "fine" or (what == "weight" and rank == 0))
ids = torch.arange(3) + (7 if what == "ids" and rank else 0)
per_token = [torch.ones(2 if what == "per_token" and rank else 3)]
if what == "shape" and rank:
    hidden = hidden[:2]
try:
    head = klft.LMHead(weight, shard=shard)
    loss = klft.fused_token_loss(lambda s, _: s.entropy.sum(), hidden, head, ids, per_token=per_token)
    loss.backward()
    print("trained")
except ValueError as error:
    print(error)
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort an interpreter's end, a destroyed group's too
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("hidden", "(True, False, False), (False, False, False)"),
        ("weight", "(True, True, False), (True, False, False)"),
    ],
)
def test_ranks_that_would_not_meet_in_the_backward_are_told_on_both(what, said, tmp_path):
    for text in both_ranks(tmp_path, what):
        assert said in text
        assert "on all ranks or on none" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"), [("ids", "token_ids"), ("per_token", "per_token[0] has 2 entries"), ("shape", "[N, D] = [3, 2]")]
)
def test_a_wrong_input_of_one_rank_is_an_error_on_both(what, said, tmp_path):
    first, second = both_ranks(tmp_path, what)
    assert "rank(s) [1] of the group refused their own input" in first
    assert said in second


@pytest.mark.slow
def test_ranks_that_meet(tmp_path):
    assert both_ranks(tmp_path, "fine") == ["trained\n"] * 2


def both_ranks(folder, what):
    commands = [[sys.executable, "-c", RANK, str(folder), str(rank), what] for rank in (0, 1)]
    runs = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=environment()) for c in commands]
    texts = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    return texts
