"""Files that appear whole or not at all, and text that is safe to print. Standard library only."""

import difflib
import functools
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to. `path` holds all of it once the block has ended, and what it held before otherwise.

    Flushed to disk before it is renamed, so a crash of the machine leaves the old file or the new one, never a part.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


KL_FILES = ("kl/*.parquet", "kl/report.html")  # a run's token tables and its page, below its output_dir


def check_unused(folder: Path, patterns: Sequence[str], ways_out: str) -> None:
    """Raise ValueError where an earlier run left files in `folder`: a second one's among them would be read as its."""
    found = [path.relative_to(folder).as_posix() for pattern in patterns for path in sorted(folder.glob(pattern))]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"{folder} holds another run: {', '.join(found[:3])}{more}. {ways_out}")


def remove_files(folder: Path, patterns: Sequence[str]) -> None:
    """Remove the files and folders that `check_unused` names, and nothing else."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync_file(path: Path) -> None:
    """Flush a file that another library wrote to disk."""
    with path.open("rb+") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a crash. Windows has no such call, and needs none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some file systems have no such call for a folder either
    finally:
        os.close(descriptor)


@contextmanager
def escaping_output() -> Iterator[None]:
    """Characters that the console cannot encode are written as escapes inside, instead of ending the run."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def did_you_mean(name: str, known: Iterable[str], shown: Callable[[str], str] = repr) -> str:
    """ ". Did you mean ...?" with the most similar of the known names, to end an error about `name`; "" for none."""
    close = difflib.get_close_matches(name, known, n=1)
    return f". Did you mean {shown(close[0])}?" if close else ""


def two_digits(value: float) -> str:
    """Two significant digits, of large numbers all before the point: 0.00042, 0.50, 12, 3141."""
    return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:#.2g}".rstrip(".")


def error_line(text: str) -> str:
    """`error: ...`, of 900 characters at most, in which a terminal finds nothing to obey."""
    line = " ".join(text.split())
    return f"error: {visible(line if len(line) < 900 else line[:900] + ' ...')}"


def print_error(text: str) -> None:
    """Its error_line on stderr."""
    print(error_line(text), file=sys.stderr)


def one_line(said: Callable[[Any], str]) -> Callable[[Any], str]:
    """A `__repr__`, Class(what `said` gives), that never raises: Class(...) of a half-built object, say."""

    @functools.wraps(said)
    def shown(self: Any) -> str:
        try:
            text = visible(" ".join(said(self).split()))
        except Exception:  # whatever it is, a debugger or an error's own message asked
            text = "..."
        return f"{type(self).__name__}({text})"

    return shown


def visible(text: str) -> str:
    """Text with every control, format and invisible character escaped (\\x1b, \\u202e): safe for a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def visible_lines(text: str) -> str:
    """The same with line breaks kept: a traceback's text."""
    return "\n".join(map(visible, text.split("\n")))
