"""KLPenalty's gradients, enumerated: what each direction x estimator x placement descends, and what it leaves alone."""

import pytest
import torch
from support import oracles
from support.penalties import (
    ACCEPTED,
    COEF,
    DIRECTIONS,
    OTHERS,
    SILENT,
    WARNED,
    GivenReference,
    close,
    dense_other,
    other_penalty,
    penalty,
)

from klft.penalty import TokenKL
from klft.scores import score_logits

# --- the expected gradient over whole sequences, enumerated ----------------------------------------------------------
#
# The tabular model runs through `measure` behind a begin token at position 0. Each of the 27 sequences has its own copy
# of the table, so that one backward gives every sequence's gradient.

T = oracles.STEPS
IDS = torch.cat([torch.zeros(27, 1, dtype=torch.long), oracles.SEQUENCES], 1)
REAL = torch.ones_like(IDS)


def behind_begin(tables):
    """Logits [27, 4, 3]: position t predicts t + 1; what follows the last token must not matter."""
    return torch.cat([oracles.sequence_logits(tables), torch.full((27, 1, 3), 3.7, dtype=torch.float64)], 1)


def tabular_reference(tables):
    return GivenReference(behind_begin(tables))


def gradients_of(made, theta):
    """(reward part, loss part), each per sequence [27, 13, 3]: a policy gradient by hand, and autograd of the loss."""
    copies = theta.expand(27, -1, -1).clone().requires_grad_()
    kl = made.measure(behind_begin(copies), IDS, REAL, REAL.bool())
    reward_kl = made.reward_kl(kl)
    assert not reward_kl.requires_grad
    losses = made.losses(kl)
    loss_part = torch.zeros_like(copies)
    if losses.requires_grad:
        (loss_part,) = torch.autograd.grad(losses.sum(), copies)
    again = theta.expand(27, -1, -1).clone().requires_grad_()
    surrogate = oracles.sequence_logps(again) * oracles.return_to_go(reward_kl[:, 1:])
    (reward_part,) = torch.autograd.grad(surrogate.sum(), again)
    return made.coef * reward_part, loss_part


def expected_gradients(made, theta):
    return [oracles.mean_and_variance(g, theta)[0] for g in gradients_of(made, theta)]


def weight(theta):
    return oracles.sequence_probabilities(theta.detach()).unsqueeze(-1)


def local(divergence, theta, ref):
    """sum_t E_prefix[grad D_t]: the prefix is sampled, not differentiated."""
    leaf = theta.clone().requires_grad_()
    per_token = divergence(oracles.sequence_logits(leaf), oracles.sequence_logits(ref))
    return torch.autograd.grad((weight(theta) * per_token).sum(), leaf)[0]


def whole(per_token, theta):
    """grad E_pi[sum_t f_t]: prefix and f both differentiated, by autograd through the enumeration."""
    leaf = theta.clone().requires_grad_()
    total = (oracles.sequence_probabilities(leaf) * per_token(leaf).sum(-1)).sum()
    return torch.autograd.grad(total, leaf)[0]


def prefix_kl(divergence, theta, ref):
    """grad sum_t E_prefix~pi[D_t]."""
    return whole(lambda leaf: divergence(oracles.sequence_logits(leaf), oracles.sequence_logits(ref)), theta)


def truth(combination, theta, ref):
    """What MATH.md's tables say each combination's expected gradient is."""
    direction, estimator, placement = combination
    divergence = oracles.reverse_kl if direction == "reverse" else oracles.forward_kl
    if placement == "loss":
        return local(divergence, theta, ref)
    if estimator == "exact" or combination in [("reverse", "k1", "reward"), ("reverse", "k3", "both")]:
        return prefix_kl(divergence, theta, ref)
    if combination == ("reverse", "k3", "reward"):
        return prefix_kl(oracles.reverse_kl, theta, ref) - local(oracles.forward_kl, theta, ref)
    # The rest: a detached f in the reward moves the sampling only, grad E[sum f] less what f's own derivative gives.
    f = {"reversek2": oracles.k2, "forwardk1": oracles.forward_k1, "forwardk3": oracles.forward_k3}[
        direction + estimator
    ]
    ref_logps = oracles.sequence_logps(ref)
    leaf = theta.clone().requires_grad_()
    own = (weight(theta) * f(oracles.sequence_logps(leaf), ref_logps)).sum()
    return whole(lambda x: f(oracles.sequence_logps(x), ref_logps), theta) - torch.autograd.grad(own, leaf)[0]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("combination", ACCEPTED, ids="-".join)
def test_expected_gradient(combination, seed):
    theta, ref = oracles.tabular(seed)
    made = penalty(*combination, tabular_reference(ref))
    reward_part, loss_part = expected_gradients(made, theta)
    close(reward_part + loss_part, COEF * truth(combination, theta, ref))
    has_reward, has_loss = made.placement in ("reward", "both"), made.placement in ("loss", "both")
    assert bool(reward_part.norm() > 1e-3) == has_reward
    assert bool(loss_part.norm() > 1e-3) == has_loss


@pytest.mark.parametrize("placement", ["loss", "both"])
@pytest.mark.parametrize("name", OTHERS)
def test_expected_gradient_of_another_divergence(name, placement):
    theta, ref = oracles.tabular(3)
    reward_part, loss_part = expected_gradients(other_penalty(name, placement, tabular_reference(ref)), theta)
    truth = local if placement == "loss" else prefix_kl
    close(reward_part + loss_part, COEF * truth(dense_other(name), theta, ref))
    assert bool(reward_part.norm() > 1e-3) == (placement == "both")


@pytest.mark.parametrize(
    "combination",
    [
        ("reverse", "k1", "reward"),
        ("reverse", "exact", "both"),
        ("reverse", "exact", "reward"),
        ("reverse", "k3", "both"),
    ],
    ids="-".join,
)
def test_the_right_ones_descend_the_kl_over_sequences(combination):
    theta, ref = oracles.tabular(4)
    leaf = theta.clone().requires_grad_()
    (want,) = torch.autograd.grad(oracles.sequence_kl(leaf, ref), leaf)
    close(sum(expected_gradients(penalty(*combination, tabular_reference(ref)), theta)), COEF * want)


@pytest.mark.parametrize("combination", [c for c in WARNED if c[1] != "exact"], ids="-".join)
def test_the_warned_ones_do_not(combination):
    theta, ref = oracles.tabular(4)
    direction = combination[0]
    want = COEF * prefix_kl(oracles.reverse_kl if direction == "reverse" else oracles.forward_kl, theta, ref)
    got = sum(expected_gradients(penalty(*combination, tabular_reference(ref)), theta))
    assert (got - want).norm() > 0.1 * want.norm()


def test_k3_in_the_reward_is_about_nothing_near_the_reference():
    """At the last step, where no future is left, it vanishes faster than the KL's own gradient."""
    last = slice(1 + oracles.TOKENS, None)
    shares = []
    for spread in (0.1, 0.01):
        theta, ref = oracles.tabular(2, spread)
        (got, _) = expected_gradients(penalty("reverse", "k3", "reward", tabular_reference(ref)), theta)
        shares.append((got[last].norm() / (COEF * local(oracles.reverse_kl, theta, ref)[last]).norm()).item())
    assert shares[0] < 0.2
    assert shares[1] < 0.2 * shares[0]


def test_exact_both_has_less_variance_than_k1():
    for seed in range(4):
        theta, ref = oracles.tabular(seed)
        spread = [
            oracles.mean_and_variance(
                sum(gradients_of(penalty("reverse", *how, tabular_reference(ref)), theta)), theta
            )[1]
            for how in (("exact", "both"), ("k1", "reward"))
        ]
        assert spread[0] < 0.5 * spread[1]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k3_both", [False, True])
def test_losses_have_the_kl_as_their_expected_value(direction, k3_both):
    theta, ref = oracles.tabular(1)
    placement = "both" if k3_both and direction == "reverse" else "loss"
    made = penalty(direction, "k3", placement, tabular_reference(ref))
    losses = made.losses(made.measure(behind_begin(theta), IDS, REAL, REAL.bool()))
    divergence = oracles.reverse_kl if direction == "reverse" else oracles.forward_kl
    exact = divergence(oracles.sequence_logits(theta), oracles.sequence_logits(ref))
    close((weight(theta) * losses[:, 1:]).sum(), COEF * (weight(theta) * exact).sum())


# --- off-policy, one position ----------------------------------------------------------------------------------------


def one_position_kl(rows, ref, behaviour):
    """TokenKL [V, 1]: every token of the vocabulary once, sampled by `behaviour`."""
    ids = torch.arange(len(ref)).unsqueeze(1)
    scores = score_logits(rows.unsqueeze(1), ref.expand_as(rows).unsqueeze(1), ids)
    logp = torch.log_softmax(behaviour, -1).unsqueeze(1)
    return TokenKL(scores, torch.ones_like(ids, dtype=torch.bool), behaviour_logp=logp)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "combination", [c for c in SILENT if c[2] != "reward"] + [("reverse", "k1", "reward")], ids="-".join
)
def test_off_policy_gradient_at_one_position(combination, seed):
    direction, estimator, _ = combination
    theta, ref, behaviour = oracles.one_position(seed=seed)
    made = penalty(*combination)

    def loss(rows, _ids):
        return made.losses(one_position_kl(rows, ref, behaviour)).squeeze(1)

    value, loss_part = oracles.expected(loss, theta, behaviour)
    detached = made.reward_kl(one_position_kl(theta.repeat(7, 1), ref, behaviour)).squeeze(1)
    reward_part = COEF * (torch.softmax(behaviour, -1) @ (detached.unsqueeze(-1) * oracles.scores(theta)))
    divergence = oracles.reverse_kl if direction == "reverse" else oracles.forward_kl
    kl, gradient = oracles.value_and_gradient(divergence, theta, ref)
    close(reward_part + loss_part, COEF * gradient)
    if estimator in ("k3", "exact"):
        close(value, COEF * kl)


def test_without_the_weight_the_off_policy_gradient_is_another():
    """The same tokens taken for the policy's own: what `behaviour_logp` is there to prevent."""
    theta, ref, behaviour = oracles.one_position(seed=0)
    made = penalty("reverse", "k2", "loss")

    def loss(rows, _ids):
        kl = one_position_kl(rows, ref, behaviour)
        return made.losses(TokenKL(kl.scores, kl.mask)).squeeze(1)

    _, got = oracles.expected(loss, theta, behaviour)
    _, want = oracles.value_and_gradient(oracles.reverse_kl, theta, ref)
    assert (got - COEF * want).norm() > 0.1 * COEF * want.norm()


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", [c for c in SILENT if c[2] != "reward"], ids="-".join)
def test_no_gradient_reaches_the_reference(combination):
    theta, ref = oracles.tabular(0)
    ref_logits = behind_begin(ref).requires_grad_()
    leaf = behind_begin(theta).requires_grad_()
    made = penalty(*combination, GivenReference(ref_logits))
    made.losses(made.measure(leaf, IDS, REAL, REAL.bool())).sum().backward()
    assert ref_logits.grad is None
    assert leaf.grad[:, :-1].ne(0).any()
    assert leaf.grad[:, -1].eq(0).all()
    if combination == ("reverse", "exact", "loss"):
        _, want = oracles.value_and_gradient(oracles.reverse_kl, leaf, ref_logits.detach())
        close(leaf.grad[:, :-1], COEF * want[:, :-1])
