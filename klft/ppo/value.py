"""The value function, attached to the policy instead of wrapped around it.

Attached as a submodule (`v_head`, or a whole `value_model`) it is part of the policy's own forward: one DDP or FSDP
unit, one optimizer. It is no part of the policy's state_dict: vLLM and llama.cpp refuse weights they do not know, so
what is saved, as an adapter or merged too, is the policy alone; the value function lies beside it in its own file.
Within `with_values(model)` the forward returns a dictionary of `logits` and `state_values` [B, keep].
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from klft.models import VALUE_MODULES, base_of
from klft.writing import atomic_write

OUTPUT_KEY = "state_values"
VALUE_FILE = (
    "klft/value_function.safetensors"  # in a folder of its own: vLLM reads every *.safetensors beside the model
)


def attach_value_head(model: nn.Module) -> None:
    """A zero-initialised linear on the hidden states that the vocabulary head reads: V = 0 at step 0.

    Raises TypeError, by name, for a policy whose head is quantised.
    """
    base: Any = base_of(model)
    head_weight = getattr(base.get_output_embeddings(), "weight", None)
    if not (isinstance(head_weight, torch.Tensor) and head_weight.ndim == 2 and head_weight.is_floating_point()):
        raise TypeError(
            f"model: the vocabulary head of {type(base).__name__} ({type(base.get_output_embeddings()).__name__}) is "
            "quantised, and PPO trains through it: load the model with that head left in floating point"
        )
    # In fp32 whatever the policy has: its steps would round to nothing in 16 bit.
    v_head = nn.Linear(head_weight.shape[1], 1, device=head_weight.device, dtype=torch.float32)
    nn.init.zeros_(v_head.weight)
    nn.init.zeros_(v_head.bias)
    base.add_module("v_head", v_head)
    _keep_out_of_state_dict(base)


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
    _keep_out_of_state_dict(base)


def _keep_out_of_state_dict(base: nn.Module) -> None:
    base.register_state_dict_post_hook(_remove_values)
    base.register_load_state_dict_post_hook(_expect_no_values)


def _remove_values(_model: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for name in VALUE_MODULES:
        for key in [k for k in state_dict if k.startswith(f"{prefix}{name}.")]:
            del state_dict[key]


def _expect_no_values(_model: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not is_value_parameter(k)]


def is_value_parameter(name: str) -> bool:
    """Whether a parameter of the policy, by its name, is the value function's."""
    return not VALUE_MODULES.isdisjoint(name.split("."))


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
            dtype = next(base.v_head.parameters()).dtype  # fp32, unless DeepSpeed has made all of the policy 16 bit
            values = base.v_head(hidden.to(dtype)).squeeze(-1)
        # A plain dictionary: DDP takes outputs apart and rebuilds them, and a ModelOutput refuses the new key.
        # No views: FSDP2 warns of units that return one.
        return {"logits": output.logits.clone(), OUTPUT_KEY: values.to(torch.float32, copy=True)}

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


def _value_module(model: nn.Module) -> nn.Module:
    base: Any = base_of(model)
    return base.value_model if hasattr(base, "value_model") else base.v_head


def value_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The value function's own tensors by name, whole and on the CPU. A collective where FSDP2 has sharded them."""
    tensors = _value_module(model).state_dict()
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: t.detach().cpu().clone() for name, t in whole.items()}


def save_value_function(model: nn.Module, folder: Path, *, write: bool) -> None:
    """Write it to its file in `folder`, on the processes that `write`; all must call. Nothing under ZeRO-3.

    There DeepSpeed holds the parameters, and its own checkpoint has them.
    """
    if any(hasattr(p, "ds_numel") for p in _value_module(model).parameters()):
        return
    tensors = value_parameters(model)
    if write:
        path = folder / VALUE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(save(tensors))


def load_value_function(model: nn.Module, folder: Path) -> None:
    """Put back what `folder` holds of it, in whichever place. Raises ValueError, naming the folder, for nothing."""
    files = [folder / VALUE_FILE, folder / "value_function.safetensors"]  # the second: foreign adapters' until klft 0.2
    tensors = next((load_file(path) for path in files if path.exists()), None) or _among_weights(folder)
    if not tensors:
        raise ValueError(f"{folder} holds no value function: neither {VALUE_FILE} nor one among the model's weights")
    module = _value_module(model)
    if any(isinstance(p, DTensor) for p in module.parameters()):
        set_model_state_dict(module, dict(tensors), options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(tensors)


def _among_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The value function where checkpoints had it until klft 0.2: among the model's tensors, or the adapter's."""
    found = {}
    for path in [*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]:
        with safe_open(path, "pt") as file:
            for key in filter(is_value_parameter, file.keys()):
                parts = key.split(".")
                own = parts[next(i for i, part in enumerate(parts) if part in VALUE_MODULES) + 1 :]
                found[".".join(own).removeprefix("modules_to_save.")] = file.get_tensor(key)
    return found
