"""Tiles: a chunk of tokens against both heads, and everything that is read off it or sent back through it.

`Problem` holds the two models' hidden states and heads and deals out tiles; a `Tile` holds the logits [n, rows of the
vocabulary that live here] and knows the collectives. Nothing larger than two tiles ever exists.

A tile is worked on slice by slice, a slice being a few rows of the vocabulary: logits, sums and gradients of one are
made while it is in the cache, by threads that have slices of their own. On a GPU slices are large, or the whole tile.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klft.divergences import DIVERGENCES, Divergence
from klft.fused.torch_backend import Norm

if TYPE_CHECKING:
    from klft.fused.plan import Problem

EXACT = ("entropy", "ref_entropy", "reverse_kl", "forward_kl")  # the order of exact_sums
DIFFERENTIABLE = ("logp", "entropy", "reverse_kl", "forward_kl")


class Tile:
    """n tokens' logits under both models, over the whole vocabulary, as far as its rows live here.

    `lse`: the log-sum-exps [2, models, n] (a peak, and the sum of exponentials that is left), if an earlier pass over
    these tokens has them; no collective is needed then.
    """

    def __init__(self, problem: "Problem", rows: slice, lse: Tensor | None = None):
        self.problem, self.shard, self.backend = problem, problem.shard, problem.backend
        self.hidden = [side.operand(problem.everyones(side.hidden[rows])) for side in problem.sides]
        self.ids = problem.everyones(problem.ids[rows]) - (0 if self.shard is None else self.shard.start)
        self.logits = [side.tile(len(self.ids), problem.sliced) for side in problem.sides]
        self.z, self.y = self.logits[0], self.logits[1] if problem.reference else None
        self.here = (self.ids >= 0) & (self.ids < self.z.shape[1])
        self.pieces = [t.split(problem.step, 1) for t in self.logits]
        shape = (len(problem.slices), len(self.logits), len(self.ids))
        self.peaks = self.z.new_empty(shape) if lse is None else lse[0].expand(shape)
        self.logp = self.ref_logp = None
        local = problem.each(lambda part, room: self._fold(part, room, lse is not None))
        self.lse = self._combine(_merge(torch.stack(local))) if lse is None else lse
        self.bad = self.here.new_zeros(len(self.ids)) if self.logp is None else ~self.logp.isfinite()
        self.values: dict[str, Tensor] = {}

    def _fold(self, part: range, room: Tensor | None, known: bool) -> Any:
        """Logits of some slices, each less its peak; their log-sum-exp [2, models, n], unless that is known."""
        peaks = self.peaks[part.start : part.stop]
        totals = torch.empty_like(peaks)
        for m, (side, hidden) in enumerate(zip(self.problem.sides, self.hidden, strict=True)):
            for i, peak, total in zip(part, peaks[:, m], totals[:, m], strict=True):
                z = self.pieces[m][i]
                side.logits(hidden, self.problem.slices[i], z)
                if known:
                    z.sub_(peak[:, None])
                else:
                    self.backend.fold_(z, peak, total, room)
        return None if known else _merge(torch.stack([peaks, totals], 1))

    def _combine(self, local: Tensor) -> Tensor:
        """The log-sum-exps over all processes; sets logp and ref_logp on the way."""
        picked = torch.stack([self._picked(t) for t in self.logits])
        at = (self.ids // self.problem.step).clamp(0, len(self.peaks) - 1)  # whose slice it is
        picked += self.peaks[at, :, torch.arange(len(at), device=at.device)].t()
        here = self.here.to(picked).expand_as(picked)
        parts = self._gather(torch.stack([*local, picked - local[0], here]))
        lse = _merge(parts[:, :2])
        logps = parts[:, 2] + (parts[:, 0] - lse[0]) - _logs(lse[1])
        logps = torch.where(parts[:, 3] > 0, logps, 0.0).sum(0)
        self.logp, self.ref_logp = logps[0], logps[1] if self.y is not None else None
        return lse

    def _picked(self, t: Tensor) -> Tensor:
        """What the sampled token has in t, on the rank that holds it; 0 on the others."""
        if t.shape[1] == 0:
            return t.new_zeros(len(t))
        found = t.gather(1, self.ids.clamp(0, t.shape[1] - 1)[:, None]).squeeze(1)
        return torch.where(self.here, found, 0.0)

    def _gather(self, t: Tensor) -> Tensor:
        return t[None] if self.shard is None else self.shard.gather(t)

    def _part(self, part: range) -> tuple[Sequence[Tensor], Sequence[Tensor], Norm]:
        """Some slices of both models' logits (the policy's twice if it is alone), and what makes p and q of them."""
        zs, ys = (t[part.start : part.stop] for t in (self.pieces[0], self.pieces[-1]))
        # Below 0 only where a slice has no finite logit: its exponentials, 0, need a weight that is a number.
        below = (self.lse[0] - self.peaks[part.start : part.stop]).clamp(min=0)
        logs, weights = below + _logs(self.lse[1]), torch.exp(-below) / self.lse[1]
        # Not the difference of the logs: their roundings would shift the whole row.
        apart = (below[:, -1] - below[:, 0]) + (self.lse[1, -1] / self.lse[1, 0]).log()
        return zs, ys, Norm(logs[:, 0], weights[:, 0], logs[:, -1], weights[:, -1], apart)

    def _log_probabilities(self, part: range, index: Any = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        """(lp, lq) of slice after slice, of the tokens of index."""
        zs, ys, norm = self._part(part)
        for z, y, log, ref_log in zip(zs, ys, norm.log, norm.ref_log, strict=True):
            yield z[index] - log[index, None], y[index] - ref_log[index, None]

    # ---- values ----------------------------------------------------------------------------------------------

    def measure(self, names: tuple[str, ...]) -> None:
        """Put the named exact quantities into `values`: one pass, one collective."""
        names = tuple(name for name in EXACT if name in names and name not in self.values)
        if not names:
            return
        local = self.problem.each(lambda part, room: self.backend.exact_sums(*self._part(part), names, room))
        sums = self._gather(torch.stack(local).sum(0)).sum(0)
        bad = ~sums.isfinite().all(0)
        # -inf somewhere (a suppressed token) or NaN: the guarded rows of the table know the limits.
        if bool(bad.any()):
            index = bad.nonzero().squeeze(1)
            for i, name in enumerate(names):
                row = DIVERGENCES[name.removeprefix("ref_")]
                sums[i, index] = row.finish(self.row_totals(row, (), index, of_reference=name == "ref_entropy")[0])
            self.bad |= bad
        self.values.update(zip(names, sums, strict=True))

    def row_totals(
        self, row: Divergence, params: tuple[float, ...], index: Any = slice(None), of_reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(what `finish` reads, the slope G [k]) of a row of the table over the whole vocabulary; tokens of index."""

        def merge(parts: Tensor) -> Tensor:
            totals = parts[:, :-1]
            totals = row.merge(totals) if row.total else totals.sum(0)
            return torch.cat([totals, parts[:, -1:].sum(0)])

        def sums(part: range, _room: Tensor | None) -> Tensor:
            found = []
            for lp, lq in self._log_probabilities(part, index):
                lp = lq if of_reference else lp
                totals = row.totals(lp, lq, *params).view(-1, len(lp))
                found.append(torch.cat([totals, row.dterm(lp, lq, *params).sum(-1)[None]]))
            return merge(torch.stack(found))

        both = merge(self._gather(merge(torch.stack(self.problem.each(sums)))))
        return both[:-1] if row.total else both[0], both[-1]

    def top(self, k: int) -> list[Tensor]:
        """[log-probabilities [n, k], ids [n, k]] of each model's most likely tokens, best first."""
        found = []
        start = 0 if self.shard is None else self.shard.start
        for m in range(len(self.logits)):

            def best(part: range, _room: Tensor | None, m: int = m) -> tuple[Tensor, Tensor]:
                values, ids = [], []
                for i in part:
                    z, rows = self.pieces[m][i], self.problem.slices[i]
                    few = z.max(-1, keepdim=True) if k == 1 and z.shape[1] else z.topk(min(k, z.shape[1]), dim=-1)
                    values.append(few[0] + self.peaks[i, m][:, None])
                    ids.append(few[1] + rows.start + start)
                return _best(values, ids, k)

            values, ids = _best(*zip(*self.problem.each(best), strict=True), k)  # pyright: ignore
            if self.shard is not None:
                short = k - values.shape[1]  # a rank may hold fewer than k rows
                values = torch.nn.functional.pad(values, (0, short), value=-torch.inf)
                ids = torch.nn.functional.pad(ids, (0, short))
                values, ids = _best(self.shard.gather(values), self.shard.gather(ids), k)
            found += [values - self.lse[0, m][:, None] - _logs(self.lse[1])[m][:, None], ids]
        return found

    # ---- gradients -------------------------------------------------------------------------------------------

    def logit_gradient(self, g: dict[str, Tensor]) -> Callable[[range, Tensor | None], Iterator[Tensor]]:
        """sum over the named quantities of g * d quantity / d (hidden @ weight.T), [n, v] of each slice of a part.

        With g of logp, entropy, reverse_kl, forward_kl it is p * (a + b * lp + c * (lq - lp)) - d * q + one-hot.
        """
        factor = self.problem.policy.factor
        g = {name: t * factor for name, t in g.items()}
        zero = self.z.new_zeros(len(self.z))
        logp, forward = g.get("logp"), g.get("forward_kl")
        a = (zero if forward is None else forward) - (zero if logp is None else logp)
        for name in ("entropy", "reverse_kl"):
            if name in g:
                a = a - torch.where(g[name] == 0, 0.0, g[name] * self.values[name])
        b, c = (None if name not in g else -g[name] for name in ("entropy", "reverse_kl"))
        index = self.bad.nonzero().squeeze(1)
        hot, guarded = None if logp is None else self._hot(logp), self._guarded(g, index) if len(index) else None

        def of_part(part: range, room: Tensor | None) -> Iterator[Tensor]:
            dzs = self.backend.gradients(*self._part(part), a, b, c, forward, room)
            careful, bends = repeat(None) if guarded is None else guarded(part), self._bends(part)
            for i in part:
                bad, bend, dz = next(careful), next(bends), next(dzs)  # dz last: it may take the logits' place
                if bad is not None:
                    dz[index] = bad
                if hot is not None:
                    dz.index_put_(*hot[i], accumulate=True)
                if bend is not None:
                    before = dz[index]
                    dz.mul_(bend)
                    # A token that nobody asks about stays 0, whatever its logits are.
                    dz[index] = dz[index].masked_fill(before == 0, 0.0)
                yield dz

        return of_part

    def _guarded(self, g: dict[str, Tensor], index: Tensor) -> Callable[[range], Iterator[Tensor]]:
        """The same, less the one-hot, by the rows of the table, which know every limit; for the tokens of index."""
        rows = {name: DIVERGENCES[name] for name in g if name != "logp"}
        slopes = {name: self.row_totals(row, (), index)[1] for name, row in rows.items()}

        def of_part(part: range) -> Iterator[Tensor]:
            for lp, lq in self._log_probabilities(part, index):
                total = torch.zeros_like(lp)
                for name, t in g.items():
                    if name == "logp":
                        d = -lp.exp()
                    else:
                        d = rows[name].logit_gradient(lp, lq, self.values[name][index], slope=slopes[name])
                    t = t[index, None]
                    total += (d * t).masked_fill(t == 0, 0.0)
                yield total

        return of_part

    def _hot(self, g: Tensor) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
        """The sampled tokens of each slice: ((which tokens, which of the slice's rows), their g)."""
        order = torch.where(self.here, self.ids, -1).argsort()
        ids = self.ids[order].contiguous()
        edges = torch.tensor([0, *(s.stop for s in self.problem.slices)], device=ids.device)
        first, *rest = torch.searchsorted(torch.where(self.here[order], ids, -1), edges).tolist()
        found = []
        for rows, last in zip(self.problem.slices, rest, strict=True):
            found.append(((order[first:last], ids[first:last] - rows.start), g[order[first:last]]))
            first = last
        return found

    def _bends(self, part: range) -> Iterator[Tensor | None]:
        """Derivative of the softcap, from the logits it gave, slice after slice."""
        side = self.problem.policy
        for i in part:
            if side.softcap:
                t = (self.pieces[0][i] + self.peaks[i, 0][:, None]).mul_(side.temperature / side.softcap)
            yield t.square_().neg_().add_(1) if side.softcap else None  # pyright: ignore

    def row_gradient(
        self, row: Divergence, params: tuple[float, ...], totals: Tensor, slope: Tensor, g: Tensor
    ) -> Callable[[range, Tensor | None], Iterator[Tensor]]:
        """g * d row / d (hidden @ weight.T), [n, v] of each slice of a part."""
        g = (g * self.problem.policy.factor)[:, None]

        def of_part(part: range, _room: Tensor | None):
            for (lp, lq), bend in zip(self._log_probabilities(part), self._bends(part), strict=True):
                d = row.logit_gradient(lp, lq, totals, *params, slope=slope)
                if bend is not None:
                    d = d * bend
                yield (d * g).masked_fill(g == 0, 0.0)

        return of_part


def _merge(parts: Tensor) -> Tensor:
    """Log-sum-exps of parts of the vocabulary [parts, 2 (peak, sum of exponentials), models, n] -> [2, models, n]."""
    return torch.stack([_merge_one(parts[:, :, m]) for m in range(parts.shape[2])], 1)


def _merge_one(parts: Tensor) -> Tensor:
    # Model by model: torch's exp depends in its last digit on where in a tensor a number stands, and equal models have
    # equal log-sum-exps.
    peaks, totals = parts[:, 0], parts[:, 1]
    top = torch.where(totals == 0, -torch.inf, peaks).amax(0)  # a part without a finite logit has no say
    top = torch.where(top == -torch.inf, 0.0, top)
    return torch.stack([top, (totals * torch.exp(peaks - top)).masked_fill(totals == 0, 0.0).sum(0)])


def _logs(totals: Tensor) -> Tensor:
    """The log of [models, n]; NaN for a logit of +inf, as in a log-softmax: -inf would be a probability, 0."""
    logs = torch.stack([total.log() for total in totals])  # apart for the same reason
    return logs.masked_fill(logs == torch.inf, torch.nan)


def _best(values: Any, ids: Any, k: int) -> tuple[Tensor, Tensor]:
    """The k best [n, k] of lists of [n, *], best first."""
    values, ids = torch.cat(list(values), 1), torch.cat(list(ids), 1)
    values, order = values.topk(min(k, values.shape[1]), dim=-1)
    return values, ids.gather(1, order)
