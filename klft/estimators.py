"""KL estimated from the tokens that were sampled, and which gradient each estimate really carries.

l = logp - ref_logp, r = ref/policy = exp(-l), s = the score grad log p(token). Tokens are sampled from the policy p
unless `behaviour_logp` says otherwise; then rho = p / behaviour weights them, which corrects the token, not the
prefix before it. Nothing here is ever clamped: a log-ratio of 200 makes k3 infinite, and you are meant to see that.

| function | E[value] | E[gradient] if used as a loss |
|---|---|---|
| k1 | reverse KL | 0: never use it as a loss |
| k2 | reverse KL + O(l^3) | that of reverse_kl |
| k3 | reverse KL | that of forward_kl |
| forward_k1, forward_k3 | forward KL | that of neither KL |

Source: Schulman 2020, "Approximating KL divergence"; the gradients: arXiv 2506.09477, 2510.01555, 2505.17508.
"""

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klft.divergences import DIVERGENCES, gap, upcast
from klft.masked import check_ids

Direction = Literal["reverse", "forward"]
Estimator = Literal["k1", "k2", "k3"]
Gradient = Literal["none", "unbiased", "autograd"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)


def k1(logp: Float[Tensor, "*B"], ref_logp: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """KL(p||q) per token: l = log p - log q.

    Nats, any sign. Unbiased, the largest variance. Gradient as a loss: zero in expectation. As a detached reward: that
    of reverse_kl, and over a whole sequence that of the sequence's KL, which is why it is the default penalty.
    """
    return logp - ref_logp


def k2(logp: Float[Tensor, "*B"], ref_logp: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """KL(p||q) per token: l^2 / 2. Nats, >= 0; biased by O(l^3). Gradient as a loss: that of reverse_kl."""
    return (logp - ref_logp).square() / 2


def k3(logp: Float[Tensor, "*B"], ref_logp: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """KL(p||q) per token: r - 1 - log r, r = q/p.

    Nats, >= 0. Unbiased; variance unbounded where q has mass and p has little; +inf past l = -88 in fp32.
    Gradient as a loss: that of forward_kl. As a reward: about zero near q. See estimate_kl.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    return gap(ref_logp - logp)


def forward_k1(logp: Float[Tensor, "*B"], ref_logp: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """KL(q||p) per token, from tokens sampled from p: r log r. Nats, any sign, unbiased."""
    log_r = ref_logp - logp
    never = log_r == -torch.inf  # the reference cannot say it: the limit of r log r is 0
    log_r = torch.where(never, 0.0, log_r)
    return log_r.exp() * log_r


def forward_k3(logp: Float[Tensor, "*B"], ref_logp: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """KL(q||p) per token, from tokens sampled from p: r log r - r + 1. Nats, >= 0, unbiased."""
    log_r = ref_logp - logp
    # r (log r - 1 + 1/r) = r * gap(-log r): no cancellation near r = 1. Far below it would be 0 * inf; there nothing
    # cancels, and where the reference cannot say the token at all the limit is 1.
    never = log_r == -torch.inf
    far = log_r < -80
    near, log_r = torch.where(far, 0.0, log_r), torch.where(never, 0.0, log_r)
    return torch.where(never, 1.0, torch.where(far, 1 + log_r.exp() * (log_r - 1), near.exp() * gap(-near)))


ESTIMATORS = {
    ("reverse", "k1"): k1,
    ("reverse", "k2"): k2,
    ("reverse", "k3"): k3,
    ("forward", "k1"): forward_k1,
    ("forward", "k3"): forward_k3,
}


def _estimator(direction: str, estimator: str) -> Callable[[Tensor, Tensor], Tensor]:
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}: choose one of {', '.join(DIRECTIONS)}")
    if (direction, estimator) not in ESTIMATORS:
        known = [name for d, name in ESTIMATORS if d == direction]
        raise ValueError(f"no estimator {estimator!r} of the {direction} KL: choose one of {', '.join(known)}")
    return ESTIMATORS[direction, estimator]


def _warn_wrong_gradient(direction: str, estimator: str, weighted: bool) -> None:
    gives = {
        ("reverse", "k1", False): "zero in expectation",
        ("reverse", "k3", False): "the forward KL's",
        ("reverse", "k2", True): "that of E[k2]",
        ("forward", "k1", False): "not that of any KL",
        ("forward", "k3", False): "not that of any KL",
    }.get((direction, estimator, weighted))
    if gives:
        warnings.warn(
            f"estimate_kl(direction={direction!r}, estimator={estimator!r}, gradient='autograd'"
            f"{', behaviour_logp=...' if weighted else ''}): the gradient is {gives}, not the {direction} KL's. "
            "Use gradient='unbiased'.",
            stacklevel=3,
        )


def estimate_kl(
    logp: Float[Tensor, "*B"],
    ref_logp: Float[Tensor, "*B"],
    *,
    direction: Direction = "reverse",
    estimator: Estimator = "k1",
    gradient: Gradient = "none",
    behaviour_logp: Float[Tensor, "*B"] | None = None,
    value: Estimator | None = None,
) -> Float[Tensor, "*B"]:
    """A KL estimate per token whose value and whose gradient are chosen separately. Nats.

    Args:
        direction: "reverse" = KL(p||q) or "forward" = KL(q||p).
        estimator: of the value: "k1", "k2" (reverse only) or "k3".
        gradient: "none": detached, for rewards. "unbiased": that direction's true gradient in expectation, per sample
            l*s (reverse) or (1 - r)*s (forward). "autograd": whatever differentiating the formula gives; warns where
            that is not the direction's own.
        behaviour_logp: log-probability under the policy that sampled the tokens, if that was not `logp`'s. Value and
            gradient are then weighted by rho = p / behaviour and keep their expectations.

        value: the old name of `estimator`, deprecated.

    Raises ValueError for an unknown name. The reference never receives a gradient.
    """
    if value is not None:
        if estimator not in ("k1", value):
            raise ValueError(
                f"estimate_kl: estimator={estimator!r} and value={value!r} say one thing twice: give estimator alone"
            )
        warnings.warn("estimate_kl(value=...) is deprecated: use estimator=...", DeprecationWarning, stacklevel=2)
        estimator = value
    estimate_of = _estimator(direction, estimator)
    if gradient not in GRADIENTS:
        raise ValueError(f"unknown gradient {gradient!r}: choose one of {', '.join(GRADIENTS)}")
    ref_logp = ref_logp.detach()
    rho = torch.ones_like(logp) if behaviour_logp is None else (logp - behaviour_logp.detach()).exp()
    if gradient == "autograd":
        _warn_wrong_gradient(direction, estimator, behaviour_logp is not None)
        return rho * estimate_of(logp, ref_logp) if behaviour_logp is not None else estimate_of(logp, ref_logp)
    estimate = (rho * estimate_of(logp, ref_logp)).detach()
    if gradient == "none":
        return estimate
    # grad k2 = l*s and grad k3 = (1 - r)*s are the per-sample gradients wanted; rho is a weight here, not a path.
    carrier = rho.detach() * (k2 if direction == "reverse" else k3)(logp, ref_logp)
    return estimate + (carrier - carrier.detach())


class _Term(torch.autograd.Function):
    """One table row, elementwise in (lp, lq), with the row's own derivative: safe where either is -inf."""

    @staticmethod
    def forward(ctx, lp: Tensor, lq: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(lp, lq)
        ctx.row = DIVERGENCES[name]
        return ctx.row.term(lp, lq)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        return grad_output * ctx.row.dterm(*ctx.saved_tensors), None, None


def top_k_kl(
    logits: Float[Tensor, "*B V"],
    ref_logits: Float[Tensor, "*B V"],
    token_ids: Int[Tensor, "*B"],
    k: int,
    *,
    direction: Direction = "reverse",
    behaviour_logp: Float[Tensor, "*B"] | None = None,
) -> Float[Tensor, "*B"]:
    """KL, exact on the k tokens that weigh most (of p for reverse, of q for forward), plus a sampled tail. Nats, >= 0.

    Unbiased in value and gradient for tokens sampled from p, or from `behaviour_logp`'s policy: only the tail is
    weighted. k = V is the dense divergence, k = 0 is rho * k3 (reverse) or rho * forward_k3 (forward).
    Both parts keep the unnormalised integrand (+ q - p): without it the gradient is off by grad(mass of the head).
    Source: EMA-PG, arXiv 2602.04417, with the missing gradient term put back.
    """
    _estimator(direction, "k3")
    vocab_size = logits.shape[-1]
    if not 0 <= k <= vocab_size:
        raise ValueError(f"top_k_kl: k must lie in 0..{vocab_size} (the vocabulary), got {k}")
    check_ids(token_ids, vocab_size, "top_k_kl")
    lp = torch.log_softmax(upcast(logits), -1)
    lq = torch.log_softmax(upcast(ref_logits.detach()), -1)
    weigher = lp.detach() if direction == "reverse" else lq
    head_ids = weigher.topk(k, dim=-1).indices
    sampled = token_ids.unsqueeze(-1)
    at = [t.gather(-1, ids) for ids in (head_ids, sampled) for t in (lp, lq)]
    logp, ref_logp = (t.squeeze(-1) for t in at[2:])
    inside = (head_ids == sampled).any(-1)
    return support_kl(at[0], at[1], inside, logp, ref_logp, direction=direction, behaviour_logp=behaviour_logp)


def support_kl(
    logps: Float[Tensor, "*B k"], ref_logps: Float[Tensor, "*B k"], inside: Bool[Tensor, "*B"],
    logp: Float[Tensor, "*B"], ref_logp: Float[Tensor, "*B"], *,
    direction: Direction, behaviour_logp: Float[Tensor, "*B"] | None = None,
) -> Float[Tensor, "*B"]:  # fmt: skip
    """KL: the terms of k tokens, summed, plus the sampled token's over its probability where it is none of them.

    Nats, >= 0. Unbiased in value and gradient for any k tokens that do not depend on the sampled one. A term is
    unnormalised (+ q - p), 0 where both log-probabilities are -inf.

    Args:
        logps, ref_logps: of the k tokens.
        inside: whether the sampled token is one of them.
        logp, ref_logp: of the sampled token.
        behaviour_logp: of the policy that sampled it; default: logp's, as a constant.
    """
    exact: Tensor = _Term.apply(logps, ref_logps, f"{direction}_kl")  # pyright: ignore
    behaviour = logp.detach() if behaviour_logp is None else behaviour_logp.detach()
    # The term is homogeneous: with both log-probabilities relative to the behaviour's this is rho * k3, or its kin,
    # without a product of 0 and inf. A token inside is replaced before: its ratio may be infinite.
    logp, ref_logp = torch.where(inside, 0.0, logp - behaviour), torch.where(inside, 0.0, ref_logp - behaviour)
    tail: Tensor = _Term.apply(logp, ref_logp, f"{direction}_kl")  # pyright: ignore
    return exact.sum(-1) + tail
