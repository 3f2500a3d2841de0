"""The command line: `klft report`, `klft diff`; and what it shares with the recipes, one-line errors for bad input.

Models, statistics and pages are klft.diagnostics' business, imported when a command runs. Of the recipes' arguments
TrlParser takes whatever YAML holds: a misspelt key's advice is for developers, the second of two equal keys wins, null
and lists pass for numbers. `parse_arguments` looks at the file first and says file, line, and what to do.
"""

import argparse
import dataclasses
import difflib
import os
import sys
import tempfile
import types
import typing
import webbrowser
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

# Set through a configuration file, these would run somebody else's code in every process.
REFUSED_ENV = ("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "PATH")


@contextmanager
def one_line_errors():
    """Inside, what a user can mend ends the process with exit code 2 and one line (`--debug`: with the traceback)."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, AttributeError) as error:
        if "--debug" in sys.argv:
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            text = " ".join(str(error).split())
            print(f"error: {text if len(text) < 900 else text[:900] + ' ...'}", file=sys.stderr)
        sys.exit(2)


def parse_arguments(classes: tuple[type, ...], argv: list[str] | None = None) -> tuple:
    """`--config file.yaml` and command line -> one instance per dataclass; the command line wins.

    Raises ValueError that names file, line and a similar key for what the file holds wrongly.
    """
    given = [a for a in (sys.argv[1:] if argv is None else argv) if a != "--debug"]
    given = [part for a in given for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" in given:
        place = given.index("--config") + 1
        if place == len(given) or given[place].startswith("--"):
            raise ValueError("--config needs the name of a YAML file")
        check_yaml(Path(given[place]), {name: hint for c in classes for name, hint in hints(c).items()})
    from trl import TrlParser

    parser: Any = TrlParser(list(classes), usage=argparse.SUPPRESS)  # pyright: ignore
    return parser.parse_args_and_config(given)


def hints(dataclass: type) -> dict[str, Any]:
    """Field name -> type, for the fields that can be set."""
    known = typing.get_type_hints(dataclass)
    return {f.name: known[f.name] for f in dataclasses.fields(dataclass) if f.init}


def check_yaml(path: Path, fields: dict[str, Any]) -> None:
    """Raise ValueError, with the line, for anything in the file that TrlParser would misread."""
    try:
        text = path.read_text()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} {'is empty' if root is None else 'must hold `key: value` lines'}")
    seen: dict[Any, int] = {}
    for key_node, _ in root.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in seen:
            raise ValueError(f"{path}:{line}: the key {key!r} stands in line {seen[key]} already")
        seen[key] = line
        if key == "env":
            _check_env(path, line, values["env"])
        elif key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            raise ValueError(f"{path}:{line}: unknown key {key!r}" + (f". Did you mean {close[0]!r}?" if close else ""))
        elif not fits(values[key], fields[key]):
            raise ValueError(f"{path}:{line}: {key} must be {_name(fields[key])}, got {values[key]!r}")


def _check_env(path: Path, line: int, env: Any) -> None:
    if not isinstance(env, dict):
        raise ValueError(f"{path}:{line}: env must hold `NAME: value` lines, got {env!r}")
    bad = sorted(set(env) & set(REFUSED_ENV))
    if bad:
        raise ValueError(f"{path}:{line}: env may not set {', '.join(bad)}; set it in the shell if you mean it")


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can stand for a field of this type; True for types it does not know."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if hint is type(None):
        return value is None
    if hint in (int, float) and isinstance(value, str):  # YAML reads 3e-4 as text
        try:
            hint(value)
        except ValueError:
            return False
        return True
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if (origin or hint) in (list, dict):
        return isinstance(value, origin or hint)
    return True


def _name(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_name(argument) for argument in typing.get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, str(hint))


# --- klft report, klft diff ------------------------------------------------------------------------------------------

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Token-level KL between two language models: where in the text do they part? Add --debug for tracebacks.",
)  # fmt: skip
Page = Annotated[Path, typer.Option("--output", "-o", help="The page to write: one HTML file, opened from disk.")]
Opened = Annotated[bool, typer.Option("--open", help="Open the page in a browser.")]
Sequences = Annotated[int, typer.Option(min=0, help="Sequences to show in full: the worst, and random ones.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to show of each.")]
Seed = Annotated[int, typer.Option(help="For the random ones.")]


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="A run's output_dir, a folder of Parquet files, or one file.")],
    output: Page = Path("report.html"),
    sequences: Sequences = 32,
    tokens: Tokens = 512,
    seed: Seed = 0,
    opened: Opened = False,
) -> None:
    """Make the page of a run, or of a table of tokens."""
    from klft.diagnostics import write_report

    with one_line_errors():
        check_writable(output)
        write_report(source, output, sequences=sequences, tokens=tokens, seed=seed)
    _written(output, opened)


@app.command()
def diff(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The policy: a folder or hub id, also an adapter's.")],
    reference: Annotated[str | None, typer.Argument(metavar="REF", help="The reference, likewise.")] = None,
    texts: Annotated[str | None, typer.Option(help=".txt (a text per line), .jsonl, .json, .parquet or .csv.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset's hub id or folder, instead of --texts.")] = None,
    split: Annotated[str, typer.Option(help="Of the dataset.")] = "train",
    column: Annotated[str | None, typer.Option(help="Default: text, or prompt and completion, or messages.")] = None,
    output: Page = Path("diff.html"),
    adapter: Annotated[bool, typer.Option("--adapter", help="MODEL is a PEFT adapter; compare with its base.")] = False,
    max_texts: Annotated[int | None, typer.Option(min=1, help="Take the first so many texts.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Cut texts to so many tokens.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 8,
    temperature: Annotated[float, typer.Option(help="Divides both models' logits.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Likeliest tokens of both models to keep.")] = 5,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 (hides KLs under 2e-4) or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Of MODEL's, not REF's.")] = False,
    opened: Opened = False,
) -> None:
    """Compare two causal language models with one vocabulary on texts: exact KL of every token, both ways."""
    from rich.console import Console
    from rich.progress import track

    from klft.diagnostics import Metadata, Statistics, write_report
    from klft.diagnostics.measure import encode_texts, score_texts, scored_table
    from klft.diagnostics.sources import load_models, quiet, read_texts
    from klft.diagnostics.terminal import summary_table, worst_table

    with one_line_errors():
        if (reference is None) != adapter:
            raise ValueError("name two models, MODEL and REF; or one PEFT adapter with --adapter, without REF")
        if (texts is None) == (dataset is None):
            raise ValueError("name the texts to compare on: one of --texts FILE and --dataset NAME")
        check_writable(output)
        quiet()
        given = read_texts(texts or dataset or "", split=split, column=column, max_texts=max_texts)
        policy, frozen, tokenizer = load_models(
            model, reference, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        encoded = encode_texts(tokenizer, given, max_length=max_length)
        options = {"batch_size": batch_size, "max_length": max_length, "temperature": temperature, "top_k": top_k}
        batches = score_texts(policy, frozen, tokenizer, encoded, **options)
    count, console = -(-len(encoded.ids) // batch_size), Console(stderr=True)
    shown = track(batches, "scoring", count, console=console, transient=True, disable=not console.is_terminal)
    table = scored_table(shown, tokenizer)
    names = {"model": model, "reference": reference or f"{model} without its adapter"}
    metadata = Metadata.of(table, tokenizer, temperature=temperature, **names)
    statistics, console = Statistics.of(table, metadata), Console()
    console.print(summary_table(statistics, f"{names['model']} against {names['reference']}"), worst_table(statistics))
    write_report((table, metadata), output)
    _written(output, opened)


def check_writable(path: Path) -> None:
    """Make the folders that a file needs. Raises ValueError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}. Name another file with -o") from error
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file to write, such as -o {path / 'report.html'}")


def _written(page: Path, opened: bool) -> None:
    print(f"The page: {page}")
    if opened:
        webbrowser.open(page.resolve().as_uri())


def main() -> None:
    """The command line `klft`. Exit codes: 1 failed while running, 2 bad usage, 130 Ctrl-C; errors in one line."""
    try:
        code = app([each for each in sys.argv[1:] if each != "--debug"], prog_name="klft", standalone_mode=False)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        usage = hasattr(error, "format_message")  # click's, or of the copy of click that typer brings
        text = error.format_message() if usage else f"{type(error).__name__}: {error}"  # pyright: ignore
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2 if usage else 1)
    sys.exit(code)


if __name__ == "__main__":
    main()
