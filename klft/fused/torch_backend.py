"""What is done to a tile of logits, in torch operations.

A tile is [n, v]: n tokens against the rows of the vocabulary that live here. Work goes by blocks of rows that stay in
a CPU's cache, where an addition costs a tenth of a nanosecond and a `where` ten times that: so no `where` here. What
is not finite (a suppressed token) is left to the guarded rows of klft.divergences, token by token.
"""

import torch
from torch import Tensor

from klft.divergences import BLOCK

# Not smaller: an operation this short waits for its threads more than it works as soon as the machine has anything else
# to do. Not larger: the intermediate results leave the cache.
CPU_BLOCK = 1 << 19
E = 2.718281828459045
# Of 2 (exp(x) - 1 - x) / x^2 on [-1, 1]: each coefficient over the one before. In fp64 Taylor's; in fp32 those of the
# Chebyshev interpolant of degree 7, whose relative error is 6e-9: two passes fewer.
EXACT_RATIOS = [1 / k for k in range(3, 20)]
RATIOS = [
    0.333333333004, 0.250000421361, 0.199999949992, 0.166624500792, 0.142862243531, 0.127835166005, 0.110915020715,
]  # fmt: skip


def _step(tile: Tensor) -> int:
    return max(1, (CPU_BLOCK if tile.device.type == "cpu" else BLOCK) // max(1, tile.shape[1]))


def blocks(tile: Tensor):
    """Slices of rows, each about one cache's worth."""
    return (slice(start, start + _step(tile)) for start in range(0, len(tile), _step(tile)))


def _scratch(tile: Tensor, count: int) -> Tensor:
    """Room for `count` intermediate results of a block. Fresh memory for each would cost more than the arithmetic."""
    return tile.new_empty(count, min(_step(tile), len(tile)), tile.shape[1])


def log_sum_exp(z: Tensor) -> Tensor:
    """[n, v] -> [n]; -inf for no rows at all."""
    parts = [z[rows].logsumexp(-1) for rows in blocks(z)]
    return torch.cat(parts) if parts else z.new_zeros(0)


def log_softmax_(z: Tensor) -> None:
    """Logits -> log-probabilities, in place."""
    torch.log_softmax(z, -1, out=z)


def subtract_(z: Tensor, rows: Tensor) -> None:
    """z - rows[:, None], in place."""
    z.sub_(rows[:, None])


def _gap_over(x: Tensor, out: Tensor) -> Tensor:
    """(exp(x) - 1 - x) / x for |x| <= 1, to the last digit of its type: nested, (x/2) * (1 + r1 x (1 + r2 x (...)))."""
    ratios = EXACT_RATIOS if x.dtype == torch.float64 else RATIOS
    one = x.new_ones(())
    torch.addcmul(one, x, one, value=ratios[-1], out=out)
    for ratio in ratios[-2::-1]:
        torch.addcmul(one, x, out, value=ratio, out=out)
    return out.mul_(x).mul_(0.5)


def _gaps(p: Tensor, q: Tensor, x: Tensor, names: tuple[str, ...], room: Tensor) -> list[Tensor]:
    """Sums of the Bregman gaps p * (e^x - 1 - x) and q * (e^-x - 1 + x), x = log(q/p), [n, v] -> [n] each.

    Each term is >= 0 and accurate for x near 0. Past |x| = 1 what is left is added from differences that no longer
    cancel: `above` and `below` are 0 for |x| <= 1, and so is x - clamp(x).
    """
    near = torch.clamp(x, -1, 1, out=room[0])
    g = _gap_over(near, room[1])
    beyond = x.sub_(near)
    above = torch.sub(q, p, alpha=E, out=room[2]).relu_()
    below = torch.sub(q, p, alpha=1 / E, out=room[3]).clamp_max_(0)
    sums = []
    if "reverse_kl" in names:
        reverse = torch.mul(g, near, out=room[4]).sub_(beyond).mul_(p).add_(above).add_(below)
        sums.append(reverse.sum(-1))
    if "forward_kl" in names:
        # With g = gap(x)/x: 1 - e^x + x e^x = x * (x + x g - g).
        forward = torch.addcmul(near, near, g, out=room[4]).sub_(g).mul_(near).mul_(p)
        sums.append(forward.addcmul_(q, beyond).sub_(below, alpha=2).sum(-1))
    return sums


def exact_sums(lp: Tensor, lq: Tensor | None, names: tuple[str, ...]) -> Tensor:
    """[len(names), n]: this part's sums over the vocabulary, of entropy, ref_entropy, reverse_kl, forward_kl.

    lp, lq [n, v] are log-probabilities. Names in that order. Not finite where a log-probability is -inf.
    """
    sums = lp.new_zeros(len(names), len(lp))
    kls = tuple(name for name in names if name.endswith("_kl"))
    scratch = _scratch(lp, 8 if kls else 2)
    for rows in blocks(lp):
        found, room = [], scratch[:, : len(lp[rows])]
        p = torch.exp(lp[rows], out=room[0])
        if "entropy" in names:
            found.append(torch.mul(p, lp[rows], out=room[1]).sum(-1).neg_())
        if lq is not None and "ref_entropy" in names:
            found.append(torch.exp(lq[rows], out=room[1]).mul_(lq[rows]).sum(-1).neg_())
        if lq is not None and kls:
            q, x = torch.exp(lq[rows], out=room[1]), torch.sub(lq[rows], lp[rows], out=room[2])
            found += _gaps(p, q, x, kls, room[3:])
        sums[:, rows] = torch.stack(found)
    return sums


def gradient_(lp: Tensor, lq: Tensor | None, a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None) -> None:
    """lp <- p * (a + b * lp + c * (lq - lp)) - d * q, in place; a, b, c, d [n], None where nothing asks for it."""
    scratch = _scratch(lp, 3)
    for rows in blocks(lp):
        z, inner = lp[rows], None
        p, first, second = scratch[:, : len(z)]
        torch.exp(z, out=p)
        # Rows are multiplied and added one after the other: addcmul with such factors leaves the fast path.
        if c is not None:
            assert lq is not None
            inner = torch.sub(lq[rows], z, out=first).mul_(c[rows, None])
        if b is not None:
            term = torch.mul(z, b[rows, None], out=second)
            inner = term if inner is None else inner.add_(term)
        torch.mul(p, a[rows, None] if inner is None else inner.add_(a[rows, None]), out=z)
        if d is not None:
            assert lq is not None
            z.sub_(torch.exp(lq[rows], out=first).mul_(d[rows, None]))
