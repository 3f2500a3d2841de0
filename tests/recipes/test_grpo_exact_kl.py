"""recipes/grpo_exact_kl.py in a world of 32 ids: a row per penalty, and the KL that it measures."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from support import tiny
from transformers import AutoModelForCausalLM

RECIPE = Path(__file__).parents[2] / "recipes" / "grpo_exact_kl.py"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPE.parent))  # it imports reviews
    spec = importlib.util.spec_from_file_location("grpo_exact_kl", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["grpo_exact_kl"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["grpo_exact_kl"]


@pytest.fixture
def world(tmp_path, monkeypatch, recipe):
    """Another world in the place of the reviews'; its reward counts a word."""
    tiny.llama(5, attention_dropout=0.0).save_pretrained(tmp_path / "world" / "reference")
    tiny.tokenizer().save_pretrained(tmp_path / "world" / "reference")
    for name in ("train", "test"):
        tiny.prompts(24).to_json(tmp_path / "world" / f"prompts_{name}.jsonl")
    monkeypatch.setattr(recipe, "ensure_world", lambda: tmp_path / "world")
    monkeypatch.setattr(recipe, "RewardModel", lambda *args, **kwargs: tiny.count_w5)
    return tmp_path / "world"


def test_smoke_run_prints_a_row_per_penalty(recipe, world, tmp_path, capsys):
    recipe.main(recipe.Settings(smoke=True, max_completion_length=6, output_dir=str(tmp_path)))
    said = capsys.readouterr().out
    for row in ("(before)", "none", "k3", "exact"):
        assert f" {row} " in said
    weights = [
        torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(tmp_path / arm).parameters()])
        for arm in recipe.ARMS
    ]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_measured_kl_is_the_mean_over_the_policys_own_completions(recipe, world):
    settings = recipe.Settings(max_completion_length=1)
    policy, reference = (tiny.llama(seed, attention_dropout=0.0).eval() for seed in (0, 5))
    _, nats = recipe.measure(settings, world, policy=policy)
    # One token per completion: the exact KL of the token after each prompt.
    totals = []
    for prompt in tiny.prompts(24)["prompt"]:
        ids = torch.tensor([tiny.tokenizer()(prompt)["input_ids"]])
        p, q = (model(input_ids=ids).logits[0, -1].log_softmax(-1) for model in (policy, reference))
        totals.append((p.exp() * (p - q)).sum().item())
    assert nats == pytest.approx(sum(totals) / len(totals), rel=1e-4)
