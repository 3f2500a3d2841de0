"""The table of completions: on the terminal, and as Parquet beside the run."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from klft.writing import atomic_write, escaping_output, two_digits, visible, visible_lines


def plain(text: Any) -> Text:
    """Text as it is: no markup is read in it, and control characters (ESC, NUL ...) are escaped."""
    return Text(visible(str(text)))


def readable(text: Any) -> Text:
    """A prompt or a completion: text as it is, a conversation as `role: content` lines, a lone answer as its content.

    As in `plain` nothing is obeyed; line breaks are kept.
    """
    if isinstance(text, list) and text and all(isinstance(turn, dict) and "role" in turn for turn in text):
        if len(text) == 1 and text[0]["role"] == "assistant" and isinstance(text[0].get("content"), str):
            text = text[0]["content"]
        else:
            text = "\n".join(map(_turn, text))
    return Text(visible_lines(str(text).strip()))


def _turn(message: dict[str, Any]) -> str:
    others = {name: v for name, v in message.items() if v and name not in ("role", "content")}  # tool calls, names
    return f"{message['role']}: {message.get('content') or ''}" + (f" {others}" if others else "")


def completion_rows(
    rows: list[dict], completions: list, scores: Tensor, sequence_kl: Tensor, extra: dict[str, list]
) -> list[dict[str, Any]]:
    """One row of the table per completion, NaN scores as None; `extra` are the reward functions' own columns."""
    given = [None if score != score else score for score in scores.tolist()]
    return [
        {"prompt": row["prompt"], "completion": said, "score": score, "sequence_kl": float(kl)}
        | {name: values[i] for name, values in extra.items()}
        for i, (row, said, score, kl) in enumerate(zip(rows, completions, given, sequence_kl, strict=True))
    ]


def show_completions(rows: list[dict[str, Any]], step: int, output_dir: Path, how_many: int) -> None:
    """Write all rows to output_dir/completions, then print the first `how_many`."""
    if not rows:
        return
    table = Table(title=f"completions at step {step}, showing {min(how_many, len(rows))} of {len(rows)}", expand=True)
    for name in rows[0]:
        table.add_column(plain(name), overflow="fold", ratio=3 if name in ("prompt", "completion") else None)
    for row in rows[:how_many]:
        cells = [plain(two_digits(v)) if isinstance(v, float) else readable(v) for v in row.values()]
        table.add_row(*cells, end_section=True)
    folder = output_dir / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    columns = {name: _storable([row[name] for row in rows]) for name in rows[0]}
    with atomic_write(folder / f"completions_{step:05d}.parquet") as file:
        pq.write_table(pa.table(columns | {"step": [step] * len(rows)}), file)
    with escaping_output():
        Console().print(table)


def _storable(values: list) -> list:
    """Numbers of one kind stay numbers; a column of anything else becomes text, None stays None."""
    kinds = {type(v) for v in values if v is not None}
    if kinds <= {int, float} and bool not in kinds:
        return values
    # Lone surrogates (half an emoji) cannot be encoded; they are kept as escapes rather than lost.
    return [None if v is None else str(v).encode("utf-8", "backslashreplace").decode() for v in values]
