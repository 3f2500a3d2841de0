"""YAML files and command lines into dataclasses, with errors in one line that say file, line and what to do."""

import argparse
import dataclasses
import difflib
import os
import sys
import tempfile
import types
import typing
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    refused = sorted(set(env) & set(REFUSED_ENV))
    if refused:
        raise ValueError(f"{path}:{line}: env may not set {', '.join(refused)}; set it in the shell if you mean it")


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
