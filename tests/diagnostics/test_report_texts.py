"""The texts of a page in headless Chromium: found and copied as they are, drawn where they are looked at, linked to."""

import re

import pytest
from support.browser import Browser, missing
from support.example_report import synthetic, table_of

from klft.diagnostics import write_report

CHAT = ["<im_start>", "user", "\n", "Say", "  hi", "\t", "!", "<im_end>", "\n",
        "<im_start>", "model", "\n", "hi", " there", "\n\n", "bye", "<im_end>", "\n"]  # fmt: skip
FRAMES = "return new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))"


@pytest.fixture(scope="module")
def browser():
    if reason := missing():
        pytest.skip(reason)
    with Browser() as started:
        started.window(1400, 1000)
        yield started
        assert started.log() == []


def write_chat(folder, hidden=False):
    """A conversation of two turns, of which the second one is scored; a second one like it. `hidden`: ids for texts."""
    rows = []
    for sample in (0, 1):
        for at, text in enumerate(CHAT):
            numbers = {"reverse_kl": 0.25, "forward_kl": 0.5} if at > 11 else {"is_prompt": True, "logp": None}
            token = f"<id {at}>" if hidden else text
            rows.append({"sample_id": sample, "position": at, "token_id": at, "token": token} | numbers)
    kinds = {at: "whitespace" for at, text in enumerate(CHAT) if text.isspace()} | dict.fromkeys((7, 16), "end of turn")
    return write_report(table_of(rows, classes=kinds), folder / "r.html")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return write_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return write_report(synthetic(40, 600), tmp_path_factory.mktemp("long") / "r.html")


@pytest.mark.parametrize("drawn", [False, True])
def test_spaces_and_line_ends_are_those_of_the_text(browser, chat, drawn):
    browser.get_report(chat, drawn)
    assert browser.each(".tokens", "e.textContent") == ["".join(CHAT)] * 2
    assert browser.js("return find('Say  hi\t!')")
    assert browser.js("return getSelection().toString()") == "Say  hi\t!"
    browser.js("getSelection().selectAllChildren(document.querySelectorAll('.turn')[1])")
    assert browser.js("return getSelection().toString()").strip() == "".join(CHAT[9:]).strip()


def test_marks_are_drawn_by_css_and_off_by_default(browser, chat):
    browser.get_report(chat)
    mark = "getComputedStyle(e, '::before').content"
    kinds = (".tokens .sp", ".tokens .nl", ".tokens .tab")
    assert [set(browser.each(kind, mark)) for kind in kinds] == [{"none"}, {'""'}, {"none"}]
    browser.click("#marks")
    assert [set(browser.each(kind, mark)) for kind in kinds] == [{'"␣"'}, {'"⏎"'}, {'"⇥"'}]
    assert browser.each(".tokens", "e.textContent") == ["".join(CHAT)] * 2
    assert (
        min(browser.each(".tokens .nl", "e.parentElement.getBoundingClientRect().width")) > 3
    )  # its colour can be seen


def test_turns_are_blocks_with_their_sums(browser, chat):
    browser.get_report(chat)
    turns = browser.each(".turn", "[e.textContent, e.getAttribute('role'), e.getAttribute('aria-label')]")
    said = "Turn 2: Σ reverse 1.5, Σ forward 3"
    assert turns == [["".join(CHAT[:9]), "group", "Turn 1: given"], ["".join(CHAT[9:]), "group", said]] * 2
    assert said in browser.each(".turn", "getComputedStyle(e, '::before').content")[1]


def test_turns_and_their_sums_are_the_same_where_texts_are_hidden(browser, chat, tmp_path):
    found = []
    for page in (chat, write_chat(tmp_path, hidden=True)):
        browser.get_report(page)
        found.append(browser.each(".turn", "[e.getAttribute('aria-label'), e.querySelectorAll('.t').length]"))
    browser.window(400, 1000)
    assert set(browser.each(".t", "e.getClientRects().length")) == {1}, "an id is not broken over two lines"
    browser.window(1400, 1000)
    assert found[0] == found[1] == [["Turn 1: given", 9], ["Turn 2: Σ reverse 1.5, Σ forward 3", 9]] * 2


def test_texts_are_drawn_where_they_are_looked_at(browser, long):
    browser.get_report(long, drawn=False)
    browser.js(FRAMES)
    count = "return [document.querySelectorAll('.seq').length, document.querySelectorAll('.t').length]"
    sections, tokens = browser.js(count)
    assert (sections, 600 <= tokens <= 5 * 600) == (40, True)
    browser.js("document.querySelectorAll('.seq')[30].scrollIntoView()")
    browser.js(FRAMES)
    here = ".seq:nth-child(31) .t:not(.prompt)"
    orange = browser.each(here, "e.style.backgroundColor")
    assert (len(orange), len(set(orange)) > 5) == (600 - 600 // 8, True)
    browser.js("document.querySelector('input[value=forward]').click()")
    assert sum(a != b for a, b in zip(orange, browser.each(here, "e.style.backgroundColor"), strict=True)) > 400
    browser.js("document.getElementById('heatmap').scrollTo(0, 0)")
    browser.js(FRAMES)  # the first ones were out of view when the colours changed
    blue = "const [r, g, b] = getComputedStyle(e).backgroundColor.match(/\\d+/g).map(Number); return b >= r - 4"
    assert all(browser.each(".seq:first-child .t:not(.prompt)", f"(() => {{ {blue} }})()"))


@pytest.mark.parametrize("place", ["0.0.17.412", "0.0.3"])
def test_an_address_leads_to_its_text_and_token(browser, long, place):
    browser.get_report(long, drawn=False)
    browser.js("location.hash = arguments[0]", place)
    browser.js(FRAMES)
    text, *position = place.rsplit(".", 1) if place.count(".") == 3 else (place,)
    (top,) = browser.each(f".seq:has(a[href='#{text}'])", "e.getBoundingClientRect().top")
    if not position:
        assert 0 < top < 400
        return
    card = browser.js("return document.getElementById('card').textContent")
    assert f"position {position[0]}" in card
    assert "text 18" in card
    browser.keys("ArrowRight", "Enter")
    assert browser.js("return location.hash") == "#0.0.17.413"


@pytest.mark.parametrize(
    ("chart", "said"),
    [
        ("positions", r"position \d+ to \d+: reverse [\d.]+, forward [\d.]+, n \d+"),
        ("histogram", r"[\d.]+ to [\d.]+ nats: reverse [\d.]+ %, forward [\d.]+ %"),
        ("scatter-plot", r"“ word\d+” reverse [\d.]+, forward [\d.]+"),
    ],
)
def test_charts_tell_the_numbers_under_the_pointer(browser, long, chart, said):
    browser.get_report(long, drawn=False)
    x = y = 0
    if chart == "scatter-plot":
        of = "const c = document.querySelector('#scatter-plot circle'), s = c.ownerSVGElement;"
        of += "return [c.cx.baseVal.value - s.clientWidth / 2, c.cy.baseVal.value - s.clientHeight / 2]"
        x, y = map(round, browser.js(of))
    browser.move(f"#{chart} svg", x, y)
    (text,) = browser.each(f"#{chart} text.hover", "e.textContent")
    assert re.fullmatch(said, text)


@pytest.mark.parametrize("dark", [False, True])
def test_large_and_small_numbers_stand_in_one_line_of_their_tiles(browser, tmp_path, dark):
    numbers = {"reverse_kl": 2e-7, "forward_kl": 3e-7, "logp": -10.8, "ref_logp": -14.2}
    rows = [numbers | {"sample_id": i % 3, "reverse_kl": 2e-7 + i * 1e-9} for i in range(30)]
    page = write_report(table_of(rows), tmp_path / "r.html")
    for width in (1400, 400):
        browser.window(width, 1000, dark)
        browser.get_report(page)
        lines = "e.getBoundingClientRect().height / parseFloat(getComputedStyle(e).lineHeight)"
        found = browser.each(".tile .value", f"[e.textContent, Math.round({lines})]")
        assert [number for number, high in found if high != 1] == []
        assert browser.js("return document.documentElement.scrollWidth") == width
    assert "49,020" in browser.each(".tile .value", "e.textContent")
    browser.window(1400, 1000)
