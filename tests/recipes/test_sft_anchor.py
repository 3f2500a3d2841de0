"""recipes/sft_anchor.py: a smoke run, its NLL, and the comparison at an equal NLL of B."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import tiny

pytest.importorskip("matplotlib")
RECIPE = Path(__file__).parents[2] / "recipes" / "sft_anchor.py"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPE.parent))  # it imports reviews
    spec = importlib.util.spec_from_file_location("sft_anchor", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sft_anchor"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sft_anchor"]


def test_smoke_run_prints_a_table_and_a_picture(tmp_path):
    command = [sys.executable, RECIPE, "--config", RECIPE.with_suffix(".yaml"), "--smoke", "--output_dir", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "forward 0.2" in run.stdout
    assert "reverse 0.2" in run.stdout
    assert (tmp_path / "sft_anchor.png").stat().st_size > 10_000


def test_mean_nll_is_per_token_without_padding_and_first_tokens(recipe):
    model = tiny.llama().eval()
    rows = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 12]]
    nats = [
        -model(input_ids=torch.tensor([row])).logits[0, place - 1].log_softmax(-1)[row[place]].item()
        for row in rows
        for place in range(1, len(row))
    ]
    assert recipe.mean_nll(model, rows) == pytest.approx(sum(nats) / 7, rel=1e-5)


def test_equal_b_is_read_off_the_curve(recipe):
    curve = [(0, 1.0, 4.0), (10, 2.0, 2.0), (20, 3.0, 1.0), (30, 4.0, 1.5)]
    assert recipe.at_equal_b(curve, 3.0) == pytest.approx(1.5)
    assert recipe.at_equal_b(curve, 1.25) == pytest.approx(2.75)
    assert recipe.at_equal_b(curve, 0.5) == 3.0  # it never gets there: where B is best


def test_interval_is_students(recipe):
    assert recipe.interval([1.0, 2.0, 3.0]) == "2.000 +- 2.483"  # 4.30 / sqrt(3)
    assert recipe.interval([1.0]) == "1.000"
