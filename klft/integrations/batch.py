"""The tokens of a trainer's batch that count, and what their KL is divided by in that trainer's loss.

The normalisers are those of transformers >= 5.19 and TRL >= 1.16. Tests hold them to GRPOTrainer's own beta, and to a
dense KL added to SFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klft.integrations.backbone import versions

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass
class Batch:
    """A trainer's batch of B rows of T tokens; a packed row holds several sequences."""

    token_ids: Int[Tensor, "B T"]
    real: Bool[Tensor, "B T"]  # False on padding
    counted: Bool[Tensor, "B T"]  # True on the tokens of the trainer's loss
    given: Bool[Tensor, "B T"]  # True on tokens that are no target: a prompt, what a tool said, padding
    sequence: Int[Tensor, "B T"]  # number of the sequence a token belongs to, ascending
    divisor: Float[Tensor, "B T"]  # a token's KL enters the loss over this
    behaviour_logp: Float[Tensor, "B T"] | None = None  # of the policy that sampled, where that was an earlier one
    sampled: bool = False  # the policy sampled the tokens that count
    unpredicted: int = 0  # labels of first tokens, which some models' trainers count

    @property
    def predicts(self) -> Bool[Tensor, "B T"]:
        """True at the positions whose hidden state predicts a counted token."""
        return self.counted.roll(-1, 1)

    def pick(self, values: Tensor) -> Tensor:
        """[B, T] -> [N], of the counted tokens."""
        return values.expand(self.counted.shape)[self.counted]


def rows_of(numbers: Int[Tensor, "N"]) -> Bool[Tensor, "S L"]:
    """A row for each sequence, True on its tokens, from its start: scatter_masked(t, rows) puts [N] into [S, L].

    numbers: of the sequence that each token belongs to, 0 ... S-1, ascending.
    """
    lengths = torch.bincount(numbers)
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=numbers.device) < lengths[:, None]


def labelled_batch(trainer: "Trainer", inputs: Mapping[str, Any], num_items: Tensor | int | None) -> Batch:
    """Tokens with a label other than -100, as SFT and transformers' own trainer train them.

    The sum over tokens is divided by `num_items_in_batch`, or by this batch's count where there is none or where the
    trainer's `loss_is_scaled_for_ga` is False. Raises ValueError for a batch without labels.
    """
    labels = inputs.get("labels")
    if "shift_labels" in inputs:  # already under the position that predicts them
        labels = inputs["shift_labels"].roll(1, 1)
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise ValueError(
            "KLAnchorMixin: the batch has no labels [B, T] to say which tokens count; it has "
            f"{', '.join(sorted(inputs))} ({versions()}). Use a data collator that gives labels, -100 where a token "
            "does not count"
        )
    given = labels == -100
    counted = ~given
    unpredicted = int(counted[:, 0].sum())
    counted[:, 0] = False  # nothing predicts a row's first token
    token_ids = torch.where(counted, labels, inputs.get("input_ids", labels).clamp(min=0))
    real, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    real = torch.ones_like(counted) if real is None or real.dim() != 2 else real != 0
    sequence = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    if isinstance(positions, Tensor) and positions.shape == labels.shape:  # packed: each text counts from 0
        sequence = sequence * (labels.shape[1] + 1) + (positions == 0).cumsum(1)
    if getattr(trainer, "loss_is_scaled_for_ga", None) is False:
        num_items = None  # the loss is a mean of this batch, which the trainer divides by its accumulation steps
    divisor = counted.sum() if num_items is None else torch.as_tensor(num_items, device=labels.device)
    divisor = divisor.clamp(min=1).float()
    training = trainer.model is not None and trainer.model.training
    if num_items is None and trainer.compute_loss_func is not None and training:
        divisor = divisor * trainer.current_gradient_accumulation_steps  # the trainer leaves it to the function
    if num_items is not None and trainer.args.average_tokens_across_devices:
        # num_items counts the tokens of all processes, whose gradients are averaged.
        divisor = divisor / (trainer.accelerator.num_processes // trainer.get_tp_size())
    return Batch(token_ids, real, counted, given, sequence, divisor.expand(labels.shape), unpredicted=unpredicted)


LOSS_TYPES = ("grpo", "sapo", "bnpo", "dr_grpo", "dapo", "cispo", "vespo", "luspo")
_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


def completion_batch(trainer: Any, inputs: Mapping[str, Any]) -> Batch:
    """The completions of GRPOTrainer that its loss counts: completion_mask * tool_mask.

    Raises ValueError, naming the versions, for missing keys and unknown loss types.
    """
    missing = [key for key in _KEYS if key not in inputs]
    if missing:
        raise ValueError(
            f"KLAnchorMixin: GRPOTrainer's batch has no {', '.join(missing)}; it has {', '.join(sorted(inputs))} "
            f"({versions()}). This klft does not know this TRL: pin the one its constraints.txt names"
        )
    prompts, completions = inputs["prompt_ids"], inputs["completion_ids"]
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
    behaviour = inputs.get("old_per_token_logps")
    start = prompts.shape[1]

    def widened(values: Tensor, fill: float = 0) -> Tensor:
        return torch.cat([values.new_full((len(values), start), fill), values], 1)

    divisor = _grpo_divisor(trainer, mask, inputs.get("num_items_in_batch"))
    return Batch(
        torch.cat([prompts, completions], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1) != 0,
        widened(mask),
        ~widened(mask),
        torch.arange(len(prompts), device=prompts.device)[:, None].expand(-1, start + completions.shape[1]),
        widened(divisor.float().expand(mask.shape), fill=1),
        None if behaviour is None else widened(behaviour),
        sampled=True,
    )


def _grpo_divisor(trainer: Any, mask: Bool[Tensor, "B C"], num_items: Tensor | None) -> Float[Tensor, "..."]:
    """What GRPOTrainer's loss_type divides a token's KL by: broadcasts over [B, C]."""
    args, train = trainer.args, trainer.model.training
    steps = trainer.current_gradient_accumulation_steps if train else 1
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    if args.loss_type in ("grpo", "sapo"):  # the mean over sequences of their means
        return len(mask) * lengths * steps
    if args.loss_type == "bnpo":
        return mask.sum().clamp(min=1) * steps
    if args.loss_type == "dr_grpo":
        return torch.tensor(len(mask) * args.max_completion_length * steps, device=mask.device)
    if args.loss_type in ("dapo", "cispo", "vespo") and num_items is not None:  # of all processes' generation batches
        window = steps / args.steps_per_generation if train else 1
        return num_items.clamp(min=1) / trainer.accelerator.num_processes * window
    if args.loss_type == "luspo":
        return torch.tensor(len(mask) * steps, device=mask.device)
    raise ValueError(
        f"KLAnchorMixin does not know how GRPOTrainer normalises loss_type={args.loss_type!r} ({versions()}"
        f"{'' if num_items is not None else '; the batch has no num_items_in_batch'}): choose one of "
        f"{', '.join(LOSS_TYPES)}"
    )
