"""Long texts are cut before they are tokenised, and their tokens are those of the whole text."""

import random

import pytest
from support import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from klft import prompts
from klft.diagnostics.loading import read_texts
from klft.prompts import encode_prompts, encode_texts


def byte_level():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = ["the cat sat on the mat, and the dog 😀 saw it. " * 3, "größere Wörter und naïve Zeichen "]
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def words(seed, count):
    vocabulary = ["the", "cat", "😀", "größere", "  ", "mat,", "\n", "unknownlongword" * 9, "x"]
    return " ".join(random.Random(seed).choices(vocabulary, k=count))


@pytest.fixture
def seen(monkeypatch):
    """Lengths of the texts that a tokenizer was given."""
    lengths, call = [], PreTrainedTokenizerFast.__call__

    def counting(self, text, *args, **kwargs):
        lengths.append(len(text))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    return lengths


TOKENIZERS = {
    "words": tiny.tokenizer,
    "words with BOS": lambda: tiny.tokenizer(adds_bos=True),
    "bytes": byte_level,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("count", [1, 40, 400])
@pytest.mark.parametrize("max_length", [2, 7, 50])
def test_tokens_of_a_cut_text_are_those_of_the_whole(name, count, max_length, monkeypatch):
    tokenizer = TOKENIZERS[name]()
    texts = [words(seed, count) + " end" for seed in range(8)]
    bos = str(tokenizer.bos_token)
    given = [*texts, *(bos + text for text in texts), *({"prompt": "the cat", "completion": text} for text in texts)]
    ends = [*texts, *(bos + text for text in texts)]
    found = []
    for characters in (1 << 20, 32, 4):
        monkeypatch.setattr(prompts, "CHARACTERS", characters)
        found.append(
            (encode_texts(tokenizer, given, max_length=max_length), encode_prompts(tokenizer, ends, max_length))
        )
    assert found[0] == found[1] == found[2]


def test_a_huge_line_is_cut_before_it_is_tokenised(seen):
    line = "the cat sat on the mat, and it " * 200_000
    encoded = encode_texts(byte_level(), [line, {"prompt": line, "completion": "x"}, "a cat"], max_length=64)
    assert len(encoded.ids[0]) == 64
    assert encoded.sample_ids == [0, 2]  # the prompt alone is longer than max_length
    encode_prompts(byte_level(), [line], 64)
    assert max(seen) <= 32 * (64 + 16)
    assert seen.count(5) == 1  # nothing is tokenised twice


def test_words_that_are_longer_than_was_thought_are_read_to_their_end(seen):
    line = "w1 " + "x" * 100_000 + " w2 w3"  # one unknown word
    assert encode_texts(tiny.tokenizer(), [line], max_length=3).ids == [[4, tiny.PAD, 5]]
    assert encode_prompts(tiny.tokenizer(), [line], 3) == [[tiny.PAD, 5, 6]]


def test_a_huge_prompt_is_refused_without_its_tokens(seen, tmp_path):
    with pytest.raises(ValueError, match=r"prompts of at least 5800 tokens and max_completion_length = 6 make 5806"):
        tiny.trainer(tmp_path, data=tiny.Dataset.from_dict({"prompt": ["w1 " * 300_000, *["w1"] * 63]}))
    assert max(seen) < 200_000


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{"text": {"a": 1}}\n{"text": {"a": 2}}\n', r"a\.jsonl: row 1: 'text' must be text .*a dict, \{'a': 1\}"),
        ('{"text": null}\n{"text": 5}\n', r"a\.jsonl: row 2: 'text' must be text or messages, got a int, 5"),
        ('{"text": "a"}\n{"text": {"a": 2}}\n', r"a\.jsonl: .*row 2"),
    ],
)
def test_a_cell_that_is_no_text_names_its_row(rows, said, tmp_path):
    (tmp_path / "a.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=said):
        read_texts(str(tmp_path / "a.jsonl"))
