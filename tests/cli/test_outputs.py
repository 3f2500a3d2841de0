"""What a command writes is there before it prints: a closed pipe, or a full disk behind `>`, costs no result."""

import os
import subprocess
import sys

import pytest
from support import tiny
from support.processes import environment


@pytest.fixture
def folder(tmp_path):
    for name, model in {"policy": tiny.llama(), "reference": tiny.llama(5)}.items():
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "texts.txt").write_text("w1 w2 w3\n")
    return tmp_path


def ended(arguments, folder, kind, unbuffered=""):
    """(exit code, stderr) of a command whose stdout takes nothing; "": Python keeps it until the end, as for a pipe."""
    if kind == "full disk" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    read, write = os.pipe()
    os.close(read)
    stdout = os.open("/dev/full", os.O_WRONLY) if kind == "full disk" else os.dup(write)
    done = subprocess.run(
        [sys.executable, "-m", "klft", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=folder,
        env=environment(PYTHONUNBUFFERED=unbuffered), timeout=200,
    )  # fmt: skip
    os.close(write)
    os.close(stdout)
    return done.returncode, done.stderr


ENDS = {"closed pipe": (1, ""), "full disk": (1, "error: OSError: [Errno 28] No space left on device\n")}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("command", ["--version", "--help"])
def test_what_cannot_be_printed_is_one_line_at_most(command, kind, unbuffered, tmp_path):
    assert ended([command], tmp_path, kind, unbuffered) == ENDS[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENDS)
def test_the_page_is_there_when_nothing_can_be_printed(kind, folder):
    command = ["diff", "policy", "reference", "--texts", "texts.txt", "-o", "page.html"]
    code, error = ENDS[kind]
    assert ended(command, folder, kind) == (code, "scoring 1 texts\n" + error)
    assert (folder / "page.html").stat().st_size > 10_000
