"""Divergences between two next-token distributions: one table, and the dense functions on logits.

p is the policy (trainable), q the reference (never gets a gradient); lp, lq are their log-probabilities and
x = lq - lp. A divergence is `finish(S)`, `S = sum_v term(lp, lq)`. With `G = sum_v dterm_v`, dterm = dterm/dlp, the
gradient of S in the policy's logits is `dterm_v - p_v * G`; one whose `finish` is not the identity (renyi, of two sums)
brings its own gradient. A divergence is therefore one row of
`DIVERGENCES`; how the sum is taken (dense here, tile by tile, over ranks) is a backend's business.

Log-probabilities are logits too: every function is invariant to a shift of either argument's rows.

Terms are Bregman gaps: each is >= 0, and exactly 0 where lp = lq. In fp32 that keeps a KL of 5e-7 nats over 150,000
tokens accurate to 1e-4, where `sum p * (lp - lq)` has no correct digit and is often negative.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

# Logits handled at once. On a CPU the temporaries then stay in the cache, worth a factor of 2 to 4; elsewhere it
# bounds them. See benchmarks/README.md.
CPU_BLOCK, BLOCK = 1 << 17, 1 << 24

OtherDivergence = Literal["jsd", "skew_kl", "skew_reverse_kl", "alpha_divergence", "renyi_divergence"]
DivergenceName = Literal["reverse_kl", "forward_kl", OtherDivergence, "entropy"]
"""The rows of DIVERGENCES, each by its function's name; OtherDivergence: those that are no KL."""


def gap(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, >= 0. Below 1e-2 the series has more correct digits than expm1(x) - x."""
    series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    return torch.where(x.abs() < 1e-2, series, torch.expm1(x) - x)


def _bregman(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """w log(w/v) + v - w with x = log(v/w), >= 0. Right for w = 0 (gives v) and for v = 0 < w (gives +inf)."""
    # Past |x| = 1 nothing cancels any more, and expm1 would overflow at 88.
    far = (v - w) - torch.where(w > 0, w * x, 0.0)
    return torch.where(x.abs() <= 1, w * gap(x.clamp(-1, 1)), far)


def _x(lp: Tensor, lq: Tensor) -> Tensor:
    """log(q/p); 0 where both are -inf, so that a token neither model can say contributes nothing."""
    return (lq - lp).masked_fill((lp == -torch.inf) & (lq == -torch.inf), 0.0)


def _log_mix(c: float, x: Tensor) -> Tensor:
    """log((1 - c) + c * exp(x)) without overflow, accurate near x = 0."""
    return torch.where(x > 1, x + torch.log1p((1 - c) * torch.expm1(-x)), torch.log1p(c * torch.expm1(x.clamp(max=1))))


def _times(w: Tensor, y: Tensor) -> Tensor:
    """w * y, and 0 where w is 0: the limit that 0 * inf stands for in every term here."""
    return torch.where(w == 0, 0.0, w * y)


def _same(total: Tensor, *_params: float) -> Tensor:
    return total


def _over_parts(totals: Tensor) -> Tensor:
    return totals.sum(0)


@dataclass(frozen=True)
class Parameter:
    """A number that a divergence depends on. `problem` says what is wrong with a value, or None."""

    name: str
    default: float
    problem: Callable[[float], str | None]


def _strictly_inside(at_0: str, at_1: str) -> Callable[[float], str | None]:
    """A parameter of a mixture; at 0 and 1 the user wants one of the named divergences."""
    return lambda value: (
        None
        if 0 < value < 1
        else f"must lie strictly between 0 and 1, got {value}. The end points do not become a KL here; use {at_0} or "
        f"{at_1} for that."
    )


def _alpha_problem(alpha: float) -> str | None:
    if alpha not in (0, 1) and math.isfinite(alpha):
        return None
    return (
        f"must be finite and neither 0 nor 1, got {alpha}. "
        "Its limits there are forward_kl (alpha = 0) and reverse_kl (alpha = 1)."
    )


def _order_problem(alpha: float) -> str | None:
    if 0 < alpha < math.inf and alpha != 1:
        return None
    return f"must be positive, finite and not 1, got {alpha}. At alpha = 1 it is reverse_kl."


@dataclass(frozen=True)
class Divergence:
    """One row of the table. `term` and `dterm` are elementwise in (lp, lq); `finish` in the sum.

    A row that one sum cannot carry in floating point brings its own `total`, `merge` and `gradient`.
    """

    term: Callable[..., Tensor]
    dterm: Callable[..., Tensor]
    finish: Callable[..., Tensor] = _same
    total: Callable[..., Tensor] | None = None
    merge: Callable[[Tensor], Tensor] = _over_parts
    gradient: Callable[..., Tensor] | None = None
    parameters: tuple[Parameter, ...] = ()

    def bind(self, name: str, given: dict[str, float]) -> tuple[float, ...]:
        """The parameters in order, defaults filled in; `name` is the row's, for messages.

        Raises TypeError for a parameter that the row does not have, ValueError for a value it cannot have.
        """
        unknown = [key for key in given if key not in {p.name for p in self.parameters}]
        if unknown:
            known = ", ".join(p.name for p in self.parameters) or "none"
            raise TypeError(f"{name} got an unexpected keyword argument {unknown[0]!r}; its parameters: {known}")
        values = []
        for parameter in self.parameters:
            value = given.get(parameter.name, parameter.default)
            problem = parameter.problem(value)
            if problem:
                raise ValueError(f"{name}: {parameter.name} {problem}")
            values.append(float(value))
        return tuple(values)

    def totals(self, lp: Tensor, lq: Tensor, *params: float) -> Tensor:
        """The sum of the terms over the vocabulary, as `finish` reads it."""
        return self.total(lp, lq, *params) if self.total else self.term(lp, lq, *params).sum(-1)

    def logit_gradient(
        self, lp: Tensor, lq: Tensor, totals: Tensor, *params: float, dterm_sum: Tensor | None = None
    ) -> Tensor:
        """d value / d logits: dterm_v - p_v * G. A row whose `finish` changes the sum brings its own.

        `dterm_sum` is G [*] where lp and lq hold only part of the vocabulary; `merge` is how the parts' totals add up.
        """
        if self.gradient:
            return self.gradient(lp, lq, totals, *params)
        d = self.dterm(lp, lq, *params)
        return d - lp.exp() * (d.sum(-1) if dterm_sum is None else dterm_sum)[..., None]


def _jsd_term(lp: Tensor, lq: Tensor, b: float) -> Tensor:
    p, q, x = lp.exp(), lq.exp(), _x(lp, lq)
    m = b * q + (1 - b) * p
    return b * _bregman(q, m, _log_mix(1 - b, -x)) + (1 - b) * _bregman(p, m, _log_mix(b, x))


def _skew_term(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    q = lq.exp()
    return _bregman(q, a * q + (1 - a) * lp.exp(), _log_mix(1 - a, -_x(lp, lq)))


def _skew_reverse_term(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    p = lp.exp()
    return _bregman(p, a * p + (1 - a) * lq.exp(), _log_mix(1 - a, _x(lp, lq)))


def _skew_reverse_dterm(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    y = _log_mix(1 - a, _x(lp, lq))
    return _times(lp.exp(), -y - a * torch.expm1(-y))


def _log_power(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    """log(p^a q^(1-a)); -inf where both are 0."""
    impossible = (lp == -torch.inf) & (lq == -torch.inf)
    return (a * lp + (1 - a) * lq).masked_fill(impossible, -torch.inf)


def _power(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    return _log_power(lp, lq, a).exp()


def _alpha_term(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    p, x, c = lp.exp(), _x(lp, lq), 1 - a
    near = p * (gap(c * x.clamp(-1, 1)) - c * gap(x.clamp(-1, 1)))
    far = _power(lp, lq, a) - a * p - c * lq.exp()
    return torch.where(x.abs() <= 1, near, far) / (-a * c)


def _alpha_dterm(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    p, x = lp.exp(), _x(lp, lq)
    near = p * torch.expm1((1 - a) * x.clamp(-1, 1))
    return torch.where(x.abs() <= 1, near, _power(lp, lq, a) - p) / (a - 1)


def _renyi_totals(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    """[2, *]: the alpha gaps, accurate near equality, and log sum p^a q^(1-a), accurate far from it."""
    return torch.stack([_alpha_term(lp, lq, a).sum(-1), _log_power(lp, lq, a).logsumexp(-1)])


def _renyi_merge(totals: Tensor) -> Tensor:
    return torch.stack([totals[:, 0].sum(0), totals[:, 1].logsumexp(0)])


def _renyi_finish(totals: Tensor, a: float) -> Tensor:
    gaps, log_power = totals
    return torch.where(log_power.abs() < 0.5, torch.log1p(a * (a - 1) * gaps), log_power) / (a - 1)


def _renyi_gradient(lp: Tensor, lq: Tensor, totals: Tensor, a: float) -> Tensor:
    """a/(a-1) * (w_v - p_v), w = p^a q^(1-a) normalised; near equality w - p = p * expm1(log(w/p)) cancels nothing."""
    log_power = (a - 1) * _renyi_finish(totals, a)[..., None]
    log_w, p = _log_power(lp, lq, a) - log_power, lp.exp()
    y = ((1 - a) * _x(lp, lq) - log_power).clamp(-1, 1)
    return a / (a - 1) * torch.where(y.abs() < 1, p * torch.expm1(y), log_w.exp() - p)


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": Divergence(
        term=lambda lp, lq: _bregman(lp.exp(), lq.exp(), _x(lp, lq)),
        dterm=lambda lp, lq: _times(lp.exp(), -_x(lp, lq)),
    ),
    "forward_kl": Divergence(
        term=lambda lp, lq: _bregman(lq.exp(), lp.exp(), -_x(lp, lq)),
        dterm=lambda lp, lq: lp.exp() - lq.exp(),
    ),
    "jsd": Divergence(
        term=_jsd_term,
        dterm=lambda lp, lq, b: (1 - b) * _times(lp.exp(), -_log_mix(b, _x(lp, lq))),
        parameters=(Parameter("weight", 0.5, _strictly_inside("forward_kl", "reverse_kl")),),
    ),
    "skew_kl": Divergence(
        term=_skew_term,
        dterm=lambda lp, lq, a: (a - 1) * _times(lp.exp(), torch.expm1(-_log_mix(1 - a, -_x(lp, lq)))),
        parameters=(Parameter("alpha", 0.1, _strictly_inside("forward_kl", "reverse_kl")),),
    ),
    "skew_reverse_kl": Divergence(
        term=_skew_reverse_term,
        dterm=_skew_reverse_dterm,
        parameters=(Parameter("alpha", 0.1, _strictly_inside("reverse_kl", "forward_kl")),),
    ),
    "alpha_divergence": Divergence(
        term=_alpha_term,
        dterm=_alpha_dterm,
        parameters=(Parameter("alpha", 0.5, _alpha_problem),),
    ),
    "renyi_divergence": Divergence(
        term=_alpha_term,
        dterm=_alpha_dterm,
        total=_renyi_totals,
        merge=_renyi_merge,
        finish=_renyi_finish,
        gradient=_renyi_gradient,
        parameters=(Parameter("alpha", 0.5, _order_problem),),
    ),
    "entropy": Divergence(  # reads the policy only
        term=lambda lp, _lq: _times(lp.exp(), -lp),
        dterm=lambda lp, _lq: _times(lp.exp(), -lp - 1),
    ),
}


def upcast(logits: Tensor) -> Tensor:
    """fp64 stays fp64, everything else becomes fp32: 16-bit logits would put 2e-4 nats of noise under every KL."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _Dense(torch.autograd.Function):
    """[N, V] x [N, V] -> [N], a block of rows at a time; the backward recomputes the log-softmax."""

    @staticmethod
    def forward(ctx, logits: Tensor, ref_logits: Tensor, row: Divergence, params: tuple[float, ...]) -> Tensor:
        ctx.save_for_backward(logits, ref_logits)
        ctx.row, ctx.params = row, params
        totals = [row.totals(lp, lq, *params) for _, lp, lq in _blocks(logits, ref_logits)]
        ctx.totals = torch.cat(totals, -1)
        return row.finish(ctx.totals, *params)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        logits, ref_logits = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows, lp, lq in _blocks(logits, ref_logits):
            g = ctx.row.logit_gradient(lp, lq, ctx.totals[..., rows], *ctx.params) * grad_output[rows, None]
            # A masked row stays exactly 0 even where its logits are NaN: 0 * NaN would not be.
            grad[rows] = g.masked_fill(grad_output[rows, None] == 0, 0.0).to(grad.dtype)
        return grad, None, None, None


def _blocks(logits: Tensor, ref_logits: Tensor):
    """(rows, lp, lq) for blocks of rows."""
    step = max(1, (CPU_BLOCK if logits.device.type == "cpu" else BLOCK) // max(1, logits.shape[1]))
    for start in range(0, max(1, len(logits)), step):  # one empty block for no rows
        rows = slice(start, start + step)
        lp = torch.log_softmax(upcast(logits[rows]), -1)
        lq = lp if ref_logits is logits else torch.log_softmax(upcast(ref_logits[rows]), -1)
        yield rows, lp, lq


def divergence(logits: Tensor, ref_logits: Tensor, name: str, **params: float) -> Tensor:
    """Row `name` of the table, dense: logits [*, V] x [*, V] -> [*], in nats (fp64 for fp64 inputs, else fp32).

    Raises ValueError for shapes that differ, for no vocabulary, for an unknown name and for a parameter out of range.
    """
    row, values = find_divergence(name, params)
    if logits.shape != ref_logits.shape or logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name} compares two distributions over one vocabulary: got logits {tuple(logits.shape)} and ref_logits "
            f"{tuple(ref_logits.shape)}. Cut both to the same tokens and the same vocabulary first."
        )
    flat = logits.reshape(-1, logits.shape[-1])
    ref_flat = flat if ref_logits is logits else ref_logits.detach().reshape(-1, logits.shape[-1])
    return _Dense.apply(flat, ref_flat, row, values).reshape(logits.shape[:-1])  # pyright: ignore


def find_divergence(name: str, params: dict[str, float]) -> tuple[Divergence, tuple[float, ...]]:
    """(row, its parameters in order). Raises ValueError for an unknown name, listing the known ones; see `bind`."""
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}: choose one of {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name], DIVERGENCES[name].bind(name, params)


def reverse_kl(logits: Float[Tensor, "*B V"], ref_logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """KL(p||q), the "backward KL": sum_v p log(p/q). Weighted by the policy, mode-seeking; the RLHF penalty.

    Nats, >= 0, exactly 0 for equal logits, +inf where the policy has mass and the reference none.
    Gradient in the logits: p_v (log(p_v/q_v) - KL).

    Example:
        kl = reverse_kl(logits, ref_logits)  # [B, T, V] x [B, T, V] -> [B, T]
        print(kl.mean(), "nats per token")
    """
    return divergence(logits, ref_logits, "reverse_kl")


def forward_kl(logits: Float[Tensor, "*B V"], ref_logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """KL(q||p): sum_v q log(q/p). Weighted by the reference, mean-seeking / mass-covering; distillation, retention.

    Nats, >= 0, exactly 0 for equal logits, +inf where the reference has mass and the policy none.
    Gradient in the logits: p_v - q_v.
    """
    return divergence(logits, ref_logits, "forward_kl")


def entropy(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """H(p) = -sum_v p log p, in nats. Gradient in the logits: -p_v (log p_v + H)."""
    return divergence(logits, logits, "entropy")


def jsd(logits: Float[Tensor, "*B V"], ref_logits: Float[Tensor, "*B V"], weight: float = 0.5) -> Float[Tensor, "*B"]:
    """weight * KL(q||m) + (1 - weight) * KL(p||m), m = weight * q + (1 - weight) * p. Generalised Jensen-Shannon.

    Nats, between 0 and H(weight). jsd/weight -> forward_kl as weight -> 0, jsd/(1 - weight) -> reverse_kl as it -> 1.
    `weight` is that of the reference in the mixture. Source: GKD, arXiv 2306.13649 (its beta).
    """
    return divergence(logits, ref_logits, "jsd", weight=weight)


def skew_kl(
    logits: Float[Tensor, "*B V"], ref_logits: Float[Tensor, "*B V"], alpha: float = 0.1
) -> Float[Tensor, "*B"]:
    """KL(q || alpha q + (1 - alpha) p): a forward KL that stays <= -log(alpha). Nats. Source: DistiLLM, 2402.03898."""
    return divergence(logits, ref_logits, "skew_kl", alpha=alpha)


def skew_reverse_kl(
    logits: Float[Tensor, "*B V"], ref_logits: Float[Tensor, "*B V"], alpha: float = 0.1
) -> Float[Tensor, "*B"]:
    """KL(p || alpha p + (1 - alpha) q): a reverse KL that stays <= -log(alpha). Nats. Source: DistiLLM, 2402.03898."""
    return divergence(logits, ref_logits, "skew_reverse_kl", alpha=alpha)


def alpha_divergence(
    logits: Float[Tensor, "*B V"], ref_logits: Float[Tensor, "*B V"], alpha: float = 0.5
) -> Float[Tensor, "*B"]:
    """(sum_v p^a q^(1-a) - 1) / (a (a - 1)), any a = alpha but 0 and 1. a -> 1: reverse_kl, a -> 0: forward_kl."""
    return divergence(logits, ref_logits, "alpha_divergence", alpha=alpha)


def renyi_divergence(
    logits: Float[Tensor, "*B V"], ref_logits: Float[Tensor, "*B V"], alpha: float = 0.5
) -> Float[Tensor, "*B"]:
    """log(sum_v p^alpha q^(1-alpha)) / (alpha - 1), alpha > 0 and not 1. Nats. alpha -> 1: reverse_kl."""
    return divergence(logits, ref_logits, "renyi_divergence", alpha=alpha)
