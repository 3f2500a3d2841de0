"""Every recipe refuses a number that is negative or not finite, in one line, before anything is made or loaded."""

import pytest
from support.recipes import error_of

WRONG = {
    "distill": ["batch_size", "max_new_tokens", "seed"],
    "grpo_exact_kl": ["coef", "num_generations", "learning_rate"],
    "measure_kl": ["batch_size", "top_k", "max_texts", "temperature"],
    "mode_seeking": ["steps"],
    "ppo_reviews": ["learning_rate", "max_completion_length"],
    "sft_anchor": ["coefs", "seeds", "learning_rate"],
    "topk_reference": ["ks", "texts", "batch_size"],
}


@pytest.mark.parametrize(
    ("recipe", "option"), [(recipe, option) for recipe, names in WRONG.items() for option in names]
)
def test_a_negative_number_is_refused_by_name(recipe, option, monkeypatch, capsys, tmp_path):
    line = error_of(recipe, [f"--{option}=-3", "--output_dir", str(tmp_path)], monkeypatch, capsys)
    assert option in line
    assert "got -3" in line or "= -3" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("recipe", "option"), [
    ("distill", "learning_rate"), ("grpo_exact_kl", "coef"), ("measure_kl", "temperature"), ("ppo_reviews", "kl_coef"),
    ("sft_anchor", "learning_rate"), ("topk_reference", "learning_rate"),
])  # fmt: skip
def test_a_number_that_is_none_is_refused_by_name(recipe, option, monkeypatch, capsys, tmp_path):
    line = error_of(recipe, [f"--{option}", "nan", "--output_dir", str(tmp_path)], monkeypatch, capsys)
    assert option in line
    assert "got nan" in line
