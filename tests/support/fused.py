"""klft.fused's functions of two heads, and the same from dense float64 logits: one call each, ours and dense."""

import math
from dataclasses import replace

import pytest
import torch

from klft.fused import fused_token_loss, linear_divergence, plan, token_scores
from klft.heads import LMHead
from support import oracles
from support.divergences import ROWS
from support.oracles import HEADS

INF = math.inf
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SIZES = [(7, 13), (11, 5), (1, 7), (6, 1), (0, 7)]  # tokens, vocabulary
EVERYTHING = 1 << 30
MANY = [*ROWS, ("entropy", ())]
every_row = pytest.mark.parametrize(("name", "params"), MANY, ids=[f"{n}{list(p) or ''}" for n, p in MANY])
every_divergence = pytest.mark.parametrize(("name", "params"), ROWS, ids=[f"{n}{list(p) or ''}" for n, p in ROWS])
every_head = pytest.mark.parametrize("kind", HEADS)
DIFFERENTIABLE = ("logp", "entropy", "reverse_kl", "forward_kl")
CONSTANT = ("ref_logp", "ref_entropy", "top1_agree")


def limits(device="cpu", **changed):
    """(plan.LIMITS, its key, its limits with some replaced), as monkeypatch.setitem takes them."""
    kind = "cpu" if device == "cpu" else "gpu"
    return plan.LIMITS, kind, replace(plan.LIMITS[kind], **changed)


def set_tile(monkeypatch, elements):
    """Logits per tile; where they are few, so are those of a block."""
    monkeypatch.setitem(*limits("cpu", tile_logits=elements, block_logits=max(5, elements // 3)))
    monkeypatch.setitem(*limits("cuda", tile_logits=elements))


def tiles(monkeypatch, vocab):
    """One token at a time; blocks that do not divide the tokens; all at once."""
    for elements in (1, 3 * vocab, EVERYTHING):
        set_tile(monkeypatch, elements)
        yield elements


def weights(tokens):
    return torch.linspace(-2, 3, tokens, dtype=torch.float64)  # a grad_output that is neither 1 nor of one sign


def reference(two):
    return two.ref_hidden, LMHead(two.ref_weight, two.ref_bias, **two.ref_options)


def our_divergence(two, name, *params, **more):
    keywords = {"weight" if name == "jsd" else "alpha": value for value in params}

    def fn(hidden, weight, bias=None):
        head = LMHead(weight, bias, **two.options)
        return linear_divergence(
            hidden, head, *reference(two), divergence=name, temperature=two.temperature, **keywords, **more
        )  # fmt: skip

    return fn


def dense_divergence(two, name, *params):
    def fn(*leaves):
        if name == "entropy":
            return oracles.entropy(two.logits(*leaves))
        return getattr(oracles, name)(two.logits(*leaves), two.ref_logits, *params)

    return fn


def our_scores(two, hidden, weight, bias=None, **more):
    head = LMHead(weight, bias, **two.options)
    return token_scores(hidden, head, two.token_ids, *reference(two), temperature=two.temperature, **more)


def dense_scores(two, *leaves):
    return oracles.token_scores(two.logits(*leaves), two.ref_logits, two.token_ids)


def our_loss(two, loss_fn, per_token=()):
    def fn(hidden, weight, bias=None):
        head = LMHead(weight, bias, **two.options)
        temperature = {"temperature": two.temperature}
        return fused_token_loss(
            loss_fn, hidden, head, two.token_ids, *reference(two), **temperature, per_token=per_token
        )  # fmt: skip

    return fn


def dense_loss(two, loss_fn, per_token=()):
    return lambda *leaves: loss_fn(dense_scores(two, *leaves), *per_token)


def mix(scores):
    return 1.3 * scores.logp - 0.4 * scores.entropy + 0.7 * scores.reverse_kl + 2 * scores.forward_kl


def masked_mix(scores, mask):
    return torch.where(mask, mix(scores), 0.0).sum()


# The three functions as one scalar of the policy's tensors, over the tokens that count: ours, dense.
def our_total(function, two, mask):
    if function == "linear_divergence":
        return lambda *leaves: torch.where(mask, our_divergence(two, "reverse_kl")(*leaves), 0.0).sum()
    if function == "token_scores":
        return lambda *leaves: masked_mix(our_scores(two, *leaves), mask)
    return our_loss(two, masked_mix, (mask,))


def dense_total(function, two):
    if function == "linear_divergence":
        return lambda *leaves: dense_divergence(two, "reverse_kl")(*leaves).sum()
    return lambda *leaves: mix(dense_scores(two, *leaves)).sum()


def all_tokens(two):
    return torch.ones(len(two.hidden), dtype=torch.bool)


every_function = pytest.mark.parametrize("function", ["linear_divergence", "token_scores", "fused_token_loss"])


def clipped_ratio(scores, old_logp, advantages, keep):
    ratio = (torch.where(keep, scores.logp, old_logp) - old_logp).exp()  # masked before exp: 0 * NaN is NaN
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return torch.where(keep, surrogate + 0.3 * scores.reverse_kl, 0.0).sum()


def k3(scores, *_):
    log_r = scores.ref_logp - scores.logp
    return (log_r.exp() - 1 - log_r).sum()


LOSSES = {
    "reverse_kl": lambda s, *_: s.reverse_kl.sum(),
    "clipped_ratio": clipped_ratio,
    "k3": k3,
    "entropy_bonus": lambda s, old, advantages, *_: -(s.logp * advantages).sum() - 0.01 * s.entropy.sum(),
    "constants_as_weights": lambda s, *_: (s.forward_kl * s.ref_logp / (1 + s.ref_entropy)).sum(),
    "products_of_scores": lambda s, *_: (s.entropy * s.forward_kl.square() + s.logp * s.reverse_kl).sum(),
}
