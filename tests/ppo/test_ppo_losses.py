"""PPO's arithmetic against plain loops and closed forms: values, gradients, both sides of every clip."""

import pytest
import torch
from support import tiny

from klft.ppo.losses import gae, policy_losses, value_losses

WIDTH = 7
LENGTHS = {"one token": [1, 1], "full": [WIDTH, WIDTH], "truncated": [3, WIDTH], "none": [0, 0], "mixed": [0, 1, 4, 7]}


def masks(lengths):
    return torch.arange(WIDTH) < torch.tensor(lengths)[:, None]


def rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), WIDTH
    rewards, values = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards, values, torch.randn(len(lengths), generator=generator, dtype=torch.float64)


def plain_gae(rewards, values, length, gamma, lam, last):
    """Schulman et al. 2016, equation 16: a sum of discounted residuals for each token, no recursion."""
    following = [*values[1:length], last]
    residuals = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * residuals[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.97, 1.0), (0.0, 0.3)])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_is_the_sum_of_discounted_residuals(lengths, gamma, lam, bootstrap):
    rewards, values, last = rows(lengths)
    actual = gae(rewards, values, masks(lengths), gamma=gamma, lam=lam, last_value=last if bootstrap else None)
    expected = torch.zeros_like(rewards)
    for i, length in enumerate(lengths):
        ends_with = last[i].item() if bootstrap else 0.0
        row = plain_gae(rewards[i].tolist(), values[i].tolist(), length, gamma, lam, ends_with)
        expected[i, :length] = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (actual[~masks(lengths)] == 0).all()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_with_lambda_one_advantage_plus_value_is_the_reward_to_go(gamma, bootstrap):
    lengths = [1, 3, WIDTH]
    rewards, values, last = rows(lengths, seed=1)
    mask = masks(lengths)
    returns = values + gae(rewards, values, mask, gamma=gamma, lam=1.0, last_value=last if bootstrap else None)
    for i, length in enumerate(lengths):
        for t in range(length):
            to_go = sum(gamma ** (k - t) * rewards[i, k] for k in range(t, length))
            to_go = to_go + gamma ** (length - t) * last[i] * bootstrap
            torch.testing.assert_close(returns[i, t], to_go, rtol=1e-12, atol=1e-12)


def test_what_lies_behind_the_mask_changes_no_advantage():
    lengths = [0, 1, 4, WIDTH]
    rewards, values, last = rows(lengths)
    mask = masks(lengths)
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.8, last_value=last)
    for noise in (1e6, float("nan")):
        dirty = [torch.where(mask, x, noise) for x in (rewards, values)]
        assert torch.equal(gae(*dirty, mask, gamma=0.9, lam=0.8, last_value=last), clean)


def test_gae_of_no_columns():
    empty = torch.zeros(2, 0)
    assert gae(empty, empty, empty.bool(), gamma=1.0, lam=1.0).shape == (2, 0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "slope", "clipped"),
    [
        # `slope` is the derivative in log(ratio). Within the range: -A r, and its derivative is the same number.
        (1.1, 2.0, None, -2.2, -2.2, False),
        (0.9, -2.0, None, 1.8, 1.8, False),
        (1.0, 2.0, None, -2.0, -2.0, False),
        # Past the range in the direction the advantage asks for: constant.
        (1.5, 2.0, None, -2.4, 0.0, True),
        (0.5, -2.0, None, 1.6, 0.0, True),
        # Past the range in the other direction: the way back stays open.
        (0.5, 2.0, None, -1.0, -1.0, False),
        (1.5, -2.0, None, 3.0, 3.0, False),
        # Dual clip: bounds only what a negative advantage costs at a ratio above it.
        (5.0, -2.0, 3.0, 6.0, 0.0, False),
        (2.5, -2.0, 3.0, 5.0, 5.0, False),
        (5.0, 2.0, 3.0, -2.4, 0.0, True),
        (0.5, -2.0, 3.0, 1.6, 0.0, True),
        (5.0, 0.0, 3.0, 0.0, 0.0, False),
    ],
)
def test_policy_loss_on_both_sides_of_the_clip(ratio, advantage, dual, loss, slope, clipped):
    log_ratio = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    losses, decided = policy_losses(log_ratio, torch.tensor([[advantage]], dtype=torch.float64), 0.2, dual)
    (gradient,) = torch.autograd.grad(losses.sum(), log_ratio)
    assert losses.item() == pytest.approx(loss, abs=1e-12)
    assert gradient.item() == pytest.approx(slope, abs=1e-12)
    assert bool(decided) is clipped


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope", "clipped"),
    [
        (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9, False),  # within the range: the plain square
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0, True),  # moved too far towards the target: constant at old + range
        (0.0, 1.0, -3.0, 0.5 * 3.8**2, 0.0, True),  # the same downwards
        (2.0, 1.0, 0.0, 0.5 * 2.0**2, 2.0, False),  # moved too far away from it: the way back stays open
        (0.0, 1.0, 3.0, 0.5 * 3.0**2, -3.0, False),
        (1.0, 1.0, 1.0, 0.0, 0.0, False),
    ],
)
def test_value_loss_on_both_sides_of_the_clip(value, old, target, loss, slope, clipped):
    v = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    fixed = [torch.tensor([[x]], dtype=torch.float64) for x in (old, target)]
    losses, decided = value_losses(v, *fixed, 0.2)
    (gradient,) = torch.autograd.grad(losses.sum(), v)
    assert losses.item() == pytest.approx(loss, abs=1e-12)
    assert gradient.item() == pytest.approx(slope, abs=1e-12)
    assert bool(decided) is clipped


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_each_side_has_its_own_clip(advantage):
    """ratio in 1 - 0.2 ... 1 + 0.5: the loss, its slope and where the clip decided, by hand."""
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.3, 1.49, 1.51, 3.0], dtype=torch.float64)
    log_ratio = ratios.log().requires_grad_()
    losses, decided = policy_losses(log_ratio, torch.full_like(ratios, advantage), 0.2, cliprange_high=0.5)
    outside = (ratios > 1.5) if advantage > 0 else (ratios < 0.8)
    bound = 1.5 if advantage > 0 else 0.8
    torch.testing.assert_close(losses, torch.where(outside, -advantage * bound, -advantage * ratios))
    assert torch.equal(decided, outside)
    (slope,) = torch.autograd.grad(losses.sum(), log_ratio)
    torch.testing.assert_close(slope, torch.where(outside, 0.0, -advantage * ratios))
    same, _ = policy_losses(log_ratio, torch.full_like(ratios, advantage), 0.2, cliprange_high=0.2)
    assert torch.equal(same, policy_losses(log_ratio, torch.full_like(ratios, advantage), 0.2)[0])


def test_the_upper_clip_reaches_the_loss(tmp_path):
    """A policy that moves far within a rollout: a wide upper clip clips fewer tokens; without it cliprange is both."""
    clipped = []
    for i, more in enumerate([{}, {"cliprange_high": 0.1}, {"cliprange_high": 10.0}]):
        run = tiny.trainer(tmp_path / str(i), max_steps=4, num_ppo_epochs=4, cliprange=0.1, learning_rate=3e-2, **more)
        run.train()
        clipped.append([entry["ppo/ratio_clipped/frac"] for entry in tiny.step_logs(run)])
    assert clipped[0] == clipped[1]
    assert sum(clipped[2]) < sum(clipped[0])
