"""Statistics of a token table against loops over its rows."""

import itertools
import json
import math
import statistics as python

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.tables import CLASSES, by, counted, mean, quantity, rows_of, same, stats_of, table_of, views

from klft import estimators
from klft.diagnostics import SCHEMA, Statistics, scalars, summary_lines, visible
from klft.diagnostics import stats as module
from klft.diagnostics.distributions import Distribution, Tally, bin_numbers, middle, moments
from klft.diagnostics.stats import QUADRANTS, position_bins, position_start, quadrant

# --- one quantity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", module.QUANTITIES)
def test_count_mean_extremes_and_percentiles(name):
    rows = rows_of(60)
    found, values = stats_of(rows).quantities[name], sorted(quantity(counted(rows), name))
    assert found.count == len(values)
    assert found.nonfinite == 0
    assert found.mean == pytest.approx(mean(values), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((values[0], values[-1]), rel=1e-6, abs=1e-9)
    for percent in (0, 1, 10, 50, 90, 95, 99, 99.9, 100):
        exact = values[round((len(values) - 1) * percent / 100)]
        assert found.percentile(percent) == pytest.approx(exact, rel=0.01)


def test_k1_k2_k3_are_those_of_the_estimators():
    rows = rows_of()
    logp, ref_logp = (torch.tensor([row[n] for row in counted(rows)]).double() for n in ("logp", "ref_logp"))
    found = stats_of(rows).quantities
    for name in ("k1", "k2", "k3"):
        exact = getattr(estimators, name)(logp, ref_logp).mean().item()
        assert found[name].mean == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e30])
def test_a_bin_is_within_one_percent_of_its_values(scale):
    values = np.exp(np.random.default_rng(0).normal(0, 2, 5000)) * scale
    values = np.concatenate([values, -values])
    shown = np.array([middle(int(n)) for n in bin_numbers(values)])
    assert np.max(np.abs(shown / values - 1)) < 0.01
    assert np.array_equal(np.argsort(bin_numbers(np.sort(values)), kind="stable"), np.arange(len(values)))
    assert bin_numbers(np.array([0.0, -0.0, 9e-11, -9e-11])).tolist() == [0] * 4
    assert middle(0) == 0


def test_sequence_sums_and_their_error():
    rows = rows_of()
    sums = [math.fsum(quantity(g, "reverse")) for g in by(counted(rows), "sample_id").values()]
    found = stats_of(rows).quantities["reverse"]
    assert found.sequence_mean == pytest.approx(mean(sums), rel=1e-12)
    assert found.sequence_standard_error == pytest.approx(python.stdev(sums) / math.sqrt(len(sums)), rel=1e-9)


def test_the_clustered_error_is_the_sandwich_of_a_regression_on_a_constant():
    """(X'X)^-1 (sum_g X_g' e_g e_g' X_g) (X'X)^-1, times G/(G-1), with X a column of ones."""
    rows = rows_of(spread=1.5)
    groups = by(counted(rows), "sample_id")
    y = np.array([v for g in groups.values() for v in quantity(g, "reverse")])
    owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups.values()])
    x = np.ones((len(y), 1))
    bread = np.linalg.inv(x.T @ x)
    residual = y - (x @ (bread @ x.T @ y))
    meat = np.zeros((1, 1))
    for g in range(len(groups)):
        score = x[owner == g].T @ residual[owner == g]
        meat += np.outer(score, score)
    expected = math.sqrt((bread @ meat @ bread)[0, 0] * len(groups) / (len(groups) - 1))
    assert stats_of(rows).quantities["reverse"].standard_error == pytest.approx(expected, rel=1e-9)


def test_the_clustered_error_is_how_much_the_mean_varies():
    """Over 300 draws of a table; the error that takes tokens for independent is several times too small."""
    random = np.random.default_rng(0)
    means, errors, naive = [], [], []
    for _ in range(300):
        lengths = random.integers(5, 30, 40)
        values = np.concatenate([np.abs(random.normal(2, 1) + random.normal(0, 0.3, n)) for n in lengths])
        sums = moments(values, np.ones(len(values), bool), np.repeat(np.arange(40), lengths))
        found = Distribution(0.0, 0.0, np.array(sums), Tally.of(np.zeros(0, int), None))
        means.append(found.mean)
        errors.append(found.standard_error)
        naive.append(values.std() / math.sqrt(len(values)))
    assert mean(errors) == pytest.approx(python.stdev(means), rel=0.1)
    assert mean(naive) < 0.4 * python.stdev(means)


def simple(reverse, sample_id=None, **columns):
    """Statistics of a table with nothing but a log-probability and the columns given."""
    n = len(reverse)
    empty = dict.fromkeys(SCHEMA.names, pa.nulls(n)) | {"is_prompt": np.zeros(n, bool), "sampled": np.ones(n, bool)}
    empty |= {"token": pa.array(["x"] * n)}
    zeros = dict.fromkeys(("step", "rank", "position", "token_id"), np.zeros(n, int)) | {"logp": np.zeros(n)}
    given = {"sample_id": np.zeros(n, int) if sample_id is None else sample_id, "reverse_kl": np.asarray(reverse)}
    return Statistics.of(pa.table(empty | zeros | given | columns).cast(SCHEMA))


def test_one_sequence_has_no_error():
    found = simple([1.0, 2.0]).quantities["reverse"]
    assert (found.mean, found.standard_error, found.sequence_mean, found.sequence_standard_error) == (
        1.5,
        None,
        3.0,
        None,
    )
    assert simple([1.0, 1.0], np.arange(2)).quantities["reverse"].standard_error == 0.0


def test_equal_models_are_exactly_zero_apart():
    stats = simple(np.zeros(10), np.arange(10) // 2, forward_kl=np.zeros(10))
    found = stats.quantities["reverse"]
    assert (found.mean, found.low, found.high, found.percentile(99), found.standard_error) == (0, 0, 0, 0, 0)
    assert found.histogram() == ([], [], 10)
    assert stats.worst_tokens() == []
    assert "reverse_share" not in stats.by_token()[0]
    assert stats.quadrants()["neither"]["share"] == 1


def test_the_histogram_for_drawing_counts_every_value_once():
    values = np.concatenate([np.exp(np.random.default_rng(0).normal(-5, 3, 4000)), np.zeros(7), [1e-12, -1e-3]])
    for bins in (1, 7, 60, 10_000):
        edges, counts, below = simple(values).quantities["reverse"].histogram(bins)
        assert below == 9
        assert len(counts) <= bins
        assert len(edges) == len(counts) + 1
        assert sum(counts) == 4000
        stored = values[:4000].astype(np.float32).astype(np.float64)
        assert counts == np.histogram(stored, edges)[0].tolist()


# --- what is left out ------------------------------------------------------------------------------------------------


def test_prompt_tokens_change_nothing():
    rows = rows_of()
    worse = [row | ({"reverse_kl": 1e6, "logp": math.nan} if row["is_prompt"] else {}) for row in rows]
    assert same(views(stats_of(worse)), views(stats_of(rows)))
    alone = stats_of(counted(rows))
    assert scalars(alone) == pytest.approx(scalars(stats_of(rows)))
    assert alone.sequences == stats_of(rows).sequences == 30


def test_non_finite_values_are_counted_and_left_out():
    rows = rows_of()
    real = counted(rows)
    real[3]["reverse_kl"] = math.inf
    real[40]["reverse_kl"] = math.nan
    real[40]["forward_kl"] = -math.inf
    real[77]["ref_logp"] = -math.inf
    real[90]["forward_kl"] = math.inf
    stats = stats_of(rows)
    assert stats.nonfinite == 4
    assert stats.tokens == len(real)
    counts = {name: d.nonfinite for name, d in stats.quantities.items()}
    assert counts == {
        "reverse": 2, "forward": 2, "entropy": 0, "ref_entropy": 0, "logp": 0, "ref_logp": 1, "k1": 1, "k2": 1, "k3": 1,
        "sampling_gap": 3,
    }  # fmt: skip
    finite = [row for row in real if math.isfinite(row["reverse_kl"])]
    assert stats.quantities["reverse"].mean == pytest.approx(mean(quantity(finite, "reverse")), rel=1e-12)
    whole = [g for g in by(real, "sample_id").values() if all(math.isfinite(row["reverse_kl"]) for row in g)]
    sums = [math.fsum(quantity(g, "reverse")) for g in whole]
    assert len(sums) == 28
    assert stats.quantities["reverse"].sequence_mean == pytest.approx(mean(sums), rel=1e-12)
    shown = stats.worst_tokens("nonfinite")
    assert [(r["sample_id"], r["position"]) for r in shown] == sorted(
        (real[i]["sample_id"], real[i]["position"]) for i in (3, 40, 77, 90)
    )
    assert shown[0]["reverse_kl"] is None
    assert stats.worst_tokens()[0]["reverse_kl"] == max(quantity(finite, "reverse"))
    assert sum(q["count"] for q in stats.quadrants().values()) == len(real) - 3
    json.dumps([stats.to_dict(), views(stats)], allow_nan=False)
    assert dict(summary_lines(stats))["Tokens with a non-finite value"] == "4, left out"


def test_a_k3_beyond_float32_is_not_finite():
    stats = simple([1.0, 1.0], logp=np.array([-200.0, -1.0]), ref_logp=np.array([-1.0, -1.0]))
    assert stats.quantities["k3"].nonfinite == stats.nonfinite == 1
    assert stats.quantities["k3"].mean == 0
    assert stats.quantities["k1"].mean == -99.5


def test_tables_of_nothing():
    for stats in (Statistics.of(SCHEMA.empty_table()), stats_of([row for row in rows_of(3) if row["is_prompt"]])):
        assert scalars(stats) == {}
        assert summary_lines(stats) == [("Tokens", "0 in 0 sequences")]
        assert (stats.by_step(), stats.by_position(), stats.by_token(), stats.by_class()) == ([], [], [], [])
        assert (stats.by_entropy(), stats.quadrants(), stats.worst_tokens(), stats.quantities) == ([], {}, [], {})
        assert stats.top1_agree is stats.perplexity is stats.ref_perplexity is None
        rows = rows_of()
        assert same(views(stats.merge(stats_of(rows))), views(stats_of(rows)))
    broken = simple(np.full(3, np.nan), logp=np.full(3, np.nan))
    assert broken.quantities == {}
    assert scalars(broken) == {"kl/nonfinite/count": 3, "kl/tokens/count": 3}


def test_without_a_reference_only_the_policy_is_described():
    names = ("ref_logp", "reverse_kl", "forward_kl", "ref_entropy", "ref_top_ids", "ref_top_p")
    stats = stats_of([row | dict.fromkeys(names) for row in rows_of()])
    assert set(scalars(stats)) == {"entropy/policy/mean", "kl/nonfinite/count", "kl/tokens/count"}
    assert list(stats.quantities) == ["entropy", "logp"]
    assert stats.perplexity is not None
    assert [set(row) for row in stats.by_step()] == [{"step", "count"}]
    assert not any("KL" in label for label, _ in summary_lines(stats))
    forward = stats_of([row | {"reverse_kl": None} for row in rows_of()])
    assert "reverse" not in forward.quantities
    assert forward.by_token(1)[0]["forward_total"] == max(row["forward_total"] for row in forward.by_token())
    assert forward.quadrants() == {}


# --- tables ----------------------------------------------------------------------------------------------------------


def check(row, group, total=None):
    assert row["count"] == len(group)
    for name in ("reverse", "forward"):
        values = quantity(group, name)
        assert row[f"{name}_mean"] == pytest.approx(mean(values), rel=1e-9)
        if total is not None:
            assert row[f"{name}_total"] == pytest.approx(math.fsum(values), rel=1e-9)
            assert row[f"{name}_share"] == pytest.approx(math.fsum(values) / math.fsum(quantity(total, name)), rel=1e-9)


def test_by_step_token_class_and_quadrant():
    rows = [row for step in (0, 7, 3) for row in rows_of(8, seed=step, step=step)]
    real, stats = counted(rows), stats_of(rows)
    assert [row["step"] for row in stats.by_step()] == [0, 3, 7]
    for row in stats.by_step():
        check(row, by(real, "step")[row["step"],])
    tokens = stats.by_token()
    assert len(tokens) == len({row["token_id"] for row in real})
    assert [r["reverse_total"] for r in tokens] == sorted((r["reverse_total"] for r in tokens), reverse=True)
    for row in tokens:
        check(row, by(real, "token_id")[row["token_id"],], real)
        assert (row["token"], row["token_class"]) == (f" t{row['token_id']}", CLASSES[row["token_id"]])
    assert stats.by_token(5) == tokens[:5]
    for row in stats.by_class():
        check(row, [r for r in real if CLASSES[r["token_id"]] == row["token_class"]], real)
    assert len(stats.by_class()) == 3
    assert Statistics.of(table_of(rows)).by_class() == []
    for name, row in stats.quadrants().items():
        group = [r for r in real if QUADRANTS[corner(r["reverse_kl"], r["forward_kl"])] == name]
        check(row, group)
        assert row["share"] == len(group) / len(real)
    assert set(stats.quadrants()) == set(QUADRANTS)


def corner(reverse, forward):
    if reverse < 0.1 and forward < 0.1:
        return 0
    return 2 if forward >= 2 * reverse else 3 if reverse >= 2 * forward else 1


def test_quadrants_by_hand():
    pairs = [(0, 0), (0.099, 0.0999), (0.1, 0.09), (0.01, 0.1), (0.1, 0.01), (3, 5), (3, 6), (6, 3), (5, 3), (0, 9)]
    names = [QUADRANTS[k] for k in quadrant(*zip(*pairs, strict=True))]
    assert names == [
        "neither", "neither", "both", "mode-dropping", "mode-inventing", "both", "mode-dropping", "mode-inventing",
        "both", "mode-dropping",
    ]  # fmt: skip


def test_a_policy_that_lost_a_mode_is_dropping_and_one_that_made_one_up_is_inventing():
    p, q = torch.tensor([[1 - 1e-6, 1e-6], [0.5, 0.5]]).log(), torch.tensor([[0.5, 0.5], [1 - 1e-6, 1e-6]]).log()
    kinds = quadrant((p.exp() * (p - q)).sum(-1).numpy(), (q.exp() * (q - p)).sum(-1).numpy())
    assert [QUADRANTS[k] for k in kinds] == ["mode-dropping", "mode-inventing"]


def test_by_position():
    rows = rows_of(80)
    rows += [
        row | {"position": row["position"] * 30, "sample_id": 1000 + row["sample_id"]} for row in rows_of(80, seed=1)
    ]
    real, found = counted(rows), stats_of(rows).by_position()
    assert sum(row["count"] for row in found) == len(real)
    assert all(a["stop"] <= b["start"] for a, b in itertools.pairwise(found))
    for row in found:
        group = [r for r in real if row["start"] <= r["position"] < row["stop"]]
        check(row, group)
        for name in ("reverse", "forward"):
            values = sorted(quantity(group, name))
            assert row[f"{name}_p90"] == pytest.approx(values[round((len(values) - 1) * 0.9)], rel=0.01)


def test_position_bins():
    positions = np.arange(1 << 18)
    numbers = position_bins(positions)
    assert np.array_equal(np.unique(numbers), np.arange(256))
    starts = [position_start(k) for k in range(257)]
    assert np.array_equal(np.searchsorted(starts, positions, side="right") - 1, numbers)
    assert starts[256] == 1 << 18
    assert max((b - a) / max(a, 16) for a, b in itertools.pairwise(starts)) <= 1 / 16
    assert position_bins(np.array([1 << 30])).tolist() == [255]


def test_by_entropy_decile():
    rows = rows_of(200)
    real = sorted(counted(rows), key=lambda row: row["entropy"])
    found = stats_of(rows).by_entropy()
    assert [row["decile"] for row in found] == list(range(1, 11))
    for i, row in enumerate(found):
        group = real[round(len(real) * i / 10) : round(len(real) * (i + 1) / 10)]
        assert row["count"] == pytest.approx(len(group), abs=1)
        assert row["low"] == pytest.approx(group[0]["entropy"], rel=0.02)
        assert row["high"] == pytest.approx(group[-1]["entropy"], rel=0.02)
        spread = python.stdev(quantity(group, "reverse")) / len(group)  # a bin holds a few tokens more or less
        assert row["reverse_mean"] == pytest.approx(mean(quantity(group, "reverse")), abs=8 * spread)
    total = sum(row["reverse_mean"] * len(real) / 10 for row in found)
    assert total == pytest.approx(math.fsum(quantity(real, "reverse")), rel=0.05)


def test_entropies_that_are_all_one_value_are_shared_out():
    found = simple(np.arange(1.0, 11), entropy=np.zeros(10)).by_entropy()
    assert [(row["low"], row["high"], row["count"], round(row["reverse_mean"], 9)) for row in found] == [
        (0, 0, 1, 5.5)
    ] * 10


def test_same_first_choice_and_perplexities():
    rows = rows_of()
    real, stats = counted(rows), stats_of(rows)
    agree = [row["top_ids"][0] == row["ref_top_ids"][0] for row in real]
    assert 0.1 < stats.top1_agree == mean(agree) < 0.9
    assert stats.perplexity == pytest.approx(math.exp(-mean(quantity(real, "logp"))), rel=1e-12)
    assert stats.ref_perplexity == pytest.approx(math.exp(-mean(quantity(real, "ref_logp"))), rel=1e-12)
    half = stats_of([row | ({"top_ids": None} if row["position"] % 2 else {}) for row in rows])
    assert half.top1_agree == mean([a for a, row in zip(agree, real, strict=True) if row["position"] % 2 == 0])
    table = table_of(rows)
    sliced = Statistics.of(pa.concat_tables([table.slice(0, 100), table.slice(100)]).slice(5, 300))
    assert sliced.top1_agree == stats_of(rows[5:305]).top1_agree


def test_worst_tokens_with_their_context():
    rows = rows_of(20)
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    for given in (rows, shuffled):
        stats = stats_of(given, worst=7, context=3)
        for name in ("reverse", "forward"):
            column, found = f"{name}_kl", stats.worst_tokens(name)
            expected = sorted(counted(rows), key=lambda row: -row[column])[:7]
            names = [k for k in SCHEMA.names if not k.endswith(("ids", "_p"))]
            assert [[row[k] for k in names] for row in found] == [[row[k] for k in names] for row in expected]
            for row in found:
                sequence = sorted(by(rows, "sample_id")[row["sample_id"],], key=lambda r: r["position"])
                place = [r["position"] for r in sequence].index(row["position"])
                assert row["before"] == [r["token"] for r in sequence[max(place - 3, 0) : place]]
                assert row["after"] == [r["token"] for r in sequence[place + 1 : place + 4]]
                assert row["top_ids"] == sequence[place]["top_ids"]


def test_equally_bad_tokens_are_in_order_of_their_place():
    stats = simple(np.ones(200), np.arange(200)[::-1] // 2, position=np.arange(200) % 2)
    assert [(r["sample_id"], r["position"]) for r in stats.worst_tokens()] == [(i // 2, i % 2) for i in range(50)]


# --- numbers and lines -----------------------------------------------------------------------------------------------


def test_scalars_have_the_trainers_names():
    rows = rows_of()
    real, found = counted(rows), scalars(stats_of(rows))
    names = {f"kl/{d}/{m}" for d in ("reverse", "forward") for m in ("mean", "p50", "p90", "p99", "max")}
    names |= {f"kl/{k}/mean" for k in ("sequence/reverse", "sequence/forward", "k1", "k2", "k3")}
    names |= {"kl/top1_agree/frac", "kl/nonfinite/count"}
    assert set(found) == names | {"entropy/policy/mean", "entropy/reference/mean", "kl/tokens/count"}
    assert all(type(value) is float for value in found.values())
    assert found["kl/forward/max"] == max(quantity(real, "forward"))
    assert found["entropy/reference/mean"] == pytest.approx(mean(quantity(real, "ref_entropy")))


def test_the_summary_reads_like_llama_cpp():
    rows = rows_of()
    rows[5]["token"] = rows[5]["token"] + "\x1b]0;pwn\a\u202e\n"
    rows[5]["reverse_kl"] = 1e5
    lines = summary_lines(stats_of(rows))
    labels = [label for label, _ in lines]
    assert len(set(labels)) == len(labels)
    expected = ["Maximum", "99.9 %", "99 %", "95 %", "90 %", "Median", "Minimum"]
    place = labels.index("Mean reverse KL")
    assert labels[place : place + 8] == ["Mean reverse KL", *(f"{rank} reverse KL" for rank in expected)]
    found = stats_of(rows).quantities["reverse"]
    assert dict(lines)["Mean reverse KL"] == f"{found.mean:.4g} ± {found.standard_error:.2g}"
    assert dict(lines)["Same top-1"].endswith("%")
    assert "\\x1b]0;pwn\\x07\\u202e\\n" in dict(lines)["Worst token"]
    assert "1e+05" in dict(lines)["Worst token"]
    assert all(text.isprintable() for line in lines for text in line)


def test_visible():
    assert visible("a b é日😀") == "a b é日😀"
    assert visible("\x1b[31m\0\t\x9b\u200b\u2066\ufeff") == "\\x1b[31m\\x00\\t\\x9b\\u200b\\u2066\\ufeff"
    assert visible("\ud83d").isprintable()


def test_two_hundred_thousand_rows():
    random = np.random.default_rng(0)
    n, length = 200_000, 500
    reverse = random.lognormal(-4, 2, n).astype(np.float32)
    place = {"position": np.arange(n) % length, "token_id": random.integers(0, 50_000, n)}
    place["token_id"][7] = 2**31 - 1
    forward = reverse * random.lognormal(0, 1, n).astype(np.float32)
    stats = simple(reverse, np.arange(n) // length, forward_kl=forward, entropy=random.exponential(1, n), **place)
    assert (stats.tokens, stats.sequences) == (n, 400)
    found = stats.quantities["reverse"]
    assert found.mean == pytest.approx(reverse.astype(np.float64).mean(), rel=1e-9)
    for percent in (50, 90, 99, 99.9):
        exact = np.sort(reverse)[round((n - 1) * percent / 100)]
        assert found.percentile(percent) == pytest.approx(exact, rel=0.01)
    assert len(stats.by_token()) == 100
    assert len(stats.by_position()) < 256
