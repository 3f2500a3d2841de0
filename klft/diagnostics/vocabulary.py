"""Texts and classes of single token ids.

A tokenizer's own decode is no help here: it loses the leading space of a first token and shows bytes that are no text
by themselves as U+FFFD. Pieces are read instead: byte-level BPE's alphabet, SentencePiece's spaces and bytes, and
plain words. Nothing depends on neighbouring tokens.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from klft.models import tokenizer_hash as tokenizer_hash  # it was here once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_CLASSES: tuple[str, ...] = (
    "special", "end of turn", "whitespace", "digit", "punctuation", "word start", "word part", "other",
)  # fmt: skip
END_OF_TURN = {
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|return|>", "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>", "<end_of_turn>", "<turn|>", "<eos>", "</s>", "[/s]",
}  # fmt: skip
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
BYTE_OF: dict[str, int] = {chr(b): b for b in _PLAIN} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}
"""GPT-2's alphabet, in which byte-level BPE writes its pieces."""
BYTE = re.compile("<0x([0-9A-F]{2})>")


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int]) -> list[str]:
    """Text of each id on its own, a leading space included.

    Bytes that are not valid UTF-8 alone are shown as <0xE2>, ids the tokenizer does not have as <id 151999>, special
    and added tokens by name.
    """
    return [text for text, _ in _described(tokenizer, ids)]


def token_classes(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int]) -> list[str]:
    """One of TOKEN_CLASSES for each id, by its text alone.

    "word start" follows a space, or is any word where the tokenizer's pieces do not say what they follow; "word part"
    is every other piece with a letter in it; "punctuation" includes symbols and emoji; "other" is mostly bytes.
    """
    return [kind for _, kind in _described(tokenizer, ids)]


def _described(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int]) -> list[tuple[str, str]]:
    """(text, class) of each id."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = "" if backend is None else f"{backend.pre_tokenizer} {backend.decoder}"
    in_bytes, marks_words = "ByteLevel" in pipeline, backend is None or "ByteLevel" in pipeline or "▁" in pipeline
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    described = []
    for token_id in map(int, ids):
        known = token_id >= 0 and (backend is not None or token_id < len(tokenizer))
        piece: Any = tokenizer.convert_ids_to_tokens(token_id) if known else None
        if piece is None:
            described.append((f"<id {token_id}>", "other"))
            continue
        ends = token_id == tokenizer.eos_token_id or piece in END_OF_TURN
        if token_id in added or token_id in special:
            text = piece
        elif in_bytes and all(character in BYTE_OF for character in piece):
            text = _shown(bytes(BYTE_OF[character] for character in piece))
        else:
            text = BYTE.sub(lambda match: _shown(bytes.fromhex(match[1])), piece.replace("▁", " "))
        text = text.encode("utf-8", "backslashreplace").decode()  # lone surrogates have no place in a table
        if ends or token_id in special or (token_id in added and added[token_id].special):
            described.append((text, "end of turn" if ends else "special"))
        else:
            described.append((text, _class(text, marks_words)))
    return described


def _shown(piece: bytes) -> str:
    """UTF-8, with each byte that is none as <0xE2>."""
    text = piece.decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)


def _class(text: str, marks_words: bool) -> str:
    if BYTE.search(text):
        return "other"
    if text.isspace():
        return "whitespace"
    characters = text.strip()
    if any(c.isalpha() for c in characters):
        starts = text[0].isspace() if marks_words else not text.startswith("##")
        return "word start" if starts else "word part"
    if any(c.isnumeric() for c in characters):
        return "digit"
    return "punctuation" if characters and all(unicodedata.category(c)[0] in "PS" for c in characters) else "other"
