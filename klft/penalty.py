"""KLPenalty: a reference, a measure of the KL, a coefficient and the place where the penalty goes, as one object.

For a training loop of your own:

    penalty = KLPenalty(FrozenReference(ref_model), controller=AdaptiveKL(0.05, target=6.0, horizon=10_000))
    kl = penalty.measure(model(**batch).logits, batch["input_ids"], batch["attention_mask"], completion_mask)
    rewards = penalty.rewards(scores, kl)                    # [B, T], detached: score - coef * KL
    loss = policy_loss + masked_mean(penalty.losses(kl), kl.mask)   # 0 where nothing belongs in the loss
    penalty.update(kl)                                       # the controller sees nats per sequence
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klft.controllers import Controller, FixedKL
from klft.estimators import DIRECTIONS, ESTIMATORS, estimate_kl, k3
from klft.models import VocabularyCut
from klft.references import AdapterReference, FrozenReference
from klft.scores import TokenScores, score_logits
from klft.shaping import shape_rewards

PLACEMENTS = ("reward", "loss", "both")
ESTIMATES = ("k1", "k2", "k3", "exact")


@dataclass
class TokenKL:
    """Scores [B, T] with the mask of the tokens that count, and who sampled them if that was not the policy scored."""

    scores: TokenScores
    mask: Tensor
    behaviour_logp: Tensor | None = None
    token_ids: Tensor | None = None
    culprits: str = ""  # what made a KL infinite, for the message
    clipped: int = 0


def check_combination(direction: str, estimator: str, placement: str) -> None:
    """Raise ValueError for what carries no gradient, or twice the wrong one."""
    if estimator != "exact" and (direction, estimator) not in ESTIMATORS:
        raise ValueError(f"there is no {estimator} of the {direction} KL; use k1, k3 or exact")
    if estimator == "k1" and placement != "reward":
        raise ValueError(
            "k1 as a loss has a gradient of zero in expectation: it would do nothing but add noise. "
            "Use placement='reward' with k1, or estimator='k2', 'k3' or 'exact' in the loss."
        )
    if placement == "both" and estimator != "exact" and (direction, estimator) != ("reverse", "k3"):
        raise ValueError(
            f"{direction} {estimator} in the reward and in the loss counts the KL twice, with a gradient of neither. "
            "placement='both' goes with estimator='exact', or with 'k3' of the reverse KL."
        )


def _warn_of(direction: str, estimator: str, placement: str) -> None:
    """Say by name which wrong gradient a legal combination has."""
    wrong = {
        ("reverse", "k2"): "its expected gradient is not that of a KL",
        ("reverse", "k3"): "its expected gradient is about zero near the reference",
        ("reverse", "exact"): "alone it has the wrong gradient, since a token's own exact KL does not depend on it",
        ("forward", "exact"): "alone it has the wrong gradient, since a token's own exact KL does not depend on it",
        ("forward", "k1"): "its expected gradient is not that of the forward KL",
        ("forward", "k3"): "its expected gradient is not that of the forward KL",
    }.get((direction, estimator))
    if placement != "reward" or wrong is None:
        return
    way_out = "Use estimator='k1' (reverse) in the reward, or estimator='exact' with placement='both'"
    if estimator == "exact":
        way_out = "klft adds the differentiable loss that belongs to it; say placement='both' to mean that"
    warnings.warn(f"{direction} {estimator} in the reward: {wrong}. {way_out}.", stacklevel=3)


class KLPenalty:
    """A KL penalty against a frozen reference, for the reward, the loss, or both.

    Args:
        estimator: "k1", "k2", "k3" (sampled) or "exact" (over the whole vocabulary). "exact" is a differentiable loss
            on each token's own KL plus the detached KL of the *later* tokens in the reward: together the gradient of
            the sequence KL, with far less variance than k1. With placement="loss" only the first part is used.
        placement: "reward", "loss", or "both" (for exact and k3, whose two halves make up one right gradient). k1 as a
            loss is refused; combinations with a wrong gradient warn by name.
        clip: the largest log-ratio, either sign (sampled), or KL (exact) of one token, in nats; what lies beyond
            counts as that much, without a gradient, and is counted. Without it an infinite KL is an error.

    Raises ValueError for unknown names and for k1 in the loss.
    """

    def __init__(
        self,
        reference: FrozenReference | AdapterReference,
        *,
        direction: str = "reverse",
        estimator: str = "k1",
        placement: str = "reward",
        controller: Controller = FixedKL(0.05),  # noqa: B008 - a FixedKL never changes
        clip: float | None = None,
    ):
        for name, value, known in (
            ("direction", direction, DIRECTIONS),
            ("estimator", estimator, ESTIMATES),
            ("placement", placement, PLACEMENTS),
        ):
            if value not in known:
                raise ValueError(f"KLPenalty: unknown {name} {value!r}: choose one of {', '.join(known)}")
        check_combination(direction, estimator, placement)
        if clip is not None and not 0 < clip < float("inf"):
            raise ValueError(f"KLPenalty: clip must be a finite number of nats above 0, got {clip!r}")
        _warn_of(direction, estimator, placement)
        self.reference = reference
        self.direction, self.estimator, self.controller, self.clip = direction, estimator, controller, clip
        # Exact KL in the reward alone is never what was meant: its loss part goes with it.
        self.placement = "both" if (estimator, placement) == ("exact", "reward") else placement
        self._cut = VocabularyCut()

    @property
    def coef(self) -> float:
        """The coefficient now."""
        return self.controller.coef

    def measure(
        self,
        logits: Float[Tensor, "B T V"],
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        *,
        behaviour_logp: Float[Tensor, "B T"] | None = None,
        temperature: float = 1.0,
    ) -> TokenKL:
        """Run the reference and compare. Everything in the result is [B, T], aligned with `input_ids`.

        `logits` are the policy's, untouched: position t predicts token t + 1; the shift is made here, and the first
        token, which nothing predicts, never counts. `mask` is True on the tokens that were generated. Pass the
        `temperature` they were sampled with: both models are scored at it.
        """
        if not 0 < temperature < float("inf"):
            raise ValueError(f"KLPenalty.measure: temperature must be a finite number above 0, got {temperature}")
        keep = input_ids.shape[1]
        ref_logits = self.reference(input_ids, attention_mask, keep)
        common = min(logits.shape[-1], ref_logits.shape[-1])
        logits, ref_logits = self._cut(logits, common), self._cut(ref_logits, common)
        # Rolling by one puts each prediction under its token. The wrapped-around column is masked out.
        scores = score_logits(logits.roll(1, 1) / temperature, ref_logits.roll(1, 1) / temperature, input_ids)
        mask = mask & (torch.arange(keep, device=mask.device) > 0)
        kl = TokenKL(scores, mask, behaviour_logp, input_ids)
        if bool((mask & ~self._exact_kl(kl).detach().isfinite()).any()):
            one_sided = (logits == -torch.inf) != (ref_logits == -torch.inf)
            ids = one_sided.flatten(0, -2).any(0).nonzero().flatten().tolist()
            kl.culprits = f"; ids that only one of the models suppresses: {ids[:8]} ({len(ids)} in all)" if ids else ""
        return kl

    def token_kl(self, kl: TokenKL, gradient: str = "none") -> Float[Tensor, "B T"]:
        """The chosen estimate per token; `gradient="unbiased"` makes it differentiable. 0 under the mask.

        Raises ValueError, naming the place, where it is not finite (with `clip`: where it is NaN).
        """
        value = self._exact(kl) if self.estimator == "exact" else self._sampled(kl, gradient)
        value = torch.where(kl.mask, value.detach() if gradient == "none" else value, 0.0)
        bad = (~value.detach().isfinite()).nonzero().tolist()
        if bad:
            ids = "" if kl.token_ids is None else f" (token ids {[int(kl.token_ids[i, t]) for i, t in bad[:4]]})"
            raise ValueError(
                f"the {self.direction} KL ({self.estimator}) is not finite at {len(bad)} token(s), first at [sample, "
                f"position] {bad[:4]}{ids}{kl.culprits}: one model gives no probability to what the other may say, or "
                "its logits are NaN. Suppress the same tokens in both models, or give KLPenalty a `clip` in nats."
            )
        return value

    def _exact_kl(self, kl: TokenKL) -> Tensor:
        value = kl.scores.reverse_kl if self.direction == "reverse" else kl.scores.forward_kl
        assert value is not None
        return value

    def _exact(self, kl: TokenKL) -> Tensor:
        value = self._exact_kl(kl)
        if self.clip is not None:
            kl.clipped = int((kl.mask & (value.detach() > self.clip)).sum())
            value = value.clamp(max=self.clip)
        return value

    def _sampled(self, kl: TokenKL, gradient: str) -> Tensor:
        s, mask = kl.scores, kl.mask
        assert s.ref_logp is not None
        # Masked tokens are replaced before anything is exponentiated: 0 * inf under the mask would be NaN.
        logp, ref_logp = torch.where(mask, s.logp, 0.0), torch.where(mask, s.ref_logp, 0.0)
        behaviour = None if kl.behaviour_logp is None else torch.where(mask, kl.behaviour_logp, 0.0)
        if self.clip is not None:
            log_ratio = (logp - ref_logp).detach()
            beyond = log_ratio.abs() > self.clip
            kl.clipped = int(beyond.sum())
            # Clipped before the estimator, as constants: no gradient, and nothing infinite left to multiply by 0.
            clipped = log_ratio.clamp(-self.clip, self.clip)
            logp, ref_logp = torch.where(beyond, clipped, logp), torch.where(beyond, 0.0, ref_logp)
            behaviour = None if behaviour is None else torch.where(beyond, clipped, behaviour)
        if gradient == "unbiased" and self.placement == "both":
            # k3's other half sits in the reward. Here belongs the plain derivative of k3, weighted, not rho's.
            rho = 1.0 if behaviour is None else (logp - behaviour).detach().exp()
            return rho * k3(logp, ref_logp)
        return estimate_kl(
            logp, ref_logp, direction=self.direction, value=self.estimator, gradient=gradient, behaviour_logp=behaviour
        )

    def reward_kl(self, kl: TokenKL) -> Float[Tensor, "B T"]:
        """The detached KL that belongs in each token's reward; zeros if nothing does.

        For "exact" a token is charged with the *next* token's KL: what it led to. Its own is the loss's business.
        """
        if self.placement == "loss":
            return torch.zeros_like(kl.scores.logp)
        value = self.token_kl(kl)
        if self.estimator != "exact" or value.shape[1] == 0:
            return value
        following = value.roll(-1, 1)
        following[:, -1] = 0.0
        return torch.where(kl.mask, following, 0.0)

    def rewards(self, scores: Float[Tensor, "B"], kl: TokenKL) -> Float[Tensor, "B T"]:
        """One score per completion and the KL, as one detached reward per token. See shape_rewards."""
        return shape_rewards(scores, self.reward_kl(kl), kl.mask, coef=self.coef)

    def losses(self, kl: TokenKL) -> Float[Tensor, "B T"]:
        """coef * KL per token with that direction's true gradient; zeros if nothing belongs in the loss."""
        if self.placement == "reward":
            return torch.zeros_like(kl.scores.logp)
        return self.coef * self.token_kl(kl, gradient="unbiased")

    def update(self, kl: TokenKL) -> float:
        """Show the controller this batch: the exact KL summed over each sequence, mean over sequences with a token."""
        exact = self._exact_kl(kl) if self.clip is None else self._exact_kl(kl).clamp(max=self.clip)
        sequences = kl.mask.any(-1)
        episodes = int(sequences.sum())
        total = float(torch.where(kl.mask, exact.detach(), 0.0).sum())
        return self.controller.update(total / max(episodes, 1), episodes)

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.controller.load_state_dict(state)
