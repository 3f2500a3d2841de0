"""The kernels of klft.fused's two backends, one call each, and fp32 tiles for them."""

import math
from contextlib import contextmanager

import torch

from klft.fused.torch_backend import Norm

INF, NAN = math.inf, math.nan
NAMES = ("entropy", "ref_entropy", "reverse_kl", "forward_kl")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # a GPU's exp(x) is off by |x| roundings
EDGE = 7.5  # what stands beside a tile in its buffer


def kernels():
    from klft.fused import triton_backend

    return triton_backend


@contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def several_blocks():
    """1031 columns are then five blocks, the last a ragged one."""
    return replaced(kernels(), "BLOCK", 256)


def normal(n, v, seed=0, size=3.0):
    return size * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tile(values, device, more=1):
    """fp32, as rows of a wider buffer: (the tile, a function that says whether its neighbours are untouched)."""
    n, v = values.shape
    buffer = torch.full((n, v + 3 + more), EDGE, device=device)
    buffer[:, 3 : v + 3] = values.float()
    return buffer[:, 3 : v + 3], lambda: bool((buffer[:, :3] == EDGE).all() and (buffer[:, v + 3 :] == EDGE).all())


def log_probabilities(logits):
    return torch.log_softmax(logits, -1)


def close(found, truth, **tolerance):
    torch.testing.assert_close(found.double().cpu(), truth.double().cpu(), equal_nan=True, **(tolerance or CLOSE))


def norm_of(lse, ref_lse):
    """Of one slice whose logits have these log-sum-exps [n], as a Norm."""
    return Norm(*(t[None] for t in (lse, torch.exp(-lse), ref_lse, torch.exp(-ref_lse), ref_lse - lse)))


def sums_by(backend, lp, lq, names):
    zero = lp.new_zeros(len(lp))
    return backend.exact_sums([lp], [lq], norm_of(zero, zero), names, None)


def gradient_by(backend, lp, lq, a, b=None, c=None, d=None):
    zero = lp.new_zeros(len(lp))
    return next(backend.gradients([lp], [lq], norm_of(zero, zero), a, b, c, d, None))


def folded(backend, z):
    peak, total = torch.full((2, len(z)), EDGE, dtype=z.dtype, device=z.device)
    backend.fold_(z, peak, total, None)
    return peak, total
