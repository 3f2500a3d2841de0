"""The command line's front: what a file holds wrongly is named with its line, before anything is loaded."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from klft.cli import fits, one_line_errors, parse_arguments

RECIPES = Path(__file__).parents[1] / "recipes"


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
        ("weights: 1.0\n", r":1: weights must be list\[float\] or null"),
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
def test_the_recipe_ends_with_one_line(tmp_path, arguments, said):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a"}\n' * 64)
    command = [sys.executable, str(RECIPES / "ppo_reviews.py"), "--config", str(RECIPES / "ppo_reviews.yaml")]
    command += ["--output_dir", str(tmp_path / "out"), *(a.format(data=data) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in done.stderr
