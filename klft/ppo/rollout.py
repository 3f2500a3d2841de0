"""One rollout: prompts -> completions -> scores of every generated token, with masks that come from lengths alone."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from trl import apply_chat_template, is_conversational

from klft.fused import TokenScores, token_scores
from klft.heads import LMHead, base_of, hidden_states
from klft.masked import spread
from klft.ppo.value import OUTPUT_KEY, with_values
from klft.reference import causal_inputs, evaluating
from klft.sharding import VocabShard


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


@dataclass
class Rollout(Batch):
    """A batch with all that the PPO epochs read: [B, C] each, detached, 0 where the mask is False."""

    old_logp: Tensor
    ref_logp: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, as a checkpoint keeps them."""
        return {f.name: getattr(self, f.name).contiguous() for f in fields(self)}


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


def spoken(tokenizer: Any, prompts: list, batch: Batch) -> list:
    """The completions as reward functions see them: text, or one assistant message after a conversation."""
    kept = [row[real].tolist() for row, real in zip(batch.completion_ids, batch.mask, strict=True)]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return [
        [{"role": "assistant", "content": text}] if is_conversational({"prompt": prompt}) else text
        for prompt, text in zip(prompts, texts, strict=True)
    ]


class _Scored(LogitsProcessor):
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
    config: GenerationConfig,
    vocab_size: int,
) -> tuple[Batch, Tensor]:
    """(completions, terminated [B]), sampled from `model` (unwrapped). Its own generation_config is left as it was."""
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


@dataclass
class Scorer:
    """Both models' forwards over a batch, without logits: at one temperature and over the vocabulary they share.

    split: one of config.VOCABULARY_SPLITS.
    """

    reference: Any
    temperature: float
    vocab_size: int
    split: str = "none"

    def forward(self, model: nn.Module, unwrapped: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The training forward: (hidden [B, C, D], values [B, C], value after the last token [B])."""
        ids, attention = batch.inputs
        keep = batch.completion_ids.shape[1] + 1
        with with_values(unwrapped), hidden_states(model) as kept:
            output = model(**causal_inputs(unwrapped, ids, attention, keep))
        values = output[OUTPUT_KEY][:, -keep:]
        return kept.hidden[:, -keep:-1], values[:, :-1], values[:, -1]

    def head(self, model: nn.Module) -> LMHead:
        """The policy's head for this step. ValueError where it does not lie as `split` says."""
        by_rows = self.split == "dp" and isinstance(base_of(model).get_output_embeddings().weight, DTensor)
        head = LMHead.from_model(model, shard_rows=by_rows)
        tensor_parallel = head.shard is not None and not head.shard.own_tokens
        if (self.split == "tp") != tensor_parallel and self.split != "auto":
            has = "is" if tensor_parallel else "is not"
            raise ValueError(f"kl_shard_vocab={self.split}: the policy's head {has} tensor parallel; use auto")
        head = head.cut(self.vocab_size)
        if self.split == "dp" and head.shard is None:
            head = head.narrow(VocabShard.even(self.vocab_size, own_tokens=True))
        return head

    def inputs(self, model: nn.Module, hidden: Tensor, batch: Batch, reference: bool = True) -> dict[str, Any]:
        """The tokens that count, as arguments of token_scores and fused_token_loss."""
        mask = batch.mask
        found = {"hidden": hidden[mask], "head": self.head(model), "token_ids": batch.completion_ids[mask]}
        if reference:
            ids, attention = batch.inputs
            ref_hidden, ref_head = self.reference.hidden(ids, attention, batch.completion_ids.shape[1] + 1)
            found |= {"ref_hidden": ref_hidden[:, :-1][mask], "ref_head": ref_head.cut(self.vocab_size)}
        return found | {"temperature": self.temperature}

    def score(
        self, model: nn.Module, unwrapped: nn.Module, batch: Batch, size: int, top_k: int = 0
    ) -> tuple[TokenScores, Tensor, Tensor]:
        """(scores [B, C], 0 where the mask is False, values, last values), `size` rows at a time."""
        parts = []
        with evaluating(unwrapped):
            for start in range(0, len(batch.mask), size):
                micro = batch.rows(slice(start, start + size))
                hidden, values, last = self.forward(model, unwrapped, micro)
                scores = token_scores(**self.inputs(model, hidden, micro), top_k=top_k)
                parts.append((scores, values, last))
        found = {}
        for f in fields(TokenScores):
            flat = [getattr(part[0], f.name) for part in parts]
            if flat[0] is not None:
                found[f.name] = spread(torch.cat(flat), batch.mask)
        return TokenScores(**found), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
