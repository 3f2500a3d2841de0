"""Prompts, completions and texts as token ids, and back: one chat template, one padding, one end-of-sequence set.

A prompt is a string or a conversation (a list of messages); trl's chat template functions render conversations, and
special tokens are then the template's business, not the tokenizer's.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from klft.choices import TURNS, check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]
"""Text, or a conversation: messages with a role and a content."""
Text = str | dict[str, Any] | list[dict[str, Any]] | tuple[list[int], int]
"""A text to score, see encode_texts."""


# ---- special tokens, padding ----------------------------------------------------------------------------------------


def eos_ids(model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every token that ends a completion: the model's (one or several) and the tokenizer's."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return sorted({i for i in ids if i is not None})


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Pad id: the pad token's, else the end of sequence's, else 0. Its value is irrelevant: masks come from lengths."""
    ids: Any = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: str = "left"
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Rows of token ids -> (ids, mask) [B, T], T that of the longest; mask is True on real tokens."""
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = True
    return ids, mask


# ---- chat templates ------------------------------------------------------------------------------------------------

TEMPLATE_COLUMNS = ("chat_template_kwargs", "tools")
"""Columns of a dataset that go to the chat template, as in TRL."""
OWN_TEMPLATE_ARGUMENTS = {"conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message"}


def template_arguments(row: Mapping[str, Any], defaults: Mapping[str, Any] | str | None = None) -> dict[str, Any]:
    """What the chat template of a row is given: its `chat_template_kwargs` over `defaults`, and its `tools`.

    Each may be in JSON. None, which Arrow fills in where other rows have more keys, is left out. Raises ValueError for
    what is no dict (tools: no list), and for arguments that klft sets itself.
    """
    arguments = {**_template_kwargs(defaults), **_template_kwargs(row.get("chat_template_kwargs"))}
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) and tools else _without_none(tools)
    if tools and not isinstance(tools, list):
        raise ValueError(f"tools must be a list of functions' schemas, or one in JSON, got {tools!r:.80}")
    return arguments | ({"tools": tools} if tools else {})


def _template_kwargs(given: Any) -> dict[str, Any]:
    wrong = why_no_template_kwargs(given)
    if wrong:
        raise ValueError(f"chat_template_kwargs {wrong}")
    return _without_none(json.loads(given) if isinstance(given, str) else dict(given or {}))


def why_no_template_kwargs(given: Any) -> str | None:
    """Why this cannot be chat_template_kwargs, to follow that name; None where it can."""
    try:
        kwargs = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        kwargs = given
    if kwargs is not None and not isinstance(kwargs, Mapping):
        return f"must be a dict, or one in JSON, got {given!r:.80}"
    own = sorted(OWN_TEMPLATE_ARGUMENTS & set(kwargs or {}))
    return f"cannot hold {', '.join(own)}: klft sets that itself (tools: by a column of that name)" if own else None


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


def join_turns(prompt: Sequence[dict[str, Any]], completion: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One conversation; an assistant's turn that ends the prompt goes on in the completion's first message."""
    if not prompt or not completion or not prompt[-1]["role"] == completion[0]["role"] == "assistant":
        return [*prompt, *completion]
    prefill, said = prompt[-1]["content"], completion[0]["content"]
    if isinstance(prefill, list) or isinstance(said, list):  # parts
        prefill, said = ([{"type": "text", "text": c}] if isinstance(c, str) else c for c in (prefill, said))
    return [*prompt[:-1], prompt[-1] | completion[0] | {"content": prefill + said}, *completion[1:]]


def _render(tokenizer: "PreTrainedTokenizerBase", part: str, messages: list[Any], template: Mapping[str, Any]) -> str:
    """As text: a "prompt" that an assistant would answer, or whose last turn it would continue; or whole "messages"."""
    from trl import apply_chat_template

    try:
        (text,) = apply_chat_template({part: messages}, tokenizer, **template).values()
    except Exception as error:  # jinja's, the tokenizer's, or whatever a template raises
        raise ValueError(f"the chat template cannot render the {part} (got {messages!r:.200}): {error}") from error
    return text


# ---- prompts and completions ----------------------------------------------------------------------------------------


CHARACTERS = 32  # per token that is wanted: what lies beyond is tokenised only where that was too few
MARGIN = 16  # tokens next to a cut, which may be others than in the whole text


def _tokenize(tokenizer: "PreTrainedTokenizerBase", text: str, special: bool = True) -> list[int]:
    """Token ids of a text, `special`: with the tokenizer's special tokens; one BOS where it begins with it already."""
    ids: Any = tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]
    bos: Any = tokenizer.bos_token_id
    twice = special and bos is not None and ids[:2] == [bos, bos] and text.startswith(str(tokenizer.bos_token))
    return ids[1:] if twice else ids


def _tokenize_start(tokenizer: "PreTrainedTokenizerBase", text: str, wanted: int, special: bool = True) -> list[int]:
    """Token ids of a text; of one too long, more than the first `wanted`, without looking at all of it."""
    size = CHARACTERS * (wanted + MARGIN)
    while size < len(text):
        ids = _tokenize(tokenizer, text[:size], special)
        if len(ids) > wanted + MARGIN:
            return ids
        size *= 8
    return _tokenize(tokenizer, text, special)


def _tokenize_end(
    tokenizer: "PreTrainedTokenizerBase", text: str, wanted: int | None, special: bool = True
) -> list[int]:
    """Token ids of a text; of one too long, more than the last `wanted` (None: all), and its BOS."""
    size = len(text) if wanted is None else CHARACTERS * (wanted + MARGIN)
    while size < len(text):
        ids = _tokenize(tokenizer, text[-size:], special)
        if len(ids) > (wanted or 0) + MARGIN:
            bos = tokenizer.bos_token_id
            if isinstance(bos, int) and ids[0] != bos and text.startswith(str(tokenizer.bos_token)):
                return [bos, *ids]
            return ids
        size *= 8
    return _tokenize(tokenizer, text, special)


def cut_prompt(tokenizer: "PreTrainedTokenizerBase", ids: list[int], max_length: int | None) -> list[int]:
    """The end of a prompt that is too long, after its BOS if it has one."""
    if max_length is None or len(ids) <= max_length:
        return ids
    bos = ids[:1] if ids[0] == tokenizer.bos_token_id and max_length > 1 else []
    return bos + ids[len(ids) - max_length + len(bos) :]


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    template: Mapping[str, Any] | None = None,
    wanted: int | None = None,
) -> list[int]:
    """A string, or messages that an assistant would answer, as token ids. `template`: see template_arguments.

    `wanted`: of a longer prompt more than the last so many tokens will do, after its BOS.
    """
    if isinstance(prompt, str):
        ids = _tokenize_end(tokenizer, prompt, wanted)
        appended = bool(ids) and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token))
        return ids[:-1] if appended else ids  # a prompt goes on: some tokenizers end every text
    text = _render(tokenizer, "prompt", prompt, template or {})
    return _tokenize_end(tokenizer, text, wanted, special=False)  # the template has written them


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    max_length: int | None = None,
    templates: Sequence[Mapping[str, Any]] | None = None,
) -> list[list[int]]:
    """Prompts as token ids, see cut_prompt. `templates`: of each, its template_arguments.

    Raises ValueError for a prompt without a single token, and for one that the chat template refuses.
    """
    rows = []
    for prompt, template in zip(prompts, templates or [{}] * len(prompts), strict=True):
        ids = encode_prompt(tokenizer, prompt, template, max_length)
        if not ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens: there is nothing to continue")
        rows.append(cut_prompt(tokenizer, ids, max_length))
    return rows


def completion_mask(
    completion_ids: Int[Tensor, "B C"], eos_ids: list[int]
) -> tuple[Bool[Tensor, "B C"], Bool[Tensor, "B"]]:
    """(mask, terminated): real tokens run up to and including the first end of sequence; never judged by the pad id."""
    is_eos = torch.isin(completion_ids, torch.tensor(eos_ids, device=completion_ids.device, dtype=torch.long))
    ended_before = is_eos.long().cumsum(1) - is_eos.long() > 0
    return ~ended_before, is_eos.any(1)


_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


def _without(ids: Tensor, roles: set[Any], eos_ids: Sequence[int]) -> list[int]:
    return [i for i in ids.tolist() if i not in roles and i not in eos_ids]


def decode_completions(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    completion_ids: Int[Tensor, "B C"],
    mask: Bool[Tensor, "B C"],
    eos_ids: Sequence[int] = (),
) -> list[Prompt]:
    """Completions as reward functions see them: text, or one assistant message after a conversation.

    prompt + completion is what the tokens read as: many tokenizers drop the space before a word that is decoded alone.
    Without BOS, EOS, padding and what else has a role of its own in the tokenizer, and without `eos_ids`, the model's
    ends. Special tokens beyond those (a <think>, a tool call's) are text that the policy wrote, and rewards may be
    about them; TRL's GRPO drops them all.
    """
    roles: set[Any] = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    before = [_without(row[real], roles, eos_ids) for row, real in zip(prompt_ids, prompt_mask, strict=True)]
    kept = [_without(row[real], roles, eos_ids) for row, real in zip(completion_ids, mask, strict=True)]
    alone, heads, wholes = (
        tokenizer.batch_decode(rows, skip_special_tokens=False)
        for rows in (kept, before, [b + k for b, k in zip(before, kept, strict=True)])
    )
    written: list[Prompt] = []
    for prompt, text, head, whole in zip(prompts, alone, heads, wholes, strict=True):
        # A message does not begin with the space, unless it goes on. A prompt that reads otherwise with what follows
        # it: then the completion by itself.
        goes_on = isinstance(prompt, str) or prompt[-1]["role"] == "assistant"
        said = whole[len(head) :] if goes_on and whole.startswith(head) else text
        written.append(said if isinstance(prompt, str) else [{"role": "assistant", "content": said}])
    return written


# ---- whole texts ----------------------------------------------------------------------------------------------------


A_TEXT = 'A text is a string, or has "text", "prompt" and "completion", or "messages" that end with the assistant\'s'


class Turns(NamedTuple):
    """The assistant's turns of a conversation: (start, stop) in its ids of those that count, and how many it has."""

    counted: list[tuple[int, int]]
    total: int


class Encoded(NamedTuple):
    """Texts as token ids: of each, how many belong to the prompt, and its number among the texts that were given.

    `turns`: sample id -> Turns, of all conversations given. Of other texts all that follows the prompt counts.
    """

    ids: list[list[int]]
    prompt_lengths: list[int]
    sample_ids: list[int]
    turns: Mapping[int, Turns] = MappingProxyType({})

    def rows(self, index: slice) -> "Encoded":
        """Some of the texts: a batch's, a process's."""
        return Encoded(self.ids[index], self.prompt_lengths[index], self.sample_ids[index], self.turns)


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[Text],
    *,
    max_length: int,
    template: Mapping[str, Any] | str | None = None,
    turns: str = "last",
) -> Encoded:
    """Texts as token ids, those without a token to score left out, long ones cut at the end; says how many.

    Each is a string, {"text": ...}, {"prompt": ..., "completion": ...} (strings or messages), {"messages": [...]} or
    such messages, whose last one is the assistant's, or a pair (token ids, tokens of the prompt). A token that a
    prompt's last characters share with the completion belongs to the completion. A conversation may bring
    TEMPLATE_COLUMNS, over `template`.

    `turns`: what counts of a conversation, "last": its completion; "all": every turn of the assistant's that something
    stands before, each as it would count were it the last; what follows the last of them is left out. Raises ValueError
    where nothing is left, naming why, and for turns="all" where the chat template writes an earlier turn otherwise than
    the last one.
    """
    check_choice("turns", turns, TURNS)
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (the first token is not predicted), got {max_length}")
    chats: dict[int, Turns] = {}
    encoded = Encoded([], [], [], chats)
    cut = 0
    for number, text in enumerate(texts):
        chat, name = None, f"text {number + 1}"
        if isinstance(text, tuple):
            ids, prompt = text
        else:
            asked = _until_assistant(text) if turns == "all" else text
            ids, prompt, chat = _encode(tokenizer, asked, name, template, max_length)
        if min(ids, default=0) < 0:
            raise ValueError(f"{name}: ids are 0 or more, got {min(ids)}: drop or mask labels of -100")
        kept = list(ids)[:max_length]
        if chat is not None:
            spans = [(prompt, len(ids))] if turns == "last" else _split_turns(tokenizer, chat, ids, name, max_length)
            spans = [(start, min(stop, len(kept))) for start, stop in spans if max(start, 1) < min(stop, len(kept))]
            chats[number] = Turns(spans, sum(message["role"] == "assistant" for message in chat.messages))
            prompt = spans[0][0] if spans else len(ids)
        if len(kept) > max(prompt, 1):
            encoded.ids.append(kept)
            encoded.prompt_lengths.append(prompt)
            encoded.sample_ids.append(number)
            cut += len(ids) > max_length
    if not encoded.ids:
        raise ValueError(
            f"none of {len(texts)} text(s) has a token to score: they are empty, a single token, or have no completion "
            f"within max_length = {max_length}"
        )
    dropped = len(texts) - len(encoded.ids)
    if dropped:
        logger.warning("%d of %d texts are left out: they have no token to score", dropped, len(texts))
    if cut:
        logger.warning("%d of %d texts are cut to their first %d tokens", cut, len(texts), max_length)
    return encoded


def _until_assistant(text: Any) -> Any:
    """A conversation without what follows the assistant's last turn, which no token before it depends on."""
    messages = text.get("messages") if isinstance(text, dict) else text
    if not isinstance(messages, list):
        return text
    said = [
        place for place, each in enumerate(messages, 1) if isinstance(each, dict) and each.get("role") == "assistant"
    ]
    kept = messages[: said[-1]] if said else messages
    return text | {"messages": kept} if isinstance(text, dict) else kept


class _Chat(NamedTuple):
    """A conversation, and as the chat template writes it with these arguments."""

    messages: list[dict[str, Any]]
    arguments: dict[str, Any]
    text: str


def _encode(tokenizer: Any, text: Any, name: str, template: Any, wanted: int) -> tuple[list[int], int, _Chat | None]:
    """(ids, tokens of the prompt, the conversation if it is one); more than the first `wanted` of a long text."""
    if isinstance(text, (str, list)):
        text = {"text" if isinstance(text, str) else "messages": text}
    if not isinstance(text, dict):
        raise TypeError(f"{name} must be a string, a dict or messages, got a {type(text).__name__}, {text!r:.40}")
    if isinstance(text.get("text"), str):
        return (_tokenize_start(tokenizer, text["text"], wanted) if text["text"].strip() else []), 0, None
    try:
        if why := _why_no_text(text):
            raise ValueError(f"{why}. {A_TEXT}")
        return _encode_pair(tokenizer, text, template, wanted)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _why_no_text(text: Mapping[str, Any]) -> str | None:
    """Why this is no prompt with its completion and no conversation; None where it is."""
    keys = ("prompt", "completion") if text.get("messages") is None else ("messages",)
    if lack := _lack(text, keys):
        return f"it {lack}"
    if [type(text[key]) for key in keys] == [str, str]:
        return None
    for key in keys:
        if not isinstance(text[key], list) or not text[key]:
            return f"{key!r} must be a list of messages, got a {type(text[key]).__name__}, {text[key]!r:.40}"
    messages = [message for key in keys for message in text[key]]
    for place, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {place} must be a dict, got a {type(message).__name__}, {message!r:.40}"
        says = any(value is not None for key, value in message.items() if key != "role")  # a tool's call, say
        if lack := _lack(message, ("role",) if says else ("role", "content")):
            return f"message {place} {lack}"
    if keys == ("messages",) and messages[-1]["role"] != "assistant":
        return f"the last message is not the assistant's (got {messages[-1]['role']!r:.40})"
    return "nothing stands before the assistant's message" if len(messages) < 2 else None


def _lack(given: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Which of the keys it has not, or as None, which Arrow fills in where other rows have them."""
    missing = [repr(key) for key in keys if given.get(key) is None]
    has = sorted(key for key, value in given.items() if value is not None)
    return f"has no {' and no '.join(missing)}, only {has}" if missing else None


def _encode_pair(
    tokenizer: Any, text: dict[str, Any], template: Any, wanted: int
) -> tuple[list[int], int, _Chat | None]:
    from trl import is_conversational

    arguments = template_arguments(text, template)
    if "messages" in text:
        *before, last = text["messages"]
        text = {"prompt": before, "completion": [last]}
    pair = {"prompt": text["prompt"], "completion": text["completion"]}
    chat = None
    if is_conversational(pair):
        messages = join_turns(pair["prompt"], pair["completion"])
        prompt_text = _render(tokenizer, "prompt", pair["prompt"], arguments)
        whole_text = _render(tokenizer, "messages", messages, arguments)
        chat = _Chat(messages, arguments, whole_text)
    else:
        prompt_text, whole_text = pair["prompt"], pair["prompt"] + pair["completion"]
    ids = _tokenize_start(tokenizer, whole_text, wanted, chat is None)
    return ids, _shared_start(_tokenize_start(tokenizer, prompt_text, wanted, chat is None), ids), chat


def _shared_start(a: list[int], b: list[int]) -> int:
    """How many ids both begin with."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return [*same, False].index(False)


def _split_turns(tokenizer: Any, chat: _Chat, ids: list[int], name: str, wanted: int) -> list[tuple[int, int]]:
    """(start, stop) in `ids` of the assistant's turns that something stands before."""
    spans = []
    for place, message in enumerate(chat.messages):
        if message["role"] == "assistant" and place:
            before = _render(tokenizer, "prompt", chat.messages[:place], chat.arguments)
            until = _render(tokenizer, "messages", chat.messages[: place + 1], chat.arguments)
            if not chat.text.startswith(until):
                raise ValueError(
                    f"{name}: turns='all' cannot tell where the turn of message {place + 1} ends, since the chat "
                    "template writes it otherwise when it is the last one (without its reasoning, say): score the "
                    "last turns only, turns='last'"
                )
            spans.append(
                tuple(_shared_start(_tokenize_start(tokenizer, t, wanted, False), ids) for t in (before, until))
            )
    return spans
