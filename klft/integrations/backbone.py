"""The hidden states of a forward that somebody else's trainer runs.

TRL's trainers read `lm_head.weight` and never call the head's module, so the hook is on the backbone: there are the
hidden states, with their graph, and the arguments with which a reference can be called alike.
"""

import inspect
from types import TracebackType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from klft.models import base_of


def versions() -> str:
    """Of the packages whose contract is relied on, for messages."""
    import transformers
    import trl

    return f"transformers {transformers.__version__}, TRL {trl.__version__}"


class BackboneCall(NamedTuple):
    """One call of the backbone."""

    inputs: dict[str, Any]  # keyword arguments, positional ones by their names
    hidden: Float[Tensor, "B T D"]  # last_hidden_state
    with_grad: bool


class BackboneCalls:
    """Records the calls of a model's backbone inside the `with`: whatever wraps the model, all hooks run."""

    def __init__(self, model: nn.Module):
        backbone = base_of(model).base_model
        self._backbone = getattr(backbone, "decoder", backbone)  # which OPT and its like call directly
        self._names = [*inspect.signature(self._backbone.forward).parameters]
        self.calls: list[BackboneCall] = []

    def __enter__(self) -> "BackboneCalls":
        self._hook = self._backbone.register_forward_hook(torch.compiler.disable(self._record), with_kwargs=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hook.remove()

    def _record(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        if "use_cache" in self._names and inputs.get("use_cache") is None:
            # With a cache a packed row's texts see each other, and the reference's configuration may say otherwise.
            inputs["use_cache"] = getattr(self._backbone.config, "use_cache", False)
        hidden = getattr(output, "last_hidden_state", output[0])
        self.calls.append(BackboneCall(inputs, hidden, torch.is_grad_enabled()))

    def only(self) -> BackboneCall:
        """The forward that the loss was computed from. RuntimeError unless it is known which one that was."""
        trained = [call for call in self.calls if call.with_grad]
        if len(trained) == 1 or (self.calls and not trained):  # in evaluation the trainer may ask for outputs again
            return (trained or self.calls)[0]
        raise RuntimeError(
            f"KLAnchorMixin: compute_loss ran {len(trained)} forwards of the {type(self._backbone).__name__} with a "
            f"gradient ({len(self.calls)} in all), and the KL needs exactly one, to be of the tokens and weights of "
            f"the loss. Seen with {versions()}: use a trainer whose compute_loss calls the model once"
        )
