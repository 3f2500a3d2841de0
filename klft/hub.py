"""Where a model's name leads: a folder, the hub's cache, the hub. Light to import: what is wrong is said at once."""

import functools
import os  # os.path, not Path: a name may be too long for a file, or hold a NUL
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from klft.choices import similar_name

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
HUB_TIMEOUT = 5.0  # seconds in which the hub answers, or is not asked: the libraries would try again for a minute
CONFIGS = ("config.json", "adapter_config.json")  # one of them is in every model's folder


@functools.cache
def reachable(hub: str) -> bool:
    """Whether the hub answers at all, be it with an error."""
    try:
        with urlopen(Request(hub, method="HEAD"), timeout=HUB_TIMEOUT):
            return True
    except HTTPError:
        return True
    except (OSError, ValueError):
        return False


def _address() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _offline() -> str | None:
    """The variable by which the user has said that the hub is not to be asked."""
    return next((v for v in OFFLINE if os.environ.get(v, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def unreachable(name: str) -> bool:
    """Whether `name` is for the hub, which does not answer: then only what is in the cache can be loaded."""
    return not (_offline() or os.path.exists(name) or _is_path(name)) and not reachable(_address())


def _is_path(name: str) -> bool:
    """Whether a name cannot be a hub id, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


def where_to(name: str) -> str:
    """What is known of a name that could not be loaded, to stand before the library's words; "" of one that exists."""
    if os.path.exists(name):
        return ""
    if variable := _offline():
        return f"there is no such folder, and {variable} is set, so the hub is not asked: "
    return f"there is no such folder, and {f'the hub ({_address()}) does not answer: ' if unreachable(name) else ''}"


def nowhere(name: str, ask: bool = False) -> str:
    """Why a name leads nowhere, or "". `ask`: whether the hub may be asked if it is there."""
    if os.path.exists(name) or _in_cache(name):
        return ""
    if _is_path(name):
        return f"there is no such folder{similar_name(name, Path.is_dir)}"
    if _offline() or (ask and unreachable(name)):
        return f"{where_to(name)}it is not in its cache, {_cache()}{similar_name(name, Path.is_dir)}"
    return ""


def check_model_name(name: str | os.PathLike, role: str) -> None:
    """Raise ValueError, which `role` begins, for a name that leads nowhere. The hub is not asked."""
    name = str(name)
    path = Path(name)
    if os.path.isfile(name):
        raise ValueError(f"{role} {name}: it is a file; name the folder of a model")
    if os.path.isdir(name) and not any((path / each).exists() for each in CONFIGS):
        inside = sorted((each.parent for c in CONFIGS for each in path.glob(f"*/{c}")), key=lambda p: p.stat().st_mtime)
        way_out = f". Did you mean {str(inside[-1])!r}?" if inside else ""
        raise ValueError(f"{role} {name}: the folder holds no model (no {' and no '.join(CONFIGS)}){way_out}")
    if reason := nowhere(name):
        raise ValueError(f"{role} {name}: {reason}")


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _in_cache(name: str) -> bool:
    return not _is_path(name) and os.path.isdir(_cache() / "--".join(("models", *name.split("/"))))
