"""Every divergence with the parameters it is tested at, logits to test it on, and the plain formulas."""

import pytest
import torch

import klft
from support import oracles

# name, parameters: every divergence, the parametric ones at an inner and at an awkward value.
ROWS = [
    ("reverse_kl", ()),
    ("forward_kl", ()),
    ("jsd", (0.5,)),
    ("jsd", (0.1,)),
    ("jsd", (0.93,)),
    ("skew_kl", (0.1,)),
    ("skew_kl", (0.8,)),
    ("skew_reverse_kl", (0.1,)),
    ("skew_reverse_kl", (0.8,)),
    ("alpha_divergence", (0.5,)),
    ("alpha_divergence", (2.0,)),
    ("alpha_divergence", (-1.0,)),
    ("renyi_divergence", (0.5,)),
    ("renyi_divergence", (2.0,)),
]
every_row = pytest.mark.parametrize(("name", "params"), ROWS, ids=[f"{n}{list(p) or ''}" for n, p in ROWS])
every_spread = pytest.mark.parametrize("spread", [1e-5, 1e-2, 1.0, 8.0])


def ours(name):
    return getattr(klft, name)


def logits_pair(*shape, spread=1.0, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, generator=gen, dtype=torch.float64)
    ref = logits + spread * torch.randn(*shape, generator=gen, dtype=torch.float64)
    return logits.to(dtype), ref.to(dtype)


def run(name, params, logits, ref, weight=None):
    return oracles.value_and_gradient(ours(name), logits, ref, *params, weight=weight)


def naive(name, logits, ref, *params):
    """The plain formula in the input's own precision."""
    lp, lq = torch.log_softmax(logits, -1), torch.log_softmax(ref, -1)
    p, q = lp.exp(), lq.exp()
    if name == "reverse_kl":
        return (p * (lp - lq)).sum(-1)
    if name == "forward_kl":
        return (q * (lq - lp)).sum(-1)
    if name == "jsd":
        (b,) = params
        lm = (b * q + (1 - b) * p).log()
        return (b * q * (lq - lm) + (1 - b) * p * (lp - lm)).sum(-1)
    (a,) = params
    if name == "skew_kl":
        return (q * (lq - (a * q + (1 - a) * p).log())).sum(-1)
    if name == "skew_reverse_kl":
        return (p * (lp - (a * p + (1 - a) * q).log())).sum(-1)
    mixed = (p**a * q ** (1 - a)).sum(-1)
    return (mixed - 1) / (a * (a - 1)) if name == "alpha_divergence" else mixed.log() / (a - 1)
