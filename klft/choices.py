"""What arguments may be, where no library is needed to tell: the command line says it before it imports any."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from klft.writing import did_you_mean

LEAST_TEMPERATURE = 1e-3
TURNS = ("last", "all")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SUFFIXES = (".html", ".parquet", ".json", ".md")
BUILDERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}
"""Files of rows by suffix, and how the datasets library calls their kind."""


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless it is finite and at least LEAST_TEMPERATURE: logits are divided by it.

    Below, what was sampled is in fp32 the likeliest token alone, whose KL to anything is infinite or 0.
    """
    if not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature must be finite and >= {LEAST_TEMPERATURE}, got {temperature}: logits are divided by it, "
            "and with less only the likeliest token is left. Give the one that the tokens were sampled at, or 1"
        )


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError for what is none of the known values, such as those of TURNS and DTYPES."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_suffix(path: str | os.PathLike) -> Path:
    """The path. Raises ValueError for a suffix that `Comparison.save` does not know."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}, which says what to write")
    return path


def is_text_file(name: str | os.PathLike) -> bool:
    """Whether this names a file of texts: it is there, or has the suffix of one."""
    return os.path.isfile(name) or Path(name).suffix.lower() in (".txt", *BUILDERS)


def check_there(name: str | os.PathLike) -> None:
    """Raise ValueError for an empty file, and, with a similar name, where there is neither a file nor a folder."""
    if not os.path.exists(name):
        raise ValueError(f"{name}: there is no such file{similar_name(name)}")
    if os.path.isfile(name) and not os.path.getsize(name):
        raise ValueError(f"{name} is empty: there is no text in it")


def similar_name(name: str | os.PathLike, kind: Callable[[Path], bool] = Path.exists) -> str:
    """ ". Did you mean ...?" with what beside it has the most similar name, and is of this kind; "" for none."""
    path = Path(name)
    beside = [each.name for each in path.parent.iterdir() if kind(each)] if os.path.isdir(path.parent) else []
    return did_you_mean(path.name, beside, lambda found: repr(str(path.parent / found)))
