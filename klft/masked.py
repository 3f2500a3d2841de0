"""Sums and means over the tokens that count, and the log-probability of a token that was sampled.

`mask` is True where a token counts. Masked entries are replaced before they are summed, never multiplied by zero, so
a NaN under the mask changes neither a value nor a gradient. `reduce` sums a tensor over processes (for instance
`lambda t: accelerator.reduce(t, "sum")`); with it, every mean and variance is the one a single process would get.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor


def no_reduce(t: Tensor) -> Tensor:
    """The sum over a single process."""
    return t


Reduce = Callable[[Tensor], Tensor]


Mask = Bool[Tensor, "*B"] | Integer[Tensor, "*B"]
"""True, or 1, where a token counts."""


def as_mask(mask: Tensor) -> Tensor:
    """A boolean mask of one with integers 0 and 1 in it, as tokenizers make them. ValueError for any other number."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point():
        raise ValueError(f"a mask is True or 1 where a token counts; {mask.dtype} might be weights: pass mask != 0")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("a mask is True or 1 where a token counts, else False or 0; got other numbers")
    return mask != 0


def scatter_masked(flat: Shaped[Tensor, "N *K"], mask: Bool[Tensor, "*B"]) -> Shaped[Tensor, "..."]:
    """[*B, *K], the inverse of `t[mask]`: its values back in their places, 0 elsewhere."""
    grid = flat.new_zeros(*mask.shape, *flat.shape[1:])
    grid[mask] = flat
    return grid


def masked_sum(x: Float[Tensor, "*B"], mask: Mask, reduce: Reduce = no_reduce) -> Float[Tensor, ""]:
    """Sum of x where mask holds, over all processes."""
    return reduce(torch.where(as_mask(mask), x, 0.0).sum())


def masked_mean(
    x: Float[Tensor, "*B"], mask: Mask, reduce: Reduce = no_reduce, *, dim: int | None = None
) -> Float[Tensor, "..."]:
    """Mean of x where mask holds, over all processes: global sum / global count. 0 where nothing counts.

    `dim`: over that dimension alone, one mean for each place in the others.
    """
    mask = as_mask(mask)
    count = reduce(mask.sum(dim)).clamp(min=1)
    return (masked_sum(x, mask, reduce) if dim is None else reduce(torch.where(mask, x, 0.0).sum(dim))) / count


def masked_var(x: Float[Tensor, "*B"], mask: Mask, reduce: Reduce = no_reduce) -> Float[Tensor, ""]:
    """Variance of x where mask holds, over all processes; divided by the count, not count - 1. 0 for a single token."""
    mask = as_mask(mask)
    x = torch.where(mask, x, 0.0)  # what is masked must not reach the arithmetic: a NaN would come back as a gradient
    # Two passes: a sum of squares minus a squared mean cancels in fp32.
    return masked_mean((x - masked_mean(x, mask, reduce)).square(), mask, reduce)


def masked_whiten(
    x: Float[Tensor, "*B"], mask: Mask, reduce: Reduce = no_reduce, *, shift_mean: bool = True, eps: float = 1e-8
) -> Float[Tensor, "*B"]:
    """(x - mean) / sqrt(var + eps) where mask holds, 0 elsewhere. `shift_mean=False` only rescales: the mean is scaled
    too, where TRL's masked_whiten puts it back as it was. The variance is masked_var's, divided by the count."""
    mask = as_mask(mask)
    x = torch.where(mask, x, 0.0)
    centre = masked_mean(x, mask, reduce) if shift_mean else 0.0
    return torch.where(mask, (x - centre) * torch.rsqrt(masked_var(x, mask, reduce) + eps), 0.0)


def check_ids(ids: Integer[Tensor, "..."], vocab_size: int, where: str) -> None:
    """Raise ValueError, naming the convention, unless all ids are in 0..vocab_size - 1."""
    if not ids.numel() or torch.compiler.is_compiling():  # compiled code must not wait for a value
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < 0:
        way_out = "drop or mask labels of -100 (take labels.clamp(min=0) and leave their results out)"
    elif high >= vocab_size:
        way_out = "they are of another vocabulary"
    else:
        return
    raise ValueError(
        f"{where}: ids are 0..{vocab_size - 1}, got {low if low < 0 else high} (shape {list(ids.shape)}): {way_out}"
    )


class _TokenLogps(torch.autograd.Function):
    """Keeps the logits and recomputes the softmax; a row whose result is masked stays exactly 0 even if it is NaN."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        z = logits if logits.dtype == torch.float64 else logits.float()
        log_z = z.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, labels, log_z)
        return (z.gather(-1, labels.unsqueeze(-1)) - log_z).squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        logits, labels, log_z = ctx.saved_tensors
        grad = -(logits.to(log_z.dtype) - log_z).exp_()
        chosen = labels.unsqueeze(-1)
        grad.scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=grad.dtype))
        grad = (grad * grad_output.unsqueeze(-1)).masked_fill_(grad_output.unsqueeze(-1) == 0, 0.0)
        return grad.to(logits.dtype), None


def token_logps(logits: Float[Tensor, "*B V"], labels: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """log p(labels), in nats, fp32 inside (fp64 for fp64). `logits[..., t, :]` must be what predicts `labels[..., t]`.

    Labels must be real ids: replace ignored ones (-100) by any id and mask their result. Raises ValueError for others.
    """
    check_ids(labels, logits.shape[-1], "token_logps")
    return _TokenLogps.apply(logits, labels)  # pyright: ignore
