"""Completions sampled from the distribution that is scored."""

import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klft.models import base_of, evaluating
from klft.prompts import completion_mask
from klft.sharding import on_rank

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


C = TypeVar("C", bound="Completions")


@dataclass
class Completions:
    """Prompts, left-padded, and what follows them, right-padded; masks are True on real tokens."""

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    completion_ids: Int[Tensor, "B C"]
    mask: Bool[Tensor, "B C"]  # up to and including the first end of sequence

    def rows(self: C, index: slice | Tensor) -> C:
        """Some of the sequences."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def trimmed(self: C) -> C:
        """Without the columns that are padding in every row."""
        prompt, completion = (max(1, int(m.sum(-1).max())) for m in (self.prompt_mask, self.mask))
        names = [f.name for f in fields(self)]
        kept = {name: slice(-prompt, None) if name.startswith("prompt_") else slice(completion) for name in names}
        return type(self)(**{name: getattr(self, name)[:, columns] for name, columns in kept.items()})

    @property
    def inputs(self) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """(input_ids, attention_mask), T = P + C."""
        ids = torch.cat([self.prompt_ids, self.completion_ids], 1)
        return ids, torch.cat([self.prompt_mask, self.mask], 1).long()


class _SharedVocabulary:
    """A logits processor: samples from what is scored, the ids both models have. Stops at a NaN and says where."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        nonfinite = (scores.isnan() | (scores == torch.inf)).any(-1).nonzero().flatten().tolist()
        if nonfinite:
            raise ValueError(
                f"the policy's logits are not finite{on_rank()} for sample {nonfinite[0]}, position "
                f"{input_ids.shape[1]} ({len(nonfinite)} of {len(scores)} samples). Try another precision (bf16 or "
                "fp32) or a lower learning rate."
            )
        scores[:, self.vocab_size :] = -torch.inf
        return scores


class _Stops:
    """A stopping criterion: some string is in the completion's text. Remembers how long each was when it first held.

    Read off the decoded end of the completion, since tokenizers differ in how they cut a string.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", strings: str | list[str], prompt_ids: Tensor):
        self.tokenizer, self.prompt_length = tokenizer, prompt_ids.shape[1]
        self.strings = [strings] if isinstance(strings, str) else strings
        self.window = 2 * max(len(string.encode()) for string in self.strings) + 8  # tokens; each is a byte at least
        self.lengths = torch.full_like(prompt_ids[:, 0], torch.iinfo(prompt_ids.dtype).max)

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        completion = input_ids[:, self.prompt_length :]
        texts = self.tokenizer.batch_decode(completion[:, -self.window :], skip_special_tokens=True)
        done = torch.tensor([any(s in text for s in self.strings) for text in texts], device=input_ids.device)
        here = torch.full_like(self.lengths, completion.shape[1])
        self.lengths = torch.where(done, torch.minimum(self.lengths, here), self.lengths)
        return done


def sample_completions(
    model: "PreTrainedModel",
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    config: "GenerationConfig",
    vocab_size: int,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> tuple[Completions, Bool[Tensor, "B"]]:
    """(completions, terminated) of `model` (unwrapped), sampled as `config` says and no otherwise.

    The model's own generation_config has no say and is left as it was; `config` names the end and pad ids. Only ids
    below `vocab_size` are sampled. A completion that runs into one of the config's stop_strings, for which `tokenizer`
    is needed, has ended there. Raises ValueError, naming sample and position, for logits that are not finite.
    """
    stops = None
    if config.stop_strings and tokenizer is not None:
        stops = _Stops(tokenizer, config.stop_strings, prompt_ids)
        config = copy.deepcopy(config)
        config.stop_strings = None
    ids = _generate(model, prompt_ids, prompt_mask, config, vocab_size, stops)
    completion_ids = ids[:, prompt_ids.shape[1] :]
    eos: Any = config.eos_token_id
    mask, terminated = completion_mask(completion_ids, eos if isinstance(eos, list) else [eos] * (eos is not None))
    if stops:  # generate pads what follows: an end that is no token of its own is known by its place alone
        mask &= torch.arange(mask.shape[1], device=mask.device) < stops.lengths[:, None]
        terminated |= stops.lengths <= mask.shape[1]
    return Completions(
        prompt_ids, prompt_mask, completion_ids.masked_fill(~mask, config.pad_token_id), mask
    ), terminated


def sampled_logps(
    model: "PreTrainedModel",
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    config: "GenerationConfig",
    vocab_size: int,
) -> tuple[Int[Tensor, "B C"], Float[Tensor, "B C"]]:
    """(completion ids, the log-probabilities with which they were drawn), sampled as sample_completions samples."""
    config = copy.deepcopy(config)
    config.return_dict_in_generate = config.output_scores = True
    config.stop_strings = None
    output = _generate(model, prompt_ids, prompt_mask, config, vocab_size)
    ids = output.sequences[:, prompt_ids.shape[1] :]
    logps = torch.stack(output.scores, 1).float().log_softmax(-1)
    return ids, logps.gather(-1, ids[..., None]).squeeze(-1)


def _generate(
    model: "PreTrainedModel",
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: "GenerationConfig",
    vocab_size: int,
    stops: _Stops | None = None,
) -> Any:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    base, generate = base_of(model), cast(Any, model).generate
    own, own_of_base = model.generation_config, base.generation_config
    # generate fills what `config` leaves open from the model's own defaults (a top_p, a repetition penalty ...), and
    # would then sample from another distribution than the one that is scored.
    model.generation_config = GenerationConfig()
    try:
        with evaluating(model):
            return generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask.long(),
                generation_config=config,
                logits_processor=LogitsProcessorList([_SharedVocabulary(vocab_size)]),
                stopping_criteria=StoppingCriteriaList([stops] if stops else []),
            )
    finally:
        model.generation_config, base.generation_config = own, own_of_base  # PEFT hands its own on to the base
