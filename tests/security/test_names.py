"""Whatever things are called, files have klft's own names: no name that is given becomes one, or a part of one."""

import ast
from pathlib import Path

import pytest
from support import tiny

from klft.diagnostics import Metadata, TokenKLLog, read_records, score_texts, write_records, write_report

ROOT = Path(__file__).parents[2]
HOSTILE = ["../../up", "/tmp/abs/olute", "a/b\\c", "nul\0nul", "..", "x" * 5000, "*?[a]", "\x1b[31m\u202e", "con: |"]
OURS = (
    "checkpoint-1/*", "checkpoint-1/klft/*", "kl/tokens_000001-r0.parquet", "kl/report.html", ".klft.lock",
    "completions/completions_00001.parquet",
)  # fmt: skip
# What stands between the braces of a file's name anywhere in klft/: numbers, and names of files that klft itself gave.
PARTS = {
    "folder.name", "final.name", "path.name", "state.global_step", "self.state.global_step", "state.best_global_step",
    "n", "rank", "step:05d", "self._step:06d", "self._rank", "len(names):05d", "os.getpid()", "suffix",
}  # fmt: skip


def named(rewards, name):
    rewards.__name__ = name
    return rewards


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_run_writes_under_its_own_names(name, tmp_path):
    def judge(completions, log_metric, log_extra, **_):
        log_metric(name, 1.0)
        log_extra(name, [0.5] * len(completions))
        return [0.0] * len(completions)

    run_folder, column = tmp_path / "a" / "b" / "run", name.replace("\0", "")  # which datasets cuts there
    model = tiny.llama()
    model.config._name_or_path = name
    run = tiny.trainer(
        run_folder, model, named(judge, name), tiny.prompts(**{column: ["w1"] * 64}),
        given={"eval_dataset": {name: tiny.prompts(8)}}, max_steps=1, run_name=name, save_strategy="steps",
        save_steps=1.0, eval_strategy="steps", eval_steps=1, kl_log_tokens=1, log_completions=True,
    )  # fmt: skip
    run.train()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert [p for p in files if not any(p.match(f"{run_folder}/{own}") for own in OURS)] == []
    assert f"eval_{name}_reward/{name}/mean" in {key for row in run.state.log_history for key in row}


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_tables_and_pages_too(name, tmp_path):
    (batch,) = score_texts(tiny.llama(), tiny.llama(5), tiny.tokenizer(), ["w1 w2 w3"], batch_size=1, max_length=32)
    names = {"model": name, "reference": name}
    with TokenKLLog(tmp_path / "run", tiny.tokenizer(), **names) as log:
        log.add(batch.scores, batch.token_ids, batch.mask, step=3)
    table, metadata = read_records(tmp_path / "run")
    assert metadata.model == name
    write_report((table, metadata), tmp_path / "page.html")
    write_records(table, tmp_path / "table.parquet", Metadata.of(table, tiny.tokenizer(), **names))
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["page.html", "run/kl/tokens_000003-r0.parquet", "table.parquet"]


def filled(root):
    """(file:line, part) of all that is filled into a path's name: `folder / f"...{part}..."`, `.with_name(f"...")`."""
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                names = [node.right]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".with_name", ".joinpath", "Path")):
                names = node.args
            else:
                continue
            for part in [part for name in names if isinstance(name, ast.JoinedStr) for part in name.values]:
                if isinstance(part, ast.FormattedValue):
                    yield f"{path.name}:{node.lineno}", ast.unparse(ast.JoinedStr([part]))[3:-2]


def test_no_name_of_somebody_elses_is_part_of_a_files():
    found = dict(filled(ROOT / "klft"))
    assert len(found) > 5
    assert {where: part for where, part in found.items() if part not in PARTS} == {}
