"""A tile: the logits of one chunk of tokens under both models, and what is read off them.

Methods that read values go through the tile block by block (plan.for_each_block), then put the blocks of this process
together, then those of the other shards (one all-gather each; top_k two per model). Per-token results are over the
whole vocabulary; with data-parallel tokens they are of every rank's tokens, [ranks * chunk_size].
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from klft.divergences import DIVERGENCES, Divergence
from klft.fused.plan import FusedPlan
from klft.fused.torch_backend import Coefficients, Norm

EXACT = ("entropy", "ref_entropy", "reverse_kl", "forward_kl")  # the order of a backend's exact_sums
DIFFERENTIABLE = ("logp", "entropy", "reverse_kl", "forward_kl")


class LogZ(NamedTuple):
    """log(sum of exp(logits)) = row_max + log(sum_exp), over the vocabulary; [M, n] each."""

    row_max: Tensor
    sum_exp: Tensor


class Tile:
    """n tokens' logits under both models, over the vocabulary rows of this process, each token's shifted by a maximum.

    In the first pass that maximum is each block's own, later the whole vocabulary's: Norm and `norms` know which. A
    backend that does not shift logits in place leaves that to its readers (Norm.row_max).
    log_z: from an earlier pass over the same chunk; then no collective for log-sum-exps, and no logp.

    Attributes: hidden [n, D] per model; token_ids [n], relative to this process's first row; z, y [n, v]: logits of
    policy and reference (the policy's twice if it is alone); logp, ref_logp [n]; values: the exact quantities by name,
    see `measure`; nonfinite [n]: tokens that the backend's formulas cannot do, and the fallback does; norm of all
    blocks, [K, n] each, and norms, one per block.
    """

    def __init__(self, plan: FusedPlan, chunk: slice, workspaces: list[Any], log_z: LogZ | None = None):
        self.plan, self.workspaces, size = plan, workspaces, plan.geometry.chunk_size
        self.hidden = [side.operand(plan.comm.all_gather_tokens(side.hidden[chunk], size)) for side in plan.sides]
        self.token_ids = plan.comm.all_gather_tokens(plan.token_ids[chunk], size) - plan.first_row
        logits = [side.tile(len(self.token_ids), plan.backend.VOCAB_MAJOR) for side in plan.sides]
        self.z, self.y = logits[0], logits[-1]
        # Tokens whose vocabulary row lives on this process.
        self.is_local = (self.token_ids >= 0) & (self.token_ids < self.z.shape[1])
        blocks = [t.split(plan.geometry.block_size, 1) for t in logits]
        self.z_blocks, self.y_blocks = blocks[0], blocks[-1]
        self.logp = self.ref_logp = None
        self.values: dict[str, Tensor] = {}
        if log_z is None:
            self.log_z, row_max = self._log_z(blocks)
            assert self.logp is not None
            self.nonfinite = ~self.logp.isfinite()
        else:
            self.log_z, row_max = log_z, log_z.row_max.expand(len(blocks[0]), *log_z.row_max.shape)
            self._fill(blocks, log_z)
            self.nonfinite = torch.zeros_like(self.is_local)
        self._set_norm(row_max)

    # ---- logits and their log-sum-exp --------------------------------------------------------------------------------

    def _fill(self, blocks: list[tuple[Tensor, ...]], log_z: LogZ) -> None:
        """Logits of all blocks, shifted by a known row max."""

        def fill(i: int, _workspace: Any) -> None:
            for m, side in enumerate(self.plan.sides):
                z = blocks[m][i]
                side.logits_(self.hidden[m], self.plan.geometry.vocab_blocks[i], z)
                if self.plan.backend.SHIFTS:
                    z.sub_(log_z.row_max[m, :, None])

        self.plan.for_each_block(fill, self.workspaces)

    def _log_z(self, blocks: list[tuple[Tensor, ...]]) -> tuple[LogZ, Tensor]:
        """Logits of all blocks, and log_z and the blocks' row max [K, M, n] of them. Sets logp."""
        row_max = self.z.new_empty(len(blocks[0]), len(blocks), len(self.token_ids))
        sum_exp = torch.empty_like(row_max)

        def fill(i: int, workspace: Any) -> None:
            for m, side in enumerate(self.plan.sides):
                z = blocks[m][i]
                side.logits_(self.hidden[m], self.plan.geometry.vocab_blocks[i], z)
                self.plan.backend.max_and_sum_(z, row_max[i, m], sum_exp[i, m], workspace)

        self.plan.for_each_block(fill, self.workspaces)
        local = _merge(row_max, sum_exp)
        # One collective: each shard's log-sum-exp, and the sampled token's logit where its row lives.
        sampled = self._sampled_logits(row_max) - local.row_max
        is_local = self.is_local.to(sampled).expand_as(sampled)
        shards = self.plan.comm.all_gather(torch.stack([*local, sampled, is_local]))  # [shards, 4, M, n]
        log_z = _merge(shards[:, 0], shards[:, 1])
        logps = shards[:, 2] + (shards[:, 0] - log_z.row_max) - _log(log_z.sum_exp)
        logps = torch.where(shards[:, 3] > 0, logps, 0.0).sum(0)
        self.logp, self.ref_logp = logps[0], logps[1] if self.plan.reference is not None else None
        return log_z, row_max

    def _sampled_logits(self, row_max: Tensor) -> Tensor:
        """[M, n]: the sampled token's logit under each model, where its row lives here, else 0."""
        if self.z.shape[1] == 0:
            return row_max.new_zeros(row_max.shape[1:])
        ids = self.token_ids.clamp(0, self.z.shape[1] - 1)
        block = ids // self.plan.geometry.block_size
        stored = [t.gather(1, ids[:, None]).squeeze(1) for t in (self.z, self.y)[: len(self.plan.sides)]]
        sampled = torch.stack(stored)
        if self.plan.backend.SHIFTS:
            sampled = sampled + row_max[block, :, torch.arange(len(ids), device=ids.device)].t()
        return torch.where(self.is_local, sampled, 0.0)

    def _set_norm(self, row_max: Tensor) -> None:
        """Set `norm` and `norms` from the blocks' row max [K, M, n]."""
        # Clamped for blocks without a finite logit only: their exponentials, 0, need a scale that is a number.
        below = (self.log_z.row_max - row_max).clamp(min=0)
        log_z, scale = below + _log(self.log_z.sum_exp), torch.exp(-below) / self.log_z.sum_exp
        # Not the difference of the logs: their roundings would shift the whole row.
        log_z_diff = (below[:, -1] - below[:, 0]) + (self.log_z.sum_exp[-1] / self.log_z.sum_exp[0]).log()
        self._shift = row_max if self.plan.backend.SHIFTS else None
        left = (None, None) if self.plan.backend.SHIFTS else (row_max[:, 0], row_max[:, -1])
        self.norm = Norm(log_z[:, 0], scale[:, 0], log_z[:, -1], scale[:, -1], log_z_diff, *left)
        self.norms = self.norm.by_block()

    def softcap_grad(self, i: int) -> Tensor | None:
        """Derivative of the policy's softcap in block i, [n, rows]; None without one."""
        return self.plan.policy.softcap_grad(self.z_blocks[i], None if self._shift is None else self._shift[i, 0])

    def log_probabilities(self, i: int, index: Any = slice(None)) -> tuple[Tensor, Tensor]:
        """(lp, lq) of block i, of the tokens of index."""
        norm = self.norms[i]
        z, y = self.z_blocks[i][index], self.y_blocks[i][index]
        if norm.row_max is not None and norm.ref_row_max is not None:
            z, y = z - norm.row_max[index, None], y - norm.ref_row_max[index, None]
        return z - norm.log_z[index, None], y - norm.ref_log_z[index, None]

    # ---- values ------------------------------------------------------------------------------------------------------

    def measure(self, names: tuple[str, ...]) -> None:
        """Put the named exact quantities [n] into `values`: one pass, one collective."""
        names = tuple(name for name in EXACT if name in names and name not in self.values)
        if not names:
            return
        backend = self.plan.backend
        parts = self.z.new_empty(len(self.z_blocks), len(names), 2, len(self.token_ids))

        def sum_block(i: int, workspace: Any) -> None:
            backend.exact_sums(self.z_blocks[i], self.y_blocks[i], self.norms[i], names, parts[i], workspace)

        self.plan.for_each_block(sum_block, self.workspaces)
        values = self.plan.comm.all_gather(backend.combine_sums(parts, self.norm, names)).sum(0)
        nonfinite = ~values.isfinite().all(0)
        self.nonfinite = self.nonfinite | nonfinite
        # The fallback: for a suppressed id (-inf), a far tail or NaN the terms of klft.divergences know the limits.
        if not backend.KNOWS_LIMITS and bool(nonfinite.any()):
            index = nonfinite.nonzero().squeeze(1)
            for name, value in zip(names, values, strict=True):
                divergence = DIVERGENCES[name.removeprefix("ref_")]
                totals, _ = self.totals(divergence, (), index, of_reference=name == "ref_entropy")
                value[index] = divergence.finish(totals)
        self.values.update(zip(names, values, strict=True))

    def totals(
        self, divergence: Divergence, params: tuple[float, ...], index: Any = slice(None), of_reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(what divergence.finish reads, G = sum of dterm [n]) over the whole vocabulary, for the tokens of index."""

        def merge(parts: Tensor) -> Tensor:  # [parts, totals and G, n]
            return torch.cat([divergence.merge(parts[:, :-1]), parts[:, -1:].sum(0)])

        blocks: list[Any] = [None] * len(self.z_blocks)

        def sum_block(i: int, _workspace: Any) -> None:
            lp, lq = self.log_probabilities(i, index)
            lp = lq if of_reference else lp
            totals = divergence.totals(lp, lq, *params).view(-1, len(lp))
            if divergence.gradient:  # its own, which does not read G
                dterm_sum = torch.zeros_like(totals[0])
            else:
                dterm_sum = divergence.dterm(lp, lq, *params).sum(-1)
            blocks[i] = torch.cat([totals, dterm_sum[None]])

        self.plan.for_each_block(sum_block, self.workspaces)
        merged = merge(self.plan.comm.all_gather(merge(torch.stack(blocks))))
        return merged[:-1] if divergence.total else merged[0], merged[-1]

    def top_k(self, k: int) -> list[Tensor]:
        """[log-probabilities [n, k], ids [n, k]] of each model's most likely tokens, best first."""
        results = []
        for m, blocks in enumerate((self.z_blocks, self.y_blocks)[: len(self.plan.sides)]):
            logits, ids = self._top_k_blocks(blocks, m, k)
            if self.plan.comm.shard is not None:
                missing = k - logits.shape[1]  # a rank may hold fewer than k rows
                logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
                ids = torch.nn.functional.pad(ids, (0, missing))
                logits, ids = _top_k(self.plan.comm.all_gather(logits), self.plan.comm.all_gather(ids), k)
            results += [logits - self.log_z.row_max[m][:, None] - _log(self.log_z.sum_exp)[m][:, None], ids]
        return results

    def _top_k_blocks(self, blocks: tuple[Tensor, ...], m: int, k: int) -> tuple[Tensor, Tensor]:
        """(logits, ids) [n, k] of model m's most likely tokens among the rows of this process."""
        logits: list[Any] = [None] * len(blocks)
        ids: list[Any] = [None] * len(blocks)

        def top_block(i: int, _workspace: Any) -> None:
            z, rows = blocks[i], self.plan.geometry.vocab_blocks[i]
            top = z.max(-1, keepdim=True) if k == 1 and z.shape[1] else z.topk(min(k, z.shape[1]), dim=-1)
            logits[i] = top[0] if self._shift is None else top[0] + self._shift[i, m][:, None]
            ids[i] = top[1] + rows.start + self.plan.first_row

        self.plan.for_each_block(top_block, self.workspaces)
        return _top_k(logits, ids, k)


# ---- dz = d loss / d (hidden @ weight.T) of a block: callables (block number, dtype, workspace) -> [n, rows] ---------
#
# In the logits, d value / d logit_v = dterm_v - p_v * G with G the sum of dterm over the whole vocabulary: the one
# number per token, next to log Z, that a shard needs of the others. For logp G is 1, for forward_kl 0, for reverse_kl
# the KL itself, for entropy H - 1; other divergences gather it with their totals. See docs/fused.md.


class ScoresGradient:
    """Sum over scores of g * d score / d (hidden @ weight.T), g = d loss / d score [n] by name.

    Per unit of g, with lp = log p and lq = log q: logp one_hot - p; entropy -p (lp + H); reverse_kl p (lp - lq - KL);
    forward_kl p - q. Their sum, without the one-hot, is p * (constant + lp * of_lp + (lq - lp) * of_diff) - of_ref * q.
    """

    def __init__(self, tile: Tile, g: dict[str, Tensor]):
        self.tile = tile
        self.g = g = {name: t * tile.plan.policy.logit_scale for name, t in g.items()}
        zero = tile.z.new_zeros(len(tile.z))
        constant = g.get("forward_kl", zero) - g.get("logp", zero)
        for name in ("entropy", "reverse_kl"):
            if name in g:
                constant = constant - torch.where(g[name] == 0, 0.0, g[name] * tile.values[name])
        of_lp, of_diff = (None if name not in g else -g[name] for name in ("entropy", "reverse_kl"))
        coefficients = Coefficients(constant, of_lp, of_diff, g.get("forward_kl"))
        backend, blocks = tile.plan.backend, tile.plan.geometry.vocab_blocks
        self.factors = backend.gradient_factors(tile.norm, coefficients)
        self.one_hots: list[Any] = [None] * len(blocks)
        if "logp" in g:
            self.row_ids = torch.where(tile.is_local, tile.token_ids, -1)  # -1: not a row of this process
            self.one_hots = backend.one_hots(self.row_ids, g["logp"], blocks)
        # Tokens of the fallback, and G of their divergences. Last: the CPU waits for a GPU here.
        self.index = tile.nonfinite.nonzero().squeeze(1)
        self.dterm_sums = {
            name: tile.totals(DIVERGENCES[name], (), self.index)[1] for name in g if name != "logp" and len(self.index)
        }

    def __call__(self, i: int, dtype: torch.dtype, workspace: Any) -> Tensor:
        tile, plan = self.tile, self.tile.plan
        # 1. What is read off the logits, before the gradient may take their place.
        softcap_grad = tile.softcap_grad(i)
        fallback = self._fallback(i) if len(self.index) else None
        # 2. The smooth part, and logp's one-hot where the sampled token's row is in this block.
        if softcap_grad is not None:
            dtype = tile.z.dtype
        z, y = tile.z_blocks[i], tile.y_blocks[i]
        dz = plan.backend.gradient(z, y, self.factors[i], self.one_hots[i], dtype, workspace)
        if fallback is not None:
            dz[self.index] = fallback.to(dz.dtype)
        # 3. Through the softcap. A token without a gradient keeps 0, whatever its logits are.
        if softcap_grad is not None:
            before = dz[self.index]
            dz.mul_(softcap_grad)
            dz[self.index] = dz[self.index].masked_fill(before == 0, 0.0)
        return dz

    def _fallback(self, i: int) -> Tensor:
        """The same by the formulas of klft.divergences, for the tokens of index."""
        lp, lq = self.tile.log_probabilities(i, self.index)
        total = torch.zeros_like(lp)
        for name, t in self.g.items():
            if name == "logp":
                rows = self.tile.plan.geometry.vocab_blocks[i]
                ids = torch.arange(rows.start, rows.stop, device=lp.device)
                d = (ids == self.row_ids[self.index, None]).to(lp) - lp.exp()
            else:
                value = self.tile.values[name][self.index]
                d = DIVERGENCES[name].logit_gradient(lp, lq, value, dterm_sum=self.dterm_sums[name])
            t = t[self.index, None]
            total += (d * t).masked_fill(t == 0, 0.0)
        return total


class DivergenceGradient:
    """g * d divergence / d (hidden @ weight.T); totals and dterm_sum as Tile.totals gives them."""

    def __init__(
        self,
        tile: Tile,
        divergence: Divergence,
        params: tuple[float, ...],
        totals: Tensor,
        dterm_sum: Tensor,
        g: Tensor,
    ):
        self.tile, self.divergence, self.params = tile, divergence, params
        self.totals, self.dterm_sum = totals, dterm_sum
        self.g = (g * tile.plan.policy.logit_scale)[:, None]

    def __call__(self, i: int, _dtype: torch.dtype, _workspace: Any) -> Tensor:
        lp, lq = self.tile.log_probabilities(i)
        dz = self.divergence.logit_gradient(lp, lq, self.totals, *self.params, dterm_sum=self.dterm_sum)
        softcap_grad = self.tile.softcap_grad(i)
        if softcap_grad is not None:
            dz = dz * softcap_grad
        return (dz * self.g).masked_fill(self.g == 0, 0.0)


# ---- parts of the vocabulary, put together --------------------------------------------------------------------------


def _merge(row_max: Tensor, sum_exp: Tensor) -> LogZ:
    """Log-sum-exps of parts of the vocabulary [parts, M, n] -> of all of them [M, n]."""
    if len(row_max) == 1:
        return LogZ(row_max[0], sum_exp[0])
    # Model by model: torch's exp depends in its last digit on where in a tensor a number stands, and equal models have
    # equal log-sum-exps.
    merged = [_merge_model(row_max[:, m], sum_exp[:, m]) for m in range(row_max.shape[1])]
    return LogZ(*(torch.stack(each) for each in zip(*merged, strict=True)))


def _merge_model(row_max: Tensor, sum_exp: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.where(sum_exp == 0, -torch.inf, row_max).amax(0)  # ignore parts whose logits are all -inf
    top = torch.where(top == -torch.inf, 0.0, top)
    return top, (sum_exp * torch.exp(row_max - top)).masked_fill(sum_exp == 0, 0.0).sum(0)


def _log(sum_exp: Tensor) -> Tensor:
    """log of [M, n]; NaN for a logit of +inf, as in a log-softmax: -inf would be a probability, 0."""
    logs = torch.stack([each.log() for each in sum_exp])  # model by model, as in _merge
    return logs.masked_fill(logs == torch.inf, torch.nan)


def _top_k(logits: Any, ids: Any, k: int) -> tuple[Tensor, Tensor]:
    """The k best [n, k] of lists of [n, *], best first."""
    logits, ids = torch.cat(list(logits), 1), torch.cat(list(ids), 1)
    logits, order = logits.topk(min(k, logits.shape[1]), dim=-1)
    return logits, ids.gather(1, order)
