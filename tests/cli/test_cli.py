"""The command line's front: what a file holds wrongly is named with its line, before anything is loaded."""

import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from support import oracles, tiny
from support.example_report import data_of
from support.processes import launch
from support.recipes import RECIPES, error_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from klft import scoring
from klft.arguments import fits, one_line_errors, parse_arguments
from klft.cli import main
from klft.diagnostics import Statistics, TokenKLLog, read_records, score_texts, summary_lines

SIZES = {"batch_size": 3, "max_length": 32}
LEFT_OUT = "1 of 4 texts are left out: they have no token to score\n"
PROGRESS = LEFT_OUT + "scoring 3 texts\n"


@dataclass
class Settings:
    """Some of each type."""

    kl_coef: float = 0.05
    steps: int = 3
    name: str | None = None
    quiet: bool = False
    weights: list[float] | None = None


def parsed(tmp_path, text, *arguments):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_arguments((Settings,), ["--config", str(path), *arguments])[0]


def test_the_file_gives_defaults_and_the_command_line_wins(tmp_path):
    made = parsed(tmp_path, "kl_coef: 3e-4\nsteps: 5\nname: null\nquiet: true\nweights: [1.0, 2.0]\n", "--steps", "7")
    assert made == Settings(kl_coef=3e-4, steps=7, name=None, quiet=True, weights=[1.0, 2.0])
    joined = tmp_path / "settings.yaml"
    assert parse_arguments((Settings,), [f"--config={joined}"])[0].steps == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 1\nkl_ceof: 0.1\n", r":2: unknown key 'kl_ceof'. Did you mean 'kl_coef'\?"),
        ("zzz: 1\n", r":1: unknown key 'zzz'$"),
        ("steps: 1\nquiet: true\nsteps: 2\n", r":3: the key 'steps' stands in line 1 already"),
        ("steps: null\n", r":1: steps must be a whole number, got None"),
        ("steps: 4.5\n", r":1: steps must be a whole number, got 4.5"),
        ("steps: many\n", r":1: steps must be a whole number, got 'many'"),
        ("steps: true\n", r":1: steps must be a whole number, got True"),
        ("kl_coef: [1, 2]\n", r":1: kl_coef must be a number, got \[1, 2\]"),
        ("kl_coef: abc\n", r":1: kl_coef must be a number, got 'abc'"),
        ("quiet: 1\n", r":1: quiet must be true or false, got 1"),
        ("name: [a]\n", r":1: name must be text or null"),
        ("weights: 1.0\n", r":1: weights must be a list \(\[a, b\]\) or null"),
        ("steps: 1\n  bad: 2\n", r":2: mapping values are not allowed here"),
        ("steps: !!python/object/apply:os.system ['touch owned']\n", r":1: could not determine a constructor"),
        ("", "is empty"),
        ("- 1\n- 2\n", "must hold `key: value` lines"),
        (b"\xff\xfe\x00", "not a text file"),
        ("1: 2\n", ":1: unknown key '1'"),
        ("env: {LD_PRELOAD: /tmp/x.so}\n", "env may not set LD_PRELOAD"),
        ("env: 3\n", ":1: env must hold"),
    ],
)
def test_what_a_file_holds_wrongly_is_named(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        parsed(tmp_path, text)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "arguments", [["--config"], ["--config", "--steps"], ["--config", "nowhere.yaml"], ["--config", "."]]
)
def test_a_file_that_is_not_there(arguments):
    with pytest.raises(ValueError, match=r"needs the name|No such file|Is a directory"):
        parse_arguments((Settings,), arguments)


def test_types_it_does_not_know_pass():
    assert fits(object(), Path)
    assert not fits("x", int)
    assert fits("1e-3", float)


def test_one_line_and_exit_code_two(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe"])
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise ValueError("first\n  second")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: first second\n"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), one_line_errors():
        raise OSError("said by rank 0 alone")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "argv", ["recipe", "--debug"])
    with pytest.raises(ValueError, match="kept"), one_line_errors():
        raise ValueError("kept")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes", "2"], "asked for 2 process(es), got 1"),
        (["--processes", "1", "--kl_estimator", "k9"], "kl_estimator must be one of"),
        (["--processes", "1", "--resume_from_checkpoint", "true"], "there is no complete checkpoint"),
        (["--processes", "1", "--dataset_name", "{data}.csv"], "prompts.jsonl.csv: there is no such file"),
        (
            [
                "--processes",
                "1",
                "--model_name_or_path",
                "/nowhere",
                "--dataset_name",
                "{data}",
                "--reward",
                "os:getcwd",
            ],
            "nowhere",
        ),
    ],
)
def test_the_recipe_ends_with_one_line(tmp_path, arguments, said, monkeypatch, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a"}\n' * 64)
    given = ["--output_dir", str(tmp_path / "out"), *(a.format(data=data) for a in arguments)]
    assert said in error_of("ppo_reviews", given, monkeypatch, capsys)


# --- klft report, klft diff ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two models, an adapter of the first that says something else, what is no language model, and texts."""
    folder = tmp_path_factory.mktemp("saved")
    for name, model in {"policy": tiny.llama(), "reference": tiny.llama(5), "critic": tiny.critic()}.items():
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    tiny.llama(6).save_pretrained(folder / "other")
    swapped = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    ids = swapped["model"]["vocab"]
    ids["w4"], ids["w9"] = ids["w9"], ids["w4"]
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(swapped))).save_pretrained(folder / "other")
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "policy"), tiny.lora())
    torch.manual_seed(9)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    adapter.save_pretrained(folder / "adapter")
    (folder / "texts.txt").write_text("w1 w2 w3 w4 w5\n\nw6 w7\nw8 w9 w10 w11 w12 w13 w14\n")
    (folder / "chat.jsonl").write_text(json.dumps({"prompt": "w1 w2", "completion": " w3"}) + "\n")
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text("\n \n")
    (folder / "binary.txt").write_bytes(b"\x7fELF\x02\x01\xff\xfe\0\0")
    return folder


@pytest.fixture
def klft(saved, monkeypatch, klft_command):
    """klft("diff", ...) -> (exit code, stdout, stderr), run in the folder of `saved`."""
    monkeypatch.chdir(saved)
    monkeypatch.setenv("COLUMNS", "100")
    return klft_command


def means(policy, reference, texts):
    """Mean KLs, reverse and forward, over the tokens of all texts but the first of each, in float64."""
    sums, count = [0.0, 0.0], 0
    for text in texts:
        ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            p, q = (model.double().eval()(input_ids=ids).logits[0, :-1] for model in (policy, reference))
        for i, kl in enumerate((oracles.reverse_kl(p, q), oracles.forward_kl(p, q))):
            sums[i] += kl.sum().item()
        count += len(kl)
    return [total / count for total in sums]


def table_of(page):
    """The data block of a page."""
    return data_of(page)


def test_diff_compares_two_checkpoints(klft, saved, tmp_path):
    texts = ["w1 w2 w3 w4 w5", "w6 w7", "w8 w9 w10 w11 w12 w13 w14"]
    code, out, err = klft("diff", *GOOD, "-o", tmp_path / "new" / "page.html", "--full")
    assert (code, err) == (0, PROGRESS)
    reverse, forward = means(tiny.llama(), tiny.llama(5), texts)
    assert "policy against reference" in out
    assert "11 in 3 sequences" in out
    assert re.search(rf"Mean reverse KL +│ {reverse:.4g} ± ", out), out
    assert re.search(rf"Mean forward KL +│ {forward:.4g} ± ", out), out
    for label in ("Maximum reverse KL", "99 % reverse KL", "Same top-1", "Perplexity of the policy", "Worst token"):
        assert label in out
    assert not re.search(r"\bk[123]\b", out + (tmp_path / "new" / "page.html").read_text().split("<script")[0])
    page = tmp_path / "new" / "page.html"
    assert out.splitlines()[-1] == f"The page: {page}"
    rows = table_of(page)["sequences"]
    assert sorted(row["sample_id"] for row in rows) == [0, 2, 3]  # lines of the file
    assert sum(map(float, (row["sum_reverse"] for row in rows))) / 11 == pytest.approx(reverse, rel=1e-3)


def test_diff_compares_an_adapter_with_its_own_base(klft, tmp_path):
    page = tmp_path / "page.html"
    code, out, _ = klft("diff", "adapter", "--adapter", "--texts", "texts.txt", "-o", page, "--temperature", 0.7)
    assert code == 0
    assert "adapter against adapter without its adapter" in out
    assert "<dt>Temperature</dt><dd>0.7</dd>" in page.read_text()
    both = klft("diff", "adapter", "policy", "--texts", "texts.txt", "-o", page, "--temperature", 0.7)
    kls = [[line for line in each.splitlines() if "KL" in line] for each in (out, both[1])]
    assert kls[0] == kls[1]
    assert not re.search(r"Mean reverse KL +│ 0 ", out)


def test_diff_reads_prompts_and_takes_options(klft, tmp_path):
    page = tmp_path / "page.html"
    options = ["--dtype", "float32", "--device", "cpu", "--max-texts", 1, "--max-length", 3, "--batch-size", 1]
    code, out, err = klft("diff", "policy", "reference", "--texts", "chat.jsonl", "-o", page, "--top-k", 2, *options)
    assert code == 0
    assert "1 tokens in 1 sequences" in out
    (row,) = table_of(page)["sequences"]
    assert row["prompt"] == "110"
    assert row["top_ids"][0] is None
    assert len(row["top_ids"][1]) == 2
    code, out, err = klft("diff", "policy", "reference", "--texts", "texts.txt", "-o", page, "--max-length", 3)
    assert "6 tokens in 3" not in out
    assert "5 tokens in 3 sequences" in out
    assert "2 of 4 texts are cut to their first 3 tokens" in err


def test_report_of_a_file_a_folder_and_a_run(klft, tmp_path):
    scores = score_texts(tiny.llama(), tiny.llama(5), tiny.tokenizer(), ["w1 w2 w3", "w4 w5"], **SIZES)
    with TokenKLLog(tmp_path / "run", tiny.tokenizer()) as log:
        for batch in scores:
            log.add(batch.scores, batch.token_ids, batch.mask, step=3)
    (file,) = (tmp_path / "run" / "kl").iterdir()
    for source in (file, file.parent, tmp_path / "run"):
        page = tmp_path / "page.html"
        code, out, err = klft("report", source, "-o", page, "--sequences", 1, "--tokens", 1, "--seed", 4)
        assert (code, out, err) == (0, f"The page: {page}\n", "")
        (row,) = table_of(page)["sequences"]
        assert len(row["token"]) == 1
        page.unlink()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(file.read_bytes()[:-30])
    code, out, err = klft("report", cut, "-o", tmp_path / "page.html")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {cut} is truncated or no Parquet file")
    assert not (tmp_path / "page.html").exists()


GOOD = ["policy", "reference", "--texts", "texts.txt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["diff", "nowhere", "reference", "--texts", "texts.txt"],
            "model nowhere: there is no such folder, and HF_HUB_OFFLINE",
        ),
        (
            ["diff", "policy", "some/model", "--texts", "texts.txt"],
            "reference some/model: there is no such folder, and HF_HUB_OFFLINE is set, so the hub is not asked: ",
        ),
        (["diff", "policy", "critic", "--texts", "texts.txt"], "reference critic: .*SequenceClassification"),
        (["diff", "policy", "other", "--texts", "texts.txt"], "tokenizers .* differ in 2 ids: 7 is 'w4' and 'w9'"),
        (["diff", "policy", "--texts", "texts.txt"], "name two models, MODEL and REF"),
        (["diff", "adapter", "policy", "--adapter", "--texts", "texts.txt"], "or one PEFT adapter with --adapter"),
        (["diff", "policy", "--adapter", "--texts", "texts.txt"], "policy is not a PEFT adapter"),
        (["diff", "policy", "reference"], "one of --texts FILE and --dataset NAME"),
        (["diff", *GOOD, "--dataset", "x"], "one of --texts FILE and --dataset NAME"),
        (["diff", "policy", "reference", "--dataset", "some/dataset"], "^error: some/dataset: "),
        (["diff", "policy", "reference", "--texts", "empty.txt"], "empty.txt is empty"),
        (["diff", "policy", "reference", "--texts", "blank.txt"], "none of 2 text.* has a token to score"),
        (["diff", "policy", "reference", "--texts", "binary.txt"], "binary.txt is not UTF-8 text"),
        (["diff", "policy", "reference", "--texts", "no.txt"], "no.txt: there is no such file"),
        (["diff", *GOOD, "--column", "text", "-o", "texts.txt/page.html"], "texts.txt/page.html cannot be written"),
        (["diff", "nowhere", "none", "--texts", "no", "-o", "."], r"\. is a folder"),  # before all else
        (["diff", *GOOD, "--temperature", "0"], "temperature must be finite and >= 0.001, got 0.0"),
        (["diff", *GOOD, "--dtype", "int8"], "dtype must be one of auto, float32"),
        (["diff", *GOOD, "--device", "cuda:7"], "device 'cuda:7' cannot be used"),
        (["diff", *GOOD, "--batch-size", "0"], "--batch-size.* 1"),
        (["diff", *GOOD, "--max-length", "many"], "--max-length.*integer"),
        (["diff", *GOOD, "--tempreature", "1"], "No such option: --tempreature.*--temperature"),
        (["diff"], "Missing argument 'MODEL'"),
        (["compare"], "No such command 'compare'"),
        (["dif"], r"No such command 'dif'\. Did you mean 'diff'\?"),
        (["report", "policy", "--sequence", "3"], "No such option: --sequence.*--sequences"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["report", "."], "holds no .*parquet"),
        (["report", "texts.txt"], "texts.txt is truncated or no Parquet file"),
        (["report", "policy", "-o", "/dev/null/page.html"], "/dev/null/page.html cannot be written"),
        (["report", "policy", "--tokens", "0"], "--tokens"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_two(klft, arguments, said):
    code, out, err = klft(*arguments)
    lines = [line for line in err.splitlines() if "left out" not in line]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith("error: ")
    assert re.search(said, lines[0]), lines[0]


def test_a_failure_is_exit_code_one_and_an_interrupt_130(klft, monkeypatch, tmp_path):
    def fails(error):
        def token_scores(*_, **__):
            raise error

        return token_scores

    page = tmp_path / "page.html"
    monkeypatch.setattr(scoring, "token_scores", fails(RuntimeError("out of\nmemory")))
    assert klft("diff", *GOOD, "-o", page)[::2] == (1, PROGRESS + "error: RuntimeError: out of memory\n")
    monkeypatch.setattr(sys, "argv", ["klft", "--debug", "diff", *GOOD, "-o", str(page)])
    with pytest.raises(RuntimeError, match="out of\nmemory"):
        main()
    monkeypatch.setattr(scoring, "token_scores", fails(KeyboardInterrupt()))
    assert klft("diff", *GOOD, "-o", page)[0] == 130
    assert not page.exists()


def test_debug_shows_where(klft, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["klft", "report", "nowhere", "--debug"])
    with pytest.raises(ValueError, match="nowhere does not exist"):
        main()


def test_hostile_texts_stay_inside_the_page_and_the_terminal(klft, tmp_path):
    hostile = ["<script>alert(1)</script>", "\x1b[31mred", "[/INST]", "\u202eright", "[bold]w1[/bold]"]
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {text: i + 3 for i, text in enumerate(hostile)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, seed in (("a", 0), ("b", 5)):
        tiny.llama(seed).save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / name)
    (tmp_path / "texts.txt").write_text(" ".join(hostile * 2))
    page = tmp_path / "page.html"
    given = (tmp_path / "a", tmp_path / "b", "--texts", tmp_path / "texts.txt", "-o", page)
    code, out, _ = klft("diff", *given, "--full")
    assert code == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\\x1b[31m" in out  # the column is cut after it
    assert "[/INST]" in out
    assert "<script>alert" not in page.read_text()


def test_a_repositorys_own_code_runs_only_where_asked_and_never_the_references(klft, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    own, ran = tmp_path / "own", tmp_path / "ran"
    tiny.tokenizer().save_pretrained(own)
    (own / "config.json").write_text(json.dumps(config))
    (own / "own.py").write_text(
        f"import os\nos.makedirs({str(ran)!r}, exist_ok=True)\nraise ValueError('that was it')\n"
    )
    page = tmp_path / "page.html"
    for given in ([own, "reference"], ["policy", own], ["policy", own, "--trust-remote-code"]):
        code, _, err = klft("diff", *given, "--texts", "texts.txt", "-o", page)
        assert code == 2
        assert "trust_remote_code" in err
        assert not ran.exists()
    code, _, err = klft("diff", own, "reference", "--trust-remote-code", "--texts", "texts.txt", "-o", page)
    assert (code, ran.exists()) == (2, True)
    assert f"model {own}: that was it" in err


def test_the_command_itself(saved, tmp_path):
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "klft", "diff", saved / "policy", saved / "reference"]
    command += ["--texts", saved / "texts.txt", "-o", page]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, PROGRESS)
    assert f"The page: {page}" in done.stdout
    assert page.stat().st_size > 10_000
    (script,) = (s for s in importlib.metadata.entry_points(group="console_scripts") if s.name == "klft")
    assert script.load() is main


def test_nan_weights_end_the_command_with_one_line_that_names_model_text_and_position(saved, tmp_path):
    model = tiny.llama()
    model.model.layers[0].mlp.down_proj.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "nan")
    tiny.tokenizer().save_pretrained(tmp_path / "nan")
    page = tmp_path / "page.html"
    command = [
        sys.executable, "-m", "klft", "diff", tmp_path / "nan", saved / "reference", "--texts", saved / "texts.txt",
        "-o", page,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, page.exists()) == (1, "", False)
    said = f"error: RuntimeError: the policy {tmp_path}/nan: its logits are not finite for text 1, position 1 ("
    assert done.stderr.splitlines()[-1].startswith(said)
    assert "Traceback" not in done.stderr


def test_help_loads_nothing_that_takes_long():
    heavy = ["transformers", "datasets", "trl", "accelerate", "peft", "pyarrow", "jinja2", "pandas"]
    code = "import sys\nfrom klft import cli\ncli.app(['--help'], standalone_mode=False)\n"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "diff" in done.stdout
    assert "report" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


# --- recipes/measure_kl.py -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_recipe_measures_the_same_on_one_process_and_on_two(tmp_path, monkeypatch, capsys):
    recipe = RECIPES / "measure_kl.py"
    given = [str(recipe), "--config", recipe.with_suffix(".yaml"), "--smoke", "--max_texts", "31"]
    alone = [*given, "--output_dir", tmp_path / "1", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", list(map(str, alone)))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.syspath_prepend(str(RECIPES))
    runpy.run_path(str(recipe), run_name="__main__")
    done = launch(*given, "--output_dir", tmp_path / "2", "--processes", "2", timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = capsys.readouterr().out, done.stdout
    (table, metadata), (other, _) = (read_records(tmp_path / n) for n in "12")
    for name in ("sample_id", "position", "token_id", "rank", "token"):
        assert table[name].to_pylist() == other[name].to_pylist()
    for name in ("reverse_kl", "forward_kl", "logp", "ref_logp"):
        assert table[name].to_pylist() == pytest.approx(other[name].to_pylist(), abs=1e-5)
    assert sorted(set(table["sample_id"].to_pylist())) == list(range(31))
    stats = Statistics.of(table, metadata)
    lines = dict(summary_lines(stats))
    for label in ("Tokens", "Mean reverse KL", "Mean forward KL", "Reverse KL per sequence", "Same top-1"):
        for out in (one, two):
            assert re.search(rf"{label} +│ {re.escape(lines[label])} ", out), (label, out)
    assert (tmp_path / "2" / "report.html").stat().st_size > 10_000


def test_the_recipe_says_that_it_writes_no_file(tmp_path, monkeypatch, capsys):
    recipe = RECIPES / "measure_kl.py"
    monkeypatch.chdir(tmp_path)
    given = ["--config", str(recipe.with_suffix(".yaml")), "--smoke", "--max_texts", "3"]
    monkeypatch.setattr(sys, "argv", [str(recipe), *given])
    monkeypatch.syspath_prepend(str(RECIPES))
    runpy.run_path(str(recipe), run_name="__main__")
    assert "No file is written; --output_dir FOLDER" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a model, and one of texts and dataset; or say --smoke"),
        (["--smoke", "--processes", "3"], "asked for 3 process(es), got 1"),
        (["--model", "nowhere", "--reference", "none", "--texts", "no.txt"], "no.txt"),
    ],
)
def test_the_measuring_recipe_ends_with_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in error_of("measure_kl", arguments, monkeypatch, capsys)
