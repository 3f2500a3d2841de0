"""Old names that still work, with a DeprecationWarning that names the new one."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def moved(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__`: name -> the module it moved to, or "module:new name"."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = names[name].partition(":")
        new = new or name
        warnings.warn(f"{module}.{name} is deprecated: use {place}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(place), new)

    return find
