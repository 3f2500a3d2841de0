"""The tensors that a penalty measures: do they belong together, and where do the two models part for good."""

import torch
from jaxtyping import Float
from torch import Tensor


def check_measured(logits: Tensor, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> None:
    """Raise ValueError, naming the convention, unless logits are [B, T, V] and the others [B, T]."""
    shape = input_ids.shape
    if input_ids.dim() != 2 or logits.shape[:-1] != shape or attention_mask.shape != shape or mask.shape != shape:
        raise ValueError(
            "KLPenalty.measure: expected logits [B, T, V] of whole sequences, prompt and completion, not shifted, and "
            f"input_ids, attention_mask and mask [B, T] (mask True on generated tokens); got logits "
            f"{list(logits.shape)}, input_ids {list(shape)}, attention_mask {list(attention_mask.shape)}, mask "
            f"{list(mask.shape)}"
        )
    if input_ids.numel() and int(input_ids.min()) < 0:
        raise ValueError(
            f"KLPenalty.measure: input_ids has {int(input_ids.min())}: pass the ids, not labels, and say in `mask` "
            "which tokens count"
        )


def find_one_sided(logits: Float[Tensor, "N V"], ref_logits: Float[Tensor, "N V"]) -> tuple[int, ...]:
    """Ids that only one of the models suppresses."""
    return tuple(((logits == -torch.inf) != (ref_logits == -torch.inf)).any(0).nonzero().flatten().tolist())
