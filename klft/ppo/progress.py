"""RolloutProgress: what PPOTrainer says while it trains, one line per rollout."""

import sys
from collections import defaultdict
from typing import TYPE_CHECKING

from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from klft.ppo.config import PPOConfig
from klft.writing import two_digits

if TYPE_CHECKING:
    from klft.ppo.trainer import PPOTrainer


class RolloutProgress(ProgressCallback):
    """One line per rollout that is logged: score, KL in nats per completion, coefficient, tokens and seconds by phase.

    PPOTrainer adds it in the place of the Trainer's two, which print all fifty metrics; trackers and `log_history` have
    those. On a terminal, and without `disable_tqdm`, there is a progress bar that names the phase; otherwise lines.
    """

    def __init__(self, trainer: "PPOTrainer"):
        super().__init__()
        self.trainer = trainer
        self.has_bar = not trainer.args.disable_tqdm and sys.stderr.isatty()
        self._seconds: dict[str, float] = defaultdict(float)  # by phase, since the last line

    def on_train_begin(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Say what is about to happen: the first rollout of a large model takes minutes."""
        if self.has_bar:
            super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            size, steps = args.episodes_per_rollout, args.steps_per_rollout
            left, used = -(-(state.max_steps - state.global_step) // steps), state.max_steps % steps
            every, end = state.logging_steps, ", and at the end"
            lines = {"no": "none is logged (logging_strategy: no)", "epoch": f"a line per pass over the prompts{end}"}
            lines["steps"] = "a line per rollout" if every <= steps else f"a line every {every} steps{end}"
            said = f"{left} rollout(s) of {size} completions to train on, {steps} step(s) each"
            said += f", of the last one {used}" * bool(used)
            said += "; first a check on three short rows (self_test)" * args.self_test
            self._say(f"{said}; {lines[args.logging_strategy]}")
            self.trainer.ppo.phases.entered = self._show_phase

    def on_step_end(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Move the bar on. A rollout that the end of training would leave unlogged is logged now."""
        if control.should_training_stop and self.trainer.ppo.train.tables and args.logging_strategy != "no":
            control.should_log = True
        if self.has_bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A bar for an evaluation, which is removed after it."""
        if self.has_bar:
            super().on_prediction_step(args, state, control, **kwargs)
            if self.prediction_bar is not None:
                self.prediction_bar.leave = False

    def on_log(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: object
    ) -> None:
        """The line, where the log is of a rollout."""
        logs, phases = logs or {}, ("generate", "score", "reward", "train")
        for name in phases:
            self._seconds[name] += logs.get(f"time/{name}/seconds", 0.0)
        kl = logs.get(f"kl/sequence/{args.kl_direction}/mean")
        if not state.is_world_process_zero or kl is None:
            return
        score = f"score {two_digits(logs['reward/score/mean']):>5}, " if "reward/score/mean" in logs else ""
        said = f"{score}KL {two_digits(kl):>7} nats, coef {two_digits(logs['kl/coef'])}"
        speed = f"{logs['tokens_per_second']:.0f} tokens/s, " if "tokens_per_second" in logs else ""
        seconds = ", ".join(f"{name} {two_digits(self._seconds[name])}" for name in phases)
        self._say(f"step {state.global_step:>{len(str(state.max_steps))}}: {said}; {speed}seconds: {seconds}")
        self._seconds.clear()

    def on_train_end(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Close the bar."""
        if self.has_bar:
            super().on_train_end(args, state, control, **kwargs)

    def _show_phase(self, name: str) -> None:
        if self.training_bar is not None:
            self.training_bar.set_description(name)

    def _say(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


def progress_of(trainer: "PPOTrainer") -> RolloutProgress:
    """A RolloutProgress to add to `trainer`, from which the Trainer's own callback of that kind is removed."""
    for callback in trainer.callback_handler.callbacks[-1:]:  # the Trainer adds it last
        if type(callback) in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
    return RolloutProgress(trainer)
