"""--reward module:function of PPO's recipe: what is wrong with the module is one line that names it."""

import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def load_reward(tmp_path, monkeypatch):
    """load_reward(text of the module) as the recipe does it, launched in the module's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])
    import ppo_reviews

    def load(text, name):
        (tmp_path / f"{name}.py").write_text(text)
        script = ppo_reviews.RecipeArguments(dataset_name="x", reward=f"{name}:score")
        return ppo_reviews.load_reward(script, tmp_path)

    return load


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("exits", "import sys\nsys.exit(3)\n", r"--reward exits:score: its module exits \(code 3\): keep what it does"),
        ("quits", "raise SystemExit\n", r"--reward quits:score: its module exits"),
        ("typo", "def score(:\n    return 1\n", r"--reward typo:score: .*typo\.py:1: invalid syntax$"),
    ],
)
def test_a_module_that_exits_or_does_not_parse(name, text, said, load_reward):
    with pytest.raises(ImportError, match=said):
        load_reward(text, name)


def test_a_module_that_has_the_function(load_reward):
    assert load_reward("def score(**_):\n    return 7\n", "sound")() == 7
