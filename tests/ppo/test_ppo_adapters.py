"""PPOTrainer with PEFT's adapters: the base model is the reference, the value head is saved, the seed draws them."""

import copy
import gc

import torch
from support import tiny
from transformers import LlamaForCausalLM

from klft import AdapterReference
from klft.ppo.value import value_parameters


def test_a_peft_run_is_its_own_reference_with_the_adapter_off(tmp_path):
    from peft import PeftModel

    base = tiny.llama()
    initial = copy.deepcopy(base).eval()
    gc.collect()
    models = sum(type(o) is LlamaForCausalLM for o in gc.get_objects())
    run = tiny.trainer(
        tmp_path, base, given={"peft_config": tiny.lora()}, max_steps=4, save_strategy="steps", save_steps=4.0
    )
    gc.collect()
    assert sum(type(o) is LlamaForCausalLM for o in gc.get_objects()) == models
    assert isinstance(run.penalty.reference, AdapterReference)
    assert run.penalty.reference.model is run.model
    start = copy.deepcopy(value_parameters(run.model))
    run.train()
    logs = tiny.step_logs(run)
    assert logs[0]["kl/reverse/max"] == logs[0]["kl/forward/max"] == 0.0
    assert logs[-1]["kl/reverse/mean"] > 1e-4
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(run.penalty.reference.logits(ids, torch.ones_like(ids), 4), initial(ids).logits)
    assert tiny.unequal(start, value_parameters(run.model))

    loaded = PeftModel.from_pretrained(copy.deepcopy(initial), tmp_path / "checkpoint-4").eval()
    run.model.eval()
    assert torch.equal(loaded(ids).logits, run.model(ids).logits)
    assert not torch.equal(loaded(ids).logits, initial(ids).logits)


def test_a_peft_model_can_be_handed_in(tmp_path):
    from peft import PeftModel, get_peft_model

    base = tiny.llama()
    initial = copy.deepcopy(base).eval()
    run = tiny.trainer(tmp_path, get_peft_model(base, tiny.lora()), max_steps=3, save_strategy="steps", save_steps=3.0)
    start = copy.deepcopy(value_parameters(run.model))
    run.train()
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(run.penalty.reference.logits(ids, torch.ones_like(ids), 4), initial(ids).logits)
    assert tiny.unequal(start, value_parameters(run.model))
    loaded = PeftModel.from_pretrained(copy.deepcopy(initial), tmp_path / "checkpoint-3").eval()
    assert torch.equal(loaded(ids).logits, run.model.eval()(ids).logits)


def test_an_adapter_is_drawn_from_the_seed(tmp_path):
    made = []
    for name in ("first", "second"):
        torch.manual_seed(len(made))  # whatever was drawn before must not matter
        run = tiny.trainer(tmp_path / name, given={"peft_config": tiny.lora()})
        made.append({n: p.detach().clone() for n, p in run.model.named_parameters() if "lora_A" in n})
    assert made[0]
    assert not tiny.unequal(*made)
