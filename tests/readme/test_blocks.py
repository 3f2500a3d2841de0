"""Every Python block of README.md and docs/ runs as it is pasted: a script of its own, with its imports.

Models that it loads by name are tiny ones; data it reads is a reader's own prompts.jsonl, texts.jsonl, prompts.txt.
"""

import json
import re
from pathlib import Path

import pytest
from support import commands, tiny
from transformers import TrainingArguments

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [(path.name, block) for path in DOCUMENTS for block in commands.blocks(path.read_text(), "python", "py")]
LOADED = re.compile(r"""(?:from_pretrained\(|\w+Trainer\(|\bmodel=)\s*["']([\w./-]+)["']""")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A causal LM and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.llama(0, max_position_embeddings=512).save_pretrained(folder)
    tiny.tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture
def desk(tmp_path, checkpoint, monkeypatch):
    """A reader's folder; a function puts the models into it that a block names."""
    rows = [{"prompt": f"w{i % 26} w{i * 7 % 26}", "completion": f" w{i * 5 % 26} w3 w4"} for i in range(64)]
    texts = [{"text": row["prompt"] + row["completion"]} for row in rows]
    for name, lines in {"prompts.jsonl": rows, "texts.jsonl": texts}.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "prompts.txt").write_text("".join(row["prompt"] + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    finish = TrainingArguments.__post_init__

    def on_this_machine(self):  # TRL's configurations ask for bf16 on a GPU
        self.use_cpu = self.use_cpu or tiny.ON_CPU
        finish(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_this_machine)

    def put(block):
        for name in set(LOADED.findall(block)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).symlink_to(checkpoint)

    return put


def test_there_are_blocks():
    assert len(BLOCKS) >= 5


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BLOCKS)])
def test_a_block_runs_as_it_is_pasted(name, block, desk):
    desk(block)
    exec(compile(block, name, "exec"), {"__name__": "__main__"})
