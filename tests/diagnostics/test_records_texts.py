"""Texts and classes of tokens in the token table: every kind of tokenizer, bytes that are no text, hostile words."""

from types import SimpleNamespace

import torch
from support import tiny
from support.vocabularies import CORPUS, byte_level
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from klft.diagnostics import Metadata, read_records, records_table, token_classes, token_texts, write_records
from klft.diagnostics.vocabulary import BYTE_OF, TOKEN_CLASSES, tokenizer_hash

HOSTILE = [
    "</script><img onerror=1>",
    '" onmouseover=',
    "[/INST]",
    "\x1b]0;pwn\a",
    "\u202eabc",
    "a\0b",
    "=cmd()",
    "café",
    "Ġx",
]


def sentencepiece():
    """Metaspace and byte fallback, as Llama 2 and Gemma have it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁the", "▁", "ing", "▁42", ",", "▁▁"]
    inner = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def described(tokenizer, pieces):
    ids = [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    return list(zip(token_texts(tokenizer, ids), token_classes(tokenizer, ids), strict=True))


def test_the_texts_of_byte_level_pieces_join_to_the_text():
    tokenizer = byte_level()
    for text in CORPUS:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) < len(text.encode())  # some pieces are words
        shown = "".join(token_texts(tokenizer, ids))
        raw = bytes(BYTE_OF[c] for piece in tokenizer.convert_ids_to_tokens(ids) for c in piece)
        assert raw.decode() == text
        assert shown.isascii() or "<0x" in shown or shown == text
    assert "".join(token_texts(tokenizer, tokenizer(CORPUS[0])["input_ids"])) == CORPUS[0]


def test_the_alphabet_of_bytes_is_the_tokenizers_own():
    assert sorted(BYTE_OF) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF.values()) == list(range(256))
    assert pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é \n")[0][0] == "".join(
        next(c for c, b in BYTE_OF.items() if b == byte) for byte in "é \n".encode()
    )


def test_bytes_that_are_no_text_alone_are_shown_as_bytes():
    tokenizer = byte_level()
    ids = [tokenizer.convert_tokens_to_ids(next(c for c, b in BYTE_OF.items() if b == byte)) for byte in "😀".encode()]
    assert token_texts(tokenizer, ids) == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert token_classes(tokenizer, ids) == ["other"] * 4


def test_classes_of_a_byte_level_vocabulary():
    tokenizer = byte_level()
    pieces = ["<|im_end|>", "<|im_start|>", "<tool_call>", "Ġthe", "the", "Ċ", "Ġ", "4", "!", "Ġ="]
    assert described(tokenizer, pieces) == [
        ("<|im_end|>", "end of turn"), ("<|im_start|>", "special"), ("<tool_call>", "word part"),
        (" the", "word start"), ("the", "word part"), ("\n", "whitespace"), (" ", "whitespace"), ("4", "digit"),
        ("!", "punctuation"), (" =", "punctuation"),
    ]  # fmt: skip
    assert set(token_classes(tokenizer, range(len(tokenizer)))) <= set(TOKEN_CLASSES)


def test_texts_and_classes_of_a_sentencepiece_vocabulary():
    pieces = ["<s>", "</s>", "▁the", "ing", "▁42", ",", "▁▁", "<0x0A>", "<0xE2>", "<0x41>"]
    assert described(sentencepiece(), pieces) == [
        ("<s>", "special"), ("</s>", "end of turn"), (" the", "word start"), ("ing", "word part"), (" 42", "digit"),
        (",", "punctuation"), ("  ", "whitespace"), ("\n", "whitespace"), ("<0xE2>", "other"), ("A", "word part"),
    ]  # fmt: skip


def test_texts_and_classes_of_whole_words_and_of_word_pieces():
    assert described(tiny.tokenizer(), ["<pad>", "<eos>", "w5"]) == [
        ("<pad>", "special"), ("<eos>", "end of turn"), ("w5", "word start"),
    ]  # fmt: skip
    inner = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    assert described(tokenizer, ["play", "##ing"]) == [("play", "word start"), ("##ing", "word part")]


def test_ids_the_tokenizer_does_not_have():
    tokenizer = byte_level()
    assert token_texts(tokenizer, [151_999, -1, len(tokenizer)]) == ["<id 151999>", "<id -1>", f"<id {len(tokenizer)}>"]
    assert token_classes(tokenizer, [151_999]) == ["other"]
    slow = ByT5Tokenizer()
    assert token_texts(slow, [3 + ord("a"), 100_000]) == ["a", "<id 100000>"]


def test_hostile_texts_go_through_the_table_untouched(tmp_path):
    tokenizer = byte_level(hostile=[*HOSTILE, "x" * 100_000])
    ids = torch.tensor([[tokenizer.convert_tokens_to_ids(text) for text in (*HOSTILE, "x" * 100_000)]])
    table = records_table(SimpleNamespace(logp=-torch.ones(ids.shape)), ids, torch.ones_like(ids), tokenizer)
    assert table["token"].to_pylist() == [*HOSTILE, "x" * 100_000]
    path = write_records(table, tmp_path / "hostile.parquet", Metadata.of(table, tokenizer, model="\x1b</script>\0"))
    again, metadata = read_records(path)
    assert again.equals(table)
    assert [metadata.vocabulary[i] for i in ids[0].tolist()] == [*HOSTILE, "x" * 100_000]
    assert metadata.model == "\x1b</script>\0"


def test_lone_surrogates_do_not_stop_a_table():
    class Odd(ByT5Tokenizer):
        def convert_ids_to_tokens(self, ids, **_):
            return "\ud83d"

    assert token_texts(Odd(), [5]) == ["\\ud83d"]


def test_the_hash_tells_vocabularies_apart():
    assert tokenizer_hash(tiny.tokenizer()) == tokenizer_hash(tiny.tokenizer(pad="<eos>"))
    hashes = {tokenizer_hash(t) for t in (tiny.tokenizer(), byte_level(), byte_level(ends="<|end|>"), sentencepiece())}
    assert len(hashes) == 4
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)
