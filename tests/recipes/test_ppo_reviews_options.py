"""PPO's recipe: options without a use are refused; a world in a cache that cannot be written is found."""

import pytest
from support.recipes import RECIPES, error_of


@pytest.mark.parametrize("option", [["--load_in_4bit", "1"], ["--dataset_test_split", "dev"], ["--dataset_streaming"]])
def test_an_option_without_a_use_is_refused(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = error_of("ppo_reviews", [*option, "--processes", "1", "--use_cpu", "true"], monkeypatch, capsys)
    assert said == f"error: {option[0]} does nothing in this recipe: leave it out"


def test_a_world_in_a_read_only_cache(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import reviews

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(reviews, "FileLock", refuse)
    with pytest.raises(PermissionError):
        reviews.ensure_world(tmp_path)
    monkeypatch.setattr(reviews.Path, "exists", lambda self: self.name.startswith("reviews-"))
    assert reviews.ensure_world(tmp_path).parent == tmp_path
