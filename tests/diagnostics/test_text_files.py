"""Files of texts: kinds by suffix whatever its case, names that look like patterns, cells that stay text."""

import pytest

from klft.diagnostics.loading import read_texts

LINE = '{"text": "the cat sat"}\n'


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "p[1].jsonl", "q*.jsonl"])
def test_one_json_object_per_line(name, tmp_path):
    (tmp_path / name).write_text(LINE)
    for other in ("p1.jsonl", "q2.jsonl"):  # what the names would match as patterns
        (tmp_path / other).write_text('{"text": "another file"}\n')
    assert read_texts(str(tmp_path / name)) == ["the cat sat"]


@pytest.mark.parametrize(
    "cells", [["007", "010"], ["NA", "null", "the cat"], ["1e5", "True", ""], ['a "b", c', "d\ne"]]
)
def test_cells_of_a_csv_stay_text(cells, tmp_path):
    quoted = "".join('"' + cell.replace('"', '""') + '"\n' for cell in cells)
    (tmp_path / "a.CSV").write_text("text\n" + quoted)
    assert read_texts(str(tmp_path / "a.CSV")) == cells


def test_a_csv_of_pairs_and_a_large_cell(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,more\np,c,1\n" + "x" * 200_000 + ",c\n")
    assert read_texts(str(tmp_path / "a.csv")) == [
        {"prompt": "p", "completion": "c"}, {"prompt": "x" * 200_000, "completion": "c"},
    ]  # fmt: skip


def test_a_csv_without_rows(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ValueError, match="is empty"):
        read_texts(str(tmp_path / "a.csv"))
