"""One offline HTML file to look at a token table with: where in the text two models differ, and how.

    write_report("run", "report.html")

The numbers come from klft.diagnostics.stats; here sequences are chosen, numbers rounded, and all of it laid out.
page/ holds the template and hand-written CSS, JavaScript and SVG, which the file includes whole. Nothing is
fetched, and no HTML is made of token texts: texts travel as JSON in a block that does not run, the script shows them
through textContent, and a Content-Security-Policy allows that script and that style by their hash, and nothing else.
The numbers of the tokens shown are in one compressed block, see `_pack`: about 55 bytes a token at worst.
"""

import base64
import hashlib
import math
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from klft._version import __version__
from klft.diagnostics.records import SCHEMA, Metadata, read_records
from klft.diagnostics.stats import MUCH_LARGER, QUADRANTS, QUIET_NATS, SEQUENCE, Statistics, quadrant, sequence_name
from klft.writing import atomic_write, visible

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("tokens.js", "charts.js", "report.js")
NONE = "\N{EN DASH}"
LONGEST = 200  # characters of one token that are shown
CARRIERS = 25  # rows of the table by token
LEAST, PER_DECADE = 1e-6, 5  # where the histogram begins, and its bars for each factor of ten
NUMBERS = ("logp", "ref_logp", "reverse_kl", "forward_kl", "entropy", "ref_entropy", "advantage", "weight")
# Bits of the mantissa that are kept: more where a small difference of two numbers is shown; the others within 0.05 %.
BITS: dict[str, int] = dict.fromkeys(("logp", "ref_logp", "entropy", "ref_entropy"), 13)
OTHER_BITS = 10
SHARE_BITS, SHARE_STEP = 5, 1 / 2048  # of a top list: within 1.6 %, and from 1/64 on within 0.025 % of the whole
NULL = 0xFFFFFFFF  # the bits of a float32 that stand for null: a NaN that no computation gives


def write_report(
    source: str | os.PathLike | tuple[pa.Table, Metadata],
    path: str | os.PathLike,
    *,
    sequences: int = 200,
    tokens: int = 1000,
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
    policy = _run_name(source, table) or metadata.model or "unnamed"
    html = _render(_context(table, metadata, _choose(table, sequences, seed), tokens, seed, title, policy))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(html.encode())
    return path


def _run_name(source: Any, table: pa.Table) -> str:
    """A run's policy by output_dir and steps: "runs/reviews, steps 1 to 250"; "" for what is no run's output_dir."""
    if isinstance(source, tuple | list) or not (Path(source) / "kl").is_dir():
        return ""
    first, last = pc.min_max(table["step"]).as_py().values()  # pyright: ignore[reportAttributeAccessIssue]
    return f"{os.fspath(source)}, step{f's {first:,} to' if first < last else ''} {last:,}"


def _render(context: dict[str, Any]) -> str:
    environment = Environment(autoescape=True, loader=FileSystemLoader(PAGE), undefined=StrictUndefined)
    environment.filters |= {"visible": visible, "short": _short, "percent": _percent, "measured": _measured}
    # ASCII; < > & ' as \u00..
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
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
    policy: str,
) -> dict[str, Any]:
    """Variables of the template."""
    stats, words = Statistics.of(table, metadata), _Vocabulary(metadata)
    shown, windows = [], [SCHEMA.empty_table()]
    for entry, rows in chosen:
        facts, window = _sequence(entry, rows, limit)
        shown.append(facts)
        windows.append(window)
    columns = _columns(pa.concat_tables(windows), words)
    name = _namer(table, metadata)
    worst_by = "reverse" if stats.worst_tokens("reverse") else "forward"
    worst, kl = stats.worst_tokens(worst_by), stats.quantities.get(worst_by)
    carried, total = sum(row[f"{worst_by}_kl"] for row in worst), kl.mean * kl.count if kl else 0.0
    against = f"{policy} against {metadata.reference or 'unnamed'}"
    said = f": {worst_by} KL {_measured(kl.mean, kl.standard_error)} nats per token" if kl else ""
    histograms, under = _histograms(stats)
    data = {
        "sequences": [facts | {"name": name(facts)} for facts in shown],
        "positions": [_rounded(row) for row in stats.by_position()],
        "steps": [_rounded(row) for row in stats.by_step()],
        "histograms": histograms | {"least": LEAST, "per_decade": PER_DECADE},
        "quadrants": {"names": QUADRANTS, "quiet": QUIET_NATS, "much": MUCH_LARGER},
        "worst_by": worst_by,
        "worst_total": _number(total),
        "worst": [_worst(row, words) | {"name": name(row)} for row in worst],
        "carriers": [_rounded(row) | {"token": words.of(row["token_id"])} for row in stats.by_token(CARRIERS)],
        **words.data(columns),  # last: it holds the texts of all the others
    }
    return {
        "title": visible(title or against + said),
        "policy": policy,
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
        "worst_share": carried / total if total > 0 else None,
        "under": under,
        "quiet": QUIET_NATS,
        "much": MUCH_LARGER,
    }


# --- which sequences -------------------------------------------------------------------------------------------------


def _choose(table: pa.Table, wanted: int, seed: int) -> list[tuple[dict[str, Any], pa.Table]]:
    """The chosen sequences, worst first, then random ones: what is known of each, and its rows in order of position.

    One of the last step is among them, however small its KL: what a run came to is not left out.
    """
    measure = "forward_kl" if table["reverse_kl"].null_count == len(table) else "reverse_kl"
    score = table[measure].to_numpy().astype(np.float64)
    score[table["is_prompt"].to_numpy() | table[measure].is_null().to_numpy()] = 0.0
    score[np.isnan(score)] = math.inf  # the worst there is
    scored = table.select(SEQUENCE).append_column("score", pa.array(score)).group_by(SEQUENCE, use_threads=False)
    sums = scored.aggregate([("score", "sum")]).to_pylist()
    sums.sort(key=lambda entry: (-entry["score_sum"], *(entry[name] for name in SEQUENCE)))
    worst, rest = sums[: (wanted + 1) // 2], sums[(wanted + 1) // 2 :]
    drawn = random.Random(seed).sample(rest, min(wanted - len(worst), len(rest)))
    chosen = [e | {"why": f"no. {i} by sum"} for i, e in enumerate(worst, 1)] + [e | {"why": "random"} for e in drawn]
    last = max(sums, key=lambda entry: entry["step"])  # the worst one of the last step
    if chosen and all(entry["step"] != last["step"] for entry in chosen):
        chosen[-1] = last | {"why": "of the last step"}
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

    def data(self, columns: dict[str, np.ndarray]) -> dict[str, Any]:
        classes = [self._metadata.classes.get(-1 if i is None else i, "") for i, _ in self._numbers]
        names = sorted(set(classes))
        columns |= {
            "ids": np.array([NULL if i is None else i for i, _ in self._numbers], np.uint32).view(np.int32),
            "classes": np.array([names.index(name) for name in classes], np.uint32),
        }
        return {
            "vocabulary": [text[:LONGEST] for _, text in self._numbers],
            "class_names": names,
            "cut": {number: len(text) for (_, text), number in self._numbers.items() if len(text) > LONGEST},
            **_pack(columns),
        }


def _pack(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arrays of 1 or 4 bytes a value for the page: "columns", name -> [kind, length], and "packed", their bytes.

    Of each array all first bytes, then all second ones, and so on, little-endian: bytes of one kind stand together and
    compress. All of it is deflated (zlib) and written in base64.
    """
    planes = b"".join(
        a.astype(a.dtype.newbyteorder("<")).view(np.uint8).reshape(len(a), a.itemsize).T.tobytes()
        for a in columns.values()
    )
    kinds = {name: [f"{a.dtype.kind}{a.itemsize}", len(a)] for name, a in columns.items()}
    deflate = zlib.compressobj(5, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_FILTERED)  # half the time of the default
    packed = deflate.compress(planes) + deflate.flush()
    return {"columns": kinds, "packed": base64.b64encode(packed).decode()}


def _coarse(values: pa.Array | pa.ChunkedArray, bits: int) -> np.ndarray:
    """float32 with `bits` bits of mantissa, to nearest, and NULL for null. Infinities and NaN stay what they are."""
    raw = values.to_numpy(zero_copy_only=False).astype(np.float32).view(np.uint32)
    half = np.uint32(1 << (22 - bits))
    rounded = (raw + half) & ~(2 * half - np.uint32(1))
    rounded = np.where(np.isfinite(rounded.view(np.float32)), rounded, raw)
    return np.where(values.is_null().to_numpy(zero_copy_only=False), np.uint32(NULL), rounded).view(np.float32)


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


def _namer(table: pa.Table, metadata: Metadata) -> Callable[[dict[str, Any]], str]:
    """What a sequence is called: "text 24, FILE line 31" of given texts, "step 50, sample 23" of a run."""
    ranks = pc.max(table["rank"]).as_py() > 0  # pyright: ignore[reportAttributeAccessIssue]
    run = ranks or pc.max(table["step"]).as_py() > 0  # pyright: ignore[reportAttributeAccessIssue]

    def name(row: dict[str, Any]) -> str:
        at, place = row["sample_id"], ""
        if not run and 0 <= at < len(metadata.places):
            place = f", {visible(metadata.places[at])}"
        return sequence_name(row, run, ranks) + place

    return name


def _sequence(entry: dict[str, Any], rows: pa.Table, limit: int) -> tuple[dict[str, Any], pa.Table]:
    """What stands at the head of a sequence, and the rows of it that are shown."""
    given = rows["is_prompt"].to_numpy()
    start, stop = _window(given.tolist(), limit)
    said = rows.filter(pa.array(~given))
    sums = {
        name: said[name].drop_null().to_numpy().astype(np.float64) for name in ("reverse_kl", "forward_kl", "reward")
    }
    totals = {name: _number(float(values.sum())) if len(values) else None for name, values in sums.items()}
    if len(set(sums["reward"].tolist())) == 1:  # the sequence's, on every token
        totals["reward"] = _number(float(sums["reward"][0]))
    gone = {"front": start, "end": len(rows) - stop}
    return {
        **{name: entry[name] for name in (*SEQUENCE, "why")},
        "sum_reverse": totals["reverse_kl"],
        "sum_forward": totals["forward_kl"],
        "reward": totals["reward"],
        "missing": ", ".join(f"{n:,} tokens cut at the {where}" for where, n in gone.items() if n),
        "size": stop - start,
    }, rows.slice(start, stop - start)


def _columns(table: pa.Table, words: _Vocabulary) -> dict[str, np.ndarray]:
    """All tokens shown, sequence after sequence. A column that is null throughout is absent.

    Of the top lists: how many there are at each token, and all of them one after another.
    """
    kls = np.stack([table[name].to_numpy().astype(np.float64) for name in ("reverse_kl", "forward_kl")])
    unknown = np.isnan(kls).any(0)
    texts = table["token"].combine_chunks().dictionary_encode()
    ids, codes = table["token_id"].to_numpy().astype(np.int64), texts.indices.to_numpy()
    _, first, token = np.unique(ids << 32 | codes, return_index=True, return_inverse=True)
    kept = [words.of(int(ids[i]), texts.dictionary[int(codes[i])].as_py()) for i in first]
    made = {
        "position": table["position"].to_numpy().astype(np.int32),
        "prompt": table["is_prompt"].to_numpy().astype(np.uint8),
        "quadrant": np.where(unknown, 9, quadrant(*np.where(unknown, 0.0, kls))).astype(np.uint8),
        "token": np.array(kept, np.uint32)[token],
    }
    for name in NUMBERS:
        if table[name].null_count < len(table):
            made[name] = _coarse(table[name], BITS.get(name, OTHER_BITS))
    for side in ("top", "ref_top"):
        lists, shares = (table[f"{side}_{what}"].combine_chunks() for what in ("ids", "p"))
        if lists.null_count < len(table):
            distinct, index = np.unique(lists.flatten().to_numpy(), return_inverse=True)
            made[f"{side}_n"] = pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.uint32)  # pyright: ignore
            made[f"{side}_ids"] = np.array([words.of(int(i)) for i in distinct], np.uint32)[index]
            p = shares.flatten().to_numpy().astype(np.float32)
            made[f"{side}_p"] = np.where(
                p >= 1 / 64, np.round(p / SHARE_STEP) * SHARE_STEP, _coarse(pa.array(p), SHARE_BITS)
            ).astype(np.float32)
    return made


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
    """Four digits: 0.1234, 48,810; three before an exponent, as a tile has room for: 4.88e+06."""
    if value is None:
        return NONE
    digits = 4 if 1e-4 <= abs(value) < 1e6 else 3
    large = 1e4 <= abs(value) < 1e6
    return f"{float(f'{value:.4g}'):,.0f}" if large else f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def _measured(value: float | None, error: float | None) -> str:
    """A value with the digits that its standard error allows, and that: 0.123 ± 0.012."""
    if value is None or not error or not math.isfinite(error):
        return _short(value)
    digits = max(0, 1 - math.floor(math.log10(float(f"{error:.2g}"))))
    form, of_error = (".3g", ".2g") if digits > 6 else (f".{digits}f", f".{digits}f")
    return f"{value:{form}} ± {error:{of_error}}".replace("-", "\N{MINUS SIGN}")


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.3g} %"
