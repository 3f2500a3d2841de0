"""One offline HTML file to look at a token table with: where in the text two models differ, and how.

    write_report("run", "report.html")

The numbers come from klft.diagnostics.stats; here sequences are chosen, numbers rounded, and all of it laid out.
page/ holds the template and hand-written CSS, JavaScript and SVG, which the file includes whole. Nothing is
fetched, and no HTML is made of token texts: texts travel as JSON in a block that does not run, the script shows them
through textContent, and a Content-Security-Policy allows that script and that style by their hash, and nothing else.
"""

import base64
import hashlib
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from klft._version import __version__
from klft.diagnostics.records import Metadata, read_records
from klft.diagnostics.stats import MUCH_LARGER, QUADRANTS, QUIET_NATS, SEQUENCE, Statistics, quadrant
from klft.writing import atomic_write, visible

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("tokens.js", "charts.js", "report.js")
NONE = "\N{EN DASH}"
LONGEST = 200  # characters of one token that are shown
CARRIERS = 25  # rows of the table by token
LEAST, PER_DECADE = 1e-6, 5  # where the histogram begins, and its bars for each factor of ten
NUMBERS = ("logp", "ref_logp", "reverse_kl", "forward_kl", "entropy", "ref_entropy", "advantage", "weight")
LISTS = ("top_ids", "top_p", "ref_top_ids", "ref_top_p")


def write_report(
    source: str | os.PathLike | tuple[pa.Table, Metadata],
    path: str | os.PathLike,
    *,
    sequences: int = 32,
    tokens: int = 512,
    seed: int = 0,
    title: str | None = None,
) -> Path:
    """Write the page of a token table to `path`, one self-contained file that appears whole or not at all.

    `source` is what `read_records` takes, or a table and its metadata. At most `sequences` sequences are shown in full,
    half of them those with the largest summed reverse KL (forward where there is none), the rest drawn with `seed`, and
    of each at most `tokens` tokens; the page says how many there were. Every statistic is over the whole table.
    `title` stands at its head.
    Raises ValueError for a table without rows, for fewer than 0 sequences or 1 token, and where `path` is a folder.
    """
    path = Path(path)
    if sequences < 0 or tokens < 1:
        raise ValueError(f"sequences must be >= 0 and tokens >= 1, got sequences={sequences} and tokens={tokens}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file to write, such as {path / 'report.html'}")
    table, metadata = source if isinstance(source, tuple) else read_records(source)
    if not table.num_rows:
        raise ValueError("the table has no rows, so there is nothing to show: were all tokens masked?")
    html = _render(_context(table, metadata, _choose(table, sequences, seed), tokens, seed, title))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(html.encode())
    return path


def _render(context: dict[str, Any]) -> str:
    environment = Environment(autoescape=True, loader=FileSystemLoader(PAGE), undefined=StrictUndefined)
    environment.filters |= {"visible": visible, "short": _short, "percent": _percent, "error": _error}
    environment.policies["json.dumps_kwargs"] = {
        "allow_nan": False,
        "separators": (",", ":"),
    }  # ASCII; < > & ' as \u00..
    css = (PAGE / "report.css").read_text("utf-8")
    js = '"use strict";{\n' + "\n".join((PAGE / name).read_text("utf-8") for name in SCRIPTS) + "}\n"
    hashes = {"css_hash": _integrity(css), "js_hash": _integrity(js)}
    return environment.get_template("report.html").render(context, css=css, js=js, **hashes)


def _integrity(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _context(
    table: pa.Table,
    metadata: Metadata,
    chosen: list[tuple[dict[str, Any], pa.Table]],
    limit: int,
    seed: int,
    title: str | None,
) -> dict[str, Any]:
    """Variables of the template."""
    stats, words = Statistics.of(table, metadata), _Vocabulary(metadata)
    shown = [_sequence(entry, rows, limit, words) for entry, rows in chosen]
    worst_by = "reverse" if stats.worst_tokens("reverse") else "forward"
    histograms, under = _histograms(stats)
    data = {
        "sequences": shown,
        "positions": [_rounded(row) for row in stats.by_position()],
        "steps": [_rounded(row) for row in stats.by_step()],
        "histograms": histograms | {"least": LEAST, "per_decade": PER_DECADE},
        "quadrants": {"names": QUADRANTS, "quiet": QUIET_NATS, "much": MUCH_LARGER},
        "worst": [_worst(row, words) for row in stats.worst_tokens(worst_by)],
        "carriers": [_rounded(row) | {"token": words.of(row["token_id"])} for row in stats.by_token(CARRIERS)],
        **words.data(),  # last: it holds the texts of all the others
    }
    return {
        "title": visible(title or "Where two models part, token by token"),
        "made_by": f"klft {__version__}",
        "metadata": metadata,
        "stats": stats,
        "total": max(metadata.total_sequences or 0, stats.sequences),
        "data": data,
        "drawn": sum(entry["why"] == "random" for entry, _ in chosen),
        "seed": seed,
        "limit": limit,
        "cut": sum(1 for sequence in shown if sequence["missing"]),
        "worst_by": f"{worst_by} KL",
        "under": under,
        "quiet": QUIET_NATS,
        "much": MUCH_LARGER,
    }


# --- which sequences -------------------------------------------------------------------------------------------------


def _choose(table: pa.Table, wanted: int, seed: int) -> list[tuple[dict[str, Any], pa.Table]]:
    """The chosen sequences, worst first, then random ones: what is known of each, and its rows in order of position."""
    measure = "forward_kl" if table["reverse_kl"].null_count == len(table) else "reverse_kl"
    score = table[measure].to_numpy().astype(np.float64)
    score[table["is_prompt"].to_numpy() | table[measure].is_null().to_numpy()] = 0.0
    score[np.isnan(score)] = math.inf  # the worst there is
    sums = (
        table.select(SEQUENCE)
        .append_column("score", pa.array(score))
        .group_by(SEQUENCE, use_threads=False)
        .aggregate([("score", "sum")])
        .to_pylist()
    )
    sums.sort(key=lambda entry: (-entry["score_sum"], *(entry[name] for name in SEQUENCE)))
    worst, rest = sums[: (wanted + 1) // 2], sums[(wanted + 1) // 2 :]
    drawn = random.Random(seed).sample(rest, min(wanted - len(worst), len(rest)))
    chosen = [e | {"why": f"no. {i} by sum"} for i, e in enumerate(worst, 1)] + [e | {"why": "random"} for e in drawn]
    near = np.ones(len(table), bool)
    for name in SEQUENCE:  # all rows that could be theirs, in three quick passes; then, of few, exactly theirs
        near &= np.isin(table[name].to_numpy(), [entry[name] for entry in chosen])
    few = table.take(np.flatnonzero(near))
    columns = {name: few[name].to_numpy() for name in SEQUENCE}
    rows = [np.flatnonzero(np.all([columns[name] == entry[name] for name in SEQUENCE], axis=0)) for entry in chosen]
    return [(entry, few.take(each).sort_by("position")) for entry, each in zip(chosen, rows, strict=True)]


def _window(is_prompt: list[bool], limit: int) -> tuple[int, int]:
    """(start, stop) of the tokens shown of a long sequence: the prompt is cut to a quarter at least, then the end."""
    prompt = is_prompt.index(False) if False in is_prompt else len(is_prompt)
    kept = min(prompt, max(limit - (len(is_prompt) - prompt), limit // 4))
    return prompt - kept, min(len(is_prompt), prompt - kept + limit)


# --- what the script gets --------------------------------------------------------------------------------------------


class _Vocabulary:
    """The texts on the page, each once, by number. Long ones are cut, and what they were long is recorded."""

    def __init__(self, metadata: Metadata):
        self._metadata = metadata
        self._numbers: dict[tuple[int | None, str], int] = {}

    def of(self, token_id: int | None, text: str | None = None) -> int:
        if text is None:
            text = self._metadata.vocabulary.get(token_id or 0, f"<id {token_id}>")
        return self._numbers.setdefault((token_id, text), len(self._numbers))

    def data(self) -> dict[str, Any]:
        classes = [self._metadata.classes.get(-1 if i is None else i, "") for i, _ in self._numbers]
        names = sorted(set(classes))
        return {
            "vocabulary": [text[:LONGEST] for _, text in self._numbers],
            "ids": [token_id for token_id, _ in self._numbers],
            "classes": [names.index(name) for name in classes],
            "class_names": names,
            "cut": {number: len(text) for (_, text), number in self._numbers.items() if len(text) > LONGEST},
        }


def _number(value: Any) -> Any:
    """A float with four significant digits. JSON has no infinity: that and NaN become strings."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) else short


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in row.items()}


def _sequence(entry: dict[str, Any], rows: pa.Table, limit: int, words: _Vocabulary) -> dict[str, Any]:
    """One sequence, column by column. A column that is null throughout is null."""
    whole = rows.select(["is_prompt", "reward", "reverse_kl", "forward_kl"]).to_pydict()
    spoken = {
        name: [v for v, p in zip(c, whole["is_prompt"], strict=True) if not p and v is not None]
        for name, c in whole.items()
    }
    start, stop = _window(whole["is_prompt"], limit)
    columns = rows.slice(start, stop - start).to_pydict()
    kls = np.array([columns["reverse_kl"], columns["forward_kl"]], np.float64)  # None becomes NaN
    unknown = np.isnan(kls).any(0)
    kinds = np.where(unknown, 9, quadrant(*np.where(unknown, 0.0, kls)))
    rewards, gone = spoken["reward"], {"front": start, "end": len(rows) - stop}
    made = {
        **{name: entry[name] for name in (*SEQUENCE, "why")},
        "sum_reverse": _number(sum(spoken["reverse_kl"])) if spoken["reverse_kl"] else None,
        "sum_forward": _number(sum(spoken["forward_kl"])) if spoken["forward_kl"] else None,
        "reward": _number(rewards[0] if len(set(rewards)) == 1 else sum(rewards)) if rewards else None,
        "missing": ", ".join(f"{n:,} tokens cut at the {where}" for where, n in gone.items() if n),
        "position": columns["position"],
        "prompt": "".join("01"[prompt] for prompt in columns["is_prompt"]),
        "quadrant": "".join(map(str, kinds)),
        "token": [words.of(*pair) for pair in zip(columns["token_id"], columns["token"], strict=True)],
    }
    for name in NUMBERS:
        made[name] = [_number(v) for v in columns[name]]
    for name in LISTS:
        convert = words.of if name.endswith("ids") else _number
        made[name] = [each and [convert(v) for v in each] for each in columns[name]]
    return made | {name: None for name in (*NUMBERS, *LISTS) if all(v is None for v in made[name])}


def _worst(row: dict[str, Any], words: _Vocabulary) -> dict[str, Any]:
    kept = {name: _number(row[name]) for name in (*SEQUENCE, "position", *NUMBERS[:4])}
    around = {side: [words.of(None, text) for text in row[side]] for side in ("before", "after")}
    return kept | around | {"token": words.of(row["token_id"], row["token"])}


def _histograms(stats: Statistics) -> tuple[dict[str, Any], str]:
    """Shares of tokens on one grid for both directions; and, in words, what lies left of it."""
    shares: dict[str, Any] = {}
    under = []
    for name in ("reverse", "forward"):
        if name not in stats.quantities:
            continue
        edges, counts, below = stats.quantities[name].histogram(1 << 14)  # as fine as it is kept
        places = PER_DECADE * np.log10(np.array(edges) / LEAST)
        cells = np.floor((places[1:] + places[:-1]) / 2).astype(int)
        inside = cells >= 0
        bars = np.bincount(cells[inside], np.array(counts)[inside])
        shares[name] = [_number(bar / stats.quantities[name].count) for bar in bars.tolist()]
        below = stats.quantities[name].count - int(bars.sum())
        if below:
            under.append(f"{below:,} tokens with a {name} KL under {LEAST:g} are left out.")
    return {name: share for name, share in shares.items() if share}, " ".join(under)


# --- numbers in the template -----------------------------------------------------------------------------------------


def _short(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2g}"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.3g} %"
