"""TokenScores: every score of a token under two models; from logits (`score_logits`); and as metrics (`kl_metrics`).

`kl_metrics` is the one definition of every `kl/*` and `entropy/*` key: PPO, the diagnostics and a loop of your own log
the same names with the same meaning.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klft.choices import check_temperature as check_temperature  # it was here once
from klft.divergences import entropy, forward_kl, reverse_kl
from klft.estimators import k1, k2, k3
from klft.masked import Mask, as_mask, token_logps
from klft.writing import one_line


@dataclass
class TokenScores:
    """Per token, in nats. `token_scores` fills them as [N], `score_logits` and the scorers as [B, T].

    All but logp are None where there is no reference (and nobody asked for the entropy or the likeliest tokens).
    The log-ratios of tokens that the policy did not sample (a given text's, a greedy continuation's) estimate no KL.
    """

    logp: Float[Tensor, "*B"]  # log p(token) of the policy
    ref_logp: Float[Tensor, "*B"] | None = None  # log q(token) of the reference
    entropy: Float[Tensor, "*B"] | None = None  # H(p), over the vocabulary
    ref_entropy: Float[Tensor, "*B"] | None = None  # H(q)
    reverse_kl: Float[Tensor, "*B"] | None = None  # KL(p||q), exact
    forward_kl: Float[Tensor, "*B"] | None = None  # KL(q||p), exact
    top1_agree: Bool[Tensor, "*B"] | None = None  # whether both models' likeliest token is the same
    top_ids: Int[Tensor, "*B K"] | None = None  # the policy's likeliest tokens, best first
    top_p: Float[Tensor, "*B K"] | None = None  # their probabilities
    ref_top_ids: Int[Tensor, "*B K"] | None = None  # the reference's
    ref_top_p: Float[Tensor, "*B K"] | None = None  # with these probabilities
    divergence: Float[Tensor, "*B"] | None = None  # of another kind than the two KLs, where a penalty has one
    sampled: Bool[Tensor, "*B"] | None = None  # whether the policy sampled the token, as k1, k2, k3 assume; None: all

    @one_line
    def __repr__(self) -> str:
        there = ", ".join(name for name, _ in self.items())
        return f"{list(self.logp.shape)}, {self.logp.dtype}, {self.logp.device}: {there}"

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the fields that are there."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                yield f.name, value


def score_logits(
    logits: Float[Tensor, "*B V"], ref_logits: Float[Tensor, "*B V"], token_ids: Int[Tensor, "*B"]
) -> TokenScores:
    """Every score of a token, from the logits that predict it. Differentiable in the policy's logits."""
    ref_logits = ref_logits.detach()
    return TokenScores(
        logp=token_logps(logits, token_ids),
        ref_logp=token_logps(ref_logits, token_ids),
        entropy=entropy(logits),
        ref_entropy=entropy(ref_logits),
        reverse_kl=reverse_kl(logits, ref_logits),
        forward_kl=forward_kl(logits, ref_logits),
        top1_agree=logits.argmax(-1) == ref_logits.argmax(-1),
    )


# ---- metrics --------------------------------------------------------------------------------------------------------

SAMPLED = {"k1": k1, "k2": k2, "k3": k3}  # estimates of the reverse KL, of tokens that the policy sampled alone
QUANTITIES: tuple[str, ...] = ("reverse", "forward", "entropy", "ref_entropy", "logp", "ref_logp", *SAMPLED)
"""Per token: the exact KL(p||q) and KL(q||p), both entropies, both log-probabilities, and the sampled estimates."""
PERCENTS = (50, 90, 99)


@runtime_checkable
class Distribution(Protocol):
    """One quantity's finite values: what metrics are read off."""

    @property
    def mean(self) -> float:
        """Over tokens, weighted where tokens have weights."""
        ...

    @property
    def high(self) -> float:
        """The largest."""
        ...

    @property
    def sequence_mean(self) -> float | None:
        """Mean over sequences of the (weighted) sum over a sequence's tokens; without those with a non-finite value."""
        ...

    def percentile(self, percent: int | float) -> float:
        """Nearest rank."""
        ...


def metrics_of(
    distributions: Mapping[str, Distribution], *, tokens: int, nonfinite: int, top1_agree: float | None
) -> dict[str, float]:
    """Metrics by key; the last word of a key says how to combine two of them. What has no finite value is left out.

    Args:
        distributions: by name, of those of QUANTITIES, and of "divergence", that have a finite value.
        nonfinite: tokens with a value that is not finite in any of QUANTITIES; left out of that quantity alone.
    """
    metrics: dict[str, float] = {}
    for name in ("reverse", "forward"):
        if name in distributions:
            kl = distributions[name]
            metrics |= {f"kl/{name}/mean": kl.mean, f"kl/{name}/max": kl.high}
            metrics |= {f"kl/{name}/p{percent}": kl.percentile(percent) for percent in PERCENTS}
            if kl.sequence_mean is not None:
                metrics[f"kl/sequence/{name}/mean"] = kl.sequence_mean
    if "divergence" in distributions:
        other = distributions["divergence"]
        metrics |= {"divergence/mean": other.mean, "divergence/max": other.high}
        if other.sequence_mean is not None:
            metrics["divergence/sequence/mean"] = other.sequence_mean
    keys = {"entropy": "entropy/policy/mean", "ref_entropy": "entropy/reference/mean"}
    keys |= {name: f"kl/{name}/mean" for name in SAMPLED}
    metrics |= {key: distributions[name].mean for name, key in keys.items() if name in distributions}
    if top1_agree is not None:
        metrics["kl/top1_agree/frac"] = top1_agree
    if tokens:
        metrics |= {"kl/nonfinite/count": float(nonfinite), "kl/tokens/count": float(tokens)}
    return metrics


def quantities(scores: TokenScores) -> dict[str, Tensor]:
    """QUANTITIES of the scores and "divergence", as far as they are there, [*B], in fp64; beyond fp32 is infinite."""
    given = {"reverse": scores.reverse_kl, "forward": scores.forward_kl, "entropy": scores.entropy,
             "ref_entropy": scores.ref_entropy, "logp": scores.logp, "ref_logp": scores.ref_logp,
             "divergence": scores.divergence}  # fmt: skip
    values = {name: t.detach().double() for name, t in given.items() if t is not None}
    if "ref_logp" in values:
        for name, estimator in SAMPLED.items():
            values[name] = saturate(estimator(values["logp"], values["ref_logp"]))
    return values


def saturate(values: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """fp64 values with everything beyond fp32 as +inf: what fp32, in which scores are taken, would have made of it."""
    return values.masked_fill(values.abs() > torch.finfo(torch.float32).max, math.inf)


class _Values:
    """A quantity's finite values as a Distribution. x, weight, sequence [N]: of the tokens that count."""

    def __init__(self, x: Tensor, weight: Tensor, sequence: Tensor):
        finite = x.isfinite()
        self.ordered = x[finite].sort().values
        self.mean = float((x * weight)[finite].sum() / weight[finite].sum())
        self.high = float(self.ordered[-1])
        size = int(sequence.max()) + 1
        sums = x.new_zeros(size).index_add_(0, sequence, torch.where(finite, x * weight, 0.0))
        whole = torch.bincount(sequence, minlength=size) == torch.bincount(sequence[finite], minlength=size)
        whole &= torch.bincount(sequence, minlength=size) > 0
        self.sequence_mean = float(sums[whole].mean()) if whole.any() else None

    def percentile(self, percent: int | float) -> float:
        return float(self.ordered[round((len(self.ordered) - 1) * percent / 100)])


def kl_metrics(
    scores: TokenScores, mask: Mask, *, weight: Float[Tensor, "*B"] | None = None, all_processes: bool = False
) -> dict[str, float]:
    """The numbers to log of one batch: kl/reverse/mean, kl/sequence/reverse/mean, ...

    Args:
        mask: True where a token counts. Sequences are rows of [B, T]; [N] is one sequence.
        weight: how much each token counts in means and sums; tokens of weight 0 do not count at all. Default 1.
        all_processes: of the batches of all processes together, the same numbers on each: those that one process would
            get. Every process must call it. Default: of this process's batch alone.

    Nats, Python floats. Percentiles are nearest ranks over tokens, whatever their weight. kl/{k1,k2,k3}/mean are over
    the tokens that the policy sampled (`scores.sampled`), and left out where there is none.
    """
    mask = as_mask(mask)
    weight = torch.ones_like(scores.logp) if weight is None else weight
    sequence = (torch.arange(mask.numel(), device=mask.device) // max(mask.shape[-1], 1)).view_as(mask)
    mask = mask & (weight != 0)
    columns = {"sequence": sequence[mask], "weight": weight[mask]}
    columns |= {name: t[mask].detach() for name, t in scores.items() if t.shape == mask.shape}
    if all_processes and dist.is_available() and dist.is_initialized():
        columns["sequence"] = columns["sequence"] * dist.get_world_size() + dist.get_rank()  # others' are others
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, {name: t.detach().cpu() for name, t in columns.items()})
        columns = {name: torch.cat([of_rank[name] for of_rank in every]) for name in columns}
    return flat_metrics(weight=columns.pop("weight"), sequence=columns.pop("sequence"), scores=TokenScores(**columns))


def flat_metrics(
    scores: TokenScores, sequence: Int[Tensor, "N"], weight: Float[Tensor, "N"] | None = None
) -> dict[str, float]:
    """kl_metrics of tokens [N] that all count; `sequence` numbers the sequence each belongs to."""
    values = quantities(scores)
    weight = torch.ones_like(values["logp"]) if weight is None else weight.detach().double()
    nonfinite = torch.zeros_like(weight, dtype=torch.bool)
    everything = torch.ones_like(nonfinite)
    distributions = {}
    for name, x in values.items():
        counted = scores.sampled if name in SAMPLED and scores.sampled is not None else everything
        nonfinite |= counted & ~x.isfinite()
        if (counted & x.isfinite()).any():
            distributions[name] = _Values(x[counted], weight[counted], sequence[counted])
    agree = None
    if scores.top1_agree is not None and len(weight):
        agree = float((scores.top1_agree.double() * weight).sum() / weight.sum())
    return metrics_of(distributions, tokens=len(weight), nonfinite=int(nonfinite.sum()), top1_agree=agree)
