"""What PPO's recipes send to TensorBoard, W&B and trackio beside transformers' own: groups, texts, the page.

transformers puts "train/" before every name, which makes all fifty charts one group. Here klft's own keep their names,
and are grouped by their first word: kl/..., reward/..., ppo/..., time/.... Texts go to a tracker only with
log_completions; the page, which is full of them, only with kl_log_tokens, and only to W&B: the others cannot show it.
"""

import time
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from klft import PPOTrainer
from klft.ppo.completions import readable


def split(logs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(klft's metrics of training, all else: the Trainer's own and an evaluation's, which have a group)."""
    ours = {name: v for name, v in logs.items() if "/" in name and not name.startswith(("eval_", "test_"))}
    return ours, {name: v for name, v in logs.items() if name not in ours}


class Grouped:
    """Before a tracker's callback: on_log in two parts, and the completions of a rollout."""

    trainer: PPOTrainer

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The Trainer's own as transformers names them, klft's by their own names."""
        ours, others = split(logs or {})
        super().on_log(args, state, control, logs=others, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if state.is_world_process_zero and ours:
            self.send(ours, state.global_step)
            if args.log_completions and "kl/coef" in ours and self.trainer.ppo.completions:
                self.send_table(self.trainer.ppo.completions, state.global_step)

    def send(self, numbers: dict[str, Any], step: int) -> None:
        """Numbers, by name."""
        raise NotImplementedError

    def send_table(self, rows: list[dict[str, Any]], step: int) -> None:
        """The table of completions."""
        raise NotImplementedError


def cells(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows as lists, conversations as text."""
    return [[v if isinstance(v, (int, float, type(None))) else readable(v).plain for v in r.values()] for r in rows]


class GroupedTensorBoard(Grouped, TensorBoardCallback):
    """TensorBoard: completions under Text."""

    def send(self, numbers: dict[str, Any], step: int) -> None:
        """As scalars."""
        for name, value in numbers.items():
            self.tb_writer.add_scalar(name, value, step)  # pyright: ignore - made by now

    def send_table(self, rows: list[dict[str, Any]], step: int) -> None:
        """As Markdown's code: nothing in it is obeyed."""
        blocks = ["\n".join(f"{n}: {v}" for n, v in zip(rows[0], r, strict=True)) for r in cells(rows)]
        text = "\n\n---\n\n".join("    " + block.replace("\n", "\n    ") for block in blocks)
        self.tb_writer.add_text("completions", text, step)  # pyright: ignore - made by now


class GroupedWandb(Grouped, WandbCallback):
    """W&B: completions as a table."""

    def send(self, numbers: dict[str, Any], step: int) -> None:
        """In a row of their own; the step is the axis that transformers asked for."""
        import wandb  # pyright: ignore[reportMissingImports]

        wandb.log(numbers | {"train/global_step": step})

    def send_table(self, rows: list[dict[str, Any]], step: int) -> None:
        """As a table."""
        import wandb  # pyright: ignore[reportMissingImports]

        self.send({"completions": wandb.Table(columns=list(rows[0]), data=cells(rows))}, step)


class GroupedTrackio(Grouped, TrackioCallback):
    """trackio: completions as a table."""

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Under a name, which transformers takes up again: it ends the run with training, and an evaluation follows."""
        args.run_name = args.run_name or f"{Path(args.output_dir or 'ppo').name}-{time.strftime('%Y%m%d-%H%M%S')}"
        super().setup(args, state, model, **kwargs)

    def send(self, numbers: dict[str, Any], step: int) -> None:
        """As W&B's."""
        import trackio  # pyright: ignore[reportMissingImports]

        trackio.log(numbers | {"train/global_step": step})

    def send_table(self, rows: list[dict[str, Any]], step: int) -> None:
        """As a table."""
        import pandas as pd
        import trackio  # pyright: ignore[reportMissingImports]

        self.send({"completions": trackio.Table(dataframe=pd.DataFrame(cells(rows), columns=list(rows[0])))}, step)


def group_charts(trainer: PPOTrainer) -> None:
    """Replace transformers' callbacks of trackers by those above."""
    for own, grouped in (
        (TensorBoardCallback, GroupedTensorBoard),
        (WandbCallback, GroupedWandb),
        (TrackioCallback, GroupedTrackio),
    ):
        if trainer.pop_callback(own) is not None:
            callback = grouped()
            callback.trainer = trainer
            if isinstance(callback, GroupedTensorBoard) and callback.logging_dir is None:
                # transformers names one when training begins; what is logged before would lie in the current folder.
                callback.logging_dir = str(Path(trainer.args.output_dir or ".") / "runs")
            trainer.add_callback(callback)


def send_page(trainer: PPOTrainer) -> None:
    """The page of token-level KL to W&B, once training has written it."""
    page = Path(trainer.args.output_dir or ".") / "kl" / "report.html"
    asked = trainer.args.kl_log_tokens and "wandb" in (trainer.args.report_to or [])
    if asked and trainer.is_world_process_zero() and page.is_file():
        import wandb  # pyright: ignore[reportMissingImports]

        if wandb.run is not None:
            wandb.log({"kl/report": wandb.Html(page.read_text(), inject=False)})
