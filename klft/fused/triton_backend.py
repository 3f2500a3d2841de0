"""What is done to a tile of logits, as Triton kernels: the functions of klft.fused.torch_backend, for fp32 on a GPU.

One program folds one row [v] of a tile, block after block of columns, each lane in fp32 in a fixed order: no atomics,
so a run repeats itself to the bit. Reading is what it costs: the log-sum-exp and all exact sums take one pass each.
A `where` is free here, so suppressed tokens (-inf) have their limits in the kernels.

It has run in Triton's interpreter only (TRITON_INTERPRET=1), and been compiled for sm_90, never yet run on a GPU. Hence
no block size is tuned. Kernels keep to operations that are the same in the interpreter and in the compiler (no
libdevice), and to comparisons that are false for NaN, which thereby reaches the result. Tiles that are not fp32, or
whose columns lie apart, go to torch_backend.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klft.fused import torch_backend

BLOCK, WARPS = 2048, 8  # columns at once, and who works on them: 16-byte loads, two of them in flight in each thread


@triton.jit
def _fold(z, v, BLOCK: tl.constexpr):
    """A row's running maximum m and sum of exp(z - m), by lane; with one exp for each logit."""
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(z + columns, mask=columns < v, other=float("-inf"))
        higher = x > m
        e = tl.exp(tl.where(x == m, 0.0, tl.where(higher, m - x, x - m)))
        s = tl.where(higher, s * e + 1.0, s + e)
        m = tl.where(higher, x, m)
    return m, s


@triton.jit
def _log_sum_exp(z, out, stride, v, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m, s = _fold(z + row * stride, v, BLOCK)  # pyright: ignore
    top = tl.max(m)
    tl.store(out + row, top + tl.log(tl.sum(s * tl.exp(tl.where(m == top, 0.0, m - top)))))


@triton.jit
def _log_softmax(z, stride, v, BLOCK: tl.constexpr):
    z += tl.program_id(0).to(tl.int64) * stride
    m, s = _fold(z, v, BLOCK)  # pyright: ignore
    top = tl.max(m)
    rest = tl.log(tl.sum(s * tl.exp(m - top)))
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(z + columns, mask=columns < v)
        # Subtracted apart: top + rest has lost the digits of `rest` where logits are large.
        tl.store(z + columns, x - top - rest, mask=columns < v)


@triton.jit
def _exact_sums(
    lp, lq, out, p_stride, q_stride, v,
    ENTROPY: tl.constexpr, REF_ENTROPY: tl.constexpr, REVERSE: tl.constexpr, FORWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lp += row * p_stride
    entropy = tl.zeros([BLOCK], tl.float32)
    ref_entropy = tl.zeros([BLOCK], tl.float32)
    reverse = tl.zeros([BLOCK], tl.float32)
    forward = tl.zeros([BLOCK], tl.float32)
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        lp_here = tl.load(lp + columns, mask=columns < v, other=float("-inf"))
        p = tl.exp(lp_here)
        if ENTROPY:
            entropy -= tl.where(p == 0, 0.0, p * lp_here)
        if REF_ENTROPY or REVERSE or FORWARD:
            lq_here = tl.load(lq + row * q_stride + columns, mask=columns < v, other=float("-inf"))
            q = tl.exp(lq_here)
            if REF_ENTROPY:
                ref_entropy -= tl.where(q == 0, 0.0, q * lq_here)
            # The gaps of klft.divergences, each >= 0 and exactly 0 for lp == lq. Where both are -inf, x is NaN and so
            # not near, and p = q = 0 make it 0.
            x = lq_here - lp_here
            near = (x >= -1) & (x <= 1)
            g = 1 / 362880 + x * (1 / 3628800 + x * (1 / 39916800))
            g = 1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x * g))
            g = x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * g))))  # (exp(x) - 1 - x) / x
            if REVERSE:
                term = tl.where(near, p * (x * g), (q - p) - tl.where(p == 0, 0.0, p * x))
                reverse += tl.where(term < 0, 0.0, term)  # below 0 by rounding only, far down in the tail
            if FORWARD:
                term = tl.where(near, p * (x * (x + x * g - g)), (p - q) + tl.where(q == 0, 0.0, q * x))
                forward += tl.where(term < 0, 0.0, term)
    out += row
    n = tl.num_programs(0)
    if ENTROPY:
        tl.store(out, tl.sum(entropy))
        out += n
    if REF_ENTROPY:
        tl.store(out, tl.sum(ref_entropy))
        out += n
    if REVERSE:
        tl.store(out, tl.sum(reverse))
        out += n
    if FORWARD:
        tl.store(out, tl.sum(forward))


@triton.jit
def _gradient(lp, lq, a, b, c, d, p_stride, q_stride, v, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = columns < v
    lp += row * p_stride
    lp_here = tl.load(lp + columns, mask=here, other=float("-inf"))
    p = tl.exp(lp_here)
    inner = tl.load(a + row)
    if b is not None:
        inner += tl.load(b + row) * lp_here
    if c is not None:
        inner += tl.load(c + row) * (tl.load(lq + row * q_stride + columns, mask=here, other=0.0) - lp_here)
    gradient = tl.where(p == 0, 0.0, p * inner)
    if d is not None:
        gradient -= tl.load(d + row) * tl.exp(tl.load(lq + row * q_stride + columns, mask=here, other=0.0))
    tl.store(lp + columns, gradient, mask=here)


INTERPRETED = not isinstance(_fold, triton.JITFunction)


def _launch(kernel, grid: tuple[int, ...], tile: Tensor, *args, **constants) -> None:
    with torch.cuda.device_of(tile):  # Triton would launch on the current device
        kernel[grid](tile, *args, **constants, BLOCK=BLOCK, num_warps=WARPS)


def _fit(*tiles: Tensor | None) -> bool:
    return all(t is None or (t.dtype == torch.float32 and t.stride(1) == 1) for t in tiles)


def log_sum_exp(z: Tensor) -> Tensor:
    """[n, v] -> [n]; -inf for no rows at all."""
    if not _fit(z):
        return torch_backend.log_sum_exp(z)
    out = z.new_full((len(z),), -torch.inf)
    if z.numel():
        _launch(_log_sum_exp, (len(z),), z, out, z.stride(0), z.shape[1])
    return out


def log_softmax_(z: Tensor) -> None:
    """Logits -> log-probabilities, in place; read twice, written once."""
    if not _fit(z):
        torch_backend.log_softmax_(z)
    elif z.numel():
        _launch(_log_softmax, (len(z),), z, z.stride(0), z.shape[1])


def subtract_(z: Tensor, rows: Tensor) -> None:
    """z - rows[:, None], in place; torch's own kernel reads and writes once."""
    torch_backend.subtract_(z, rows)


def exact_sums(lp: Tensor, lq: Tensor | None, names: tuple[str, ...]) -> Tensor:
    """[len(names), n]: this part's sums over the vocabulary, of entropy, ref_entropy, reverse_kl, forward_kl.

    lp, lq [n, v] are log-probabilities. Names in that order. >= 0; a token that neither model can say adds nothing, one
    that the other model cannot say makes its KL +inf.
    """
    if not _fit(lp, lq):
        return torch_backend.exact_sums(lp, lq, names)
    out = lp.new_zeros(len(names), len(lp))
    if lp.numel():
        wanted = (name in names for name in ("entropy", "ref_entropy", "reverse_kl", "forward_kl"))
        q_stride = 0 if lq is None else lq.stride(0)
        _launch(_exact_sums, (len(lp),), lp, lq, out, lp.stride(0), q_stride, lp.shape[1], *wanted)
    return out


def gradient_(lp: Tensor, lq: Tensor | None, a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None) -> None:
    """lp <- p * (a + b * lp + c * (lq - lp)) - d * q, in place; a, b, c, d [n], None where nothing asks for it.

    0 - d * q where p is 0, whatever the bracket would be.
    """
    if not _fit(lp, lq):
        torch_backend.gradient_(lp, lq, a, b, c, d)
    elif lp.numel():
        factors = [None if t is None else t.contiguous() for t in (a, b, c, d)]
        q_stride = 0 if lq is None else lq.stride(0)
        grid = (len(lp), -(-lp.shape[1] // BLOCK))
        _launch(_gradient, grid, lp, lq, *factors, lp.stride(0), q_stride, lp.shape[1])
