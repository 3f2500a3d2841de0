"""The policy's own base model as the reference: its adapter switched off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from klft.models import VALUE_MODULES, address, evaluating, unwrap
from klft.references.frozen import ModelReference

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


# LoRA initialisations that leave the base weights as they are. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract
# from them what the adapter starts with.
KEEPING_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


def why_base_moves(config: "PeftConfig") -> str | None:
    """Why a model with its adapter off would not be, or not stay, the base model; None where it is."""
    if getattr(config, "layer_replication", None):
        return "layer_replication repeats layers of the base model"
    initial = getattr(config, "init_lora_weights", True)
    if initial not in KEEPING_THE_BASE:
        return f"init_lora_weights={initial!r} rewrites the base weights"
    bias = getattr(config, "bias", "none")
    return f"bias={bias!r} trains biases of the base model" if bias != "none" else None


class AdapterReference(ModelReference):
    """The policy itself with its PEFT adapter switched off: no second copy of the weights in memory.

    Logits equal the base model's exactly. Raises TypeError for a model without an adapter.
    """

    def __init__(self, peft_model: "PeftModel"):
        peft_model = unwrap(peft_model)  # pyright: ignore - also inside DDP, DeepSpeed's engine, torch.compile
        if not hasattr(peft_model, "disable_adapter"):
            raise TypeError(
                f"AdapterReference needs a PEFT model, got {type(peft_model).__name__}; use FrozenReference for a "
                "second, frozen model"
            )
        super().__init__(peft_model)
        for name, config in getattr(peft_model, "peft_config", {}).items():
            problem = why_base_moves(config)
            if problem:
                raise ValueError(
                    f"adapter {name!r}: {problem}, so the model without its adapter is not the base model. Load the "
                    "base model a second time and pass it as the reference."
                )

    @property
    def name(self) -> str:
        """The base model's name."""
        return f"{super().name} without its adapter"

    def to(self, device: torch.device | str) -> None:
        """Nothing: it is where the policy is."""

    def check_independent(self, policy: nn.Module) -> None:
        """Raise ValueError if the policy trains weights the adapter does not own: they are the reference's too."""
        # PEFT marks what an adapter owns with its tuner's prefix, or with one of these; a value function is not read.
        marks = ["modules_to_save", "prompt_encoder", "trainable_tokens_"]
        marks += [getattr(self.model.base_model, "prefix", "") or "prompt_encoder", *VALUE_MODULES]
        trained = [(n, p) for n, p in policy.named_parameters() if p.requires_grad and not any(m in n for m in marks)]
        own = {id(p) for p in self.model.parameters()} | ({address(p) for p in self.model.parameters()} - {None})
        shared = [name for name, p in trained if id(p) in own or address(p) in own]
        if shared:
            raise ValueError(
                f"these weights are trained but belong to the base model, which is the reference: {shared[:3]}. "
                "Freeze them, or pass a FrozenReference."
            )

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        with evaluating(self.model), self.model.disable_adapter():
            yield
