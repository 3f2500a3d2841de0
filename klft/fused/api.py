"""Public functions on hidden states and heads: token_scores, linear_divergence, fused_token_loss.

    head, ref_head = LMHead.from_model(policy), LMHead.from_model(reference)
    scores = token_scores(hidden, head, token_ids, ref_hidden, ref_head)           # everything about a token, [N] each
    kl = linear_divergence(hidden, head, ref_hidden, ref_head, divergence="jsd")   # any row of the table, [N]
    loss = fused_token_loss(lambda s: s.reverse_kl.sum(), hidden, head, token_ids, ref_hidden, ref_head)
    loss.backward()

A head is a klft.heads.LMHead, whole or this process's rows (klft.sharding). All are differentiable in `hidden`,
`head.weight` and `head.bias`, never on the reference's side. The first two recompute their tiles in the backward;
`fused_token_loss` takes the gradient while the tile is there: four matrix products in all.

Over processes all ranks of the head's group call together. Under tensor parallelism they hold the same loss; with
data-parallel tokens (`VocabShard.own_tokens`) each gets its own tokens' result, and gradients are those of the sum of
the ranks' losses. There an error about one rank's input (a ValueError) is raised on that rank, and on the others one
that names the rank: the first collective says so. An error elsewhere, in loss_fn say, leaves the others waiting until
that process ends.

On a CPU several Python threads share the work; a FLOP counter or a profiler that watches only its own thread sees all
of it under torch.set_num_threads(1).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from klft.divergences import DivergenceName, find_divergence
from klft.fused import torch_backend
from klft.fused.collectives import Collectives
from klft.fused.functions import DivergencePerToken, Scores, TokenLoss
from klft.fused.model_side import ModelSide
from klft.fused.plan import FusedPlan, make_plan
from klft.fused.tile import EXACT
from klft.heads import LMHead
from klft.masked import check_ids
from klft.scores import TokenScores, check_temperature

Backend = Literal["auto", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def _backend(name: Backend, device: torch.device) -> Any:
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


def _check_hidden(hidden: Tensor, head: LMHead, role: str, n: int) -> None:
    if hidden.dim() != 2 or hidden.shape != (n, head.weight.shape[1]):
        raise ValueError(
            f"{role}: expected hidden states [N, D] = [{n}, {head.weight.shape[1]}], got {list(hidden.shape)}. Flatten "
            "batch and time first, and select the tokens that count: hidden[mask]."
        )


def plan_of(
    hidden: Tensor,
    head: LMHead,
    token_ids: Tensor | None,
    ref_hidden: Tensor | None = None,
    ref_head: LMHead | None = None,
    temperature: float = 1.0,
    backend: Backend = "auto",
    per_token: Sequence[Tensor] = (),
) -> FusedPlan:
    """Checked inputs, cut. Raises ValueError for shapes, vocabularies, ids and temperatures that cannot be right."""
    comm = Collectives(head.shard)
    try:
        policy, reference, token_ids = _checked(hidden, head, token_ids, ref_hidden, ref_head, temperature)
        _check_per_token(per_token, len(token_ids))
        chosen = _backend(backend, hidden.device)
    except ValueError:
        comm.refuse(hidden.device)  # the others wait for this rank in `agree`
        raise
    wants_grad = [
        t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, head.weight, head.bias)
    ]
    if policy.acc_dtype != torch.float32:
        chosen = torch_backend  # Triton's kernels are fp32
    return make_plan(policy, reference, token_ids, comm, chosen, wants_grad)


def _checked(
    hidden: Tensor,
    head: LMHead,
    token_ids: Tensor | None,
    ref_hidden: Tensor | None,
    ref_head: LMHead | None,
    temperature: float,
) -> tuple[ModelSide, ModelSide | None, Tensor]:
    """(policy, reference, token ids [N]); -1 where no token's logp is asked for."""
    check_temperature(temperature)
    if (ref_hidden is None) != (ref_head is None):
        raise ValueError("ref_hidden and ref_head belong together: give both or neither")
    n = hidden.shape[0] if token_ids is None else token_ids.shape[0]
    _check_hidden(hidden, head, "the policy", n)
    if token_ids is None:
        token_ids = torch.full((n,), -1, device=hidden.device)
    else:
        if token_ids.dim() != 1:
            raise ValueError(
                f"token_ids must be [N], one id per row of hidden states, got shape {list(token_ids.shape)}"
            )
        check_ids(token_ids, head.vocab_size, "token_ids")
    policy, reference = ModelSide(hidden, head, temperature), None
    if ref_hidden is not None and ref_head is not None:
        _check_hidden(ref_hidden, ref_head, "the reference", n)
        reference = ModelSide(ref_hidden, _same_rows(head, ref_head), temperature, policy.acc_dtype)
    return policy, reference, token_ids


def _check_per_token(per_token: Sequence[Tensor], tokens: int) -> None:
    for i, t in enumerate(per_token):
        entries = len(t) if t.dim() else "no"
        if entries != tokens:
            raise ValueError(
                f"fused_token_loss: per_token[{i}] has {entries} entries (shape {list(t.shape)}), and there are "
                f"{tokens} tokens: give one entry per row of hidden states, per_token[{i}][mask] of one [B, T]"
            )
        if t.requires_grad:
            raise ValueError(
                f"fused_token_loss: per_token[{i}] requires a gradient, which would be lost: it is a constant here. "
                "Detach it, or add its part of the loss outside"
            )


def as_head(head: LMHead | nn.Module, role: str) -> LMHead:
    """A head; a linear layer is one without scale and softcap. TypeError for anything else."""
    if isinstance(head, LMHead):
        return head
    if isinstance(head, nn.Linear):
        return LMHead(head.weight, head.bias)
    raise TypeError(
        f"{role}: expected a klft.LMHead (LMHead.from_model(model), or LMHead(weight) of a bare weight), got "
        f"{type(head).__name__}"
    )


def _inputs(
    hidden: Tensor, head: LMHead | nn.Linear, ref_head: LMHead | nn.Linear | None
) -> tuple[Tensor, LMHead, LMHead | None]:
    """What a user may pass -> what is worked on."""
    return (
        _ordinary(hidden),
        as_head(head, "the policy"),
        None if ref_head is None else as_head(ref_head, "the reference"),
    )


def _ordinary(t: Tensor) -> Tensor:
    """A copy of what was made in inference mode, as rollouts often are: autograd saves no such tensor."""
    return t.clone() if t.is_inference() else t


def _same_rows(head: LMHead, ref_head: LMHead) -> LMHead:
    """The reference's head with the same rows as the policy's."""
    if ref_head.vocab_size != head.vocab_size:
        raise ValueError(
            f"the policy's head has {head.vocab_size} rows, the reference's {ref_head.vocab_size}: cut both to the ids "
            f"they share, head.cut({min(head.vocab_size, ref_head.vocab_size)})"
        )
    if ref_head.shard is not None and ref_head.shard.world == 1:
        ref_head = replace(ref_head, shard=None)
    if head.shard is None and ref_head.shard is None:
        return ref_head
    if head.shard is None:
        raise ValueError("the reference's head is split over processes and the policy's is not: split both, or neither")
    if ref_head.shard is None:
        return ref_head.narrow(head.shard)
    if replace(ref_head.shard, group=None) != replace(head.shard, group=None):
        raise ValueError(f"the heads are split differently: {head.shard} and {ref_head.shard}")
    return ref_head


def token_scores(
    hidden: Float[Tensor, "N D"],
    head: LMHead | nn.Linear,
    token_ids: Int[Tensor, "N"],
    ref_hidden: Float[Tensor, "N E"] | None = None,
    ref_head: LMHead | nn.Linear | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
) -> TokenScores:
    """Everything klft reports about a token, [N] each, in nats, in one pass over both heads: two matrix products.

    Example:
        head, ref_head = LMHead.from_model(model), LMHead.from_model(ref_model)
        s = token_scores(hidden, head, token_ids, ref_hidden, ref_head)  # hidden[i] predicts token_ids[i]
        print(s, s.reverse_kl.mean(), s.entropy.mean(), s.top1_agree.float().mean())

    Differentiable in hidden, head.weight and head.bias (logp, entropy, both KLs). Without a reference only logp,
    entropy (and top_ids, top_p) are there. With `top_k` both models' k most likely tokens and their probabilities.
    Raises ValueError for shapes, vocabularies, ids or temperatures that cannot be right.
    """
    hidden, own, theirs = _inputs(hidden, head, ref_head)
    plan = plan_of(hidden, own, token_ids, ref_hidden, theirs, temperature)
    if not 0 <= top_k <= own.vocab_size:
        raise ValueError(f"token_scores: top_k must lie in 0..{own.vocab_size} (the vocabulary), got {top_k}")
    both = ref_hidden is not None
    names = ("logp", "entropy", "ref_logp", "ref_entropy", "reverse_kl", "forward_kl") if both else ("logp", "entropy")
    wanted = top_k if both or top_k else -1  # top-1 agreement needs each model's best token
    outputs: Any = Scores.apply(hidden, own.weight, own.bias, plan, names, wanted)
    scores = TokenScores(**dict(zip(names, outputs, strict=False)))
    tops = outputs[len(names) :]
    if both:
        scores.top1_agree = tops[1][:, 0] == tops[3][:, 0]
    if top_k:
        scores.top_p, scores.top_ids = tops[0].exp(), tops[1]
        if both:
            scores.ref_top_p, scores.ref_top_ids = tops[2].exp(), tops[3]
    return scores


def linear_divergence(
    hidden: Float[Tensor, "N D"],
    head: LMHead | nn.Linear,
    ref_hidden: Float[Tensor, "N E"],
    ref_head: LMHead | nn.Linear,
    *,
    divergence: DivergenceName = "reverse_kl",
    temperature: float = 1.0,
    backend: Backend = "auto",
    **params: float,
) -> Float[Tensor, "N"]:
    """Any divergence of klft.divergences (by its function's name, with its `params`) from hidden states, in nats.

    `backend`: "auto" is "triton" on a GPU where it is installed, else "torch".
    Equal to the dense function on head.logits(hidden) / temperature, and so is the gradient.
    Raises ValueError for an unknown name or a parameter that the dense function refuses, TypeError for one it has not.
    """
    _, values = find_divergence(divergence, params)
    hidden, own, theirs = _inputs(hidden, head, ref_head)
    if divergence not in EXACT:
        # Formulas of klft.divergences on a block, in torch on every device: Triton's blocks would be whole tiles.
        _backend(backend, hidden.device)
        backend = "torch"
    plan = plan_of(hidden, own, None, ref_hidden, theirs, temperature, backend)
    if divergence in EXACT:
        (result,) = Scores.apply(hidden, own.weight, own.bias, plan, (divergence,), -1)  # pyright: ignore
        return result
    return DivergencePerToken.apply(hidden, own.weight, own.bias, plan, divergence, values)  # pyright: ignore


def fused_token_loss(
    loss_fn: Callable[..., Tensor],
    hidden: Float[Tensor, "N D"],
    head: LMHead | nn.Linear,
    token_ids: Int[Tensor, "N"],
    ref_hidden: Float[Tensor, "N E"] | None = None,
    ref_head: LMHead | nn.Linear | None = None,
    *,
    temperature: float = 1.0,
    per_token: Sequence[Tensor] = (),
) -> Float[Tensor, ""]:
    """A loss over tokens, taken chunk by chunk, with its gradient made inside the forward: four matrix products.

    Example:
        head, ref_head = LMHead.from_model(model), LMHead.from_model(ref_model)
        loss = fused_token_loss(
            lambda s, advantage: (0.05 * s.reverse_kl - s.logp * advantage).sum(),
            hidden, head, token_ids, ref_hidden, ref_head, per_token=(advantages,),
        )
        loss.backward()

    Args:
        loss_fn: `loss_fn(scores, *per_token_chunks)` -> the *sum* over a chunk's tokens, a scalar. `scores` has logp,
            entropy, ref_logp, ref_entropy, reverse_kl, forward_kl; only what is read is computed. Where processes
            have tokens of their own, a chunk may be empty on one of them.
        per_token: tensors [N, ...] that are cut to the chunk: advantages, old log-probabilities. Constants.

    Values in nats where the scores are. A second backward (retain_graph) runs loss_fn again. Raises ValueError where a
    gradient would be lost, and for what token_scores refuses.
    """
    hidden, own, theirs = _inputs(hidden, head, ref_head)
    plan = plan_of(hidden, own, token_ids, ref_hidden, theirs, temperature, per_token=per_token)
    constants = tuple(map(_ordinary, per_token))
    leaves = (hidden, own.weight, own.bias)
    if not torch.is_grad_enabled():  # autograd would have the gradients made all the same
        leaves = tuple(None if t is None else t.detach() for t in leaves)
    return TokenLoss.apply(*leaves, plan, loss_fn, constants)  # pyright: ignore
