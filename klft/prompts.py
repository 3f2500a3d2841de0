"""Prompts, completions and texts as token ids, and back."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """Texts as token ids: of each, how many belong to the prompt, and its number among the texts that were given."""

    ids: list[list[int]]
    prompt_lengths: list[int]
    sample_ids: list[int]


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the model's (one or several) and the tokenizer's."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return sorted({i for i in ids if i is not None})


def pad_id_of(tokenizer: Any) -> int:
    """What fills rows up. Any id would do: nothing is ever read off it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def tokenize_prompts(tokenizer: Any, prompts: list, max_length: int | None, pad_id: int) -> tuple[Tensor, Tensor]:
    """Text or conversations -> left-padded ids and mask [B, P]. Too long a prompt keeps its end.

    Raises ValueError for a prompt without a single token.
    """
    from trl import apply_chat_template, is_conversational

    rows = []
    for prompt in prompts:
        if is_conversational({"prompt": prompt}):
            # The template writes the special tokens itself; adding them again would double the BOS.
            text = apply_chat_template({"prompt": prompt}, tokenizer)["prompt"]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
        if not ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens: there is nothing to continue")
        rows.append(ids[-max_length:] if max_length else ids)
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = True
    return ids, mask


def completion_mask(completion_ids: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    """(mask [B, C], terminated [B]): real tokens run up to and including the first end; never judged by the pad id."""
    is_end = torch.isin(completion_ids, torch.tensor(ends, device=completion_ids.device))
    ended_before = is_end.long().cumsum(1) - is_end.long() > 0
    return ~ended_before, is_end.any(1)


def spoken(tokenizer: Any, prompts: list, batch: Any) -> list:
    """The completions as reward functions see them: text, or one assistant message after a conversation."""
    from trl import is_conversational

    kept = [row[real].tolist() for row, real in zip(batch.completion_ids, batch.mask, strict=True)]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return [
        [{"role": "assistant", "content": text}] if is_conversational({"prompt": prompt}) else text
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def encode_texts(tokenizer: Any, texts: Sequence[Any], *, max_length: int) -> Encoded:
    """Texts as token ids, those without a token to score left out, long ones cut at the end; says how many.

    Each is a string, {"text": ...}, {"prompt": ..., "completion": ...} (strings or messages), {"messages": [...]} whose
    last one is the assistant's, or a pair (token ids, tokens of the prompt). A token that a prompt's last characters
    share with the completion belongs to the completion. Raises ValueError where nothing is left, naming why.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (the first token is not predicted), got {max_length}")
    found = Encoded([], [], [])
    cut = 0
    for number, text in enumerate(texts):
        ids, prompt = text if isinstance(text, tuple) else _encode(tokenizer, text, number)
        kept = list(ids)[:max_length]
        if len(kept) > max(prompt, 1):
            found.ids.append(kept)
            found.prompt_lengths.append(prompt)
            found.sample_ids.append(number)
            cut += len(ids) > max_length
    if not found.ids:
        raise ValueError(
            f"none of {len(texts)} text(s) has a token to score: they are empty, a single token, or have no completion "
            f"within max_length = {max_length}"
        )
    dropped = len(texts) - len(found.ids)
    if dropped:
        logger.warning("%d of %d texts are left out: they have no token to score", dropped, len(texts))
    if cut:
        logger.warning("%d of %d texts are cut to their first %d tokens", cut, len(texts), max_length)
    return found


def encode_prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """A string, or messages that an assistant would answer, as token ids."""
    from trl import apply_chat_template, is_conversational

    if not is_conversational({"prompt": prompt}):
        return tokenizer(prompt, verbose=False)["input_ids"]
    text = apply_chat_template({"prompt": prompt}, tokenizer)["prompt"]
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # the template has written them


def _encode(tokenizer: Any, text: Any, number: int) -> tuple[list[int], int]:
    """(ids, tokens of the prompt)."""
    if isinstance(text, str):
        text = {"text": text}
    if isinstance(text.get("text"), str):
        return (tokenizer(text["text"], verbose=False)["input_ids"] if text["text"].strip() else []), 0
    try:
        return _encode_pair(tokenizer, text)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            f"text {number} is neither a text, nor a prompt and its completion, nor messages that end with the "
            f"assistant's ({type(error).__name__}: {error}); it has {sorted(text)}"
        ) from error


def _encode_pair(tokenizer: Any, text: dict[str, Any]) -> tuple[list[int], int]:
    from trl import apply_chat_template, is_conversational

    if "messages" in text:
        *before, last = text["messages"]
        if last["role"] != "assistant":
            raise ValueError(f"the last message's role is {last['role']!r}")
        text = {"prompt": before, "completion": [last]}
    pair, options = {"prompt": text["prompt"], "completion": text["completion"]}, {}
    if is_conversational(pair):
        pair, options = apply_chat_template(pair, tokenizer), {"add_special_tokens": False}
    prompt = tokenizer(pair["prompt"], verbose=False, **options)["input_ids"]
    whole = tokenizer(pair["prompt"] + pair["completion"], verbose=False, **options)["input_ids"]
    same = [a == b for a, b in zip(prompt, whole, strict=False)]
    return whole, [*same, False].index(False)
