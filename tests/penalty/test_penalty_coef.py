"""KLPenalty(model, coef=0.1): a model and a number are all that it needs."""

import pytest
import torch
from support import tiny
from support.penalties import penalty

from klft import AdaptiveKL, FixedKL, FrozenReference, KLPenalty


def test_a_model_is_frozen_and_a_number_is_a_constant():
    model = tiny.llama(5)
    made = KLPenalty(model, coef=0.1)
    assert isinstance(made.reference, FrozenReference)
    assert made.reference.model is model
    assert not any(p.requires_grad for p in model.parameters())
    assert isinstance(made.controller, FixedKL)
    assert made.coef == 0.1


def test_it_is_the_same_as_a_fixed_controller():
    ids = torch.randint(3, tiny.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    logits, everything = tiny.llama(0).eval()(ids).logits, torch.ones_like(ids)
    made = [KLPenalty(tiny.llama(5), **given) for given in ({"coef": 0.3}, {"controller": FixedKL(0.3)})]
    scores = torch.tensor([1.0, 2.0])
    rewards = [each.rewards(scores, each.measure(logits, ids, everything, everything != 0)) for each in made]
    assert torch.equal(*rewards)
    made[1].load_state_dict(made[0].state_dict())


def test_without_either_it_is_what_it_was():
    assert KLPenalty(tiny.llama(5)).coef == 0.05
    assert penalty("reverse", "k1", "reward", coef=0.0, controller=KLPenalty(tiny.llama(5)).controller).coef == 0


def test_both_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"coef=0\.1 and controller=AdaptiveKL\(coef=0\.05, .*both set the coefficient"
    ):
        KLPenalty(tiny.llama(5), coef=0.1, controller=AdaptiveKL(0.05, 6.0, 100))
    with pytest.raises(ValueError, match="both set the coefficient"):
        KLPenalty(tiny.llama(5), coef=0.05, controller=FixedKL(0.05))


@pytest.mark.parametrize("coef", [-0.1, float("nan"), float("inf")])
def test_a_number_that_is_no_coefficient_is_refused(coef):
    with pytest.raises(ValueError, match="coef must be a finite number >= 0"):
        KLPenalty(tiny.llama(5), coef=coef)


def test_backward_is_told_its_name():
    with pytest.raises(ValueError, match=r"unknown direction 'backward': .*\(the backward KL is 'reverse'\)"):
        KLPenalty(tiny.llama(1), direction="backward")
