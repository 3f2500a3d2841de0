"""The frozen reference: whatever the policy must stay close to, as a thing that gives logits and never learns.

`reference(input_ids, attention_mask, keep)` returns the logits of the last `keep` positions, [B, keep, V], under
no_grad, in eval mode, with the tokens at the positions they would have without padding. `reference.hidden(...)`, with
the same arguments, returns what its head would have read and the head, and computes no logits.
"""

import logging
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from klft.heads import LMHead
from klft.models import causal_inputs, hidden_states, require_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@torch.no_grad()
def hidden_and_head(model: nn.Module, inputs: dict, keep: int) -> tuple[Tensor, LMHead]:
    with hidden_states(model) as kept:
        model(**inputs)
    return kept.hidden[:, -keep:], LMHead.from_model(model)


class FrozenReference:
    """A separate model, frozen: eval mode, no parameter asks for a gradient. TypeError for anything but a causal LM.

    The model is changed in place (frozen); it may be of another dtype, device or architecture than the policy, as long
    as the vocabulary is the same.
    """

    def __init__(self, model: "PreTrainedModel"):
        require_causal_lm(model, "reference")
        self.model = model.eval().requires_grad_(False)

    def check_apart_from(self, policy: nn.Module) -> None:
        """Raise ValueError if a parameter of the policy lives in the reference's memory: it would drift along."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters() if p.numel()}
        for name, p in policy.named_parameters():
            if p.numel() and p.untyped_storage().data_ptr() in own:
                raise ValueError(
                    f"the reference shares the policy's memory (parameter {name!r}), so it would not stay frozen. "
                    "Load it a second time, or copy it with copy.deepcopy(model)."
                )

    def __call__(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> Float[Tensor, "B K V"]:
        device = next(self.model.parameters()).device
        inputs = causal_inputs(self.model, input_ids.to(device), attention_mask.to(device), keep)
        self.model.eval()  # a trainer that walks over modules may have flipped it
        with torch.no_grad():
            return self.model(**inputs).logits[:, -keep:].to(input_ids.device)

    def hidden(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> tuple[Float[Tensor, "B K D"], LMHead]:
        """(hidden states, head), both on the reference's own device."""
        device = next(self.model.parameters()).device
        inputs = causal_inputs(self.model, input_ids.to(device), attention_mask.to(device), keep)
        self.model.eval()
        return hidden_and_head(self.model, inputs, keep)
