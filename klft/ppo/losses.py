"""PPO's arithmetic as pure functions: per token in, per token out. Reductions happen in the trainer, in one place.

Source: Schulman et al. 2017, arXiv 1707.06347; generalised advantage estimation: 1506.02438; dual clip: 1912.09729.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
    last_value: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T"]:
    """Generalised advantages over the tokens that count; 0 elsewhere.

    `values[:, t]` is the value of the state in which token t is chosen. `last_value` is that of the state after the
    last token: 0 where the completion ended, and by default everywhere. With lam = 1, advantages + values is the
    discounted reward-to-go.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0]) if rewards.shape[1] else rewards.sum(-1)
    following = running if last_value is None else last_value
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = delta + gamma * lam * running
        running = torch.where(mask[:, t], advantage, running)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages


def policy_losses(
    log_ratio: Float[Tensor, "*B"],
    advantages: Float[Tensor, "*B"],
    cliprange: float,
    dual_clip: float | None = None,
    cliprange_high: float | None = None,
) -> tuple[Float[Tensor, "*B"], Bool[Tensor, "*B"]]:
    """-min(ratio * A, clip(ratio) * A), and where the clip decided. `log_ratio` = log(new/old), with gradient.

    The ratio is clipped to 1 - cliprange ... 1 + cliprange_high (by default cliprange; above it: DAPO, 2503.14476).
    `dual_clip` = c > 1 bounds the loss by -c * A where A < 0, so that a token that became far likelier since it was
    sampled does not dominate the batch.
    """
    ratio = log_ratio.exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + (cliprange if cliprange_high is None else cliprange_high))
    losses = torch.maximum(free, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    return losses, clipped > free


def value_losses(
    values: Float[Tensor, "*B"],
    old_values: Float[Tensor, "*B"],
    returns: Float[Tensor, "*B"],
    cliprange_value: float,
) -> tuple[Float[Tensor, "*B"], Bool[Tensor, "*B"]]:
    """0.5 * max((v - R)^2, (clip(v, old +- range) - R)^2), and where the clipped one was the larger."""
    near = torch.maximum(torch.minimum(values, old_values + cliprange_value), old_values - cliprange_value)
    free, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(free, clipped), clipped > free
