"""Scored texts as a table; and the names of klft 0.1, see klft.scoring, klft.prompts and klft.models."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pyarrow as pa

from klft._deprecated import moved
from klft.diagnostics.records import SCHEMA, records_table
from klft.scoring import ScoredTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def scored_table(batches: Iterable[ScoredTexts], tokenizer: "PreTrainedTokenizerBase") -> pa.Table:
    """One row per token, as `records_table` makes them, a text's first (unscored) too; `sample_id`: the text's."""
    tables = [
        records_table(
            b.scores, b.token_ids, b.attention_mask, tokenizer,
            scored=b.mask, is_prompt=b.is_prompt, sample_ids=b.sample_ids,
        )
        for b in batches
    ]  # fmt: skip
    return pa.concat_tables(tables or [SCHEMA.empty_table()])


__getattr__ = moved(
    __name__,
    dict.fromkeys(("Encoded", "encode_prompt", "encode_texts"), "klft.prompts")
    | {"score_texts": "klft.scoring", "as_reference": "klft.references:resolve_reference"}
    | dict.fromkeys(("check_positions", "check_tokenizers"), "klft.models"),
)
