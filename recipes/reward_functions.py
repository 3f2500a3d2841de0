"""Reward functions by name: `module:function`, or `file.py:function`. Imports nothing heavy."""

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from klft.choices import similar_name
from klft.writing import did_you_mean


def is_function(reward: str) -> bool:
    """Whether a --reward names a function rather than a reward model; a model's path may have a colon in it too."""
    return reward.endswith(".py") or (":" in reward and not Path(reward).exists())


@functools.cache
def load_function(reward: str) -> Any:
    """The function that a --reward names. ImportError or TypeError that says what is wrong with it."""
    source, _, name = reward.rpartition(":")
    if not source:
        raise ImportError(f"--reward {reward}: name the function in it too, as {reward}:my_reward")
    try:
        if source.endswith(".py"):
            module = _run_file(Path(source))
        else:
            sys.path.insert(0, str(Path.cwd()))  # so that my_module.py may lie where the recipe is launched
            module = importlib.import_module(source)
        function = functools.reduce(_member, name.split("."), module)
    except SyntaxError as error:
        raise ImportError(f"--reward {reward}: {error.filename}:{error.lineno}: {error.msg}") from error
    except SystemExit as error:
        reason = "keep what it does as a script under `if __name__ == '__main__':`"
        raise ImportError(f"--reward {reward}: its module exits (code {error.code}): {reason}") from error
    except Exception as error:  # whatever a module does when it is imported
        raise ImportError(f"--reward {reward}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise TypeError(f"--reward {reward} is no function, but a {type(function).__name__}")
    return function


def _run_file(path: Path) -> Any:
    """The module of a file, which need not be on sys.path; what lies beside it can be imported from it."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}{similar_name(path)}")
    if str(path.parent.resolve()) not in sys.path:
        sys.path.append(str(path.parent.resolve()))
    name = f"reward_file_{path.stem}"  # a file json.py is not to stand in for another module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # it ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def _member(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        functions = [n for n, value in vars(owner).items() if callable(value)]
        raise AttributeError(f"there is no {name!r} in it{did_you_mean(name, functions)}")
    return getattr(owner, name)
