"""One rollout: completions, scores of both models, values, and the numbers that its epochs need."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from klft.generation import Completions
from klft.masked import scatter_masked
from klft.models import causal_inputs, evaluating, hidden_states
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
    stopped: bool = False  # target_kl was passed: the rest of the epochs is skipped

    def state_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> "RolloutStats":
        """From `state_dict()`."""
        restored: dict[str, Any] = state | {"minibatch_tokens": tuple(state["minibatch_tokens"])}  # JSON has lists
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
    return kept.hidden[:, -keep:-1], values[:, :-1], values[:, -1]


def reference_side(scorer: Scorer, completions: Completions) -> Predictions:
    """The reference's predictions for the tokens of the completions."""
    after_last = torch.zeros_like(completions.mask[:, :1])
    return scorer.reference_side(*completions.inputs, torch.cat([completions.mask, after_last], 1))


def score_completions(
    scorer: Scorer, model: nn.Module, unwrapped: nn.Module, completions: Completions, batch_size: int
) -> tuple[TokenScores, Float[Tensor, "B C"], Float[Tensor, "B"]]:
    """(scores [B, C], 0 where the mask is False; values; value after the last token), `batch_size` sequences at a time.

    In eval mode and without gradient, through the same forward as the loss.
    """
    scores, values, last_values = [], [], []
    with evaluating(unwrapped):
        for start in range(0, len(completions.mask), batch_size):
            micro = completions.rows(slice(start, start + batch_size))
            hidden, before, after = forward_with_values(model, unwrapped, micro)
            policy = Predictions(hidden[micro.mask], scorer.policy_head(model))
            scores.append(scorer.score(policy, reference_side(scorer, micro), micro.completion_ids[micro.mask]))
            values.append(before)
            last_values.append(after)
    named = {name: torch.cat([getattr(s, name) for s in scores]) for name, _ in scores[0].items()}
    scattered = {name: scatter_masked(flat, completions.mask) for name, flat in named.items()}
    return TokenScores(**scattered), torch.cat(values), torch.cat(last_values)
