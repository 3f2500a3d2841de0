"""Exact KL, entropies and log-probabilities from hidden states: the logits never exist whole.

    head, ref_head = LMHead.from_model(policy), LMHead.from_model(reference)
    scores = token_scores(hidden, head, token_ids, ref_hidden, ref_head)           # everything about a token, [N] each
    kl = linear_divergence(hidden, head, ref_hidden, ref_head, divergence="jsd")   # any row of the table, [N]
    loss = fused_token_loss(lambda s: s.reverse_kl.sum(), hidden, head, token_ids, ref_hidden, ref_head)
    loss.backward()

A head is a klft.heads.LMHead, whole or this process's rows (klft.sharding). All are differentiable in `hidden`,
`head.weight` and `head.bias`, never in the reference's side. The first two make their tiles a second time in the
backward; `fused_token_loss` takes the gradient while the tile is there: four matrix products in all.
Source of the idea of tiles: arXiv 2411.09009.
On a CPU several Python threads share the work; a FLOP counter or a profiler that watches its own thread only sees all
of it under torch.set_num_threads(1).
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klft import divergences
from klft.divergences import DIVERGENCES
from klft.fused import torch_backend
from klft.fused.sides import Side
from klft.fused.tiles import DIFFERENTIABLE, EXACT, Problem, Tile

# Logits of one model that a tile may hold (one token at least), its tokens, and the logits of a slice of it, which stay
# in a CPU's cache. See benchmarks/README.md.
CPU_TILE, TILE = 5 << 23, 1 << 28
CPU_TOKENS, TOKENS = 512, 1 << 14
CPU_SLICE, SLICE = 1 << 18, 1 << 24
BACKENDS = ("auto", "torch", "triton")


@dataclass
class TokenScores:
    """Per token, in nats: what both models say of the sampled token and how far apart they are over the vocabulary."""

    logp: Tensor
    ref_logp: Tensor | None = None
    entropy: Tensor | None = None
    ref_entropy: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None
    top1_agree: Tensor | None = None
    top_ids: Tensor | None = None  # [N, k]: what the policy would rather have said, best first
    top_p: Tensor | None = None
    ref_top_ids: Tensor | None = None
    ref_top_p: Tensor | None = None


def _backend(name: str, device: torch.device) -> Any:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return torch_backend
    try:
        from klft.fused import triton_backend
    except ImportError as error:
        if name == "triton":
            raise ImportError("backend='triton' needs the package triton: pip install triton, or 'torch'") from error
        return torch_backend
    if device.type != "cuda" and not triton_backend.INTERPRETED:
        raise ValueError(
            f"backend='triton' runs on a GPU, got tensors on {device}. Move them, choose 'torch', or set "
            "TRITON_INTERPRET=1 before Python starts, which is for tests: it is slow."
        )
    return triton_backend


def _check(hidden: Tensor, head: Any, role: str, n: int) -> None:
    if hidden.dim() != 2 or hidden.shape != (n, head.weight.shape[1]):
        raise ValueError(
            f"{role}: expected hidden states [N, D] = [{n}, {head.weight.shape[1]}], got {list(hidden.shape)}. Flatten "
            "batch and time first, and select the tokens that count: hidden[mask]."
        )


def _problem(
    hidden: Tensor,
    head: Any,
    token_ids: Tensor | None,
    ref_hidden: Tensor | None,
    ref_head: Any,
    temperature: float,
    backend: str = "auto",
) -> Problem:
    """Checked inputs. Raises ValueError for shapes, vocabularies, ids and temperatures that cannot be right."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    if (ref_hidden is None) != (ref_head is None):
        raise ValueError("ref_hidden and ref_head belong together: give both or neither")
    n = hidden.shape[0] if token_ids is None else token_ids.shape[0]
    vocab_size = head.rows
    _check(hidden, head, "the policy", n)
    if token_ids is None:
        token_ids = torch.zeros(n, dtype=torch.long, device=hidden.device)
    elif token_ids.dim() != 1 or (n and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size):
        raise ValueError(
            f"token_ids must be [N] ids in 0..{vocab_size - 1}, got shape {list(token_ids.shape)} with values from "
            f"{int(token_ids.min()) if token_ids.numel() else None} to "
            f"{int(token_ids.max()) if token_ids.numel() else None}. Drop masked tokens (-100) before."
        )
    policy, reference = Side(hidden, head, temperature), None
    if ref_hidden is not None and ref_head is not None:
        _check(ref_hidden, ref_head, "the reference", n)
        ref_head = _beside(head, ref_head)
        reference = Side(ref_hidden, ref_head, temperature, policy.wide)
    on_cpu, device = hidden.device.type == "cpu", hidden.device
    elements, tokens, of_slice = (CPU_TILE, CPU_TOKENS, CPU_SLICE) if on_cpu else (TILE, TOKENS, SLICE)
    wants, kernels = hidden.requires_grad and torch.is_grad_enabled(), _backend(backend, device)
    if kernels is not torch_backend:
        of_slice = None  # its kernels go through a tile as it is
    return Problem(policy, reference, token_ids, head.shard, elements, tokens, of_slice, wants, kernels)


def _beside(head: Any, ref_head: Any) -> Any:
    """The reference's head with the same rows as the policy's."""
    if ref_head.rows != head.rows:
        raise ValueError(
            f"the policy's head has {head.rows} rows, the reference's {ref_head.rows}: cut both to the ids they share, "
            f"head.cut({min(head.rows, ref_head.rows)})"
        )
    if head.shard is None and ref_head.shard is None:
        return ref_head
    if head.shard is None:
        raise ValueError("the reference's head is split over processes and the policy's is not: split both, or neither")
    if ref_head.shard is None:
        return ref_head.narrow(head.shard)
    if (ref_head.shard.start, ref_head.shard.stop) != (head.shard.start, head.shard.stop):
        raise ValueError(f"the heads are split differently: {head.shard} and {ref_head.shard}")
    return ref_head


class _Scored(torch.autograd.Function):
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


class _Row(torch.autograd.Function):
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


class _TokenLoss(torch.autograd.Function):
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


def token_scores(
    hidden: Float[Tensor, "N D"],
    head: Any,
    token_ids: Int[Tensor, "N"],
    ref_hidden: Float[Tensor, "N E"] | None = None,
    ref_head: Any = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
) -> TokenScores:
    """Everything klft reports about a token, [N] each, in nats, in one pass over both heads: two matrix products.

    Differentiable in hidden, head.weight and head.bias (logp, entropy, both KLs). Without a reference only logp,
    entropy (and top_ids, top_p) are there. With `top_k` both models' k most likely tokens and their probabilities.
    Raises ValueError for shapes, vocabularies, ids or temperatures that cannot be right.
    """
    problem = _problem(hidden, head, token_ids, ref_hidden, ref_head, temperature)
    if not 0 <= top_k <= head.rows:
        raise ValueError(f"token_scores: top_k must lie in 0..{head.rows} (the vocabulary), got {top_k}")
    both = ref_hidden is not None
    names = ("logp", "entropy", "ref_logp", "ref_entropy", "reverse_kl", "forward_kl") if both else ("logp", "entropy")
    tops = top_k if both or top_k else -1
    outputs: Any = _Scored.apply(hidden, head.weight, head.bias, problem, names, tops)
    scores = TokenScores(**dict(zip(names, outputs, strict=False)))
    found = outputs[len(names) :]
    if both:
        scores.top1_agree = found[1][:, 0] == found[3][:, 0]
    if top_k:
        scores.top_p, scores.top_ids = found[0].exp(), found[1]
        if both:
            scores.ref_top_p, scores.ref_top_ids = found[2].exp(), found[3]
    return scores


def _parameters(divergence: str, params: dict[str, float]) -> tuple[float, ...]:
    """The row's parameters in order, with defaults, checked as the dense function checks them."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}: choose one of {', '.join(DIVERGENCES)}")
    dense = getattr(divergences, divergence)
    point = [torch.zeros(1)] * (1 if divergence == "entropy" else 2)
    bound = inspect.signature(dense).bind(*point, **params)
    bound.apply_defaults()
    dense(*bound.args, **bound.kwargs)
    return tuple(float(value) for value in bound.args[len(point) :])


def linear_divergence(
    hidden: Float[Tensor, "N D"],
    head: Any,
    ref_hidden: Float[Tensor, "N E"],
    ref_head: Any,
    *,
    divergence: str = "reverse_kl",
    temperature: float = 1.0,
    backend: str = "auto",
    **params: float,
) -> Float[Tensor, "N"]:
    """Any divergence of klft.divergences (by its function's name, with its parameters) from hidden states, in nats.

    Equal to the dense function on head.logits(hidden) / temperature, and so is the gradient.
    Raises ValueError for an unknown name or a parameter that the dense function refuses, TypeError for one it has not.
    """
    values = _parameters(divergence, params)
    problem = _problem(hidden, head, None, ref_hidden, ref_head, temperature, backend)
    if divergence in EXACT:
        (result,) = _Scored.apply(hidden, head.weight, head.bias, problem, (divergence,), -1)  # pyright: ignore
        return result
    return _Row.apply(hidden, head.weight, head.bias, problem, divergence, values)  # pyright: ignore


def fused_token_loss(
    loss_fn: Callable[..., Tensor],
    hidden: Float[Tensor, "N D"],
    head: Any,
    token_ids: Int[Tensor, "N"],
    ref_hidden: Float[Tensor, "N E"] | None = None,
    ref_head: Any = None,
    *,
    temperature: float = 1.0,
    per_token: Sequence[Tensor] = (),
) -> Float[Tensor, ""]:
    """A loss over tokens, taken chunk by chunk, with its gradient made inside the forward: four matrix products.

    Args:
        loss_fn: `loss_fn(scores, *per_token_chunks)` -> the *sum* over a chunk's tokens, a scalar. `scores` has logp,
            entropy, ref_logp, ref_entropy, reverse_kl, forward_kl; only what is read is computed. Where processes
            have tokens of their own, a chunk may be empty on one of them.
        per_token: tensors [N, ...] that are cut to the chunk: advantages, old log-probabilities. Constants.

    Values in nats where the scores are. A second backward (retain_graph) runs loss_fn again. Raises ValueError where a
    gradient would be lost, and for what token_scores refuses.
    """
    problem = _problem(hidden, head, token_ids, ref_hidden, ref_head, temperature)
    for t in per_token:
        if t.requires_grad or len(t) != len(token_ids):
            raise ValueError(
                f"fused_token_loss: per_token tensors are constants with one entry per token ({len(token_ids)}), got "
                f"shape {list(t.shape)}, requires_grad={t.requires_grad}. Detach it."
            )
    # torch would not let loss_fn multiply by a tensor made in inference mode, as rollouts often are.
    constants = tuple(t.clone() if t.is_inference() else t for t in per_token)
    leaves = (hidden, head.weight, head.bias)
    if not torch.is_grad_enabled():  # autograd would have the gradients made all the same
        leaves = tuple(None if t is None else t.detach() for t in leaves)
    return _TokenLoss.apply(*leaves, problem, loss_fn, constants)  # pyright: ignore
