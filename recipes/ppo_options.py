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
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from reward_functions import is_function, load_function

from klft.arguments import LARGEST_YAML, check_options, check_yaml, command_line, hints
from klft.hub import check_model_name
from klft.writing import did_you_mean

FILES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# Types as the classes below declare them, of which a text can be read at once.
TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}
QUANTISATION = {
    "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage",
}  # fmt: skip
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
    return {
        str(name): value if isinstance(value, list) else [value] for name, value in of_file.items() if value is not None
    } | named


def check_used(unused: set[str], *configs: Any, why: str = "does nothing in this recipe: leave it out") -> None:
    """Raise ValueError for an option that has no use, where it is not at its default."""
    for config in configs:
        for option in dataclasses.fields(config):
            if option.name in unused and getattr(config, option.name) != option.default:
                raise ValueError(f"--{option.name} {why}")


def wants_help() -> bool:
    """Whether the options are to be listed instead."""
    return any(option in sys.argv[1:] for option in ("-h", "--help", "--help-all"))


def declared(module: str, file: str, name: str) -> dict[str, Any]:
    """Field -> type of a dataclass as its source has it, Any where that is none of TYPES. Nothing is imported."""
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or []:
        with suppress(OSError):
            for node in ast.parse((Path(folder) / file).read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
                    return {ast.unparse(f.target): TYPES.get(ast.unparse(f.annotation), Any) for f in fields}
    raise LookupError(name)


def all_fields(*classes: type) -> dict[str, Any]:
    """Field -> type of a recipe: those of `classes`, of PPOConfig, and of the Trainer's arguments."""
    ours, trainers = declared("klft", "ppo/config.py", "PPOConfig"), ("transformers", "training_args.py")
    return declared(*trainers, "TrainingArguments") | ours | {n: h for c in classes for n, h in hints(c).items()}


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
    missing = [name for name in required if not any(name.startswith(option) for option in options if option)]
    if missing and not smoke:
        listed = [f"--{name} ({required[name]})" for name in missing]
        raise ValueError(f"recipes/ppo.py needs {'; '.join(listed)}. --smoke runs with made-up ones")


def check_files() -> None:
    """Raise ValueError for a file or model that is not there, or lacks the column; ImportError for no reward."""
    options = given_options()
    for name in map(str, options.get("prompts", [])):
        if Path(name).suffix.lower() in FILES and not Path(name).is_file():
            raise ValueError(f"--prompts {name}: there is no such file")
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
    """Raise ValueError for a number that is out of range, and for an unknown choice, by the rules of PPOConfig."""
    from klft.ppo.fields import VALIDATORS

    with suppress(LookupError):
        fields = all_fields(*classes)
        for name, values in given_options().items():
            kinds = TYPES.items()
            kind = next((kind for kind, hint in kinds if hint == fields.get(name) and "bool" not in kind), None)
            if kind is None or name not in VALIDATORS or len(values) != 1:
                continue
            value: Any = values[0]
            with suppress(ValueError):  # then the text is not a number, and is refused as one
                value = {"int": int, "float": float, "str": str}[kind.partition(" ")[0]](value)
            if problem := VALIDATORS[name](value):
                raise ValueError(f"--{name} {problem}")


def parse_light(*classes: type) -> tuple:
    """One instance of each recipe's own class from the command line and --config; PPOConfig's are left for later."""
    from trl import TrlParser

    parser: Any = TrlParser(list(classes), usage=argparse.SUPPRESS, allow_abbrev=False)  # pyright: ignore
    *made, _ = parser.parse_args_and_config(command_line(), return_remaining_strings=True)
    return tuple(made)
