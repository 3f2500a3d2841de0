"""The kernels of klft.fused's two backends, one call each, and fp32 tiles for them."""

import math
from contextlib import contextmanager

import torch

from klft.fused.torch_backend import Coefficients, Norm, Workspace

INF, NAN = math.inf, math.nan
NAMES = ("entropy", "ref_entropy", "reverse_kl", "forward_kl")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # a GPU's exp(x) is off by |x| roundings
EDGE = 7.5  # what stands beside a tile in its buffer


def kernels():
    from klft.fused import triton_backend

    return triton_backend


@contextmanager
def replaced(owner, name, value):
    """An attribute, or an item of a dictionary, for a while."""
    get, put = (dict.get, dict.__setitem__) if isinstance(owner, dict) else (getattr, setattr)
    before = get(owner, name)
    put(owner, name, value)
    try:
        yield
    finally:
        put(owner, name, before)


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


def norm_of(log_z, ref_log_z, row_max=None, ref_row_max=None):
    """Of one block whose logits, less their row max, have these log-sum-exps [n], as a Norm."""
    zero = torch.zeros_like(log_z)
    left = (zero if row_max is None else row_max, zero if ref_row_max is None else ref_row_max)
    return Norm(log_z, torch.exp(-log_z), ref_log_z, torch.exp(-ref_log_z), ref_log_z - log_z, *left)


def unnormed(lp):
    """The Norm of log-probabilities."""
    zero = lp.new_zeros(len(lp))
    return norm_of(zero, zero)


def of_all_blocks(norm):
    """A Norm [1, n] of the only block there is."""
    return Norm(*(t[None] for t in norm))


def sums_by(backend, z, y, names, norm=None):
    norm, parts = norm or unnormed(z), torch.full((1, len(names), 2, len(z)), EDGE, dtype=z.dtype, device=z.device)
    backend.exact_sums(z, y, norm, names, parts[0], Workspace(z.device))
    return backend.combine_sums(parts, of_all_blocks(norm), names)


def gradient_by(backend, z, y, a, b=None, c=None, d=None, norm=None, of_id=None, dtype=torch.float32):
    """of_id: (token ids [n], their g [n]) of logp's one-hot."""
    (factors,) = backend.gradient_factors(of_all_blocks(norm or unnormed(z)), Coefficients(a, b, c, d))
    one_hot = None if of_id is None else backend.one_hots(*of_id, [slice(0, z.shape[1])])[0]
    return backend.gradient(z, y, factors, one_hot, dtype, Workspace(z.device))


def max_and_sum(backend, z):
    """(row max, sum of exp(z - row max)); torch_backend shifts z in place."""
    row_max, sum_exp = torch.full((2, len(z)), EDGE, dtype=z.dtype, device=z.device)
    backend.max_and_sum_(z, row_max, sum_exp, Workspace(z.device))
    return row_max, sum_exp


def norm_by_kernels(z, y):
    """The Norm of a block of logits, made by the Triton kernels."""
    (top, total), (ref_top, ref_total) = (max_and_sum(kernels(), t) for t in (z, y))
    return norm_of(total.log(), ref_total.log(), top, ref_top)
