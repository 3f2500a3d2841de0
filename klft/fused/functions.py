"""The torch.autograd.Functions behind klft.fused.api, and how a loss is taken chunk by chunk.

All three walk over the plan's chunks. Of a chunk they make a Tile (both models' logits), read what is asked, and
backpropagate dz = d loss / d (hidden @ weight.T) through the head:

    grad_hidden = dz @ weight            over shards: summed (all-reduce, or reduce-scatter with data-parallel tokens)
    grad_weight = dz.T @ hidden          of this process's rows only: no collective
    grad_bias   = dz.sum over tokens     likewise

Scores and DivergencePerToken recompute the tile in their backward. TokenLoss takes the gradient in its forward, while
the tile is there: four matrix products instead of six. Gradients are accumulated in acc_dtype; autograd casts what a
backward returns to the parameter's dtype.

Collectives, per chunk unless it says otherwise:
    making a tile   all-gather of its log-sum-exps and sampled logits [4, M, n], in the first pass only; with
                    data-parallel tokens each pass gathers hidden, ref_hidden and token ids before (M + 1 all-gathers)
    reading values  one all-gather of their sums; one more per score where the fallback was needed; top_k two per model
    gradient        one all-gather per score where the fallback was needed; with data-parallel tokens the all-gather of
                    d loss / d score and the reduce-scatter of grad_hidden; under tensor parallelism grad_hidden's
                    all-reduce after the last chunk
TokenLoss has all of them in its forward.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from klft.divergences import DIVERGENCES
from klft.fused.gradients import Gradients
from klft.fused.plan import FusedPlan
from klft.fused.tile import DIFFERENTIABLE, EXACT, DivergenceGradient, ScoresGradient, Tile


def _cat(parts: list[Tensor], plan: FusedPlan) -> Tensor:
    """Chunks' results one after the other; empty without a token."""
    return torch.cat(parts) if parts else plan.policy.hidden.new_zeros(0, dtype=plan.policy.acc_dtype)


class Scores(torch.autograd.Function):
    """The named scores [N] each; with top_k >= 0 also (log-probabilities, ids) [N, max(top_k, 1)] of each model."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, plan: FusedPlan, names: tuple[str, ...], top_k: int):
        # The plan holds them all, cast; saved only so that autograd sees if one changes before the backward.
        ctx.save_for_backward(hidden, weight, bias, *plan.constants())
        ctx.plan, ctx.names, ctx.saved = plan, names, []
        workspaces, scores, tops = plan.workspaces(), [], []
        for chunk in plan.chunks:
            tile = Tile(plan, chunk, workspaces)
            top = tile.top_k(max(top_k, 1)) if top_k >= 0 else []
            tile.measure(names)
            # What the backward needs of this tile: a few numbers per token, and it saves two collectives.
            ctx.saved.append((tile.log_z, tile.values, tile.nonfinite))
            values = tile.values | {"logp": tile.logp, "ref_logp": tile.ref_logp}
            scores.append([plan.local(values[name], chunk) for name in names])  # pyright: ignore
            tops.append([plan.local(t, chunk) for t in top])
        outputs = [_cat([each[i] for each in scores], plan) for i in range(len(names))]
        if tops:
            outputs += [torch.cat(each) for each in zip(*tops, strict=True)]
        elif top_k >= 0:  # no tokens: the same fields, empty
            empty = plan.policy.hidden.new_zeros(0, max(top_k, 1), dtype=plan.policy.acc_dtype)
            outputs += [t for _ in plan.sides for t in (empty.clone(), empty.long())]
        constant = [t for t, name in zip(outputs, names, strict=False) if name not in DIFFERENTIABLE]
        ctx.mark_non_differentiable(*constant, *outputs[len(names) :])
        plan.free()
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):
        _ = ctx.saved_tensors  # raises if one was changed in place
        plan: FusedPlan = ctx.plan
        gradients, workspaces = Gradients(plan, *ctx.needs_input_grad[:3]), plan.workspaces()
        by_name = {n: g for n, g in zip(ctx.names, grad_outputs, strict=False) if n in DIFFERENTIABLE}
        for chunk, (log_z, values, nonfinite) in zip(plan.chunks, ctx.saved, strict=True):
            tile = Tile(plan, chunk, workspaces, log_z)
            tile.values, tile.nonfinite = values, nonfinite
            g = plan.comm.all_gather_factors({n: t[chunk] for n, t in by_name.items()}, plan.geometry.chunk_size)
            _add_scores(gradients, tile, chunk, g)
        grads = gradients.finish()
        plan.free()
        return *grads, None, None, None


def _add_scores(gradients: Gradients, tile: Tile, chunk: slice, g: dict[str, Tensor]) -> None:
    """Add sum of g * d score; tokens whose g are all 0 get none, whatever their logits are."""
    zero_grad = torch.stack([t == 0 for t in g.values()]).all(0)
    gradients.add_tile(tile, chunk, ScoresGradient(tile, g), zero_grad)


class DivergencePerToken(torch.autograd.Function):
    """One divergence of klft.divergences.DIVERGENCES, [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, plan: FusedPlan, name: str, params: tuple[float, ...]):
        ctx.save_for_backward(hidden, weight, bias, *plan.constants())
        divergence = DIVERGENCES[name]
        ctx.plan, ctx.divergence, ctx.params, ctx.saved = plan, divergence, params, []
        workspaces, parts = plan.workspaces(), []
        for chunk in plan.chunks:
            tile = Tile(plan, chunk, workspaces)
            totals, dterm_sum = tile.totals(divergence, params)
            ctx.saved.append((tile.log_z, totals, dterm_sum))
            parts.append(plan.local(divergence.finish(totals, *params), chunk))
        plan.free()
        return _cat(parts, plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        _ = ctx.saved_tensors
        plan: FusedPlan = ctx.plan
        gradients, workspaces = Gradients(plan, *ctx.needs_input_grad[:3]), plan.workspaces()
        for chunk, (log_z, totals, dterm_sum) in zip(plan.chunks, ctx.saved, strict=True):
            tile = Tile(plan, chunk, workspaces, log_z)
            g = plan.comm.all_gather_factors({"g": grad_output[chunk]}, plan.geometry.chunk_size)["g"]
            dz = DivergenceGradient(tile, ctx.divergence, ctx.params, totals, dterm_sum, g)
            gradients.add_tile(tile, chunk, dz, zero_grad=g == 0)
        grads = gradients.finish()
        plan.free()
        return *grads, None, None, None


# ---- a loss, chunk by chunk -----------------------------------------------------------------------------------------


class ChunkScores:
    """A chunk's TokenScores [n] each, computed when first read: a loss pays for what it uses.

    Over shards all are computed at once: ranks whose losses read different scores must meet in the same collectives.
    After its chunk it raises: the next chunk's logits lie in the same memory.
    """

    def __init__(self, tile: Tile, chunk: slice):
        self._tile: Any = tile  # None once the chunk is done
        self._chunk = chunk
        self._leaves: dict[str, Tensor] = {}
        if tile.plan.comm.shard is not None:
            tile.measure(EXACT if tile.plan.reference is not None else EXACT[:1])

    def __getattr__(self, name: str) -> Tensor:
        tile = self._tile
        if tile is None:
            raise RuntimeError(
                f"fused_token_loss: {name} was read after loss_fn had returned; keep the tensors you need "
                f"(kept = scores.{name}.detach()), not the scores"
            )
        plan = tile.plan
        if name in ("logp", "ref_logp"):
            value = getattr(tile, name)
        elif name in EXACT and (plan.reference is not None or name == "entropy"):
            tile.measure((name,))
            value = tile.values[name]
        else:
            known = ("logp", "ref_logp", *EXACT)
            raise AttributeError(f"a loss reads {', '.join(known)} (most need a reference), not {name!r}")
        if value is None:
            raise AttributeError(f"{name} needs ref_hidden and ref_head")
        # A copy: the tile's own value is read again for the gradient.
        leaf = plan.local(value, self._chunk).clone().requires_grad_(name in DIFFERENTIABLE)
        if name in DIFFERENTIABLE:
            self._leaves[name] = leaf
        setattr(self, name, leaf)
        return leaf

    def gradients(self, loss: Tensor, factor: Tensor | None) -> dict[str, Tensor]:
        """factor * d loss / d score, for every token of the tile, by the scores that were read."""
        plan, g = self._tile.plan, {}
        if loss.requires_grad:
            _check_captured(loss, self._leaves)
            grads = torch.autograd.grad(loss, list(self._leaves.values()), allow_unused=True, materialize_grads=True)
            g = dict(zip(self._leaves, [t if factor is None else t * factor for t in grads], strict=True))
        if plan.comm.shard is not None:  # every rank takes part, whatever its own loss read
            zeros = torch.zeros_like(plan.local(self._tile.logp, self._chunk))  # pyright: ignore
            names = DIFFERENTIABLE if plan.reference is not None else DIFFERENTIABLE[:2]
            g = {name: g.get(name, zeros) for name in names}
        return plan.comm.all_gather_factors(g, plan.geometry.chunk_size)

    def close(self) -> None:
        """The tile's memory is about to be used again."""
        self._tile = None


def _check_captured(loss: Tensor, leaves: dict[str, Tensor]) -> None:
    """Raise ValueError if the loss depends on another differentiable tensor: its gradient would be lost."""
    own = {id(leaf) for leaf in leaves.values()}
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__.startswith("MeanBackward"):
            raise ValueError(
                "fused_token_loss: loss_fn takes a mean, but it sees a chunk of the tokens at a time: return the *sum* "
                "over the chunk, and divide the result by the number of all tokens"
            )
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            raise ValueError(
                "fused_token_loss: loss_fn's result depends on a differentiable tensor from outside (shape "
                f"{list(variable.shape)}), whose gradient would be lost. Detach it, or add its part outside."
            )
        todo += [parent for parent, _ in node.next_functions]


def loss_and_gradients(
    plan: FusedPlan,
    loss_fn: Callable[..., Tensor],
    per_token: Sequence[Tensor],
    wanted: Sequence[bool],
    factor: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(sum of loss_fn over chunks, factor * its gradients in hidden, weight and bias), one tile at a time."""
    gradients, workspaces = Gradients(plan, *wanted), plan.workspaces()
    total = plan.policy.hidden.new_zeros((), dtype=plan.policy.acc_dtype)
    has_gradient = not any(wanted) or not len(plan.policy.hidden)
    for chunk in plan.chunks:
        # 1. Both models' logits of these tokens.
        tile = Tile(plan, chunk, workspaces)
        scores = ChunkScores(tile, chunk)
        # 2. The user's loss on the scores of this process's tokens: a small autograd graph of its own.
        with torch.enable_grad():
            loss = loss_fn(scores, *(t[chunk] for t in per_token))
        if loss.dim():
            raise ValueError(f"fused_token_loss: loss_fn must return a scalar, got shape {list(loss.shape)}")
        total += loss.detach()
        has_gradient |= loss.requires_grad
        # 3. d loss / d score, then through the scores to the logits and through the head, while the tile is there.
        if any(wanted):
            g = scores.gradients(loss, factor)
            if g:
                _add_scores(gradients, tile, chunk, g)
        scores.close()
    if not has_gradient and bool(total != 0):  # a constant 0 is a penalty that has no part in the loss
        warnings.warn(
            "fused_token_loss: loss_fn's result has no gradient (detached, or made of constants), so hidden states and "
            "head get zeros. Leave out the detach(); around a loss that is only logged put torch.no_grad()",
            stacklevel=4,
        )
    grads = gradients.finish()
    plan.free()
    return total, grads


class TokenLoss(torch.autograd.Function):
    """The sum of loss_fn over this rank's chunks; its gradients, made in the forward, wait for the backward.

    With data-parallel tokens the backward all-gathers grad_output: the rows' gradient holds every rank's tokens, so
    where ranks weigh their losses differently all is done again, each with its factor.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, plan: FusedPlan, loss_fn: Callable, per_token: Sequence[Tensor]):
        ctx.save_for_backward(hidden, weight, bias, *plan.constants(*per_token))
        ctx.plan = plan
        ctx.again = functools.partial(loss_and_gradients, plan, loss_fn, per_token, ctx.needs_input_grad[:3])
        total, ctx.grads = ctx.again()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        comm = ctx.plan.comm
        again = ctx.grads is None
        if comm.dp_tokens:
            grad_outputs = comm.all_gather(grad_output)
            again |= not bool((grad_outputs == grad_outputs[0]).all())
        if again:
            # A second backward; or ranks that weigh their losses differently, which the rows' gradient must know.
            _, ctx.grads = ctx.saved_tensors, None
            return *ctx.again(factor=grad_output)[1], None, None, None
        # Handed over, not kept: the weight's gradient is the largest thing here. A second backward makes it anew.
        grads, ctx.grads = ctx.grads, None
        if grad_output.is_cuda or grad_output.item() != 1:  # .item() would have the CPU wait for the GPU
            grads = [None if g is None else g.mul_(grad_output) for g in grads]
        return *grads, None, None, None
