"""The frozen references: they give the right logits, hold no gradient, never move, and refuse what they cannot be."""

import copy
import gc
import logging
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from klft import AdapterReference, FrozenReference
from klft.models import CUT_TOKENS, VocabularyCut, check_vocabularies, evaluating, vocab_size

VOCAB = 23


def llama_config(vocab_size=VOCAB, dropout=0.0, **more):
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=dropout,
        pad_token_id=0,
        **more,
    )


def llama(seed=0, **more):
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**more))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2))


def lora(model, randomise=True, **more):
    """A LoRA policy whose adapter does something: PEFT starts it at exactly zero."""
    policy = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **more))
    if randomise:
        torch.manual_seed(7)
        for name, p in policy.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p)
    return policy


def batch(lengths=(6, 3, 1), width=6, side="right", seed=3):
    """Ids and attention mask [B, width] with row i's `lengths[i]` real tokens on the other side of the padding."""
    gen = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, n in enumerate(lengths):
        where = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, where] = torch.randint(1, VOCAB, (n,), generator=gen)
        mask[i, where] = 1
    return ids, mask


# --- FrozenReference -------------------------------------------------------------------------------------------------


def test_frozen_reference_freezes():
    model = llama().train()
    FrozenReference(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())


def test_frozen_reference_gives_the_models_own_logits_without_a_gradient():
    model = llama()
    ids, mask = batch((6, 6))
    want = model.eval()(input_ids=ids).logits.detach()
    got = FrozenReference(model).logits(ids, mask, keep=6)
    assert got.shape == (2, 6, VOCAB)
    assert not got.requires_grad
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("keep", [1, 4, 6])
def test_keep_is_the_number_of_last_positions(keep):
    reference = FrozenReference(llama())
    ids, mask = batch((6, 4))
    torch.testing.assert_close(
        reference.logits(ids, mask, keep), reference.logits(ids, mask, 6)[:, -keep:], rtol=0, atol=1e-6
    )


def test_frozen_reference_is_deterministic_after_someone_called_train():
    reference = FrozenReference(llama(dropout=0.5))
    ids, mask = batch((6, 6))
    want = reference.logits(ids, mask, 6)
    reference.model.train()
    torch.testing.assert_close(reference.logits(ids, mask, 6), want, rtol=0, atol=0)
    assert not any(m.training for m in reference.model.modules())


def test_a_step_of_the_policy_leaves_a_copied_reference_where_it_was():
    policy = llama()
    reference = FrozenReference(copy.deepcopy(policy))
    reference.check_independent(policy)
    ids, mask = batch((6, 6))
    before = reference.logits(ids, mask, 6)
    policy(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for p in policy.parameters():
            p -= p.grad
    torch.testing.assert_close(reference.logits(ids, mask, 6), before, rtol=0, atol=0)
    assert all(p.grad is None for p in reference.model.parameters())


def test_the_policy_itself_is_refused_as_its_reference():
    policy = llama()
    with pytest.raises(ValueError, match=r"shares the policy's memory.*deepcopy"):
        FrozenReference(policy).check_independent(policy)


def test_one_tied_tensor_is_enough_to_be_refused_and_is_named():
    policy, model = llama(0), llama(1)
    model.model.layers[1].mlp.up_proj.weight = policy.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        FrozenReference(model).check_independent(policy)


def test_a_view_of_the_policys_memory_is_refused():
    policy, model = llama(0), llama(1)
    model.model.norm.weight = nn.Parameter(policy.model.norm.weight.detach().view(-1))
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        FrozenReference(model).check_independent(policy)


def not_causal_lms():
    t5 = T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    bert = BertConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return [
        (T5ForConditionalGeneration, t5),
        (LlamaForSequenceClassification, llama_config()),
        (LlamaModel, llama_config()),
        (BertForMaskedLM, bert),
    ]


@pytest.mark.parametrize(("kind", "config"), not_causal_lms(), ids=lambda x: getattr(x, "__name__", ""))
def test_other_transformers_models_are_refused(kind, config):
    with pytest.raises(
        TypeError, match=rf"reference: expected a causal language model.*AutoModelForCausalLM.*got {kind.__name__}"
    ):
        FrozenReference(kind(config))


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), nn.Sequential(nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB))])
def test_a_plain_module_is_refused(thing):
    with pytest.raises(TypeError, match=f"expected a transformers causal language model, got {type(thing).__name__}"):
        FrozenReference(thing)


@pytest.mark.parametrize("make", [llama, gpt2, bloom])
def test_padding_on_either_side_gives_the_same_logits(make):
    reference = FrozenReference(make())
    lengths = (6, 3, 1)
    right_ids, right_mask = batch(lengths, side="right")
    left_ids, left_mask = batch(lengths, side="left")
    right, left = reference.logits(right_ids, right_mask, 6), reference.logits(left_ids, left_mask, 6)
    for i, n in enumerate(lengths):
        alone = reference.logits(right_ids[i : i + 1, :n], torch.ones(1, n, dtype=torch.long), n)[0]
        torch.testing.assert_close(right[i, :n], alone, rtol=0, atol=2e-6)
        torch.testing.assert_close(left[i, 6 - n :], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_reference_of_another_dtype(dtype):
    model = llama()
    ids, mask = batch((6, 3))
    wide = FrozenReference(copy.deepcopy(model).double()).logits(ids, mask, 6)
    got = FrozenReference(copy.deepcopy(model).to(dtype)).logits(ids, mask, 6)
    assert got.dtype == dtype
    # Three-way: no further from float64 than the dtype's own rounding of these logits, a few layers deep.
    bound = 16 * torch.finfo(dtype).eps * wide.abs().max().item()
    real = mask.bool()
    assert (got.double() - wide)[real].abs().max().item() <= bound


def test_a_reference_of_another_architecture():
    ids, mask = batch((6, 3))
    reference = FrozenReference(gpt2())
    reference.check_independent(llama())
    assert reference.logits(ids, mask, 6).shape == (2, 6, VOCAB)


# --- AdapterReference ------------------------------------------------------------------------------------------------


def test_adapter_reference_is_the_base_model_exactly_and_the_adapter_comes_back():
    base = llama()
    original = copy.deepcopy(base).eval()
    policy = lora(base)
    ids, mask = batch((6, 6))
    with_adapter = policy.eval()(input_ids=ids).logits.detach()
    got = AdapterReference(policy).logits(ids, mask, 6)
    torch.testing.assert_close(got, FrozenReference(original).logits(ids, mask, 6), rtol=0, atol=0)
    assert not got.requires_grad
    assert (with_adapter - got).abs().max() > 0.1  # the adapter does something, so "off" is visible
    torch.testing.assert_close(policy(input_ids=ids).logits.detach(), with_adapter, rtol=0, atol=0)
    assert policy(input_ids=ids).logits.requires_grad


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def mixed_modes(policy):
    """Some parts in training mode, some not: neither all-train nor all-eval would restore it."""
    policy.train()
    policy.get_base_model().model.layers[0].eval()
    return modes(policy)


def test_adapter_reference_ignores_dropout_and_restores_training_modes():
    policy = lora(llama(dropout=0.5), lora_dropout=0.5)
    reference = AdapterReference(policy)
    ids, mask = batch((6, 6))
    want = reference.logits(ids, mask, 6)
    before = mixed_modes(policy)
    torch.testing.assert_close(reference.logits(ids, mask, 6), want, rtol=0, atol=0)
    assert modes(policy) == before


def test_adapter_and_modes_come_back_after_an_exception():
    policy = lora(llama())
    reference = AdapterReference(policy)
    ids, mask = batch((6, 6))
    expected = policy.eval()(input_ids=ids).logits.detach()
    before = mixed_modes(policy)
    with pytest.raises(IndexError):
        reference.logits(ids + VOCAB, mask, 6)  # ids outside the vocabulary
    assert modes(policy) == before
    assert torch.is_grad_enabled()
    torch.testing.assert_close(policy.eval()(input_ids=ids).logits.detach(), expected, rtol=0, atol=0)


def test_evaluating_restores_modes_and_gradients_on_an_exception():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    model[1].eval()
    before = modes(model)

    def broken():
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        broken()
    assert modes(model) == before
    assert torch.is_grad_enabled()


def tensor_bytes():
    gc.collect()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in live_tensors()}.values())


def live_tensors():
    return [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]


def test_adapter_reference_holds_no_second_copy():
    policy = lora(llama())
    before = tensor_bytes()
    reference = AdapterReference(policy)
    ids, mask = batch((6, 6))
    reference.logits(ids, mask, 6)
    del ids, mask
    assert reference.model is policy
    assert tensor_bytes() == before


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["q_proj"]),
        peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q_proj"], r=2),
        peft.LoKrConfig(target_modules=["q_proj"], r=2),
        peft.OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4),
        peft.VeraConfig(target_modules=["q_proj"], r=2),
    ],
    ids=lambda c: f"{c.peft_type.value}-{'tokens' if getattr(c, 'trainable_token_indices', None) else ''}",
)
def test_every_kind_of_adapter_is_apart_and_off_is_the_base_model(config):
    base = llama()
    original = copy.deepcopy(base)
    policy = peft.get_peft_model(base, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    ids, mask = batch((6, 6))
    reference = AdapterReference(policy)
    torch.testing.assert_close(
        reference.logits(ids, mask, 6), FrozenReference(original).logits(ids, mask, 6), rtol=0, atol=0
    )
    reference.check_independent(policy)


def test_a_policy_that_trains_base_weights_is_refused():
    policy = lora(llama())
    AdapterReference(policy).check_independent(policy)
    policy.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"belong to the base model.*model\.norm\.weight.*FrozenReference"):
        AdapterReference(policy).check_independent(policy)


def test_adapters_that_train_the_base_models_biases_are_refused():
    policy = peft.get_peft_model(
        gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    )
    # Loaded ones too: PEFT writes a saved adapter's biases into the base model, whether the adapter is on or off.
    with pytest.raises(ValueError, match="bias='all' trains biases of the base model"):
        AdapterReference(policy)


def test_adapter_reference_needs_an_adapter():
    with pytest.raises(TypeError, match=r"AdapterReference needs a PEFT model, got LlamaForCausalLM; use Frozen"):
        AdapterReference(llama())


def test_adapter_reference_of_a_classifier_is_refused():
    policy = peft.get_peft_model(
        LlamaForSequenceClassification(llama_config()), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    with pytest.raises(TypeError, match="got LlamaForSequenceClassification"):
        AdapterReference(policy)


# --- vocabularies ----------------------------------------------------------------------------------------------------


class Tokenizer(SimpleNamespace):
    """As much of a tokenizer as the check reads: its length."""

    def __len__(self):
        return self.size


@pytest.mark.parametrize(("policy", "reference", "tokenizer"), [(23, 23, 23), (32, 23, 20), (23, 32, 23)])
def test_padded_vocabularies_pass(policy, reference, tokenizer):
    check_vocabularies(Tokenizer(size=tokenizer), policy=policy, reference=reference)


@pytest.mark.parametrize(
    ("policy", "reference", "named"), [(20, 23, "the policy's head has 20"), (23, 20, "the reference's head has 20")]
)
def test_a_head_smaller_than_the_tokenizer_is_refused(policy, reference, named):
    with pytest.raises(ValueError, match=rf"{named} rows, but the tokenizer has 23"):
        check_vocabularies(Tokenizer(size=23), policy=policy, reference=reference)


def test_vocab_size_sees_through_an_adapter():
    assert vocab_size(lora(llama())) == VOCAB


def test_vocabulary_cut_says_once_how_much_probability_it_cuts(caplog):
    logits = torch.zeros(2, 3, 10)
    logits[..., 8:] = -20.0
    logits[1, 2, 8:] = -8.0  # the token with the most to lose
    cut = VocabularyCut()
    with caplog.at_level(logging.WARNING, logger="klft.models"):
        torch.testing.assert_close(cut(logits, 10), logits, rtol=0, atol=0)
        assert not caplog.records
        torch.testing.assert_close(cut(logits, 8), logits[..., :8], rtol=0, atol=0)
        cut(logits, 8)
    (record,) = caplog.records
    text = record.getMessage()
    held = torch.softmax(logits[1, 2].double(), -1)[8:].sum().item()
    assert f"{held:.1e}" in text
    assert "10 vocabulary rows" in text
    assert "the other 8" in text
    assert "ids from 8 on" in text


@pytest.mark.parametrize(("held", "refused"), [(1.1e-3, True), (0.9e-3, False)])
def test_ids_with_probability_are_no_padding(held, refused):
    logits = torch.tensor([1 - held, held]).log()
    if not refused:
        assert VocabularyCut()(logits, 1).shape == (1,)
        return
    with pytest.raises(
        ValueError, match=r"2 vocabulary rows, the other 1, .* hold up to 1\.1e-03 of .* at most 0\.001"
    ):
        VocabularyCut()(logits, 1)


def test_what_a_cut_takes_is_measured_in_every_batch():
    cut, fine = VocabularyCut(), torch.zeros(4, 64, 10)
    fine[..., 8:] = -20.0
    for _ in range(2):
        cut(fine, 8)
    assert len(cut.some(fine.reshape(-1, 10))) <= 2 * CUT_TOKENS
    with pytest.raises(ValueError, match="ids from 8 on are no padding"):
        cut(torch.zeros(4, 64, 10), 8)


def test_vocabulary_cut_keeps_the_gradient():
    logits = torch.tensor([[[0.0, 0.0, 0.0, -20.0]]], requires_grad=True)
    VocabularyCut()(logits, 3).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[[1.0, 1.0, 1.0, 0.0]]]))
