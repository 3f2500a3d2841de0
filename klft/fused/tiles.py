"""Tiles: a chunk of tokens against both heads, and everything that is read off it or sent back through it.

`Problem` holds the two models' hidden states and heads and deals out tiles; a `Tile` holds log-probabilities
[n, rows of the vocabulary that live here] and knows the collectives. Nothing larger than two tiles ever exists.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klft.divergences import DIVERGENCES, Divergence
from klft.fused import torch_backend
from klft.sharding import VocabShard

EXACT = ("entropy", "ref_entropy", "reverse_kl", "forward_kl")  # the order of exact_sums
DIFFERENTIABLE = ("logp", "entropy", "reverse_kl", "forward_kl")
SLICE = 1 << 15  # rows of a 16-bit weight that are widened at once where the device cannot multiply into fp32


def _exactly(product: Callable) -> Callable:
    """Autocast has had its say about the inputs; it must not round what is multiplied or summed inside."""

    @functools.wraps(product)
    def run(self: "Side", x: Tensor, *args: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return product(self, x, *args)

    return run


class Side:
    """One model: hidden states -> logits of the rows that live here, and a logit gradient back to its inputs."""

    def __init__(self, hidden: Tensor, head: Any, temperature: float):
        device = hidden.device.type
        self.dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
        if torch.is_autocast_enabled(device) and self.dtype != torch.float64:
            self.dtype = torch.get_autocast_dtype(device)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.hidden = hidden.detach().to(self.dtype)
        self.weight = head.weight.detach().to(self.dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(self.wide)
        self.scale, self.softcap, self.temperature = head.scale, head.softcap, temperature
        self._native = self.dtype == self.wide
        self.buffer: Tensor | None = None

    @property
    def factor(self) -> float:
        """d (logit before the softcap's bend) / d (hidden @ weight.T)."""
        return self.scale / self.temperature

    def _slices(self):
        step = SLICE if not self._native else max(1, len(self.weight))
        return (slice(start, start + step) for start in range(0, len(self.weight), step))

    @_exactly
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, rows], in a buffer that the next call reuses."""
        n, rows = len(hidden), len(self.weight)
        if self.buffer is None or len(self.buffer) < n:
            self.buffer = torch.empty(n, rows, dtype=self.wide, device=hidden.device)
        z = self.buffer[:n]
        # The scale rides along in the product where nothing bends the logits after it.
        alpha = 1.0 if self.softcap else self.factor
        if not self._native and hidden.is_cuda:
            torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=z)  # pyright: ignore
            z.mul_(alpha)
        else:
            wide = hidden.to(self.wide)
            for s in self._slices():
                part = self.weight[s].to(self.wide).t()
                torch.addmm(z[:, s], wide, part, beta=0, alpha=alpha, out=z[:, s])
        if self.bias is not None:
            z.add_(self.bias, alpha=alpha)
        if self.softcap:
            z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return z

    @_exactly
    def back(self, dz: Tensor, hidden: Tensor, grads: "Gradients") -> Tensor | None:
        """Add to the weight's and the bias's gradient; the part of hidden's that these rows give [n, D]."""
        if grads.bias is not None:
            grads.bias.add_(dz.sum(0))
        if not self._native and dz.is_cuda:
            narrow = dz.to(self.dtype)
            if grads.weight is not None:
                torch.addmm(grads.weight, narrow.t(), hidden, out_dtype=torch.float32, out=grads.weight)  # pyright: ignore
            return torch.mm(narrow, self.weight, out_dtype=torch.float32) if grads.wants_hidden else None  # pyright: ignore
        wide, dh = hidden.to(self.wide), None
        for s in self._slices():
            if grads.weight is not None:
                grads.weight[s].addmm_(dz[:, s].t(), wide, beta=0 if grads.fresh else 1)
            if grads.wants_hidden:
                part = self.weight[s].to(self.wide)
                dh = torch.mm(dz[:, s], part) if dh is None else dh.addmm_(dz[:, s], part)
        grads.fresh = False
        return torch.zeros_like(wide) if dh is None and grads.wants_hidden else dh


@dataclass
class Gradients:
    """Accumulated in fp32 (fp64 for fp64) over the tiles; None where nobody asks."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    fresh: bool  # the weight's is unwritten memory: a CPU would spend a while on setting it to zero first

    @property
    def wants_hidden(self) -> bool:
        """Whether hidden states get a gradient."""
        return self.hidden is not None


class Tile:
    """n tokens' log-probabilities under both models, over the whole vocabulary, as far as its rows live here.

    `lse`: the log-sum-exps, in two parts [2, models, n], if an earlier pass over these tokens has them; no collective
    is needed then.
    """

    def __init__(self, z: Tensor, y: Tensor | None, ids: Tensor, problem: "Problem", lse: Tensor | None = None):
        self.z, self.y, self.problem, self.shard = z, y, problem, problem.shard
        self.ids = ids if self.shard is None else ids - self.shard.start
        self.here = (self.ids >= 0) & (self.ids < z.shape[1])
        self.backend = problem.backend
        self.lse = lse
        self.logp = self.ref_logp = None
        self._normalise()
        self.bad = z.new_zeros(len(z), dtype=torch.bool) if self.logp is None else ~self.logp.isfinite()
        self.values: dict[str, Tensor] = {}

    def _sides(self) -> list[Tensor]:
        return [self.z] if self.y is None else [self.z, self.y]

    def _picked(self, t: Tensor) -> Tensor:
        """What the sampled token has in t, on the rank that holds it; 0 on the others."""
        if t.shape[1] == 0:
            return t.new_zeros(len(t))
        found = t.gather(1, self.ids.clamp(0, t.shape[1] - 1)[:, None]).squeeze(1)
        return torch.where(self.here, found, 0.0)

    def _normalise(self) -> None:
        sides = self._sides()
        if self.lse is None and self.shard is None and not self.problem.policy.softcap:
            for t in sides:
                self.backend.log_softmax_(t)
            picked = [self._picked(t) for t in sides]
            self.logp, self.ref_logp = picked[0], picked[-1] if self.y is not None else None
            return
        # The maximum and what is left of the log-sum-exp go one after the other: their sum, rounded, would shift a row.
        known = self.lse
        peaks = torch.stack([_peak(t) for t in sides]) if known is None else known[0]
        for t, peak in zip(sides, peaks, strict=True):
            self.backend.subtract_(t, peak)
        if known is None:
            rests = torch.stack([self.backend.log_sum_exp(t) for t in sides])
            picked = torch.stack([self._picked(t) for t in sides])
            parts = self._gather(torch.stack([peaks, rests, picked, self.here.to(peaks).expand_as(peaks)]))
            highest = parts[:, 0].amax(0)
            offsets = highest - parts[:, 0] + (parts[:, 0] - highest + parts[:, 1]).logsumexp(0)
            logps = torch.where(parts[:, 3] > 0, parts[:, 2] - offsets, 0.0).sum(0)
            self.logp, self.ref_logp = logps[0], logps[1] if self.y is not None else None
            known = self.lse = torch.stack([peaks, offsets[0 if self.shard is None else self.shard.rank]])
        for t, offset in zip(sides, known[1], strict=True):
            self.backend.subtract_(t, offset)

    def _gather(self, t: Tensor) -> Tensor:
        return t[None] if self.shard is None else self.shard.gather(t)

    # ---- values ----------------------------------------------------------------------------------------------

    def measure(self, names: tuple[str, ...]) -> None:
        """Put the named exact quantities into `values`: one pass, one collective."""
        names = tuple(name for name in EXACT if name in names and name not in self.values)
        if not names:
            return
        sums = self._gather(self.backend.exact_sums(self.z, self.y, names)).sum(0)
        bad = ~sums.isfinite().all(0)
        # -inf somewhere (a suppressed token) or NaN: the guarded rows of the table know the limits.
        if bool(bad.any()):
            index = bad.nonzero().squeeze(1)
            for i, name in enumerate(names):
                row, lp, lq = self._guarded(name, index)
                sums[i, index] = row.finish(self._gather(row.totals(lp, lq)).sum(0))
            self.bad |= bad
        self.values.update(zip(names, sums, strict=True))

    def _guarded(self, name: str, index: Tensor) -> tuple[Divergence, Tensor, Tensor]:
        of_reference = name == "ref_entropy"
        lp = (self.y if of_reference else self.z)[index]  # pyright: ignore
        return DIVERGENCES[name.removeprefix("ref_")], lp, lp if self.y is None or of_reference else self.y[index]

    def row_totals(self, row: Divergence, params: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """(what `finish` reads, the slope G [n]) of any row of the table, over the whole vocabulary."""
        assert self.y is not None
        parts = [self._row_part(row, params, rows) for rows in torch_backend.blocks(self.z)]
        parts = torch.cat(parts, -1) if parts else self.z.new_zeros(3 if row.total else 2, 0)
        every = self._gather(parts)
        totals = row.merge(every[:, :-1]) if row.total else every[:, 0].sum(0)
        return totals, every[:, -1].sum(0)

    def _row_part(self, row: Divergence, params: tuple[float, ...], rows: slice) -> Tensor:
        lp, lq = self.z[rows], self.y[rows]  # pyright: ignore
        slope = row.dterm(lp, lq, *params).sum(-1)
        return torch.cat([row.totals(lp, lq, *params).view(-1, len(lp)), slope[None]])

    def top(self, k: int) -> list[Tensor]:
        """[log-probabilities [n, k], ids [n, k]] of each model's most likely tokens, best first."""
        found = []
        start = 0 if self.shard is None else self.shard.start
        for t in self._sides():
            values, ids = t.topk(min(k, t.shape[1]), dim=-1) if k > 1 else t.max(-1, keepdim=True) if t.shape[1] else (
                t.new_zeros(len(t), 0), self.ids.new_zeros(len(t), 0))  # fmt: skip
            if self.shard is not None:
                short = k - values.shape[1]  # a rank may hold fewer than k rows
                values = torch.nn.functional.pad(values, (0, short), value=-torch.inf)
                ids = torch.nn.functional.pad(ids + start, (0, short))
                values, ids = (self.shard.gather(x).transpose(0, 1).flatten(1) for x in (values, ids))
                values, order = values.topk(k, dim=-1)
                ids = ids.gather(-1, order)
            found += [values, ids]
        return found

    # ---- gradients: the tile is overwritten ------------------------------------------------------------------

    def logit_gradient(self, g: dict[str, Tensor]) -> Tensor:
        """sum over the named quantities of g * d quantity / d (hidden @ weight.T), [n, v]; consumes the tile.

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
        guarded = self._guarded_gradient(g, index) if len(index) else None
        for rows in torch_backend.blocks(self.z) if self.problem.policy.softcap else [slice(None)]:
            bend = self._bend(rows)
            y = None if self.y is None else self.y[rows]
            bc = (None if t is None else t[rows] for t in (b, c))
            self.backend.gradient_(self.z[rows], y, a[rows], *bc, None if forward is None else forward[rows])
            if logp is not None:
                rest = torch.where(self.here[rows], logp[rows], 0.0)
                if self.z.shape[1]:
                    at = self.ids[rows].clamp(0, self.z.shape[1] - 1)[:, None]
                    self.z[rows].scatter_add_(1, at, rest[:, None])
            if bend is not None:
                self.z[rows].mul_(bend)
        if guarded is not None:
            self.z[index] = guarded
        return self.z

    def _bend(self, rows: Any) -> Tensor | None:
        """Derivative of the softcap, from the logits it gave."""
        side = self.problem.policy
        if not side.softcap:
            return None
        assert self.lse is not None
        t = (self.z[rows] + self.lse[:, 0, rows, None].sum(0)) * (side.temperature / side.softcap)
        return 1 - t * t

    def _guarded_gradient(self, g: dict[str, Tensor], index: Tensor) -> Tensor:
        total = torch.zeros_like(self.z[index])
        for name, t in g.items():
            t = t[index, None]
            if name == "logp":
                d = -self.z[index].exp()
                if d.shape[1]:
                    one = self.here[index].to(d.dtype)[:, None]
                    d.scatter_add_(1, self.ids[index].clamp(0, d.shape[1] - 1)[:, None], one)
            else:
                row, lp, lq = self._guarded(name, index)
                slope = self._gather(row.dterm(lp, lq).sum(-1)).sum(0)
                d = row.logit_gradient(lp, lq, self.values[name][index], slope=slope)
            total += (d * t).masked_fill(t == 0, 0.0)  # a token that nobody asks about stays 0, NaN or not
        bend = self._bend(index)
        return total if bend is None else (total * bend).masked_fill(total == 0, 0.0)

    def row_gradient(
        self, row: Divergence, params: tuple[float, ...], totals: Tensor, slope: Tensor, g: Tensor
    ) -> Tensor:
        """g * d row / d (hidden @ weight.T), [n, v]; consumes the tile."""
        g = (g * self.problem.policy.factor)[:, None]
        self.bad |= ~totals.isfinite().reshape(-1, len(g)).all(0)
        for rows in torch_backend.blocks(self.z):
            lp, lq, bend = self.z[rows], self.y[rows], self._bend(rows)  # pyright: ignore
            d = row.logit_gradient(lp, lq, totals[..., rows], *params, slope=slope[rows])
            if bend is not None:
                d = d * bend
            self.z[rows] = (d * g[rows]).masked_fill(g[rows] == 0, 0.0)
        return self.z


def _peak(t: Tensor) -> Tensor:
    """[n, v] -> [n]: the largest logit; 0 where there is none, or none that is finite."""
    peak = t.amax(-1) if t.shape[1] else t.new_zeros(len(t))
    return torch.where(peak.isfinite(), peak, 0.0)


class Problem:
    """Two models' hidden states and heads, cut into tiles of so many logits (of one model) and tokens at most."""

    def __init__(
        self,
        policy: Side,
        reference: Side | None,
        token_ids: Tensor,
        shard: VocabShard | None,
        elements: int,
        tokens: int,
        wants: bool,
        backend: Any = torch_backend,
    ):
        self.policy, self.reference, self.ids, self.backend = policy, reference, token_ids, backend
        self.shard = None if shard is None or shard.world == 1 else shard
        self.apart = self.shard is not None and self.shard.own_tokens
        n, ranks, self.wants = len(token_ids), 1, wants
        if self.apart:
            # Ranks meet in the same collectives: as many tiles, and hidden's gradient if one of them wants it.
            assert self.shard is not None
            most = self.shard.gather(torch.tensor([n, wants], device=token_ids.device)).amax(0).tolist()
            n, ranks, self.wants = most[0], self.shard.world, bool(most[1])
        rows = max(1, len(policy.weight))
        if self.shard is not None:
            rows = max(1, -(-self.shard.vocab_size // self.shard.world))  # every rank must cut alike
        self.size = min(max(1, min(elements // rows, tokens) // ranks), max(1, n))
        self.chunks = [slice(start, start + self.size) for start in range(0, n, self.size)]

    @property
    def fixed(self) -> list[Tensor]:
        """The reference's tensors."""
        side = self.reference
        return [] if side is None else [t for t in (side.hidden, side.weight, side.bias) if t is not None]

    def free(self) -> None:
        """Give the tiles' memory back."""
        for side in self.sides:
            side.buffer = None

    @property
    def sides(self) -> list[Side]:
        """The models at hand."""
        return [self.policy] if self.reference is None else [self.policy, self.reference]

    def tile(self, rows: slice, lse: Tensor | None = None) -> Tile:
        """The tile of these tokens of mine; with everyone's beside them if ranks have tokens of their own."""
        z = self.policy.logits(self._everyones(self.policy.hidden[rows]))
        y = None if self.reference is None else self.reference.logits(self._everyones(self.reference.hidden[rows]))
        return Tile(z, y, self._everyones(self.ids[rows]), self, lse)

    def _everyones(self, t: Tensor) -> Tensor:
        if not self.apart:
            return t
        assert self.shard is not None
        padded = t.new_zeros(self.size, *t.shape[1:])
        padded[: len(t)] = t
        return self.shard.gather(padded).flatten(0, 1)

    def mine(self, t: Tensor, rows: slice) -> Tensor:
        """[W * n] of a tile -> my tokens' part."""
        if not self.apart:
            return t
        assert self.shard is not None
        start = self.shard.rank * self.size
        return t[start : start + len(self.ids[rows])]

    def everyones(self, g: dict[str, Tensor]) -> dict[str, Tensor]:
        """Factors for my tokens of a tile -> for every token of it."""
        if not self.apart or not g:
            return g
        return dict(zip(g, self._everyones(torch.stack(list(g.values()), -1)).unbind(-1), strict=True))

    def new_gradients(self, hidden: bool, weight: bool, bias: bool) -> Gradients:
        """Zeros to accumulate into."""
        side = self.policy

        def zeros(like: Tensor | None, wanted: bool) -> Tensor | None:
            return torch.zeros_like(like, dtype=side.wide) if wanted and like is not None else None

        hidden |= self.apart and self.wants
        fresh = weight and not side.weight.is_cuda
        of_weight = torch.empty_like(side.weight, dtype=side.wide) if fresh else zeros(side.weight, weight)
        return Gradients(zeros(side.hidden, hidden), of_weight, zeros(side.bias, bias), fresh)

    def send_back(self, dz: Tensor, rows: slice, grads: Gradients, dead: Tensor) -> None:
        """Through the head. `dead` [n]: tokens that get no gradient, whose hidden states may be NaN or infinite."""
        hidden = self._everyones(self.policy.hidden[rows])
        if bool(dead.any()):
            hidden = hidden.masked_fill(dead[:, None], 0.0)  # 0 * NaN would reach the weight's gradient
        dh = self.policy.back(dz, hidden, grads)
        if dh is None or grads.hidden is None:
            return
        if self.apart:
            assert self.shard is not None
            dh = self.shard.sum_of_mine(dh)[: len(self.ids[rows])]
        grads.hidden[rows] = dh

    def finish(self, grads: Gradients) -> None:
        """What has to wait for the last tile: every rank's rows of the vocabulary add to hidden's gradient."""
        if grads.fresh and grads.weight is not None:
            grads.weight.zero_()  # no tile had a gradient
        if self.shard is not None and not self.apart and grads.hidden is not None:
            self.shard.sum(grads.hidden)
