"""Scored texts as a table."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from klft.diagnostics.records import SCHEMA, records_table
from klft.scoring import ScoredTexts


def scored_table(batches: Iterable[ScoredTexts], tokenizer: Any) -> pa.Table:
    """One row per token, as `records_table` makes them; `sample_id` is the text's number."""
    parts = [
        records_table(b.scores, b.token_ids, b.mask, tokenizer, is_prompt=b.is_prompt, sample_ids=b.sample_ids)
        for b in batches
    ]
    return pa.concat_tables(parts or [SCHEMA.empty_table()])
