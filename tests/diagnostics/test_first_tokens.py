"""A text's first token, which no token predicts: shown in table and page, unscored, and in no mean."""

import pytest
from support import tiny
from support.browser import Browser, missing
from support.example_report import data_of

from klft.diagnostics import Metadata, Statistics, read_records, score_texts, write_records, write_report
from klft.diagnostics.measure import scored_table

TEXTS = ["w1 w2 w3 w4 w5", "w6 w7", {"prompt": "w8 w9", "completion": " w10"}]


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def source(request):
    """(table, metadata) of texts under two models, of a tokenizer without and with a BOS."""
    tokenizer = tiny.tokenizer(adds_bos=request.param)
    batches = score_texts(tiny.llama(), tiny.llama(5), tokenizer, TEXTS, batch_size=2, max_length=32)
    table = scored_table(batches, tokenizer)
    return table, Metadata.of(table, tokenizer, model="p", reference="q")


def test_the_table_holds_the_whole_text_and_null_for_what_was_not_scored(source, tmp_path):
    table, _ = read_records(write_records(source[0], tmp_path / "tokens.parquet", source[1]))
    bos = ["<bos>"] * (table["token"][0].as_py() == "<bos>")
    for number, text in enumerate(("w1 w2 w3 w4 w5", "w6 w7", "w8 w9 w10")):
        rows = [row for row in table.to_pylist() if row["sample_id"] == number]
        assert [row["token"] for row in rows] == bos + text.split()
        assert [row["position"] for row in rows] == list(range(len(rows)))
        for name in ("logp", "ref_logp", "reverse_kl", "forward_kl", "entropy", "ref_entropy", "top_ids", "ref_top_p"):
            assert [row[name] is None for row in rows] == [True] + [False] * (len(rows) - 1)


def test_no_statistic_counts_it(source):
    table, metadata = source
    counted = [row for row in table.to_pylist() if row["position"] and not row["is_prompt"]]
    stats = Statistics.of(table, metadata)
    assert (stats.tokens, stats.sequences, stats.nonfinite, stats.compared) == (len(counted), 3, 0, len(counted))
    for name, column in (("reverse", "reverse_kl"), ("logp", "logp")):
        mean = sum(row[column] for row in counted) / len(counted)
        assert stats.quantities[name].mean == pytest.approx(mean, rel=1e-6)
    assert sum(row["count"] for row in stats.by_position()) == len(counted)
    assert min(row["start"] for row in stats.by_position()) > 0
    worst = next(row for row in stats.worst_tokens() if row["sample_id"] == 1)
    assert worst["before"][0] == table["token"].to_pylist()[[r["sample_id"] for r in table.to_pylist()].index(1)]


def test_the_page_shows_it_without_colour_and_says_why(source, tmp_path):
    if missing():
        pytest.skip(missing())
    page = write_report(source, tmp_path / "page.html")
    firsts = [at for s in data_of(page)["sequences"] for at in s["position"]]
    with Browser() as browser:
        browser.window(1400, 1000)
        browser.get_report(page)
        found = browser.each(".t", "[e.classList.contains('unscored'), e.classList.contains('prompt')]")
        given = [s["prompt"][i] == "1" for s in data_of(page)["sequences"] for i in range(len(s["position"]))]
        assert found == [[at == 0 and not prompt, prompt] for at, prompt in zip(firsts, given, strict=True)]
        assert set(browser.each(".t.unscored", "getComputedStyle(e).backgroundColor")) == {"rgba(0, 0, 0, 0)"}
        assert set(browser.each(".t.unscored", "getComputedStyle(e).textDecorationStyle")) == {"dotted"}
        browser.js("document.querySelector('.t.unscored').focus()")
        card = browser.js("return document.getElementById('card').innerText")
        assert "not scored" in card
        assert "NaN" not in card
        browser.screenshot(tmp_path / "page.png")
