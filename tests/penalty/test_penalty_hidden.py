"""KLPenalty without logits: measure_hidden and token_losses give what logits give, values and gradients; weights."""

import dataclasses
import math

import pytest
import torch
from support import oracles
from support.penalties import ACCEPTED, ANY, COEF, GivenReference, close, penalty

from klft import FixedKL, KLPenalty, LMHead, TokenScores, fused_token_loss
from klft.penalty import TokenKL

EXACTLY = {"rtol": 1e-10, "atol": 1e-12}
COMBINATIONS = pytest.mark.parametrize("combination", ACCEPTED, ids="-".join)


def world(seed=0, shape=(3, 6), kind="all"):
    """Two heads, hidden states [B, T, D], ids, a mask with holes, behaviour log-probabilities; fp64."""
    two = oracles.two_heads(shape[0] * shape[1], 13, kind, seed=seed)
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=gen) < 0.7
    hidden, ref_hidden = (t.view(*shape, -1) for t in (two.hidden, two.ref_hidden))
    behaviour = -3 + torch.rand(shape, generator=gen).double()
    return two, hidden, ref_hidden, two.token_ids.view(shape), mask, behaviour


def heads(two, leaves):
    return LMHead(*leaves, **two.options), LMHead(two.ref_weight, two.ref_bias, **two.ref_options)


def from_logits(made, two, leaves, ids, mask, behaviour, shape):
    """The same batch through `measure`, which shifts by one: a column in front makes up for it."""
    hidden, weight, bias = leaves
    z = (two.logits(hidden.flatten(0, 1), weight, bias) * two.temperature).view(*shape, -1)
    y = (two.ref_logits * two.temperature).view(*shape, -1)
    blank = torch.zeros_like(z[:, :1])
    wide = lambda t, value: torch.cat([torch.full_like(t[:, :1], value), t], 1)
    made.reference = GivenReference(torch.cat([y, blank], 1))
    kl = made.measure(
        torch.cat([z, blank], 1), wide(ids, 0), torch.ones_like(wide(ids, 0)), wide(mask, False),
        behaviour_logp=wide(behaviour, 0.0), temperature=two.temperature,
    )  # fmt: skip
    return kl


def parts(made, kl, cut):
    scores = torch.arange(len(kl.mask), dtype=torch.float64)
    return [t[:, cut:] for t in (made.reward_kl(kl), made.losses(kl), made.rewards(scores, kl))]


@COMBINATIONS
def test_measure_hidden_is_measure(combination):
    two, hidden, ref_hidden, ids, mask, behaviour = world()
    results = []
    for way in ("hidden", "logits"):
        leaves = [t.clone().requires_grad_() for t in (hidden, two.weight, two.bias)]
        made = penalty(*combination)
        if way == "hidden":
            head, ref_head = heads(two, leaves[1:])
            kl = made.measure_hidden(
                leaves[0], head, ids, mask, ref_hidden, ref_head, behaviour_logp=behaviour, temperature=two.temperature
            )
        else:
            kl = from_logits(made, two, leaves, ids, mask, behaviour, mask.shape)
        got = parts(made, kl, cut=0 if way == "hidden" else 1)
        if got[1].requires_grad:
            (got[1] * torch.linspace(-1, 2, got[1].numel()).view_as(got[1])).sum().backward()
        gradients = [leaf.grad for leaf in leaves]
        results.append(([t.detach() for t in got], gradients, made.sequence_kl(kl), made.update(kl)))
    (ours, grads, sequence, coef), (theirs, ref_grads, ref_sequence, ref_coef) = results
    torch.testing.assert_close(ours, theirs, **EXACTLY)
    assert sequence == pytest.approx(ref_sequence, rel=1e-12)
    assert coef == ref_coef
    if grads[0] is None:
        assert ref_grads[0] is None
    else:
        torch.testing.assert_close(grads, ref_grads, **EXACTLY)


@COMBINATIONS
def test_token_losses_inside_a_fused_loss_are_losses_outside(combination):
    two, hidden, ref_hidden, ids, mask, behaviour = world()
    made, results = penalty(*combination), []
    for way in ("inside", "known", "outside"):
        leaves = [t.clone().requires_grad_() for t in (hidden, two.weight, two.bias)]
        head, ref_head = heads(two, leaves[1:])
        kl = made.measure_hidden(
            leaves[0], head, ids, mask, ref_hidden, ref_head, behaviour_logp=behaviour, temperature=two.temperature
        )
        if way == "outside":
            loss = made.losses(kl).sum()
        else:
            known = way == "known" and made.estimator != "exact"  # sampled: the reference's logp is enough
            fields = ("ref_logp", "behaviour_logp") if known else ("behaviour_logp",)
            given = {"ref_logp": kl.scores.ref_logp, "behaviour_logp": behaviour}
            loss = fused_token_loss(
                lambda s, *t, f=fields: made.token_losses(s, **dict(zip(f, t, strict=True))).sum(),
                leaves[0][mask], head, ids[mask], None if known else ref_hidden[mask], None if known else ref_head,
                temperature=two.temperature, per_token=[given[name].detach()[mask] for name in fields],
            )  # fmt: skip
        if loss.requires_grad:
            loss.backward()
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        results.append([loss.detach(), *gradients])
    torch.testing.assert_close(results[0], results[2], **EXACTLY)
    torch.testing.assert_close(results[1], results[2], **EXACTLY)
    assert bool(results[0][1].norm() > 0) == (made.placement != "reward")


def test_an_exact_penalty_reads_only_its_own_score():
    """What is read is what is computed: the other direction's KL and the entropies cost nothing."""
    read = []

    class Watched:
        logp = torch.zeros(3)

        def __getattr__(self, name):
            read.append(name)
            return torch.ones(3)

    KLPenalty(ANY, estimator="exact", placement="loss").token_losses(Watched())
    assert read == ["reverse_kl"]
    read.clear()
    KLPenalty(ANY, estimator="k2", placement="loss").token_losses(Watched())
    assert read == ["ref_logp"]
    read.clear()
    assert KLPenalty(ANY).token_losses(Watched()).eq(0).all()
    assert read == []


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 2)])
def test_losses_take_scores_of_any_shape(shape):
    gen = torch.Generator().manual_seed(0)
    logp, ref_logp = (torch.randn(shape, generator=gen) for _ in range(2))
    scores = TokenScores(logp=logp, ref_logp=ref_logp, reverse_kl=logp.square())
    mask = torch.ones(shape, dtype=torch.bool)
    for estimator in ("k2", "exact"):
        made = penalty("reverse", estimator, "loss")
        kl = made.measure_scores(scores, mask)
        assert made.losses(kl).shape == shape
        torch.testing.assert_close(made.losses(kl), made.token_losses(scores))


# --- nothing is changed, nothing is hidden ----------------------------------------------------------------------------


def test_measuring_and_asking_change_nothing():
    two, hidden, ref_hidden, ids, mask, _ = world()
    made = KLPenalty(ANY, estimator="exact", placement="both", clip=0.1, controller=FixedKL(COEF))
    head, ref_head = heads(two, (two.weight, two.bias))
    kl = made.measure_hidden(hidden, head, ids, mask, ref_hidden, ref_head)
    before = {name: t.clone() for name, t in kl.scores.items()}
    answers = [(made.clipped(kl), made.losses(kl), made.reward_kl(kl), made.clipped(kl)) for _ in range(2)]
    assert answers[0][0] == answers[0][3] == answers[1][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(answers[0][1:3], answers[1][1:3], strict=True))
    assert all(torch.equal(before[name], t) for name, t in kl.scores.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        kl.weight = torch.ones(3, 6)


def test_an_infinite_kl_names_the_ids_from_hidden_states_too():
    two, hidden, ref_hidden, ids, mask, _ = world(kind="bias")  # no softcap, which would make -inf finite
    mask[:] = True
    ids[ids == 4] = 5
    two.ref_bias[4] = -math.inf
    head, ref_head = heads(two, (two.weight, two.bias))
    made = KLPenalty(ANY, estimator="exact", placement="loss")
    kl = made.measure_hidden(hidden, head, ids, mask, ref_hidden, ref_head)
    with pytest.raises(ValueError, match=r"only one of the models suppresses: \[4\] \(1 in all\)"):
        made.losses(kl)


def test_scores_without_a_reference_are_named():
    kl = TokenKL(TokenScores(logp=torch.zeros(1, 2)), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no ref_logp"):
        KLPenalty(ANY).reward_kl(kl)
    with pytest.raises(ValueError, match="no reverse_kl"):
        KLPenalty(ANY, estimator="exact", placement="loss").losses(kl)


def test_sequences_that_are_not_finite_are_left_out_of_what_the_controller_sees(caplog):
    two, hidden, ref_hidden, ids, mask, _ = world()
    head, ref_head = heads(two, (two.weight, two.bias))
    made = KLPenalty(ANY)
    kl = made.measure_hidden(hidden, head, ids, mask, ref_hidden, ref_head)
    whole, episodes = made.sequence_kl(kl)
    assert episodes == 3
    broken = kl.scores.reverse_kl.clone()
    broken[1, mask[1].nonzero()[0]] = math.inf
    partial = dataclasses.replace(kl, scores=dataclasses.replace(kl.scores, reverse_kl=broken))
    sums = torch.where(mask, kl.scores.reverse_kl, 0.0).sum(-1)
    for _ in range(2):
        assert made.sequence_kl(partial) == (pytest.approx(((sums[0] + sums[2]) / 2).item()), 2)
    assert made.update(partial) == made.coef
    told = [r.getMessage() for r in caplog.records]
    assert told == ["the reverse KL of 1 of 3 sequences is not finite: they are left out of what the controller sees"]
    assert whole == pytest.approx(sums.mean().item())


# --- weights ----------------------------------------------------------------------------------------------------------


@COMBINATIONS
def test_weight_1_changes_nothing_bit_for_bit(combination):
    two, hidden, ref_hidden, ids, mask, behaviour = world()
    head, ref_head = heads(two, (two.weight.requires_grad_(), two.bias))
    plain, ruled = (
        penalty(*combination),
        penalty(*combination, token_rule=lambda ids, mask, scores: torch.ones(mask.shape)),
    )
    results = []
    for made in (plain, ruled):
        two.weight.grad = None
        kl = made.measure_hidden(hidden, head, ids, mask, ref_hidden, ref_head, behaviour_logp=behaviour)
        got = parts(made, kl, cut=0)
        if got[1].requires_grad:
            got[1].sum().backward()
        results.append([*[t.detach() for t in got], two.weight.grad, made.sequence_kl(kl)])
    assert results[0][4] == results[1][4]
    for a, b in zip(results[0][:4], results[1][:4], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@COMBINATIONS
def test_weights_weigh_the_kl_wherever_it_goes(combination):
    two, hidden, ref_hidden, ids, mask, behaviour = world()
    head, ref_head = heads(two, (two.weight, two.bias))
    weight = torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)).double()
    weight[0, :3] = 0
    plain, ruled = penalty(*combination), penalty(*combination, token_rule=lambda *_: weight)
    kls = [
        m.measure_hidden(hidden, head, ids, mask, ref_hidden, ref_head, behaviour_logp=behaviour)
        for m in (plain, ruled)
    ]
    a, b = plain.token_kl(kls[0]), ruled.token_kl(kls[1])
    close(b, a * weight)
    close(ruled.losses(kls[1]), plain.losses(kls[0]) * weight)
    if combination[1] == "exact" and plain.placement == "both":
        expected = torch.where(mask, torch.cat([b[:, 1:], torch.zeros(3, 1).double()], 1), 0.0)
        close(ruled.reward_kl(kls[1]), expected)
    elif plain.placement != "loss":
        close(ruled.reward_kl(kls[1]), plain.reward_kl(kls[0]) * weight)
    exact = kls[0].scores.reverse_kl if combination[0] == "reverse" else kls[0].scores.forward_kl
    sums = torch.where(mask, exact * weight, 0.0).sum(-1)
    assert ruled.sequence_kl(kls[1])[0] == pytest.approx(sums.mean().item(), rel=1e-12)


def test_a_token_of_weight_0_may_be_infinite():
    two, hidden, ref_hidden, ids, mask, _ = world(kind="bias")  # no softcap, which would make -inf finite
    mask[:] = True
    two.ref_bias[ids[0, 2]] = -math.inf
    head, ref_head = heads(two, (two.weight.requires_grad_(), two.bias))

    def rule(token_ids, mask, scores):
        return (token_ids != ids[0, 2]).double() * scores.reverse_kl.isfinite()

    made = penalty("reverse", "k2", "loss", token_rule=rule)
    kl = made.measure_hidden(hidden, head, ids, mask, ref_hidden, ref_head)
    losses = made.losses(kl)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert two.weight.grad.isfinite().all()
    assert losses[ids == ids[0, 2]].eq(0).all()


@pytest.mark.parametrize("bad", [torch.ones(2), -torch.ones(3, 6), torch.full((3, 6), math.nan)])
def test_a_rule_that_gives_no_weights_is_named(bad):
    two, hidden, ref_hidden, ids, mask, _ = world()
    head, ref_head = heads(two, (two.weight, two.bias))
    with pytest.raises(ValueError, match="token_rule must give one finite weight >= 0 per token"):
        penalty("reverse", "k1", "reward", token_rule=lambda *_: bad).measure_hidden(
            hidden, head, ids, mask, ref_hidden, ref_head
        )


def test_a_ruled_penalty_asks_for_its_weights_inside_a_fused_loss():
    made = penalty("reverse", "k2", "loss", token_rule=lambda ids, mask, scores: torch.ones(mask.shape))
    scores = TokenScores(logp=torch.zeros(3), ref_logp=torch.ones(3))
    with pytest.raises(ValueError, match=r"weight=kl\.weight\[kl\.mask\]"):
        made.token_losses(scores)
    close(made.token_losses(scores, weight=torch.full((3,), 2.0)), torch.full((3,), COEF))
