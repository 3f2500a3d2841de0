"""What can be wrong with the options of PPO's recipes, said before torch, transformers and TRL are imported.

They take 4 seconds; a wrong name, file or column is answered in a fraction of one, a wrong number in 2: the rules for
those come with torch. What is let through here is checked once more, with the rest, by PPOConfig and the recipe.
"""

import argparse
import ast
import csv
import dataclasses
import importlib.util
import json
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from reward_functions import is_function, load_function

from klft.arguments import LARGEST_YAML, check_options, check_yaml, command_line, hints, replaced
from klft.choices import is_text_file, similar_name
from klft.hub import check_model_name
from klft.writing import did_you_mean

# Types as the classes below declare them, of which a text can be read at once.
TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}
QUANTISATION = {
    "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage",
}  # fmt: skip
BOOLS = (bool, bool | None)
TYPES |= {f"{name} | None": kind | None for name, kind in TYPES.items()}


def given_options() -> dict[str, list[Any]]:
    """The options of the command line and the file of --config, by name, as they stand there."""
    named: dict[str, list[Any]] = {}
    last: list[Any] = []
    for part in sys.argv[1:]:
        if part.startswith("--"):
            name, equals, value = part[2:].partition("=")
            last = named[name.replace("-", "_")] = [value] if equals else []
        else:
            last.append(part)
    path = Path((named.get("config") or [""])[0])
    in_file: Any = None
    if path.is_file() and path.stat().st_size <= LARGEST_YAML["bytes"]:
        with suppress(yaml.YAMLError, UnicodeDecodeError):  # check_yaml says what is wrong with it
            in_file = yaml.safe_load(path.read_text())
    of_file = in_file if isinstance(in_file, dict) else {}
    gone = {str(name) for name, value in of_file.items() if value is None} | replaced(of_file, named)
    lists = {str(name): value if isinstance(value, list) else [value] for name, value in of_file.items()}
    return {name: value for name, value in lists.items() if name not in gone} | named


def check_used(unused: set[str], *configs: Any, why: str = "does nothing in this recipe: leave it out") -> None:
    """Raise ValueError for an option that has no use, where it is not at its default."""
    for config in configs:
        for option in dataclasses.fields(config):
            if option.name in unused and getattr(config, option.name) != option.default:
                raise ValueError(f"--{option.name} {why}")


@contextmanager
def options_in_errors():
    """Inside, an error that says `name=value` of PPOConfig says `--name value`: its reader has a command line."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, AttributeError) as error:
        fields: dict[str, Any] = {}
        with suppress(LookupError):
            fields = all_fields()

        def as_option(found: re.Match) -> str:
            name, value = found.groups()
            said = value.lower() if value in ("True", "False") else value.strip("'")
            return f"--{name} {said}" if name in fields else found[0]

        text = re.sub(r"(?<![\w-])(\w+)=(True|False|'[^']*'|-?\d+(?:\.\d+)?(?:e-?\d+)?)", as_option, str(error))
        if text == str(error):
            raise
        raise ValueError(text) from error


def wants_help() -> bool:
    """Whether the options are to be listed instead."""
    return any(option in sys.argv[1:] for option in ("-h", "--help", "--help-all"))


def declared(module: str, file: str, name: str) -> dict[str, ast.AnnAssign]:
    """Field -> its statement in the source of a dataclass. Nothing is imported."""
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or []:
        with suppress(OSError):
            for node in ast.parse((Path(folder) / file).read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return {ast.unparse(part.target): part for part in node.body if isinstance(part, ast.AnnAssign)}
    raise LookupError(name)


def ppo_fields() -> dict[str, ast.AnnAssign]:
    """Field -> statement, of PPOConfig and of the Trainer's arguments."""
    of_trainer = declared("transformers", "training_args.py", "TrainingArguments")
    return of_trainer | declared("klft", "ppo/config.py", "PPOConfig")


def all_fields(*classes: type) -> dict[str, Any]:
    """Field -> type of a recipe, Any where that is none of TYPES: of PPOConfig, the Trainer's arguments, `classes`."""
    ours = {name: TYPES.get(ast.unparse(field.annotation), Any) for name, field in ppo_fields().items()}
    return ours | {name: hint for c in classes for name, hint in hints(c).items()}


def defaults() -> dict[str, Any]:
    """Field -> default of PPOConfig, where the source has it as a constant."""
    found: dict[str, Any] = {}
    for name, field in ppo_fields().items():
        given = {each.arg: each.value for each in field.value.keywords} if isinstance(field.value, ast.Call) else {}
        if default := given.get("default", field.value):
            with suppress(ValueError):  # a default_factory, or made from other names
                found[name] = ast.literal_eval(default)
    return found


def check_names(*classes: type) -> None:
    """Raise ValueError for an option that there is not, and for a file that has another or a value of another type."""
    with suppress(LookupError):  # another version keeps them elsewhere
        fields = all_fields(*classes)
        check_options(sys.argv[1:], fields)
        for name in given_options().get("config", [])[:1]:
            check_yaml(Path(name), fields)


def check_required(required: dict[str, str]) -> None:
    """Raise ValueError that names every required option that is missing; a --smoke needs none."""
    options = given_options()
    smoke = options.get("smoke", [False])[-1:] in ([], [True], ["true"], ["True"])
    missing = [name for name in required if name not in options]
    if missing and not smoke:
        listed = [f"--{name} ({required[name]})" for name in missing]
        raise ValueError(f"recipes/ppo.py needs {'; '.join(listed)}. --smoke runs with made-up ones")


def check_files() -> None:
    """Raise ValueError for a file or model that is not there, or lacks the column; ImportError for no reward."""
    options = given_options()
    for name in map(str, options.get("prompts", [])):
        if is_text_file(name) and not Path(name).is_file():
            raise ValueError(f"--prompts {name}: there is no such file{similar_name(name)}")
        check_column(name, str((options.get("prompt_column") or ["prompt"])[0]))
    for name in map(str, options.get("model_name_or_path", [])):
        check_model_name(name, "--model_name_or_path")
    for reward in map(str, options.get("reward", [])):
        if is_function(reward):
            load_function(reward)
        else:
            check_model_name(reward, "--reward")


def check_trackers() -> None:
    """Raise ValueError for a tracker that klft has an extra for and that is not installed."""
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
    for name in map(str, given_options().get("report_to", [])):
        if name in packages and not any(map(importlib.util.find_spec, packages[name])):
            raise ValueError(f"--report_to {name}: it is not installed: pip install klft[{name}], or say none")


def check_column(name: str, column: str) -> None:
    """Raise ValueError where the first row of a .jsonl or .csv has no such column. Without that, none is read."""
    path, columns = Path(name), []
    with suppress(OSError, ValueError, csv.Error):  # what is wrong with the file is said when it is read
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            with path.open() as file:
                columns = list(json.loads(file.readline(1 << 20)))
        elif path.suffix.lower() == ".csv":
            with path.open(newline="") as file:
                columns = next(csv.reader(file), [])
    if columns and column not in columns:
        way_out = did_you_mean(column, columns) or ": name it with --prompt_column" * (column == "prompt")
        where = f"--prompts {name}" + (f" --prompt_column {column}" if column != "prompt" else "")
        raise ValueError(f"{where}: {name} has no column {column!r}; it has {columns}{way_out}")


def check_values(*classes: type) -> None:
    """Raise ValueError for a number that is out of range, an unknown choice, and what contradicts each other, by the
    rules of PPOConfig."""
    from klft.ppo.fields import VALIDATORS, contradictions

    with suppress(LookupError, AttributeError):  # another version keeps them elsewhere
        config: Any = SimpleNamespace(**defaults())
        fields = all_fields(*classes)
        for name, values in given_options().items():
            kind = fields.get(name, Any)
            if kind is Any and isinstance(getattr(config, name, None), str):  # an enum's
                kind = str
            if kind is Any or len(values) > 1 or not (values or kind in BOOLS):
                continue
            value = as_kind(values[0] if values else True, kind)
            setattr(config, name, value)
            if kind not in BOOLS and name in VALIDATORS and (problem := VALIDATORS[name](value)):
                raise ValueError(f"--{name} {problem}")
        if problems := contradictions(config):
            raise ValueError("PPOConfig: " + "; ".join(problems))


def as_kind(value: Any, kind: Any) -> Any:
    """A value of the command line or a file as a type of TYPES; as it is where it cannot be one, which is refused."""
    if kind in BOOLS:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            str(value).lower(), value
        )
    base = next((base for base in (int, float, str) if kind in (base, base | None)), None)
    with suppress(ValueError):
        return value if base is None else base(value)
    return value


def parse_light(*classes: type) -> tuple:
    """One instance of each recipe's own class from the command line and --config; PPOConfig's are left for later."""
    from trl import TrlParser

    parser: Any = TrlParser(list(classes), usage=argparse.SUPPRESS, allow_abbrev=False)  # pyright: ignore
    *made, _ = parser.parse_args_and_config(command_line(), return_remaining_strings=True)
    return tuple(made)
