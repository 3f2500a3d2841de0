"""LMHead of models inside PEFT's adapters and DDP: the weight that is at work, or a refusal."""

from contextlib import contextmanager

import peft
import pytest
import torch
import torch.distributed as dist
from support.heads import IDS, llama, own, read
from torch.nn.parallel import DistributedDataParallel

from klft import heads
from klft.heads import LMHead
from klft.models import base_of, hidden_states

# ---- PEFT ----------------------------------------------------------------------------------------------------------


def adapted(**changed):
    """A Llama with an adapter that has been trained a little."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **changed)).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype) / 3)
    return model


def agrees(model):
    logits, theirs = own(model)
    mine, found, head = read(model)
    torch.testing.assert_close(mine, logits, rtol=1e-12, atol=1e-12)
    for name, gradient in theirs.items():
        if gradient is not None:
            assert (found[name] - gradient).norm() <= 1e-10 * gradient.norm(), name
    assert base_of(model) not in heads._probed
    return head


def test_lora_elsewhere_leaves_the_base_head_frozen():
    model = adapted(target_modules=["q_proj", "v_proj"])
    head = agrees(model)
    assert head.weight is base_of(model).lm_head.weight
    assert not head.weight.requires_grad
    with model.disable_adapter():
        assert LMHead.from_model(model).weight is head.weight


def test_lora_on_the_head_is_refused_unless_disabled_or_merged():
    model = adapted(target_modules=["q_proj", "lm_head"])
    refused = pytest.raises(TypeError, match=r"LlamaForCausalLM has an adapter \(Linear\) at work on its head")
    with refused:
        LMHead.from_model(model)
    with model.disable_adapter():
        logits = model(input_ids=IDS).logits
        with hidden_states(model) as kept:
            model(input_ids=IDS)
        torch.testing.assert_close(LMHead.from_model(model).logits(kept.hidden), logits, rtol=1e-12, atol=1e-12)
    with refused:
        LMHead.from_model(model)
    model.merge_adapter()
    with hidden_states(model) as kept:
        model(input_ids=IDS)
    logits = LMHead.from_model(model).logits(kept.hidden)
    torch.testing.assert_close(logits, model(input_ids=IDS).logits, rtol=1e-12, atol=1e-12)
    with model.disable_adapter(), refused:  # the next forward would unmerge it: the weight is still the merged one
        LMHead.from_model(model)


def test_an_adapter_that_is_there_but_not_active_does_not_matter():
    model = adapted(target_modules=["q_proj", "lm_head"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    agrees(model.double())


def test_modules_to_save_give_the_copy_that_is_active():
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = agrees(model)
    copy = base_of(model).lm_head.modules_to_save["default"].weight
    assert head.weight is copy
    assert head.weight.requires_grad
    with model.disable_adapter():
        original = LMHead.from_model(model).weight
        with hidden_states(model) as kept:
            model(input_ids=IDS)
        torch.testing.assert_close(kept.hidden @ original.T, model(input_ids=IDS).logits, rtol=1e-12, atol=1e-12)
    assert not torch.equal(original, copy)


def test_trained_tokens_in_a_tied_head_are_refused_unless_disabled():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[4], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(tie_word_embeddings=True), config)
    with pytest.raises(TypeError, match=r"adapter \(TrainableTokensLayer\) at work"):
        LMHead.from_model(model)
    with model.disable_adapter():
        assert LMHead.from_model(model).weight is model.get_base_model().get_input_embeddings().original_module.weight


# ---- DDP -----------------------------------------------------------------------------------------------------------


@contextmanager
def one_process(folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_ddp(find_unused, adapter, tmp_path):
    model = adapted(target_modules=["q_proj"]) if adapter else llama()
    logits, theirs = own(model)
    with one_process(tmp_path):
        wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
        assert base_of(wrapped) is base_of(model)
        for _ in range(2):
            mine, found, head = read(wrapped)
            torch.testing.assert_close(mine, logits, rtol=1e-12, atol=1e-12)
            for name, gradient in theirs.items():
                if gradient is not None:
                    assert (found[f"module.{name}"] - gradient).norm() <= 1e-10 * gradient.norm(), name
        assert head.weight is base_of(model).lm_head.weight
        for _ in range(2):  # a loss that leaves the head out: DDP waits for no gradient that never comes
            with hidden_states(wrapped) as kept:
                wrapped(input_ids=IDS)
            kept.hidden.square().sum().backward()
