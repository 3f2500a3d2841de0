"""Prompts and completions longer than a model's positions, and tokenizers that do not fit: named before training."""

import copy

import pytest
import torch
from datasets import Dataset
from support import tiny
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

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


def bert(positions):
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=positions, num_labels=1,
        )
    )  # fmt: skip


def letters():
    """A tokenizer of another kind than the policy's: an id per character, and one at the beginning."""
    inner = Tokenizer(
        models.WordLevel({"<pad>": 0, "<s>": 1, **{c: i + 2 for i, c in enumerate("w0123456789")}}, "<pad>")
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")


def judged(folder, judge, words, **changed):
    data = Dataset.from_dict({"prompt": ["w1"] * 7 + [" ".join(["w1"] * words)]})
    tiny.trainer(folder, reward=[tiny.mixed, judge], data=data, **changed)


def test_a_judge_of_the_policys_tokenizer_is_refused_before_training_by_its_arithmetic(tmp_path):
    judge = RewardModel(bert(32), tiny.tokenizer())
    judged(tmp_path, judge, 12, max_completion_length=20)
    said = r"reads 33 tokens = 13 of a prompt \+ max_completion_length = 20, and has 32 positions"
    with pytest.raises(ValueError, match=said):
        judged(tmp_path, judge, 13, max_completion_length=20, max_prompt_length=4)  # the judge reads all of it
    judge.tokenizer.model_max_length = 32
    judged(tmp_path, judge, 13, max_completion_length=20)


def test_a_judge_of_another_tokenizer_is_refused_before_training_by_its_own_count_of_a_prompt(tmp_path):
    judge = RewardModel(bert(32), letters())
    judged(tmp_path, judge, 10, max_completion_length=20)  # 1 + 10 * 2 + 9 spaces; of a completion nothing is known
    with pytest.raises(ValueError, match=r"reward model .* reads 33 tokens of a prompt, and has 32 positions"):
        judged(tmp_path, judge, 11, max_completion_length=20)


def test_a_judge_with_fewer_positions_than_a_conversation(tmp_path):
    judge = RewardModel(bert(32), tiny.tokenizer(chat=True))
    said = [{"role": "user", "content": " ".join(["w1"] * 30)}]
    data = Dataset.from_dict({"prompt": [said] * 4})
    # <bos> w27 ... w28
    with pytest.raises(ValueError, match="reads 34 tokens = 33 of a prompt"):
        tiny.trainer(
            tmp_path, reward=judge, data=data, max_completion_length=1,
            given={"processing_class": tiny.tokenizer(chat=True)},
        )  # fmt: skip


def test_a_judge_with_fewer_positions():
    model = bert(16)
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
