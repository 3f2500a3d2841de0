"""What judges read, and under which names their scores are logged."""

import functools

import pytest
import torch
from support import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from klft.ppo import RewardModel
from klft.ppo.rewards import reward_names
from klft.prompts import decode_completions, pad

WORDS = ["the", "movie", "was", "good", "bad", "ing"]


def sentencepiece_like():
    """Writes a space in front of each word, and drops the first one of whatever is decoded by itself."""
    pieces = ["<unk>", "<s>", "</s>"] + ["▁" + word for word in WORDS] + WORDS
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def completed(tokenizer, prompts, completions):
    prompt_ids, prompt_mask = pad([tokenizer(p)["input_ids"] for p in prompts], 0)
    ids, mask = pad([tokenizer.convert_tokens_to_ids(c) for c in completions], 0, side="right")
    return decode_completions(tokenizer, prompts, prompt_ids, prompt_mask, ids, mask)


def test_prompt_and_completion_together_are_what_was_written():
    prompts = ["the movie was"] * 4
    texts = completed(sentencepiece_like(), prompts, [["▁good"], ["ing"], ["▁bad", "</s>"], ["</s>"]])
    assert texts == [" good", "ing", " bad", ""]


def test_a_message_does_not_begin_with_the_space():
    prompt_ids, prompt_mask = pad([[3]], 0)
    ids, mask = pad([[6, 2]], 0, side="right")
    written = decode_completions(
        sentencepiece_like(), [[{"role": "user", "content": "the"}]], prompt_ids, prompt_mask, ids, mask
    )
    assert written == [[{"role": "assistant", "content": "good"}]]


@pytest.mark.parametrize("chat", [False, True])
def test_special_tokens_that_the_policy_wrote_are_text_and_ends_are_not(chat, tmp_path):
    """w7 is special, as a <think> is; w9 is another end of the model's; <eos> and <pad> have roles in the tokenizer."""
    tokenizer = tiny.tokenizer(chat=True)
    tokenizer.add_special_tokens({"extra_special_tokens": ["w7", "w9"]})
    ids = tokenizer.convert_tokens_to_ids(["w7", "w4", "<pad>", "w9", "<eos>"])
    prompt = [{"role": "user", "content": "w1"}] if chat else "w1 w7"
    prompt_ids, prompt_mask = pad([tokenizer("w1 w7")["input_ids"]], 0)
    kept, mask = pad([ids], 0, side="right")
    (said,) = decode_completions(tokenizer, [prompt], prompt_ids, prompt_mask, kept, mask, eos_ids=[ids[3]])
    assert said == ([{"role": "assistant", "content": "w7 w4"}] if chat else " w7 w4")


def test_reward_functions_and_the_table_see_special_tokens(tmp_path):
    tokenizer, seen = tiny.tokenizer(), []
    tokenizer.add_special_tokens({"extra_special_tokens": [f"w{i}" for i in range(29)]})

    def look(completions, completion_ids, **_):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [0.0] * len(completions)

    tiny.trainer(tmp_path, None, look, given={"processing_class": tokenizer}, max_steps=1).train()
    assert seen
    for text, ids in seen:
        assert text.split() == [f"w{i - 3}" for i in ids if i > 2]


def judge(**changed):
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(tiny.critic().config.__class__(**tiny.critic().config.to_dict() | changed))
    return model.eval()


def test_a_texts_reward_does_not_depend_on_its_neighbours():
    """Where the tokenizer pads with the end of sequence and the config names another id."""
    reward = RewardModel(judge(pad_token_id=0), tiny.tokenizer(pad="<eos>"))
    short, long = "w1 w2", "w1 w2 w3 w4 w5 w6 w7"
    alone = reward([""], [short])[0]
    beside = reward(["", ""], [short, long])[0]
    assert beside == pytest.approx(alone, abs=1e-6)


def test_labels_that_may_hold_together_are_read_through_a_sigmoid():
    labels = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "problem_type": "multi_label_classification"}
    model = judge(**labels)
    reward = RewardModel(model, tiny.tokenizer(), label="b")
    ids = torch.tensor([tiny.tokenizer()("w1 w2")["input_ids"]])
    with torch.no_grad():
        expected = model(ids).logits[0, 1].sigmoid().item()
    assert reward([""], ["w1 w2"]) == [pytest.approx(expected, abs=1e-6)]


def test_the_only_label_is_no_choice():
    with pytest.raises(ValueError, match=r"one output.*leave `label` out"):
        RewardModel(judge(num_labels=1), tiny.tokenizer(), label=0)


def score(completions, **_):
    return [3.0] * len(completions)


def scaled(completions, by, **_):
    return [float(by)] * len(completions)


def test_no_reward_functions_metric_replaces_another():
    functions = [
        score,
        lambda **_: [],
        lambda **_: [],
        functools.partial(scaled, by=1),
        functools.partial(scaled, by=5),
    ]
    assert reward_names(functions) == ["score_2", "<lambda>", "<lambda>_2", "scaled", "scaled_2"]


def test_the_score_is_of_all_functions_whatever_one_is_called(tmp_path):
    run = tiny.trainer(
        tmp_path, reward=[score, functools.partial(scaled, by=1), functools.partial(scaled, by=5)], max_steps=1
    )
    run.train()
    (logs,) = tiny.step_logs(run)[:1]
    assert logs["reward/score/mean"] == pytest.approx(9.0)
    assert (logs["reward/score_2/mean"], logs["reward/scaled/mean"], logs["reward/scaled_2/mean"]) == (3.0, 1.0, 5.0)
