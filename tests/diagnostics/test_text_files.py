"""Files of texts: kinds by suffix whatever its case, names that look like patterns, cells that stay text."""

import json

import datasets
import pytest
from datasets import Dataset
from support import tiny

from klft.diagnostics.loading import read_prompts, read_texts

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


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\ntwo\u2028still two\r\nthree", ["one", "", "two\u2028still two", "three"]),
        ("a.txt", "\ufeffbyte order mark\n", ["byte order mark"]),
        ("README", "no suffix\n", ["no suffix"]),
        ("a.jsonl", '{"text": "one"}\n{"text": null}\n', ["one", ""]),
        ("a.json", '[{"text": "one", "n": 1}, {"text": "two", "n": 2}]', ["one", "two"]),
        ("a.csv", "n,text\n1,one\n2,=cmd()\n", ["one", "=cmd()"]),
        ("a.jsonl", '{"prompt": "p", "completion": "c"}\n', [{"prompt": "p", "completion": "c"}]),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "\\u0000"}]}\n',
            [{"messages": [{"role": "user", "content": "\0"}]}],
        ),
    ],
)
def test_texts_are_read(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert read_texts(str(tmp_path / name)) == expected
    assert read_texts(str(tmp_path / name), max_texts=1) == expected[:1]


def test_a_column_can_be_named_and_a_parquet_file_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny.Dataset.from_dict({"text": ["a", "b"], "other": ["c", "d"]}).to_parquet(tmp_path / "a.parquet")
    assert read_texts(str(tmp_path / "a.parquet")) == ["a", "b"]
    assert read_texts(str(tmp_path / "a.parquet"), column="other") == ["c", "d"]
    assert read_texts(str(tmp_path)) == ["a", "b"]  # a folder is a dataset


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"good\n\xff\xfe", "is not UTF-8 text: invalid start byte at byte 5"),
        ("a.txt", b"\0\0\0\0", "is binary"),
        ("a.txt", None, "a.txt: there is no such file"),
        ("a.jsonl", None, "there is no such file"),
        ("a.jsonl", b"", "a.jsonl"),
        ("a.jsonl", b'{"text": "cut of', "a.jsonl: line 1 is no JSON: Unterminated string starting at$"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": secret}\n', "a.jsonl: line 3 is no JSON: Expecting value$"),
        ("a.jsonl", b'"a"\n', "a.jsonl: line 1 is no JSON object$"),
        ("a.parquet", b"PAR1 cut off", "a.parquet"),
        ("a.jsonl", b'{"words": "one"}\n', r"no column 'text', or 'prompt' and 'completion'.*it has \['words'\]"),
    ],
)
def test_files_that_are_no_texts_are_named(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_texts(str(tmp_path / name))


def test_a_dataset_by_name_offline_and_nonsense_counts(tmp_path):
    with pytest.raises(ValueError, match=r"^some/dataset: [^\n]+$"):
        read_texts("some/dataset")
    with pytest.raises(ValueError, match="max_texts must be at least 1"):
        read_texts(str(tmp_path), max_texts=0)


# ---- prompts, as PPO's recipe takes them ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.csv", "a.CSV", "a.parquet", "p[1].csv"]
)
def test_prompts_of_a_file(name, tmp_path):
    suffix = name.lower().rsplit(".", 1)[1]
    rows = {"prompt": ["007", "the cat"], "product": ["1e5", "NA"]}
    if suffix == "csv":
        (tmp_path / name).write_text("prompt,product\n007,1e5\nthe cat,NA\n")
    elif suffix == "parquet":
        Dataset.from_dict(rows).to_parquet(tmp_path / name)
    else:
        lines = [json.dumps({"prompt": p, "product": q}) for p, q in zip(*rows.values(), strict=True)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    found = read_prompts(str(tmp_path / name))
    assert found.to_dict() == rows


def test_prompts_of_a_text_file(tmp_path):
    (tmp_path / "a.TXT").write_text("the cat\n007\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "a.TXT")).to_dict() == {"prompt": ["the cat", "007"]}


def test_prompts_of_another_column(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,question,answer\nno,the cat,1\n")
    found = read_prompts(str(tmp_path / "a.csv"), column="question")
    assert found.to_dict() == {"prompt": ["the cat"], "answer": ["1"]}
    with pytest.raises(ValueError, match=r"no column 'questoin'; it has .*'answer'\]. Did you mean 'question'\?"):
        read_prompts(str(tmp_path / "a.csv"), column="questoin")


@pytest.mark.parametrize(("name", "content", "said"), [
    ("missing.csv", None, "missing.csv.*no such file"), ("missing.txt", None, "missing.txt.*no such file"),
    ("a.csv", "text,more\nthe cat,1\n", r"a.csv has no column 'prompt'; it has \['text', 'more'\]"),
    ("a.jsonl", '{"text": "the cat"}\n', r"a.jsonl has no column 'prompt'; it has \['text'\]"),
    ("a.jsonl", "", "a.jsonl is empty"), ("a.json", "", "a.json is empty"),
    ("a.csv", "prompt\n", "a.csv is empty"), ("a.txt", "", "a.txt is empty"),
    ("a.parquet", "no parquet", "a.parquet"),
])  # fmt: skip
def test_files_without_prompts_are_named(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(error.value)
