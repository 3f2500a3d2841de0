"""Files that appear whole or not at all, and text that is safe to print. Standard library only."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


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


def visible(text: str) -> str:
    """Text with every control, format and invisible character escaped (\\x1b, \\u202e): safe for a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
