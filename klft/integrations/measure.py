"""A trainer's batch under policy and reference: the loss, the scores of its tokens, and what is logged of them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from klft.fused import fused_token_loss, token_scores
from klft.integrations.backbone import BackboneCall, versions
from klft.integrations.batch import Batch, rows_of
from klft.masked import scatter_masked
from klft.penalty import KLPenalty, TokenKL, mixed_scores
from klft.references import Reference, parts_of
from klft.scores import TokenScores, flat_metrics
from klft.scoring import Predictions, Scorer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments

FUSED = ("logp", "ref_logp", "reverse_kl", "forward_kl", "entropy", "ref_entropy")  # that fused_token_loss knows
SCORES = (*FUSED, "divergence")
KEPT_TOKENS = 1 << 20  # of a process between two logs; older ones are forgotten


def loss_scores(penalty: KLPenalty) -> tuple[str, ...]:
    """Of SCORES, what the loss, the controller and k1, k2, k3 are computed from."""
    return "logp", "ref_logp", penalty.score_name


@dataclass
class PenaltyPart:
    """One reference, its part in the penalty, and what compares the policy with it."""

    weight: float
    reference: Reference
    penalty: KLPenalty  # with this reference alone
    scorer: Scorer

    @staticmethod
    def of(penalty: KLPenalty, args: "TrainingArguments", shard_vocab: str = "auto") -> "list[PenaltyPart]":
        """A mixture's references, or the only one."""
        temperature = getattr(args, "temperature", 1.0)
        parts = []
        for weight, reference in parts_of(penalty.reference):
            alone = copy.copy(penalty)  # the controller is the same
            alone.reference = reference
            scorer = Scorer(reference, temperature=temperature, shard_vocab=shard_vocab)
            parts.append(PenaltyPart(weight, reference, alone, scorer))
        return parts


@dataclass
class Measured:
    """The KL of a batch: N counted tokens in S sequences of at most L of them."""

    scores: TokenScores  # [N] each, and top lists [N, k] if they were asked for
    kl: TokenKL  # the same in rows, [S, L] each
    loss: Float[Tensor, ""] | None


def measure(
    penalty: KLPenalty,
    parts: list[PenaltyPart],
    model: nn.Module,
    call: BackboneCall,
    batch: Batch,
    *,
    with_loss: bool = True,
    all_scores: bool = True,
    top_k: int = 0,
) -> Measured:
    """The KL of the tokens that count, and coef * KL over their divisors where it belongs in the loss.

    Without `all_scores` those of loss_scores alone, which takes three quarters of the time. With `top_k` both models'
    likeliest tokens too, which takes a pass of its own; so does a divergence that is none of the two KLs.
    Raises RuntimeError where the hidden states are not those of the batch's tokens.
    """
    if call.hidden.shape[:2] != batch.counted.shape:
        raise RuntimeError(
            f"KLAnchorMixin: the backbone gave hidden states {list(call.hidden.shape)} for tokens "
            f"{list(batch.counted.shape)} ({versions()}): virtual tokens, or another layout than this klft knows"
        )
    loss_wanted = with_loss and bool(penalty.coef) and penalty.placement != "reward"
    hidden = call.hidden if loss_wanted else call.hidden.detach()
    head = parts[0].scorer.policy_head(model)
    device, token_ids = head.weight.device, batch.pick(batch.token_ids)
    policy = Predictions(hidden[batch.predicts.to(hidden.device)].to(device), head)
    inputs = []
    for part in parts:
        ref_hidden, ref_head = part.reference.hidden_of(call.inputs)
        reference = Predictions(ref_hidden[batch.predicts.to(ref_hidden.device)], ref_head).on(device)
        inputs.append(part.scorer.fused_inputs(policy, reference, token_ids))
    numbers = torch.unique_consecutive(batch.pick(batch.sequence), return_inverse=True)[1]
    losses, weight, scores, kl = (), None, None, None
    divergences: list[Any] = []  # Tensor or None
    if top_k or not loss_wanted or penalty.token_rule is not None or penalty.divergence is not None:
        divergences = [_divergence(penalty, given, differentiable=loss_wanted) for given in inputs]
        with torch.no_grad():
            scores = [token_scores(**given, top_k=top_k) for given in inputs]
        for each, values in zip(scores, divergences, strict=True):
            each.divergence = None if values is None else values.detach()
        kl = _in_rows(penalty, parts, scores, batch, numbers)
        weight = None if kl.weight is None else kl.weight[kl.mask]
    if loss_wanted and penalty.divergence is not None:
        losses = [_divergence_loss(penalty, values, batch, weight) for values in divergences]
    elif loss_wanted:
        pairs = [
            _loss_and_scores(part.penalty, given, batch, weight, all_scores)
            for part, given in zip(parts, inputs, strict=True)
        ]
        losses, each = zip(*pairs, strict=True)
        scores = scores or list(each)
    assert scores is not None
    kl = _in_rows(penalty, parts, scores, batch, numbers) if kl is None else kl
    loss = torch.stack([part.weight * t for part, t in zip(parts, losses, strict=True)]).sum() if losses else None
    return Measured(scores[0] if len(parts) == 1 else _flat(kl), kl, loss)


def _divergence(penalty: KLPenalty, inputs: dict[str, Any], differentiable: bool) -> Tensor | None:
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        return penalty.divergence_hidden(**{name: t for name, t in inputs.items() if name != "token_ids"})


def _divergence_loss(
    penalty: KLPenalty, values: Float[Tensor, "N"], batch: Batch, weight: Float[Tensor, "N"] | None
) -> Tensor:
    """Sum over tokens of coef * divergence / divisor, differentiable."""
    scores = TokenScores(logp=values.detach(), divergence=values)  # no sampled estimator: logp is not read
    kl = TokenKL(scores, torch.ones_like(values, dtype=torch.bool), weight=weight)
    return (penalty.losses(kl) / batch.pick(batch.divisor).to(values)).sum()


def _loss_and_scores(
    penalty: KLPenalty, inputs: dict[str, Any], batch: Batch, weight: Float[Tensor, "N"] | None, all_scores: bool
) -> tuple[Tensor, TokenScores]:
    """(sum over tokens of coef * KL / divisor, differentiable; scores [N] of the same pass)."""
    n, device = len(inputs["token_ids"]), inputs["hidden"].device
    given = {"index": torch.arange(n, device=device), "divisor": batch.pick(batch.divisor).to(device), "weight": weight}
    if batch.behaviour_logp is not None:
        given["behaviour_logp"] = batch.pick(batch.behaviour_logp).to(device)
    constants = {name: t for name, t in given.items() if t is not None}
    dtype = torch.float64 if inputs["hidden"].dtype == torch.float64 else torch.float32
    names = FUSED if all_scores else loss_scores(penalty)
    kept = {name: torch.zeros(n, dtype=dtype, device=device) for name in names}

    def loss_of(scores: Any, *chunks: Tensor) -> Tensor:
        of_chunk = dict(zip(constants, chunks, strict=True))
        index, divisor = of_chunk.pop("index"), of_chunk.pop("divisor")
        for name in kept:
            kept[name][index] = getattr(scores, name).detach().to(dtype)
        return (penalty.token_losses(scores, **of_chunk) / divisor).sum()

    return fused_token_loss(loss_of, **inputs, per_token=tuple(constants.values())), TokenScores(**kept)


def _in_rows(
    penalty: KLPenalty, parts: list[PenaltyPart], scores: list[TokenScores], batch: Batch, numbers: Int[Tensor, "N"]
) -> TokenKL:
    """[N] under each reference -> [S, L]: a sequence's counted tokens in one row, from its start."""
    mask = rows_of(numbers)
    rows = [
        TokenScores(**{name: scatter_masked(t, mask) for name, t in each.items() if name in SCORES}) for each in scores
    ]
    mixed = tuple((part.weight, each) for part, each in zip(parts, rows, strict=True)) if len(parts) > 1 else ()
    behaviour = None if batch.behaviour_logp is None else scatter_masked(batch.pick(batch.behaviour_logp), mask)
    return penalty.measure_scores(
        mixed_scores(mixed) if mixed else rows[0], mask, token_ids=scatter_masked(batch.pick(batch.token_ids), mask),
        behaviour_logp=behaviour, parts=mixed,
    )  # fmt: skip


def _flat(kl: TokenKL) -> TokenScores:
    return TokenScores(**{name: t[kl.mask] for name, t in kl.scores.items()})


@dataclass
class Measurements:
    """Tokens since the last log, on this process: those of SCORES that are known, the weight, and the sequence."""

    columns: dict[str, list[Float[Tensor, "N"]]] = field(default_factory=dict)
    next_sequence: int = 0

    def add(self, kl: TokenKL, names: Sequence[str] = SCORES) -> None:
        """Some scores of a batch's tokens, on the CPU; sequences are the rows of kl."""
        flat = {name: t for name, t in _flat(kl).items() if name in names} | {"weight": kl.weights[kl.mask]}
        flat["sequence"] = kl.mask.nonzero()[:, 0] + self.next_sequence
        self.next_sequence += len(kl.mask)
        for name, t in flat.items():
            self.columns.setdefault(name, []).append(t.double().cpu())
        while sum(map(len, self.columns["sequence"][1:])) > KEPT_TOKENS:
            for kept in self.columns.values():
                del kept[0]

    def take(self, accelerator: "Accelerator", sampled: bool, tp_size: int = 1) -> dict[str, float]:
        """The metrics of all processes' tokens; all processes that have measured call it together. Forgets them.

        tp_size: the ranks of a tensor-parallel group hold the same tokens, which count once.
        """
        if not self.columns:
            return {}
        names, table = [*self.columns], torch.stack([torch.cat(kept) for kept in self.columns.values()], -1)
        self.columns, self.next_sequence = {}, 0
        # Sequences of different processes by different numbers; padding by a negative one.
        table[:, -1] = table[:, -1] * accelerator.num_processes + accelerator.process_index
        if accelerator.process_index % tp_size:
            table[:, -1] = -1
        padded: Any = accelerator.pad_across_processes(table[None].to(accelerator.device), dim=1, pad_index=-1)
        gathered = accelerator.gather(padded).flatten(0, 1).cpu()  # pyright: ignore
        gathered = gathered[(gathered[:, -1] >= 0) & (gathered[:, -2] != 0)]
        if not len(gathered):
            return {}
        *values, weight, sequence = gathered.unbind(-1)
        scores = TokenScores(**dict(zip(names, values, strict=False)))
        scores.sampled = torch.full_like(weight, sampled, dtype=torch.bool)
        return flat_metrics(scores, torch.unique(sequence, return_inverse=True)[1], weight)
