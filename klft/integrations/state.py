"""PenaltyState: the coefficient's state in a trainer's checkpoints, and a reference that follows the policy."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from klft.penalty import KLPenalty
from klft.references.checkpoint import load_reference, save_reference
from klft.writing import atomic_write

logger = logging.getLogger(__name__)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


class PenaltyState(TrainerCallback):
    """Saves a penalty's state with every checkpoint of a `transformers.Trainer`, and loads it where one is resumed.

    It is kept in `TrainerState.stateful_callbacks`, the part of trainer_state.json that is there for this, and which
    the Trainer reads from whatever checkpoint it resumes before `on_train_begin`. A callback is not told which folder
    that is, so a file of its own could be found only where it lies in this run's output_dir: klft_penalty.json beside
    it holds the same for other readers.

    After each optimizer step it tells the reference, which may follow the policy.

    Args:
        name: key in the checkpoint; two penalties of one trainer need two.
    """

    def __init__(self, penalty: KLPenalty, name: str):
        self.penalty, self.key = penalty, f"klft.{name}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Continue from the checkpoint. ValueError where it contradicts the controller, see its load_state_dict."""
        if self.key in state.stateful_callbacks:
            self.penalty.load_state_dict(state.stateful_callbacks[self.key])
            self._load_reference(args, state)
        elif state.global_step:
            text = "the checkpoint of step %d has no state of %s: its coefficient starts at %g"
            logger.warning(text, state.global_step, self.key, self.penalty.coef)

    def _load_reference(self, args: Any, state: Any) -> None:
        """A reference that follows the policy is too large for trainer_state.json."""
        if not self.penalty.reference.state_dict():
            return
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            raise ValueError(
                f"{self.penalty.reference.name} follows the policy, and its state is to be found beside the "
                f"checkpoint's in {folder} alone, which is not there: move the checkpoint back to resume from it"
            )
        load_reference(folder, self.penalty.reference)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before the Trainer saves."""
        self.penalty.reference.after_step(model)
        state.stateful_callbacks[self.key] = self.penalty.state_dict()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Beside the Trainer's own files."""
        if state.is_world_process_zero:
            folder = _checkpoint(args, state)
            mine = {k: v for k, v in state.stateful_callbacks.items() if k.startswith("klft.")}
            with atomic_write(folder / "klft_penalty.json") as file:
                file.write(json.dumps(mine, indent=1).encode())
            save_reference(folder, self.penalty.reference)
