"""KLPenalty: a reference, an estimator of the KL, a coefficient and a placement, as one object."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from klft.controllers import Controller, FixedKL, check_controller
from klft.divergences import OtherDivergence, reverse_kl
from klft.divergences import divergence as dense_divergence
from klft.estimators import Direction, Gradient, estimate_kl, k3
from klft.fused import as_head, linear_divergence, token_scores
from klft.heads import LMHead
from klft.masked import Mask, Reduce, as_mask, no_reduce, scatter_masked
from klft.models import VocabularyCut
from klft.penalty.combinations import (
    Estimate,
    Placement,
    check_combination,
    check_divergence,
    effective_placement,
    warn_of,
)
from klft.penalty.inputs import (
    check_measured,
    check_rewarded,
    find_one_sided,
    nonfinite_message,
    warn_if_shifted,
)
from klft.penalty.token_kl import TokenKL, TokenRule, mixed_scores
from klft.references import Reference, parts_of, resolve_reference, warn_if_one_model
from klft.scores import TokenScores, check_temperature, score_logits
from klft.shaping import shape_rewards
from klft.sharding import all_reduce_sum
from klft.writing import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from klft.fused.functions import ChunkScores

logger = logging.getLogger(__name__)

DEFAULT = FixedKL(0.05)  # the controller where none is given; it never changes


class KLPenalty:
    """A KL penalty against a frozen reference, for the reward, the loss, or both.

    Example:
        penalty = KLPenalty(ref_model, coef=0.05)
        kl = penalty.measure(model(input_ids, attention_mask).logits, input_ids, attention_mask, completion_mask)
        rewards = penalty.rewards(scores, kl)  # [B, T], detached: score - coef * KL
        loss = masked_mean(penalty.losses(kl), kl.mask)  # to add to the policy's; 0 where the KL is in the reward alone
        penalty.update(kl)  # the controller sees nats per sequence

    Without logits: `measure_hidden` in the place of `measure`, `token_losses` inside fused_token_loss.

    Args:
        reference: a klft reference, or a causal LM, which is frozen.
        estimator: "k1", "k2", "k3" (sampled) or "exact" (over the whole vocabulary). "exact" is a differentiable loss
            on each token's own KL plus the detached KL of the *later* tokens in the reward: together the gradient of
            the sequence KL, with far less variance than k1. With placement="loss" only the first part is used.
        placement: "reward", "loss", or "both" (for exact and k3, whose two halves make up one right gradient). k1 as a
            loss is refused; combinations with a wrong gradient warn by name.
        coef: a constant coefficient, for FixedKL(coef); 0.05 where there is neither it nor a controller.
        controller: of the coefficient; it sees nats per sequence.
        clip: the largest log-ratio, either sign (sampled), or KL (exact) of one token, in nats; what lies beyond
            counts as that much, without a gradient, see `clipped`. Without it an infinite KL is an error.
        divergence: another one in the KL's place, by the name of its function: "jsd", "skew_kl", "skew_reverse_kl",
            "alpha_divergence", "renyi_divergence". With estimator="exact", which then is the gradient of the expected
            sum of the tokens' divergences; what is said of the KL below holds for it.
        divergence_kwargs: its parameters: {"weight": 0.9} of jsd, {"alpha": 0.1} of the others.
        token_rule: how much each token's KL counts, see TokenRule; ready ones are in klft.token_rules.

    Raises ValueError for unknown names, for k1 in the loss, and for parameters that the divergence refuses.
    """

    def __init__(
        self,
        reference: "Reference | PreTrainedModel",
        *,
        direction: Direction = "reverse",
        estimator: Estimate = "k1",
        placement: Placement = "reward",
        controller: Controller = DEFAULT,
        clip: float | None = None,
        token_rule: TokenRule | None = None,
        divergence: OtherDivergence | None = None,
        divergence_kwargs: Mapping[str, float] | None = None,
        coef: float | None = None,
    ):
        check_combination(direction, estimator, placement)
        self.divergence: OtherDivergence | None = divergence
        self.divergence_kwargs: dict[str, Any] = dict(divergence_kwargs or {})
        check_divergence(divergence, self.divergence_kwargs, direction, estimator)
        if clip is not None and not 0 < clip < float("inf"):
            raise ValueError(f"KLPenalty: clip must be a finite number of nats above 0, got {clip!r}")
        if coef is not None:
            if controller is not DEFAULT:
                raise ValueError(
                    f"KLPenalty: coef={coef!r} and controller={controller!r} both set the coefficient: give coef where "
                    "it is constant, else the controller alone, which takes it as its start"
                )
            controller = FixedKL(coef)
        warn_of(direction, estimator, placement, divergence)
        check_controller(controller, "KLPenalty")
        if token_rule is not None and not callable(token_rule):
            raise TypeError(
                f"KLPenalty: token_rule must be a function (token_ids, mask, scores) -> weight, got {token_rule!r:.80}"
            )
        self.direction: Direction = direction
        self.estimator: Estimate = estimator
        self.reference, self.controller, self.clip = resolve_reference(reference), controller, clip
        self.placement, self.token_rule = effective_placement(estimator, placement), token_rule
        self._cut = VocabularyCut()
        self._by_column: bool | None = None  # whether the policy's positions count padding; None: not known yet
        self._losses_called = self._warned_no_loss = self._warned_nonfinite = False
        self._seen_apart = self._warned_shifted = False

    @one_line
    def __repr__(self) -> str:
        kwargs = "".join(f", {key}={value:g}" for key, value in self.divergence_kwargs.items())
        more = {"clip": self.clip, "token_rule": getattr(self.token_rule, "__name__", self.token_rule)}
        return ", ".join([
            f"{self._name}{kwargs}", f"{self.estimator} in {self.placement}", repr(self.controller),
            *(f"{key}={value}" for key, value in more.items() if value is not None), repr(self.reference),
        ])  # fmt: skip

    @property
    def coef(self) -> float:
        """The coefficient now."""
        return self.controller.coef

    # ---- measuring -------------------------------------------------------------------------------------------------

    def measure(
        self,
        logits: Float[Tensor, "..."],  # [B, T, V]; shapes that do not fit are named
        input_ids: Int[Tensor, "..."],  # [B, T], as all that follow
        attention_mask: Shaped[Tensor, "..."],
        mask: Shaped[Tensor, "..."],
        *,
        behaviour_logp: Float[Tensor, "B T"] | None = None,
        temperature: float = 1.0,
    ) -> TokenKL:
        """Run the reference and compare. Everything in the result is [B, T], aligned with `input_ids`.

        `logits` are the policy's, untouched: position t predicts token t + 1; the shift is made here, and a token that
        no real one predicts (a text's first) never counts. `mask` is True on the tokens that were generated. Pass the
        `temperature` they were sampled with: both models are scored at it. Make the logits with
        `model(**causal_inputs(model, input_ids, attention_mask))`: with left padding learned positions need it, and a
        warning says where the logits look as if they had none.

        Raises ValueError for shapes that do not belong together, and for negative ids (labels with -100).
        """
        check_measured(logits, input_ids, attention_mask, mask)
        check_temperature(temperature)
        # Only tokens that a real token predicts: not the first of a text, whatever is padded before it.
        real = attention_mask.to(mask.device) != 0
        mask = as_mask(mask) & real & real.roll(1, 1) & (torch.arange(mask.shape[1], device=mask.device) > 0)
        found, one_sided = [], set()
        for weight, reference in parts_of(self.reference):
            score = getattr(reference, "score", None)
            if score is None:
                scores, ids = self._compare(reference, logits, input_ids, attention_mask, mask, temperature)
                one_sided.update(ids)
            else:  # it has no logits
                rolled = logits.roll(1, 1)
                scores = score(rolled, input_ids, mask, behaviour_logp=behaviour_logp, temperature=temperature)
            found.append((weight, scores))
        parts = tuple(found) if hasattr(self.reference, "parts") else ()
        return self.measure_scores(
            mixed_scores(parts) if parts else found[0][1], mask, token_ids=input_ids, behaviour_logp=behaviour_logp,
            one_sided_ids=tuple(sorted(one_sided)), parts=parts,
        )  # fmt: skip

    def _compare(
        self, reference: Reference, logits: Tensor, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, t: float
    ) -> tuple[TokenScores, tuple[int, ...]]:
        """(scores [B, T] at temperature t, ids that only one of the models suppresses where a KL is infinite)."""
        ref_logits = self._reference_logits(reference, logits, input_ids, attention_mask)
        if not self._seen_apart and torch.is_grad_enabled() and not logits.is_inference():
            self._seen_apart = True
            warn_if_one_model(logits, ref_logits, attention_mask != 0)
        shared = min(logits.shape[-1], ref_logits.shape[-1])
        # Rolling by one puts each prediction under its token. The wrapped-around column is masked out.
        logits, ref_logits = (self._cut(z, shared).roll(1, 1) / t for z in (logits, ref_logits))
        scores = score_logits(logits, ref_logits, input_ids)
        self._warned_shifted = self._warned_shifted or warn_if_shifted(logits, ref_logits, scores, mask)
        if self.divergence is not None:
            scores.divergence = dense_divergence(logits, ref_logits, self.divergence, **self.divergence_kwargs)
        infinite = mask & ~self._exact_of(scores).detach().isfinite()
        return scores, find_one_sided(logits[infinite], ref_logits[infinite]) if bool(infinite.any()) else ()

    def _reference_logits(
        self, reference: Reference, logits: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """The reference's, with its tokens placed as the policy's logits say the policy's were."""
        keep = input_ids.shape[1]
        ref_logits = reference.logits(input_ids, attention_mask, keep)
        by_column = getattr(reference, "logits_by_column", None)
        padded = (attention_mask[:, :1] == 0).any(1)
        if by_column is None or self._by_column is False or not bool(padded.any()):
            return ref_logits
        columns = by_column(input_ids, attention_mask, keep)
        if self._by_column is None:
            real = (attention_mask != 0) & padded[:, None]
            shared = min(logits.shape[-1], ref_logits.shape[-1])
            rows = [t.detach()[..., :shared][real.to(t.device)] for t in (logits, ref_logits, columns)]
            # Relative positions: no difference but rounding. Learned ones: nats, and the policy's logits say which.
            differ = float(reverse_kl(rows[1], rows[2].to(rows[1].device)).mean()) > 1e-3
            by_mask, by_columns = (float(reverse_kl(rows[0], t.to(rows[0].device)).mean()) for t in rows[1:])
            self._by_column = differ and by_columns < by_mask / 2
            if self._by_column:
                logger.warning(
                    "KLPenalty.measure: the policy's logits of left-padded rows look as if positions counted padding, "
                    "and the reference is scored alike. A text's positions then depend on its padding: call the model "
                    "as model(**klft.causal_inputs(model, input_ids, attention_mask))"
                )
        return columns if self._by_column else ref_logits

    def measure_hidden(
        self,
        hidden: Float[Tensor, "*B D"],
        head: LMHead | nn.Linear,
        token_ids: Int[Tensor, "*B"],
        mask: Mask,
        ref_hidden: Float[Tensor, "*B E"],
        ref_head: LMHead | nn.Linear,
        *,
        behaviour_logp: Float[Tensor, "*B"] | None = None,
        temperature: float = 1.0,
    ) -> TokenKL:
        """Compare without logits. `hidden[...]` and `ref_hidden[...]` are what predicts `token_ids[...]`: no shift.

        Only tokens where `mask` holds are scored; the others' scores are 0. Differentiable in hidden and head. Over a
        sharded head all ranks call it together.
        """
        if hasattr(self.reference, "parts"):
            raise TypeError(
                "measure_hidden: it takes one reference's hidden states, and this penalty has several: score each of "
                "reference.parts with token_scores, and call measure_scores(mixed_scores(parts), mask, parts=parts)"
            )
        mask, head, ref_head = as_mask(mask), as_head(head, "the policy"), as_head(ref_head, "the reference")
        flat_hidden, flat_ref = hidden[mask], ref_hidden[mask.to(ref_hidden.device)].to(hidden.device)
        flat = token_scores(flat_hidden, head, token_ids[mask], flat_ref, ref_head, temperature=temperature)
        flat.divergence = self.divergence_hidden(flat_hidden, head, flat_ref, ref_head, temperature=temperature)
        infinite = (~self._exact_of(flat).detach().isfinite()).nonzero().flatten()[:1]
        one_sided: tuple[int, ...] = ()
        if len(infinite) and head.shard is None:
            with torch.no_grad():
                one_sided = find_one_sided(head.logits(flat_hidden[infinite]), ref_head.logits(flat_ref[infinite]))
        scores = TokenScores(**{name: scatter_masked(t, mask) for name, t in flat.items()})
        return self.measure_scores(
            scores, mask, token_ids=token_ids, behaviour_logp=behaviour_logp, one_sided_ids=one_sided
        )

    def divergence_hidden(
        self,
        hidden: Float[Tensor, "N D"],
        head: LMHead | nn.Linear,
        ref_hidden: Float[Tensor, "N E"],
        ref_head: LMHead | nn.Linear,
        *,
        temperature: float = 1.0,
    ) -> Float[Tensor, "N"] | None:
        """The penalty's divergence of N tokens as linear_divergence takes it; None where it is one of the two KLs."""
        if self.divergence is None:
            return None
        return linear_divergence(
            hidden, head, ref_hidden, ref_head, divergence=self.divergence, temperature=temperature,
            **self.divergence_kwargs,
        )  # fmt: skip

    def measure_scores(
        self,
        scores: TokenScores,
        mask: Bool[Tensor, "*B"],
        *,
        token_ids: Int[Tensor, "*B"] | None = None,
        behaviour_logp: Float[Tensor, "*B"] | None = None,
        weight: Float[Tensor, "*B"] | None = None,
        one_sided_ids: tuple[int, ...] = (),
        parts: tuple[tuple[float, TokenScores], ...] = (),
    ) -> TokenKL:
        """From scores that are there already. `weight` is multiplied with what the token_rule says.

        Against several references `parts` has each one's weight and scores, and `scores` is `mixed_scores(parts)`.
        `one_sided_ids`: to be named where the KL is infinite.

        Raises ValueError for a rule whose weights have another shape, or are negative or not finite.
        """
        if self.token_rule is not None:
            ruled = self.token_rule(token_ids, mask, scores).detach().to(scores.logp)
            if ruled.shape != mask.shape or bool(((ruled < 0) | ~ruled.isfinite())[mask].any()):
                raise ValueError(
                    f"token_rule must give one finite weight >= 0 per token, {list(mask.shape)}; got "
                    f"{list(ruled.shape)}, values {ruled.flatten()[:4].tolist()} ..."
                )
            weight = ruled if weight is None else weight * ruled
        return TokenKL(scores, mask, behaviour_logp, token_ids, weight, one_sided_ids, parts)

    # ---- the penalty -----------------------------------------------------------------------------------------------

    def token_kl(self, kl: TokenKL, gradient: Gradient = "none") -> Float[Tensor, "*B"]:
        """weight * the chosen estimate per token, 0 where nothing counts; `gradient="unbiased"`: differentiable.

        Raises ValueError, naming the place, where it is not finite (with `clip`: where it is NaN).
        """
        value = kl.total(self._exact if self.estimator == "exact" else lambda each: self._sampled(each, gradient))
        value = torch.where(kl.counted, value.detach() if gradient == "none" else value, 0.0)
        nonfinite = (~value.detach().isfinite()).nonzero().tolist()
        if nonfinite:
            raise ValueError(nonfinite_message(kl, nonfinite, f"{self._name} ({self.estimator})"))
        return value if kl.weight is None else value * kl.weight

    @property
    def score_name(self) -> str:
        """The field of TokenScores that holds the exact value of what is penalised."""
        return f"{self.direction}_kl" if self.divergence is None else "divergence"

    @property
    def _name(self) -> str:
        return self.divergence or f"{self.direction} KL"

    def _exact_of(self, scores: TokenScores) -> Tensor:
        value = getattr(scores, self.score_name)
        if value is None:
            raise ValueError(f"these scores have no {self.score_name}: score the tokens with a reference")
        return value

    def _exact(self, kl: TokenKL) -> Tensor:
        value = self._exact_of(kl.scores)
        return value if self.clip is None else value.clamp(max=self.clip)

    def _beyond_clip(self, kl: TokenKL) -> Tensor:
        """True where the clip decides: on counted tokens whose log-ratio (sampled) or KL (exact) lies beyond it."""
        assert self.clip is not None
        if self.estimator == "exact":
            return kl.counted & (self._exact_of(kl.scores).detach() > self.clip)
        assert kl.scores.ref_logp is not None
        return kl.counted & ((kl.scores.logp - kl.scores.ref_logp).detach().abs() > self.clip)

    def clipped(self, kl: TokenKL) -> int:
        """Number of tokens that the clip changes."""
        if self.clip is None:
            return 0
        return int(torch.stack([self._beyond_clip(each) for _, each in kl.each()]).any(0).sum())

    def _sampled(self, kl: TokenKL, gradient: Gradient) -> Tensor:
        s, counted = kl.scores, kl.counted
        if s.ref_logp is None:
            raise ValueError("these scores have no ref_logp: score the tokens with a reference")
        # Masked tokens are replaced before anything is exponentiated: 0 * inf under the mask would be NaN.
        logp, ref_logp = torch.where(counted, s.logp, 0.0), torch.where(counted, s.ref_logp, 0.0)
        behaviour = None if kl.behaviour_logp is None else torch.where(counted, kl.behaviour_logp, 0.0)
        if self.clip is not None:
            beyond = self._beyond_clip(kl)
            # Clipped before the estimator, as constants: no gradient, and nothing infinite left to multiply by 0.
            clipped = (logp - ref_logp).detach().clamp(-self.clip, self.clip)
            logp, ref_logp = torch.where(beyond, clipped, logp), torch.where(beyond, 0.0, ref_logp)
            behaviour = None if behaviour is None else torch.where(beyond, clipped, behaviour)
        if gradient == "unbiased" and self.placement == "both":
            # k3's other half sits in the reward. Here belongs the plain derivative of k3, weighted, not rho's.
            rho = 1.0 if behaviour is None else (logp - behaviour).detach().exp()
            return rho * k3(logp, ref_logp)
        return estimate_kl(
            logp,
            ref_logp,
            direction=self.direction,
            estimator=self.estimator,  # pyright: ignore[reportArgumentType] - not "exact" here
            gradient=gradient,
            behaviour_logp=behaviour,
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
        """scores [B], one per completion, and the KL, as one detached reward per token. See shape_rewards."""
        check_rewarded(scores, kl)
        return shape_rewards(scores, self.reward_kl(kl), kl.mask, coef=self.coef)

    def losses(self, kl: TokenKL) -> Float[Tensor, "*B"]:
        """coef * KL per token with that direction's true gradient; zeros if nothing belongs in the loss."""
        self._losses_called = True
        if self.placement == "reward":
            return torch.zeros_like(kl.scores.logp)
        return self.coef * self.token_kl(kl, gradient="unbiased")

    def token_losses(
        self,
        scores: "TokenScores | ChunkScores",
        *,
        ref_logp: Float[Tensor, "*B"] | None = None,
        behaviour_logp: Float[Tensor, "*B"] | None = None,
        weight: Float[Tensor, "*B"] | None = None,
    ) -> Float[Tensor, "*B"]:
        """`losses` of tokens that all count, inside fused_token_loss: reads only the scores that this penalty needs.

        Args:
            ref_logp: the reference's log-probabilities where they are known from an earlier pass; then a sampled
                estimator needs no reference in fused_token_loss.
            weight: of each token's KL, as measure gave it (`kl.weight`): a token_rule needs whole sequences, so it is
                asked there and not here.
        """
        if self.placement == "reward":
            return torch.zeros_like(scores.logp)
        if hasattr(self.reference, "parts"):
            raise TypeError(
                "token_losses: fused_token_loss knows one reference, and this penalty has several: use measure"
            )
        if self.divergence is not None and not isinstance(scores, TokenScores):
            raise TypeError(
                f"token_losses: fused_token_loss has no {self.divergence}; use measure_hidden, and losses of its result"
            )
        if self.token_rule is not None and weight is None:
            raise ValueError(
                "token_losses: this penalty has a token_rule; pass weight=kl.weight[kl.mask] of measure(...)"
            )
        needed: dict[str, Any] = {"logp": scores.logp}
        if self.estimator == "exact":
            needed[self.score_name] = getattr(scores, self.score_name)
        else:
            needed["ref_logp"] = scores.ref_logp if ref_logp is None else ref_logp
        counted = torch.ones_like(scores.logp, dtype=torch.bool)
        return self.losses(TokenKL(TokenScores(**needed), counted, behaviour_logp, weight=weight))

    # ---- the coefficient -------------------------------------------------------------------------------------------

    def sequence_kl(self, kl: TokenKL, reduce: Reduce = no_reduce) -> tuple[float, int]:
        """(exact KL summed over a sequence's tokens, mean over sequences with a token, in nats; how many those are).

        What a controller is shown, and what is logged as kl/sequence/.../mean. A sequence whose KL is not finite is
        left out of both, with one warning. `reduce` sums over processes.
        """
        exact = kl.total(self._exact).detach()
        exact = exact if exact.device.type == "mps" else exact.double()  # MPS has no fp64
        sums = torch.where(kl.counted, exact, 0.0)
        sums = (sums if kl.weight is None else sums * kl.weight).sum(-1)
        counts = kl.counted.any(-1)
        finite = counts & sums.isfinite()
        total = torch.stack([torch.where(finite, sums, 0.0).sum(), finite.sum().to(sums), counts.sum().to(sums)])
        nats, episodes, sequences = reduce(total).tolist()
        if episodes < sequences and not self._warned_nonfinite:
            self._warned_nonfinite = True
            logger.warning(
                "the %s of %d of %d sequences is not finite: they are left out of what the controller sees",
                self._name, sequences - episodes, sequences,
            )  # fmt: skip
        return nats / max(episodes, 1.0), int(episodes)

    def update(self, kl: TokenKL, reduce: Reduce | None = None) -> float:
        """Show the controller this batch, see sequence_kl; the new coefficient.

        Call it on every process: where a process group is there, the batch is that of all of them, and so the
        coefficient stays the same on each. `reduce` sums over processes in another way.
        """
        if self.placement == "both" and not self._losses_called and not self._warned_no_loss:
            self._warned_no_loss = True
            logger.warning(
                "KLPenalty: placement='both' and no losses(kl) or token_losses(scores) since the last update: the "
                "reward alone has not the gradient of the KL. Add masked_mean(penalty.losses(kl), kl.mask) to the loss"
            )
        self._losses_called = False
        return self.controller.update(*self.sequence_kl(kl, all_reduce_sum if reduce is None else reduce))

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.controller.load_state_dict(state)
