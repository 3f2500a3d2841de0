"""Every command that README.md and docs/ show: a shell parses it, and what it names takes its options."""

import json
import sys
from pathlib import Path

import pytest
from support import commands

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md"]
BLOCKS = [(path, block) for path in DOCUMENTS for block in commands.shell_blocks(path.read_text())]
SPANS = [(path, span) for path in DOCUMENTS for span in commands.inline_commands(path.read_text())]
LINES = {" ".join(words): words for _, block in [*BLOCKS, *SPANS] for words in commands.commands(block)}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that has what a clone has, and the models and files of a reader's own that documents name."""
    for path in ROOT.iterdir():
        if not path.name.startswith((".", "runs", "demo_out")):
            (tmp_path / path.name).symlink_to(path)
    rows = [{"prompt": f"Dear {name}, we", "completion": " thank you."} for name in ("Ada", "Grace")]
    for name in ("prompts.jsonl", "texts.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("prompts.txt", "texts.txt"):
        (tmp_path / name).write_text("Dear Ada, we\n")
    for name, function in {"my_module": "my_reward", "my_reward": "score"}.items():
        (tmp_path / f"{name}.py").write_text(
            f"def {function}(completions, **_):\n    return [0.0] * len(completions)\n"
        )
    for name in ("my/causal-lm", "any/causal-lm"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_module", None)


def test_there_are_commands():
    assert len(BLOCKS) >= 3
    assert {"klft", "accelerate", "make", "python"} <= {words[0] for words in LINES.values()}


@pytest.mark.parametrize(
    "block", [block for _, block in BLOCKS], ids=[f"{path.name}-{i}" for i, (path, _) in enumerate(BLOCKS)]
)
def test_a_shell_parses_every_block(block):
    assert commands.syntax_problem(block) is None


@pytest.mark.parametrize("line", LINES)
def test_every_command_takes_its_options(line, clone, monkeypatch):
    assert commands.problem(LINES[line], monkeypatch) is None


WRONG = {
    "klft diff a b --text file.txt": "No such option",
    "klft difference a b": "No such command",
    "klft report": "Missing argument",
    "make everything": "no target everything",
    "python recipes/none.py": "there is no recipes/none.py",
    "python recipes/mode_seeking.py --sede 1": "unknown option --sede",
    "python examples/own_loop.py --steps 3": "unrecognized arguments",
    "accelerate launch --config_file accelerate.yaml recipes/ppo.py": "there is no accelerate.yaml",
    "accelerate launch recipes/ppo_reviews.py --config recipes/ppo_reviews.yaml --kl_coeff 0.1": "unknown option",
    "accelerate launch --processes 2 recipes/ppo.py": "accelerate launch: ",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_reported(line, clone, monkeypatch):
    (words,) = commands.commands(line)
    assert WRONG[line] in commands.problem(words, monkeypatch)


def test_a_block_that_no_shell_parses_is_reported():
    assert "unexpected" in commands.syntax_problem("klft diff (a b)")
    assert commands.commands("X=1 a -b \\\n  c  # d\n$ e && f | g 'h i'\n") == [
        ["a", "-b", "c"],
        ["e"],
        ["f"],
        ["g", "h i"],
    ]
