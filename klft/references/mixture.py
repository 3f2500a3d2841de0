"""Several references at once, each with a weight."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from klft.references.protocol import Reference, parts_of, resolve_reference
from klft.writing import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MixtureReference(Reference):
    """Several references: the penalty is the weighted sum of the KLs to each, from one pass of the policy.

    No mixture of distributions: it has neither logits nor hidden states, and what needs those (PPOTrainer, a Scorer,
    fused_token_loss) refuses it. KLPenalty.measure takes it, with every estimator; the KLs in its scores, and so in
    metrics and controllers, are the weighted sums.

    Args:
        parts: (weight, reference or model) each; a mixture among them counts as its parts. Weights are positive and
            need not sum to one: coef * weight is each part's coefficient, and a part more leaves the others' as it was.

    Raises ValueError for no parts and for other weights.
    """

    def __init__(self, parts: "Sequence[tuple[float, Reference | PreTrainedModel]]"):
        self.parts: list[tuple[float, Reference]] = []
        for pair in parts:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], int | float):
                raise TypeError(
                    f"MixtureReference: expected (weight, reference) pairs, [(0.3, a), (0.7, b)], got a "
                    f"{type(pair).__name__} among them"
                )
            weight, given = pair
            if not 0 < weight < math.inf:
                raise ValueError(f"MixtureReference: weights must be finite numbers above 0, got {weight}")
            reference = resolve_reference(given)
            self.parts += [(weight * w, each) for w, each in parts_of(reference)]
        if not self.parts:
            raise ValueError("MixtureReference: there is no part: give at least one (weight, reference)")

    @one_line
    def __repr__(self) -> str:
        return " + ".join(f"{weight:g} * {each!r}" for weight, each in self.parts)

    @property
    def name(self) -> str:
        """All parts' names, with their weights."""
        return " + ".join(f"{weight:g} * {each.name}" for weight, each in self.parts)

    @property
    def vocab_size(self) -> int:
        """Ids that all of them have."""
        return min(each.vocab_size for _, each in self.parts)

    @property
    def max_positions(self) -> int | None:
        """The longest text all of them can read."""
        return min((n for _, each in self.parts if (n := each.max_positions) is not None), default=None)

    def to(self, device: torch.device | str) -> None:
        """Move all parts."""
        for _, each in self.parts:
            each.to(device)

    def check_independent(self, policy: nn.Module) -> None:
        """Raise ValueError if training the policy would move one of them."""
        for _, each in self.parts:
            each.check_independent(policy)

    def after_step(self, policy: nn.Module) -> None:
        """Tell all parts."""
        for _, each in self.parts:
            each.after_step(policy)

    def state_dict(self) -> dict[str, Tensor]:
        """All parts' states, each under its number."""
        return {f"{i}.{k}": t for i, (_, each) in enumerate(self.parts) for k, t in each.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`."""
        for i, (_, each) in enumerate(self.parts):
            each.load_state_dict({k.removeprefix(f"{i}."): t for k, t in state.items() if k.startswith(f"{i}.")})
