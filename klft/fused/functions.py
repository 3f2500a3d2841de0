"""The autograd functions behind klft.fused.api."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from klft.divergences import DIVERGENCES
from klft.fused.plan import Problem
from klft.fused.tile import DIFFERENTIABLE, EXACT, Tile


class Scored(torch.autograd.Function):
    """The named quantities [N] each; tiles are made again in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, problem: Problem, names: tuple[str, ...], top_k: int):
        # The problem holds them all, cast; saved only so that autograd sees if one changes before the backward.
        ctx.save_for_backward(hidden, weight, bias, *problem.constants())
        parts, ctx.facts, extra = [], [], []
        for rows in problem.chunks:
            tile = Tile(problem, rows)
            tops = tile.top(max(top_k, 1)) if top_k >= 0 else []
            tile.measure(names)
            # What a backward needs of this tile: small, and it saves the collectives.
            ctx.facts.append((tile.lse, tile.values, tile.bad))
            values = tile.values | {"logp": tile.logp, "ref_logp": tile.ref_logp}
            parts.append([problem.mine(values[name], rows) for name in names])  # pyright: ignore
            extra.append([problem.mine(t, rows) for t in tops])
        ctx.problem, ctx.names = problem, names
        none = problem.policy.hidden.new_zeros(0, dtype=problem.policy.wide)
        outputs = [torch.cat([p[i] for p in parts]) if parts else none.clone() for i in range(len(names))]
        if extra:
            outputs += [torch.cat(e) for e in zip(*extra, strict=True)]
        elif top_k >= 0:  # no tokens: the same fields, empty
            none = none.new_zeros(0, max(top_k, 1))
            outputs += [t for _ in problem.sides for t in (none.clone(), none.long())]
        constant = [t for t, name in zip(outputs, names, strict=False) if name not in DIFFERENTIABLE]
        ctx.mark_non_differentiable(*constant, *outputs[len(names) :])
        problem.free()
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):
        _ = ctx.saved_tensors  # raises if one was changed in place
        problem, names = ctx.problem, ctx.names
        grads = problem.new_gradients(*ctx.needs_input_grad[:3])
        g_all = {n: g for n, g in zip(names, grad_outputs, strict=False) if n in DIFFERENTIABLE}
        for rows, (lse, values, bad) in zip(problem.chunks, ctx.facts, strict=True):
            tile = Tile(problem, rows, lse)
            tile.values, tile.bad = values, bad.clone()
            g = problem.factors({n: t[rows] for n, t in g_all.items()})
            _send_back(problem, tile, rows, grads, g)
        problem.finish(grads)
        problem.free()
        return grads.hidden, grads.weight, grads.bias, None, None, None


def _send_back(problem: Problem, tile: Tile, rows: slice, grads: Any, g: dict[str, Tensor]) -> None:
    dead = torch.stack([t == 0 for t in g.values()]).all(0)
    problem.send_back(tile, tile.logit_gradient(g), rows, grads, dead)


class Row(torch.autograd.Function):
    """One row of the table [N]; tiles are made again in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, problem: Problem, name: str, params: tuple[float, ...]):
        ctx.save_for_backward(hidden, weight, bias, *problem.constants())
        row, parts, ctx.facts = DIVERGENCES[name], [], []
        for rows in problem.chunks:
            tile = Tile(problem, rows)
            totals, slope = tile.row_totals(row, params)
            ctx.facts.append((tile.lse, totals, slope))
            parts.append(problem.mine(row.finish(totals, *params), rows))
        ctx.problem, ctx.row, ctx.params = problem, row, params
        problem.free()
        return torch.cat(parts) if parts else problem.policy.hidden.new_zeros(0, dtype=problem.policy.wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        _ = ctx.saved_tensors
        problem = ctx.problem
        grads = problem.new_gradients(*ctx.needs_input_grad[:3])
        for rows, (lse, totals, slope) in zip(problem.chunks, ctx.facts, strict=True):
            tile = Tile(problem, rows, lse)
            g = problem.factors({"g": grad_output[rows]})["g"]
            dz = tile.row_gradient(ctx.row, ctx.params, totals, slope, g)
            problem.send_back(tile, dz, rows, grads, g == 0)
        problem.finish(grads)
        problem.free()
        return grads.hidden, grads.weight, grads.bias, None, None, None


class _ChunkScores:
    """A chunk's TokenScores, each computed when it is first read: a loss pays for what it uses."""

    def __init__(self, problem: Problem, tile: Tile, rows: slice):
        self._problem, self._tile, self._rows = problem, tile, rows
        self._leaves: dict[str, Tensor] = {}
        if problem.shard is not None:
            # All at once, so that ranks whose losses read different scores still meet in the same collectives.
            tile.measure(EXACT if tile.y is not None else EXACT[:1])

    def __getattr__(self, name: str) -> Tensor:
        tile = self._tile
        if name in ("logp", "ref_logp"):
            value = getattr(tile, name)
        elif name in EXACT and (tile.y is not None or name == "entropy"):
            tile.measure((name,))
            value = tile.values[name]
        else:
            known = ("logp", "ref_logp", *EXACT)
            raise AttributeError(f"a loss reads {', '.join(known)} (most need a reference), not {name!r}")
        if value is None:
            raise AttributeError(f"{name} needs ref_hidden and ref_head")
        # A copy: the tile's own value is read again for the gradient.
        leaf = self._problem.mine(value, self._rows).clone().requires_grad_(name in DIFFERENTIABLE)
        if name in DIFFERENTIABLE:
            self._leaves[name] = leaf
        setattr(self, name, leaf)
        return leaf

    def gradients(self, loss: Tensor, factor: Tensor | None) -> dict[str, Tensor]:
        """factor * d loss / d score for every token of the tile."""
        used = dict(self._leaves)
        if loss.requires_grad:
            _check_captured(loss, used)
            found = torch.autograd.grad(loss, list(used.values()), allow_unused=True, materialize_grads=True)
            used = dict(zip(used, [t if factor is None else t * factor for t in found], strict=True))
        else:
            used = {}
        if self._problem.shard is not None:  # every rank takes part, whatever its own loss read
            zeros = torch.zeros_like(self._problem.mine(self._tile.logp, self._rows))  # pyright: ignore
            names = DIFFERENTIABLE if self._tile.y is not None else DIFFERENTIABLE[:2]
            used = {name: used.get(name, zeros) for name in names}
        return self._problem.factors(used)


def _check_captured(loss: Tensor, leaves: dict[str, Tensor]) -> None:
    """Raise ValueError if the loss depends on another differentiable tensor: its gradient would be lost."""
    mine = {id(leaf) for leaf in leaves.values()}
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in mine:
            raise ValueError(
                "fused_token_loss: loss_fn's result depends on a differentiable tensor from outside (shape "
                f"{list(variable.shape)}), whose gradient would be lost. Detach it, or add its part outside."
            )
        todo += [parent for parent, _ in node.next_functions]


def _loss_and_gradients(
    problem: Problem,
    loss_fn: Callable,
    per_token: Sequence[Tensor],
    wanted: Sequence[bool],
    factor: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum of loss_fn over chunks, and the gradients of hidden, weight and bias, made while each tile is there."""
    grads = problem.new_gradients(*wanted)
    total = problem.policy.hidden.new_zeros((), dtype=problem.policy.wide)
    for rows in problem.chunks:
        tile = Tile(problem, rows)
        scores = _ChunkScores(problem, tile, rows)
        with torch.enable_grad():
            loss = loss_fn(scores, *(t[rows] for t in per_token))
        if loss.dim():
            raise ValueError(f"fused_token_loss: loss_fn must return a scalar, got shape {list(loss.shape)}")
        total += loss.detach()
        if any(wanted):
            g = scores.gradients(loss, factor)
            if g:
                _send_back(problem, tile, rows, grads, g)
    problem.finish(grads)
    problem.free()
    return total, [grads.hidden, grads.weight, grads.bias]


class TokenLoss(torch.autograd.Function):
    """The sum of loss_fn over chunks; its gradients wait for the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, problem: Problem, loss_fn: Callable, per_token: Sequence[Tensor]):
        ctx.save_for_backward(hidden, weight, bias, *problem.constants(*per_token))
        ctx.problem = problem
        ctx.again = functools.partial(_loss_and_gradients, problem, loss_fn, per_token, ctx.needs_input_grad[:3])
        total, ctx.grads = ctx.again()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        problem = ctx.problem
        factors = problem.shard.gather(grad_output) if problem.apart else grad_output[None]
        if ctx.grads is None or not bool((factors == factors[0]).all()):
            # A second backward; or processes that weigh their losses differently, which the rows' gradient must know.
            _, ctx.grads = ctx.saved_tensors, None
            return *ctx.again(factor=grad_output)[1], None, None, None
        # Handed over, not kept: the weight's gradient is the largest thing here. A second backward makes it anew.
        grads, ctx.grads = ctx.grads, None
        if grad_output.is_cuda or grad_output.item() != 1:  # asking a GPU would cost more than multiplying
            grads = [None if g is None else g.mul_(grad_output) for g in grads]
        return *grads, None, None, None
