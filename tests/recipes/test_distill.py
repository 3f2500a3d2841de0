"""recipes/distill.py: its language, modes enumerated, one process and two, models of your own, wrong settings."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("matplotlib")
RECIPE = Path(__file__).parents[2] / "recipes" / "distill.py"
COMMAND = [sys.executable, str(RECIPE), "--config", str(RECIPE.with_suffix(".yaml"))]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("distill", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["distill"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["distill"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "--smoke", "--output_dir", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


def test_language_is_a_distribution_over_answers_that_part_at_once(recipe):
    language, prompts, tokenizer = recipe.make_language()
    assert len(set(prompts)) == recipe.PROMPTS
    totals = torch.zeros(recipe.PROMPTS).index_add(0, language.prompt_numbers, language.probabilities)
    assert torch.allclose(totals, torch.ones(recipe.PROMPTS))
    # (prompt, first word of the answer) is never the same twice, and every answer ends.
    beginnings = {tuple(ids) for ids in language.ids[:, : recipe.PROMPT_WORDS + 1].tolist()}
    assert len(beginnings) == len(language.ids)
    assert (language.ids[:, -1] == tokenizer.eos_token_id).all()
    again, *_ = recipe.make_language()
    assert torch.equal(again.ids, language.ids)


def test_mode_coverage_counts_what_a_model_gives_each_answer(recipe, smoke):
    folder, _ = smoke
    language, _, _ = recipe.make_language()
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").double()
    (half, one_percent, outside), ranked = recipe.mode_coverage(language, model)
    # Oracle: one answer at a time, token by token.
    masses = []
    for row in language.ids:
        probabilities = model(input_ids=row[None]).logits[0].softmax(-1)
        masses.append(torch.stack([probabilities[place - 1, row[place]] for place in range(2, len(row))]).prod().item())
    inside = [
        [mass for mass, owner in zip(masses, language.prompt_numbers.tolist(), strict=True) if owner == number]
        for number in range(recipe.PROMPTS)
    ]
    assert outside == pytest.approx(1 - sum(map(sum, inside)) / recipe.PROMPTS, abs=1e-6)
    assert ranked[0] == pytest.approx(sum(map(max, inside)) / recipe.PROMPTS, abs=1e-6)
    wanted = language.probabilities.tolist()
    assert half == pytest.approx(sum(m >= w / 2 for m, w in zip(masses, wanted, strict=True)) / len(masses))
    assert one_percent == pytest.approx(sum(m >= 0.01 for m in masses) / len(masses))


def test_smoke_run_prints_a_table_and_saves_every_student(smoke):
    folder, said = smoke
    assert max(map(len, said.splitlines())) <= 80
    assert (folder / "distill.png").stat().st_size > 10_000
    before = AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    for divergence in ("forward_kl", "reverse_kl", "jsd", "skew_kl"):
        for sampler in ("student", "teacher"):
            after = AutoModelForCausalLM.from_pretrained(folder / f"{divergence}_{sampler}").state_dict()
            assert any(not torch.equal(after[name], before[name]) for name in before)
            AutoTokenizer.from_pretrained(folder / f"{divergence}_{sampler}")


@pytest.mark.slow
def test_models_of_your_own_on_two_processes(smoke, tmp_path):
    folder, _ = smoke
    names = ["--teacher_name_or_path", folder / "teacher", "--model_name_or_path", folder / "student"]
    fits = ["--divergences", "reverse_kl", "--samplers", "student", "--smoke", "--processes", "2"]
    arguments = [*names, "--prompts", folder / "prompts.txt", *fits, "--output_dir", tmp_path]
    run = launch(str(RECIPE), "--config", RECIPE.with_suffix(".yaml"), *arguments, processes=2, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("reverse_kl") == 1
    assert "on none" not in run.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "reverse_kl_student")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--divergences", "tv"], "divergences: choose from"),
        (["--samplers", "nobody"], "samplers: choose from"),
        (["--processes", "3"], "asked for 3 process(es), got 1"),
        (["--prompts", "p.txt"], "name all three, or none"),
        (["--steps", "0"], "steps must be above 0, got 0"),
        (["--learning_rate", "-0.1"], "learning_rate must be above 0, got -0.1"),
        (["--temperature", "1e-9"], "temperature must be finite and >= 0.001, got 1e-09"),
    ],
)
def test_wrong_settings_are_named(recipe, arguments, said, tmp_path):
    (settings,) = recipe.parse_arguments((recipe.Settings,), [*arguments, "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        recipe.check_settings(settings, recipe.Accelerator(cpu=True))
