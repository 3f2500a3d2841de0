"""What is done to a slice of logits, in torch operations.

A slice is z [n, v]: n tokens against a few rows of the vocabulary, few enough to stay in a CPU's cache, where an
addition costs a tenth of a nanosecond and a `where` ten times that: so no `where` here. What is not finite (a
suppressed token), or too far apart for these formulas, is left to the guarded rows of klft.divergences, token by token.

Logits are kept less their slice's peak, and never rewritten: `Norm` says what makes log-probabilities of them. Threads
take turns at Python, so a slice costs few calls, and what is of the size of its tokens is done for many slices at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOM = 4  # intermediate results of the size of a slice: fresh memory for each would cost more than the arithmetic
FAR = 60.0  # past it, p * exp(log(q/p)) has lost the digits of a p that is hardly a number any more


class Norm(NamedTuple):
    """What makes probabilities of k slices' z and y, [k, n] each.

    lp = z - log, p = weight * exp(z); lq = y - ref_log, q = ref_weight * exp(y); lq - lp = (y - z) - apart, which says
    what two of the others say with one rounding instead of two.
    """

    log: Tensor
    weight: Tensor
    ref_log: Tensor
    ref_weight: Tensor
    apart: Tensor


def _scratch(slices: Sequence[Tensor], room: Tensor | None, count: int) -> Iterator[list[Tensor]]:
    """For each slice in turn `count` tensors like it; from room [ROOM, numbers] where there is one."""
    made: list[Tensor] = []
    for z in slices:
        if not made or made[0].shape != z.shape:
            if room is None:
                made = [torch.empty_like(z) for _ in range(count)]
            else:
                made = [t[: z.numel()].view(z.shape[::-1]).t() for t in room[:count]]
        yield made


def _columns(t: Tensor | None) -> Iterable[Any]:
    """[k, n] -> k times [n, 1]."""
    return repeat(None) if t is None else t[:, :, None].unbind(0)


def fold_(z: Tensor, peak: Tensor, total: Tensor, room: Tensor | None) -> None:
    """z less its peak, in place. Into peak [n]: that (0 where it is not finite); into total [n]: the sum of exp(z)."""
    if z.shape[1] == 0:
        peak.zero_()
        total.zero_()
        return
    torch.amax(z, -1, out=peak)
    z.sub_(peak.nan_to_num_(0.0, 0.0, 0.0)[:, None])
    ((e,),) = _scratch([z], room, 1)
    torch.sum(torch.exp(z, out=e), -1, out=total)


def _gap_sum(p: Tensor, x: Tensor, room: Tensor, total: Tensor, far: Tensor) -> None:
    """Into total [n]: sum of the Bregman gaps p * (e^x - 1 - x), each >= 0 (less than that by rounding only)."""
    torch.sum(torch.expm1(x, out=room).sub_(x).mul_(p).relu_(), -1, out=total)
    torch.amax(x, -1, out=far)


def exact_sums(
    zs: Sequence[Tensor], ys: Sequence[Tensor], norm: Norm, names: tuple[str, ...], room: Tensor | None
) -> Tensor:
    """[len(names), n]: these slices' sums of entropy, ref_entropy, reverse_kl, forward_kl, names in that order.

    Not finite where the guarded rows have to see to it.
    """
    k, n = norm.log.shape
    if zs[0].shape[1] == 0:
        return norm.log.new_zeros(len(names), n)
    of = {name: norm.log.new_empty(2, k, n) for name in names}
    slices = zip(zs, ys, _columns(norm.apart), _scratch(zs, room, 4), strict=True)
    for j, (z, y, apart, (p, q, x, e)) in enumerate(slices):
        torch.exp(z, out=p)
        if "ref_entropy" in names or "forward_kl" in names:
            torch.exp(y, out=q)
        for name, w, lw in (("entropy", p, z), ("ref_entropy", q, y)):
            if name in names:
                # -sum w * (lw - log): both sums have one sign.
                torch.sum(w, -1, out=of[name][0, j])
                torch.sum(torch.mul(w, lw, out=e), -1, out=of[name][1, j])
        if "reverse_kl" in names or "forward_kl" in names:
            torch.sub(y, z, out=x).sub_(apart)
        if "reverse_kl" in names:
            _gap_sum(p, x, e, *of["reverse_kl"][:, j])
        if "forward_kl" in names:
            _gap_sum(q, x.neg_(), e, *of["forward_kl"][:, j])
    found = []
    for name, (first, second) in of.items():
        of_reference = name in ("ref_entropy", "forward_kl")
        log, weight = (norm.ref_log, norm.ref_weight) if of_reference else (norm.log, norm.weight)
        if name.endswith("_kl"):
            found.append((first * weight).masked_fill_(second > FAR, torch.nan))
        else:
            found.append(first * (log * weight) - second * weight)  # log may be huge, and its weight 0
    return torch.stack(found).sum(1)


def gradients(
    zs: Sequence[Tensor], ys: Sequence[Tensor], norm: Norm,
    a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, room: Tensor | None,
) -> Iterator[Tensor]:  # fmt: skip
    """Each slice's p * (a + b * lp + c * (lq - lp)) - d * q [n, v] in turn, in memory that the next one takes.

    a, b, c, d [n], None where nothing asks for it.
    """
    # What is multiplied with a probability first: a log may be huge where its probability is 0.
    constant = a * norm.weight
    if b is not None:
        constant = constant - b * (norm.log * norm.weight)
    if c is not None:
        constant = constant - c * (norm.apart * norm.weight)
    # Rows are multiplied and added one after the other: addcmul with such factors leaves the fast path.
    factors = [None if t is None else t * norm.weight for t in (b, c)]
    columns = [_columns(t) for t in (constant, *factors, None if d is None else d * norm.ref_weight)]
    for z, y, aj, bj, cj, dj, (dz, one, other) in zip(zs, ys, *columns, _scratch(zs, room, 3), strict=False):
        torch.exp(z, out=dz)
        if bj is not None:
            torch.mul(z, dz, out=one).mul_(bj)
        if cj is not None:
            torch.sub(y, z, out=other).mul_(dz).mul_(cj)
        dz.mul_(aj)
        if bj is not None:
            dz.add_(one)
        if cj is not None:
            dz.add_(other)
        if dj is not None:
            dz.sub_(torch.exp(y, out=one).mul_(dj))
        yield dz
