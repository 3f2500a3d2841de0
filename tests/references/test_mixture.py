"""MixtureReference: the weighted sum of two penalties, value and gradient, in one pass of the policy."""

import pytest
import torch
from peft import get_peft_model
from support import tiny
from support.penalties import ACCEPTED, close, penalty

from klft import (
    AdapterReference,
    AdaptiveKL,
    EMAReference,
    FixedKL,
    FrozenReference,
    KLPenalty,
    MixtureReference,
    TopKReference,
    kl_metrics,
    resolve_reference,
)
from klft.fused import token_scores
from klft.heads import LMHead
from klft.models import causal_inputs, token_positions
from klft.penalty import mixed_scores
from klft.references import Reference
from klft.scores import TokenScores
from klft.scoring import Scorer

IDS = torch.tensor([[0, 0, 5, 7, 9, 4], [3, 8, 6, 4, 11, 5]])
ATTENTION = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]) != 0
WEIGHTS = (0.3, 1.2)


def reference(seed):
    return FrozenReference(tiny.llama(seed).double())


def parts():
    return [(weight, reference(seed)) for weight, seed in zip(WEIGHTS, (5, 6), strict=True)]


def measured(made, policy, **given):
    """(what goes into the loss, what into the reward, gradient of the former in the policy's logits, KL)."""
    logits = policy(**causal_inputs(policy, IDS, ATTENTION)).logits.detach().requires_grad_()
    kl = made.measure(logits, IDS, ATTENTION, MASK, **given)
    losses, reward = made.losses(kl), made.reward_kl(kl)
    if losses.requires_grad:
        losses.sum().backward()
    return losses.detach(), reward, torch.zeros_like(logits) if logits.grad is None else logits.grad, kl


@pytest.mark.parametrize("combination", ACCEPTED, ids="-".join)
@pytest.mark.parametrize("given", [{}, {"temperature": 0.7, "behaviour_logp": torch.full((2, 6), -3.0).double()}])
def test_it_is_the_weighted_sum(combination, given):
    policy = tiny.llama().double().eval()
    singles = [measured(penalty(*combination, each), policy, **given) for _, each in parts()]
    losses, reward, gradient, _ = measured(penalty(*combination, MixtureReference(parts())), policy, **given)
    close(losses, sum(w * single[0] for w, single in zip(WEIGHTS, singles, strict=True)))
    close(reward, sum(w * single[1] for w, single in zip(WEIGHTS, singles, strict=True)))
    close(gradient, sum(w * single[2] for w, single in zip(WEIGHTS, singles, strict=True)))
    assert (losses + reward)[MASK].abs().min() > 0 or combination[1] == "exact"


def test_the_policy_runs_once_and_metrics_and_controller_see_the_weighted_kls():
    policy, made = tiny.llama().double().eval(), penalty("reverse", "exact", "loss", MixtureReference(parts()))
    made.controller = AdaptiveKL(0.1, target=1.0, horizon=100)
    calls = []
    policy.register_forward_hook(lambda *_: calls.append(1))
    *_, kl = measured(made, policy)
    assert len(calls) == 1
    singles = [measured(penalty("reverse", "exact", "loss", each), policy)[-1] for _, each in parts()]
    metrics, alone = kl_metrics(kl.scores, kl.mask), [kl_metrics(each.scores, each.mask) for each in singles]
    for name in ("kl/reverse/mean", "kl/forward/mean", "kl/sequence/reverse/mean"):
        assert metrics[name] == pytest.approx(sum(w * m[name] for w, m in zip(WEIGHTS, alone, strict=True)))
    assert metrics["entropy/policy/mean"] == pytest.approx(alone[0]["entropy/policy/mean"])
    assert not any(name.startswith(("kl/k", "entropy/reference")) for name in metrics)
    nats, sequences = made.sequence_kl(kl)
    assert (nats, sequences) == (pytest.approx(metrics["kl/sequence/reverse/mean"]), 2)
    assert made.update(kl) > 0.1


def test_one_part_of_weight_one_is_that_reference_bit_for_bit():
    policy = tiny.llama().eval()
    for combination in (("reverse", "k1", "reward"), ("reverse", "exact", "both")):
        single = FrozenReference(tiny.llama(5))
        a, b = (measured(penalty(*combination, r), policy) for r in (single, MixtureReference([(1.0, single)])))
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_a_clip_is_of_each_part_and_its_tokens_are_counted_once():
    policy = tiny.llama().double().eval()
    for combination in (("reverse", "k1", "reward"), ("reverse", "exact", "loss")):
        singles = [measured(penalty(*combination, each, clip=1.0), policy) for _, each in parts()]
        made = penalty(*combination, MixtureReference(parts()), clip=1.0)
        losses, reward, _, kl = measured(made, policy)
        close(losses + reward, sum(w * (s[0] + s[1]) for w, s in zip(WEIGHTS, singles, strict=True)))
        assert max(made.clipped(s[-1]) for s in singles) <= made.clipped(kl) <= int(MASK.sum())


def test_scores_without_logits_go_in_as_parts():
    policy, references = tiny.llama().double().eval(), parts()
    made = penalty("reverse", "exact", "loss", MixtureReference(references))
    *_, want = measured(made, policy)
    inputs = {"input_ids": IDS, "attention_mask": ATTENTION, "position_ids": token_positions(ATTENTION)}
    hidden = policy.model(**inputs).last_hidden_state
    found = []
    for weight, each in references:
        theirs, head = each.hidden_of(inputs)
        predicts = MASK.roll(-1, 1)
        flat = token_scores(hidden[predicts], LMHead.from_model(policy), IDS[MASK], theirs[predicts], head)
        found.append((weight, TokenScores(**dict(flat.items()))))
    kl = made.measure_scores(mixed_scores(tuple(found)), torch.ones(5, dtype=torch.bool), parts=tuple(found))
    close(made.losses(kl), made.losses(want)[MASK])


def test_mixtures_mix_and_ids_of_top_k_references_too():
    policy = tiny.llama().double().eval()
    a, b = (reference(seed) for seed in (5, 6))
    lq = a.logits(IDS, ATTENTION).log_softmax(-1).roll(1, 1)
    logps, ids = lq.topk(tiny.VOCABULARY)
    known = TopKReference(ids, logps, lq.gather(-1, IDS.unsqueeze(-1)).squeeze(-1))
    nested = MixtureReference([(0.5, MixtureReference([(0.6, known), (1.0, b)])), (0.7, b)])
    flat = MixtureReference([(0.3, a), (1.2, b)])
    assert [weight for weight, _ in nested.parts] == [0.3, 0.5, 0.7]
    both = [measured(penalty("forward", "exact", "loss", each), policy) for each in (nested, flat)]
    close(both[0][0], both[1][0])
    close(both[0][2], both[1][2])


def test_parts_move_and_are_kept_and_are_checked():
    policy = get_peft_model(tiny.llama(), tiny.lora())
    made = MixtureReference(
        [(1.0, EMAReference(policy, 0.0, every=2)), (1.0, AdapterReference(policy)), (2.0, tiny.apart())]
    )
    assert isinstance(made, Reference)
    assert resolve_reference(made, policy) is made
    assert made.name.count("*") == 3
    assert (made.vocab_size, made.max_positions) == (tiny.VOCABULARY, 64)
    made.to("cpu")
    made.after_step(policy), made.after_step(policy)
    state = made.state_dict()
    assert int(state["0.steps"]) == 2
    made.load_state_dict(state | {"0.steps": torch.tensor(7)})
    assert made.parts[0][1].steps == 7
    policy.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"belong to the reference|belong to the base model"):
        made.check_independent(policy)


def test_what_it_cannot_be_is_refused(tmp_path):
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weights must be finite numbers above 0"):
            MixtureReference([(weight, tiny.llama())])
    with pytest.raises(ValueError, match="there is no part"):
        MixtureReference([])
    made = MixtureReference(parts())
    of_both = KLPenalty(made, estimator="exact", placement="loss", controller=FixedKL(1.0))
    hidden, head = made.parts[0][1].hidden(IDS, ATTENTION)
    with pytest.raises(TypeError, match="measure_hidden: it takes one reference's hidden states"):
        of_both.measure_hidden(hidden, head, IDS, MASK, hidden, head)
    with pytest.raises(TypeError, match="token_losses: fused_token_loss knows one reference"):
        of_both.token_losses(TokenScores(torch.zeros(3), reverse_kl=torch.zeros(3)))
    with pytest.raises(TypeError, match="MixtureReference has no logits"):
        Scorer(made).score_batch(tiny.llama().double(), IDS, ATTENTION, MASK)
    with pytest.raises(TypeError, match="MixtureReference has no hidden states"):
        made.hidden_of({"input_ids": IDS})
