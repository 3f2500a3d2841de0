"""Divergences other than the KL in a KLPenalty: values, hidden states, refusals. Gradients: test_penalty_gradients."""

import pytest
import torch
from support.penalties import COEF, OTHERS, GivenReference, close, dense_other, other_penalty

from klft import KLPenalty, LMHead, MixtureReference, fused_token_loss, kl_metrics


def batch(vocab=7):
    torch.manual_seed(0)
    logits, ref_logits = torch.randn(2, 2, 5, vocab, dtype=torch.float64)
    ids = torch.randint(vocab, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    return logits, ref_logits, ids, mask


@pytest.mark.parametrize("name", OTHERS)
def test_the_value_is_that_of_the_dense_function_and_so_is_what_the_controller_sees(name):
    logits, ref_logits, ids, mask = batch()
    penalty = other_penalty(name, "loss", GivenReference(ref_logits), clip=0.15)
    kl = penalty.measure(logits, ids, torch.ones_like(ids), mask)
    want = dense_other(name)(logits, ref_logits).roll(1, 1)
    close(kl.scores.divergence[mask], want[mask])
    clipped = torch.where(mask, want.clamp(max=0.15), 0.0)
    assert (want > 0.15)[mask].any()
    close(penalty.losses(kl), COEF * clipped)
    nats, episodes = penalty.sequence_kl(kl)
    assert (nats, episodes) == (pytest.approx(float(clipped.sum() / 2)), 2)
    metrics = kl_metrics(kl.scores, mask)
    assert metrics["divergence/mean"] == pytest.approx(float(want[mask].mean()))
    assert metrics["divergence/max"] == pytest.approx(float(want[mask].max()))
    assert metrics["divergence/sequence/mean"] == pytest.approx(float(torch.where(mask, want, 0.0).sum() / 2))
    assert metrics["kl/reverse/mean"] == pytest.approx(float(kl.scores.reverse_kl[mask].mean()))


@pytest.mark.parametrize("name", OTHERS)
def test_from_hidden_states_it_is_the_same(name):
    torch.manual_seed(0)
    _, _, ids, mask = batch()
    hidden, ref_hidden = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    weight, ref_weight = torch.randn(2, 7, 4, dtype=torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    penalty = other_penalty(name, "loss")
    kl = penalty.measure_hidden(hidden, LMHead(weight), ids, mask, ref_hidden, LMHead(ref_weight), temperature=0.7)
    want = dense_other(name)(hidden @ weight.T / 0.7, ref_hidden @ ref_weight.T / 0.7)[mask].sum() * COEF
    got = penalty.losses(kl).sum()
    close(got, want)
    for ours, dense in zip(*(torch.autograd.grad(t, [hidden, weight]) for t in (got, want)), strict=True):
        close(ours, dense)


def test_of_several_references_it_is_the_weighted_sum():
    logits, ref_logits, ids, mask = batch()
    logits.requires_grad_()
    parts = [(2.0, GivenReference(ref_logits)), (0.5, GivenReference(ref_logits.flip(-1)))]
    values = []
    for coef, reference in [(1.0, MixtureReference(parts)), *parts]:
        penalty = other_penalty("jsd", "loss", reference, coef)
        loss = penalty.losses(penalty.measure(logits, ids, torch.ones_like(ids), mask)).sum()
        values.append((loss, *torch.autograd.grad(loss, logits)))
    for mixed, *single in zip(*values, strict=True):
        close(mixed, sum(single))


def test_where_one_model_gives_nothing_it_names_the_divergence():
    logits, ref_logits, ids, mask = batch()
    ref_logits[..., 2] = -torch.inf
    penalty = KLPenalty(
        GivenReference(ref_logits), estimator="exact", placement="loss", divergence="renyi_divergence",
        divergence_kwargs={"alpha": 1.5},
    )  # fmt: skip
    kl = penalty.measure(logits, ids, torch.ones_like(ids), mask)
    with pytest.raises(ValueError, match=r"the renyi_divergence \(exact\) is not finite.*suppresses: \[2\]"):
        penalty.losses(kl)


@pytest.mark.parametrize(("given", "error"), [
    ({"divergence": "jsd"}, "k1 estimates a KL: divergence='jsd' goes with estimator='exact'"),
    ({"divergence": "js", "estimator": "exact"}, "unknown divergence 'js': choose one of jsd, skew_kl"),
    ({"divergence": "entropy", "estimator": "exact"}, "unknown divergence 'entropy'"),
    ({"divergence": "forward_kl", "estimator": "exact"}, "divergence='forward_kl' is direction='forward'"),
    ({"divergence": "jsd", "estimator": "exact", "direction": "forward"}, "takes no direction"),
    ({"divergence": "jsd", "estimator": "exact", "divergence_kwargs": {"weight": 1.0}}, "strictly between 0 and 1"),
    ({"divergence_kwargs": {"weight": 0.5}}, "without a divergence: name one of jsd"),
])  # fmt: skip
def test_what_is_refused(given, error):
    with pytest.raises(ValueError, match=error):
        KLPenalty(GivenReference(), placement="loss" if given.get("estimator") else "reward", **given)


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match=r"jsd got an unexpected keyword argument 'alpha'; its parameters: weight"):
        KLPenalty(
            GivenReference(), estimator="exact", placement="loss", divergence="jsd", divergence_kwargs={"alpha": 0.5}
        )


def test_in_the_reward_alone_the_loss_goes_with_it_and_the_warning_names_it():
    with pytest.warns(UserWarning, match="jsd exact in the reward: .* own exact jsd does not depend on it"):
        assert other_penalty("jsd", "reward").placement == "both"


def test_inside_fused_token_loss_it_says_what_to_use():
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    loss_fn = lambda scores: other_penalty("jsd", "loss").token_losses(scores).sum()
    with pytest.raises(TypeError, match="fused_token_loss has no jsd; use measure_hidden"):
        fused_token_loss(loss_fn, hidden, LMHead(weight), torch.zeros(3, dtype=torch.long), hidden, LMHead(weight))
