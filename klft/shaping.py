"""From one score per completion and one KL per token to one reward per token.

The order is fixed, and each step is one function: weigh the reward functions' scores -> normalise -> clip -> charge
for a missing end -> place on the last real token and subtract coef * KL per token (`shape_rewards`).
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klft.masked import Mask, Reduce, as_mask, no_reduce


def weigh_scores(scores: Float[Tensor, "B K"], weights: Float[Tensor, "K"]) -> Float[Tensor, "B"]:
    """Weighted sum over K reward functions. NaN = "does not apply here" and is left out; a row of NaN scores 0."""
    return (weights * torch.where(scores.isnan(), 0.0, scores)).sum(-1)


def finish_scores(
    scores: Float[Tensor, "B"],
    terminated: Bool[Tensor, "B"],
    *,
    clip: float | None = None,
    missing_eos_penalty: float | None = None,
) -> Float[Tensor, "B"]:
    """Clip to [-clip, clip], then subtract the penalty where a completion was cut off before it ended."""
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    if missing_eos_penalty is not None:
        scores = scores - missing_eos_penalty * (~terminated).to(scores.dtype)
    return scores


def shape_rewards(
    scores: Float[Tensor, "..."], kl: Float[Tensor, "B T"], mask: Mask, *, coef: float
) -> Float[Tensor, "B T"]:
    """-coef * kl on every token that counts, plus the score on the last of them; 0 elsewhere. Detached.

    With `kl` = k1, gamma = lam = 1, the policy gradient of these rewards is that of E[score] - coef * KL(policy||ref)
    over whole sequences. The sum of a row is score - coef * sum(kl). A row without a token stays 0. Scores [B, 1], as a
    reward model's logits are, count as [B]. Raises ValueError for shapes that do not belong together.
    """
    if scores.dim() == 2 and scores.shape[1] == 1:
        scores = scores.squeeze(1)
    if mask.dim() != 2 or kl.shape != mask.shape or scores.shape != mask.shape[:1]:
        raise ValueError(
            f"shape_rewards: expected one score per row [B], kl and mask [B, T]; got scores {list(scores.shape)}, "
            f"kl {list(kl.shape)}, mask {list(mask.shape)}"
        )
    mask = as_mask(mask)
    rewards = torch.where(mask, -coef * kl.detach(), 0.0)
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, position, -1).amax(-1, keepdim=True) if mask.shape[1] else mask.long()
    return rewards + torch.where(mask & (position == last), scores.detach().to(rewards.dtype).unsqueeze(-1), 0.0)


class RunningMoments:
    """Mean and standard deviation of every score seen so far, over all processes; to put scores on one scale."""

    def __init__(self):
        self.count, self.mean, self.sum_squares = 0, 0.0, 0.0

    def learn(self, scores: Float[Tensor, "B"], reduce: Reduce = no_reduce) -> None:
        """Take `scores` of all processes in. Chan's update: exact however the batches are cut."""
        scores = scores.double()
        count, total = reduce(torch.stack([torch.ones_like(scores).sum(), scores.sum()])).tolist()
        if not count:
            return
        mean = total / count
        squares = float(reduce((scores - mean).square().sum()))
        delta, merged = mean - self.mean, self.count + count
        self.sum_squares += squares + delta**2 * self.count * count / merged
        self.mean += delta * count / merged
        self.count = int(merged)

    def normalise(self, scores: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """(scores - mean) / std of what was learnt; only shifted while all scores so far were equal."""
        std = math.sqrt(self.sum_squares / self.count) if self.count else 0.0
        return (scores - self.mean) / (std or 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "sum_squares": self.sum_squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.sum_squares = state["count"], state["mean"], state["sum_squares"]
