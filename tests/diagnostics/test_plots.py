"""The figures: the right numbers on the right axes, one shared state left alone, and something to see."""

import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from support.tables import counted, mean, quantity, rows_of, stats_of, table_of

from klft import plots


def drawn(figure):
    """Rendered, not blank, with a title, axes and a legend; the axes."""
    assert isinstance(figure, Figure)
    file = BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    image = imread(file)
    assert image[..., :3].std() > 0.02
    (axes,) = figure.axes
    assert axes.get_title(loc="left")
    assert "nats" in axes.get_xlabel() + axes.get_ylabel()
    assert len(figure.legends) == 1
    return axes


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_kl_by_step_of_statistics_and_of_numbers():
    stats = stats_of([row for step in (0, 10, 30) for row in rows_of(5, seed=step, step=step)])
    expected = [(row["step"], row["reverse_mean"], row["forward_mean"]) for row in stats.by_step()]
    for given in (stats, expected):
        axes = drawn(plots.kl_by_step(given))
        found = lines(axes)
        assert [label.split(",")[0] for label in found] == ["reverse", "forward"]
        for column, line in enumerate(found.values(), 1):
            assert line.get_xdata().tolist() == [0, 10, 30]
            assert line.get_ydata().tolist() == [row[column] for row in expected]
        assert axes.get_ylim()[0] == 0
    gaps = drawn(plots.kl_by_step([(1, 0.5, None), (2, None, None), (3, 0.25, None)]))
    (line,) = lines(gaps).values()
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([1, 3], [0.5, 0.25])


def test_kl_by_position():
    stats = stats_of([row | {"position": row["position"] * 5} for row in rows_of(30)])
    rows = stats.by_position()
    found = lines(drawn(plots.kl_by_position(stats)))
    assert len(found) == 4
    for (label, line), key in zip(
        found.items(), ("reverse_mean", "reverse_p90", "forward_mean", "forward_p90"), strict=True
    ):
        assert label.startswith(key.split("_")[0])
        assert list(line.get_ydata()) == [row[key] for row in rows]
        assert all(row["start"] <= x < row["stop"] for x, row in zip(line.get_xdata(), rows, strict=True))


def test_estimator_spread():
    rows = rows_of(30)
    real = counted(rows)
    real[4]["ref_logp"] = -np.inf
    axes = drawn(plots.estimator_spread(table_of(rows)))
    real = [row for row in real if np.isfinite(row["ref_logp"])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["k3", "k2", "k1", "exact"]
    diamonds = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "D"]
    assert diamonds == pytest.approx([mean(quantity(real, name)) for name in ("k3", "k2", "k1", "reverse")])
    (label,) = lines(axes)
    assert label == f"exact mean, {mean(quantity(real, 'reverse')):.3g} nats"
    with pytest.raises(ValueError, match="no tokens that the policy sampled, with both"):
        plots.estimator_spread(table_of([row | {"reverse_kl": None} for row in rows]))


def test_reward_kl_frontier():
    points = [(3, 1.0, "late"), (1, 0.2), (2, 0.9, "$x$"), (2, 0.1), (4, 0.5, "worse"), (5, 1.0), (1, 0.2, "twin")]
    axes = drawn(plots.reward_kl_frontier(iter(points)))
    found = lines(axes)
    assert list(zip(*found["frontier"].get_data(), strict=True)) == [(1, 0.2), (2, 0.9), (3, 1.0)]
    assert sorted(zip(*found["behind it"].get_data(), strict=True)) == [(1, 0.2), (2, 0.1), (4, 0.5), (5, 1.0)]
    texts = {text.get_text(): text for text in axes.texts}
    assert set(texts) == {"late", "$x$", "worse", "twin"}
    assert not texts["$x$"].get_parse_math()
    assert texts["late"].xy == (3, 1.0)
    assert list(lines(drawn(plots.reward_kl_frontier([(1, 1)])))) == ["frontier"]


def test_the_two_directions_look_the_same_everywhere_and_differ():
    stats = stats_of(rows_of())
    for figure in (plots.kl_by_step(stats), plots.kl_by_position(stats)):
        for label, line in lines(figure.axes[0]).items():
            assert to_hex(line.get_color()).upper() == plots.COLOURS[label.split(",")[0]]


@pytest.mark.parametrize("plot", [plots.kl_by_step, plots.reward_kl_frontier])
def test_nothing_to_plot_is_an_error(plot):
    with pytest.raises(ValueError, match="nothing to plot"):
        plot([])


def test_statistics_without_a_kl_are_an_error():
    stats = stats_of([row | {"reverse_kl": None, "forward_kl": None} for row in rows_of()])
    for plot in (plots.kl_by_step, plots.kl_by_position):
        with pytest.raises(ValueError, match="nothing to plot: no finite values"):
            plot(stats)
    with pytest.raises(ValueError, match="nothing to plot: no tokens"):
        plots.kl_by_position(stats_of([]))


def test_pyplot_has_no_figure_of_ours_and_a_missing_matplotlib_says_what_to_install():
    code = """
import sys
from klft import plots
assert "matplotlib" not in sys.modules
plots.kl_by_step([(0, 1, 1)]).savefig({file!r})
import matplotlib.pyplot
assert matplotlib.pyplot.get_fignums() == []
for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    sys.modules[name] = None
try:
    plots.kl_by_step([(0, 1, 1)])
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code.format(file="/dev/null")], capture_output=True, text=True)
    assert done.stdout.strip() == 'klft.plots needs matplotlib: pip install "klft[plots]"', done.stderr
