"""The policy's own base model as the reference: its adapter switched off."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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


def trained_weights(policy: nn.Module, kept: Iterable[Tensor]) -> list[str]:
    """Names of the policy's trained parameters that live in the storage of `kept`; the value function's left out."""
    held = list(kept)
    own = {id(p) for p in held} | ({address(p) for p in held} - {None})
    trained = [
        (name, p)
        for name, p in policy.named_parameters()
        if p.requires_grad and VALUE_MODULES.isdisjoint(name.split("."))
    ]
    return [name for name, p in trained if id(p) in own or address(p) in own]


class AdapterReference(ModelReference):
    """The policy's own model with another adapter, or with none: no second copy of the base weights in memory.

    Args:
        peft_model: the policy, as it is trained; it may be wrapped (DDP, DeepSpeed, torch.compile).
        adapter: the reference is the model with this adapter in place of the active one: one that is frozen, as
            `load_adapter(path, adapter_name="reference")` has it. Default: all adapters off, so that logits equal the
            base model's exactly.

    Active adapters, modes and requires_grad are afterwards what they were. Raises TypeError for a model without an
    adapter, ValueError for an adapter that is not there, and where the base weights are not the base model's.
    """

    def __init__(self, peft_model: "PeftModel", adapter: str | None = None):
        peft_model = unwrap(peft_model)  # pyright: ignore - also inside DDP, DeepSpeed's engine, torch.compile
        if not hasattr(peft_model, "disable_adapter"):
            raise TypeError(
                f"AdapterReference needs a PEFT model, got {type(peft_model).__name__}; use FrozenReference for a "
                "second, frozen model; where a trainer makes the adapter (peft_config), give it a function of the "
                "policy: penalty=lambda model: KLPenalty(AdapterReference(model), ...)"
            )
        super().__init__(peft_model)
        self.adapter, configs = adapter, getattr(peft_model, "peft_config", {})
        if adapter is not None and (adapter not in configs or configs[adapter].is_prompt_learning):
            raise ValueError(
                f"AdapterReference: adapter={adapter!r} is not an adapter on layers of this model, which has "
                f"{', '.join(configs)}. Load it first: model.load_adapter(path, adapter_name={adapter!r})"
            )
        for name, config in configs.items():
            problem = why_base_moves(config)
            if problem:
                raise ValueError(
                    f"adapter {name!r}: {problem}, so the model without its adapter is not the base model. Load the "
                    "base model a second time and pass it as the reference."
                )

    def _settings(self) -> dict[str, Any]:
        return {"adapter": self.adapter}

    @property
    def name(self) -> str:
        """The base model's name, and which adapter is on."""
        return f"{super().name} " + ("without its adapter" if self.adapter is None else f"with adapter {self.adapter}")

    def to(self, device: torch.device | str) -> None:
        """Nothing: it is where the policy is."""

    def check_independent(self, policy: nn.Module) -> None:
        """Raise ValueError if the policy trains weights the adapter does not own, or the reference's own adapter."""
        # PEFT marks what an adapter owns with its tuner's prefix, or with one of these.
        marks = ["modules_to_save", "prompt_encoder", "trainable_tokens_"]
        marks += [getattr(self.model.base_model, "prefix", "") or "prompt_encoder"]
        trained = trained_weights(policy, self.model.parameters())
        shared = [name for name in trained if not any(m in name for m in marks)]
        if shared:
            raise ValueError(
                f"these weights are trained but belong to the base model, which is the reference: {shared[:3]}. "
                "Freeze them, or pass a FrozenReference."
            )
        own = [name for name in trained if self.adapter in name.split(".")]
        if own:
            raise ValueError(
                f"these weights are trained but belong to adapter {self.adapter!r}, which is the reference: {own[:3]}. "
                "Train another adapter: model.set_adapter(...), then requires_grad_(False) on these"
            )

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        chosen = self.model.disable_adapter() if self.adapter is None else _adapter_on(self.model, self.adapter)
        with evaluating(self.model), chosen:
            yield


@contextmanager
def _adapter_on(model: Any, adapter: str) -> Iterator[None]:
    """This adapter alone at work. PEFT freezes the others meanwhile, so all flags are put back."""
    active, of_layers = model.active_adapter, model.base_model.active_adapter  # a list where several are on
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        model.set_adapter(adapter, inference_mode=True)
        yield
    finally:
        model.base_model.set_adapter(of_layers, inference_mode=True)
        model.active_adapter = active
        for p in trained:
            p.requires_grad_(True)
