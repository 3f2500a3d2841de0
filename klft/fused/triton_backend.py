"""The elementwise work of a vocabulary block as Triton kernels: the functions of klft.fused.torch_backend, on a GPU.

The vocabulary block is the whole tile here. One program reduces one token's row [v], BLOCK columns at a time, each lane
in fp32 in a fixed order: no atomics, so a run repeats itself to the bit. The cost is reading: once for the
log-sum-exp, once for all exact sums.
A `where` is free here, so suppressed tokens (-inf) have their limits in the kernels.

Measured on an H200 (benchmarks/README.md): each kernel moves its bytes at the card's bandwidth, and no block size from
1024 to 4096 with 4 to 16 warps is better by 3 %. Kernels keep to operations that are the same in the interpreter and in
the compiler (no libdevice), and to comparisons that are false for NaN, which thereby reaches the result. Tiles are
contiguous and fp32; a plan in float64 takes torch_backend.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from klft.fused.torch_backend import Coefficients, Norm, Workspace

VOCAB_MAJOR = False
SHIFTS = False  # a pass over the tile less: readers subtract the row max as they go
KNOWS_LIMITS = True
BLOCK, WARPS = 2048, 8  # columns per iteration, warps per program: 16-byte loads, two in flight in each thread


@triton.jit
def _row_max_and_sum(z, v, BLOCK: tl.constexpr):
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
def _max_and_sum(z, row_max, sum_exp, stride, v, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    m, s = _row_max_and_sum(z, v, BLOCK)  # pyright: ignore
    top = tl.max(m)
    rest = tl.sum(s * tl.exp(tl.where(m == top, 0.0, m - top)))
    # Nothing finite: 0 is subtracted, and the sum is 0 (only -inf, each counted as one above), infinite or NaN.
    rest = tl.where(top == float("-inf"), rest * 0.0, tl.where(top == float("inf"), rest + float("inf"), rest))
    top = tl.where(top - top == 0, top, 0.0)
    tl.store(row_max + row, top)
    tl.store(sum_exp + row, rest)


@triton.jit
def _exact_sums(
    z, y, top, log, ref_top, ref_log, out, z_stride, y_stride, v,
    ENTROPY: tl.constexpr, REF_ENTROPY: tl.constexpr, REVERSE: tl.constexpr, FORWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    top_here, log_here = tl.load(top + row), tl.load(log + row)
    if REF_ENTROPY or REVERSE or FORWARD:
        ref_top_here, ref_log_here = tl.load(ref_top + row), tl.load(ref_log + row)
    entropy = tl.zeros([BLOCK], tl.float32)
    ref_entropy = tl.zeros([BLOCK], tl.float32)
    reverse = tl.zeros([BLOCK], tl.float32)
    forward = tl.zeros([BLOCK], tl.float32)
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        # In this order: the difference from the maximum is as exact for logits of 1e4 as for logits of 1.
        lp_here = (tl.load(z + columns, mask=columns < v, other=float("-inf")) - top_here) - log_here
        p = tl.exp(lp_here)
        if ENTROPY:
            entropy -= tl.where(p == 0, 0.0, p * lp_here)
        if REF_ENTROPY or REVERSE or FORWARD:
            y_here = tl.load(y + row * y_stride + columns, mask=columns < v, other=float("-inf"))
            lq_here = (y_here - ref_top_here) - ref_log_here
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
def _gradient(
    z, y, out, top, log, ref_top, ref_log, a, b, c, d, ids, of_id, z_stride, y_stride, out_stride, v,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = columns < v
    z_here = tl.load(z + row * z_stride + columns, mask=here, other=float("-inf"))
    lp_here = (z_here - tl.load(top + row)) - tl.load(log + row)
    p = tl.exp(lp_here)
    inner = tl.load(a + row)
    if b is not None:
        inner += tl.load(b + row) * lp_here
    if c is not None or d is not None:
        y_here = tl.load(y + row * y_stride + columns, mask=here, other=0.0)
        lq_here = (y_here - tl.load(ref_top + row)) - tl.load(ref_log + row)
    if c is not None:
        inner += tl.load(c + row) * (lq_here - lp_here)
    gradient = tl.where(p == 0, 0.0, p * inner)
    if d is not None:
        gradient -= tl.load(d + row) * tl.exp(lq_here)
    if ids is not None:
        gradient += tl.where(columns == tl.load(ids + row), tl.load(of_id + row), 0.0)
    tl.store(out + row * out_stride + columns, gradient, mask=here)


INTERPRETED = not isinstance(_row_max_and_sum, triton.JITFunction)


def _launch(kernel, grid: tuple[int, ...], tile: Tensor, *args, **constants) -> None:
    with torch.cuda.device_of(tile):  # Triton would launch on the current device
        kernel[grid](tile, *args, **constants, BLOCK=BLOCK, num_warps=WARPS)


# ---- schedule -------------------------------------------------------------------------------------------------------


def workspaces(like: Tensor, block_logits: int) -> list[Workspace]:
    """One, without scratch memory: kernels write in place."""
    return [Workspace(like.device)]


def block_size(tokens: int, rows: int, block_logits: int) -> int:
    """All rows: a kernel goes through a tile as it is."""
    return max(1, rows)


def for_each_block(block_fn: Callable[[int, Workspace], None], blocks: int, spaces: list[Workspace]) -> None:
    """block_fn(i, workspace) for i in range(blocks)."""
    with torch.autocast(spaces[0].device.type, enabled=False):
        for i in range(blocks):
            block_fn(i, spaces[0])


# ---- a block --------------------------------------------------------------------------------------------------------


def max_and_sum_(z: Tensor, row_max: Tensor, sum_exp: Tensor, workspace: Workspace) -> None:
    """Into row_max [n]: the row max of z (0 where not finite); into sum_exp [n]: sum of exp(z - row_max)."""
    if z.numel():
        _launch(_max_and_sum, (len(z),), z, row_max, sum_exp, z.stride(0), z.shape[1])
    else:
        row_max.zero_()
        sum_exp.zero_()


def exact_sums(z: Tensor, y: Tensor, norm: Norm, names: tuple[str, ...], out: Tensor, workspace: Workspace) -> None:
    """The block's sums of entropy, ref_entropy, reverse_kl, forward_kl (`names`, in that order) into out [names, 2, n].

    out[:, 1] is 0. >= 0; a token that neither model can say adds nothing, one that the other model cannot say makes its
    KL +inf.
    """
    out.zero_()
    if z.numel():
        sums = out.new_empty(len(names), len(z))
        wanted = (name in names for name in ("entropy", "ref_entropy", "reverse_kl", "forward_kl"))
        strides = z.stride(0), y.stride(0)
        _launch(_exact_sums, (len(z),), z, y, *_normalisers(norm), sums, *strides, z.shape[1], *wanted)
        out[:, 0] = sums


def combine_sums(parts: Tensor, norm: Norm, names: tuple[str, ...]) -> Tensor:
    """[K, names, 2, n] of exact_sums -> [names, n], summed over blocks."""
    return parts[:, :, 0].sum(0)


def gradient_factors(norm: Norm, coefficients: Coefficients) -> list[tuple[Norm, Coefficients]]:
    """(norm, coefficients) of every block."""
    return [(each, coefficients) for each in norm.by_block()]


def one_hots(token_ids: Tensor, g: Tensor, vocab_blocks: list[slice]) -> list[tuple[Tensor, Tensor]]:
    """Of every block: (rows of the block [n], others are tokens without one; g [n])."""
    return [(token_ids - rows.start, g.contiguous()) for rows in vocab_blocks]


def gradient(
    z: Tensor,
    y: Tensor,
    factors: tuple[Norm, Coefficients],
    one_hot: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
    workspace: Workspace,
) -> Tensor:
    """The block's logit gradient [n, rows], see Coefficients: -of_ref * q where p is 0. In z's memory if in fp32."""
    norm, coefficients = factors
    out = z if dtype == z.dtype else torch.empty_like(z, dtype=dtype)
    if z.numel():
        per_token = (*coefficients, *(one_hot or (None, None)))
        per_token: Any = [None if t is None else t.contiguous() for t in per_token]
        grid, strides = (len(z), -(-z.shape[1] // BLOCK)), (z.stride(0), y.stride(0), out.stride(0))
        _launch(_gradient, grid, z, y, out, *_normalisers(norm), *per_token, *strides, z.shape[1])
    return out


def _normalisers(norm: Norm) -> list[Tensor]:
    tensors: Any = (norm.row_max, norm.log_z, norm.ref_row_max, norm.ref_log_z)
    return [t.contiguous() for t in tensors]
