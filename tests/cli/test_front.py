"""`klft` by itself: help, version, completion, and what the package says of itself."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import klft
from klft.cli import main

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def run(monkeypatch, capsys):
    """run("doctor") -> (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["klft", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_klft_by_itself_prints_its_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert (code, out, err) == run("--help")
    for said in ("report", "diff", "doctor", "completion", "--version", "Exit codes: "):
        assert said in out


def test_version_and_python_dash_m(run):
    assert run("--version") == (0, f"klft {klft.__version__}\n", "")
    command = [sys.executable, "-m", "klft", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"klft {klft.__version__}\n"


def test_a_usage_error_is_one_line(run):
    code, out, err = run("--versoin")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(r"error: No such option: --versoin.*--version", err)
    code, out, err = run("completion", "fish")
    assert (code, out, err) == (2, "", "error: there is a completion for bash and for zsh, got 'fish'\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["klft", "d"], {"diff", "doctor"}),
        (["klft", "diff", "--re"], {"--revision", "--ref-revision"}),
        (["klft", "report", "--se"], {"--sequences", "--seed"}),
        (["klft", "doctor", "--j"], {"--json"}),
        (["klft", "diff", "model", "--h"], {"--hide-text", "--help"}),
    ],
)
def test_bash_completes_commands_and_options(run, words, expected):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    code, script, _ = run("completion", "bash")
    given = " ".join(f"'{word}'" for word in words)
    asked = f"{script}\nCOMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; _klft; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run([bash, "--norc", "-c", asked], capture_output=True, text=True, check=True)
    assert (code, set(done.stdout.split()), done.stderr) == (0, expected, "")


def test_zsh_gets_the_same_script_by_way_of_bashcompinit(run):
    bash, zsh = run("completion", "bash")[1], run("completion", "zsh")[1]
    first, rest = zsh.split("\n", 1)
    assert first == "autoload -U +X compinit bashcompinit && compinit && bashcompinit"
    assert rest == bash


def test_what_the_citation_and_the_project_say_agrees():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert (cited["title"], cited["version"], cited["license"]) == ("klft", klft.__version__, PROJECT["license"])
    assert cited["message"]
    assert cited["authors"]
    assert set(cited["keywords"]) <= set(PROJECT["keywords"])


def test_the_classifiers_agree_with_what_the_project_requires():
    versions = [c.rsplit(" :: ", 1)[1] for c in PROJECT["classifiers"] if re.fullmatch(r".*Python :: 3\.\d+", c)]
    assert f">={versions[0]}" == PROJECT["requires-python"]
    assert not any(c.startswith("License ::") for c in PROJECT["classifiers"]), "the license is an SPDX expression"
    assert "Typing :: Typed" in PROJECT["classifiers"]
