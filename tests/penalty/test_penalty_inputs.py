"""Inputs of a loop of one's own: padding and positions, masks of every kind, shapes that do not fit."""

import copy
import logging
from typing import Any

import jaxtyping
import pytest
import torch
from support import tiny

import klft
from klft import AdaptiveKL, FrozenReference, KLPenalty
from klft.masked import as_mask

IDS = torch.tensor([[0, 0, 0, 0, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8, 9, 10]])
ATTENTION = (IDS != 0).long()
COMPLETION = torch.zeros_like(IDS).bool()
COMPLETION[:, -3:] = True


def models(kind):
    model = (tiny.gpt2(dropout=0.0) if kind == "gpt2" else tiny.llama()).eval()
    return model, FrozenReference(copy.deepcopy(model))


def largest_kl(penalty, logits):
    kl = penalty.measure(logits, IDS, ATTENTION, COMPLETION)
    return kl.scores.reverse_kl[kl.mask].max().item()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("inputs", ["causal_inputs", "mask alone"])
def test_equal_models_have_no_kl_however_the_policy_was_called(kind, inputs, caplog):
    """With left padding and learned positions the two were 1 nat apart where the call had no position_ids."""
    model, reference = models(kind)
    given = {"input_ids": IDS, "attention_mask": ATTENTION}
    if inputs == "causal_inputs":
        given = klft.causal_inputs(model, IDS, ATTENTION)
    with caplog.at_level(logging.WARNING):
        penalty = KLPenalty(reference)
        for _ in range(2):
            assert largest_kl(penalty, model(**given).logits) < 1e-6
    said = [r.getMessage() for r in caplog.records if "causal_inputs" in r.getMessage()]
    assert len(said) == (1 if (kind, inputs) == ("gpt2", "mask alone") else 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_policy_that_is_not_the_reference_is_measured_at_the_right_places(kind):
    model, _ = models(kind)
    reference = FrozenReference((tiny.gpt2(seed=1, dropout=0.0) if kind == "gpt2" else tiny.llama(1)).eval())
    padded = largest_kl(KLPenalty(reference), model(**klft.causal_inputs(model, IDS, ATTENTION)).logits)
    alone = []
    for row, attention, mask in zip(IDS, ATTENTION, COMPLETION, strict=True):
        ids, counted = row[attention.bool()][None], mask[attention.bool()][None]
        kl = KLPenalty(reference).measure(model(ids).logits, ids, torch.ones_like(ids), counted)
        alone.append(kl.scores.reverse_kl[kl.mask].max().item())
    assert padded == pytest.approx(max(alone), rel=1e-4)


def test_hidden_states_are_placed_as_the_references_are():
    model, reference = models("gpt2")
    with torch.no_grad(), klft.hidden_states(model) as kept:
        model(input_ids=IDS, attention_mask=ATTENTION)
    ref_hidden, _ = reference.hidden(IDS, ATTENTION)
    torch.testing.assert_close(kept.hidden[ATTENTION.bool()], ref_hidden[ATTENTION.bool()])


def test_only_tokens_that_a_real_token_predicts_count():
    """A mask wider than the completion: the first real token of a left-padded row is predicted by padding."""
    model, reference = models("llama")
    kl = KLPenalty(reference).measure(model(IDS, attention_mask=ATTENTION).logits, IDS, ATTENTION, torch.ones_like(IDS))
    assert kl.mask.tolist() == [[False] * 5 + [True] * 3, [False] + [True] * 7]


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint8])
def test_masks_of_zeros_and_ones(dtype):
    model, reference = models("llama")
    penalty, logits = KLPenalty(reference), model(IDS, attention_mask=ATTENTION).logits
    expected = penalty.measure(logits, IDS, ATTENTION, COMPLETION)
    given = COMPLETION.to(dtype)
    assert torch.equal(penalty.measure(logits, IDS, ATTENTION, given).mask, expected.mask)
    x = torch.arange(16.0).view(2, 8)
    assert klft.masked_mean(x, given) == klft.masked_mean(x, COMPLETION)
    assert torch.equal(klft.masked_whiten(x, given), klft.masked_whiten(x, COMPLETION))
    scores = torch.tensor([1.0, 2.0])
    shaped = klft.shape_rewards(scores, x, given, coef=0.1)
    assert torch.equal(shaped, klft.shape_rewards(scores, x, COMPLETION, coef=0.1))


@pytest.mark.parametrize("mask", [torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0])])
def test_a_mask_of_other_numbers_is_none(mask):
    with pytest.raises(ValueError, match="True or 1 where a token counts"):
        as_mask(mask)


def test_scores_as_a_reward_model_gives_them():
    kl, mask = torch.zeros(3, 4), torch.ones(3, 4).bool()
    column = torch.tensor([[1.0], [2.0], [3.0]])
    shaped = klft.shape_rewards(column, kl, mask, coef=0.1)
    assert torch.equal(shaped, klft.shape_rewards(column[:, 0], kl, mask, coef=0.1))
    assert shaped.shape == (3, 4)


def test_scores_of_another_number_of_rows():
    with pytest.raises(ValueError, match=r"one score per row \[B\].*\[2\]"):
        klft.shape_rewards(torch.ones(2), torch.zeros(3, 4), torch.ones(3, 4).bool(), coef=0.1)


@pytest.mark.parametrize("what", ["completion-only logits", "shifted mask", "labels"])
def test_what_does_not_belong_together_is_named(what):
    model, reference = models("llama")
    logits, ids, mask = model(IDS).logits, IDS, COMPLETION
    if what == "completion-only logits":
        logits = logits[:, -3:]
    elif what == "shifted mask":
        mask = mask[:, 1:]
    else:
        ids = ids.masked_fill(~mask, -100)
    said = "not labels" if what == "labels" else r"not shifted.*\[2, 8\]"
    with pytest.raises(ValueError, match=said):
        KLPenalty(reference).measure(logits, ids, ATTENTION, mask)


def test_a_loss_left_out_is_said_once(caplog):
    model, reference = models("llama")
    with pytest.warns(UserWarning, match="exact in the reward"):
        penalty = KLPenalty(reference, estimator="exact", controller=AdaptiveKL(0.1, target=6.0, horizon=100))
    kl = penalty.measure(model(IDS).logits, IDS, ATTENTION, COMPLETION)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            penalty.rewards(torch.ones(2), kl)
            penalty.update(kl)
    assert sum("losses(kl)" in r.getMessage() for r in caplog.records) == 1
    caplog.clear()
    quiet = KLPenalty(reference, estimator="exact", placement="both")
    with caplog.at_level(logging.WARNING):
        quiet.losses(kl)
        quiet.update(kl)
    assert not caplog.records


def test_a_loss_that_is_a_mean_is_refused():
    hidden, head = torch.randn(6, 4), klft.LMHead(torch.randn(8, 4, requires_grad=True))
    with pytest.raises(ValueError, match=r"return the \*sum\*"):
        klft.fused_token_loss(lambda s: s.logp.mean(), hidden, head, torch.arange(6))


def test_a_linear_layer_is_a_head():
    layer = torch.nn.Linear(4, 8)
    hidden, ids = torch.randn(6, 4), torch.arange(6)
    found = klft.token_scores(hidden, layer, ids).logp
    assert torch.equal(found, klft.token_scores(hidden, klft.LMHead(layer.weight, layer.bias), ids).logp)
    with pytest.raises(TypeError, match=r"klft\.LMHead.*got Embedding"):
        klft.token_scores(hidden, torch.nn.Embedding(8, 4), ids)


# ---- arguments of another kind --------------------------------------------------------------------------------------


@pytest.fixture
def _as_users_have_it():
    """Without the suite's own type checks, which would refuse a wrong type first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_as_users_have_it")
@pytest.mark.parametrize("wrong", [0.05, None, "fixed", klft.FixedKL])
def test_a_controller_of_another_kind_is_named(wrong):
    with pytest.raises(TypeError, match=r"KLPenalty: controller must be .*FixedKL\(0\.05\).*got "):
        KLPenalty(tiny.llama(), controller=wrong)


@pytest.mark.usefixtures("_as_users_have_it")
def test_a_controller_of_ones_own_needs_no_base_class():
    class Mine:
        coef = 0.3

        def update(self, sequence_kl, episodes):
            return self.coef + episodes

    mine: Any = Mine()
    assert KLPenalty(tiny.llama(), controller=mine).coef == 0.3


@pytest.mark.usefixtures("_as_users_have_it")
@pytest.mark.parametrize(("wrong", "said"), [
    (None, r"reference is None.*KLPenalty\(ref_model\).*AdapterReference"), (0.05, "got float"),
    ("gpt2", "got str.*load"),
])  # fmt: skip
def test_a_reference_of_another_kind_is_named(wrong, said):
    with pytest.raises((TypeError, ValueError), match=said):
        KLPenalty(wrong)


@pytest.mark.usefixtures("_as_users_have_it")
def test_heads_of_another_kind():
    """A linear layer is one everywhere; a bare weight is named with what to make of it."""
    penalty = KLPenalty(tiny.llama())
    hidden, ids, mask = torch.randn(6, 4), torch.arange(6), torch.ones(6).bool()
    layer: Any = torch.nn.Linear(4, 8)
    ref: Any = torch.nn.Linear(4, 8)
    found = penalty.measure_hidden(hidden, layer, ids, mask, hidden, ref)
    wanted = klft.token_scores(hidden, layer, ids, hidden, ref)
    assert torch.equal(found.scores.reverse_kl, wanted.reverse_kl)
    for function in (klft.token_scores, penalty.measure_hidden):
        masked = () if function is klft.token_scores else (mask,)
        with pytest.raises(TypeError, match=r"the policy.*LMHead\(weight\).*got (Tensor|Parameter)"):
            function(hidden, layer.weight, ids, *masked, hidden, ref)
        with pytest.raises(TypeError, match=r"the reference.*LMHead\(weight\).*got (Tensor|Parameter)"):
            function(hidden, layer, ids, *masked, hidden, ref.weight)


@pytest.mark.parametrize("same", [True, False])
def test_a_policy_that_the_penalty_froze_is_said_once(same, caplog):
    policy = tiny.llama().eval()
    penalty = KLPenalty(policy if same else copy.deepcopy(policy))
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            penalty.measure(policy(**klft.causal_inputs(policy, IDS, ATTENTION)).logits, IDS, ATTENTION, COMPLETION)
    said = [r.getMessage() for r in caplog.records if "copy.deepcopy" in r.getMessage()]
    assert len(said) == same


def test_a_rollout_without_gradient_is_no_frozen_policy(caplog):
    policy = tiny.llama().eval()
    penalty = KLPenalty(copy.deepcopy(policy))
    with caplog.at_level(logging.WARNING), torch.no_grad():
        penalty.measure(policy(IDS).logits, IDS, ATTENTION, COMPLETION)
    assert not caplog.records


# --- what is given in the wrong place --------------------------------------------------------------------------------


def shifted(logits, ids, attention, mask):
    """What a loop that shifts by itself would pass: logits [:, :-1], all that is predicted [:, 1:]."""
    return logits[:, :-1], ids[:, 1:], attention[:, 1:], mask[:, 1:]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_inputs_that_were_shifted_already_are_noticed(grad, same, caplog):
    """SmolLM2-135M: 8.7 nats per token at the same positions, 1.0 one before; where nothing is shifted 0 and 7.8."""
    model, reference = models("llama")
    if not same:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(IDS)
    with torch.set_grad_enabled(grad), caplog.at_level(logging.WARNING):
        logits = model(**klft.causal_inputs(model, IDS, attention)).logits
        penalty = KLPenalty(reference)
        penalty.measure(logits, IDS, attention, COMPLETION)
        assert "shifted" not in caplog.text
        for _ in range(2):
            penalty.measure(*shifted(logits, IDS, attention, COMPLETION))
    (said,) = [r.getMessage() for r in caplog.records if "shifted" in r.getMessage()]
    assert said.startswith("KLPenalty.measure: the logits look as if they were shifted already")


def test_models_that_are_far_apart_are_not_taken_for_shifted(caplog):
    for seed in range(8):
        for policy, other in ((tiny.llama(seed), tiny.llama(seed + 100)), (tiny.llama(seed), tiny.gpt2(seed))):
            reference = FrozenReference(other.eval())
            with caplog.at_level(logging.WARNING):
                KLPenalty(reference).measure(
                    5 * policy(IDS, attention_mask=ATTENTION).logits, IDS, ATTENTION, COMPLETION
                )
    assert "shifted" not in caplog.text


@pytest.mark.usefixtures("_as_users_have_it")
def test_rewards_say_what_goes_where():
    model, reference = models("llama")
    penalty = KLPenalty(reference)
    kl = penalty.measure(model(IDS, attention_mask=ATTENTION).logits, IDS, ATTENTION, COMPLETION)
    expected = penalty.rewards(torch.tensor([1.0, 2.0]), kl)
    with pytest.raises(TypeError, match=r"rewards\(scores, kl\): scores must be a tensor \[B\].*got a TokenKL"):
        penalty.rewards(kl, torch.tensor([1.0, 2.0]))
    with pytest.raises(TypeError, match=r"kl what measure\(\.\.\.\) gave.*got a Tensor"):
        penalty.rewards(torch.tensor([1.0, 2.0]), kl.scores.reverse_kl)
    for given in ([1.0, 2.0], 1.0, None):
        with pytest.raises(TypeError, match=r"scores must be a tensor \[B\], one number per completion, .*got a"):
            penalty.rewards(given, kl)
    assert expected.shape == IDS.shape


@pytest.mark.usefixtures("_as_users_have_it")
def test_what_stands_in_anothers_place_is_named():
    model, reference = models("llama")
    penalty, output = KLPenalty(reference), model(IDS, attention_mask=ATTENTION)
    with pytest.raises(TypeError, match=r"logits \[B, T, V\], got a CausalLMOutputWithPast: pass its \.logits"):
        penalty.measure(output, IDS, ATTENTION, COMPLETION)
    with pytest.raises(ValueError, match=r"mask counts 6 token\(s\) that attention_mask hides, and"):
        penalty.measure(output.logits, IDS, COMPLETION.long(), ATTENTION.bool())
    with pytest.raises(ValueError, match="the logits are probabilities"):
        penalty.measure(output.logits.softmax(-1), IDS, ATTENTION, COMPLETION)
    right = penalty.measure(output.logits, IDS, ATTENTION, COMPLETION)
    of_logs = penalty.measure(output.logits.log_softmax(-1), IDS, ATTENTION, COMPLETION)
    torch.testing.assert_close(of_logs.scores.reverse_kl, right.scores.reverse_kl)
    with pytest.raises(ValueError, match=r"1 score\(s\) are not finite, first in row 1"):
        penalty.rewards(torch.tensor([1.0, torch.nan]), right)
