"""From what a user hands over to a reference."""

from typing import Any

from torch import nn

from klft.references.adapter import AdapterReference
from klft.references.frozen import FrozenReference


def as_reference(reference: Any, model: nn.Module) -> FrozenReference | AdapterReference:
    """A model or a klft reference -> a klft reference; None -> the policy with its adapter off.

    Raises ValueError where the policy is given as its own reference, or None and it has no adapter; TypeError for what
    is no causal language model.
    """
    if isinstance(reference, (FrozenReference, AdapterReference)):
        return reference
    if reference is model:
        raise ValueError("the reference is the policy itself, so every KL is 0: load it a second time, or copy it")
    if reference is not None:
        return FrozenReference(reference)
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            f"there is no reference, and {type(model).__name__} has no PEFT adapter that could be switched off; pass a "
            "second model"
        )
    return AdapterReference(model)  # pyright: ignore[reportArgumentType]
