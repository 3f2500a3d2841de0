"""KLPenalty: what each direction x estimator x placement is worth, enumerated, and how `measure` lines up tokens."""

import itertools
import math
import subprocess
import sys
import warnings

import pytest
import torch
from support import oracles
from transformers import LlamaConfig, LlamaForCausalLM

from klft import AdaptiveKL, FixedKL, FrozenReference, KLPenalty, TargetKL
from klft.penalty import TokenKL, TokenScores, score_logits

COEF = 0.3
INF, NAN = math.inf, math.nan
DIRECTIONS, ESTIMATORS, PLACEMENTS = ("reverse", "forward"), ("k1", "k2", "k3", "exact"), ("reward", "loss", "both")
TIGHT = {"rtol": 1e-10, "atol": 1e-13}

# What every combination is, written out: a word of the message it is refused or warned with, or None for silence.
REFUSED = {
    ("reverse", "k1", "loss"): "zero in expectation",
    ("reverse", "k1", "both"): "zero in expectation",
    ("reverse", "k2", "both"): "counts the KL twice",
    ("forward", "k1", "loss"): "zero in expectation",
    ("forward", "k1", "both"): "zero in expectation",
    ("forward", "k2", "reward"): "no k2 of the forward KL",
    ("forward", "k2", "loss"): "no k2 of the forward KL",
    ("forward", "k2", "both"): "no k2 of the forward KL",
    ("forward", "k3", "both"): "counts the KL twice",
}
WARNED = {
    ("reverse", "k2", "reward"): "reverse k2 in the reward: its expected gradient is not that of a KL",
    ("reverse", "k3", "reward"): "reverse k3 in the reward: its expected gradient is about zero near the reference",
    ("reverse", "exact", "reward"): "reverse exact in the reward: alone it has the wrong gradient.*placement='both'",
    ("forward", "exact", "reward"): "forward exact in the reward: alone it has the wrong gradient.*placement='both'",
    ("forward", "k1", "reward"): "forward k1 in the reward: its expected gradient is not that of the forward KL",
    ("forward", "k3", "reward"): "forward k3 in the reward: its expected gradient is not that of the forward KL",
}
SILENT = [
    ("reverse", "k1", "reward"),
    ("reverse", "k2", "loss"),
    ("reverse", "k3", "loss"),
    ("reverse", "k3", "both"),
    ("reverse", "exact", "loss"),
    ("reverse", "exact", "both"),
    ("forward", "k3", "loss"),
    ("forward", "exact", "loss"),
    ("forward", "exact", "both"),
]
ACCEPTED = SILENT + list(WARNED)


class GivenReference(FrozenReference):
    """A reference whose logits [B, T, V] are known beforehand, for whatever ids."""

    def __init__(self, logits=None):
        self.logits = logits

    def __call__(self, input_ids, attention_mask, keep=0):
        return self.logits[:, -keep:]


ANY = GivenReference()


def penalty(direction, estimator, placement, reference=ANY, **more):
    """A penalty without its warning: that one is another test's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KLPenalty(
            reference, direction=direction, estimator=estimator, placement=placement,
            **({"controller": FixedKL(COEF)} | more),
        )  # fmt: skip


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TIGHT)


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


# --- measure, on a model ---------------------------------------------------------------------------------------------

VOCAB = 19


def llama(seed, vocab_size=VOCAB):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def policy():
    return llama(0)


@pytest.fixture(scope="module")
def ref_model():
    return llama(1)


PROMPT, LENGTHS, WIDTH = 2, (7, 5, 3), 7


def tokens(side):
    """Ids, attention mask and completion mask [3, 7]; the first PROMPT tokens of each row are its prompt."""
    gen = torch.Generator().manual_seed(5)
    ids = torch.zeros(3, WIDTH, dtype=torch.long)
    attention = torch.zeros(3, WIDTH, dtype=torch.long)
    completion = torch.zeros(3, WIDTH, dtype=torch.bool)
    for i, n in enumerate(LENGTHS):
        start = 0 if side == "right" else WIDTH - n
        ids[i, start : start + n] = torch.randint(1, VOCAB, (n,), generator=gen)
        attention[i, start : start + n] = 1
        completion[i, start + PROMPT : start + n] = True
    return ids, attention, completion


def forward(model, ids, attention):
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=attention, position_ids=positions).logits


def one_by_one(model, ids, attention, temperature):
    """Float64 log-probabilities [3, 7, V] of the distribution that predicts each token, a row at a time, no padding."""
    wide = torch.zeros(*ids.shape, VOCAB, dtype=torch.float64)
    for i in range(len(ids)):
        real = attention[i].bool().nonzero().flatten()
        for place in range(1, len(real)):
            with torch.no_grad():
                logits = model(input_ids=ids[i, real[:place]].unsqueeze(0)).logits[0, -1]
            wide[i, real[place]] = torch.log_softmax(logits.double() / temperature, -1)
    return wide


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_measure_aligns_each_kl_with_the_token_it_predicts(policy, ref_model, side, temperature):
    ids, attention, completion = tokens(side)
    made = KLPenalty(FrozenReference(ref_model))
    kl = made.measure(forward(policy, ids, attention), ids, attention, completion, temperature=temperature)
    lp, lq = (one_by_one(m, ids, attention, temperature) for m in (policy, ref_model))
    said = ids.unsqueeze(-1)
    want = {
        "logp": lp.gather(-1, said).squeeze(-1),
        "ref_logp": lq.gather(-1, said).squeeze(-1),
        "entropy": -(lp.exp() * lp).sum(-1),
        "ref_entropy": -(lq.exp() * lq).sum(-1),
        "reverse_kl": (lp.exp() * (lp - lq)).sum(-1),
        "forward_kl": (lq.exp() * (lq - lp)).sum(-1),
    }
    assert torch.equal(kl.mask, completion)
    for name, expected in want.items():
        got = getattr(kl.scores, name)[completion].double()
        torch.testing.assert_close(got, expected[completion], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    agree = (lp.argmax(-1) == lq.argmax(-1))[completion]
    assert torch.equal(kl.scores.top1_agree[completion], agree)
    k1 = want["logp"] - want["ref_logp"]
    torch.testing.assert_close(made.reward_kl(kl)[completion].double(), k1[completion], rtol=2e-5, atol=5e-5)
    assert made.reward_kl(kl)[~completion].eq(0).all()


def test_the_first_token_never_counts(policy, ref_model):
    ids, attention, _ = tokens("right")
    everything = torch.ones_like(ids, dtype=torch.bool)
    made = KLPenalty(FrozenReference(ref_model))
    logits = forward(policy, ids, attention)
    kl = made.measure(logits, ids, attention, everything)
    assert not kl.mask[:, 0].any()
    assert kl.mask[:, 1:].all()
    changed = logits.clone()
    changed[:, -1] += torch.randn(VOCAB)  # predicts a token that is not there
    for name in ("reward_kl", "losses", "token_kl"):
        torch.testing.assert_close(
            getattr(made, name)(made.measure(changed, ids, attention, everything)), getattr(made, name)(kl)
        )


@pytest.mark.parametrize("how", [("k1", "reward"), ("k2", "loss"), ("k3", "both"), ("exact", "both")], ids="-".join)
def test_left_and_right_padding_give_the_same_penalty(policy, ref_model, how):
    made = penalty("reverse", *how, FrozenReference(ref_model))
    parts = {}
    for side in ("right", "left"):
        ids, attention, completion = tokens(side)
        kl = made.measure(forward(policy, ids, attention), ids, attention, completion)
        parts[side] = [
            x[completion] for x in (made.reward_kl(kl), made.losses(kl), made.rewards(torch.arange(3.0), kl))
        ]
    for right, left in zip(parts["right"], parts["left"], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF])
def test_an_impossible_temperature_is_refused(policy, ref_model, temperature):
    ids, attention, completion = tokens("right")
    with pytest.raises(ValueError, match=f"temperature must be a finite number above 0, got {temperature}"):
        KLPenalty(FrozenReference(ref_model)).measure(
            forward(policy, ids, attention), ids, attention, completion, temperature=temperature
        )


def test_equal_models_have_a_kl_of_exactly_zero(policy):
    ids, attention, completion = tokens("left")
    made = penalty("reverse", "exact", "both", FrozenReference(policy))
    kl = made.measure(forward(policy, ids, attention), ids, attention, completion)
    assert kl.scores.reverse_kl[completion].eq(0).all()
    assert kl.scores.forward_kl[completion].eq(0).all()
    assert made.losses(kl).eq(0).all()


def test_a_padded_vocabulary_is_cut(policy):
    """A reference with more rows counts as if it had the policy's."""
    big = llama(1, VOCAB + 6)
    small = llama(1)
    small.load_state_dict({k: v[:VOCAB] if v.shape[:1] == (VOCAB + 6,) else v for k, v in big.state_dict().items()})
    ids, attention, completion = tokens("right")
    logits = forward(policy, ids, attention)
    got, want = (KLPenalty(FrozenReference(m)).measure(logits, ids, attention, completion) for m in (big, small))
    torch.testing.assert_close(got.scores.reverse_kl, want.scores.reverse_kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.scores.ref_logp, want.scores.ref_logp, rtol=1e-5, atol=1e-6)


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


# --- what is broken, masked or infinite ------------------------------------------------------------------------------

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
        assert kl.clipped == 1
        losses.sum().backward()
        assert leaf.grad.isfinite().all()
        assert leaf.grad[1, 1].eq(0).all()  # clipped: no gradient
        assert leaf.grad[1, 0].ne(0).any()  # not clipped: its own
    if made.placement != "loss":
        charged = 1 if made.estimator == "exact" else 2  # exact charges a token with what followed it
        assert made.reward_kl(kl)[1, charged].item() == pytest.approx(most, rel=1e-12)
        assert kl.clipped == 1


def test_a_clip_bounds_either_sign_and_leaves_the_rest():
    log_ratio = torch.tensor([[-9.0, -1.0, 0.5, 2.0, 9.0]])
    scores = TokenScores(logp=log_ratio, ref_logp=torch.zeros_like(log_ratio))
    made = penalty("reverse", "k1", "reward", clip=3.0)
    kl = TokenKL(scores, torch.ones_like(log_ratio, dtype=torch.bool))
    torch.testing.assert_close(made.reward_kl(kl), torch.tensor([[-3.0, -1.0, 0.5, 2.0, 3.0]]))
    assert kl.clipped == 2


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
