"""Commands as documents show them: what is wrong with one, told without running it. No model is loaded."""

import argparse
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from accelerate.commands.launch import launch_command_parser

import klft.arguments
from klft import cli

ROOT = Path(__file__).parents[2]


def blocks(text: str, *languages: str) -> list[str]:
    """What stands in a document's fences of these languages."""
    return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if name in languages]


def shell_blocks(text: str) -> list[str]:
    """Blocks for a shell: those that say so, and those that say nothing."""
    return blocks(text, "", "bash", "sh", "shell", "console")


def inline_commands(text: str) -> list[str]:
    """Code spans that are a whole command, and not its name alone, or one with a "..." in it."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    spans = re.findall(
        r"`((?:klft|python) [^`]+? [^`]+|(?:accelerate launch|torchrun) [^`]+\.py[^`]*|make [^`]+)`", prose
    )
    return [span for span in spans if "..." not in span]


def commands(block: str) -> list[list[str]]:
    """The commands of a block, in words: comments, variables before them and what joins them left out."""
    found: list[list[str]] = []
    for line in block.replace("\\\n", " ").splitlines():
        found.append([])
        for word in shlex.split(line.removeprefix("$ "), comments=True):
            if word in ("&&", "||", "|", ";"):
                found.append([])
            elif found[-1] or not re.match(r"[A-Za-z_]\w*=", word):
                found[-1].append(word)
    return [words for words in found if words]


def syntax_problem(block: str) -> str | None:
    """What bash says of a block that it cannot parse."""
    ended = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    return ended.stderr.strip() or None if ended.returncode or ended.stderr else None


def problem(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why this command would stop at its arguments; None where it would not, or nothing is known of it."""
    program, *arguments = words
    python = Path(program).name.startswith("python")
    if program == "make":
        return _make(arguments)
    if program == "klft" or (python and arguments[:2] == ["-m", "klft.cli"]):
        return _klft(arguments if program == "klft" else arguments[2:])
    if words[:2] == ["accelerate", "launch"]:
        return _launched(arguments[1:], monkeypatch)
    if python and arguments and arguments[0].endswith(".py"):
        return _script(arguments[0], arguments[1:], monkeypatch)
    return None


def _make(arguments: list[str]) -> str | None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    lacking = [word for word in arguments if "=" not in word and not word.startswith("-") and word not in targets]
    return f"no target {lacking[0]}" if lacking else None


def _klft(arguments: list[str]) -> str | None:
    """Parsed by the command line's own commands, which are not called."""
    given = [word for word in arguments if word not in ("--debug", "--version", "--help")]
    if not given:
        return None
    group: Any = typer.main.get_command(cli.app)
    context = group.make_context("klft", list(given))
    try:
        name, command, rest = group.resolve_command(context, given)
        command.make_context(name, rest)
    except Exception as error:  # click's, or of the copy of click that typer brings
        return f"klft: {error.format_message() if hasattr(error, 'format_message') else error}"
    return None


def _launched(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    try:
        with redirect_stderr(io.StringIO()) as said:
            given = launch_command_parser().parse_args(arguments)
    except SystemExit:
        return f"accelerate launch: {said.getvalue().strip().splitlines()[-1]}"
    if given.config_file and not Path(given.config_file).is_file():
        return f"accelerate launch: there is no {given.config_file}"
    return None if given.module else _script(given.training_script, given.training_script_args, monkeypatch)


def _script(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Runs a script up to where it has parsed its arguments."""
    if not Path(script).is_file():
        return f"there is no {script}"
    reached: list[bool] = []

    def stopping(parse: Callable) -> Callable:
        def parsed(*args: Any, **kwargs: Any) -> None:
            parse(*args, **kwargs)
            reached.append(True)
            sys.exit(0)  # what it would do with them is other tests' business

        return parsed

    with monkeypatch.context() as patch, redirect_stderr(io.StringIO()) as said, suppress(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
        patch.setattr(klft.arguments, "parse_arguments", stopping(klft.arguments.parse_arguments))
        patch.setattr(sys, "argv", [script, *arguments])
        patch.syspath_prepend(str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")
    return None if reached else f"{script}: {(said.getvalue().strip() or 'it reads no arguments').splitlines()[-1]}"
