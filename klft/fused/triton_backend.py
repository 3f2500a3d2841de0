"""What is done to a slice of logits, as Triton kernels: the functions of klft.fused.torch_backend, for fp32 on a GPU.

A slice is a whole tile here. One program folds one row [v] of it, block after block of columns, each lane in fp32 in a
fixed order: no atomics, so a run repeats itself to the bit. Reading is what it costs: twice for the log-sum-exp, once
for all exact sums.
A `where` is free here, so suppressed tokens (-inf) have their limits in the kernels.

It has run in Triton's interpreter only (TRITON_INTERPRET=1), and been compiled for sm_90, never yet run on a GPU. Hence
no block size is tuned. Kernels keep to operations that are the same in the interpreter and in the compiler (no
libdevice), and to comparisons that are false for NaN, which thereby reaches the result. Tiles that are not fp32, or
whose columns lie apart, go to torch_backend.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from klft.fused import torch_backend
from klft.fused.torch_backend import Norm

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
def _subtract_peak(z, peak, total, stride, v, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    m, s = _fold(z, v, BLOCK)  # pyright: ignore
    top = tl.max(m)
    rest = tl.sum(s * tl.exp(tl.where(m == top, 0.0, m - top)))
    # Nothing finite: 0 is subtracted, and the sum is 0 (only -inf, each counted as one above), infinite or NaN.
    rest = tl.where(top == float("-inf"), rest * 0.0, tl.where(top == float("inf"), rest + float("inf"), rest))
    top = tl.where(top - top == 0, top, 0.0)
    tl.store(peak + row, top)
    tl.store(total + row, rest)
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(z + columns, tl.load(z + columns, mask=columns < v) - top, mask=columns < v)


@triton.jit
def _exact_sums(
    z, y, log, ref_log, out, z_stride, y_stride, v,
    ENTROPY: tl.constexpr, REF_ENTROPY: tl.constexpr, REVERSE: tl.constexpr, FORWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    log_here = tl.load(log + row)
    if REF_ENTROPY or REVERSE or FORWARD:
        ref_log_here = tl.load(ref_log + row)
    entropy = tl.zeros([BLOCK], tl.float32)
    ref_entropy = tl.zeros([BLOCK], tl.float32)
    reverse = tl.zeros([BLOCK], tl.float32)
    forward = tl.zeros([BLOCK], tl.float32)
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        lp_here = tl.load(z + columns, mask=columns < v, other=float("-inf")) - log_here
        p = tl.exp(lp_here)
        if ENTROPY:
            entropy -= tl.where(p == 0, 0.0, p * lp_here)
        if REF_ENTROPY or REVERSE or FORWARD:
            lq_here = tl.load(y + row * y_stride + columns, mask=columns < v, other=float("-inf")) - ref_log_here
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
def _gradient(z, y, log, ref_log, a, b, c, d, z_stride, y_stride, v, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = columns < v
    z += row * z_stride
    lp_here = tl.load(z + columns, mask=here, other=float("-inf")) - tl.load(log + row)
    p = tl.exp(lp_here)
    inner = tl.load(a + row)
    if b is not None:
        inner += tl.load(b + row) * lp_here
    if c is not None or d is not None:
        lq_here = tl.load(y + row * y_stride + columns, mask=here, other=0.0) - tl.load(ref_log + row)
    if c is not None:
        inner += tl.load(c + row) * (lq_here - lp_here)
    gradient = tl.where(p == 0, 0.0, p * inner)
    if d is not None:
        gradient -= tl.load(d + row) * tl.exp(lq_here)
    tl.store(z + columns, gradient, mask=here)


INTERPRETED = not isinstance(_fold, triton.JITFunction)


def _launch(kernel, grid: tuple[int, ...], tile: Tensor, *args, **constants) -> None:
    with torch.cuda.device_of(tile):  # Triton would launch on the current device
        kernel[grid](tile, *args, **constants, BLOCK=BLOCK, num_warps=WARPS)


def _fit(*tiles: Tensor) -> bool:
    return all(t.dtype == torch.float32 and t.stride(1) == 1 for t in tiles)


def fold_(z: Tensor, peak: Tensor, total: Tensor, room: Tensor | None) -> None:
    """z less its peak, in place. Into peak [n]: that (0 where it is not finite); into total [n]: the sum of exp(z)."""
    if not _fit(z):
        torch_backend.fold_(z, peak, total, room)
    elif z.numel():
        _launch(_subtract_peak, (len(z),), z, peak, total, z.stride(0), z.shape[1])
    else:
        peak.zero_()
        total.zero_()


def exact_sums(
    zs: Sequence[Tensor], ys: Sequence[Tensor], norm: Norm, names: tuple[str, ...], room: Tensor | None
) -> Tensor:
    """[len(names), n]: the slice's sums of entropy, ref_entropy, reverse_kl, forward_kl, names in that order.

    >= 0; a token that neither model can say adds nothing, one that the other model cannot say makes its KL +inf.
    """
    (z,), (y,) = zs, ys
    if not _fit(z, y):
        return torch_backend.exact_sums(zs, ys, norm, names, room)
    out = z.new_zeros(len(names), len(z))
    if z.numel():
        wanted = (name in names for name in ("entropy", "ref_entropy", "reverse_kl", "forward_kl"))
        _launch(_exact_sums, (len(z),), z, y, *_logs(norm), out, z.stride(0), y.stride(0), z.shape[1], *wanted)
    return out


def gradients(
    zs: Sequence[Tensor], ys: Sequence[Tensor], norm: Norm,
    a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, room: Tensor | None,
) -> Iterator[Tensor]:  # fmt: skip
    """The slice's p * (a + b * lp + c * (lq - lp)) - d * q [n, v], in its own place; a, b, c, d [n], None for 0.

    0 - d * q where p is 0, whatever the bracket would be.
    """
    (z,), (y,) = zs, ys
    if not _fit(z, y):
        yield from torch_backend.gradients(zs, ys, norm, a, b, c, d, room)
        return
    if z.numel():
        factors = [None if t is None else t.contiguous() for t in (a, b, c, d)]
        grid = (len(z), -(-z.shape[1] // BLOCK))
        _launch(_gradient, grid, z, y, *_logs(norm), *factors, z.stride(0), y.stride(0), z.shape[1])
    yield z


def _logs(norm: Norm) -> list[Tensor]:
    return [norm.log[0].contiguous(), norm.ref_log[0].contiguous()]
