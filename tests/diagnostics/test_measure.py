"""Texts under two models: every number against the models' own float64 logits, and what cannot be compared."""

import copy
import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import oracles, tiny
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from klft.diagnostics import Metadata, Statistics, records_table, scalars, score_texts, summary_lines
from klft.diagnostics.loading import load_models
from klft.diagnostics.measure import scored_table
from klft.models import check_tokenizers
from klft.plots import estimator_spread
from klft.prompts import Encoded, encode_prompt, encode_texts
from klft.references import AdapterReference, FrozenReference

TEXTS = ["w1 w2 w3 w4 w5", "w6 w7", "w8 w9 w10 w11 w12 w13 w14", "w3 w3 w1"]
SIZES = {"batch_size": 3, "max_length": 32}


def adapted(seed=0, **changed):
    """A LoRA policy whose adapter says something; every second weight of it is negative."""
    from peft import LoraConfig

    config = LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | changed)
    model = get_peft_model(tiny.llama(seed), config)
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    return model


def logits_of(model, ids, rows=None):
    """float64, [T, V], of one text alone: no padding, no batch."""
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(input_ids=torch.tensor([ids])).logits[0, :, :rows]


def agree(batch, policy, reference, ids, *, temperature=1.0, rows=None, row=0, off=False):
    """Every number of one row of a batch against the oracle's."""
    p = logits_of(policy, ids, rows)[:-1] / temperature
    if off:
        with reference.disable_adapter():
            q = logits_of(reference, ids, rows)[:-1] / temperature
    else:
        q = logits_of(reference, ids, rows)[:-1] / temperature
    oracle = oracles.token_scores(p, q, torch.tensor(ids[1:]))
    assert batch.token_ids[row, : len(ids)].tolist() == ids
    assert batch.mask[row].tolist() == [0 < t < len(ids) for t in range(batch.mask.shape[1])]
    for name, expected in vars(oracle).items():
        value = getattr(batch.scores, name)[row, 1 : len(ids)].double()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for side, z in (("", p), ("ref_", q)):
        top = z.softmax(-1).topk(5)
        assert torch.equal(getattr(batch.scores, f"{side}top_ids")[row, 1 : len(ids)], top.indices)
        top_p = getattr(batch.scores, f"{side}top_p")[row, 1 : len(ids)].double()
        torch.testing.assert_close(top_p, top.values, rtol=1e-5, atol=1e-6)


def every_row(found, policy, reference, texts=TEXTS, **options):
    rows = [(batch, row) for batch in found for row in range(len(batch.sample_ids))]
    assert len(rows) == len(texts)
    for (batch, row), text in zip(rows, texts, strict=True):
        agree(batch, policy, reference, tiny.tokenizer()(text)["input_ids"], row=row, **options)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_models_of_different_kinds(temperature):
    policy, reference = tiny.llama(), tiny.gpt2(3)
    found = list(score_texts(policy, reference, tiny.tokenizer(), TEXTS, temperature=temperature, **SIZES))
    assert [batch.sample_ids.tolist() for batch in found] == [[0, 1, 2], [3]]
    assert not any(batch.is_prompt.any() for batch in found)
    every_row(found, policy, reference, temperature=temperature)
    assert found[0].scores.reverse_kl[found[0].mask].min() > 0.05, "the models must differ for this to show anything"
    for name, value in found[0].scores.items():
        assert not value[~found[0].mask].any(), name


@pytest.mark.parametrize("given", [None, AdapterReference])
def test_an_adapter_against_its_base(given):
    policy = adapted()
    found = list(score_texts(policy, given and given(policy), tiny.tokenizer(), TEXTS, **SIZES))
    every_row(found, policy, policy, off=True)
    every_row(found, policy, tiny.llama())
    assert found[0].scores.reverse_kl.max() > 0.1


def test_the_batch_size_changes_nothing_and_the_ids_may_be_given():
    policy, reference, tokenizer = tiny.llama(), tiny.llama(5), tiny.tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    a = scored_table(score_texts(policy, reference, tokenizer, TEXTS, batch_size=1, max_length=32), tokenizer)
    pairs = [(each, 0) for each in ids]
    b = scored_table(score_texts(policy, reference, tokenizer, pairs, batch_size=4, max_length=32), tokenizer)
    whole = Encoded(ids, [0, 0, 2, 0], [4, 5, 6, 7])
    c = scored_table(score_texts(policy, reference, tokenizer, whole, batch_size=2, max_length=32), tokenizer)
    assert len(a) == len(b) == len(c) == sum(map(len, ids))
    for name in ("reverse_kl", "forward_kl", "logp"):
        assert a[name].null_count == len(ids)  # the first tokens: shown, not scored
        assert a[name].drop_null().to_pylist() == pytest.approx(b[name].drop_null().to_pylist(), abs=1e-6)
        assert a[name].drop_null().to_pylist() == pytest.approx(c[name].drop_null().to_pylist(), abs=1e-6)
    assert sorted(set(c["sample_id"].to_pylist())) == [4, 5, 6, 7]
    assert c["is_prompt"].to_pylist().count(True) == 2
    assert len(scored_table([], tokenizer)) == 0


def test_modes_and_gradients_are_left_as_they_were():
    policy, reference = tiny.llama(), tiny.gpt2()
    policy.train()
    policy.model.layers[1].eval()
    before = [module.training for module in policy.modules()]
    batches = score_texts(policy, reference, tiny.tokenizer(), TEXTS, **SIZES)
    batch = next(batches)
    assert torch.is_grad_enabled()
    assert [module.training for module in policy.modules()] == before
    assert not batch.scores.logp.requires_grad
    assert all(p.grad is None and p.requires_grad for p in policy.parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    state = torch.get_rng_state()
    list(batches)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="the policy itself"):
        score_texts(policy, policy, tiny.tokenizer(), TEXTS, **SIZES)
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("broken", ["policy", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error_that_names_model_text_and_position(broken, value):
    models = {"policy": tiny.llama(), "reference": tiny.llama(5)}
    models[broken].model.embed_tokens.weight.data[tiny.tokenizer()("w10")["input_ids"][0]] = value
    models[broken].config._name_or_path = "my/model"
    batches = score_texts(*models.values(), tiny.tokenizer(), TEXTS, **SIZES | {"batch_size": 2})
    next(batches)  # w10 is in the third text: attention spreads its NaN over all of that
    said = rf"the {broken} my/model: its logits are not finite for text 3, position 1 \(6 of 8 tokens of the batch\)"
    with pytest.raises(ValueError, match=said):
        next(batches)


@pytest.mark.parametrize("wide", ["policy", "reference"])
def test_padded_rows_are_cut_and_their_mass_is_told(wide, caplog):
    models = {"policy": tiny.llama(), "reference": tiny.llama(5)}
    models[wide] = tiny.padded()
    found = list(score_texts(*models.values(), tiny.tokenizer(), TEXTS, **SIZES))
    every_row(found, *models.values(), rows=32)
    told = [record.getMessage() for record in caplog.records if "padding and left out" in record.getMessage()]
    assert len(told) == 1
    ids = [tiny.tokenizer()(text)["input_ids"] for text in TEXTS[:3]]
    held = max(logits_of(models[wide], each)[:-1].softmax(-1)[:, 32:].sum(-1).max().item() for each in ids)
    assert f"at most {held:.1e}" in told[0]
    assert 1e-6 < held < 1e-3


@pytest.mark.parametrize("rows", [33, 40, 4000])
@pytest.mark.parametrize("wide", ["policy", "reference"])
def test_rows_that_hold_probability_are_not_cut(wide, rows):
    models = {"policy": tiny.llama(), "reference": tiny.llama(5)}
    models[wide] = tiny.llama(7, vocab_size=rows)
    said = f"a model has {rows} vocabulary rows, the other 32, and the ids from 32 on are no padding: they hold up to"
    with pytest.raises(ValueError, match=said):
        next(score_texts(*models.values(), tiny.tokenizer(), TEXTS, **SIZES))


@pytest.mark.parametrize("readable", [True, False])
def test_rows_that_come_to_hold_probability_are_not_cut_later(readable):
    """A batch like the first, then one in which the ids beyond the other's have grown."""
    wide, reference = tiny.padded(), tiny.llama(5)
    given = wide if readable else get_peft_model(wide, LoraConfig(r=2, target_modules=["lm_head"]))
    head = getattr(wide.lm_head, "base_layer", wide.lm_head)
    batches = score_texts(given, reference, tiny.tokenizer(), TEXTS, **(SIZES | {"batch_size": 1}))
    next(batches)
    next(batches)
    with torch.no_grad():
        head.bias[32:] = 9.0
    with pytest.raises(ValueError, match="ids from 32 on are no padding"):
        next(batches)


@pytest.mark.parametrize("broken", ["policy", "reference"])
def test_nan_weights_are_no_model_that_sees_what_follows(broken, monkeypatch):
    monkeypatch.setattr("klft.models._causal", set())
    models = {"policy": tiny.llama(), "reference": tiny.llama(5)}
    models[broken].model.layers[0].mlp.down_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"the {broken} .*its logits are not finite for text 1, position 1"):
        next(score_texts(*models.values(), tiny.tokenizer(), TEXTS, **SIZES))


def test_a_head_that_klft_cannot_read_is_scored_from_logits(caplog):
    policy, reference = adapted(target_modules=["q_proj", "lm_head"]), tiny.padded()
    with caplog.at_level(logging.INFO, "klft"):
        found = list(score_texts(policy, reference, tiny.tokenizer(), TEXTS, temperature=0.7, **SIZES))
    every_row(found, policy, reference, temperature=0.7, rows=32)
    told = [record for record in caplog.records if "scoring the policy from logits" in record.getMessage()]
    assert len(told) == 1
    assert "adapter" in told[0].getMessage()


# --- texts -----------------------------------------------------------------------------------------------------------


def bpe():
    """Byte-level, with pieces that a prompt's end may share with its completion."""
    texts = ["the cat sat on the mat", "the cathedral sat"] * 20
    return GPT2Tokenizer(pad_token="<pad>").train_new_from_iterator(texts, 300, show_progress=False)


def test_forms_of_text_and_which_tokens_are_the_prompts():
    tokenizer = tiny.tokenizer(chat=True)
    user, said = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}
    texts = [
        "w1 w2 w3",
        {"text": "w1 w2 w3"},
        {"prompt": "w1 w2", "completion": " w3"},
        {"messages": [user, said]},
        {"prompt": [user], "completion": [said]},
        ([4, 5, 6], 2),
    ]
    found = encode_texts(tokenizer, texts, max_length=32)
    chat = [tiny.BOS, 30, 4, 5, 31, 6, 7]  # w27 opens the user's turn, w28 the assistant's
    assert found.ids == [[4, 5, 6]] * 3 + [chat] * 2 + [[4, 5, 6]]
    assert found.prompt_lengths == [0, 0, 2, 5, 5, 2]
    assert found.sample_ids == list(range(6))
    assert encode_prompt(tokenizer, "w1 w2") == [4, 5]
    assert encode_prompt(tokenizer, [user]) == chat[:5]


def test_a_token_across_the_border_belongs_to_the_completion():
    tokenizer = bpe()
    found = encode_texts(tokenizer, [{"prompt": "the cat", "completion": "hedral sat"}], max_length=32)
    (ids,), (prompt,) = found.ids, found.prompt_lengths
    assert tokenizer.decode(ids) == "the cathedral sat"
    assert tokenizer.decode(ids[:prompt]) == "the"
    assert tokenizer.decode(ids[prompt]) == " cathedral"


def test_empty_texts_are_dropped_and_long_ones_cut_and_both_counted(caplog):
    texts = ["", "  ", "w1", "w1 w2 w3 w4", {"prompt": "w1 w2 w3", "completion": " w4"}, "w5 w6"]
    found = encode_texts(tiny.tokenizer(), texts, max_length=3)
    assert found == Encoded([[4, 5, 6], [8, 9]], [0, 0], [3, 5])
    assert [r.getMessage() for r in caplog.records] == [
        "4 of 6 texts are left out: they have no token to score",
        "1 of 6 texts are cut to their first 3 tokens",
    ]
    for none in ([], ["", " "], ["w1"]):
        with pytest.raises(ValueError, match=rf"none of {len(none)} text\(s\) has a token to score"):
            encode_texts(tiny.tokenizer(), none, max_length=3)


def test_an_empty_text_among_others_leaves_the_others_numbers_alone():
    policy, reference, tokenizer = tiny.llama(), tiny.llama(5), tiny.tokenizer()
    found = list(score_texts(policy, reference, tokenizer, ["", TEXTS[0], " ", TEXTS[1]], **SIZES))
    assert found[0].sample_ids.tolist() == [1, 3]
    every_row(found, policy, reference, TEXTS[:2])


SAID = {"role": "assistant", "content": "w1"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"prompt": "w1"}, r"text 2: it has no 'completion', only \['prompt'\]\. A text is a string, "),
        ({"prompt": "w1", "completion": None}, r"text 2: it has no 'completion', only \['prompt'\]\. "),  # as of Arrow
        ({"words": "w1"}, r"text 2: it has no 'prompt' and no 'completion', only \['words'\]\. A text is a string, "),
        ({"messages": []}, r"text 2: 'messages' must be a list of messages, got a list, \[\]"),
        ({"prompt": [], "completion": [SAID]}, "text 2: 'prompt' must be a list of messages, got a list,"),
        ({"messages": "w1 w2"}, "text 2: 'messages' must be a list of messages, got a str, 'w1 w2'"),
        ({"prompt": [SAID], "completion": "w2"}, "text 2: 'completion' must be a list of messages, got a str,"),
        ({"prompt": 3, "completion": 4}, "text 2: 'prompt' must be a list of messages, got a int, 3"),
        ({"messages": ["w1"]}, "text 2: message 1 must be a dict, got a str, 'w1'"),
        (
            {"messages": [SAID, {"from": "gpt", "value": "w1"}]},
            r"message 2 has no 'role', only \['from', 'value'\]",
        ),
        ({"messages": [{"role": "user", "content": None}, SAID]}, r"message 1 has no 'content', only \['role'\]"),
        ({"messages": [{}, SAID]}, r"message 1 has no 'role' and no 'content', only \[\]"),
        ({"messages": [{"role": "user", "content": "w1"}]}, r"last message is not the assistant's \(got 'user'\)\. A"),
        ({"messages": [SAID]}, "text 2: nothing stands before the assistant's message"),
        ({"messages": [SAID, SAID], "tools": "5"}, "text 2: tools must be a list of functions' schemas, .*got 5"),
        (b"w1", "text 2 must be a string, a dict or messages, got a bytes, b'w1'|Type-check error"),
    ],
)
def test_what_is_no_text_is_named(text, said):
    with pytest.raises((ValueError, TypeError), match=said):
        encode_texts(tiny.tokenizer(chat=True), ["w1 w2", text], max_length=32)


def test_texts_are_given_so_no_estimate_from_samples_is_made_of_them():
    policy, reference, tokenizer = tiny.llama(), tiny.llama(5), tiny.tokenizer()
    table = scored_table(score_texts(policy, reference, tokenizer, TEXTS, **SIZES), tokenizer)
    assert set(table["sampled"].to_pylist()) == {False}
    stats = Statistics.of(table, Metadata.of(table, tokenizer))
    assert list(stats.quantities) == ["reverse", "forward", "entropy", "ref_entropy", "logp", "ref_logp"]
    assert not any(name in key for key in scalars(stats) for name in ("k1", "k2", "k3"))
    assert not any(name in label for label, _ in summary_lines(stats) for name in ("k1", "k2", "k3"))
    with pytest.raises(ValueError, match="no tokens that the policy sampled"):
        estimator_spread(table)


def test_prompts_stay_out_of_the_statistics():
    policy, reference, tokenizer = tiny.llama(), tiny.llama(5), tiny.tokenizer()
    text = {"prompt": "w1 w2", "completion": " w3 w4"}
    (batch,) = score_texts(policy, reference, tokenizer, [text], **SIZES)
    assert batch.is_prompt.tolist() == [[True, True, False, False]]
    table = records_table(batch.scores, batch.token_ids, batch.mask, tokenizer, is_prompt=batch.is_prompt)
    stats = Statistics.of(table, Metadata.of(table, tokenizer))
    assert (len(table), stats.tokens) == (3, 2)
    assert stats.quantities["reverse"].mean == pytest.approx(batch.scores.reverse_kl[0, 2:].mean().item(), abs=1e-7)


# --- what cannot be compared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"top_k": -1}, "top_k at least 0"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"reference": None}, "has no PEFT adapter"),
        ({"reference": tiny.llama(1, vocab_size=31)}, "the reference's head has 31 rows, but the tokenizer has 32"),
        ({"texts": ["w1 " * 70], "max_length": 100}, "texts have up to 70 tokens, the model 64 positions"),
        ({"model": tiny.critic()}, "expected a causal language model"),
        ({"reference": tiny.critic()}, "expected a causal language model"),
    ],
)
def test_refusals_come_before_the_first_batch(changed, said):
    given = {"model": tiny.llama(), "reference": tiny.llama(5), "tokenizer": tiny.tokenizer(), "texts": TEXTS}
    with pytest.raises((ValueError, TypeError), match=said):
        score_texts(**given | SIZES | changed)


def test_top_k_may_be_none_or_the_whole_vocabulary():
    for k in (0, 32, 100):
        (batch,) = score_texts(tiny.llama(), tiny.llama(5), tiny.tokenizer(), TEXTS[:1], top_k=k, **SIZES)
        assert k == 0 or batch.scores.ref_top_p.shape[-1] == 32
        table = scored_table([batch], tiny.tokenizer())
        assert (table["top_ids"].null_count == len(table)) == (k == 0)


def test_tokenizers_that_differ_are_named_by_their_first_ids():
    other = tiny.tokenizer()
    check_tokenizers(tiny.tokenizer(), other)
    other.add_tokens(["more"])
    check_tokenizers(tiny.tokenizer(), other)
    vocabulary = json.loads(other.backend_tokenizer.to_str())
    ids = vocabulary["model"]["vocab"]
    ids["w4"], ids["w9"] = ids["w9"], ids["w4"]
    swapped = type(other)(tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(vocabulary)))
    with pytest.raises(ValueError, match=r"differ in 2 ids: 7 is 'w4' and 'w9'; 12 is 'w9' and 'w4'"):
        check_tokenizers(tiny.tokenizer(), swapped)


# --- models and texts by name ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints: two models, an adapter, and what is none of that."""
    folder = tmp_path_factory.mktemp("saved")
    for name, model in {"policy": tiny.llama(), "reference": tiny.llama(5), "critic": tiny.critic()}.items():
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    tiny.llama(6).save_pretrained(folder / "bare")
    base = AutoModelForCausalLM.from_pretrained(folder / "policy")
    adapter = get_peft_model(base, tiny.lora())
    torch.manual_seed(9)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    adapter.save_pretrained(folder / "adapter")
    T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(folder / "t5")
    BertForMaskedLM(
        BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(folder / "bert")
    for name in ("t5", "bert"):
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "llama"')
    return folder


def test_models_are_loaded_frozen_with_their_tokenizer(saved):
    policy, reference, tokenizer = load_models(str(saved / "policy"), str(saved / "bare"), dtype="float32")
    assert isinstance(reference, FrozenReference)
    assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    found = list(score_texts(policy, reference, tokenizer, TEXTS, **SIZES))
    every_row(found, tiny.llama(), tiny.llama(6))
    assert load_models(str(saved / "bare"), str(saved / "policy"))[2].get_vocab() == tokenizer.get_vocab()
    assert load_models(str(saved / "bare"), str(saved / "policy"), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_an_adapter_is_its_base_with_the_adapter_on(saved):
    policy, reference, tokenizer = load_models(str(saved / "adapter"))
    assert isinstance(reference, AdapterReference)
    found = list(score_texts(policy, reference, tokenizer, TEXTS, **SIZES))
    every_row(found, policy, tiny.llama())
    assert found[0].scores.reverse_kl.max() > 0.05
    apart = load_models(str(saved / "policy"), str(saved / "adapter"))  # as a reference too
    (swapped,) = score_texts(*apart, TEXTS[:1], **SIZES)
    torch.testing.assert_close(swapped.scores.reverse_kl[0], found[0].scores.forward_kl[0, :5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "reference", "said"),
    [
        ("nowhere", "policy", "model .*nowhere: there is no such folder"),
        ("policy", "nowhere", "reference .*nowhere: there is no such folder"),
        ("empty", "policy", "model .*empty: "),
        ("broken", "policy", "model .*broken: "),
        ("t5", "policy", "model .*t5: expected a causal language model .*got T5ForConditionalGeneration"),
        ("bert", "policy", "model .*bert: expected a causal language model .*got BertLMHeadModel"),
        ("policy", "critic", "reference .*critic.* is a LlamaForSequenceClassification"),
        ("policy", None, "is not a PEFT adapter"),
        ("bare", "bare", "there is no tokenizer beside"),
    ],
)
def test_models_that_cannot_be_compared_are_named(saved, model, reference, said):
    with pytest.raises((ValueError, TypeError), match=said):
        load_models(str(saved / model), reference and str(saved / reference))


@pytest.mark.parametrize(
    ("option", "said"),
    [({"dtype": "float8"}, "dtype must be one of auto"), ({"device": "cuda:9"}, "device 'cuda:9' cannot be used")],
)
def test_options_that_this_machine_does_not_have(saved, option, said):
    with pytest.raises(ValueError, match=said):
        load_models(str(saved / "policy"), str(saved / "reference"), **option)


def test_a_hub_name_offline_is_one_sentence(saved):
    with pytest.raises(ValueError, match=r"model some/model: there is no such folder, and [^\n]*$"):
        load_models("some/model", str(saved / "policy"))
