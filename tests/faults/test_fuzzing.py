"""A thousand damaged files of each reader's kind: each ends in a result or one line, none hangs, none runs code.

Run as a script, this file reads the files of one kind and says what came of each; a crash of the interpreter is seen.
"""

import collections
import io
import json
import random
import signal
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import conftest  # noqa: F401 - also for the script
import pyarrow.parquet as pq
import pytest
from support.processes import python
from support.tables import rows_of, table_of

from klft import PPOConfig
from klft.arguments import check_yaml, hints, one_line_errors
from klft.diagnostics import Metadata, write_records, write_report
from klft.diagnostics.loading import read_prompts, read_texts

PER_KIND, SECONDS = 200, 20
ROWS = [
    {"prompt": "The café is", "completion": " open."}, {"prompt": "naïve 😀", "completion": " ok\u2028"},
    {"prompt": "", "completion": "x" * 300}, {"prompt": "a,b;\"c\"", "completion": "\t"},
]  # fmt: skip
YAML = (
    "kl_coef: 0.05\nreport_to: none\nreward_weights: [1.0, 2]\nseed: 7\ngeneration_kwargs: {min_p: 0.1}\nenv: {A: b}\n"
)
CODE = "x: !!python/object/apply:os.system ['touch ran']\n"
SPLICES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 3000, b'{"a":' * 2000, b"&a [*a, *a]", b"!!python/name:os.system ",
    b"1e999",
    b"\r", b"\x1b[2J", b"null", b"-" * 50, b'"', b"\xe2\x80\xa8", CODE.encode(),
    b"__import__('os').system('touch ran')",
]  # fmt: skip


def seeds(folder):
    """A file of each kind that is right."""
    table = table_of(rows_of(sequences=6))
    write_records(table, folder / "table.parquet", Metadata())
    pq.write_table(table, folder / "bare.parquet")
    lines = "\n".join(json.dumps(row) for row in ROWS)
    return {
        "yaml": YAML.encode(),
        "records": (folder / "table.parquet").read_bytes(),
        "parquet": (folder / "bare.parquet").read_bytes(),
        "jsonl": lines.encode(),
        "json": json.dumps(ROWS).encode(),
        "csv": ("prompt,completion\n" + "\n".join(f'"{r["prompt"]}",x' for r in ROWS)).encode(),
        "txt": "\n".join(r["prompt"] for r in ROWS).encode(),
    }


def damaged(data, rng):
    """The bytes after one to four accidents."""
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 1, 4, 30])
        data = rng.choice([
            lambda: data[:at] + bytes(rng.randrange(256) for _ in range(size)) + data[at + size :],  # noqa: B023
            lambda: data[:at] + data[at + size :],  # noqa: B023
            lambda: data[:at] + data[at : at + size] * 3 + data[at + size :],  # noqa: B023
            lambda: data[:at],  # noqa: B023
            lambda: data[:at] + rng.choice(SPLICES) + data[at:],  # noqa: B023
        ])()  # fmt: skip
    return data


def read(kind, path, folder):
    if kind == "yaml":
        check_yaml(path, hints(PPOConfig))
    elif kind in ("records", "parquet"):
        write_report(path, folder / "page.html", sequences=3, tokens=20)
    else:
        read_texts(str(path))
        read_prompts(str(path))


def outcome(kind, path, folder):
    """What came of a file: "read", the one line, or else what a user would see of the inside."""
    told = io.StringIO()
    signal.alarm(SECONDS)
    try:
        with redirect_stderr(told), one_line_errors():
            read(kind, path, folder)
        return "read"
    except SystemExit as end:
        lines = [line for line in told.getvalue().splitlines() if line.startswith("error: ")]
        said = lines[-1] if lines else told.getvalue()
        clean = end.code == 2 and len(lines) == 1 and "\x1b" not in said and "\0" not in said and len(said) < 1200
        return "one line" if clean and str(path.name) in said else f"UNCLEAR: {said[-300:]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)


def slow(*_):
    raise TimeoutError(f"longer than {SECONDS} s")


def script(kind, folder):
    signal.signal(signal.SIGALRM, slow)
    seed, suffix = seeds(folder)[kind], "parquet" if kind == "records" else kind
    for number in range(PER_KIND):
        rng = random.Random(f"{kind} {number}")
        path = folder / f"{number}.{suffix}"
        path.write_bytes(damaged(seed, rng))
        print("reading", number, flush=True)
        started = time.monotonic()
        came = outcome(kind, path, folder)
        print("came", json.dumps([number, came, time.monotonic() - started]), flush=True)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["yaml", "records", "parquet", "jsonl", "json", "csv", "txt"])
def test_damaged_files_end_in_a_result_or_one_line(tmp_path, kind):
    ended = python(__file__, kind, tmp_path, timeout=500, cwd=tmp_path)
    lines = [line for line in ended.stdout.splitlines() if line.startswith(("reading ", "came "))]
    assert ended.returncode == 0, (lines[-1:], ended.stderr[-2000:])
    came = [json.loads(line.removeprefix("came ")) for line in lines if line.startswith("came ")]
    assert len(came) == PER_KIND
    wrong = [each for each in came if each[1] not in ("read", "one line")]
    assert not wrong, "\n".join(map(str, wrong[:20]))
    counts = collections.Counter(each[1] for each in came)
    assert counts["one line"] >= (20 if kind != "txt" else 1)
    assert not list(tmp_path.glob("**/ran"))


if __name__ == "__main__":
    script(sys.argv[1], Path(sys.argv[2]))
