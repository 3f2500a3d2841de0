"""The page in headless Chromium: numbers, colours, keys and clicks; hostile texts; narrow windows; light and dark."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
from support.browser import Browser, missing
from support.example_report import HOSTILE, data_of, example, table_of, write_hostile

from klft.diagnostics import visible, write_report

SECTIONS = ["summary", "tokens", "curves", "scatter", "worst", "classes", "steps"]
CLEAR = "rgba(0, 0, 0, 0)"


# --- what is on the page ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source():
    return example()


@pytest.fixture(scope="module")
def page(source, tmp_path_factory):
    return write_report(source, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def rows(source, page):
    """The table's rows in the order of the heatmap's tokens."""
    named = {(row["step"], row["sample_id"], row["position"]): row for row in source[0].to_pylist()}
    return [named[s["step"], s["sample_id"], at] for s in data_of(page)["sequences"] for at in s["position"]]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return write_hostile(tmp_path_factory.mktemp("hostile") / "report.html")


@pytest.fixture(scope="module")
def browser():
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Browser() as started:
        started.get("about:blank")
        yield started


@pytest.fixture
def look(browser):
    """Opens a page in a window of some size and colour scheme. Afterwards: nothing in the console, nothing asked for
    but the page, nothing run that came with a text."""
    browser.requested(), browser.log()
    opened = set()

    def at(path, width=1400, height=1000, dark=False):
        browser.window(width, height, dark)
        browser.get_report(path)
        opened.add(path.as_uri())
        return browser

    yield at
    assert browser.js("return [window.hacked ?? null, document.images.length, document.scripts.length]") == [None, 0, 2]
    assert browser.log() == []
    assert {url for url in browser.requested() if url != "data:,"} == opened


def as_shown(text):
    """What stands on the page: white space as it is, nothing else invisible, nothing that moves the text around it."""
    if len(text) > 200:
        return text[:200] + f"… cut, {len(text):,} characters"
    shown = (c if c in " \n\t" else visible(c) for c in text)
    return ("\u25cc" if text[:1] == "\u0301" else "") + "".join(shown)


def number(text):
    """A number as the page writes it."""
    text = text.replace("\u2212", "-").split("±")[0].strip()
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def probability(text, true, more=0.0):
    """One digit after the point of a percentage, or 1 in N with two digits where it is under 1 %: and `more`, relative,
    up to 0.025 % of the whole, by which a number of the top lists is rounded on the page."""
    if text.startswith("1 in 10") and not text[7:].strip("⁰¹²³⁴⁵⁶⁷⁸⁹"):
        return true < 1e-9
    one_in = text.startswith("1 in ")
    assert one_in == (0 < true < 0.01) or abs(true - 0.01) < 3e-4
    said = 1 / float(text[5:].replace(",", "")) if one_in else number(text)
    return abs(said - true) <= ((0.052 + more) * true if one_in else 5.1e-4 + min(more * true, 2.5e-4))


CARD = """
    const card = document.getElementById("card"), text = css => card.querySelector(css).textContent;
    if (card.hidden) return null;
    const fields = [...card.querySelectorAll("[data-field]")].map(e => [e.dataset.field, e.textContent]);
    const parts = e => [...e.children].slice(1).map(c => c.textContent);
    const list = side => [...card.querySelectorAll(`.${side} li`)].map(parts);
    return { fields: Object.fromEntries(fields), said: text(".said"), note: text(".note"), policy: list("policy"),
        ref: list("ref"), at: Number(document.querySelector("[aria-describedby=card]").dataset.at) };
"""
FOCUSED = "return Number(document.activeElement.dataset.at ?? -1)"
FOCUS = "document.querySelector(`.t[data-at='${arguments[0]}']`).focus()"
EDGES = "[e.getBoundingClientRect()].flatMap(r => [r.left, r.right, r.top, r.bottom])"
WIDTH = "return document.documentElement.scrollWidth"


def check_card(card, row, metadata):
    assert card["said"] == as_shown(row["token"])
    assert f"id {row['token_id']} · {metadata.classes[row['token_id']]} · position {row['position']}" in card["note"]
    fields = card["fields"]
    assert probability(fields.pop("p"), math.exp(row["logp"]))
    assert probability(fields.pop("ref_p"), math.exp(row["ref_logp"]))
    assert number(fields.pop("log_ratio")) == pytest.approx(row["logp"] - row["ref_logp"], rel=6e-3, abs=4e-4)
    assert sorted(fields) == ["entropy", "forward_kl", "ref_entropy", "reverse_kl"]
    for name, text in fields.items():  # three digits
        assert number(text) == pytest.approx(row[name], rel=6e-3)
    for side, name in (("", "policy"), ("ref_", "ref")):
        assert [text for text, _ in card[name]] == [as_shown(metadata.vocabulary[i]) for i in row[f"{side}top_ids"]]
        assert all(probability(p, true, 0.016) for (_, p), true in zip(card[name], row[f"{side}top_p"], strict=True))


def test_every_section_is_there_and_says_what_it_shows(look, page):
    browser = look(page)
    assert browser.each("main > section", "[e.id, e.offsetHeight > 40]") == [[name, True] for name in SECTIONS]
    assert "Showing 96 of 4,096 sequences." in browser.js("return document.getElementById('tokens').innerText")
    levels = browser.each("h1, h2, h3, h4", "Number(e.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    charts = browser.each("[role=img]", "[e.tagName, e.getAttribute('aria-label').length > 40]")
    assert charts == [["svg", True]] * 5
    assert browser.js("return document.documentElement.lang") == "en"


def test_the_summary_has_the_numbers_of_the_table(look, source, page):
    browser = look(page)
    spoken = [row for row in source[0].to_pylist() if not row["is_prompt"]]
    mean = {
        name: sum(row[name] for row in spoken) / len(spoken)
        for name in ("reverse_kl", "forward_kl", "logp", "ref_logp")
    }
    tiles = dict(browser.each(".tile", "[e.children[0].innerText, e.querySelector('.value').innerText]"))
    agree = sum(row["top_ids"][0] == row["ref_top_ids"][0] for row in spoken) / len(spoken)
    assert {name: number(text) for name, text in tiles.items()} == pytest.approx(
        {
            "Reverse KL": mean["reverse_kl"],
            "Forward KL": mean["forward_kl"],
            "… per sequence": mean["reverse_kl"] * len(spoken) / 96,
            "Largest reverse": max(row["reverse_kl"] for row in spoken),
            "Same first choice": agree,
            "Perplexity, policy": math.exp(-mean["logp"]),
            "… reference": math.exp(-mean["ref_logp"]),
        },
        rel=1e-3,
    )
    ends = [row for row in spoken if row["token"] == "<|endoftext|>"]
    cells = browser.each("#classes-table tbody tr", "[...e.cells].map(c => c.innerText)")
    (end,) = (row for row in cells if row[0] == "end of turn")
    assert int(end[1]) == len(ends)
    assert number(end[2]) == pytest.approx(sum(row["reverse_kl"] for row in ends) / len(ends), rel=1e-3)
    share = sum(row["forward_kl"] for row in ends) / sum(row["forward_kl"] for row in spoken)
    assert number(end[5]) == pytest.approx(share, rel=1e-2)


# --- the heatmap -----------------------------------------------------------------------------------------------------


def test_a_token_under_the_pointer_shows_its_card(look, source, page, rows):
    browser = look(page)
    for at in (9, 40, 117):
        browser.move(f'.t[data-at="{at}"]')
        card = browser.js(CARD)
        assert card["at"] == at
        check_card(card, rows[at], source[1])
    browser.move("h1")
    browser.js("return new Promise(done => setTimeout(done, 300))")
    assert browser.js(CARD) is None


def test_the_keyboard_reaches_every_token(look, source, page, rows):
    browser = look(page)
    first, second = (len(s["token"]) for s in data_of(page)["sequences"][:2])
    browser.js("document.getElementById('marks').focus()")
    for keys, reached in (
        (["Tab"], 0),
        ([*["ArrowRight"] * 12, "ArrowLeft"], 11),
        (["End"], first - 1),
        (["ArrowRight"], first),
        (["PageDown"], first + second),
        ([*["ArrowRight"] * 5, "Home"], first + second),
        (["PageUp"], first),
        (["ArrowLeft"], first - 1),
    ):
        browser.keys(*keys)
        assert browser.js(FOCUSED) == reached
        check_card(browser.js(CARD), rows[reached], source[1])
    browser.keys("Home", *["ArrowRight"] * 10, "ArrowDown")
    below = browser.js(FOCUSED)
    corner = "[e.getClientRects()[0].left, e.getClientRects()[0].top]"
    (x, y), (below_x, below_y) = browser.each(f".t[data-at='10'], .t[data-at='{below}']", corner)
    assert 15 < below_y - y < 40  # the next line
    assert abs(below_x - x) < 60
    browser.keys("ArrowUp")
    assert abs(browser.js(FOCUSED) - 10) <= 1
    assert len(browser.each(".t[tabindex='0']", "1")) == 1
    browser.keys("Escape")
    assert browser.js(CARD) is None


def choose(browser, name):
    browser.click(f"input[value={name}]")


def colours(browser):
    browser.js("dispatchEvent(new Event('beforeprint'))")  # those out of view too
    return browser.each(".t", "getComputedStyle(e).backgroundColor")


def channels(colour):
    return [float(v) for v in re.findall(r"[\d.]+", colour)]


def scale(browser):
    """What the legend says: name, and the value at the upper end."""
    label = browser.each("#legend svg", "e.getAttribute('aria-label')")[0]
    found = re.fullmatch(r"Colour scale of (.*) in nats, from \S+ to (\S+), square-root spaced", label)
    return found[1], number(found[2])


def test_the_selector_changes_the_colours(look, page, rows):
    browser, seen = look(page), {}
    values = {
        "reverse": lambda r: r["reverse_kl"],
        "forward": lambda r: r["forward_kl"],
        "difference": lambda r: r["forward_kl"] - r["reverse_kl"],
        "ratio": lambda r: r["logp"] - r["ref_logp"],
        "entropy": lambda r: r["entropy"] - r["ref_entropy"],
    }
    for name, value in values.items():
        choose(browser, name)
        seen[name] = colours(browser), scale(browser)[0]
        assert [colour == CLEAR for colour in seen[name][0]] == [row["is_prompt"] for row in rows]
        spoken = [
            (value(row), channels(colour))
            for row, colour in zip(rows, seen[name][0], strict=True)
            if not row["is_prompt"]
        ]
        spoken.sort(key=lambda pair: pair[0])
        # the larger the further from white: of both ends where there are two, orange below and blue above
        darkness = [765 - sum(rgb) for v, rgb in spoken if v >= 0]
        assert max(b - a for b, a in pairwise(darkness)) <= 4  # their digits on the page
        assert darkness[-1] > darkness[0] + 200
        blue = {"reverse": lambda v: False, "forward": lambda v: True}.get(name, lambda v: v > 0)
        assert all((rgb[2] > rgb[0]) == blue(v) for v, rgb in spoken if abs(v) > 0.05)
    assert len({tuple(each) for each, _ in seen.values()}) == 5
    assert len({said for _, said in seen.values()}) == 5


def test_the_slider_takes_the_colour_of_small_tokens(look, page, rows):
    browser = look(page)
    browser.js("document.getElementById('threshold').focus()")
    browser.keys(*["PageUp"] * 3)  # 3 tenths of the way, on a square-root scale as the legend
    least = scale(browser)[1] * 0.3**2
    coloured = [colour != CLEAR for colour in colours(browser)]
    assert coloured == [not row["is_prompt"] and row["reverse_kl"] >= least for row in rows]
    assert 0 < sum(coloured) < len(rows) / 2
    text = browser.js("return document.getElementById('threshold-text').innerText")
    measured = sum(not row["is_prompt"] for row in rows)
    assert number(text.split(" nats")[0]) == pytest.approx(least)
    assert text.endswith(f": {sum(coloured):,} of {measured:,} tokens")
    assert browser.each("#threshold", "e.getAttribute('aria-valuetext')") == [text]


def linear(rgb):
    rgb = np.asarray(rgb, np.float64) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    """Ottosson 2020, "A perceptual color space for image processing"."""
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
              [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
              [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return np.cbrt(linear(rgb) @ np.transpose(to_lms)) @ np.transpose(to_lab)


@pytest.mark.parametrize("dark", [False, True])
def test_equal_steps_of_the_scale_look_equal(look, page, dark):
    """In OKLab: lightness never turns, so that the scale reads without hue; no step is much larger than another."""
    browser = look(page, dark=dark)
    for name in ("reverse", "difference"):
        choose(browser, name)
        lab = oklab([channels(fill) for fill in browser.each("#legend rect", "getComputedStyle(e).fill")])
        assert len(lab) == 96
        for half in [lab] if name == "reverse" else [lab[48:], lab[47::-1]]:
            lightness = half[:, 0] if dark else -half[:, 0]
            assert (np.diff(lightness) > -0.004).all()
            assert lightness[-1] - lightness[0] > 0.4
            steps = np.linalg.norm(np.diff(half[:: len(half) // 12], axis=0), axis=1)
            assert steps.max() < 1.6 * steps.min()


TEXTS = """
    const behind = e => {
        for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (!colour.startsWith("rgba")) return colour;
        }
    };
    document.querySelectorAll("details").forEach(e => e.open = true);
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
    for (let n = walk.nextNode(); n; n = walk.nextNode()) {
        const e = n.parentElement, style = getComputedStyle(e), svg = e instanceof SVGElement;
        if (!n.data.trim() || !e.getClientRects().length ) continue;
        found.push([n.data.slice(0, 30), svg ? style.fill : style.color, behind(e), style.opacity]);
    }
    return found;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_the_contrast_of_wcag_aa(look, page, dark):
    """Not the glyphs of spaces in front of words: they are faint on purpose, the gap is seen without them."""
    browser = look(page, dark=dark)
    browser.click('.t[data-at="20"]')
    for name in ("reverse", "difference"):
        choose(browser, name)
        browser.js(FOCUS, 20)
        texts = browser.js(TEXTS)
        assert len(texts) > 1000
        light = [
            linear([channels(c) for c in column]) @ [0.2126, 0.7152, 0.0722]
            for column in list(zip(*texts, strict=True))[1:3]
        ]
        contrast = (np.maximum(*light) + 0.05) / (np.minimum(*light) + 0.05)
        assert [text for text, ratio in zip(texts, contrast, strict=True) if ratio < 4.5 or text[3] != "1"] == []


# --- charts and tables -----------------------------------------------------------------------------------------------


def points(browser):
    """Of every dot: its token, x, y, kind."""
    dots = browser.each("#scatter-plot circle", "['data-at', 'cx', 'cy', 'class'].map(a => e.getAttribute(a))")
    return [(int(at), float(x), float(y), kind.split()[1:]) for at, x, y, kind in dots]


def test_a_click_on_the_scatter_jumps_to_the_token(look, source, page, rows):
    browser = look(page)
    dots = points(browser)
    assert sorted(at for at, *_ in dots) == [at for at, row in enumerate(rows) if not row["is_prompt"]]
    ((width, height),) = browser.each("#scatter-plot svg", "[e.clientWidth, e.clientHeight]")
    for at, x, y, _ in (max(dots, key=lambda dot: dot[1]), min(dots, key=lambda dot: dot[2]), dots[7]):
        browser.click("#scatter-plot svg", round(x - width / 2), round(y - height / 2))
        found = browser.js(FOCUSED)
        for name in ("reverse_kl", "forward_kl"):  # of dots in one place it may be another
            assert math.log10(rows[found][name]) == pytest.approx(math.log10(rows[at][name]), abs=0.02)
        check_card(browser.js(CARD), rows[found], source[1])
        token = browser.js("const r = document.activeElement.getClientRects()[0]; return [r.top, r.bottom]")
        ((upper, lower),) = browser.each(
            "#heatmap", "[e.getBoundingClientRect().top, e.getBoundingClientRect().bottom]"
        )
        assert max(upper, 0) < token[0] < token[1] < min(lower, 1000)
        assert browser.each(".t.target", "Number(e.dataset.at)") == [found]


def test_the_quadrants_of_the_scatter_have_names_and_colours(look, page, rows):
    browser = look(page)
    kinds = []
    for at, _, _, kind in points(browser):
        reverse, forward = rows[at]["reverse_kl"], rows[at]["forward_kl"]
        name = ["forward"] if forward >= 2 * reverse else ["reverse"] if reverse >= 2 * forward else []
        assert kind == (name if max(reverse, forward) >= 0.1 else [])
        kinds += kind
    assert min(kinds.count("forward"), kinds.count("reverse")) > 5
    words = browser.each("#scatter-plot .name", "e.textContent")
    assert sorted(words) == ["both", "mode-dropping", "mode-inventing", "neither"]


def cells(browser, table):
    """Every row's values: the number behind the text where there is one."""
    return browser.each(f"{table} tbody tr", "[...e.cells].map(c => c.dataset.value ?? c.textContent)")


@pytest.mark.parametrize(("table", "column"), [("#worst-table", 3), ("#carriers-table", 2), ("#classes-table", 0)])
def test_tables_sort_by_click_and_by_key(look, page, table, column):
    browser = look(page)
    before = cells(browser, table)
    assert len(before) >= 6
    key = (lambda row: float(row[column])) if column else (lambda row: row[column])
    for press, falling in ((lambda: browser.click(f"{table} th:nth-child({column + 1}) button"), column > 0),
                           (lambda: browser.keys("Enter"), column == 0)):  # fmt: skip
        press()
        after = cells(browser, table)
        assert sorted(after) == sorted(before)
        assert [key(row) for row in after] == sorted(map(key, before), reverse=falling)
        marks = browser.each(f"{table} thead th", "e.getAttribute('aria-sort')")
        assert marks[column] == ("descending" if falling else "ascending")
        assert sum(mark not in ("none", None) for mark in marks) == 1


def test_the_worst_tokens_are_the_worst_and_lead_to_the_heatmap(look, source, page, rows):
    browser = look(page)
    worst = sorted((row["reverse_kl"] for row in source[0].to_pylist() if not row["is_prompt"]), reverse=True)[:50]
    shown = cells(browser, "#worst-table")
    assert [float(row[2]) for row in shown] == pytest.approx(worst, rel=1e-3)
    browser.click("#worst-table .jump")
    at = browser.js(FOCUSED)
    place = [f"step {rows[at]['step']}, sample {rows[at]['sample_id']}", str(rows[at]["position"])]
    (first,) = (row for row in shown if row[8:] == place)
    assert first[0] == as_shown(rows[at]["token"])
    assert float(first[2]) == pytest.approx(rows[at]["reverse_kl"], rel=1e-3)
    assert "".join(as_shown(row["token"]) for row in rows[at - 8 : at + 2]) in first[1]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1400, 400])
def test_hostile_texts_stand_there_literally_and_run_nothing(look, hostile, width):
    browser = look(hostile, width)
    assert browser.each(".t", "e.textContent") == [as_shown(text) for text in HOSTILE]
    assert browser.each("h1, .model", "e.textContent") == [
        "</title>" + HOSTILE[0] + r"\u202e",
        HOSTILE[0] + r"\ud83d",
        r"\x1b[31m\u202e" + HOSTILE[4],
    ]
    for at, text in enumerate(HOSTILE):
        browser.js(FOCUS, at)
        card = browser.js(CARD)
        assert card["said"] == as_shown(text)
        token, box = browser.each("[aria-describedby=card], #card", EDGES)
        assert box[2] >= token[3] or box[3] <= token[2]  # tokens of many lines too
        assert [said for said, _ in card["policy"]] == ["\\ud83d", "\\ude00\\u202e", as_shown(HOSTILE[0])]
    assert set(browser.each(".t, .tok, bdi", "getComputedStyle(e).unicodeBidi")) == {"isolate"}
    assert browser.js(WIDTH) == width
    made = set(browser.each("*", "e.tagName.toLowerCase()"))
    assert not {"img", "iframe", "object", "embed", "form", "video", "audio", "base"} & made
    assert browser.each("body *", "e.getAttributeNames().some(name => name.startsWith('on'))").count(True) == 0


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_window_scrolls_down_only_and_cards_stay_inside(look, page, dark):
    browser = look(page, 400, 800, dark)
    browser.each("details", "e.open = true")
    assert browser.js(WIDTH) == 400
    for at in range(0, 300, 13):
        browser.js(FOCUS, at)
        (token, card) = browser.each("[aria-describedby=card], #card", EDGES)
        assert 7.9 <= card[0] <= card[1] <= 392.1
        assert 7.9 <= card[2] <= card[3] <= 792.1
        assert card[3] <= token[2] or card[2] >= token[3]  # above or below the token, not over it
    browser.window(360, 640, dark)
    assert browser.js(WIDTH) == 360


def test_numbers_that_are_not_finite_are_said_and_hatched(look, tmp_path):
    inf, nan = math.inf, math.nan
    odd = [{"ref_logp": -1.0, "reverse_kl": value, "forward_kl": 1.0} for value in (0.5, inf, nan, 0.0)]
    odd[1] |= {"ref_logp": -inf, "top_ids": [1], "top_p": [nan], "ref_top_ids": [1], "ref_top_p": [1.0]}
    browser = look(write_report(table_of(odd), tmp_path / "r.html"))
    assert browser.each(".t.odd", "e.dataset.at") == ["1", "2"]
    assert browser.each(".alarm[role=note]", "e.innerText.startsWith('2 tokens have a number that is not finite')") == [
        True
    ]
    browser.move('.t[data-at="1"]')
    fields = browser.js(CARD)["fields"]
    assert (fields["reverse_kl"], fields["log_ratio"], fields["ref_p"]) == ("∞", "∞", "0 %")


@pytest.mark.parametrize("present", [{}, {"reverse_kl": 0.0, "forward_kl": 0.0}, {"forward_kl": 1.0}, {"entropy": 1.0}])
def test_a_table_without_a_reference_or_lists_still_makes_a_page(look, tmp_path, present):
    browser = look(write_report(table_of([present] * 5), tmp_path / "r.html"), 400)
    assert browser.js(WIDTH) == 400
    assert len(browser.each(".t", "1")) == 5
    browser.move('.t[data-at="2"]')
    assert "not recorded" in browser.js("return document.getElementById('card').innerText")


def test_prompts_only_and_no_sequence_at_all(look, tmp_path):
    browser = look(write_report(table_of([{"is_prompt": True, "reverse_kl": 1.0}] * 3), tmp_path / "prompts.html"))
    assert browser.each(".t.prompt", "getComputedStyle(e).backgroundColor") == [CLEAR] * 3
    browser = look(write_report(table_of([{"reverse_kl": 1.0}] * 3), tmp_path / "none.html", sequences=0))
    assert "Showing 0 of 1 sequences." in browser.js("return document.body.innerText")


def test_motion_only_where_it_is_wanted_and_numbers_without_a_script(look, page):
    browser = look(page)
    for wanted, name in (("reduce", "none"), ("no-preference", "found")):
        browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": wanted}])
        browser.click("#worst-table .jump")
        assert browser.each(".t.target", "getComputedStyle(e).animationName") == [name]
    assert "<noscript>" in page.read_text()
    assert "end of turn</th>" in page.read_text()
