"""recipes/mode_seeking.py: numbers known in closed form, the words each direction keeps, pictures, wrong settings."""

import importlib.util
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import klft

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

RECIPE = Path(__file__).parents[2] / "recipes" / "mode_seeking.py"
BETWEEN = ("wooden", "legal", "electric")


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("mode_seeking", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(recipe, tmp_path_factory):
    """What the recipe publishes, unrounded: {"fits": {...}, "zones": {...}, "words": {...}}."""
    found, publish = {}, recipe.publish
    recipe.publish = lambda *places, **given: (found.update({given["name"]: given["rows"]}), publish(*places, **given))
    folder = tmp_path_factory.mktemp("pictures")
    recipe.on_an_axis(folder, 561, 200)
    recipe.on_words(folder, 200)
    recipe.publish = publish
    return found


def test_forward_fit_has_the_moments_of_the_mixture(rows):
    mean, variance, *_ = rows["fits"]["forward KL"]
    assert mean == pytest.approx(10, rel=1e-3)
    assert variance == pytest.approx(4 + 10**2, rel=1e-3)


def test_backward_fit_is_one_mode_and_pays_ln_2_for_the_other(rows):
    mean, variance, value, _, backward = rows["fits"]["backward KL"]
    assert mean == pytest.approx(0, abs=1e-3)
    assert variance == pytest.approx(4, rel=1e-3)
    assert value == backward == pytest.approx(math.log(2), rel=1e-3)


def test_each_fit_is_the_best_of_all_in_its_own_direction(rows):
    for column, name in ((3, "forward KL"), (4, "backward KL")):
        assert min(rows["fits"], key=lambda fit: rows["fits"][fit][column]) == name


def test_coarse_and_fine_axes_agree(recipe):
    fits = []
    for grid in (141, 2801):
        x = torch.linspace(-60, 80, grid, dtype=torch.float64)[:, None]
        modes = recipe.student(x, torch.tensor([[0.0, math.log(2)], [20.0, math.log(2)]], dtype=torch.float64))
        fits.append(
            [recipe.fit(kl, x, modes.logsumexp(0), [5.0], 5.0, 200) for kl in (klft.forward_kl, klft.reverse_kl)]
        )
    torch.testing.assert_close(fits[0], fits[1], rtol=1e-5, atol=1e-4)


def test_jsd_is_lower_on_a_mode_than_where_it_ends(recipe, rows):
    x = torch.linspace(-60, 80, 561, dtype=torch.float64)[:, None]
    modes = recipe.student(x, torch.tensor([[0.0, math.log(2)], [20.0, math.log(2)]], dtype=torch.float64))
    on_a_mode = klft.jsd(modes[0], modes.logsumexp(0)).item()
    # Disjoint modes: m = 3/4 of one and 1/4 of the other.
    assert on_a_mode == pytest.approx((math.log(4 / 3) + math.log(2 / 3) / 2 + math.log(2) / 2) / 2, rel=1e-3)
    assert on_a_mode == pytest.approx(0.216, abs=5e-4)
    assert rows["fits"]["jsd"][2] == pytest.approx(0.255, abs=5e-4)


def test_three_zones(rows):
    (_, far_f, far_b), (_, on_f, on_b), (_, between_f, between_b) = rows["zones"].values()
    assert between_f < on_f < far_f
    assert on_b < between_b < far_b
    # KL(P||Q) of the narrow Q at mean m: the mean of (m - mode)^2 / (2 * 4), less ln 2 for P's two modes.
    assert [far_f, on_f, between_f] == pytest.approx(
        [125 - math.log(2), 25 - math.log(2), 12.5 - math.log(2)], rel=1e-3
    )


def test_forward_student_covers_every_valid_word_and_leaks(recipe, rows):
    for word, (_, _, p) in recipe.WORDS.items():
        reference, forward, _ = rows["words"][word]
        assert reference == pytest.approx(p, abs=1e-12)
        if p > 0.01:
            assert forward > reference / 3
    assert min(rows["words"][word][1] for word in BETWEEN) > 50 * 0.001


def test_backward_student_keeps_a_subset_and_leaks_less(recipe, rows):
    words = rows["words"]
    kept = [word for word, (_, _, p) in recipe.WORDS.items() if p > 0.01 and words[word][2] > 0.01]
    lost = [word for word, (_, _, p) in recipe.WORDS.items() if p > 0.01 and words[word][2] < 1e-3]
    assert len(kept) == 3
    assert len(lost) == 6
    _, forward, backward = words["on valid words"]
    assert 1 - backward < 0.01 < 0.2 < 1 - forward
    assert words["entropy"][2] < words["entropy"][0] < words["entropy"][1]
    assert words["forward KL to P"][1] < words["forward KL to P"][2]
    assert words["backward KL to P"][2] < words["backward KL to P"][1]


def test_smoke_run_writes_three_pictures(tmp_path):
    command = [sys.executable, RECIPE, "--config", RECIPE.with_suffix(".yaml"), "--smoke", "--output_dir", tmp_path]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert run.returncode == 0, run.stderr
    *tables, last = run.stdout.strip().splitlines()
    assert max(map(len, tables)) <= 80
    assert str(tmp_path) in last
    for number in ("104.000", "0.693", "124.307"):
        assert number in run.stdout
    for name in ("fits", "zones", "words"):
        picture = matplotlib.image.imread(tmp_path / f"mode_seeking_{name}.png")[..., :3]
        assert picture.shape[0] > 300
        for colour in ("#D55E00", "#BBBBBB"):
            distance = abs(picture - matplotlib.colors.to_rgb(colour)).max(-1)
            assert (distance < 0.02).mean() > 1e-3, f"{name}: no {colour}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "0"], "grid = 0"),
        (["--steps", "-3"], "steps = -3"),
        (["--steps", "1"], "did not converge within steps = 1"),
        (["--grid", "many"], "many"),
        (["--girth", "3"], "girth"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config"], "--config needs"),
        (["--output_dir", str(RECIPE)], "mode_seeking.py"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--output_dir", str(tmp_path / "out"), *arguments])
    with matplotlib.rc_context(), pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPE), run_name="__main__")
    matplotlib.pyplot.close("all")
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert said in error


def test_without_matplotlib_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert stopped.value.code == 2
    assert "pip install klft[plots]" in capsys.readouterr().err
