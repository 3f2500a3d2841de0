"""The demo's world (recipes/reviews.py), in miniature: what it holds, what it promises, and that it is built once."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.processes import environment
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import reviews

SIZES = {"train": 300, "held_out": 200, "train_prompts": 40, "test_prompts": 10}
SETTINGS = yaml.safe_load(reviews.CONFIG.read_text())


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The shipped settings with small sizes and two steps of training."""
    small = SETTINGS | {"sizes": SIZES}
    for part in ("reference", "reward_model"):
        small[part] = SETTINGS[part] | {"training": SETTINGS[part]["training"] | {"max_steps": 2}}
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(small))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory, config):
    return reviews.ensure_world(tmp_path_factory.mktemp("home") / "cache", config)


@pytest.fixture(scope="module")
def written():
    return reviews.write_reviews(SETTINGS["grammar"], SETTINGS["sizes"], random.Random(7))


def test_world_loads_with_auto_classes(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "reference")
    model = AutoModelForCausalLM.from_pretrained(world / "reference")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id != tokenizer.bos_token_id != tokenizer.pad_token_id
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    assert 1e6 < model.num_parameters() < 3e6
    judge = AutoModelForSequenceClassification.from_pretrained(world / "reward_model")
    judge_tokenizer = AutoTokenizer.from_pretrained(world / "reward_model")
    assert judge.config.id2label == {0: "negative", 1: "mixed", 2: "positive"}
    assert judge(**judge_tokenizer(["Great kettle!", "One star."], return_tensors="pt", padding=True)).logits.shape == (
        2,
        3,
    )
    assert judge_tokenizer.get_vocab() != tokenizer.get_vocab()
    text = read(world / "reviews.jsonl")[0]["text"]
    assert judge_tokenizer(text).input_ids != tokenizer(text).input_ids


def test_language_model_tokens_give_the_text_back(world):
    """Nothing stands in front of a prompt, and a prompt's tokens begin the tokens of the review it was cut from."""
    tokenizer = AutoTokenizer.from_pretrained(world / "reference")
    for review in read(world / "reviews.jsonl")[:50]:
        tokens = tokenizer(review["text"] + "<eos>").input_ids
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in tokens[:-1]
        assert tokenizer.decode(tokens[:-1]) == review["text"]
        start = tokenizer(" ".join(review["text"].split()[:4])).input_ids
        assert tokens[: len(start)] == start


def test_files_are_complete_and_prompts_are_beginnings(world):
    rows, train, test = (read(world / f"{name}.jsonl") for name in ("reviews", "prompts_train", "prompts_test"))
    splits = {split: [row["text"] for row in rows if row["split"] == split] for split in ("train", "held_out")}
    assert {split: len(texts) for split, texts in splits.items()} == {"train": 300, "held_out": 200}
    assert len({row["text"] for row in rows}) == len(rows)
    prompts = [row["prompt"] for row in train + test]
    assert len(set(prompts)) == len(prompts) == 50
    assert len(test) == 10
    for prompt in prompts:
        assert 4 <= len(prompt.split()) <= 8
        assert any(text.startswith(prompt + " ") for text in splits["held_out"])


def opinions(mark):
    """Every phrase of the grammar's rules of one lean that has no slot, as the text must hold it."""
    rules = [rule for name, rule in SETTINGS["grammar"]["rules"].items() if name.startswith(mark)]
    return [phrase.lower() for rule in rules for phrase in rule if "{" not in phrase]


def test_labels_agree_with_the_grammar(written):
    """By the text alone: no phrase that is good in a negative review, none that is bad in a positive one."""
    good, bad = (re.compile("|".join(rf"\b{re.escape(text)}(?!\w)" for text in opinions(m))) for m in ("good_", "bad_"))
    for review in written:
        text = review["text"].lower()
        if review["label"] == "positive":
            assert not bad.search(text), text
        elif review["label"] == "negative":
            assert not good.search(text), text
    assert sum(1 for row in written if row["label"] == "positive" and good.search(row["text"].lower())) > 1000


def test_pieces_spell_the_text_and_give_the_label(written):
    for review in written:
        assert "".join(text for text, _ in review["pieces"]) == review["text"]
        leans = {lean for _, lean in review["pieces"]} - {""}
        assert review["label"] == {("good",): "positive", ("bad",): "negative"}.get(tuple(leans), "mixed")


def test_prompts_take_no_side(written):
    sizes = SETTINGS["sizes"]
    prompts = [row["prompt"] for row in reviews.write_prompts(written, sizes, random.Random(7))]
    assert len(set(prompts)) == sizes["train_prompts"] + sizes["test_prompts"]
    loaded = re.compile("|".join(re.escape(text) for mark in ("good_", "bad_", "mixed_") for text in opinions(mark)))
    assert [prompt for prompt in prompts if loaded.search(prompt.lower())] == []


def test_a_seed_gives_its_reviews():
    first, again, other = (reviews.write_reviews(SETTINGS["grammar"], SIZES, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_second_call_does_not_build(world, config, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("it was built again"))
    assert reviews.ensure_world(world.parent, config) == world


def test_an_interrupted_build_leaves_nothing(tmp_path, config, monkeypatch):
    def interrupted(command, **kwargs):
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir()
        (folder / "reviews.jsonl").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reviews.ensure_world(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_other_settings_are_another_world_and_ranks_are_not_passed_on(tmp_path, config, monkeypatch):
    seen = []

    def pretend(command, env, check):
        seen.append(env)
        Path(command[command.index("--output_dir") + 1]).mkdir()

    monkeypatch.setattr(subprocess, "run", pretend)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_CPU", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    assert reviews.ensure_world(tmp_path, config) != reviews.ensure_world(tmp_path)
    left = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_CPU", "OMP_NUM_THREADS"} & set(seen[0])
    assert left == set()
    assert seen[0]["PATH"] == os.environ["PATH"]


def test_smoke(tmp_path):
    command = [sys.executable, reviews.__file__, "--smoke", "true", "--output_dir", str(tmp_path / "world")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "world" / "reference" / "config.json").exists()


def test_an_interrupted_build_ends_in_one_line(tmp_path):
    code = "import os, runpy, signal, sys\nimport transformers\n"
    code += "def stop(*_, **__): os.kill(os.getpid(), signal.SIGINT)\n"
    code += "transformers.set_seed = stop\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    arguments = [reviews.__file__, "--output_dir", str(tmp_path / "world"), "--smoke"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr == "\nerror: interrupted (Ctrl-C)\n"
