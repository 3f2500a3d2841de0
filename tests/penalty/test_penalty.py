"""KLPenalty: which combinations exist, what is broken, masked or infinite, rewards, losses, controllers and state."""

import itertools
import math
import subprocess
import sys
import warnings

import pytest
import torch
from support import oracles
from support.penalties import (
    ACCEPTED,
    ANY,
    COEF,
    DIRECTIONS,
    ESTIMATORS,
    PLACEMENTS,
    REFUSED,
    SILENT,
    WARNED,
    GivenReference,
    close,
    penalty,
)

from klft import AdaptiveKL, KLPenalty, TargetKL
from klft.penalty import TokenKL
from klft.scores import TokenScores

INF, NAN = math.inf, math.nan

# --- which combinations exist ----------------------------------------------------------------------------------------


def test_every_combination_is_accounted_for():
    everything = set(itertools.product(DIRECTIONS, ESTIMATORS, PLACEMENTS))
    assert everything == set(REFUSED) | set(WARNED) | set(SILENT)
    assert len(REFUSED) + len(WARNED) + len(SILENT) == len(everything)


@pytest.mark.parametrize("combination", REFUSED, ids="-".join)
def test_refused(combination):
    direction, estimator, placement = combination
    with pytest.raises(ValueError, match=REFUSED[combination]):
        KLPenalty(ANY, direction=direction, estimator=estimator, placement=placement)


@pytest.mark.parametrize("combination", WARNED, ids="-".join)
def test_warned_by_name(combination):
    direction, estimator, placement = combination
    with pytest.warns(UserWarning, match=WARNED[combination]) as caught:
        KLPenalty(ANY, direction=direction, estimator=estimator, placement=placement)
    assert len(caught) == 1


@pytest.mark.parametrize("combination", SILENT, ids="-".join)
def test_silent(combination):
    direction, estimator, placement = combination
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = KLPenalty(ANY, direction=direction, estimator=estimator, placement=placement)
    assert (made.direction, made.estimator, made.placement) == combination


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_exact_in_the_reward_becomes_both(direction):
    assert penalty(direction, "exact", "reward").placement == "both"


def test_defaults():
    made = KLPenalty(ANY)
    assert (made.direction, made.estimator, made.placement, made.coef) == ("reverse", "k1", "reward", 0.05)


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("direction", "backward", "reverse, forward"),
        ("estimator", "k4", "k1, k2, k3, exact"),
        ("placement", "rewards", "reward, loss, both"),
        ("estimator", "", "k1, k2, k3, exact"),
    ],
)
def test_unknown_names_list_the_known_ones(option, value, known):
    with pytest.raises(ValueError, match=f"{option}.*: choose one of {known}"):
        KLPenalty(ANY, **{option: value})


@pytest.mark.parametrize("clip", [-1.0, NAN, 0.0])
def test_a_clip_that_makes_no_sense_is_refused(clip):
    with pytest.raises(ValueError, match="clip"):
        KLPenalty(ANY, clip=clip)


# --- what is broken, masked or infinite ------------------------------------------------------------------------------

VOCAB = 19
HOW = [c for c in SILENT if c != ("reverse", "k1", "reward")] + [("reverse", "k1", "reward")]


def small_batch(seed=0):
    """Logits of both models [2, 5, V], ids, and a mask with a hole, as `measure` takes them."""
    gen = torch.Generator().manual_seed(seed)
    logits, ref = (torch.randn(2, 5, VOCAB, generator=gen, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, VOCAB, (2, 5), generator=gen)
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)
    return logits, ref, ids, mask


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("whose", ["policy", "reference", "both"])
@pytest.mark.parametrize("combination", HOW, ids="-".join)
def test_what_is_broken_under_the_mask_changes_nothing(combination, whose, bad):
    logits, ref, ids, mask = small_batch()
    broken_logits, broken_ref = logits.clone(), ref.clone()
    for row, position in (~mask).nonzero().tolist():
        if whose != "reference":
            broken_logits[row, position - 1, ::2] = bad
        if whose != "policy":
            broken_ref[row, position - 1, ::2] = bad
    results = []
    for ours, theirs in ((logits, ref), (broken_logits, broken_ref)):
        leaf = ours.clone().requires_grad_()
        made = penalty(*combination, GivenReference(theirs))
        kl = made.measure(leaf, ids, torch.ones_like(ids), mask)
        losses = made.losses(kl)
        if losses.requires_grad:
            losses.sum().backward()
        results.append((made.reward_kl(kl), losses.detach(), made.rewards(torch.ones(2).double(), kl), leaf.grad))
    for healthy, broken in zip(*results, strict=True):
        if healthy is None:
            assert broken is None
        else:
            assert healthy.isfinite().all()
            close(broken, healthy)


def impossible(direction):
    """A batch where one model gives no probability to what the other says, at sample 1, position 2."""
    logits, ref, ids, mask = small_batch()
    (ref if direction == "reverse" else logits)[1, 1, ids[1, 2]] = -INF
    return logits, ref, ids, mask


@pytest.mark.parametrize("combination", [c for c in HOW if c[0] == "reverse"], ids="-".join)
def test_a_token_the_reference_rules_out_is_an_error_that_names_it(combination):
    logits, ref, ids, mask = impossible("reverse")
    made = penalty(*combination, GivenReference(ref))
    kl = made.measure(logits, ids, torch.ones_like(ids), mask)
    ask = made.losses if made.placement == "loss" else made.reward_kl
    with pytest.raises(ValueError, match=r"reverse KL.*not finite at 1 token.*\[\[1, 2\]\].*`clip`"):
        ask(kl)


def test_forward_exact_names_what_the_policy_rules_out():
    logits, ref, ids, mask = impossible("forward")
    made = penalty("forward", "exact", "loss", GivenReference(ref))
    with pytest.raises(ValueError, match=r"forward KL.*\[\[1, 2\]\]"):
        made.losses(made.measure(logits, ids, torch.ones_like(ids), mask))


def test_nan_logits_on_a_token_that_counts_are_an_error():
    logits, ref, ids, mask = small_batch()
    logits[0, 3] = NAN
    made = penalty("reverse", "k1", "reward", GivenReference(ref), clip=5.0)
    with pytest.raises(ValueError, match=r"\[\[0, 4\]\]"):
        made.reward_kl(made.measure(logits, ids, torch.ones_like(ids), mask))


@pytest.mark.parametrize("combination", [c for c in HOW if c[0] == "reverse"], ids="-".join)
def test_with_a_clip_the_token_is_clipped_and_counted(combination):
    logits, ref, ids, mask = impossible("reverse")
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
    leaf = logits.requires_grad_()
    made = penalty(*combination, GivenReference(ref), clip=4.0)
    kl = made.measure(leaf, ids, torch.ones_like(ids), mask)
    # The clip bounds the log-ratio of a sampled estimator, and the KL itself of the exact one.
    most = {"k1": 4.0, "k2": 8.0, "k3": math.exp(-4) - 1 + 4, "exact": 4.0}[made.estimator]
    if made.placement != "reward":
        losses = made.losses(kl)
        assert losses[1, 2].item() == pytest.approx(COEF * most, rel=1e-12)
        assert made.clipped(kl) == 1
        losses.sum().backward()
        assert leaf.grad.isfinite().all()
        assert leaf.grad[1, 1].eq(0).all()  # clipped: no gradient
        assert leaf.grad[1, 0].ne(0).any()  # not clipped: its own
    if made.placement != "loss":
        charged = 1 if made.estimator == "exact" else 2  # exact charges a token with what followed it
        assert made.reward_kl(kl)[1, charged].item() == pytest.approx(most, rel=1e-12)
        assert made.clipped(kl) == 1


def test_a_clip_bounds_either_sign_and_leaves_the_rest():
    log_ratio = torch.tensor([[-9.0, -1.0, 0.5, 2.0, 9.0]])
    scores = TokenScores(logp=log_ratio, ref_logp=torch.zeros_like(log_ratio))
    made = penalty("reverse", "k1", "reward", clip=3.0)
    kl = TokenKL(scores, torch.ones_like(log_ratio, dtype=torch.bool))
    torch.testing.assert_close(made.reward_kl(kl), torch.tensor([[-3.0, -1.0, 0.5, 2.0, 3.0]]))
    assert made.clipped(kl) == 2


def test_with_a_clip_the_controller_can_be_shown_the_batch():
    logits, ref, ids, mask = impossible("reverse")
    made = penalty("reverse", "k1", "reward", GivenReference(ref), clip=4.0, controller=AdaptiveKL(0.2, 6.0, 1000))
    kl = made.measure(logits, ids, torch.ones_like(ids), mask)
    made.rewards(torch.zeros(2).double(), kl)
    assert 0 < made.update(kl) < INF


@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (2, 0)])
@pytest.mark.parametrize("combination", HOW, ids="-".join)
def test_nothing_to_count_gives_zeros(combination, shape):
    gen = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(*shape, VOCAB, generator=gen) for _ in range(2))
    ids = torch.zeros(shape, dtype=torch.long)
    made = penalty(*combination, GivenReference(ref))
    kl = made.measure(logits.requires_grad_(), ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
    for got in (made.reward_kl(kl), made.losses(kl), made.rewards(torch.ones(shape[0]), kl)):
        assert got.shape == shape
        assert got.eq(0).all()
    assert made.update(kl) == COEF


# --- rewards, losses, update, state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", ACCEPTED, ids="-".join)
def test_rewards_are_detached_and_sum_to_the_score_less_the_kl(combination):
    logits, ref, ids, mask = small_batch()
    made = penalty(*combination, GivenReference(ref))
    kl = made.measure(logits.requires_grad_(), ids, torch.ones_like(ids), mask)
    scores = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    rewards, charge = made.rewards(scores, kl), made.reward_kl(kl)
    assert not rewards.requires_grad
    assert rewards[~mask].eq(0).all()
    close(rewards.sum(-1), scores.detach() - COEF * charge.sum(-1))
    last = [4, 2]
    without = -COEF * charge
    for row, position in enumerate(last):
        close(rewards[row, position] - without[row, position], scores[row].detach())


def test_exact_charges_each_token_with_the_next_ones_kl():
    logits, ref, ids, _ = small_batch()
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    made = penalty("reverse", "exact", "both", GivenReference(ref))
    charge = made.reward_kl(made.measure(logits, ids, torch.ones_like(ids), mask))
    exact = oracles.reverse_kl(logits, ref)  # column t: of the distribution that predicts t + 1
    want = torch.zeros_like(charge)
    want[0, 1:4] = exact[0, 1:4]
    want[1, 1] = exact[1, 1]
    close(charge, want)


@pytest.mark.parametrize("combination", ACCEPTED, ids="-".join)
def test_nothing_goes_where_nothing_belongs(combination):
    logits, ref, ids, mask = small_batch()
    made = penalty(*combination, GivenReference(ref))
    kl = made.measure(logits.requires_grad_(), ids, torch.ones_like(ids), mask)
    losses, charge = made.losses(kl), made.reward_kl(kl)
    assert losses.shape == charge.shape == mask.shape
    if made.placement == "reward":
        assert losses.eq(0).all()
        assert not losses.requires_grad
    else:
        assert losses.requires_grad
        assert losses[mask].ne(0).all()
    if made.placement == "loss":
        assert charge.eq(0).all()
    assert losses[~mask].eq(0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_update_feeds_nats_per_sequence(direction):
    logits, ref, ids, mask = small_batch()
    mask = torch.cat([mask, torch.zeros(1, 5, dtype=torch.bool)])  # a third sequence without a token is no episode
    logits, ref, ids = (torch.cat([x, x[:1]]) for x in (logits, ref, ids))
    made = penalty(direction, "exact", "loss", GivenReference(ref), controller=AdaptiveKL(0.2, target=1.5, horizon=100))
    divergence = oracles.reverse_kl if direction == "reverse" else oracles.forward_kl
    per_token = divergence(logits, ref).roll(1, 1)
    nats = torch.where(mask, per_token, 0.0).sum().item() / 2
    assert 1.3 < nats < 1.7  # inside the controller's clip of +-20%, where its answer depends on the number it is fed
    got = [made.update(made.measure(logits, ids, torch.ones_like(ids), mask)) for _ in range(3)]
    assert got == pytest.approx(oracles.ziegler(0.2, 1.5, 100, [(nats, 2)] * 3), rel=1e-12)
    assert made.coef == got[-1]


def test_the_new_coefficient_is_the_one_used():
    logits, ref, ids, mask = small_batch()
    made = penalty("reverse", "k2", "loss", GivenReference(ref), controller=TargetKL(0.1, target=0.01))
    kl = made.measure(logits, ids, torch.ones_like(ids), mask)
    before = made.losses(kl)
    made.update(kl)
    assert made.coef == 0.2
    close(made.losses(kl), 2 * before)


def test_state_round_trip_continues_the_coefficient():
    logits, ref, ids, mask = small_batch()

    def new():
        return penalty("reverse", "k1", "reward", GivenReference(ref), controller=AdaptiveKL(0.2, 1.0, 100))

    whole, first, second = new(), new(), new()
    kl = whole.measure(logits, ids, torch.ones_like(ids), mask)
    for _ in range(4):
        whole.update(kl)
    for _ in range(2):
        first.update(kl)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.update(kl)
    assert second.coef == whole.coef != 0.2
    with pytest.raises(ValueError, match="cannot continue"):
        penalty("reverse", "k1", "reward", controller=TargetKL(0.2, 1.0)).load_state_dict(first.state_dict())


def test_importing_klft_and_the_penalty_stays_light():
    heavy = ("transformers", "trl", "peft", "accelerate", "datasets", "pandas", "pyarrow", "rich", "beartype")
    code = (
        f"import sys, klft; heavy = {heavy!r}\n"
        "print(sorted(set(heavy) & set(sys.modules)))\n"
        "klft.KLPenalty, klft.FrozenReference\n"
        "print(sorted(set(heavy) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]
