"""Completions sampled from the distribution that is scored."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klft.models import evaluating
from klft.prompts import completion_mask

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass
class Batch:
    """Tokens of B completions. Prompts are left-padded, completions right-padded; masks are True on real tokens."""

    prompt_ids: Tensor  # [B, P]
    prompt_mask: Tensor  # [B, P]
    completion_ids: Tensor  # [B, C]
    mask: Tensor  # [B, C]: up to and including the first end-of-sequence token

    def rows(self, index: Any):
        """The same with some of the rows."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """(input_ids, attention_mask) [B, P + C]."""
        ids = torch.cat([self.prompt_ids, self.completion_ids], 1)
        return ids, torch.cat([self.prompt_mask, self.mask], 1).long()


class _Scored:
    """Samples from what is scored: only ids both models have. Stops at a NaN and says where."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        bad = (scores.isnan() | (scores == torch.inf)).any(-1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the policy's logits are not finite for sample {bad[0]}, position {input_ids.shape[1]} ({len(bad)} of "
                f"{len(scores)} samples). Try another precision (bf16 or fp32) or a lower learning rate."
            )
        scores[:, self.vocab_size :] = -torch.inf
        return scores


def generate(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    ends: list[int],
    pad_id: int,
    config: "GenerationConfig",
    vocab_size: int,
) -> tuple[Batch, Tensor]:
    """(completions, terminated [B]), sampled from `model` (unwrapped). Its own generation_config is left as it was."""
    from transformers import GenerationConfig, LogitsProcessorList

    own = model.generation_config
    # generate fills what `config` leaves open from the model's own defaults (a top_p, a repetition penalty ...), and
    # would then sample from another distribution than the one that is scored.
    model.generation_config = GenerationConfig()
    try:
        with evaluating(model):
            ids = model.generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask.long(),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Scored(vocab_size)]),
            )
    finally:
        model.generation_config = own
    completion_ids = ids[:, prompt_ids.shape[1] :]
    mask, terminated = completion_mask(completion_ids, ends)
    return Batch(prompt_ids, prompt_mask, completion_ids.masked_fill(~mask, pad_id), mask), terminated
