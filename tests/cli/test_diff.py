"""What `klft diff` prints, writes and ends with, through the command line itself."""

import json
import re
import subprocess
import sys

import pytest
from support import tiny
from support.example_report import data_of
from support.processes import environment

import klft.cli
from klft.diagnostics import read_records

GOOD = ["policy", "reference", "--texts", "texts.txt"]
CHATS = ["policy", "reference", "--texts", "chats.jsonl"]
BLANK = "1 of 4 texts are left out: they have no token to score\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two models with a chat template, texts, and conversations of one turn and of three."""
    folder = tmp_path_factory.mktemp("saved")
    for name, seed in {"policy": 0, "reference": 5}.items():
        tiny.llama(seed).save_pretrained(folder / name)
        tiny.tokenizer(chat=True).save_pretrained(folder / name)
    (folder / "texts.txt").write_text("w1 w2 w3 w4 w5\n\nw6 w7\nw8 w9 w10 w11 w12 w13 w14\n")
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"w{i} w{i + 9}"} for i in range(6)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": turns[:n]}) + "\n" for n in (2, 6)))
    return folder


@pytest.fixture
def klft_(saved, tmp_path, monkeypatch, klft_command):
    """klft_("diff", ...) -> (exit code, stdout, stderr), run in the folder of `saved`; the page goes to tmp_path."""
    monkeypatch.chdir(saved)

    def run(*arguments):
        page = ["-o", tmp_path / "page.html"] if arguments[:1] == ("diff",) and "-o" not in arguments else []
        return klft_command(*arguments, *page)

    return run


def test_eight_lines_and_the_page(klft_, tmp_path):
    code, out, err = klft_("diff", *GOOD)
    assert (code, err) == (0, BLANK + "scoring 3 texts\n")
    *lines, page = out.splitlines()
    assert len(lines) == 8
    assert re.fullmatch(r"9 % of the tokens carry \d+ % of the KL", lines[0])
    assert lines[1].split(maxsplit=1) == ["Models", "policy against reference, temperature 1"]
    assert [line[:16].rstrip() for line in lines[3:]] == [
        "Mean reverse KL", "Mean forward KL", "Same top-1", "RMS of delta p", "Perplexity",
    ]  # fmt: skip
    assert all(" ± " in line for line in lines[3:])
    assert page == f"The page: {tmp_path / 'page.html'}"
    full = klft_("diff", *GOOD, "--full")[1]
    assert full.startswith("\n".join(lines))
    assert "99.9 % forward KL" in full
    assert "Largest reverse KL; at: text, from 1, and position in it, from 0" in full
    worst = json.loads(klft_("diff", *GOOD, "--json")[1])["worst"][0]  # sample_id counts from 0, as in the table
    where = f"text {worst['sample_id'] + 1}, position {worst['position']}"
    assert re.search(rf'Worst token +"?.* at {where}\b', full.replace("│", " "))
    assert re.search(rf" {worst['sample_id'] + 1}:{worst['position']} *\n", full)


def test_the_page_says_where_a_text_is_from(klft_, tmp_path):
    (tmp_path / "some.txt").write_text("w3 w4 w5\n\nw6 w7 w8\n")
    assert klft_("diff", "policy", "reference", "--texts", tmp_path / "some.txt")[0] == 0
    assert "text 3, some.txt line 3" in str(data_of(tmp_path / "page.html"))


def test_equal_models_agree(klft_):
    code, out, _ = klft_("diff", "policy", "policy", "--texts", "texts.txt", "--fail-above", 0)
    assert (code, out.splitlines()[0]) == (0, "the models agree on every token")


def test_json_is_all_there_is_on_stdout(klft_, tmp_path):
    code, out, err = klft_("diff", *GOOD, "--json", "--save", tmp_path / "new" / "numbers.json")
    found = json.loads(out)
    assert code == 0
    assert found == json.loads((tmp_path / "new" / "numbers.json").read_text())
    assert {*found["reverse_kl"]} == {"value", "standard_error", "p50", "p90", "p95", "p99", "p99.9", "max"}
    assert found["tokens"] == 11
    assert found["turns"] is None
    assert err == f"{BLANK}scoring 3 texts\nThe page: {tmp_path / 'page.html'}\n"


def test_markdown_is_all_there_is_on_stdout(klft_, tmp_path):
    code, out, err = klft_("diff", *GOOD, "--markdown")
    assert code == 0
    assert re.match(r"\*\*9 % of the tokens carry \d+ % of the KL\*\*\n\n\| \| \|\n\|---\|---\|\n", out)
    assert out.count("\n") == 11
    assert err.endswith(f"The page: {tmp_path / 'page.html'}\n")
    assert "| 99.9 % reverse KL |" in klft_("diff", *GOOD, "--markdown", "--full")[1]


def test_several_files_are_saved(klft_, tmp_path):
    saved = [tmp_path / name for name in ("numbers.json", "summary.md", "tokens.parquet")]
    code, _, _ = klft_("diff", *GOOD, *(part for path in saved for part in ("--save", path)))
    assert code == 0
    assert [path.stat().st_size > 100 for path in saved] == [True] * 3


def test_texts_that_are_no_file_of_texts(saved, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "share.jsonl").write_text('{"conversations": [{"from": "human", "value": "w1"}]}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"}\n{"text": \n')
    for given, said in {
        ("--texts", "."): "error: --texts . is a folder: name a file in it, or say --dataset .",
        ("--texts", "texts.txt", "--column", "text"): "error: texts.txt has lines and no columns: leave out column 'te",
        ("--texts", str(tmp_path / "empty.jsonl")): f"error: {tmp_path}/empty.jsonl is empty: there is no text in it",
        ("--texts", str(tmp_path / "share.jsonl")): f"error: {tmp_path}/share.jsonl has no column 'text', or",
        ("--texts", str(tmp_path / "broken.jsonl")): f"error: {tmp_path}/broken.jsonl: line 2 is no JSON",
    }.items():
        command = [sys.executable, "-m", "klft", "diff", "policy", "reference", *given]
        done = subprocess.run(command, capture_output=True, text=True, cwd=saved, env=environment(), timeout=120)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, "nothing of the library that reads it"
        assert done.stderr.startswith(said)


def test_turns_of_texts_that_are_no_conversations(klft_):
    code, _, err = klft_("diff", *GOOD, "--turns", "all")
    assert code == 0
    assert err.splitlines()[-1] == "--turns all did nothing: none of the texts is a conversation"


def test_saved_tokens_are_a_table_that_report_reads(klft_, tmp_path):
    code, _, _ = klft_("diff", *GOOD, "--save", tmp_path / "tokens.parquet", "--sequences", 1)
    table, metadata = read_records(tmp_path / "tokens.parquet")
    assert (code, len(table), metadata.reference) == (0, 14, "reference")
    assert "Showing 1 of 3 sequences" in (tmp_path / "page.html").read_text()
    assert klft_("report", tmp_path / "tokens.parquet", "-o", tmp_path / "again.html")[0] == 0


@pytest.mark.parametrize(("turns", "number"), [([], 2), (["--turns", "last"], 2), (["--turns", "all"], 4)])
def test_the_turns_that_count_are_said(klft_, turns, number):
    out = klft_("diff", *CHATS, *turns)[1]
    said = "all" if "all" in turns else "last"
    assert f"{3 * number - number} tokens in 2 sequences; {number} of 4 assistant turns (turns: {said})" in out


@pytest.mark.parametrize(("factor", "code"), [(1.01, 0), (0.99, 3)])
def test_a_mean_reverse_kl_above_the_limit_ends_with_exit_code_three_after_the_output(klft_, factor, code, tmp_path):
    mean = json.loads(klft_("diff", *GOOD, "--json")[1])["reverse_kl"]["value"]
    for more in ([], ["--json"], ["--markdown"]):
        (tmp_path / "page.html").unlink()
        expected = klft_("diff", *GOOD, *more)[1]
        ended, out, err = klft_("diff", *GOOD, *more, "--fail-above", factor * mean)
        assert (ended, out) == (code, expected)
        said = f"error: the mean reverse KL, {mean:.4g} nats per token, is above --fail-above {factor * mean:g}"
        assert err.splitlines()[-1] == said if code else "error" not in err
        assert (tmp_path / "page.html").exists()


def test_hidden_texts_reach_no_output(klft_, tmp_path):
    words = r"\bw\d+\b(?!\.org)"
    arguments = ["diff", *CHATS, "--turns", "all", "--hide-text", "--save", tmp_path / "tokens.parquet"]
    made = [klft_(*arguments, *more)[1] for more in (["--full"], ["--json"], ["--markdown", "--full"])]
    table, metadata = read_records(tmp_path / "tokens.parquet")
    page = str(data_of(tmp_path / "page.html"))  # what is packed in it
    for text in [*made, (tmp_path / "page.html").read_text(), page, str(table.to_pylist()), metadata.to_json()]:
        assert not re.search(words, text), re.search(words, text)
    assert re.search(r"<id \d+>", made[0])


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ({"messages": [{"role": "secret", "content": "secret"}]}, "text 1: the last message is not the assistant's\n"),
        ({"prompt": "secret", "tools": "7", "completion": "secret"}, "text 1: tools must be a list of functions' "),
        ({"text": {"secret": "secret"}}, "rows.jsonl: row 1: 'text' must be text or messages\n"),
    ],
)
def test_an_error_about_a_hidden_text_does_not_quote_it(klft_, tmp_path, row, kept):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    given = ["diff", "policy", "reference", "--texts", tmp_path / "rows.jsonl"]
    code, out, err = klft_(*given, "--hide-text")
    assert (code, out) == (2, "")
    assert kept in err
    assert "secret" not in err
    assert klft_(*given)[0] == 2


def test_progress_is_said_where_there_is_no_terminal(klft_, monkeypatch):
    monkeypatch.setattr(klft.cli, "PROGRESS_SECONDS", 0.0)
    err = klft_("diff", *GOOD, "--batch-size", 2)[2]
    assert re.search(r"scoring 3 texts\nscored 2 of 3 texts, \d+ s to go\nscored 3 of 3 texts, 0 s to go\n$", err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fail-above", "nan"], "--fail-above must be a finite number of nats, 0 or more, got nan"),
        (["--fail-above", "inf"], "--fail-above must be a finite number of nats, 0 or more, got inf"),
        (["--fail-above=-1"], "--fail-above must be a finite number of nats, 0 or more, got -1.0"),
        (["--fail-above", "much"], "--fail-above.*valid (number|float)"),
        (["--save", "x.csv"], r"x\.csv must end in one of \.html, \.parquet, \.json, \.md"),
        (["--save", "texts.txt/x.json"], r"texts\.txt/x\.json cannot be written"),
        (["--save", "/dev/null/x.parquet"], r"/dev/null/x\.parquet cannot be written"),
        (["--json", "--markdown"], "--json and --markdown both want stdout to themselves"),
        (["--turns", "first"], "turns must be one of last, all, got 'first'"),
        (["--revision", "v2"], "revision 'v2': the model is not loaded from the hub"),
        (["--ref-revision", "v2"], "revision 'v2': the reference is not loaded from the hub"),
        (["--sequences", "-1"], "--sequences"),
        (["--fail-over", "1"], "No such option: --fail-over.*--fail-above"),
        (["--hide-texts"], "No such option: --hide-texts.*--hide-text"),
    ],
)
def test_bad_usage_is_one_line_before_any_model_is_loaded(klft_, monkeypatch, arguments, said):
    monkeypatch.setattr("klft.diagnostics.loading.load_model", lambda *_, **__: pytest.fail("loaded"))
    code, out, err = klft_("diff", *GOOD, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert re.match(f"error: .*{said}", err), err


def test_two_revisions_of_one_model_on_the_hub(saved, tmp_path):
    hub = tmp_path / "hub" / "models--some--model"
    for name, revision, commit in (("policy", "v1", "1" * 40), ("reference", "v2", "2" * 40)):
        (hub / "snapshots").mkdir(parents=True, exist_ok=True)
        (hub / "snapshots" / commit).symlink_to(saved / name)
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / revision).write_text(commit)
    command = [sys.executable, "-m", "klft", "diff", "some/model", "some/model", "--texts", saved / "texts.txt"]
    command += ["--revision", "v1", "--ref-revision", "v2", "--json", "-o", tmp_path / "page.html"]
    given = environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub"))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["model"], found["reference"]) == ("some/model@v1", "some/model@v2")
    expected = klft.compare(
        saved / "policy", saved / "reference", ["w1 w2 w3 w4 w5", "w6 w7", "w8 w9 w10 w11 w12 w13 w14"]
    )
    assert found["reverse_kl"]["value"] == pytest.approx(expected.estimates["reverse_kl"].value)


@pytest.mark.parametrize(
    "wrong",
    [["--texts", "text.txt"], [*GOOD[2:], "--dtype", "int8"], [*GOOD[2:], "--temperature", "0"],
     [*GOOD[2:], "--turns", "first"], [*GOOD[2:], "--save", "x.csv"], [*GOOD[2:], "--fail-above", "nan"]],
)  # fmt: skip
def test_what_needs_no_library_is_told_before_one_is_imported(saved, wrong):
    code = "import sys\nfrom klft.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "diff", "policy", "reference", *wrong]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=saved)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert ("Did you mean 'texts.txt'?" in done.stderr) == ("text.txt" in wrong)


def test_lines_of_text_are_compared_without_the_libraries_that_take_long(saved, tmp_path):
    heavy = ["datasets", "trl", "peft", "matplotlib", "sklearn", "scipy"]
    code = "import sys\nfrom klft.cli import main\ntry:\n    main()\nfinally:\n"
    code += f"    print([m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", code, "diff", *GOOD, "-o", tmp_path / "page.html"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=saved)
    assert done.stdout.splitlines()[-1] == "[]"
