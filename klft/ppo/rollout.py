"""One rollout: completions, scores of both models, values, and the numbers that its epochs need."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from klft.generation import Completions
from klft.masked import scatter_masked
from klft.models import causal_inputs, evaluating, hidden_states
from klft.ppo.micro_batches import split_by_length
from klft.ppo.value import OUTPUT_KEY, with_values
from klft.scores import TokenScores
from klft.scoring import Predictions, Scorer


@dataclass
class Rollout(Completions):
    """Completions with all that the PPO epochs read: detached, 0 where the mask is False. The trainer fills them."""

    old_logp: Float[Tensor, "B C"]  # of the policy when the epochs begin: what the PPO ratio is relative to
    behaviour_logp: Float[Tensor, "B C"]  # of the distribution that was sampled: what KL estimates are weighted by
    ref_logp: Float[Tensor, "B C"]
    kl_weight: Float[Tensor, "B C"]  # how much each token's KL counts
    values: Float[Tensor, "B C"]  # before the token
    advantages: Float[Tensor, "B C"]
    returns: Float[Tensor, "B C"]

    def tensors(self) -> dict[str, Tensor]:
        """By name, as a checkpoint keeps them."""
        return {f.name: getattr(self, f.name).contiguous() for f in fields(self)}


@dataclass
class RolloutStats:
    """Numbers of one rollout, the same on all processes: what its epochs, the controller and a checkpoint need."""

    coef: float  # of the KL when the rewards were made
    sequence_kl: float  # nats per sequence, over `episodes` completions: what the controller will be shown
    episodes: int
    advantage_scale: float = 1.0  # 1 / standard deviation of the advantages, by which whitening multiplied them
    minibatch_tokens: tuple[float, ...] = ()  # of each minibatch of the epochs, over all processes
    minibatch_passes: tuple[int, ...] = ()  # forward-backward passes of each, with tokens_per_micro_batch
    stopped: bool = False  # target_kl was passed: the rest of the epochs is skipped

    def state_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> "RolloutStats":
        """From `state_dict()`."""
        # JSON has lists.
        restored: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in state.items()}
        return RolloutStats(**restored)


def forward_with_values(
    model: nn.Module, unwrapped: nn.Module, completions: Completions
) -> tuple[Float[Tensor, "B C D"], Float[Tensor, "B C"], Float[Tensor, "B"]]:
    """The training forward: (hidden states that predict each completion token, values before it, value after the last).

    `model` as the trainer wraps it, `unwrapped` the same without its wrappers.
    """
    ids, attention = completions.inputs
    keep = completions.completion_ids.shape[1] + 1
    with with_values(unwrapped), hidden_states(model) as kept:
        output = model(**causal_inputs(unwrapped, ids, attention, keep))
    values = output[OUTPUT_KEY][:, -keep:]
    after_last = values.gather(1, completions.mask.sum(-1, keepdim=True))[:, 0]
    return kept.hidden[:, -keep:-1], values[:, :-1], after_last


def reference_side(scorer: Scorer, completions: Completions) -> Predictions:
    """The reference's predictions for the tokens of the completions."""
    after_last = torch.zeros_like(completions.mask[:, :1])
    return scorer.reference_side(*completions.inputs, torch.cat([completions.mask, after_last], 1))


def score_completions(
    scorer: Scorer, model: nn.Module, unwrapped: nn.Module, completions: Completions, passes: int
) -> tuple[TokenScores, Float[Tensor, "B C"], Float[Tensor, "B"]]:
    """(scores [B, C] and values [B, C], 0 where the mask is False; value after the last token), in so many forwards.

    In eval mode and without gradient, through the same forward as the loss. Rows of like length are scored together.
    """
    mask, flat, last_values = completions.mask, [], []
    groups = [torch.tensor(group, device=mask.device) for group in split_by_length(completions, passes)]
    with evaluating(unwrapped):
        for group in groups:
            micro = completions.rows(group).trimmed()
            hidden, before, after = forward_with_values(model, unwrapped, micro)
            policy = Predictions(hidden[micro.mask], scorer.policy_head(model))
            scores = scorer.score(policy, reference_side(scorer, micro), micro.completion_ids[micro.mask])
            flat.append(dict(scores.items()) | {"values": before[micro.mask]})
            last_values.append(after)
    places = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    back = torch.cat([places[group][mask[group]] for group in groups]).argsort()
    found = {name: scatter_masked(torch.cat([f[name] for f in flat])[back], mask) for name in flat[0]}
    values = found.pop("values")
    return TokenScores(**found), values, torch.cat(last_values)[torch.cat(groups).argsort()]
