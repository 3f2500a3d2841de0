"""Token rules: each against its formula written out token by token, and weight 1 as no rule at all."""

import math

import pytest
import torch
from support import tiny
from support.penalties import ACCEPTED, COEF, GivenReference, close, penalty

from klft import TargetKL, score_logits
from klft.scores import TokenScores
from klft.token_rules import (
    along_ref_entropy,
    burn_in,
    by_ids,
    by_mask,
    by_ref_entropy,
    combine,
    constant,
    decay,
    find_ids,
)

B, T, V = 4, 7, 11
# Left and right padding, a hole (a tool's answer), and a row that has no token at all.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1, 1], [0] * 7]).bool()


def world(seed=0):
    """(scores of both models, ids, logits of the policy), float64, the logits with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(B, T, V, generator=generator, dtype=torch.float64) * 2
    logits, ref_logits = draw().requires_grad_(), draw()
    ids = torch.randint(V, (B, T), generator=generator)
    return score_logits(logits, ref_logits, ids), ids, logits


# --- formulas --------------------------------------------------------------------------------------------------------

KL_MASK = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.5


def formula(name, b, t, count, token_id, entropy):
    """The weight of one counted token, in plain Python; `count` is how many counted ones its row had before."""
    return {
        "constant": 0.3,
        "by_mask": float(KL_MASK[b, t]),
        "by_ids": {2: 0.0, 5: 0.3}.get(token_id, 2.0),
        "burn_in": 0.0 if count < 2 else 1.0,
        "decay": 0.5**count,
        "by_ref_entropy": 1.0 if 0.4 <= entropy < 1.3 else 0.0,
        "along_ref_entropy": min(max((1.5 - entropy) / (1.5 - 0.5), 0.0), 1.0),
        "combine": (0.0 if count < 2 else 1.0) * {2: 0.0, 5: 0.3}.get(token_id, 2.0) * 0.3,
    }[name]


RULES = {
    "constant": constant(0.3),
    "by_mask": by_mask(KL_MASK),
    "by_ids": by_ids({5: 0.3, 2: 0.0}, others=2.0),
    "burn_in": burn_in(2),
    "decay": decay(0.5),
    "by_ref_entropy": by_ref_entropy(0.4, 1.3),
    "along_ref_entropy": along_ref_entropy(one_at=0.5, zero_at=1.5),
    "combine": combine(burn_in(2), by_ids({5: 0.3, 2: 0.0}, others=2.0), constant(0.3)),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_its_formula(name):
    scores, ids, _ = world()
    weight = RULES[name](ids, MASK, scores)
    expected = torch.zeros(B, T, dtype=torch.float64)
    for b, t in MASK.nonzero().tolist():
        count = int(MASK[b, :t].sum())
        expected[b, t] = formula(name, b, t, count, int(ids[b, t]), float(scores.ref_entropy[b, t]))
    assert weight.shape == MASK.shape
    assert weight.isfinite().all()
    assert expected.std() > 0.05
    close(torch.where(MASK, weight.double(), 0.0), expected)


def test_the_step_and_the_line_agree_where_both_say_0_or_1():
    scores, ids, _ = world()
    entropy, line = scores.ref_entropy, along_ref_entropy(one_at=1.2, zero_at=1.0)(ids, MASK, scores)
    assert torch.equal(line[entropy > 1.2], by_ref_entropy(1.0)(ids, MASK, scores)[entropy > 1.2])
    assert torch.equal(line[entropy < 1.0], by_ref_entropy(1.0)(ids, MASK, scores)[entropy < 1.0])


@pytest.mark.parametrize("beyond", [-100, 12, 10**6])
def test_an_id_beyond_the_table_is_one_of_the_others(beyond):
    scores, ids, _ = world()
    ids[0, 0] = beyond  # -100: a label under the mask
    assert by_ids({0: 1.0, 9: 0.5}, others=0.25)(ids, MASK, scores)[0, 0] == (1.0 if beyond < 0 else 0.25)


def test_ids_are_found_by_their_text():
    tokenizer = tiny.tokenizer()
    assert find_ids(tokenizer, lambda text: text.startswith("<")) == [tiny.PAD, tiny.BOS, tiny.EOS]
    digits = find_ids(tokenizer, lambda text: text.strip().removeprefix("w").isdigit())
    assert digits == list(range(3, tiny.VOCABULARY))
    with pytest.raises(ValueError, match="none of 32 ids decodes to a text that is chosen"):
        find_ids(tokenizer, lambda text: False)


def test_a_rule_has_a_name_that_says_its_arguments():
    names = [rule.__name__ for rule in RULES.values()]
    assert names[:2] == ["constant(0.3)", "by_mask([4, 7])"]
    assert names[3:7] == ["burn_in(2)", "decay(0.5)", "by_ref_entropy(0.4, 1.3)", "along_ref_entropy(0.5, 1.5)"]
    assert names[7] == f"combine(burn_in(2), {names[2]}, constant(0.3))"
    tables = [{5: 0.25, 2: 0.0}, {2: 0, 5: 0.25}, {2: 0.0, 5: 0.5}, {2: 0.0, 6: 0.25}]
    same, again, *others = [by_ids(table).__name__ for table in tables]
    assert same == again
    assert len({same, *others, by_ids(tables[0], others=0.5).__name__}) == 4


# --- weight 1 --------------------------------------------------------------------------------------------------------

ONES = {
    "constant": constant(1),
    "by_mask": by_mask(torch.ones(B, T, dtype=torch.bool)),
    "by_ids": by_ids({3: 1.0}),
    "burn_in": burn_in(0),
    "decay": decay(1.0),
    "by_ref_entropy": by_ref_entropy(),
    "along_ref_entropy": along_ref_entropy(one_at=100.0, zero_at=200.0),
}
ONES["combine"] = combine(*ONES.values())


def everything(made, placement_weight):
    """Rewards, losses, the gradient and what the controller made of it."""
    scores, ids, logits = world(1)
    kl = made.measure_scores(scores, MASK, token_ids=ids, behaviour_logp=scores.logp.detach() - 0.1)
    losses = made.losses(kl)
    if losses.requires_grad:
        losses[MASK].sum().backward()
    weight = None if kl.weight is None else kl.weight[MASK]
    fused = made.token_losses(TokenScores(**{n: t[MASK] for n, t in scores.items()}), weight=weight)
    rewards = made.rewards(torch.arange(4.0).double(), kl)
    coef = made.update(kl)
    assert (kl.weight is not None) == placement_weight
    return [rewards, losses.detach(), fused.detach(), logits.grad, coef, made.sequence_kl(kl)]


@pytest.mark.parametrize("name", ONES)
@pytest.mark.parametrize("combination", ACCEPTED, ids="-".join)
def test_weight_1_changes_nothing_bit_for_bit(combination, name):
    plain = everything(penalty(*combination, controller=TargetKL(COEF, target=0.01)), False)
    ruled = everything(penalty(*combination, controller=TargetKL(COEF, target=0.01), token_rule=ONES[name]), True)
    assert plain[-2] == 2 * COEF
    for a, b in zip(plain, ruled, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_rule_gets_no_gradient():
    """Whatever a rule reads, its weight is a constant."""
    scores, _, _ = world()
    attached = TokenScores(**dict(scores.items()) | {"ref_entropy": scores.entropy})
    kl = penalty("reverse", "k2", "loss", token_rule=lambda ids, mask, s: s.ref_entropy).measure_scores(attached, MASK)
    assert scores.entropy.requires_grad
    assert not kl.weight.requires_grad
    close(kl.weight, scores.entropy.detach())


# --- what is refused -------------------------------------------------------------------------------------------------

NUMBERS = [-0.1, math.nan, math.inf, True, "1", None]


@pytest.mark.parametrize("bad", NUMBERS)
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (constant, "constant: weight must be a finite number >= 0"),
        (lambda w: by_ids({7: w}), "by_ids: the weight of id 7 must be"),
        (lambda w: by_ids({7: 1.0}, others=w), "by_ids: others must be"),
        (decay, "decay: gamma must be a finite number >= 0 and <= 1"),
        (lambda h: along_ref_entropy(h, 1.0), "along_ref_entropy: one_at must be"),
        (lambda h: along_ref_entropy(1.0, h), "along_ref_entropy: zero_at must be"),
    ],
)
def test_a_number_that_is_no_weight_is_refused_where_it_is_given(make, named, bad):
    with pytest.raises(ValueError, match=f"{named}.*got {bad!r}"):
        make(bad)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: decay(1.5), "<= 1, got 1.5"),
        (lambda: burn_in(-1), "burn_in: tokens must be a whole number >= 0, got -1"),
        (lambda: burn_in(1.5), "burn_in: tokens must be a whole number >= 0, got 1.5"),
        (lambda: by_ids({}), "by_ids: expected a table id -> weight"),
        (lambda: by_ids({-1: 0.0, 4: 1.0}), r"ids >= 0, got \{-1: 0.0, 4: 1.0\}"),
        (lambda: by_ref_entropy(2.0, 1.0), "0 <= least < below, in nats, got least=2.0, below=1.0"),
        (lambda: by_ref_entropy(math.nan), "got least=nan"),
        (lambda: along_ref_entropy(1.0, 1.0), "both 1: for a step, take by_ref_entropy"),
        (combine, "expected one rule or more"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("rule", [burn_in(2), decay(0.5)], ids=["burn_in", "decay"])
def test_a_rule_of_positions_wants_rows(rule):
    scores, ids, _ = world()
    flat = TokenScores(**{name: t[MASK] for name, t in scores.items()})
    with pytest.raises(ValueError, match=rf"{rule.__name__[:5]}.* needs them in rows, \[B, T\], and got \[14\]"):
        rule(ids[MASK], MASK[MASK], flat)


def test_what_a_rule_reads_must_be_there():
    scores, ids, _ = world()
    with pytest.raises(ValueError, match="by_ids reads the tokens' ids"):
        penalty("reverse", "k1", "reward", token_rule=by_ids({1: 0.0})).measure_scores(scores, MASK)
    bare = TokenScores(logp=scores.logp, ref_logp=scores.ref_logp)
    for rule in (by_ref_entropy(1.0), along_ref_entropy(0.0, 1.0)):
        with pytest.raises(ValueError, match="these scores have none: score with a reference"):
            rule(ids, MASK, bare)


@pytest.mark.parametrize("rule", [by_ref_entropy(0.0, 1.0), along_ref_entropy(0.0, 1.0)], ids=["step", "line"])
def test_an_entropy_that_is_nan_is_no_weight_of_0(rule):
    scores, ids, _ = world()
    broken = TokenScores(**dict(scores.items()) | {"ref_entropy": torch.full((B, T), math.nan).double()})
    with pytest.raises(ValueError, match="token_rule must give one finite weight"):
        penalty("reverse", "k1", "reward", token_rule=rule).measure_scores(broken, MASK, token_ids=ids)


@pytest.mark.parametrize("shape", [(B, 1), (T,), (1,)])
def test_a_factor_of_another_shape_is_not_broadcast(shape):
    scores, ids, _ = world()

    def odd(token_ids, mask, scores):
        return torch.ones(shape)

    with pytest.raises(ValueError, match=r"combine: odd gives weights .* for tokens \[4, 7\]"):
        combine(constant(1.0), odd)(ids, MASK, scores)


def test_through_measure_a_prompt_has_no_place():
    """Positions are counted from the first token that was generated, whatever stands before it."""
    _, ids, logits = world()
    reference = GivenReference(torch.randn(B, T, V, dtype=torch.float64))
    attention, generated = torch.ones(B, T).long(), torch.arange(T).expand(B, T) >= torch.tensor([[3], [1], [5], [2]])
    kl = penalty("reverse", "k1", "reward", reference, token_rule=decay(0.5)).measure(logits, ids, attention, generated)
    for b, start in enumerate([3, 1, 5, 2]):
        assert kl.weight[b, start:].tolist() == [0.5**t for t in range(T - start)]
