"""Every method of PEFT: it trains against a right reference (adapter off = base, to the bit), or is refused by name."""

import copy

import peft
import pytest
import torch
from support import tiny

from klft.ppo.value import VALUE_FILE
from klft.references import AdapterReference, FrozenReference

TASK = {"task_type": "CAUSAL_LM"}
ON = {"target_modules": ["q_proj", "v_proj"]} | TASK
ON_Q = {"target_modules": ["q_proj"]} | TASK
TRAINED = {
    "lora": lambda: peft.LoraConfig(r=2, **ON),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **ON),
    "lora on the embeddings": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens"], **TASK),
    "lora and the whole head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **ON),
    "lora and tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[5, 6], **ON),
    "ia3": lambda: peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"], **TASK),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, **ON),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **ON_Q),
    "loha": lambda: peft.LoHaConfig(r=2, **ON),
    "lokr": lambda: peft.LoKrConfig(r=2, **ON),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=4, **ON),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, **ON_Q),
    "hra": lambda: peft.HRAConfig(r=2, **ON),
    "miss": lambda: peft.MissConfig(r=2, **ON),
    "randlora": lambda: peft.RandLoraConfig(r=2, **ON_Q),
    "shira": lambda: peft.ShiraConfig(r=2, **ON_Q),
    "ln tuning": lambda: peft.LNTuningConfig(**TASK),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 6], target_modules=["embed_tokens"], **TASK),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "c3a": lambda: peft.C3AConfig(block_size=4, **ON_Q),
    "wavelets": lambda: peft.WaveFTConfig(n_frequency=4, **ON),
    "road": lambda: peft.RoadConfig(group_size=4, **ON),
    "delora": lambda: peft.DeloraConfig(r=2, **ON),
    "gralora": lambda: peft.GraloraConfig(r=2, gralora_k=2, **ON_Q),
}  # fmt: skip
REFUSED = {
    "adalora": (lambda: peft.AdaLoraConfig(total_step=10, tinit=1, tfinal=2, **ON), "AdaLoRA.*update_and_allocate"),
    "adaption prompt": (lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **TASK), "adaption prompt"),
    "poly": (lambda: peft.PolyConfig(r=2, n_tasks=1, n_skills=1, **ON), "Poly.*task_ids"),
    "multitask": (lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=1, **TASK), "task_ids"),
    "x-lora": (lambda: peft.XLoraConfig(hidden_size=16, adapters={}, **TASK), "X-LoRA"),
    "prompt tuning": (lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK), "PROMPT_TUNING.*padding"),
    "p-tuning": (
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **TASK),
        "P_TUNING.*padding",
    ),
    "lora on the head": (lambda: peft.LoraConfig(r=2, target_modules=["lm_head"], **TASK), "leave lm_head out"),
}  # fmt: skip
IDS = torch.arange(3, 13)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits[:, -IDS.shape[1] :]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.filterwarnings("ignore")  # PEFT's own advice
def test_a_method_trains_and_its_base_stays(name, tmp_path):
    base = tiny.llama()
    initial = copy.deepcopy(base)
    run = tiny.trainer(tmp_path, base, given={"peft_config": TRAINED[name]()}, max_steps=3, kl_coef=0.0, self_test=True)
    run.train()
    reference = run.penalty.reference
    assert isinstance(reference, AdapterReference)
    assert torch.equal(reference.logits(IDS, torch.ones_like(IDS)), logits(initial))
    assert not torch.equal(logits(run.model), logits(initial))
    first = tiny.step_logs(run)[0]
    assert first["ppo/ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert float(run.model.get_base_model().v_head.weight.abs().sum()) > 0


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_a_method_that_cannot_be_trained_is_named(name, tmp_path):
    make, said = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=said):
        tiny.trainer(tmp_path, given={"peft_config": make()})


def test_a_model_that_has_the_adapter_already(tmp_path):
    adapted = peft.get_peft_model(tiny.llama(), REFUSED["adalora"][0]())
    with pytest.raises(ValueError, match="model: AdaLoRA"):
        tiny.trainer(tmp_path, adapted)
    with pytest.raises(ValueError, match=r"an adapter already \(default\).*peft_config"):
        tiny.trainer(tmp_path, peft.get_peft_model(tiny.llama(), tiny.lora()), given={"peft_config": tiny.lora()})


def test_layers_that_are_repeated_leave_no_base(tmp_path):
    base = tiny.llama()
    initial = copy.deepcopy(base)
    config = peft.LoraConfig(r=2, layer_replication=[(0, 2), (0, 2)], **ON)
    run = tiny.trainer(tmp_path, base, given={"peft_config": config}, max_steps=1)
    assert isinstance(run.penalty.reference, FrozenReference)
    assert torch.equal(run.penalty.reference.logits(IDS, torch.ones_like(IDS)), logits(initial))


def test_a_value_head_that_the_adapter_cannot_save_lies_beside_it(tmp_path):
    make = TRAINED["tokens"]
    run = tiny.trainer(
        tmp_path, given={"peft_config": make()}, max_steps=2, save_strategy="steps", save_steps=1.0, num_ppo_epochs=2
    )
    run.train()
    head = run.model.get_base_model().v_head.weight
    again = tiny.trainer(tmp_path, given={"peft_config": make()}, max_steps=2, num_ppo_epochs=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(again.model.get_base_model().v_head.weight, head)
    assert (tmp_path / "checkpoint-2" / VALUE_FILE).is_file()
