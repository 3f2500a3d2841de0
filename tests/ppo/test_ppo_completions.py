"""The table of completions: what reaches the terminal is literal and visible, what is saved reads back."""

import io

import pandas as pd
import pytest
from rich.console import Console

from klft.ppo.completions import plain, readable, show_completions

QUESTION, ANSWER = [{"role": "user", "content": "one fish"}], [{"role": "assistant", "content": "red"}]

NASTY = {
    "markup": "[/INST] [bold red]shout[/] [link=http://x]y[/link]",
    "escape": "\x1b[31mred\x1b[0m \x1b]8;;http://x\x07",
    "nul": "a\x00b",
    "bell and delete": "\x07\x7f\x9b31m",
    "right to left": "\u202egnp.exe\u202c \u2066x\u2069 \u05e9\u05dc\u05d5\u05dd",
    "half an emoji": "\ud83d and \ude00",
    "emoji": "\U0001f600",
    "lines": "a\nb\tc\rd",
    "html": "</script><img src=x onerror=alert(1)>",
    "formula": "=cmd()|' /C calc'!A0",
}
DANGEROUS = {
    *map(chr, range(32)),
    "\x7f",
    *map(chr, range(0x80, 0xA0)),
    *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
}


def printed(text, width=200):
    buffer = io.StringIO()
    Console(file=buffer, width=width, force_terminal=True, color_system="truecolor").print(plain(text))
    return buffer.getvalue()


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_text_prints_literally(text):
    shown = printed(text)
    assert shown.endswith("\n")
    assert not DANGEROUS & set(shown[:-1])
    shown.encode("utf-8")  # no lone surrogate is left
    harmless = "".join(c if c not in DANGEROUS and not 0xD800 <= ord(c) < 0xE000 else "\0" for c in text)
    for piece in filter(None, harmless.split("\0")):
        assert piece in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00b\x1b[0m\n", "a\\x00b\\x1b[0m\\n"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\ud83d!", "\\ud83d!"),
        ("\u202ex", "\\u202ex"),
        ("[/INST][b]x", "[/INST][b]x"),
        ("\U0001f600 \u05e9", "\U0001f600 \u05e9"),
    ],
)
def test_control_characters_become_visible(text, shown):
    assert printed(text) == shown + "\n"


def table(capsys, rows, tmp_path, step=3, how_many=4, monkeypatch=None):
    monkeypatch.setenv("COLUMNS", "300")
    show_completions(rows, step, tmp_path, how_many)
    return capsys.readouterr().out


def row(prompt="p", completion="c", score=1.0, **more):
    return {"prompt": prompt, "completion": completion, "score": score, "sequence_kl": 0.5} | more


def test_the_table_shows_all_of_it_literally_and_the_file_reads_back(capsys, tmp_path, monkeypatch):
    rows = [row(prompt=text, completion=text[::-1], score=float(i)) for i, text in enumerate(NASTY.values())]
    out = table(capsys, rows, tmp_path, how_many=len(rows), monkeypatch=monkeypatch)
    assert not (DANGEROUS - {"\n"}) & set(out)
    out.encode("utf-8")
    assert "[/INST] [bold red]shout[/] [link=http://x]y[/link]" in out
    assert "\\x1b[31mred\\x1b[0m" in out
    assert f"completions at step 3, showing {len(rows)} of {len(rows)}" in out
    (path,) = (tmp_path / "completions").iterdir()
    assert path.name == "completions_00003.parquet"
    back = pd.read_parquet(path)
    assert len(back) == len(rows)
    assert back["step"].eq(3).all()
    assert back["score"].tolist() == [r["score"] for r in rows]
    for got, r in zip(back.to_dict("records"), rows, strict=True):
        for name in ("prompt", "completion"):
            assert got[name] == r[name].encode("utf-8", "backslashreplace").decode()


def test_only_so_many_rows_are_printed_and_all_are_saved(capsys, tmp_path, monkeypatch):
    rows = [row(prompt=f"prompt{i}") for i in range(5)]
    out = table(capsys, rows, tmp_path, how_many=2, monkeypatch=monkeypatch)
    assert "showing 2 of 5" in out
    assert [f"prompt{i}" in out for i in range(5)] == [True, True, False, False, False]
    (path,) = (tmp_path / "completions").iterdir()
    assert pd.read_parquet(path)["prompt"].tolist() == [r["prompt"] for r in rows]


def test_no_rows_leave_no_file(capsys, tmp_path, monkeypatch):
    assert table(capsys, [], tmp_path, monkeypatch=monkeypatch) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_as_prompt(capsys, tmp_path, monkeypatch):
    rows = [row(prompt=QUESTION, completion=ANSWER)]
    out = table(capsys, rows, tmp_path, monkeypatch=monkeypatch)
    assert "one fish" in out
    (path,) = (tmp_path / "completions").iterdir()
    assert "one fish" in pd.read_parquet(path)["prompt"][0]


def test_the_name_of_an_extra_column_is_no_markup(capsys, tmp_path, monkeypatch):
    rows = [row(**{"[/INST]": 1.0, "\x1b[31m": 2.0})]
    out = table(capsys, rows, tmp_path, monkeypatch=monkeypatch)
    assert "[/INST]" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("values", [[1.0, None], [3, "three"], [True, None], [[1, 2], None], [{"a": 1}, 2], [1, 2.5]])
def test_an_extra_column_of_mixed_values_is_saved(capsys, tmp_path, monkeypatch, values):
    table(capsys, [row(extra=v) for v in values], tmp_path, monkeypatch=monkeypatch)
    (path,) = (tmp_path / "completions").iterdir()
    assert len(pd.read_parquet(path)["extra"]) == 2


def test_saving_the_same_step_again_replaces_the_file(capsys, tmp_path, monkeypatch):
    for text in ("first", "second"):
        table(capsys, [row(prompt=text)], tmp_path, monkeypatch=monkeypatch)
    (path,) = (tmp_path / "completions").iterdir()
    assert pd.read_parquet(path)["prompt"].tolist() == ["second"]


@pytest.mark.parametrize(("text", "shown"), [
    (QUESTION, "user: one fish"),
    (ANSWER, "red"),
    ([*QUESTION, *ANSWER], "user: one fish\nassistant: red"),
    ([{"role": "assistant", "content": None, "tool_calls": [1]}], "assistant:  {'tool_calls': [1]}"),
    ([{"role": "user", "content": "a\nb\x1b[2J"}], "user: a\nb\\x1b[2J"),
    (" text\n", "text"),
    ([1, 2], "[1, 2]"),
    ([], "[]"),
    (None, "None"),
])  # fmt: skip
def test_a_conversation_reads_as_roles(text, shown):
    assert readable(text).plain == shown
