"""Scores and KL into per-token rewards: where the score lands, what a row sums to, and the running scale."""

import json
import math

import pytest
import torch
from support import oracles

import klft
from klft.shaping import RunningMoments, finish_scores, weigh_scores

NAN = math.nan


def masks(*rows):
    return torch.tensor([[c == "x" for c in row] for row in rows])


# --- shape_rewards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "last"),
    [("x....", 0), ("xxx..", 2), ("xxxxx", 4), ("..xx.", 3), ("x.x.x", 4), ("xx.x.", 3), ("....x", 4)],
)
def test_the_score_lands_on_the_last_token_that_counts(row, last):
    mask = masks(row)
    rewards = klft.shape_rewards(torch.tensor([2.5]), torch.ones(1, 5), mask, coef=0.0)
    expected = torch.zeros(1, 5)
    expected[0, last] = 2.5
    assert torch.equal(rewards, expected)


def test_one_hot_at_length_minus_one():
    lengths = torch.arange(1, 9)
    mask = torch.arange(8) < lengths.unsqueeze(-1)
    rewards = klft.shape_rewards(torch.ones(8), torch.zeros(8, 8), mask, coef=1.0)
    assert torch.equal(rewards, torch.eye(8))


def test_every_token_that_counts_pays_for_its_kl():
    mask = masks("xxx..", "x.x.x", ".....", "xxxxx")
    gen = torch.Generator().manual_seed(0)
    kl, scores = torch.randn(4, 5, generator=gen, dtype=torch.float64), torch.tensor([1.0, -2.0, 3.0, 4.0]).double()
    rewards = klft.shape_rewards(scores, kl, mask, coef=0.3)
    for i, last in enumerate([2, 4, None, 4]):
        for t in range(5):
            paid = -0.3 * kl[i, t].item() if mask[i, t] else 0.0
            assert rewards[i, t].item() == pytest.approx(paid + (scores[i].item() if t == last else 0.0), abs=1e-15)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("coef", [0.0, 0.05, 2.0])
def test_a_row_sums_to_score_minus_coef_times_kl(seed, coef):
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(32, 12, generator=gen) < 0.5
    mask[0] = False
    logp, ref_logp = (-torch.rand(32, 12, generator=gen, dtype=torch.float64) for _ in range(2))
    kl, scores = klft.k1(logp, ref_logp), torch.randn(32, generator=gen, dtype=torch.float64)
    rewards = klft.shape_rewards(scores, kl, mask, coef=coef)
    expected = scores * mask.any(-1) - coef * torch.where(mask, kl, 0.0).sum(-1)
    torch.testing.assert_close(rewards.sum(-1), expected, rtol=1e-13, atol=1e-14)
    assert torch.equal(rewards[~mask], torch.zeros_like(rewards[~mask]))


@pytest.mark.parametrize("poison", [NAN, math.inf])
def test_nothing_under_the_mask_counts(poison):
    mask = masks("xxx..", "x.x..", ".....")
    kl = torch.where(mask, 0.5, poison)
    scores = torch.tensor([1.0, 2.0, poison])
    rewards = klft.shape_rewards(scores, kl, mask, coef=0.1)
    expected = klft.shape_rewards(torch.tensor([1.0, 2.0, 0.0]), torch.full((3, 5), 0.5), mask, coef=0.1)
    assert torch.equal(rewards, expected)
    assert torch.equal(rewards[2], torch.zeros(5))


def test_rewards_are_detached():
    scores, kl = torch.ones(2, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    assert not klft.shape_rewards(scores, kl, torch.ones(2, 3, dtype=torch.bool), coef=0.1).requires_grad


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches(shape):
    rewards = klft.shape_rewards(torch.ones(shape[0]), torch.ones(shape), torch.ones(shape, dtype=torch.bool), coef=1.0)
    assert rewards.shape == shape


def test_rewards_keep_the_precision_of_the_kl():
    mask = torch.ones(2, 3, dtype=torch.bool)
    for kl, scores in [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)]:
        assert klft.shape_rewards(torch.ones(2, dtype=scores), torch.ones(2, 3, dtype=kl), mask, coef=0.1).dtype == kl


# --- scores ----------------------------------------------------------------------------------------------------------


def test_weights_and_scores_that_do_not_apply():
    scores = torch.tensor([[1.0, 10.0, -2.0], [NAN, 10.0, -2.0], [1.0, NAN, NAN], [NAN, NAN, NAN]])
    weights = torch.tensor([1.0, 0.5, 2.0])
    assert torch.equal(weigh_scores(scores, weights), torch.tensor([2.0, 1.0, 1.0, 0.0]))
    assert torch.equal(weigh_scores(scores[:, :1], torch.tensor([1.0])), torch.tensor([1.0, 0.0, 1.0, 0.0]))


def test_an_infinite_score_is_not_hidden():
    scores = torch.tensor([[math.inf, 1.0], [-math.inf, 1.0]])
    assert weigh_scores(scores, torch.ones(2)).tolist() == [math.inf, -math.inf]


def test_missing_eos_penalty():
    scores, terminated = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([True, False, False])
    assert torch.equal(finish_scores(scores, terminated), scores)
    assert torch.equal(finish_scores(scores, terminated, missing_eos_penalty=1.5), torch.tensor([1.0, 0.5, -4.5]))
    assert torch.equal(finish_scores(scores, terminated, missing_eos_penalty=0.0), scores)


def test_clip_comes_before_the_penalty():
    scores, terminated = torch.tensor([5.0, 5.0, -5.0, 0.5]), torch.tensor([True, False, False, True])
    clipped = finish_scores(scores, terminated, clip=2.0, missing_eos_penalty=1.0)
    assert torch.equal(clipped, torch.tensor([2.0, 1.0, -3.0, 0.5]))
    assert torch.equal(finish_scores(scores, terminated, clip=2.0), torch.tensor([2.0, 2.0, -2.0, 0.5]))


# --- RunningMoments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[40], [20, 20], [1] * 40, [1, 39], [39, 1], [3, 0, 7, 30], [0, 40]])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_moments_are_those_of_everything_seen(sizes, offset):
    x = offset + 3 * torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments, seen = RunningMoments(), 0
    for batch in torch.split(x, sizes):
        moments.learn(batch)
        seen += len(batch)
        if not seen:
            continue
        so_far = x[:seen]
        std = so_far.std(correction=0)
        expected = (batch - so_far.mean()) / (std if std > 0 else 1.0)
        torch.testing.assert_close(moments.normalise(batch), expected, rtol=1e-8, atol=1e-9)
    assert moments.count == 40
    assert moments.mean == pytest.approx(x.mean().item(), rel=1e-12)
    assert math.sqrt(moments.sum_squares / 40) == pytest.approx(x.std(correction=0).item(), rel=1e-9)


def test_normalising_learns_nothing():
    moments = RunningMoments()
    moments.learn(torch.tensor([1.0, 3.0]))
    before = moments.state_dict()
    assert torch.equal(moments.normalise(torch.tensor([1.0, 3.0, 5.0])), torch.tensor([-1.0, 1.0, 3.0]))
    assert moments.state_dict() == before


def test_equal_scores_are_only_centred():
    moments = RunningMoments()
    assert torch.equal(moments.normalise(torch.tensor([7.0])), torch.tensor([7.0]))  # nothing learnt yet
    moments.learn(torch.full((4,), 7.0))
    assert torch.equal(moments.normalise(torch.tensor([7.0, 9.0])), torch.tensor([0.0, 2.0]))
    moments.learn(torch.zeros(0))
    assert moments.count == 4
    assert moments.normalise(torch.zeros(0)).shape == (0,)


def test_moments_state_round_trip():
    gen = torch.Generator().manual_seed(1)
    first, second = torch.randn(10, generator=gen), torch.randn(6, generator=gen)
    moments, resumed = RunningMoments(), RunningMoments()
    moments.learn(first)
    resumed.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    for each in (moments, resumed):
        each.learn(second)
    assert torch.equal(resumed.normalise(second), moments.normalise(second))
    assert resumed.state_dict() == moments.state_dict()


@pytest.mark.parametrize("before", [0, 5])
def test_moments_over_two_processes(before):
    """`reduce` adds the other process's sums: both then hold the moments of all scores."""
    x = torch.randn(before + 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mine, other = x[before : before + 4], x[before + 4 :]

    def reduce(t):
        if t.dim():  # [count, sum]
            return t + torch.stack([torch.tensor(float(len(other)), dtype=t.dtype), other.sum()])
        return t + (other - x[before:].mean()).square().sum()

    moments = RunningMoments()
    moments.learn(x[:before])
    moments.learn(mine, reduce)
    expected = (mine - x.mean()) / x.std(correction=0)
    torch.testing.assert_close(moments.normalise(mine), expected, rtol=1e-12, atol=1e-14)
    assert moments.count == before + 12


def test_rewards_of_normalised_scores_end_to_end():
    theta, ref = oracles.tabular()
    logp, ref_logp = oracles.sequence_logps(theta), oracles.sequence_logps(ref)
    scores = weigh_scores(torch.stack([logp.sum(-1), ref_logp.sum(-1)], -1), torch.tensor([1.0, -1.0]).double())
    kl = klft.k1(logp, ref_logp)
    rewards = klft.shape_rewards(scores, kl, torch.ones(27, 3, dtype=torch.bool), coef=1.0)
    # The score is the sequence's log-ratio, the penalty takes it back.
    torch.testing.assert_close(rewards.sum(-1), torch.zeros(27, dtype=torch.float64), rtol=0, atol=1e-14)
