"""A token rule's weights on the page: in a token's card, struck through where they are 0, absent without a rule."""

import pytest
from support.browser import Browser, missing
from support.example_report import data_of, table_of

from klft.diagnostics import write_report

NOTE = "tokens have weight 0"


def page(folder, weights):
    """Three tokens of a prompt and then these, of one sequence."""
    rows = [{"is_prompt": True, "logp": None}] * 3
    rows += [{"ref_logp": -1.5, "reverse_kl": 0.5, "forward_kl": 0.6, "weight": weight} for weight in weights]
    return write_report(table_of(rows), folder / "report.html")


def test_the_weights_travel_with_their_sequence(tmp_path):
    made = page(tmp_path, [0.0, 0.25, 1.0])
    assert data_of(made)["sequences"][0]["weight"] == [None, None, None, 0, 0.25, 1]
    assert NOTE in made.read_text()


@pytest.mark.parametrize("seen", [NOTE, '"weight":["f4"'])
def test_without_a_rule_the_page_does_not_speak_of_weights(seen, tmp_path):
    assert seen not in page(tmp_path, [None, None]).read_text()


def test_in_a_browser(tmp_path):
    reason = missing()
    if reason:
        pytest.skip(reason)
    shown = "return document.querySelector('#card [data-field=weight]')?.textContent ?? null"
    with Browser() as browser:
        browser.get_report(page(tmp_path, [0.0, 0.25, 1.0]))
        assert browser.each(".t.weightless", "e.dataset.at") == ["3"]
        assert browser.each(".t.weightless", "getComputedStyle(e).textDecorationLine") == ["line-through"]
        assert browser.each(".t:not(.weightless)", "getComputedStyle(e).textDecorationLine") == ["none"] * 5
        for at, text in (("0", None), ("3", "0"), ("4", "0.25"), ("5", "1")):
            browser.move(f'.t[data-at="{at}"]')
            assert browser.js(shown) == text
