"""YAML files and command lines into dataclasses, with errors in one line that say file, line and what to do."""

import argparse
import dataclasses
import math
import os
import re
import shutil
import sys
import tempfile
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from klft.exits import record_reason
from klft.writing import did_you_mean, error_line, print_error

# What `env:` in a file may set. Of the others many run code in every process or send data elsewhere: no list of those
# would be complete.
ALLOWED_ENV = (
    "CUDA_VISIBLE_DEVICES", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "KLFT_CACHE",
    "MLFLOW_EXPERIMENT_NAME", "NCCL_DEBUG", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY", "WANDB_ENTITY", "WANDB_MODE", "WANDB_NAME", "WANDB_NOTES",
    "WANDB_PROJECT", "WANDB_RUN_GROUP", "WANDB_TAGS",
)  # fmt: skip
CALLED_ELSEWHERE = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size",
    "max_length": "max_completion_length", "beta": "kl_coef", "model": "model_name_or_path", "dataset": "prompts",
}  # fmt: skip
SAME = (("max_steps", "total_episodes", "num_train_epochs"),)  # one on the command line replaces a file's others
# --help: what a group is called whose dataclass's docstring is no title, and what it shows of the Trainer's own beside
# the script's YAML.
TITLES = {"PPOConfig": "PPO and its KL penalty", "ModelConfig": "The model, and a LoRA on it"}
USUAL = ("activation_checkpointing", "bf16", "num_train_epochs", "resume_from_checkpoint", "seed", "use_cpu")
LARGEST_YAML = {"bytes": 1 << 20, "values": 10_000, "levels": 20}
NO_DECIMAL = re.compile(r"[-+]?0[0-9_]+|.*:.*")  # YAML 1.1 reads 010 as 8 and 1:30 as 90


@contextmanager
def one_line_errors(exit_code: int = 2):
    """Inside, what a user can mend ends the process with an exit code and one line (`--debug`: with the traceback).

    2: bad usage or configuration, which all processes see alike: the first one speaks. 1: a failure while running.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, AttributeError) as error:
        if "--debug" in sys.argv:
            raise
        record_reason(error_line(str(error)))
        if exit_code != 2 or int(os.environ.get("RANK", 0)) == 0:
            print_error(str(error))
        sys.exit(exit_code)


def command_line(argv: Sequence[str] | None = None) -> list[str]:
    """The arguments (default: of this process) as TrlParser takes them: without --debug, `--config FILE` in two."""
    given = [a for a in (sys.argv[1:] if argv is None else argv) if a != "--debug"]
    return [part for a in given for part in (a.split("=", 1) if a.startswith("--config=") else [a])]


def parse_arguments(classes: tuple[type, ...], argv: list[str] | None = None, unused: Collection[str] = ()) -> tuple:
    """`--config file.yaml` and command line -> one instance per dataclass; the command line wins.

    `--help` prints the options in groups, one for each dataclass, without those that are `unused`, and of the Trainer's
    own the usual ones; `--help-all` all. Raises ValueError that names file, line and a similar key for what the file
    holds wrongly.
    """
    given = command_line(argv)
    fields = {name: hint for c in classes for name, hint in hints(c).items()}
    named = check_options(given, fields)
    if {"-h", "--help", "--help-all"} & set(given):
        if int(os.environ.get("RANK", 0)) == 0:
            print(help_text(classes, unused, everything="--help-all" in given))
        sys.exit(0)
    with tempfile.TemporaryDirectory() as folder:
        if "--config" in given:
            place = given.index("--config") + 1
            if place == len(given) or given[place].startswith("--"):
                raise ValueError("--config needs the name of a YAML file")
            path = Path(given[place])
            given[place] = str(_without_replaced(path, check_yaml(path, fields), named, Path(folder)))
        from trl import TrlParser  # takes seconds: not before what is wrong is said

        parser: Any = TrlParser(list(classes), usage=argparse.SUPPRESS)  # pyright: ignore
        made = parser.parse_args_and_config(given)
    for name, value in (pair for settings in made for pair in _numbers(settings)):
        if not abs(value) < math.inf:
            raise ValueError(f"{name} must be a finite number, got {value}")
    return made


def help_text(classes: tuple[type, ...], unused: Collection[str] = (), *, everything: bool = False) -> str:
    """The script's docstring and its options in groups: one for each dataclass, and what they have of the Trainer's."""
    script = sys.modules["__main__"]
    settings = Path(getattr(script, "__file__", None) or ".").with_suffix(".yaml")
    usual = {*USUAL, *(yaml.safe_load(settings.read_text()) if settings.is_file() else ())}
    lines, trainers = [(script.__doc__ or "").strip()], []
    for c in classes:
        bases = [base for base in c.__mro__ if base.__name__ == "TrainingArguments"]
        inherited = {name for base in bases for name in base.__annotations__} - c.__annotations__.keys()
        lines.append("\n" + (TITLES.get(c.__name__) or (c.__doc__ or c.__name__).partition("\n")[0]))
        for f in dataclasses.fields(c):
            if f.init and f.name not in unused and (everything or f.name in usual or f.name not in inherited):
                (trainers if f.name in inherited else lines).append(_option_help(f))
    more = "" if everything else "; all of them: --help-all"
    return "\n".join([*lines, *([f"\nOf transformers.Trainer{more}"] if trainers else []), *trainers])


def _option_help(field: dataclasses.Field) -> str:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    known = "required" if default is dataclasses.MISSING else f"default {getattr(default, 'value', default)}"
    meant = str(field.metadata.get("help") or "").replace("%%", "%")  # argparse's escape
    text = f"--{field.name}: {meant} ({known})"
    width = min(max(shutil.get_terminal_size().columns, 40), 120)
    return textwrap.fill(" ".join(text.split()), width, initial_indent="  ", subsequent_indent="      ")


def _numbers(settings: Any) -> Iterator[tuple[str, float]]:
    """(field, number) of a dataclass, those in lists and mappings too."""
    waiting = [(name, getattr(settings, name)) for name in hints(type(settings))]
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, (list, tuple, dict)):
            waiting += [(name, each) for each in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def check_positive(settings: object, zero: Sequence[str] = ()) -> None:
    """Raise ValueError, naming the field of a dataclass, for a number that is not above 0; in `zero`: or 0."""
    for name, value in _numbers(settings):
        if value < 0 or (value == 0 and name not in zero):
            raise ValueError(f"{name} must be {'0 or more' if name in zero else 'above 0'}, got {value}")


def check_options(given: list[str], fields: dict[str, Any]) -> set[str]:
    """The fields that the command line names. Raises ValueError, with a similar name, for what is none."""
    named = named_options(given)
    for name in sorted(named - fields.keys() - {"config", "help", "help_all"}):
        if name.removeprefix("no_") not in fields:  # argparse has a --no_ for each switch that is on
            raise ValueError(f"unknown option --{name}{_similar(name, [*fields, 'config'], '--{}'.format)}")
    return named


def named_options(given: Sequence[str]) -> set[str]:
    """The options that a command line names, as fields are called."""
    return {part[2:].partition("=")[0].replace("-", "_") for part in given if part.startswith("--") and part != "--"}


def _similar(name: str, fields: Collection[str], shown: Callable[[str], str]) -> str:
    """did_you_mean, for names that other libraries use, and for the beginning of one, too."""
    likely = CALLED_ELSEWHERE.get(name, "")
    begins = next((field for field in fields if field.startswith(name)), name)
    return did_you_mean(likely if likely in fields else name, fields, shown) or did_you_mean(begins, fields, shown)


def _without_replaced(path: Path, values: dict[str, Any], named: set[str], folder: Path) -> Path:
    """The file of these values, or a copy in `folder` without what is `replaced`."""
    if not (gone := replaced(values, named)):
        return path
    copy = folder / path.name
    copy.write_text(yaml.safe_dump({name: value for name, value in values.items() if name not in gone}))
    return copy


def replaced(values: Collection[str], named: Collection[str]) -> set[str]:
    """Those of a file's names that the command line, which has `named`, says in other words (SAME)."""
    said = (group for group in SAME if set(group) & set(named))
    return {name for group in said for name in group if name in values and name not in named}


def hints(dataclass: type) -> dict[str, Any]:
    """Field name -> type, for the fields that can be set."""
    known = typing.get_type_hints(dataclass)
    return {f.name: known[f.name] for f in dataclasses.fields(dataclass) if f.init}


def check_yaml(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The file's values. Raises ValueError, with the line, for anything in it that TrlParser would misread."""
    try:
        if path.stat().st_size > LARGEST_YAML["bytes"]:
            raise ValueError(f"{path} has more than {LARGEST_YAML['bytes']:,} bytes: it is no configuration")
        text = path.read_text()
        _check_size(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(path, root)
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
    for key_node, _ in root.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if key == "env":
            _check_env(path, line, values["env"])
        elif key not in fields:
            raise ValueError(f"{path}:{line}: unknown key {key!r}{_similar(str(key), fields, repr)}")
        elif not fits(values[key], fields[key]):
            raise ValueError(f"{path}:{line}: {key} must be {_name(fields[key])}, got {values[key]!r:.80}")
    return values


def _check_size(path: Path, text: str) -> None:
    """Raise ValueError where a file unfolds into more than a configuration holds, before anything unfolds it."""
    named: dict[str, int] = {}  # values under an anchor, aliases unfolded
    opened: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            named |= {} if anchor is None else {anchor: total - before}
        elif isinstance(event, yaml.AliasEvent):
            endless = any(event.anchor == anchor for anchor, _ in opened)  # within what it names
            total += LARGEST_YAML["values"] if endless else named.get(event.anchor, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.ScalarEvent):
            named |= {} if event.anchor is None else {event.anchor: 1}
            total += 1
        if total > LARGEST_YAML["values"] or len(opened) > LARGEST_YAML["levels"]:
            limits = f"{LARGEST_YAML['values']:,} values, aliases unfolded, or {LARGEST_YAML['levels']} levels"
            raise ValueError(f"{path}:{event.start_mark.line + 1}: more than {limits}: it is no configuration")


def _check_nodes(path: Path, node: yaml.Node | None) -> None:
    """Raise ValueError for a key that stands twice in one mapping, and for what only YAML takes for a number."""
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")):
        read, place = yaml.safe_load(node.value), f"{path}:{node.start_mark.line + 1}"
        if NO_DECIMAL.fullmatch(node.value):
            raise ValueError(
                f"{place}: {node.value} is no decimal number, and YAML reads {read}: "
                f'write {read}, or "{node.value}" for text'
            )
        if isinstance(read, float) and not abs(read) < math.inf:
            raise ValueError(f"{place}: {node.value} is no finite number")
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _check_nodes(path, each)
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise ValueError(f"{path}:{line}: the key {key!r:.80} stands in line {seen[key]} already")
            seen[key] = line
            _check_nodes(path, key_node)
            _check_nodes(path, value_node)


def _check_env(path: Path, line: int, env: Any) -> None:
    if not isinstance(env, dict):
        raise ValueError(f"{path}:{line}: env must hold `NAME: value` lines, got {env!r:.80}")
    refused = sorted(f"{name!s:.40}" for name in set(env) - set(ALLOWED_ENV))
    if refused:
        raise ValueError(
            f"{path}:{line}: env may not set {', '.join(refused[:5])}; set it in the shell if you mean it. A file may "
            f"set {', '.join(ALLOWED_ENV)}"
        )


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can stand for a field of this type; True for types it does not know."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if hint is type(None):
        return value is None
    if hint in (int, float) and isinstance(value, str):  # YAML reads 3e-4 as text
        try:
            return abs(hint(value)) < math.inf
        except ValueError:
            return False
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
    if typing.get_origin(hint) is list:
        return "a list ([a, b])"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, str(hint))


def check_writable(path: Path) -> None:
    """Make the folders that a file needs. Raises ValueError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}. Name another file") from error
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file to write, such as -o {path / 'report.html'}")
