"""All five controllers in a loop of one's own, wherever the KL goes: what they see, and which coefficient is used."""

import pytest
import torch
from support import oracles
from support.penalties import ACCEPTED, GivenReference, close, penalty

from klft import AdaptiveKL, FixedKL, PIController, ScheduledKL, TargetKL
from klft.scores import TokenScores
from klft.token_rules import decay

B, T, V = 3, 6, 9
MASK = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0] * 6]).bool()  # the third is no episode
CONTROLLERS = {
    "FixedKL": lambda: FixedKL(0.2),
    "AdaptiveKL": lambda: AdaptiveKL(0.2, target=4.0, horizon=20),
    "ScheduledKL": lambda: ScheduledKL(0.2, 0.0, 10, "cosine"),
    "PIController": lambda: PIController(0.2, target=4.0),
    "TargetKL": lambda: TargetKL(0.2, target=1.0),
}
IN_LOSS = [form for form in ACCEPTED if form[2] != "reward"]


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, ref = (torch.randn(B, T, V, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return logits.requires_grad_(), ref, torch.randint(V, (B, T), generator=generator)


def nats_of(direction, logits, ref, weight):
    """Weighted KL per sequence, mean over the two that have a token, from the formula alone."""
    divergence = oracles.reverse_kl if direction == "reverse" else oracles.forward_kl
    per_token = divergence(logits, ref).roll(1, 1).detach()
    return float(torch.where(MASK, per_token * weight, 0.0).sum() / 2)


@pytest.mark.parametrize("rule", [None, decay(0.5)], ids=["plain", "weighed"])
@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("form", IN_LOSS, ids="-".join)
def test_a_loss_uses_the_coefficient_of_now_and_only_update_changes_it(form, name, rule):
    expected = CONTROLLERS[name]()
    reference = GivenReference()
    made = penalty(*form, reference, controller=CONTROLLERS[name](), token_rule=rule)
    weight = torch.where(MASK, 0.5 ** (MASK.long().cumsum(-1) - 1.0), 0.0) if rule else MASK.double()
    for step in range(4):
        logits, reference.given, ids = batch(step)
        kl = made.measure(logits, ids, torch.ones_like(ids), MASK)
        per_token = made.token_kl(kl, "unbiased").detach()
        flat = TokenScores(**{field: t[MASK] for field, t in kl.scores.items()})
        kept = None if kl.weight is None else kl.weight[MASK]
        for _ in range(2):  # epochs over one rollout
            close(made.losses(kl).detach(), expected.coef * per_token)
            close(made.token_losses(flat, weight=kept).detach(), expected.coef * per_token[MASK])
            charge = made.reward_kl(kl)
            close(made.rewards(torch.zeros(B).double(), kl), -expected.coef * charge)
            assert bool(charge.any()) == (made.placement == "both")
        nats = nats_of(form[0], logits, reference.given, weight)
        assert made.sequence_kl(kl) == (pytest.approx(nats, rel=1e-12), 2)
        assert made.update(kl) == pytest.approx(expected.update(nats, 2), rel=1e-12)
    assert (made.coef == 0.2) == (name == "FixedKL")


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("placement", ["loss", "both"])
def test_the_state_of_a_penalty_in_the_loss_comes_back(placement, name):
    def new():
        return penalty("reverse", "exact", placement, reference, controller=CONTROLLERS[name]())

    reference = GivenReference()
    first, coefs = new(), []
    for step in range(6):
        logits, reference.given, ids = batch(step)
        kl = first.measure(logits, ids, torch.ones_like(ids), MASK)
        if step == 3:
            second = new()
            second.load_state_dict(first.state_dict())
        first.losses(kl)
        coefs.append(first.update(kl))
        if step >= 3:
            second.losses(kl)
            assert second.update(kl) == coefs[-1]
    assert second.state_dict() == first.state_dict()
    assert len(set(coefs)) > 1 or name == "FixedKL"
