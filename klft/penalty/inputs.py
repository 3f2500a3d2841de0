"""The tensors that a penalty measures: do they belong together, and where do the two models part for good."""

import logging
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klft.divergences import reverse_kl
from klft.penalty.token_kl import TokenKL
from klft.scores import TokenScores
from klft.sharding import on_rank

logger = logging.getLogger(__name__)

FAR = 0.1  # nats per token from which on it is looked whether logits belong to their tokens ...
LOOKED_AT = 256  # ... at so many positions


def check_measured(logits: Tensor, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> None:
    """Raise ValueError, naming the convention, unless logits are [B, T, V] and the others [B, T], each in its place."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"KLPenalty.measure: expected logits [B, T, V], got a {type(logits).__name__}: pass its .logits"
        )
    shape = input_ids.shape
    if input_ids.dim() != 2 or logits.shape[:-1] != shape or attention_mask.shape != shape or mask.shape != shape:
        raise ValueError(
            "KLPenalty.measure: expected logits [B, T, V] of whole sequences, prompt and completion, not shifted, and "
            f"input_ids, attention_mask and mask [B, T] (mask True on generated tokens); got logits "
            f"{list(logits.shape)}, input_ids {list(shape)}, attention_mask {list(attention_mask.shape)}, mask "
            f"{list(mask.shape)}"
        )
    if input_ids.numel() and int(input_ids.min()) < 0:
        raise ValueError(
            f"KLPenalty.measure: input_ids has {int(input_ids.min())}: pass the ids, not labels, and say in `mask` "
            "which tokens count"
        )
    hidden = input_ids[(mask != 0) & (attention_mask.to(mask.device) == 0)]
    if len(hidden) and bool((hidden != hidden[0]).any()):  # a mask may be wider than the text: padding never counts
        raise ValueError(
            f"KLPenalty.measure: mask counts {len(hidden)} token(s) that attention_mask hides, and they are no "
            "padding: give attention_mask (1 on the whole text) before mask (True on generated tokens)"
        )
    few = logits.detach()[:1, :4].float()
    if few.shape[-1] > 2 and few.numel() and bool((few >= 0).all() & ((few.sum(-1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            "KLPenalty.measure: the logits are probabilities (each row sums to 1): give what comes before softmax"
        )


def find_one_sided(logits: Float[Tensor, "N V"], ref_logits: Float[Tensor, "N V"]) -> tuple[int, ...]:
    """Ids that only one of the models suppresses."""
    return tuple(((logits == -torch.inf) != (ref_logits == -torch.inf)).any(0).nonzero().flatten().tolist())


def check_rewarded(scores: Any, kl: Any) -> None:
    """Raise TypeError, naming the order, unless `scores` is a tensor and `kl` a TokenKL."""
    for given, kind in ((scores, Tensor), (kl, TokenKL)):
        if not isinstance(given, kind):
            raise TypeError(
                "KLPenalty.rewards(scores, kl): scores must be a tensor [B], one number per completion, and kl what "
                f"measure(...) gave, got a {type(given).__name__} in the place of a {kind.__name__}"
            )
    wrong = (~scores.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"KLPenalty.rewards: {len(wrong)} score(s) are not finite, first in row {wrong[0]}")


def warn_if_shifted(
    logits: Float[Tensor, "B T V"], ref_logits: Float[Tensor, "B T V"], scores: TokenScores, mask: Bool[Tensor, "B T"]
) -> bool:
    """Warn, and return True, where the policy's logits look like the reference's one position before: the caller has
    shifted them. Looks where the models are far apart, and those that are, are as far apart at every other place.

    Both logits stand under the tokens they predict.
    """
    kl = scores.reverse_kl
    if kl is None or not FAR < float(kl.detach()[mask].mean()) < torch.inf:
        return False
    row, column = (mask & mask.roll(1, 1)).nonzero()[:LOOKED_AT].T
    row, column = row[column > 1], column[column > 1]
    policy = logits.detach()[row, column]
    here, before = (float(reverse_kl(policy, ref_logits[row, at].to(policy)).mean()) for at in (column, column - 1))
    shifted = before < here / 2
    if shifted:
        logger.warning(
            "KLPenalty.measure: the logits look as if they were shifted already: they are %.2g nats per token from "
            "the reference's at the same positions, and %.2g from those one position before. Give whole sequences, "
            "model(...).logits as it is and input_ids, attention_mask and mask of the same length: the shift is made "
            "in measure", here, before,
        )  # fmt: skip
    return shifted


def nonfinite_message(kl: TokenKL, places: list[list[int]], name: str) -> str:
    """What to say of `name` where it is not finite at `places`, each [sample, position]."""
    ids = "" if kl.token_ids is None else f" (token ids {[int(kl.token_ids[tuple(p)]) for p in places[:4]]})"
    if kl.one_sided_ids:
        some, count = list(kl.one_sided_ids[:8]), len(kl.one_sided_ids)
        ids += f"; ids that only one of the models suppresses: {some} ({count} in all)"
    for role, logp in (("policy", kl.scores.logp), ("reference", kl.scores.ref_logp)):
        if logp is not None and bool(logp.detach()[tuple(places[0])].isnan()):
            return (
                f"the {role}'s logits are NaN{on_rank()} at {len(places)} token(s), first at [sample, "
                f"position] {places[:4]}{ids}: look for NaN among its weights, or take "
                "another precision (bf16 or fp32)"
            )
    return (
        f"the {name} is not finite{on_rank()} at {len(places)} token(s), first at "
        f"[sample, position] {places[:4]}{ids}: one model gives no probability to what the other may say. "
        "Suppress the same tokens in both models, or give KLPenalty a `clip` in nats."
    )
