"""Token-level KL diagnostics: a table of tokens, statistics of it, and one offline page that shows where models differ.

    from klft.diagnostics import TokenKLLog, write_report

    with TokenKLLog("run", tokenizer, model="policy", reference="base") as log:
        for step, (scores, token_ids, mask) in enumerate(batches):     # scores: klft's TokenScores, [B, T]
            log.add(scores, token_ids, mask, step=step)
            print(log.scalars())                                       # kl/reverse/mean, kl/forward/p99, ...
    write_report("run", "report.html")

The table is plain Parquet (`records.TokenRecord` documents its columns), the statistics merge over ranks and steps.
Scalars are a dict for whichever tracker there is; nothing here goes online.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from klft.diagnostics.records import (
    SCHEMA,
    SCHEMA_VERSION,
    Metadata,
    TokenKLLog,
    TokenRecord,
    read_records,
    records_table,
    write_records,
)
from klft.diagnostics.stats import Statistics, scalars, summary_lines
from klft.diagnostics.vocabulary import token_classes, token_texts
from klft.writing import visible

if TYPE_CHECKING:
    from klft.diagnostics.callback import TokenKLCallback
    from klft.diagnostics.report import write_report
    from klft.scoring import score_texts

_LAZY = {
    "TokenKLCallback": "klft.diagnostics.callback",
    "score_texts": "klft.scoring",
    "write_report": "klft.diagnostics.report",
}

__all__ = [
    "SCHEMA", "SCHEMA_VERSION", "Metadata", "Statistics", "TokenKLCallback", "TokenKLLog", "TokenRecord",
    "read_records", "records_table", "scalars", "score_texts", "summary_lines", "token_classes", "token_texts",
    "visible", "write_records", "write_report",
]  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'klft.diagnostics' has no attribute {name!r}")
