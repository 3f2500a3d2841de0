"""Guards that stop a run before it does harm, on every process at once and with one message."""

import os
import platform
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from klft.exits import is_lost_rank, leave
from klft.models import zero_pad_embedding
from klft.parallel import total_norm
from klft.references import Reference

logger = logging.get_logger(__name__)


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
        error.__cause__ = caught  # its traceback says which call
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
        accelerator = self.trainer.accelerator
        if accelerator.scaler is not None or accelerator.mixed_precision == "fp16":
            return  # fp16: the scaler (DeepSpeed's own, there) itself skips such a step and lowers its scale
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        norm = total_norm(gradients)
        if self.trainer.is_deepspeed_enabled:  # keeps gradients to itself; -1 is what it makes of inf and NaN
            norm = torch.as_tensor(self.trainer.model_wrapped.get_global_grad_norm() or 0.0)
        if not bool(norm.isfinite()) or bool(norm < 0):
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


class SaveOnSigterm(TrainerCallback):
    """After a SIGTERM to any rank all save a checkpoint at the next step's end and stop; training then exits with 143.

    A launcher also sends SIGTERM to the ranks that are left of a run whose step will never end: they end at once.
    """

    received = stopped = False
    peers: tuple[int, ...] = ()

    def __init__(self, accelerator: Accelerator, *, saves: bool):
        self.accelerator, self.saves = accelerator, saves

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM inside, if the run saves checkpoints, this is the main thread, and nobody else handles it."""
        if not self.saves:
            yield
            return
        launcher = (platform.node(), os.getppid())
        every = gather_object([(launcher, os.getpid())])
        self.peers = tuple(pid for its_launcher, pid in every if its_launcher == launcher)
        main = threading.current_thread() is threading.main_thread()
        handled = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if handled:
            signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            if handled:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _receive(self, *_: Any) -> None:
        if not self.received:
            self.received = True
            threading.Thread(target=self._end_without_peers, name="klft-sigterm", daemon=True).start()

    def _end_without_peers(self) -> None:
        while not self.stopped:
            if not all(map(_alive, self.peers)):
                leave(128 + signal.SIGTERM)
            time.sleep(0.2)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.saves and self.accelerator.reduce(torch.tensor(float(self.received), device=args.device), "sum"):
            control.should_save = control.should_training_stop = self.stopped = True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def saving(final: Path, resume_hint: Callable[[], str]) -> Iterator[None]:
    """Around the writing of a checkpoint: a full disk is an error that names the last good one; no part is left."""
    try:
        yield
    except Exception as error:
        if is_lost_rank(error):
            raise
        shutil.rmtree(final.with_name(f"tmp-{final.name}"), ignore_errors=True)
        raise RuntimeError(f"{final} could not be saved: {error}. {resume_hint()}") from error
