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
from support.example_report import HOSTILE, data_of, example, table_of, write_hostile

from klft.diagnostics import SCHEMA, Metadata, write_records, write_report

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
                assert s[f"{side}top_p"][at] == pytest.approx(row[f"{side}top_p"], rel=5.1e-4)
            assert s["prompt"][at] == "01"[row["is_prompt"]]
            tokens += 1
        assert s["advantage"] is None
    assert tokens > 1000


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
    for each in (tmp_path, tmp_path / "kl" / "tokens_000000-r0.parquet"):
        assert write_report(str(each), tmp_path / "new" / "r.html").read_text() == page.read_text()


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


def synthetic(sequences, length, top=5, vocabulary=50_000, seed=0):
    """A table in which everything is random: the worst that a page can be asked to hold."""
    rng, n = np.random.default_rng(seed), sequences * length
    words = np.array([f" word{i}" for i in range(vocabulary)])
    ids = (rng.zipf(1.3, n) % vocabulary).astype(np.int32)
    reverse = rng.gamma(0.2, 0.3, n)
    offsets = np.arange(0, n * top + 1, top, dtype=np.int32)
    # 60 likely tokens at each place, as in text, not 50,000
    lists = {
        side + "top_ids": pa.ListArray.from_arrays(offsets, (rng.zipf(1.3, n * top) % vocabulary).astype(np.int32))
        for side in ("", "ref_")
    } | {
        side + "top_p": pa.ListArray.from_arrays(
            offsets, -np.sort(-rng.dirichlet(np.ones(top + 1), n)[:, :top].astype(np.float32)).ravel()
        )
        for side in ("", "ref_")
    }
    columns = {
        "step": np.zeros(n, np.int64),
        "rank": np.zeros(n, np.int32),
        "sample_id": np.repeat(np.arange(sequences), length),
        "position": np.tile(np.arange(length), sequences),
        "is_prompt": np.tile(np.arange(length) < length // 8, sequences),
        "token_id": ids,
        "token": words[ids],
        "reverse_kl": reverse,
        "forward_kl": reverse * rng.lognormal(0, 0.6, n),
        **lists,
    }
    filled = [pa.array(columns.get(f.name, -rng.gamma(1, 1, n))).cast(f.type) for f in SCHEMA]
    return pa.table(filled, SCHEMA), Metadata(vocabulary=dict(enumerate(words.tolist())))


def test_32_sequences_of_256_tokens_stay_under_2_megabytes(tmp_path):
    path = write_report(synthetic(64, 256), tmp_path / "r.html")
    assert 1_000_000 < path.stat().st_size < 2_000_000
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
    assert "Showing 32 of 10,000 sequences." in (tmp_path / "r.html").read_text()
    assert seconds < 60
    assert kilobytes < 2e6
