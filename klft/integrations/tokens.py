"""The tokens of a trainer's own batches, as tables and a page (`measure_every`)."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from klft.diagnostics import TokenKLLog, write_report
from klft.integrations.batch import Batch
from klft.masked import scatter_masked
from klft.models import base_of
from klft.scores import TokenScores


class TokenTables:
    """Every n-th step's tokens in `output_dir/kl`, whole texts in the order of the batch, and in the end a page."""

    top_k = 5  # of what either model would rather have said

    def __init__(self, trainer: Any):
        base, tokenizer = base_of(trainer.model), trainer.processing_class
        self.accelerator, self.folder = trainer.accelerator, Path(trainer.args.output_dir)
        self.log = TokenKLLog(
            self.folder, getattr(tokenizer, "tokenizer", tokenizer),  # a processor has one
            model=base.config._name_or_path or type(base).__name__, reference=trainer.penalty.reference.name,
            temperature=getattr(trainer.args, "temperature", 1.0),
        )  # fmt: skip

    def add(self, step: int, batch: Batch, scores: TokenScores, weight: Float[Tensor, "N"] | None) -> None:
        """A micro-batch: scores [N], or [N, k], of the tokens that count, and how much; the others are to be read."""
        real = batch.real
        numbers = torch.unique_consecutive(batch.sequence[real], return_inverse=True)[1]
        lengths = torch.bincount(numbers)
        rows = torch.arange(int(lengths.max()), device=real.device) < lengths[:, None]

        def in_rows(t: Tensor) -> Tensor:
            return scatter_masked(t[real], rows)

        counted = in_rows(batch.counted)
        values = {name: in_rows(scatter_masked(t.detach(), batch.counted)) for name, t in scores.items()}
        # What is given before the first counted token. A text's first token is no prompt where it has a label.
        prompt = in_rows(batch.given) & (counted.cumsum(1) == 0)
        sampled = counted if batch.sampled else torch.zeros_like(counted)
        self.log.add(
            TokenScores(**values | {"sampled": sampled}), in_rows(batch.token_ids), rows, step=step, is_prompt=prompt,
            scored=counted, weights=None if weight is None else in_rows(scatter_masked(weight, batch.counted)),
        )  # fmt: skip

    def close(self) -> None:
        """Write what is pending; the main process makes the page of what all have written."""
        self.log.close()
        self.accelerator.wait_for_everyone()
        folder = self.folder / "kl"
        if self.accelerator.is_main_process and any(folder.glob("*.parquet")):
            write_report(self.folder, folder / "report.html")
