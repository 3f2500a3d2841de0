"""Guards that stop a run before it does harm, on every process at once and with one message."""

import traceback
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from klft.models import zero_pad_embedding
from klft.references import Reference


def on_all_ranks(accelerator: Accelerator, work: Callable[[], Any]) -> Any:
    """Run `work` here; if it raised on any rank, raise on every rank, so that none waits in a collective for ever."""
    error: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    except SystemExit as caught:  # a reward function that exits would leave the other ranks waiting
        error = RuntimeError(f"a call inside training tried to exit the process (code {caught.code})")
    report = None if error is None else "".join(traceback.format_exception(error))
    failed = [(rank, text) for rank, text in enumerate(gather_object([report])) if text]
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"rank {failed[0][0]} failed:\n{failed[0][1]}")
    return result


def check_finite(logp: Tensor, mask: Tensor, rank: int) -> None:
    """Raise ValueError if the policy gave a token it sampled no finite log-probability."""
    nonfinite = (mask & ~logp.isfinite()).nonzero().tolist()
    if nonfinite:
        sample, position = nonfinite[0]
        raise ValueError(
            f"the policy's logits are not finite on rank {rank}, sample {sample}, completion position {position} "
            f"({len(nonfinite)} token(s) in all). Try another precision (bf16 or fp32) or a lower learning rate."
        )


class StopOnNonFiniteGradient(TrainerCallback):
    """Raises after clipping and before the optimizer step; gradients are the same on every rank, so all stop alike."""

    def __init__(self, trainer: Any, resume_hint: Callable[[], str]):
        self.trainer, self.resume_hint = trainer, resume_hint

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.accelerator.scaler is not None:
            return  # fp16: the scaler itself skips such a step and lowers its scale
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not bool(norm.isfinite()):
            pad = zero_pad_embedding(self.trainer.model)
            why = "" if pad is None else (
                f" The embedding of the pad id {pad} is all zeros, where some models' own gradient is NaN (Gemma3n): "
                "pad with another token, tokenizer.pad_token = tokenizer.eos_token."
            )  # fmt: skip
            raise RuntimeError(f"the gradient is not finite at step {state.global_step}.{why} {self.resume_hint()}")


class FollowPolicy(TrainerCallback):
    """Tells the reference of each optimizer step: one that follows the policy does so then."""

    def __init__(self, reference: Reference):
        self.reference = reference

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.reference.after_step(model)
