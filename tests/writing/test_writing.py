"""One atomic writer and one escape for everything klft writes."""

import io
import json
import os

import pytest
import torch
from rich.console import Console
from support import tiny

from klft.diagnostics import Metadata, records_table, visible, write_records, write_report
from klft.ppo import checkpoint
from klft.ppo.completions import plain, show_completions
from klft.scores import TokenScores
from klft.writing import atomic_write, escaping_output, sync_folder


def table():
    scores = TokenScores(logp=torch.zeros(1, 3), ref_logp=torch.zeros(1, 3), reverse_kl=torch.ones(1, 3))
    return records_table(scores, torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.bool), tiny.tokenizer())


def records(folder):
    return write_records(table(), folder / "tokens.parquet", Metadata())


def report(folder):
    return write_report((table(), Metadata()), folder / "report.html")


def completions(folder):
    show_completions([{"prompt": "p", "completion": "c", "score": 1.0, "sequence_kl": 0.5}], 3, folder, 0)
    return folder / "completions" / "completions_00003.parquet"


def plain_file(folder):
    with atomic_write(folder / "a.bin") as file:
        file.write(b"whole")
    return folder / "a.bin"


def committed(folder):
    unfinished = folder / "tmp-checkpoint-1"
    unfinished.mkdir(exist_ok=True)
    (unfinished / "weights").write_bytes(b"x")
    checkpoint.commit(unfinished, folder / "checkpoint-1", "a run")
    return folder / "checkpoint-1"


WRITERS = [records, report, completions, plain_file, committed]


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_everything_reaches_the_disk_before_it_gets_its_name(write, tmp_path, monkeypatch):
    synced, fsync, replace, rename = [], os.fsync, os.replace, os.rename

    def watch(descriptor):
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def named(move):
        def moved(source, target):
            source = os.path.realpath(source)
            assert any(each == source or each.startswith(source + os.sep) for each in synced), (
                f"{source} is not on disk"
            )
            move(source, target)

        return moved

    monkeypatch.setattr(os, "fsync", watch)
    monkeypatch.setattr(os, "replace", named(replace))
    monkeypatch.setattr(os, "rename", named(rename))
    written = write(tmp_path)
    assert written.exists()
    assert os.path.realpath(written.parent) in synced, "the folder's new entry is not on disk"


@pytest.mark.parametrize("write", [records, report, completions, plain_file], ids=lambda f: f.__name__)
def test_a_full_disk_leaves_what_was_there(write, tmp_path, monkeypatch):
    path = write(tmp_path)
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_windows_flushes_only_what_is_open_for_writing_and_opens_no_folder(tmp_path, monkeypatch):
    import fcntl

    fsync, opened = os.fsync, os.open

    def strict(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        fsync(descriptor)

    def no_folders(path, flags, *mode, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *mode, **more)

    monkeypatch.setattr(os, "fsync", strict)
    monkeypatch.setattr(os, "open", no_folders)
    for write in WRITERS:
        assert write(tmp_path).exists()
    assert json.loads((tmp_path / "checkpoint-1" / checkpoint.MARKER).read_text())["files"] == {"weights": 1}


NASTY = "\x1b[31m\0\n\t\x7f\x9b\u200b\u2066\u202e\ufeff\ud83d a é 日 \U0001f600 \U000e0041"


def test_the_terminal_has_one_alphabet_of_escapes():
    buffer = io.StringIO()
    Console(file=buffer, width=300).print(plain(NASTY))
    assert buffer.getvalue().rstrip("\n") == visible(NASTY)
    assert visible(NASTY).isprintable()


def test_what_a_console_cannot_show_is_escaped(monkeypatch):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii", errors="strict")
    monkeypatch.setattr("sys.stdout", stream)
    with escaping_output():
        print("a → 数")
    stream.flush()
    assert written.getvalue() == b"a \\u2192 \\u6570\n"
    assert stream.errors == "strict"


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    """Windows refuses to open a folder; some file systems refuse to flush one."""
    real = os.open

    def refuse(path, *more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more)

    monkeypatch.setattr(os, "open", refuse)
    sync_folder(tmp_path)
    monkeypatch.undo()

    def no_such_call(_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", no_such_call)
    sync_folder(tmp_path)
