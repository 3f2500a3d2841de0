"""The value function, attached to the policy instead of wrapped around it.

Attached as a submodule (`v_head`, or a whole `value_model`) it rides along in the policy's own forward: one DDP or FSDP
unit, one optimizer, one checkpoint, which AutoModelForCausalLM.from_pretrained still loads (it ignores the extra keys).
Within `with_values(model)` the forward returns a dictionary of `logits` and `state_values` [B, keep].
"""

from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from klft.models import base_of

OUTPUT_KEY = "state_values"
NAMES = {"v_head", "value_model"}  # the submodules of the policy that are the value function


def attach_value_head(model: nn.Module) -> None:
    """A zero-initialised linear on the hidden states that the vocabulary head reads: V = 0 at step 0."""
    base: Any = base_of(model)
    head_weight = base.get_output_embeddings().weight
    # In fp32 whatever the policy has: its steps would round to nothing in 16 bit.
    v_head = nn.Linear(head_weight.shape[1], 1, device=head_weight.device, dtype=torch.float32)
    nn.init.zeros_(v_head.weight)
    nn.init.zeros_(v_head.bias)
    base.add_module("v_head", v_head)


def attach_value_model(model: nn.Module, value_model: Any) -> None:
    """A separate causal backbone with a one-output `score` head (AutoModelForSequenceClassification, num_labels=1).

    Raises TypeError for anything else: a bidirectional model would see the future it is to predict.
    """
    backbone = getattr(value_model, getattr(value_model, "base_model_prefix", ""), None)
    score = getattr(value_model, "score", None)
    if backbone is None or not isinstance(score, nn.Linear) or score.out_features != 1:
        raise TypeError(
            "value_model: expected a causal AutoModelForSequenceClassification with num_labels=1 (a `score` head on a "
            f"decoder), got {type(value_model).__name__}; leave it out to use a value head on the policy"
        )
    base: Any = base_of(model)
    base.add_module("value_model", value_model.requires_grad_(True).to(base.device))


def install_hooks(model: nn.Module) -> None:
    """Make the forward of `model` (PEFT or not, later wrapped or not) return state values inside `with_values`."""
    base: Any = base_of(model)

    def keep_hidden(_head: nn.Module, args: tuple) -> None:
        if getattr(base, "_klft_values", False):
            base._klft_hidden = args[0]

    def add_values(_model: nn.Module, _args: tuple, kwargs: dict, output: Any) -> Any:
        if not getattr(base, "_klft_values", False):
            return output
        hidden = base.__dict__.pop("_klft_hidden")
        if hasattr(base, "value_model"):
            critic = base.value_model
            inputs = {k: kwargs[k] for k in ("input_ids", "attention_mask", "position_ids") if k in kwargs}
            states = getattr(critic, critic.base_model_prefix)(**inputs, use_cache=False).last_hidden_state
            values = critic.score(states).squeeze(-1)[:, -hidden.shape[1] :]
        else:
            values = base.v_head(hidden.to(torch.float32)).squeeze(-1)
        # A plain dictionary: DDP takes outputs apart and rebuilds them, and a ModelOutput refuses the new key.
        return {"logits": output.logits, OUTPUT_KEY: values.float()}

    base.get_output_embeddings().register_forward_pre_hook(keep_hidden)
    base.register_forward_hook(add_values, with_kwargs=True)


@contextmanager
def with_values(model: nn.Module):
    """Forwards inside return `state_values` too. `model` unwrapped; never while an adapter is switched off."""
    base: Any = base_of(model)
    base._klft_values = True
    try:
        yield
    finally:
        base._klft_values = False


def value_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The value function's own tensors by name, as a checkpoint keeps them."""
    base: Any = base_of(model)
    module = base.value_model if hasattr(base, "value_model") else base.v_head
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def load_value_parameters(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put them back."""
    base: Any = base_of(model)
    module = base.value_model if hasattr(base, "value_model") else base.v_head
    module.load_state_dict(tensors)
