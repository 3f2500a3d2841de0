"""EMAReference: an average of the policy's weights; of an adapter, that alone, and the policy does not notice."""

import copy

import peft
import pytest
import torch
from support import tiny

from klft import EMAReference, FixedKL, KLPenalty
from klft.models import causal_inputs, evaluating
from klft.references import Reference

IDS = torch.tensor([[0, 0, 5, 7, 9, 4], [3, 8, 6, 4, 11, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def lora_policy(**more):
    """Wide B matrices: PEFT starts them at 0, where the adapter does nothing."""
    policy = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **more))
    torch.manual_seed(3)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    return policy


POLICIES = pytest.mark.parametrize("make", [tiny.llama, lora_policy])


def trained(policy):
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def move(policy, seed):
    """As a step of an optimizer would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in trained(policy).values():
            p += 0.1 * torch.randn_like(p)


def logits(policy):
    with evaluating(policy):
        return policy(**causal_inputs(policy, IDS, MASK)).logits


def kl_to(policy, reference):
    penalty = KLPenalty(reference, estimator="exact", placement="loss", controller=FixedKL(1.0))
    policy.eval()
    kl = penalty.measure(policy(**causal_inputs(policy, IDS, MASK)).logits, IDS, MASK, MASK)
    return penalty.losses(kl)[kl.mask].sum().item()


@POLICIES
def test_the_average_is_what_the_formula_says(make):
    policy = make().double()
    reference = EMAReference(policy, decay=0.9, every=2)
    want = {name: p.detach().clone() for name, p in trained(policy).items()}
    for step in range(1, 6):
        move(policy, step)
        reference.after_step(policy)
        if step % 2 == 0:
            want = {name: 0.9 * want[name] + 0.1 * p.detach() for name, p in trained(policy).items()}
    oracle = make().double()
    oracle.load_state_dict(want, strict=False)
    torch.testing.assert_close(reference.logits(IDS, MASK), logits(oracle), rtol=1e-12, atol=1e-12)
    assert (reference.logits(IDS, MASK) - logits(policy)).abs().max() > 1e-2


@POLICIES
def test_after_sync_the_kl_is_exactly_zero_and_decay_zero_is_sync(make):
    policy = make()
    by_hand, by_step = EMAReference(policy, decay=0.99), EMAReference(policy, decay=0.0, every=3)
    for step in range(3):
        move(policy, step)
        by_step.after_step(policy)
    assert kl_to(policy, by_hand) > 1e-3
    by_hand.sync(policy)
    for reference in (by_hand, by_step):
        assert torch.equal(reference.logits(IDS, MASK), logits(policy))
        assert kl_to(policy, reference) == 0.0
    move(policy, 9)
    assert kl_to(policy, by_hand) > 1e-3


@POLICIES
def test_sync_forgets_a_nan(make):
    policy = make()
    reference = EMAReference(policy, decay=0.5)
    held = {name: p.detach().clone() for name, p in trained(policy).items()}
    with torch.no_grad():
        next(iter(trained(policy).values())).fill_(torch.nan)
    reference.after_step(policy)
    assert reference.logits(IDS, MASK).isnan().any()
    policy.load_state_dict(held, strict=False)
    reference.sync(policy)
    assert torch.equal(reference.logits(IDS, MASK), logits(policy))


def test_a_full_model_is_copied_and_frozen_and_the_policy_stays_trainable():
    policy = tiny.llama().train()
    before = list(trained(policy))
    reference = EMAReference(policy, decay=0.5)
    reference.check_independent(policy)
    assert list(trained(policy)) == before
    assert policy.training
    assert not trained(reference.model)
    assert isinstance(reference, Reference)
    assert "moving average, decay 0.5, every 1" in reference.name


def test_of_an_adapter_nothing_else_is_kept():
    policy = lora_policy()
    reference = EMAReference(policy, decay=0.5)
    assert reference.model is policy
    assert set(reference.state_dict()) == {"steps", *trained(policy)}
    assert all("lora_" in name for name in trained(policy))
    reference.check_independent(policy)


def test_scoring_leaves_the_policy_alone(tmp_path):
    """Under a gradient that is being made: parameters, gradients, flags, modes and files are as without a reference."""
    policies = [lora_policy().eval(), lora_policy().eval()]
    policies[0].base_model.model.model.layers[0].mlp.train()
    reference = EMAReference(policies[0], decay=0.5)
    move(policies[0], 1), move(policies[1], 1)
    modes, flags = [[m.training for m in policies[0].modules()], list(trained(policies[0]))]
    identities = [id(p) for p in policies[0].parameters()]
    for i, policy in enumerate(policies):
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        for _ in range(2):
            loss = policy(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
            if i == 0:
                assert not torch.equal(reference.logits(IDS, MASK), logits(policy))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if i == 0:
                reference.after_step(policy)
        policy.save_pretrained(tmp_path / str(i))
    assert tiny.unequal(*map(tiny.parameters, policies)) == []
    assert [[m.training for m in policies[0].modules()], list(trained(policies[0]))] == [modes, flags]
    assert [id(p) for p in policies[0].parameters()] == identities
    names = [sorted(p.name for p in (tmp_path / str(i)).iterdir()) for i in (0, 1)]
    assert names[0] == names[1]
    files = [(tmp_path / str(i) / "adapter_model.safetensors").read_bytes() for i in (0, 1)]
    assert files[0] == files[1]


@POLICIES
def test_what_autocast_has_cast_for_one_is_not_read_for_the_other(make):
    policy = make()
    reference = EMAReference(policy, decay=0.5)
    move(policy, 1)
    with torch.autocast("cpu", torch.bfloat16):
        alone = reference.logits(IDS, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        policy(input_ids=IDS, attention_mask=MASK)
        assert torch.equal(reference.logits(IDS, MASK), alone)
        own = policy.eval()(**causal_inputs(policy, IDS, MASK)).logits
    assert own.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own, policy(**causal_inputs(policy, IDS, MASK)).logits)


@POLICIES
def test_small_steps_of_16_bit_weights_do_not_round_to_nothing(make):
    policy = make().to(torch.bfloat16)
    reference = EMAReference(policy, decay=0.999)
    start = {name: p.detach().float() for name, p in trained(policy).items()}
    with torch.no_grad():
        for p in trained(policy).values():
            p *= 2
    for _ in range(2000):
        reference.after_step(policy)
    state = reference.state_dict()
    for name, before in start.items():
        want = before * (2 - 0.999**2000)
        torch.testing.assert_close(state[name].float(), want, rtol=1e-3, atol=1e-6)
    assert reference.logits(IDS, MASK).dtype == torch.bfloat16
    assert (reference.logits(IDS, MASK) - logits(policy)).abs().mean() < 1.0


@POLICIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_brings_back_the_very_average(make, dtype):
    policy = make().to(dtype)
    reference, other = (EMAReference(copy.deepcopy(policy), decay=0.8, every=2) for _ in range(2))
    for step in range(3):
        move(policy, step)
        reference.after_step(policy)
    other.load_state_dict({name: t.clone() for name, t in reference.state_dict().items()})
    for _ in range(2):
        assert torch.equal(other.logits(IDS, MASK), reference.logits(IDS, MASK))
        move(policy, 7)
        reference.after_step(policy), other.after_step(policy)
    assert reference.steps == other.steps == 5
    lacking = reference.state_dict()
    lacking.pop(next(iter(lacking)))
    with pytest.raises(ValueError, match="the state has no whole"):
        other.load_state_dict(lacking)


def test_a_trained_head_and_tied_copies_are_averaged_too():
    policy = lora_policy(modules_to_save=["lm_head"])
    reference = EMAReference(policy, decay=0.5)
    before = logits(policy)
    move(policy, 1)
    assert torch.equal(reference.logits(IDS, MASK), before)
    hidden, head = reference.hidden(IDS, MASK)
    torch.testing.assert_close(head.logits(hidden), before)
    hidden, head = reference.hidden_of({"input_ids": IDS, "attention_mask": MASK})
    torch.testing.assert_close(head.logits(hidden)[1], before[1])


def test_what_cannot_be_followed_is_refused():
    for decay in (1.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="decay must be 0 or more and below 1"):
            EMAReference(tiny.llama(), decay)
    with pytest.raises(ValueError, match="every must be at least 1"):
        EMAReference(tiny.llama(), 0.9, every=0)
    with pytest.raises(TypeError, match="causal language model, got Linear"):
        EMAReference(torch.nn.Linear(2, 2), 0.9)
    frozen = lora_policy().requires_grad_(False)
    with pytest.raises(ValueError, match="no weight of this PEFT model is trained"):
        EMAReference(frozen, 0.9)
    reference = EMAReference(tiny.llama(), 0.9)
    before = reference.logits(IDS, MASK)
    for other in (lora_policy(), tiny.llama(hidden_size=32)):
        with pytest.raises(ValueError, match="the policy has no whole model"):
            reference.after_step(other)
    assert torch.equal(reference.logits(IDS, MASK), before), "not half of it either"
    policy = lora_policy()
    reference = EMAReference(policy, 0.9)
    policy.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"trained but belong to the reference.*lm_head"):
        reference.check_independent(policy)
