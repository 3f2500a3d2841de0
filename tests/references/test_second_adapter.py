"""AdapterReference(policy, adapter=name): another adapter of the policy's own model is the reference."""

import copy

import peft
import pytest
import torch
from support import tiny

from klft import AdapterReference, KLPenalty
from klft.models import causal_inputs, evaluating

IDS = torch.tensor([[0, 0, 5, 7, 9, 4], [3, 8, 6, 4, 11, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def policy_of(**more):
    """Two adapters that do something; "default" is trained."""
    policy = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], **more))
    policy.add_adapter("reference", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], **more))
    policy.set_adapter("default")
    torch.manual_seed(3)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    return policy


def logits(model):
    with evaluating(model):
        return model(**causal_inputs(model, IDS, MASK)).logits


def state(policy):
    return (
        policy.active_adapter,
        policy.base_model.active_adapter,
        [m.active_adapters for m in policy.modules() if hasattr(m, "active_adapters")],
        [m.training for m in policy.modules()],
        [p.requires_grad for p in policy.parameters()],
    )


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}])
def test_it_is_the_model_with_that_adapter_and_all_comes_back(more):
    policy = policy_of(**more)
    policy.base_model.model.model.layers[1].eval()
    other = copy.deepcopy(policy)
    other.set_adapter("reference")
    reference, before = AdapterReference(policy, "reference"), state(policy)
    reference.check_independent(policy)
    assert torch.equal(reference.logits(IDS, MASK), logits(other))
    assert not torch.equal(reference.logits(IDS, MASK), logits(policy))
    hidden, head = reference.hidden(IDS, MASK)
    torch.testing.assert_close(head.logits(hidden), logits(other))
    assert state(policy) == before
    assert reference.name.endswith("with adapter reference")


def test_several_active_adapters_come_back_after_an_exception():
    policy = policy_of()
    policy.base_model.set_adapter(["default", "reference"])
    reference, before = AdapterReference(policy, "reference"), state(policy)
    with pytest.raises(IndexError):
        reference.logits(IDS + 100, MASK)
    assert state(policy) == before
    reference.logits(IDS, MASK)
    assert state(policy) == before


def test_a_gradient_under_way_is_not_disturbed():
    gradients = []
    for scored in (False, True):
        policy = policy_of().eval()
        reference = AdapterReference(policy, "reference")
        loss = policy(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
        if scored:
            penalty = KLPenalty(reference, estimator="exact", placement="loss")
            kl = penalty.measure(policy(**causal_inputs(policy, IDS, MASK)).logits, IDS, MASK, MASK)
            assert kl.scores.reverse_kl[kl.mask].min() > 0
        loss.backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert tiny.unequal(*gradients) == []
    assert gradients[0]


def test_what_is_no_frozen_adapter_is_refused():
    policy = policy_of()
    with pytest.raises(ValueError, match=r"adapter='other' is not an adapter on layers.*which has default, reference"):
        AdapterReference(policy, "other")
    with pytest.raises(ValueError, match="trained but belong to adapter 'default', which is the reference"):
        AdapterReference(policy, "default").check_independent(policy)
    policy.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trained but belong to the base model"):
        AdapterReference(policy, "reference").check_independent(policy)
