"""Statistics of a token table that merge over ranks and steps, and the numbers and lines made of them.

Prompt tokens, and those without a score (a text's first), are left out. Non-finite values are counted and left out of
everything else, each quantity by itself. A quantity without a finite value is absent: no key, no NaN. All values are in
nats. Percentiles are within 1 %, see klft.diagnostics.distributions; everything else is exact.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from klft import scores
from klft.diagnostics.distributions import Distribution, Tally, bin_numbers, middle, moments, percentile_of
from klft.scores import metrics_of
from klft.writing import visible

if TYPE_CHECKING:
    from klft.diagnostics.records import Metadata

COLUMNS: dict[str, str] = {
    "reverse": "reverse_kl", "forward": "forward_kl", "entropy": "entropy", "ref_entropy": "ref_entropy",
    "logp": "logp", "ref_logp": "ref_logp",
}  # fmt: skip
QUANTITIES: tuple[str, ...] = (*scores.QUANTITIES, "sampling_gap")
"""Those of klft.scores, and sampling_gap = k1 - reverse, whose mean is 0 but for chance. k1, k2, k3 and sampling_gap
are of tokens that the policy sampled (the column `sampled`), and absent where there is none."""

QUADRANTS: tuple[str, ...] = ("neither", "both", "mode-dropping", "mode-inventing")
QUIET_NATS = 0.1  # where both KLs are below this the models hardly differ: total variation <= sqrt(0.1 / 2) = 0.22
MUCH_LARGER = 2.0  # for close models the two directions are equal to leading order; a factor of 2 says which mass moved

COUNTS: tuple[str, ...] = ("tokens", "sequences", "nonfinite", "agree", "compared")
SEQUENCE: tuple[str, ...] = ("step", "rank", "sample_id")
CHUNK = 1 << 18  # rows that are looked at together, to bound memory
SHIFT, HALF = 14, 1 << 13  # one key of something's number and a value's bin: number << SHIFT | bin + HALF


def quadrant(reverse: npt.ArrayLike, forward: npt.ArrayLike) -> np.ndarray:
    """Index into QUADRANTS of each pair of KLs.

    neither: both below QUIET_NATS. mode-dropping: forward at least MUCH_LARGER times reverse, the policy has lost mass
    that the reference has. mode-inventing: the mirror image, the policy has mass where the reference has little. both:
    the rest, the models differ in both ways.
    """
    reverse, forward = np.asarray(reverse), np.asarray(forward)
    loud = np.maximum(reverse, forward) >= QUIET_NATS
    kind = np.select([forward >= MUCH_LARGER * reverse, reverse >= MUCH_LARGER * forward], [2, 3], 1)
    return np.where(loud, kind, 0)


def position_bins(positions: np.ndarray) -> np.ndarray:
    """At most 256 bins, the same for every table: one per position up to 63, then 16 per doubling up to 2^18 - 1."""
    exponent = np.maximum(np.frexp(positions)[1].astype(np.int64) - 1, 6)
    return np.where(positions < 64, positions, np.minimum(16 * (exponent - 3) + (positions >> exponent - 4), 255))


def position_start(number: int) -> int:
    """The first position of a bin."""
    octave, part = divmod(number - 64, 16)
    return number if number < 64 else (16 + part) << (octave + 2)


@dataclass
class Statistics:
    """Statistics of a token table that merge: for the terminal, a tracker and the page.

    `tallies` hold every sum, see `of`; those by step, token, entropy, quadrant and position have the columns tokens,
    finite reverse KLs, their sum, finite forward KLs, their sum. `ends`: quantity -> (least, largest finite value).
    `names`: token id -> (text, class or ""). `worst_by`: see `worst_tokens`.
    """

    tokens: int = 0  # scored, without prompts, as everything here
    sequences: int = 0
    nonfinite: int = 0  # tokens with a non-finite value in any quantity
    agree: int = 0  # tokens at which both models' likeliest token is the same,
    compared: int = 0  # of those that have top lists
    tallies: dict[str, Tally] = field(default_factory=dict)
    ends: dict[str, list[float]] = field(default_factory=dict)
    names: dict[int, tuple[str, str]] = field(default_factory=dict)
    worst_by: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    worst: int = 50

    @staticmethod
    def of(table: pa.Table, metadata: "Metadata | None" = None, worst: int = 50, context: int = 8) -> "Statistics":
        """Statistics of a table with the columns of TokenRecord. `metadata` gives the token classes; `worst` tokens are
        kept by each measure, with `context` tokens on either side."""
        chunks = (Statistics._of(chunk, metadata, worst, context) for chunk in _chunks(table))
        return functools.reduce(Statistics.merge, chunks, Statistics(worst=worst))

    @staticmethod
    def _of(table: pa.Table, metadata: "Metadata | None", worst: int, context: int) -> "Statistics":
        tokens = _Tokens(table)
        sequence, stats = tokens.sequences[tokens.rows], Statistics(worst=worst)
        if not len(sequence):
            return stats
        nonfinite, rows, bins = np.zeros(len(sequence), bool), [], [Tally.of(sequence[:0], None)]
        for number, name in enumerate(QUANTITIES):
            values, valid = tokens.quantity(name)
            kept = values[np.isfinite(values)]
            rows.append(moments(values, valid, sequence))
            nonfinite |= valid & ~np.isfinite(values)
            if len(kept):
                stats.ends[name] = [float(kept.min()), float(kept.max())]
                bins.append(Tally.of((number << SHIFT) + HALF + bin_numbers(kept), None))
        stats.tallies["moments"] = Tally(np.arange(len(rows)), np.array(rows, np.float64))
        stats.tallies["bins"] = functools.reduce(Tally.merge, bins)
        stats.tokens, stats.sequences, stats.nonfinite = len(nonfinite), len(np.unique(sequence)), int(nonfinite.sum())
        first, ref_first = (pc.list_element(table[n], 0) for n in ("top_ids", "ref_top_ids"))  # pyright: ignore
        same = pc.equal(first, ref_first)  # pyright: ignore[reportAttributeAccessIssue]
        stats.agree = int(same.fill_null(False).to_numpy()[tokens.rows].sum())
        stats.compared = int(same.is_valid().to_numpy()[tokens.rows].sum())
        stats._group(tokens)
        for name in ("reverse", "forward", "nonfinite"):
            score = nonfinite.astype(np.float64) if name == "nonfinite" else tokens.quantity(name)[0]
            stats.worst_by[name] = tokens.worst(np.where(np.isfinite(score), score, 0.0), worst, context)
        ids, rows = np.unique(table["token_id"].to_numpy(), return_index=True)
        classes = metadata.classes if metadata is not None else {}
        texts = zip(ids.tolist(), table["token"].take(rows).to_pylist(), strict=True)
        stats.names = {i: (text, classes.get(i, "")) for i, text in texts}
        return stats

    def _group(self, tokens: "_Tokens") -> None:
        """Both KLs by step, token id, entropy, quadrant and position."""
        values = {name: tokens.quantity(name)[0] for name in ("reverse", "forward")}
        finite = {name: np.isfinite(column) for name, column in values.items()}
        columns: list[Any] = [None]
        for name in values:
            columns += [finite[name], np.where(finite[name], values[name], 0.0)]

        def tally(keys: np.ndarray, kept: Any = slice(None)) -> Tally:
            return Tally.of(keys, *(c if c is None else c[kept] for c in columns))

        self.tallies["step"] = tally(tokens.integers("step"))
        self.tallies["token"] = tally(tokens.integers("token_id"))
        entropy = tokens.quantity("entropy")[0]
        kept = np.isfinite(entropy)
        self.tallies["entropy"] = tally(bin_numbers(entropy[kept]), kept)
        kept = finite["reverse"] & finite["forward"]
        self.tallies["quadrant"] = tally(quadrant(values["reverse"][kept], values["forward"][kept]), kept)
        positions = position_bins(tokens.integers("position"))
        self.tallies["position"] = tally(positions)
        for name, kept in finite.items():
            keys = (positions[kept] << SHIFT) + HALF + bin_numbers(values[name][kept])
            self.tallies[f"position_{name}"] = Tally.of(keys, None)

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of both tables, as long as no sequence is in both. Associative and commutative."""

        def both(a: dict, b: dict, merge: Callable[[Any, Any], Any]) -> dict:
            return a | b | {key: merge(a[key], b[key]) for key in a.keys() & b.keys()}

        worst = max(self.worst, other.worst)
        rows = both(self.worst_by, other.worst_by, lambda a, b: a + b)
        return Statistics(
            **{name: getattr(self, name) + getattr(other, name) for name in COUNTS},
            tallies=both(self.tallies, other.tallies, Tally.merge),
            ends=both(self.ends, other.ends, lambda a, b: [min(a[0], b[0]), max(a[1], b[1])]),
            names=both(self.names, other.names, max),  # the "" of an unknown class gives way
            worst_by={name: sorted(entries, key=_badness(name))[:worst] for name, entries in rows.items()},
            worst=worst,
        )

    def to_dict(self) -> dict[str, Any]:
        """The complete state, as JSON takes it."""
        tallies = {name: [t.keys.tolist(), t.sums.T.tolist()] for name, t in self.tallies.items()}
        return vars(self) | {"tallies": tallies, "names": [[i, *pair] for i, pair in self.names.items()]}

    @staticmethod
    def from_dict(state: dict[str, Any]) -> "Statistics":
        """From what `to_dict` gave."""
        tallies = {
            name: Tally(np.array(keys, np.int64), np.array(sums, np.float64).reshape(len(sums), len(keys)).T)
            for name, (keys, sums) in state["tallies"].items()
        }
        names = {token_id: (text, kind) for token_id, text, kind in state["names"]}
        return Statistics(**state | {"tallies": tallies, "names": names})

    @property
    def top1_agree(self) -> float | None:
        """Share of tokens at which both models' likeliest token is the same; None without top lists."""
        return self.agree / self.compared if self.compared else None

    @property
    def quantities(self) -> dict[str, Distribution]:
        """Distributions by name, of those of QUANTITIES that have a finite value."""
        distributions = {}
        for number, name in enumerate(QUANTITIES):
            if name in self.ends:
                (low, high), sums = self.ends[name], self.tallies["moments"].sums[number]
                distributions[name] = Distribution(low, high, sums, self.tallies["bins"].between(number << SHIFT, HALF))
        return distributions

    @property
    def perplexity(self) -> float | None:
        """exp(-mean logp)."""
        return self._perplexity("logp")

    @property
    def ref_perplexity(self) -> float | None:
        """exp(-mean ref_logp)."""
        return self._perplexity("ref_logp")

    def _perplexity(self, name: str) -> float | None:
        mean = self.quantities[name].mean if name in self.ends else -math.inf
        return math.exp(-mean) if mean > -700 else None

    def by_step(self) -> list[dict[str, Any]]:
        """step, count, reverse_mean, forward_mean; ascending in step."""
        return [{"step": step} | _means(sums) for step, sums in self._rows("step")]

    def by_position(self) -> list[dict[str, Any]]:
        """At most 256 rows: start, stop (positions), count, reverse_mean, reverse_p90, forward_mean, forward_p90."""
        rows = []
        for number, sums in self._rows("position"):
            row = {"start": position_start(number), "stop": position_start(number + 1)} | _means(sums)
            for name in ("reverse", "forward"):
                if f"{name}_mean" in row:
                    bins = self.tallies[f"position_{name}"].between(number << SHIFT, HALF)
                    row[f"{name}_p90"] = percentile_of(bins.keys, bins.sums[:, 0], 90)
            rows.append(row)
        return rows

    def by_token(self, top: int = 100) -> list[dict[str, Any]]:
        """The token ids with the largest total KL (reverse, or forward where there is no reverse): token_id, token,
        token_class (where known), count, and reverse_ and forward_ mean, total and share (of the table's total)."""
        rows = []
        for token_id, sums in self._rows("token"):
            text, kind = self.names.get(token_id, ("", ""))
            rows.append({"token_id": token_id, "token": text} | ({"token_class": kind} if kind else {}) | _means(sums))
        return _largest(rows)[:top]

    def by_class(self) -> list[dict[str, Any]]:
        """token_class and the numbers of `by_token`; empty where no class is known."""
        sums: dict[str, np.ndarray] = {}
        for token_id, row in self._rows("token"):
            kind = self.names.get(token_id, ("", ""))[1]
            sums[kind] = sums.get(kind, 0.0) + row
        rows = [{"token_class": kind or "other"} | _means(row) for kind, row in sums.items()]
        return _largest(rows) if any(sums) else []

    def by_entropy(self) -> list[dict[str, Any]]:
        """Deciles of the policy's entropy: decile (1-10), low, high (nats), count, reverse_mean, forward_mean.

        From the histogram of entropies: a bin (2 % wide) across the border of two deciles is split pro rata.
        """
        tally, rows = self.tallies.get("entropy"), []
        if tally is None or not len(tally.keys):
            return []
        counts, (least, most) = tally.sums[:, 0], self.ends["entropy"]
        ends = np.cumsum(counts)
        for decile in range(10):
            part = np.minimum(ends, ends[-1] * (decile + 1) / 10) - np.maximum(ends - counts, ends[-1] * decile / 10)
            inside = tally.keys[part > 0]
            low, high = (float(np.clip(middle(int(i)), least, most)) for i in (inside[0], inside[-1]))
            sums = np.maximum(part, 0) / counts @ tally.sums
            rows.append({"decile": decile + 1, "low": low, "high": high} | _means(sums))
        return rows

    def quadrants(self) -> dict[str, dict[str, float]]:
        """QUADRANTS, see `quadrant`, -> count, share of the tokens with both KLs finite, reverse_mean, forward_mean."""
        rows = {QUADRANTS[key]: _means(sums) for key, sums in self._rows("quadrant")}
        total = sum(row["count"] for row in rows.values())
        return {name: {"share": row["count"] / total} | row for name, row in rows.items()}

    def worst_tokens(self, direction: str = "reverse") -> list[dict[str, Any]]:
        """The tokens with the largest KL ("reverse", "forward"), or with a "nonfinite" number, which is None here: rows
        of TokenRecord and, as lists of token texts, `before` and `after`."""
        return self.worst_by.get(direction, [])

    def _rows(self, name: str) -> list[tuple[int, np.ndarray]]:
        tally = self.tallies.get(name)
        return [] if tally is None else list(zip(tally.keys.tolist(), tally.sums, strict=True))


def _means(sums: np.ndarray) -> dict[str, Any]:
    """count, and mean and total of each direction that has a finite value."""
    row: dict[str, Any] = {"count": round(float(sums[0]))}
    for name, n, total in (("reverse", *sums[1:3].tolist()), ("forward", *sums[3:5].tolist())):
        row |= {f"{name}_mean": total / n, f"{name}_total": total} if n else {}
    return row


def _largest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their shares of the total, largest first."""
    for name in ("reverse", "forward"):
        total = sum(row.get(f"{name}_total", 0.0) for row in rows)
        for row in rows:
            row |= {f"{name}_share": row[f"{name}_total"] / total} if f"{name}_total" in row and total else {}
    return sorted(rows, key=lambda row: -row.get("reverse_total", row.get("forward_total", 0.0)))


def _badness(name: str) -> Callable[[dict[str, Any]], tuple]:
    return lambda r: (-(r.get(f"{name}_kl") or 0.0), *(r[key] for key in (*SEQUENCE, "position")))


def _runs(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(first rows of runs with one (step, rank, sample_id), number of the sequence that each run belongs to)."""
    columns = [table[name].to_numpy() for name in SEQUENCE]
    begins = np.ones(len(table), bool)
    begins[1:] = np.any([c[1:] != c[:-1] for c in columns], axis=0)
    starts = np.flatnonzero(begins)
    _, number = np.unique(np.stack([c[starts] for c in columns], -1), axis=0, return_inverse=True)
    return starts, number.ravel()


def _chunks(table: pa.Table) -> list[pa.Table]:
    """Chunks of about CHUNK rows that divide no sequence; the whole table, where sequences are not contiguous."""
    starts, number = _runs(table)
    if len(table) <= CHUNK or len(np.unique(number)) < len(starts):
        return [table]
    cuts = [*np.unique(starts[np.searchsorted(starts, np.arange(0, starts[-1], CHUNK))]).tolist(), len(table)]
    return [table.slice(start, stop - start) for start, stop in itertools.pairwise(cuts)]


class _Tokens:
    """Columns of a table as arrays [N] over the tokens that count, which are those `rows` of the table."""

    def __init__(self, table: pa.Table):
        self.table = table
        left_out = table["is_prompt"].to_numpy() | table["logp"].is_null().to_numpy()
        self.rows: Any = np.flatnonzero(~left_out) if left_out.any() else slice(None)
        starts, number = _runs(table)
        self.sequences = np.repeat(number, np.diff(np.append(starts, len(table))))  # of every row of the table

    def integers(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy().astype(np.int64)[self.rows]

    def floats(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        column = self.table[name]
        return column.to_numpy().astype(np.float64)[self.rows], column.is_valid().to_numpy()[self.rows]

    def quantity(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """One of QUANTITIES (float64, NaN for null), and where it is not null. Beyond float32 counts as infinite."""
        if name in COLUMNS:
            return self.floats(COLUMNS[name])
        (logp, valid), (ref_logp, also) = self.floats("logp"), self.floats("ref_logp")
        sampled = self.table["sampled"].fill_null(False).to_numpy()[self.rows]
        valid = valid & also & sampled
        estimator = scores.SAMPLED["k1" if name == "sampling_gap" else name]
        values = scores.saturate(estimator(torch.from_numpy(logp), torch.from_numpy(ref_logp))).numpy()
        values = np.where(valid, values, np.nan)
        if name == "sampling_gap":
            exact, also = self.floats("reverse_kl")
            with np.errstate(invalid="ignore"):
                values, valid = values - exact, valid & also
        return values, valid

    def worst(self, score: np.ndarray, worst: int, context: int) -> list[dict[str, Any]]:
        """The rows with the largest positive score [N], with the token texts before and after them."""
        candidates = np.flatnonzero(score > 0)
        if len(candidates) > worst:
            least = np.partition(score[candidates], -worst)[-worst]
            candidates = candidates[score[candidates] >= least]
        rows = np.arange(len(self.table))[self.rows][candidates]
        order = [self.table[name].to_numpy()[rows] for name in ("position", *SEQUENCE[::-1])]
        rows = rows[np.lexsort((*order, -score[candidates]))][:worst]
        near = np.flatnonzero(np.isin(self.sequences, self.sequences[rows]))
        near = near[np.lexsort((self.table["position"].to_numpy()[near], self.sequences[near]))]
        entries = []
        for row, entry in zip(rows.tolist(), self.table.take(rows).to_pylist(), strict=True):
            place = int(np.flatnonzero(near == row)[0])
            window = near[max(place - context, 0) : place + context + 1]
            window = window[self.sequences[window] == self.sequences[row]]
            texts, here = self.table["token"].take(window).to_pylist(), window.tolist().index(row)
            finite = {name: _finite(value) for name, value in entry.items()}
            entries.append(finite | {"before": texts[:here], "after": texts[here + 1 :]})
        return entries


def _finite(value: Any) -> Any:
    """As JSON takes it: None for what is not finite."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- numbers for a tracker, lines for a terminal ---------------------------------------------------------------------


def scalars(stats: Statistics) -> dict[str, float]:
    """Metrics for a tracker, with the keys and meanings of klft.scores.kl_metrics. Percentiles are within 1 %."""
    return metrics_of(stats.quantities, tokens=stats.tokens, nonfinite=stats.nonfinite, top1_agree=stats.top1_agree)


def summary_lines(stats: Statistics) -> list[tuple[str, str]]:
    """(label, value) pairs in the manner of llama.cpp's --kl-divergence. Free of control characters.

    Values in nats; +- is the standard error clustered by sequence.
    """
    lines = [("Tokens", f"{stats.tokens:,} in {stats.sequences:,} sequences")]
    if stats.nonfinite:
        lines.append(("Tokens with a non-finite value", f"{stats.nonfinite:,}, left out"))
    quantities = stats.quantities
    for name in [name for name in ("reverse", "forward") if name in quantities]:
        of = quantities[name]
        lines.append((f"Mean {name} KL", _with_error(of.mean, of.standard_error)))
        ranks = {f"{p} %": of.percentile(p) for p in (99.9, 99, 95, 90)} | {"Median": of.percentile(50)}
        ranks = {"Maximum": of.high} | ranks | {"Minimum": of.low}
        lines += [(f"{rank} {name} KL", f"{value:.4g}") for rank, value in ranks.items()]
        if of.sequence_mean is not None:
            value = _with_error(of.sequence_mean, of.sequence_standard_error)
            lines.append((f"{name.capitalize()} KL per sequence", value))
    labels = {"k1": "Mean log-ratio, k1", "k2": "Mean k2", "k3": "Mean k3", "sampling_gap": "Mean k1 - exact"}
    for name in [name for name in labels if name in quantities]:
        lines.append((labels[name], _with_error(quantities[name].mean, quantities[name].standard_error)))
    if stats.top1_agree is not None:
        lines.append(("Same top-1", f"{stats.top1_agree:.2%}"))
    for label, value in (("policy", stats.perplexity), ("reference", stats.ref_perplexity)):
        lines += [(f"Perplexity of the {label}", f"{value:.4f}")] if value is not None else []
    for row in stats.worst_tokens()[:1]:
        run = row["rank"] > 0 or any(step["step"] > 0 for step in stats.by_step())
        where = f"{sequence_name(row, run, ranks=True)}, position {row['position']}"
        lines.append(("Worst token", f'"{visible(row["token"])}", {row["reverse_kl"]:.4g} at {where}'))
    return lines


def sequence_name(row: dict[str, Any], run: bool, ranks: bool) -> str:
    """ "text 24" of given texts, counted from 1 where people read; "step 50, rank 0, sample 23" of a run's columns."""
    rank = f"rank {row['rank']}, " if ranks else ""
    return f"step {row['step']}, {rank}sample {row['sample_id']}" if run else f"text {row['sample_id'] + 1}"


def _with_error(mean: float, error: float | None) -> str:
    return f"{mean:.4g}" if error is None else f"{mean:.4g} ± {error:.2g}"
