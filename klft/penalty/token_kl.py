"""TokenKL: scores of tokens, which of them count, and how much."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from klft.scores import TokenScores, kl_metrics
from klft.writing import one_line

TokenRule = Callable[[Tensor | None, Tensor, TokenScores], Tensor]
"""(token_ids, mask, scores), [*B] each -> weight [*B], >= 0: how much each token counts."""


@dataclass(frozen=True)
class TokenKL:
    """Scores of tokens, which of them count, and how much: what every part of a penalty is computed from.

    KLPenalty's measure functions fill it. *B is [B, T], sequences in rows, where rewards or sequences are asked for; a
    loss takes any shape.
    """

    scores: TokenScores
    mask: Bool[Tensor, "*B"]  # True where a token counts
    behaviour_logp: Float[Tensor, "*B"] | None = None  # of the policy that sampled, if that was not the one scored
    token_ids: Int[Tensor, "*B"] | None = None
    weight: Float[Tensor, "*B"] | None = None  # of each token's KL, in rewards, losses, metrics; None: 1
    one_sided_ids: tuple[int, ...] = ()  # where a KL is infinite: ids that only one of the models suppresses
    parts: tuple[tuple[float, TokenScores], ...] = ()  # of several references: weight and scores of each

    @one_line
    @torch.no_grad()
    def __repr__(self) -> str:
        scores, logp = self.scores, self.scores.logp
        said = f"{list(logp.shape)}, {logp.dtype}, {logp.device}"
        if logp.is_meta or isinstance(logp, DTensor):  # no value is at hand
            return said
        values = {name: t for name, t in scores.items() if name in ("reverse_kl", "forward_kl", "divergence")}
        if not values and scores.ref_logp is not None:
            values["k1"] = logp - scores.ref_logp
        weight = torch.where(self.counted, self.weights, 0.0)
        sums = [weight.sum(), *(torch.where(self.counted, t * weight, 0.0).sum() for t in values.values())]
        tokens, total, *nats = torch.stack([self.counted.sum(), *sums]).float().tolist()  # a GPU is waited for once
        means = [f"{name} {x / total:.4g}" for name, x in zip(values, nats, strict=True) if total]
        return f"{said}, {tokens:.0f} of {logp.numel()} tokens count, mean nats: {', '.join(means) or 'none'}"

    def metrics(self, all_processes: bool = False) -> dict[str, float]:
        """The numbers to log: kl/reverse/mean, kl/sequence/reverse/mean, ... Nats; `all_processes`: see kl_metrics."""
        return kl_metrics(self.scores, self.mask, weight=self.weight, all_processes=all_processes)

    def each(self) -> "list[tuple[float, TokenKL]]":
        """(weight, KL) of each reference; of one alone, this with weight 1."""
        parts: list[tuple[float, TokenKL]] = [
            (weight, replace(self, scores=scores, parts=())) for weight, scores in self.parts
        ]
        return parts or [(1.0, self)]

    def total(self, values: "Callable[[TokenKL], Tensor]") -> Float[Tensor, "*B"]:
        """The weighted sum over references of `values` of each one's KL."""
        return values(self) if not self.parts else torch.stack([w * values(kl) for w, kl in self.each()]).sum(0)

    @property
    def counted(self) -> Bool[Tensor, "*B"]:
        """True where the mask holds and the weight is not 0."""
        return self.mask if self.weight is None else self.mask & (self.weight != 0)

    @property
    def weights(self) -> Float[Tensor, "*B"]:
        """The weight of every token, 1 by default."""
        return torch.ones_like(self.scores.logp) if self.weight is None else self.weight


def mixed_scores(parts: tuple[tuple[float, TokenScores], ...]) -> TokenScores:
    """The policy's own scores, and of each KL the sum over the references, weighted. No log-probability: see parts."""
    (_, first), kls = parts[0], {}
    for name in ("reverse_kl", "forward_kl", "divergence"):
        values = [(weight, getattr(scores, name)) for weight, scores in parts]
        if all(t is not None for _, t in values):
            kls[name] = torch.stack([weight * t for weight, t in values]).sum(0)
    return TokenScores(first.logp, entropy=first.entropy, **kls)
