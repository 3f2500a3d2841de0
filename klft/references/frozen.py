"""A separate model, frozen."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from klft.divergences import reverse_kl
from klft.heads import LMHead
from klft.models import (
    base_of,
    causal_inputs,
    check_causal,
    check_left_padding,
    check_no_shared_storage,
    device_of,
    hidden_states,
    max_positions,
    model_name,
    require_causal_lm,
    vocab_size,
)
from klft.parallel import ModelPlacement, Placement, reshard
from klft.writing import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class ModelReference:
    """Base of references that hold a transformers model; nothing outside reads `model`."""

    def __init__(self, model: Any):
        require_causal_lm(model, "reference")
        self.model = model
        self._padding_checked = False

    @one_line
    def __repr__(self) -> str:
        base, parameters = base_of(self.model), [*self.model.parameters()]
        size = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)  # ZeRO-3 keeps empty ones
        named = f" {base.config._name_or_path!r}" if base.config._name_or_path else ""
        kinds = "/".join(dict.fromkeys(str(p.dtype) for p in parameters))
        own = [f"{key}={value!r}" for key, value in self._settings().items()]
        return ", ".join([f"{type(base).__name__}{named}", f"{size:,} parameters", kinds, str(self._device), *own])

    def _settings(self) -> dict[str, Any]:
        """What its repr says beside the model."""
        return {}

    @property
    def name(self) -> str:
        """The model's name or path, else its class."""
        return model_name(self.model)

    @property
    def vocab_size(self) -> int:
        """Rows of its vocabulary head."""
        return vocab_size(self.model)

    @property
    def max_positions(self) -> int | None:
        """The longest text it can read, in tokens; None where it has no limit."""
        return max_positions(self.model)

    def after_step(self, policy: nn.Module) -> None:
        """Nothing: it never changes."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: it never changes."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing: it never changes."""

    def logits(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> Float[Tensor, "B K V"]:
        """Logits of the last `keep` positions (0: all), on the device of input_ids."""
        return self._logits(self._inputs(input_ids, attention_mask, keep), keep).to(input_ids.device)

    def logits_by_column(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> Float[Tensor, "B K V"]:
        """`logits` as a forward without position_ids gives them: positions count padding."""
        inputs = self._inputs(input_ids, attention_mask, keep)
        inputs.pop("position_ids", None)
        return self._logits(inputs, keep).to(input_ids.device)

    def hidden(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> tuple[Float[Tensor, "B K D"], LMHead]:
        """(hidden states, head), both on the reference's own device. TypeError where the head cannot be read."""
        inputs = self._inputs(input_ids, attention_mask, keep)
        with self._scoring():
            self._check_padding(inputs["attention_mask"])
            return hidden_and_head(self.model, inputs, keep)

    def hidden_of(self, inputs: dict[str, Any]) -> tuple[Float[Tensor, "B T D"], LMHead]:
        """(hidden states at all positions, head) of one forward of the backbone with these very keyword arguments, as
        another model's backbone got them: positions, packing and images come along. TypeError as for `hidden`.
        """
        device = self._device
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        with self._scoring():
            hidden = base_of(self.model).base_model(**inputs).last_hidden_state
            reshard(self.model)  # else a head gathered with its backbone would be read, and given back under the reader
            return hidden, LMHead.from_model(self.model)

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> dict[str, Any]:
        device = self._device
        return causal_inputs(self.model, input_ids.to(device), attention_mask.to(device), keep)

    def _logits(self, inputs: dict[str, Any], keep: int) -> Tensor:
        with self._scoring():
            self._check_padding(inputs["attention_mask"])
            return self.model(**inputs).logits[:, -keep:]

    def _scoring(self) -> AbstractContextManager[Any]:
        """Eval mode, no gradient, and the model as the reference it stands for."""
        raise NotImplementedError

    def check_independent(self, policy: nn.Module) -> None:
        """Raise ValueError, naming a parameter, if training the policy would move the reference."""
        raise NotImplementedError

    def _check_padding(self, attention_mask: Tensor) -> None:
        """Before any row that it is causal; before the first with left padding that it leaves that out.

        Over processes both before any row, so that all take part.
        """
        check_causal(self.model, "reference")
        if self._padding_checked:
            return
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if together or bool((attention_mask[:, :1] == 0).any()):
            check_left_padding(self.model, "reference")
            self._padding_checked = True

    # Names of klft 0.1.

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, keep: int = 0) -> Tensor:
        """Deprecated: `logits`."""
        warnings.warn("calling a reference is deprecated: use reference.logits(...)", DeprecationWarning, stacklevel=2)
        return self.logits(input_ids, attention_mask, keep)

    def check_apart_from(self, policy: nn.Module) -> None:
        """Deprecated: `check_independent`."""
        text = "check_apart_from is deprecated: use reference.check_independent(policy)"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        self.check_independent(policy)


@torch.no_grad()
def hidden_and_head(model: nn.Module, inputs: dict[str, Any], keep: int) -> tuple[Tensor, LMHead]:
    """One forward without logits: (hidden states of the last `keep` positions, head)."""
    with hidden_states(model) as kept:
        model(**inputs)
    return kept.hidden[:, -keep:], LMHead.from_model(model)


class FrozenReference(ModelReference):
    """A separate model, frozen: eval mode, no parameter asks for a gradient. TypeError for anything but a causal LM.

    Example:
        reference = FrozenReference(ref_model)
        ref_hidden, ref_head = reference.hidden(input_ids, attention_mask)  # [B, T, D] and its LMHead: no logits

    The model is changed in place (frozen); it may be of another dtype, device or architecture than the policy, as long
    as the vocabulary is the same. `placement`: replicated, sharded or offloaded, see klft.parallel.Placement; it takes
    effect with `to`, which trainers call.
    """

    def __init__(self, model: "PreTrainedModel", *, placement: ModelPlacement = "replicated"):
        super().__init__(model)
        model.eval().requires_grad_(False)
        self.placement = Placement(model, placement)

    def _settings(self) -> dict[str, Any]:
        return {"placement": self.placement.kind}

    @property
    def _device(self) -> torch.device:
        return self.placement.device or device_of(self.model)

    def to(self, device: torch.device | str) -> None:
        """Move the model, unless it is quantised or spread over devices already. A collective where it is sharded."""
        self.placement.to(device)

    def check_independent(self, policy: nn.Module) -> None:
        """Raise ValueError, naming the parameter, if one of the policy's lives in the reference's storage."""
        check_no_shared_storage(self.model, policy)

    @torch.no_grad()
    def distance_to(self, policy: nn.Module) -> float | None:
        """Median over matrices of |policy - reference| / |reference|: under 0.5 after fine-tuning, 1.4 for strangers.

        None where the two have no matrix in common.
        """
        theirs, own = dict(base_of(policy).named_parameters()), base_of(self.model).named_parameters()
        distances = []
        for name, p in own:
            other = theirs.get(name, theirs.get(name.replace(".weight", ".base_layer.weight")))
            known = other is not None and other.shape == p.shape and p.dim() == 2 and p.is_floating_point()
            if known and not any(isinstance(t, DTensor) or t.is_meta for t in (p, other)):  # pyright: ignore
                distances.append((other.to(p) - p).float().norm() / p.float().norm().clamp(min=1e-12))  # pyright: ignore
        return float(torch.stack([d.cpu() for d in distances]).median()) if distances else None

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        self.model.eval()  # a trainer that walks over modules may have flipped it
        with torch.no_grad(), self.placement.in_use():
            yield


def warn_if_one_model(
    logits: Float[Tensor, "B T V"], ref_logits: Float[Tensor, "B T W"], real: Bool[Tensor, "B T"]
) -> None:
    """Warn where the policy looks as if it were the reference, which was frozen: no gradient, and the same logits."""
    if logits.requires_grad or logits.shape != ref_logits.shape:
        return
    if bool((reverse_kl(logits, ref_logits.to(logits))[real.to(logits.device)] < 1e-5).all()):
        logger.warning(
            "KLPenalty.measure: the policy's logits carry no gradient and equal the reference's. If both are one "
            "object, KLPenalty has frozen it: give it a copy that was made before, KLPenalty(copy.deepcopy(model))"
        )
