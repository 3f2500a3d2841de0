"""Token tables of random rows, and what loops over such rows find."""

import math

import numpy as np
import pyarrow as pa
import pytest

from klft.diagnostics import SCHEMA, Metadata, Statistics, scalars, summary_lines

VOCABULARY = 40
CLASSES = {i: ("word start", "digit", "special")[i % 3] for i in range(VOCABULARY)}


def rows_of(sequences=30, seed=0, step=0, rank=0, spread=1.0, start=0):
    """Rows as dicts: sequences of 1 to 40 tokens, the first two of them prompt, KLs that share a level per sequence."""
    random = np.random.default_rng(seed)
    rows = []
    for sample in range(start, start + sequences):
        level = random.normal(-3, spread)
        for position in range(2, 2 + random.integers(3, 40)):
            token = int(random.integers(VOCABULARY))
            reverse, forward = np.exp(random.normal(level, 1.5, 2)).astype(np.float32).tolist()
            logp, ref_logp, entropy, ref_entropy = (-random.exponential(1, 4)).astype(np.float32).tolist()
            top, ref_top = random.integers(0, 3, 2).tolist()
            rows.append(
                dict.fromkeys(SCHEMA.names)
                | {
                    "step": step, "rank": rank, "sample_id": sample, "position": position, "is_prompt": position < 4,
                    "sampled": position >= 4, "token_id": token, "token": f" t{token}",
                    "logp": logp, "ref_logp": ref_logp,
                    "reverse_kl": reverse, "forward_kl": forward, "entropy": -entropy, "ref_entropy": -ref_entropy,
                    "top_ids": [top, 9], "top_p": [0.5, 0.1], "ref_top_ids": [ref_top, 8], "ref_top_p": [0.5, 0.1],
                }
            )  # fmt: skip
    return rows


def table_of(rows):
    return pa.Table.from_pylist(rows, SCHEMA)


def stats_of(rows, **given):
    return Statistics.of(table_of(rows), Metadata(classes=CLASSES), **given)


def counted(rows):
    return [row for row in rows if not row["is_prompt"]]


def mean(values):
    return math.fsum(values) / len(values)


def by(rows, *names):
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def quantity(rows, name):
    log_ratio = [row["logp"] - row["ref_logp"] for row in rows]
    return {
        "reverse": lambda: [row["reverse_kl"] for row in rows],
        "forward": lambda: [row["forward_kl"] for row in rows],
        "k1": lambda: log_ratio,
        "k2": lambda: [x * x / 2 for x in log_ratio],
        "k3": lambda: [math.exp(-x) - 1 + x for x in log_ratio],
        "sampling_gap": lambda: [x - row["reverse_kl"] for x, row in zip(log_ratio, rows, strict=True)],
    }.get(name, lambda: [row[name] for row in rows])()


def same(a, b, rel=1e-9):
    """Equal but for rounding, whatever the nesting."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], rel) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, rel) for x, y in zip(a, b, strict=True))
    return a == pytest.approx(b, rel=rel, abs=1e-12) if isinstance(a, float) else a == b


def views(stats):
    """All that is read off statistics."""
    tables = (
        stats.by_step(),
        stats.by_position(),
        stats.by_token(),
        stats.by_class(),
        stats.by_entropy(),
        stats.quadrants(),
    )
    worst = [stats.worst_tokens(name) for name in ("reverse", "forward", "nonfinite")]
    return scalars(stats), summary_lines(stats), tables, worst, {n: d.histogram() for n, d in stats.quantities.items()}
