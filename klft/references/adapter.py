"""The policy's own base model as the reference: its adapter switched off."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from klft.heads import LMHead
from klft.models import causal_inputs, evaluating
from klft.references.frozen import ModelReference, hidden_and_head

if TYPE_CHECKING:
    from peft import PeftModel


class AdapterReference(ModelReference):
    """The policy itself with its PEFT adapter switched off: no second copy of the weights in memory.

    Logits equal the base model's exactly. Raises TypeError for a model without an adapter.
    """

    def __init__(self, peft_model: "PeftModel"):
        if not hasattr(peft_model, "disable_adapter"):
            raise TypeError(
                f"AdapterReference needs a PEFT model, got {type(peft_model).__name__}; use FrozenReference for a "
                "second, frozen model"
            )
        super().__init__(peft_model)

    @property
    def name(self) -> str:
        """The base model's name."""
        return f"{super().name} without its adapter"

    def to(self, device: torch.device | str) -> None:
        """Nothing: it is where the policy is."""

    def check_independent(self, policy: nn.Module) -> None:
        """Raise ValueError if the policy trains weights the adapter does not own: they are the reference's too."""
        # PEFT marks what an adapter owns with its tuner's prefix, or with one of these.
        marks = ["modules_to_save", "prompt_encoder", "trainable_tokens_"]
        marks.append(getattr(self.model.base_model, "prefix", "") or "prompt_encoder")
        shared = [n for n, p in policy.named_parameters() if p.requires_grad and not any(m in n for m in marks)]
        if shared:
            raise ValueError(
                f"these weights are trained but belong to the base model, which is the reference: {shared[:3]}. "
                "Freeze them, or pass a FrozenReference."
            )

    def logits(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> Float[Tensor, "B K V"]:
        """Logits of the last `keep` positions (0: all)."""
        inputs = causal_inputs(self.model, input_ids, attention_mask, keep)
        with evaluating(self.model), self.model.disable_adapter():
            return self.model(**inputs).logits[:, -keep:]

    def hidden(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> tuple[Float[Tensor, "B K D"], LMHead]:
        """(hidden states, head) of the base model. TypeError where the head cannot be read."""
        inputs = causal_inputs(self.model, input_ids, attention_mask, keep)
        with evaluating(self.model), self.model.disable_adapter():
            return hidden_and_head(self.model, inputs, keep)
