"""Texts scored by two models: log-probabilities, entropies and both exact KLs of every token, without logits.

    for batch in score_texts(model, reference, tokenizer, texts, batch_size=8, max_length=512):
        log.add(batch.scores, batch.token_ids, batch.mask, is_prompt=batch.is_prompt, sample_ids=batch.sample_ids)

What the command line, recipes/measure_kl.py and TokenKLCallback have in common. Deliberately absent: files and models'
names (klft.diagnostics.loading), statistics, and text that the models write themselves.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from klft.fused import token_scores
from klft.heads import LMHead
from klft.masked import spread
from klft.models import (
    VocabularyCut,
    causal_inputs,
    check_positions,
    check_vocabularies,
    evaluating,
    hidden_states,
    require_causal_lm,
)
from klft.prompts import Encoded, encode_texts
from klft.references import AdapterReference, FrozenReference, as_reference
from klft.scores import TokenScores, score_logits

logger = logging.getLogger(__name__)

LOGITS_ROWS = 256  # tokens whose logits are in fp32 at a time, where a head can only be scored from logits


class ScoredTexts(NamedTuple):
    """A batch of B texts, padded on the right to T tokens."""

    scores: TokenScores  # [B, T] each, top lists [B, T, k]: under each token what was predicted there; 0 off the mask
    token_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]: True where a token was predicted, which the first one of a text is not
    is_prompt: Tensor  # [B, T]
    sample_ids: Tensor  # [B]: number of the text among those given


def score_texts(
    model: nn.Module,
    reference: Any,
    tokenizer: Any,
    texts: "Sequence[Any] | Encoded",
    *,
    batch_size: int,
    max_length: int,
    temperature: float = 1.0,
    top_k: int = 5,
) -> Iterator[ScoredTexts]:
    """Score each token of the texts under the policy `model` and a reference: everything in TokenScores, in nats.

    Both models run in eval mode without gradients and get their modes back; the logits never exist whole. Under tensor
    parallelism or FSDP2 all processes score the same texts together.

    Args:
        reference: a FrozenReference, an AdapterReference, a second causal LM (it is frozen), or None where the policy
            has an adapter: then the policy with its adapter off.
        texts: what `encode_texts` takes, token ids too; or what it gives, which is then scored as it is.

    Raises ValueError for vocabularies that cannot be compared, texts longer than a model has positions, and where no
    text has a token to score; TypeError for what is no causal language model. All of that before the first batch.
    """
    if batch_size < 1 or top_k < 0:
        raise ValueError(f"batch_size must be at least 1 and top_k at least 0, got {batch_size} and {top_k}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    require_causal_lm(model, "model")
    reference = as_reference(reference, model)
    check_vocabularies(model, reference.model, tokenizer)
    found = texts if isinstance(texts, Encoded) else encode_texts(tokenizer, texts, max_length=max_length)
    check_positions(max(map(len, found.ids), default=0), model, reference.model)
    return _batches(_Scorer(model, reference, temperature, top_k), found, batch_size)


# --- texts -> ids ----------------------------------------------------------------------------------------------------


# --- ids -> scores ---------------------------------------------------------------------------------------------------


def _batches(scorer: "_Scorer", texts: Encoded, batch_size: int) -> Iterator[ScoredTexts]:
    for start in range(0, len(texts.ids), batch_size):
        part = slice(start, start + batch_size)
        rows, prompts, numbers = texts.ids[part], texts.prompt_lengths[part], texts.sample_ids[part]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        place = torch.arange(width)
        real = place < torch.tensor([len(row) for row in rows])[:, None]
        counts = real & (place > 0)
        values = {name: spread(value.cpu(), counts) for name, value in scorer(ids, real, counts).items()}
        is_prompt = real & (place < torch.tensor(prompts)[:, None])
        yield ScoredTexts(TokenScores(**values), ids, counts, is_prompt, torch.tensor(numbers))


class _Scorer:
    """Both models over one batch: TokenScores' names -> [N] or [N, k], for the tokens that count."""

    def __init__(self, model: nn.Module, reference: FrozenReference | AdapterReference, temperature: float, top_k: int):
        self.model, self.reference, self.temperature, self.top_k = model, reference, temperature, top_k
        self.from_logits, self.told, self.cut = False, False, VocabularyCut()

    def __call__(self, ids: Tensor, real: Tensor, counts: Tensor) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        ids, real, counts = ids.to(device), real.long().to(device), counts.to(device)
        inputs = causal_inputs(self.model, ids, real, ids.shape[1])
        predicts, tokens = counts.roll(-1, 1), ids[counts]  # a token's prediction lies one position before it
        if not self.from_logits:
            try:
                with evaluating(self.model), hidden_states(self.model) as kept:
                    self.model(**inputs)
                    head = LMHead.from_model(self.model)
                ref_hidden, ref_head = self.reference.hidden(ids, real, ids.shape[1])
            except TypeError as error:
                logger.info("scoring from logits: %s", error)
                self.from_logits = True
            else:
                ref_hidden = ref_hidden[predicts.to(ref_hidden.device)].to(device)
                return self._from_heads(kept.hidden[predicts], head, tokens, ref_hidden, ref_head)
        with evaluating(self.model):
            logits = self.model(**inputs).logits[predicts]
            ref_logits = self.reference(ids, real, ids.shape[1])[predicts]
            return self._from_logits(logits, tokens, ref_logits)

    @torch.no_grad()
    def _from_heads(
        self, hidden: Tensor, head: LMHead, tokens: Tensor, ref_hidden: Tensor, ref_head: LMHead
    ) -> dict[str, Tensor]:
        bias = None if ref_head.bias is None else ref_head.bias.to(hidden.device)
        ref_head = replace(ref_head, weight=ref_head.weight.to(hidden.device), bias=bias)
        common = min(head.rows, ref_head.rows)
        if not self.told and head.rows != ref_head.rows:
            self.told = True
            wide, side = (head, hidden) if head.rows > common else (ref_head, ref_hidden)
            # Cutting divides every other probability by what the cut ids leave over.
            of_all, of_common = (token_scores(side, each, tokens).logp for each in (wide, wide.cut(common)))
            held = -torch.expm1(of_all - of_common).min().item()
            logger.warning(
                "the models have %d and %d vocabulary rows: ids from %d on are padding and left out (at most %.1e of "
                "the probability in the first batch)", head.rows, ref_head.rows, common, held,
            )  # fmt: skip
        found = token_scores(
            hidden, head.cut(common), tokens, ref_hidden, ref_head.cut(common), temperature=self.temperature,
            top_k=min(self.top_k, common),
        )  # fmt: skip
        return _named(found)

    def _from_logits(self, logits: Tensor, tokens: Tensor, ref_logits: Tensor) -> dict[str, Tensor]:
        common = min(logits.shape[-1], ref_logits.shape[-1])
        logits, ref_logits = self.cut(logits, common), self.cut(ref_logits, common)
        parts = []
        for a, b, ids in zip(*(t.split(LOGITS_ROWS) for t in (logits, ref_logits, tokens)), strict=True):
            a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) / self.temperature for t in (a, b))
            found = _named(score_logits(a, b, ids))
            for side, z in (("", a), ("ref_", b)) if self.top_k else ():
                found[f"{side}top_p"], found[f"{side}top_ids"] = z.softmax(-1).topk(min(self.top_k, common))
            parts.append(found)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _named(scores: TokenScores) -> dict[str, Tensor]:
    found = {f.name: getattr(scores, f.name) for f in fields(scores)}
    return {name: value for name, value in found.items() if value is not None}
