"""The page as a file: what is in it, what it is made of, that it appears whole. In the browser: test_report_page.py."""

import base64
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from support.example_report import HOSTILE, data_of, example, synthetic, table_of, write_hostile

from klft.diagnostics import SCHEMA, write_records, write_report
from klft.diagnostics.report import NULL, _coarse, _measured, _short

# --- the file --------------------------------------------------------------------------------------------------------


class _Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.seen = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def source():
    return example(sequences=96)


@pytest.fixture(scope="module")
def page(source, tmp_path_factory):
    return write_report(source, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return write_hostile(tmp_path_factory.mktemp("hostile") / "report.html")


@pytest.mark.parametrize("which", ["page", "hostile"])
def test_the_file_holds_two_scripts_a_policy_and_no_way_out(which, request):
    html = request.getfixturevalue(which).read_text("utf-8")
    found = _Elements(html)
    tags = [tag for tag, _ in found.seen]
    known = (
        "html head meta link title style body header div h1 p bdi dl dt dd b nav ul li a main noscript section h2 h3 "
    )
    known += (
        "strong details summary table thead tbody tr th td button span fieldset legend label input figure figcaption "
    )
    assert set(tags) <= set((known + "svg path footer script").split())
    assert [attrs.get("type") for tag, attrs in found.seen if tag == "script"] == ["application/json", None]
    for tag, attrs in found.seen:
        assert not [name for name in attrs if name.startswith("on") or name in ("style", "src", "srcdoc", "action")], (
            tag
        )
        assert attrs.get("href", "#").startswith("#") or attrs == {"rel": "icon", "href": "data:,"}
    policy = next(attrs["content"] for tag, attrs in found.seen if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
        assert "innerHTML" not in text
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_data_block_cannot_be_closed_from_inside(hostile):
    html = hostile.read_text("utf-8")
    block = html.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(block)
    data = json.loads(block)
    short = [text for text in HOSTILE if len(text) <= 200]
    assert set(short) <= set(data["vocabulary"])
    assert "\ud83d" in data["vocabulary"]
    assert "x" * 200 in data["vocabulary"]
    assert len(html) < 150_000


def oracle_choice(table, metadata, wanted, seed):
    """Half the worst by summed reverse KL of what is not prompt, the rest at random: by plain loops."""
    sums = defaultdict(float)
    for row in table.to_pylist():
        sums[row["step"], row["rank"], row["sample_id"]] += 0.0 if row["is_prompt"] else row["reverse_kl"]
    ordered = sorted(sums, key=lambda key: (-sums[key], key))
    half = math.ceil(wanted / 2)
    return ordered[:half], random.Random(seed).sample(ordered[half:], wanted - half), sums


@pytest.mark.parametrize(("wanted", "seed"), [(7, 0), (7, 3), (32, 0)])
def test_half_of_the_sequences_are_the_worst_and_the_rest_is_random(source, tmp_path, wanted, seed):
    worst, drawn, sums = oracle_choice(*source, wanted, seed)
    data = data_of(write_report(source, tmp_path / "r.html", sequences=wanted, seed=seed))
    shown = [(s["step"], s["rank"], s["sample_id"]) for s in data["sequences"]]
    assert shown[: len(worst)] == worst
    assert sorted(shown[len(worst) :]) == sorted(drawn)
    assert [s["sum_reverse"] for s in data["sequences"]] == pytest.approx([sums[key] for key in shown], rel=1e-3)


def test_every_number_of_a_sequence_is_that_of_the_table(source, page):
    table, metadata = source
    rows = {(r["step"], r["sample_id"], r["position"]): r for r in table.to_pylist()}
    data = data_of(page)
    tokens = 0
    for s in data["sequences"]:
        for at, position in enumerate(s["position"]):
            row = rows[s["step"], s["sample_id"], position]
            assert data["vocabulary"][s["token"][at]] == row["token"]
            assert data["ids"][s["token"][at]] == row["token_id"]
            assert data["class_names"][data["classes"][s["token"][at]]] == metadata.classes[row["token_id"]]
            for name in ("logp", "ref_logp", "reverse_kl", "forward_kl", "entropy", "ref_entropy"):
                assert s[name][at] == pytest.approx(row[name], rel=5.1e-4, abs=1e-30)
            for side in ("", "ref_"):
                assert [data["ids"][i] for i in s[f"{side}top_ids"][at]] == row[f"{side}top_ids"]
                assert s[f"{side}top_p"][at] == pytest.approx(row[f"{side}top_p"], rel=0.016, abs=2.5e-4)
                assert all(
                    abs(a - b) <= 2.5e-4 for a, b in zip(s[f"{side}top_p"][at], row[f"{side}top_p"], strict=True)
                )
            assert s["prompt"][at] == "01"[row["is_prompt"]]
            tokens += 1
        assert s["advantage"] is None
    assert tokens > 1000


def test_the_last_step_is_shown_however_small_its_kl(tmp_path):
    rows = [{"step": step, "reverse_kl": 10.0 - step, "position": 0} for step in range(10)]
    data = data_of(write_report(table_of(rows), tmp_path / "r.html", sequences=2))
    assert [(s["step"], s["why"]) for s in data["sequences"]] == [(0, "no. 1 by sum"), (9, "of the last step")]


@pytest.mark.parametrize(
    ("prompt", "length", "limit", "window"),
    [(4, 10, 10, (0, 10)), (4, 10, 8, (2, 10)), (4, 10, 6, (3, 9)), (40, 50, 20, (30, 50)), (40, 100, 20, (35, 55))],
)
def test_long_sequences_are_cut_and_the_page_says_so(tmp_path, prompt, length, limit, window):
    rows = [{"is_prompt": at < prompt, "reverse_kl": 1.0, "reward": 2.0} for at in range(length)]
    path = write_report(table_of(rows), tmp_path / "r.html", tokens=limit)
    (shown,) = data_of(path)["sequences"]
    assert shown["position"] == list(range(*window))
    assert shown["sum_reverse"] == length - prompt
    assert shown["reward"] == 2
    said = f"1 of them are longer than {limit} tokens and are cut." in path.read_text()
    assert said == (window != (0, length))
    gone = [f"{n} tokens cut at the {side}" for side, n in (("front", window[0]), ("end", length - window[1])) if n]
    assert shown["missing"] == ", ".join(gone)


def test_the_page_of_a_run_is_that_of_its_table(source, page, tmp_path):
    (tmp_path / "kl").mkdir()
    write_records(source[0], tmp_path / "kl" / "tokens_000000-r0.parquet", source[1])
    file = tmp_path / "kl" / "tokens_000000-r0.parquet"
    assert write_report(str(file), tmp_path / "new" / "r.html").read_text() == page.read_text()
    of_run = write_report(str(tmp_path), tmp_path / "new" / "r.html").read_text()
    name = f"{tmp_path}, steps 0 to 250"  # a run's policy changes: which one it is, the folder and the steps say
    assert f"<title>{name} against reviews-base: reverse KL " in of_run
    assert f'Policy <bdi class="model">{name}</bdi>' in of_run
    assert "<dt>Policy started as</dt><dd>reviews-praise</dd>" in of_run
    assert data_of(tmp_path / "new" / "r.html") == data_of(page)


@pytest.mark.parametrize(
    ("rows", "places", "name"),
    [
        ([{"sample_id": 23}], [], "text 24"),
        ([{"sample_id": 1}], ["a.txt line 7", "a.txt line 31"], "text 2, a.txt line 31"),
        ([{"sample_id": 2}], ["a.txt line 7", "a.txt line 31"], "text 3"),
        ([{"step": 5, "sample_id": 23}], [], "step 5, sample 23"),
        ([{"sample_id": 4}, {"rank": 1, "sample_id": 4, "position": 0}], [], "step 0, rank 0, sample 4"),
    ],
)
def test_a_sequence_is_named_by_its_text_or_its_step(tmp_path, rows, places, name):
    table, metadata = table_of([{"reverse_kl": 2.0 - i} | row for i, row in enumerate(rows)], places=places)
    write_records(table, tmp_path / "t.parquet", metadata)
    data = data_of(write_report(tmp_path / "t.parquet", tmp_path / "r.html"))
    assert [data["sequences"][0]["name"], data["worst"][0]["name"]] == [name, name]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9876.54, "9877"), (48_812.3, "48,810"), (333_333.0, "333,300"), (4.881e6, "4.88e+06"), (math.inf, "inf"),
        (1.2345e-4, "0.0001234"), (1.2345e-5, "1.23e\N{MINUS SIGN}05"), (0.0, "0"),
    ],
)  # fmt: skip
def test_a_number_is_as_long_as_a_tile_is_wide(value, text):
    assert _short(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.123456, 0.0123, "0.123 ± 0.012"), (0.123456, 0.0999, "0.12 ± 0.10"), (12.3456, 3.21, "12.3 ± 3.2"),
        (1234.6, 56.7, "1235 ± 57"), (-0.5, 0.1, "\N{MINUS SIGN}0.50 ± 0.10"), (0.5, None, "0.5"), (0.5, 0.0, "0.5"),
        (None, None, "\N{EN DASH}"), (1e-5, 2.4e-5, "0.000010 ± 0.000024"), (3e-5, 1e-3, "0.0000 ± 0.0010"),
        (1.234e-7, 2.4e-8, "1.23e\N{MINUS SIGN}07 ± 2.4e\N{MINUS SIGN}08"), (0.0, 1e-9, "0 ± 1e\N{MINUS SIGN}09"),
    ],
)  # fmt: skip
def test_a_mean_has_the_digits_that_its_error_allows(value, error, text):
    assert _measured(value, error) == text


def test_numbers_are_rounded_to_so_many_bits_and_null_is_no_nan():
    tiny, huge = 1.4e-45, 3.4028235e38
    given = [0.1, -1 / 3, 0.0, tiny, huge, math.inf, -math.inf, math.nan, None]
    made = _coarse(pa.array(given, pa.float32()), 10)
    assert [bool(null) for null in made.view(np.uint32) == NULL] == [False] * 8 + [True]
    assert made[:2] == pytest.approx(given[:2], rel=2**-11)
    assert [made.view(np.uint32)[i] & 0xFFF for i in (0, 1)] == [0, 0]
    np.testing.assert_array_equal(made[4:8], np.array(given[4:8], np.float32))


def test_a_failure_leaves_the_old_page_and_nothing_else(source, tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")
    empty = source[0].slice(0, 0)
    for wrong, options, said in (
        ((empty, source[1]), {}, "no rows"),
        (source, {"sequences": -1}, "sequences=-1"),
        (source, {"tokens": 0}, "tokens=0"),
    ):
        with pytest.raises(ValueError, match=said):
            write_report(wrong, path, **options)
    with pytest.raises(ValueError, match="is a folder"):
        write_report(source, tmp_path)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_report(source, path)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert path.read_text() == "old"
    assert write_report(source, path) == path
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_32_sequences_of_256_tokens_stay_under_800_kilobytes(tmp_path):
    path = write_report(synthetic(64, 256), tmp_path / "r.html", sequences=32)
    assert 300_000 < path.stat().st_size < 800_000
    assert "Showing 32 of 64 sequences." in path.read_text()


@pytest.mark.slow
def test_10000_sequences_of_512_tokens_in_a_minute_and_2_gigabytes(tmp_path):
    for part in range(10):  # as a run leaves them
        table, metadata = synthetic(1000, 512, seed=part)
        table = table.set_column(0, SCHEMA.field("step"), pa.array(np.full(len(table), part)))
        (tmp_path / "kl").mkdir(exist_ok=True)
        write_records(table, tmp_path / "kl" / f"tokens_{part:06d}-r0.parquet", metadata)
    code = "import sys, resource, time; from klft.diagnostics import write_report; start = time.time()\n"
    code += "write_report(sys.argv[1], sys.argv[1] + '/r.html')\n"
    code += "print(time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    seconds, kilobytes = map(float, out.split())
    assert "Showing 200 of 10,000 sequences." in (tmp_path / "r.html").read_text()
    assert seconds < 60
    assert kilobytes < 2e6
