"""recipes/topk_reference.py: with all of the vocabulary in the file, the file says what the teacher says."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from support import tiny

import klft

pytest.importorskip("matplotlib")
RECIPE = Path(__file__).parents[2] / "recipes" / "topk_reference.py"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPE.parent))  # it imports reviews
    spec = importlib.util.spec_from_file_location("topk_reference", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["topk_reference"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["topk_reference"]


@pytest.fixture
def world(tmp_path, monkeypatch, recipe):
    """A teacher of 32 ids, in the place of the reviews' world."""
    tiny.llama(5).save_pretrained(tmp_path / "world" / "reference")
    tiny.tokenizer().save_pretrained(tmp_path / "world" / "reference")
    tiny.prompts(24).to_json(tmp_path / "world" / "prompts_train.jsonl")
    monkeypatch.setattr(recipe, "ensure_world", lambda: tmp_path / "world")
    return tmp_path / "world"


def test_a_file_of_all_ids_gives_the_teachers_kl(recipe, world, tmp_path):
    settings = recipe.Settings(ks=[2, tiny.VOCABULARY], texts=16, held_out=8, max_new_tokens=5)
    recipe.write_file(tmp_path / "file.safetensors", world=world, settings=settings)
    file = recipe.load_file(tmp_path / "file.safetensors")
    student, chosen = tiny.llama(attention_dropout=0.0), torch.arange(16)
    teacher = klft.FrozenReference(recipe.load_model(world / "reference"))
    exact = recipe.exact_kl(file, chosen, student=student, teacher=teacher)
    assert exact > 0.5
    with klft.hidden_states(student) as kept:
        student(**klft.causal_inputs(student, file["ids"][chosen], file["attention_mask"][chosen]))
    for loss_of in (recipe.file_loss, recipe.scaled_loss):
        arguments = {"hidden": kept.hidden, "head": klft.LMHead.from_model(student)}
        assert loss_of(file, chosen, **arguments, k=tiny.VOCABULARY).item() == pytest.approx(exact.item(), rel=1e-4)
        assert loss_of(file, chosen, **arguments, k=2).item() != pytest.approx(exact.item(), rel=1e-2)


def test_smoke_run_prints_a_row_per_arm(recipe, world, tmp_path, capsys):
    recipe.main(recipe.Settings(smoke=True, ks=[2, 8], output_dir=str(tmp_path)))
    said = capsys.readouterr().out
    assert said.count("file ") == said.count("scaled ") == 2
    assert (tmp_path / "topk_reference.png").stat().st_size > 10_000
