"""Merging the statistics of a token table's parts, in any order, changes nothing."""

import functools
import itertools
import json
import math

import pytest
from support.tables import rows_of, same, stats_of, table_of, views

from klft.diagnostics import Statistics
from klft.diagnostics import stats as module


def parts():
    """Four tables: two ranks, two steps, one of them with long texts, one without a token."""
    made = [rows_of(12, seed=s, step=s // 2, rank=s % 2) for s in range(3)]
    long = [row | {"position": row["position"] * 700} for row in rows_of(5, seed=9, step=4)]
    long[9]["reverse_kl"] = math.inf
    return [*made, long, [row for row in rows_of(2, step=5) if row["is_prompt"]]]


def test_merging_parts_in_any_order_is_the_whole():
    whole = stats_of([row for part in parts() for row in part])
    pieces = [stats_of(part) for part in parts()]
    for order in list(itertools.permutations(range(5)))[::11]:
        ordered = [pieces[i] for i in order]
        assert same(views(functools.reduce(Statistics.merge, ordered)), views(whole))
    a, b, c, *_ = pieces
    assert same(views(a.merge(b).merge(c)), views(a.merge(b.merge(c))))


def test_merging_leaves_its_parts_alone():
    a, b = stats_of(parts()[0]), stats_of(parts()[1])
    before = json.dumps(a.to_dict()), json.dumps(b.to_dict())
    a.merge(b).merge(a)
    assert (json.dumps(a.to_dict()), json.dumps(b.to_dict())) == before


def test_state_goes_through_json():
    for part in parts():
        stats = stats_of(part)
        again = Statistics.from_dict(json.loads(json.dumps(stats.to_dict(), allow_nan=False)))
        assert same(views(again), views(stats), 1e-14)
        assert again.to_dict() == stats.to_dict()
        other = stats_of(rows_of(4, seed=5, step=99))
        assert same(views(again.merge(other)), views(stats.merge(other)))


def test_classes_known_to_one_part_are_known_to_the_whole():
    rows = rows_of(4)
    blind = Statistics.of(table_of(rows_of(4, step=1, seed=1)))
    for merged in (blind.merge(stats_of(rows)), stats_of(rows).merge(blind)):
        shared = {row["token_id"] for row in rows}
        assert all(("token_class" in row) == (row["token_id"] in shared) for row in merged.by_token())


def test_a_large_table_is_read_in_parts_that_divide_no_sequence(monkeypatch):
    rows = [row for step in range(3) for row in rows_of(20, step=step, seed=step)]
    whole = views(stats_of(rows))
    calls = []
    original = Statistics._of
    monkeypatch.setattr(Statistics, "_of", staticmethod(lambda t, *rest: calls.append(len(t)) or original(t, *rest)))
    for size in (1, 50, 333):
        calls.clear()
        monkeypatch.setattr(module, "CHUNK", size)
        assert same(views(stats_of(rows)), whole)
        assert len(calls) == (60 if size == 1 else pytest.approx(len(rows) / size, rel=0.5))
        mixed = rows[::2] + rows[1::2]  # no sequence in one piece: not divided
        calls.clear()
        assert same(views(stats_of(mixed)), whole)
        assert calls == [len(rows)]
