"""A reference that follows the policy: an exponential moving average of its weights, or a copy made now and then."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from klft.models import evaluating, unwrap
from klft.parallel import Placement
from klft.references.adapter import trained_weights
from klft.references.frozen import FrozenReference, ModelReference

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class EMAReference(FrozenReference):
    """The policy as it was, following it: every `every` steps average = decay * average + (1 - decay) * policy.

    `decay=0` with `every=n` is a copy of the policy as of each n-th step, and `sync` one as of now; right after it the
    KL is exactly 0. PPOTrainer calls `after_step` itself and keeps the average in its checkpoints; a loop of your own
    calls `reference.after_step(policy)` after optimizer.step(). To start again from the policy where the KL has grown:

        class Reset(TrainerCallback):
            def on_log(self, args, state, control, logs=None, model=None, **kwargs):
                if logs.get("kl/sequence/reverse/mean", 0) > 20:
                    reference.sync(model)

    Args:
        model: the policy as it is now. A full model is copied. Of a PEFT model the weights that are trained are copied
            and nothing else: they take the policy's place in its own model while the reference is scored.
        decay: of the average, 0 <= decay < 1.
        every: steps from one update to the next.

    Averages of 16-bit weights are kept in fp32 beside them: small steps would round to nothing. The policy of a copied
    model may be sharded by FSDP2 (its weights are gathered, one by one); one whose adapter is averaged may not. Raises
    ValueError for numbers out of range, for a policy with other weights, and where ZeRO-3 or FSDP1 keep them elsewhere.
    """

    def __init__(self, model: "PreTrainedModel | PeftModel", decay: float, every: int = 1):
        if not 0 <= decay < 1:
            raise ValueError(f"EMAReference: decay must be 0 or more and below 1, got {decay} (1: FrozenReference)")
        if every < 1:
            raise ValueError(f"EMAReference: every must be at least 1 step, got {every}")
        inner: Any = unwrap(model)
        self.decay, self.every, self.steps = decay, every, 0
        self._swaps = hasattr(inner, "disable_adapter")
        (ModelReference if self._swaps else FrozenReference).__init__(self, inner if self._swaps else _copy_of(inner))
        self.placement = Placement(self.model)  # a copy lies with the policy, an adapter in it
        self._kept = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.model.named_parameters()
            if (p.requires_grad if self._swaps else p.is_floating_point() and p.itemsize < 4)
        }
        if self._swaps and not self._kept:
            raise ValueError("EMAReference: no weight of this PEFT model is trained, so there is nothing to follow")

    def _settings(self) -> dict[str, Any]:
        return {"decay": self.decay, "every": self.every, "steps": self.steps}

    @property
    def name(self) -> str:
        """The model's name, and how it follows."""
        return f"{super().name} (moving average, decay {self.decay:g}, every {self.every})"

    def to(self, device: torch.device | str) -> None:
        """Move the copy, unless it is quantised or spread over devices."""
        self._kept = {name: t.to(device) for name, t in self._kept.items()}
        if not self._swaps:
            super().to(device)

    def check_independent(self, policy: nn.Module) -> None:
        """Raise ValueError if the policy trains weights that are the reference's too, and are not averaged."""
        averaged = self._kept if self._swaps else {}
        shared = trained_weights(policy, [p for name, p in self.model.named_parameters() if name not in averaged])
        if shared:
            raise ValueError(
                f"these weights are trained but belong to the reference, which does not average them: {shared[:3]}. "
                "Make the EMAReference of the policy as it is trained"
            )

    def sync(self, policy: nn.Module) -> None:
        """Become the policy as it is now. Counts as no step."""
        self._follow(policy, 0.0)

    def after_step(self, policy: nn.Module) -> None:
        """Count a step; after every `every`-th follow the policy."""
        self.steps += 1
        if self.steps % self.every == 0:
            self._follow(policy, self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, and the steps counted."""
        return self._averages() | {"steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`. ValueError where a tensor is missing or of another size."""
        _check_match(self.state_dict(), state, "the state")
        for name, average in self._averages().items():
            average.copy_(state[name])
        self._write_back()
        self.steps = int(state["steps"])

    def _averages(self) -> dict[str, Tensor]:
        parameters = () if self._swaps else self.model.named_parameters()
        return {name: p.detach() for name, p in parameters if p.is_floating_point()} | self._kept

    @torch.no_grad()
    def _follow(self, policy: nn.Module, decay: float) -> None:
        theirs, averages = dict(unwrap(policy).named_parameters()), self._averages()
        _check_match(averages, theirs, "the policy")
        for name, average in averages.items():
            value: Tensor = theirs[name]
            if isinstance(value, DTensor) and not isinstance(average, DTensor):
                value = value.full_tensor()
            # A copy and no average with weight 1: what is NaN would stay NaN.
            average.lerp_(value.to(average), 1 - decay) if decay else average.copy_(value)
        self._write_back()

    def _write_back(self) -> None:
        """Put the fp32 averages of a copied model's 16-bit weights into it."""
        for name, p in () if self._swaps else self.model.named_parameters():
            if name in self._kept:
                p.copy_(self._kept[name])

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        with evaluating(self.model), _in_place_of(self.model, self._kept) if self._swaps else nullcontext():
            yield


def _copy_of(model: nn.Module) -> Any:
    """A copy without what was put over its forward: TRL's trainers put there one that calls the model it was made for,
    which a deep copy does not change.
    """
    copied = copy.deepcopy(model)
    vars(copied).pop("forward", None)
    return copied


def _check_match(averages: dict[str, Tensor], others: dict[str, Any], where: str) -> None:
    lacking = [n for n, t in averages.items() if n not in others or others[n].shape != t.shape]
    if lacking:
        raise ValueError(
            f"EMAReference: {where} has no whole {lacking[0]} {list(averages[lacking[0]].shape)} ({len(lacking)} in "
            "all): it is another model's, has got an adapter since, or is sharded. Make the EMAReference of the policy "
            "as it is trained"
        )


@contextmanager
def _in_place_of(model: nn.Module, averages: dict[str, Tensor]) -> Iterator[None]:
    """The model reads these in place of its parameters of the same names, which are not touched themselves.

    Other Parameter objects, not other data in the same ones: autocast would go on with what it had cast before.
    """
    own = {name: p for name, p in model.named_parameters() if not isinstance(p, DTensor)}
    _check_match(averages, own, "the policy")
    read = {own[name]: nn.Parameter(t.to(own[name]), requires_grad=False) for name, t in averages.items()}
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None and p in read]
    try:
        for module, name, p in places:
            module._parameters[name] = read[p]
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p
