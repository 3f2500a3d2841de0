"""Prompts and completions longer than a model's positions, and tokenizers that do not fit: named before training."""

import copy

import pytest
import torch
from datasets import Dataset
from support import tiny
from transformers import BertConfig, BertForSequenceClassification

from klft.models import check_vocabularies
from klft.ppo import RewardModel

LONG = Dataset.from_dict({"prompt": [" ".join(f"w{i % 20}" for i in range(60))] * 8})


@pytest.mark.parametrize("model", [tiny.llama, tiny.gpt2])
def test_more_tokens_than_positions(model, tmp_path):
    said = r"up to 60 tokens and max_completion_length = 20 make 80, and the policy has 64 positions.*at most 44"
    with pytest.raises(ValueError, match=said):
        tiny.trainer(tmp_path, model(), data=LONG, max_completion_length=20)
    tiny.trainer(tmp_path, model(), data=LONG, max_completion_length=20, max_prompt_length=44)
    tiny.trainer(tmp_path, model(), data=LONG, max_completion_length=4)


def test_a_reference_with_fewer_positions(tmp_path):
    given = {"reference": tiny.llama(max_position_embeddings=32)}
    with pytest.raises(ValueError, match="the reference has 32 positions"):
        tiny.trainer(tmp_path, tiny.llama(max_position_embeddings=128), data=LONG, given=given)


def test_a_judge_with_fewer_positions():
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, num_labels=1,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"reads 40 tokens.*has 16 positions"):
        RewardModel(model, tiny.tokenizer())([""], [" ".join(["w1"] * 40)])
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 16
    cut = RewardModel(model, tokenizer)
    assert cut([""], [" ".join(["w2"] * 24 + ["w1"] * 16)]) == cut([""], [" ".join(["w1"] * 16)])


def test_ids_beyond_the_head():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<a{i}>" for i in range(8)])
    gaps = copy.copy(tokenizer)
    gaps.get_vocab = lambda: {"<pad>": 0, "far": 60}
    with pytest.raises(ValueError, match=r"head has 48 rows.*up to 60"):
        check_vocabularies(gaps, policy=48)
    check_vocabularies(tokenizer, policy=40)


def test_a_reference_saved_with_another_tokenizer(tmp_path):
    folder = tmp_path / "reference"
    tiny.llama().save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(folder)
    reference = type(tiny.llama()).from_pretrained(folder)
    tiny.trainer(tmp_path / "out", given={"reference": copy.deepcopy(reference)})
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"w3"', '"w_"').replace('"w4"', '"w3"').replace('"w_"', '"w4"'))
    with pytest.raises(ValueError, match="tokenizer"):
        tiny.trainer(tmp_path / "out", given={"reference": reference})
