"""The self-test: each planted fault is found by the check that is named for it, and healthy pairs are let through."""

import copy
import dataclasses
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import tiny
from support.processes import launch, leave
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from klft import AdapterReference, FrozenReference, LMHead, check_setup

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.25, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 4}, "phi3": {},
    "gemma2": {"head_dim": 4, "query_pre_attn_scalar": 4},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16}, "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4},
    "bloom": {"n_layer": 2, "n_head": 4}, "granite": {}, "gpt_neox": {}, "cohere": {},
}  # fmt: skip


def of_family(name, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(SMALL | FAMILIES[name]))).eval()


def pair(model=None):
    model = tiny.llama().eval() if model is None else model
    return model, FrozenReference(copy.deepcopy(model))


def problems(*args, **options):
    return {check.name: check.text for check in check_setup(*args, **options) if check.status == "problem"}


def test_silent_under_autocast_which_keeps_copies_of_weights():
    """A new adapter moves the policy, though autocast may go on with the 16-bit copies that it has made of it."""
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert problems(model, AdapterReference(model), starts_equal=True) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_on_healthy_pairs(family):
    model, reference = pair(of_family(family))
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    checks = check_setup(model, reference, tiny.tokenizer(), optimizer=optimizer, starts_equal=True)
    assert [check for check in checks if check.status not in ("ok", "skipped")] == []
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_silent_on_a_healthy_adapter(training, trained):
    model = get_peft_model(tiny.llama(attention_dropout=0.0), tiny.lora()).train(training)
    if trained:  # both of its matrices move: negated together, they would not
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
    before = copy.deepcopy(model.state_dict())
    checks = check_setup(model, AdapterReference(model), tiny.tokenizer(), starts_equal=None if trained else True)
    assert [check.name for check in checks if check.status not in ("ok", "skipped")] == ["start"] * trained
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training is training


def test_low_precision_is_no_fault():
    model, reference = pair(tiny.llama().to(torch.bfloat16).eval())
    assert problems(model, reference, tiny.tokenizer(), starts_equal=True) == {}


def test_another_reference_of_the_same_origin_is_a_note():
    model, reference = pair()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    (note,) = [check for check in check_setup(model, reference, tiny.tokenizer()) if check.status == "note"]
    assert note.name == "start"
    assert "does not start as the reference: KL up to" in note.text


# ---- planted faults --------------------------------------------------------------------------------------------------


class Jitter(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.1 * torch.randn_like(output.logits)
        return output


class ByColumn(GPT2LMHeadModel):
    def forward(self, input_ids, attention_mask=None, use_cache=None, logits_to_keep=0):
        columns = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=columns, use_cache=use_cache)


def test_dropout_left_on():
    model, reference = pair()
    assert set(problems(model.train(), reference)) == {"loss"}
    assert model.training


def test_jitter_left_on():
    found = problems(*pair(Jitter(tiny.llama().config).eval()))
    assert "something random is on" in found["policy: repeatable"]
    assert "reference: repeatable" in found


def test_softcap_ignored(monkeypatch):
    read = LMHead.from_model
    monkeypatch.setattr(LMHead, "from_model", lambda *a, **k: dataclasses.replace(read(*a, **k), softcap=None))
    assert set(problems(*pair(of_family("gemma2")))) == {"policy: head", "reference: head"}


def sampled(model, temperature):
    """Two rows, left-padded, with the sampler's log-probabilities of the last three tokens."""
    ids = torch.tensor([[0, 0, 5, 9, 7, 11], [4, 6, 8, 3, 10, 12]])
    attention = (ids > 0).long()
    mask = torch.arange(6).expand(2, 6) >= 3
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits / temperature
    logp = torch.zeros(2, 6)
    logp[:, 1:] = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return {"input_ids": ids, "attention_mask": attention, "mask": mask, "logp": logp}


def test_wrong_temperature():
    model, reference = pair()
    rollout = sampled(model, 0.7)
    assert problems(model, reference, temperature=0.7, rollout=rollout) == {}
    assert set(problems(model, reference, temperature=1.0, rollout=rollout)) == {"sampling"}


def test_reference_swapped():
    model, _ = pair()
    stranger = FrozenReference(tiny.llama(seed=5))
    assert "nothing in common" in problems(model, stranger)["start"]
    assert set(problems(model, stranger, starts_equal=True)) == {"start"}


def test_adapter_not_disabled(monkeypatch):
    model = get_peft_model(tiny.llama(attention_dropout=0.0), tiny.lora()).eval()
    monkeypatch.setattr(model, "disable_adapter", nullcontext)
    assert "move the reference" in problems(model, AdapterReference(model))["reference stays"]


def test_adapter_with_bias():
    options = {"r": 2, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    model = get_peft_model(tiny.gpt2(dropout=0.0), LoraConfig(bias="all", **options)).eval()
    with pytest.raises(ValueError, match="bias='all' trains biases of the base model"):
        AdapterReference(model)
    model = get_peft_model(tiny.gpt2(dropout=0.0), LoraConfig(**options)).eval()
    model.get_base_model().transformer.h[0].attn.c_attn.base_layer.bias.requires_grad_()  # by hand
    found = problems(model, AdapterReference(model))
    assert "trained but belong to the base model" in found["reference stays"]


def test_reference_in_the_policys_memory():
    model = tiny.llama().eval()
    twin = tiny.llama(seed=5)
    reference = FrozenReference(twin)
    twin.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data
    assert "memory" in problems(model, reference)["reference stays"]


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_pad_inside_the_mask(pad):
    model, reference = pair()
    rollout = sampled(model, 1.0)
    assert problems(model, reference, tiny.tokenizer(pad), rollout=rollout) == {}
    rollout["attention_mask"][1, 5] = 0
    assert (
        "1 of 6 tokens that count are padding"
        in problems(model, reference, tiny.tokenizer(pad), rollout=rollout)["mask"]
    )


@pytest.mark.parametrize(("pad", "counted"), [("<pad>", 5), ("<eos>", 4)])
def test_padding_that_nothing_marks(pad, counted):
    model, reference = pair()
    tokenizer = tiny.tokenizer(pad)
    fill = tokenizer.pad_token_id
    ids = torch.tensor([[5, 9, 7, 11, 2, 2 if pad == "<eos>" else 0], [fill, 4, 6, fill, fill, fill]])
    rollout = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mask": torch.ones(2, 6).bool()}
    found = problems(model, reference, tokenizer, rollout=rollout)["mask"]
    assert f"{counted} of 12 tokens that count are padding" in found
    inside = torch.tensor([[5, 9, fill, 11, 2, 7], [8, 4, 6, fill, fill, 3]])  # sampled
    rollout |= {"input_ids": inside, "mask": torch.arange(6).expand(2, 6) > 0}
    assert "mask" not in problems(model, reference, tokenizer, rollout=rollout)


def test_first_token_inside_the_mask():
    model, reference = pair()
    rollout = sampled(model, 1.0)
    rollout["mask"] = rollout["mask"] | (torch.arange(6) == 2)
    assert "predicted by padding" in problems(model, reference, rollout=rollout)["mask"]


def test_learned_positions_without_ids():
    found = problems(*pair(ByColumn(tiny.gpt2(dropout=0.0).config).eval()))
    assert "padded on the left" in found["policy: padding"]
    assert "reference: padding" in found


@pytest.mark.parametrize("mass", [True, False])
def test_vocabulary_cut(mass):
    model, wide = tiny.llama().eval(), tiny.llama(vocab_size=40)
    with torch.no_grad():
        for own, other in zip(model.parameters(), wide.parameters(), strict=True):
            other[: len(own)] = own
        if not mass:
            wide.lm_head = nn.Linear(16, 40, bias=True)  # untied, with ids that nobody says
            wide.lm_head.weight[:32], wide.lm_head.bias[:32] = model.lm_head.weight, 0.0
            wide.lm_head.weight[32:], wide.lm_head.bias[32:] = 0.0, -1e4
    found = problems(model, FrozenReference(wide), tiny.tokenizer())
    assert ("are no padding" in found.get("vocabulary", "")) == mass


def test_tokenizer_wider_than_the_head():
    model, reference = pair(tiny.llama(vocab_size=20).eval())
    assert "tokenizer has 32 ids" in problems(model, reference, tiny.tokenizer())["vocabulary"]


def test_frozen_policy():
    model, reference = pair()
    model.requires_grad_(False)
    found = problems(model, reference)
    assert set(found) == {"policy moves", "loss"}


def test_what_is_trained_has_no_part_in_the_logits():
    model, reference = pair()
    model.requires_grad_(False)
    model.extra = nn.Linear(2, 2)
    assert "do not depend" in problems(model, reference)["policy moves"]


def test_optimizer_without_the_policy():
    model, reference = pair()
    optimizer = torch.optim.AdamW(copy.deepcopy(model).parameters())
    assert "lacks 21 of 21" in problems(model, reference, optimizer=optimizer)["optimizer"]
    partly = torch.optim.AdamW(list(model.parameters())[1:])
    assert (
        "lacks 1 of 21 trainable tensors of the policy (model.embed_tokens.weight"
        in (problems(model, reference, optimizer=partly)["optimizer"])
    )


def test_nan_weights_are_named():
    model, reference = pair()
    with torch.no_grad():
        model.model.embed_tokens.weight[int(model.model.embed_tokens.weight.shape[0]) // 2 :] = torch.nan
    assert "NaN (sample 0, position" in problems(model, reference)["policy: repeatable"]


@pytest.mark.parametrize("nan", [True, False])
def test_nan_beside_suppressed_ids(nan, monkeypatch):
    """Suppressed ids are -inf everywhere and no fault; a NaN at one position between them is one, and is placed."""
    model, reference = pair()
    forward = LlamaForCausalLM.forward

    def suppressed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.index_fill(-1, torch.tensor([3, 4]), -torch.inf)
        if nan and self is model and output.logits.shape[1] > 4:
            output.logits[0, 4, 7] = torch.nan
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", suppressed)
    found = problems(model, reference)
    if nan:
        assert found["policy: repeatable"].startswith("its logits are NaN (sample 0, position 4)")
    assert bool(found) == nan, found


def test_ids_that_the_tokenizer_does_not_have():
    checks = check_setup(*pair(tiny.llama(vocab_size=400).eval()), tiny.tokenizer())
    (note,) = [check for check in checks if check.name == "vocabulary"]
    assert note.status == "note"
    assert "ids from 32 on, which the tokenizer does not have" in note.text


def test_a_check_that_raises_is_a_problem(monkeypatch):
    model, reference = pair()
    monkeypatch.setattr(FrozenReference, "distance_to", lambda *_: 1 / 0)
    assert problems(model, reference)["start"] == "ZeroDivisionError: division by zero"


def test_modes_and_weights_come_back_when_a_forward_fails(monkeypatch):
    model, reference = pair()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        if any(p.flatten()[0] != before[n].flatten()[0] for n, p in model.named_parameters()):
            raise RuntimeError("in the middle")
        return forward(*args, **kwargs)

    forward = model.forward
    monkeypatch.setattr(model, "forward", fails)
    check_setup(model, reference)
    monkeypatch.undo()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# ---- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_unsynchronised_ranks():
    done = launch(__file__, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0 alike: ok", "rank 0 apart: problem, rank(s) [1] have other weights than rank 0",
        "rank 1 alike: ok", "rank 1 apart: problem, rank(s) [1] have other weights than rank 0",
    ]  # fmt: skip


def of_processes():
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    for name, seed in (("alike", 0), ("apart", rank)):
        model, reference = pair(tiny.llama(seed=seed).eval())
        (check,) = [c for c in check_setup(model, reference) if c.name == "processes"]
        found = f", {check.text.split(':')[0]}" * (check.status == "problem")
        print(f"rank {rank} {name}: {check.status}{found}\n", end="", flush=True)  # a line at a time


if __name__ == "__main__":
    of_processes()
    leave()


def test_a_model_is_a_reference_too_but_not_the_policy_itself():
    model, other = tiny.llama(0), tiny.llama(5)
    found, expected = (check_setup(model, given, tiny.tokenizer()) for given in (other, FrozenReference(other)))
    assert [(c.name, c.status) for c in found] == [(c.name, c.status) for c in expected]
    with pytest.raises(ValueError, match="the reference is the policy itself"):
        check_setup(model, model)
    assert all(p.requires_grad for p in model.parameters())
