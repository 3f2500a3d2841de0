"""Reference, the protocol of what a policy must stay close to; resolve_reference makes one of whatever is given."""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from klft.heads import LMHead
from klft.models import check_no_shared_storage, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@runtime_checkable
class Reference(Protocol):
    """A frozen next-token distribution. Whatever has these members can stand in for it; nobody asks for its class.

    `logits` and `hidden` run without gradient, in eval mode, with every token at the position it would have without
    padding, and leave all modes as they were. A class that derives from this one need not define what it has not: by
    default it stays where it is and what it is, and has no logits and hidden states.

    Further members, for what is no single model: `parts`, a list of (weight, Reference), where the penalty is a
    weighted sum of KLs (MixtureReference); `score`, where it gives scores and no logits (TopKReference);
    `fixed_text`, a sentence, where it knows the tokens of given texts only.
    """

    @property
    def name(self) -> str:
        """Name in reports."""
        return type(self).__name__

    @property
    def vocab_size(self) -> int:
        """Rows of its vocabulary head, padding rows included."""
        ...

    @property
    def max_positions(self) -> int | None:
        """The longest text it can read, in tokens; None where it has no limit."""
        return None

    def to(self, device: torch.device | str) -> None:
        """Move to a device, if it can be moved (a quantised or device-mapped body stays where it is)."""

    def logits(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> Float[Tensor, "B K V"]:
        """Logits of the last `keep` positions (0: all), on the device of input_ids. TypeError where there are none."""
        raise TypeError(f"{type(self).__name__} has no logits of its own: ask KLPenalty.measure")

    def hidden(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> tuple[Float[Tensor, "B K D"], LMHead]:
        """(hidden states that its head reads at the last `keep` positions, the head), on its own device; no logits.

        Raises TypeError where the head cannot be read: then ask for logits.
        """
        raise TypeError(f"{type(self).__name__} has no hidden states of its own: ask KLPenalty.measure")

    def hidden_of(self, inputs: dict[str, Any]) -> tuple[Float[Tensor, "B T D"], LMHead]:
        """(hidden states at all positions, head) of one forward of the backbone with the keyword arguments `inputs`, as
        another model's backbone got them: input_ids, attention_mask or None, position_ids, what packing adds.

        Raises TypeError where the head cannot be read.
        """
        raise TypeError(f"{type(self).__name__} has no hidden states of its own: ask KLPenalty.measure")

    def check_independent(self, policy: nn.Module) -> None:
        """Raise ValueError, naming a parameter, if training the policy would move the reference."""

    def after_step(self, policy: nn.Module) -> None:
        """Called on every process after each optimizer step, for references that follow the policy."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold to continue; empty for what never changes."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`."""


def parts_of(reference: Reference) -> list[tuple[float, Reference]]:
    """(weight, reference) of a mixture's parts; of any other reference, itself with weight 1."""
    return getattr(reference, "parts", [(1.0, reference)])


def resolve_reference(reference: "Reference | PreTrainedModel | None", policy: nn.Module | None = None) -> Reference:
    """A reference from a Reference, a model (which is frozen), or None: the policy with its PEFT adapter off.

    Checked against the policy, if it is given, before anything is frozen. Raises ValueError for the policy itself, for
    a model that shares storage with it, and for None where the policy has no adapter; TypeError for anything else.
    """
    from klft.references.adapter import AdapterReference
    from klft.references.frozen import FrozenReference

    if reference is None:
        if policy is None:
            raise ValueError(
                "reference is None, and no policy is known: there is no PEFT adapter to switch off. Pass a "
                "second model, KLPenalty(ref_model), or KLPenalty(AdapterReference(policy)) for a PEFT policy"
            )
        if not hasattr(unwrap(policy), "disable_adapter"):
            raise ValueError(
                f"there is no reference, and {type(policy).__name__} has no PEFT adapter that could be switched off; "
                "pass a second model"
            )
        resolved: Reference = AdapterReference(policy)  # pyright: ignore[reportArgumentType]
    elif isinstance(reference, nn.Module):
        if policy is not None and unwrap(reference) is unwrap(policy):
            raise ValueError("the reference is the policy itself, so every KL is 0: load it a second time, or copy it")
        if policy is not None:
            check_no_shared_storage(reference, policy)
        return FrozenReference(reference)  # pyright: ignore[reportArgumentType]
    elif callable(getattr(reference, "logits", None)):  # not isinstance: that would read every property
        resolved = reference
    else:
        load = ": load it, AutoModelForCausalLM.from_pretrained(name)" if isinstance(reference, str) else ""
        raise TypeError(f"reference must be a model or a klft reference, got {type(reference).__name__}{load}")
    if policy is not None:
        resolved.check_independent(policy)
    return resolved
