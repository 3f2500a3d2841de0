"""The token tables of a trainer, and the page that it writes of them in the end."""

from pathlib import Path
from typing import Any

from klft.diagnostics.records import TokenKLLog
from klft.diagnostics.report import write_report
from klft.models import model_name


class TrainerTables:
    """Tables in `output_dir/kl` of every process, and in the end `output_dir/kl/report.html`.

    trainer: a transformers.Trainer with a tokenizer and a KLPenalty in `penalty`. What a row holds, its `add` says.
    """

    top_k = 5  # of what either model would rather have said

    def __init__(self, trainer: Any, output_dir: Path):
        self.trainer = trainer
        self.accelerator, self.args, self.output_dir = trainer.accelerator, trainer.args, output_dir
        self.log = TokenKLLog(
            output_dir, getattr(trainer.processing_class, "tokenizer", trainer.processing_class),  # a processor has one
            model=model_name(trainer.model), reference=trainer.penalty.reference.name,
            temperature=getattr(self.args, "temperature", 1.0),
        )  # fmt: skip

    def close(self) -> None:
        """Write what is pending; the main process makes the page of what all have written."""
        self.log.close()
        self.accelerator.wait_for_everyone()
        folder = self.output_dir / "kl"
        if self.accelerator.is_main_process and any(folder.glob("*.parquet")):
            write_report(self.output_dir, folder / "report.html")
