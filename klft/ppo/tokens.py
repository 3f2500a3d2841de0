"""Token-level KL of the rollouts, as tables and a page (`kl_log_tokens`)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klft.diagnostics import TokenKLLog, write_report
from klft.generation import Completions
from klft.models import base_of
from klft.penalty import TokenKL
from klft.scores import TokenScores


class TokenTables:
    """Every n-th rollout's tokens in `output_dir/kl`, prompts included, and at the end `output_dir/kl/report.html`."""

    top_k = 5  # of what either model would rather have said

    def __init__(self, trainer: Any, output_dir: Path):
        self.accelerator, self.args, self.output_dir = trainer.accelerator, trainer.args, output_dir
        names = {"model": _name_of(trainer.model), "reference": trainer.penalty.reference.name}
        self.log = TokenKLLog(output_dir, trainer.processing_class, temperature=self.args.temperature, **names)

    def due(self, step: int) -> bool:
        """Whether the rollout made at this optimizer step is to be kept."""
        return (step // self.args.steps_per_rollout) % self.args.kl_log_tokens == 0

    def add(self, step: int, completions: Completions, kl: TokenKL, rewards: Tensor, advantages: Tensor) -> None:
        """Keep a rollout, [B, C] each. `step` is that of the first log its tokens are in."""
        prompts = completions.prompt_mask

        def widened(t: Tensor) -> Tensor:
            # Prompt tokens were not scored; they are there to be read.
            return torch.cat([t.new_zeros(*prompts.shape, *t.shape[2:]), t], 1)

        scores = {name: widened(t) for name, t in kl.scores.items()}
        ids, attention = completions.inputs
        self.log.add(
            TokenScores(**scores), ids, attention.bool(), step=step,
            is_prompt=torch.cat([prompts, torch.zeros_like(completions.mask)], 1),
            scored=torch.cat([torch.zeros_like(prompts), completions.mask], 1),
            rewards=widened(rewards), advantages=widened(advantages),
            weights=None if kl.weight is None else widened(kl.weight),
        )  # fmt: skip

    def close(self) -> None:
        """Write what is pending; the main process makes the page of what all have written."""
        self.log.close()
        self.accelerator.wait_for_everyone()
        folder = self.output_dir / "kl"
        if self.accelerator.is_main_process and any(folder.glob("*.parquet")):
            write_report(self.output_dir, folder / "report.html")


def _name_of(model: Any) -> str:
    base = base_of(model)
    return base.config.name_or_path or type(base).__name__
