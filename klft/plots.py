"""Figures for papers and notebooks from token-level KL: each function returns a matplotlib Figure.

    from klft import plots
    plots.kl_by_step(Statistics.of(table)).savefig("kl.pdf")

pyplot's global state is never touched; the colours are Okabe and Ito's, safe for colour-blind readers. Needs
matplotlib: pip install "klft[plots]". The page draws its own (klft.diagnostics.report).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from klft.estimators import k1, k2, k3

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from klft.diagnostics import Statistics

COLOURS: dict[str, str] = {"reverse": "#0072B2", "forward": "#D55E00"}
LABELS: dict[str, str] = {"reverse": "reverse, KL(policy || reference)", "forward": "forward, KL(reference || policy)"}
GREY = "#666666"


def kl_by_step(stats: "Statistics | Iterable[tuple[float, float | None, float | None]]") -> "Figure":
    """Mean KL per token over training, both directions: of a Statistics, or of (step, reverse, forward) tuples in which
    None leaves a point out. Nats."""
    rows: Any = stats
    if not isinstance(stats, Iterable):
        rows = [(row["step"], row.get("reverse_mean"), row.get("forward_mean")) for row in stats.by_step()]
    points = np.array(_some(rows, "steps"), dtype=np.float64)
    figure, axes = _axes("KL by training step", "training step", "mean KL per token (nats)")
    for column, name in enumerate(COLOURS, 1):
        known = ~np.isnan(points[:, column])
        if known.any():
            style = {"marker": "o", "markersize": 4} if len(points) <= 40 else {}
            axes.plot(points[known, 0], points[known, column], color=COLOURS[name], label=LABELS[name], **style)
    axes.set_ylim(bottom=0)
    return _finish(figure)


def kl_by_position(stats: "Statistics") -> "Figure":
    """Mean and 90th percentile of both KLs over the position in the text, of a Statistics. Nats."""
    rows = _some(stats.by_position(), "tokens")
    figure, axes = _axes("KL by position", "position (token)", "KL per token (nats)")
    for name in COLOURS:
        known = [row for row in rows if f"{name}_mean" in row]
        middles = [(row["start"] + row["stop"] - 1) / 2 for row in known]
        for key, style, what in (("mean", "-", ", mean"), ("p90", ":", ", 90 % below")):
            if known:
                values = [row[f"{name}_{key}"] for row in known]
                axes.plot(middles, values, style, color=COLOURS[name], label=LABELS[name] + what, linewidth=1.5)
    axes.set_ylim(bottom=0)
    return _finish(figure)


def estimator_spread(table: "pa.Table") -> "Figure":
    """Box plot of the sampled estimates k1, k2, k3 of the reverse KL over tokens, beside its exact value, of a token
    table. Boxes: quartiles; whiskers: 1st and 99th percentile; diamonds: means. Nats; tokens that the policy did not
    sample (prompts, given texts) left out."""
    import torch

    counted = ~np.asarray(table["is_prompt"]) & np.asarray(table["sampled"].fill_null(False))
    columns = [np.asarray(table[name], np.float64)[counted] for name in ("logp", "ref_logp", "reverse_kl")]
    logp, ref_logp, exact = (torch.from_numpy(column) for column in columns)
    estimates = {"exact": exact, "k1": k1(logp, ref_logp), "k2": k2(logp, ref_logp), "k3": k3(logp, ref_logp)}
    finite = torch.stack(list(estimates.values())).isfinite().all(0)
    _some(finite[finite].tolist(), "tokens that the policy sampled, with both a log q and an exact KL")
    estimates = {name: values[finite].numpy() for name, values in estimates.items()}
    figure, axes = _axes("Sampled estimates of the reverse KL", "KL per token (nats)", "")
    keys = ("whislo", "q1", "med", "q3", "whishi")
    boxes = [
        dict(zip(keys, np.percentile(values, [1, 25, 50, 75, 99]).tolist(), strict=True))
        | {"mean": float(values.mean()), "label": name}
        for name, values in reversed(estimates.items())
    ]
    mark = {"marker": "D", "markerfacecolor": COLOURS["forward"], "markeredgecolor": "none", "markersize": 6}
    axes.bxp(
        boxes, orientation="horizontal", showmeans=True, showfliers=False, patch_artist=True, meanprops=mark,
        widths=0.5, boxprops={"facecolor": "#C6DCEB", "edgecolor": GREY}, medianprops={"color": COLOURS["reverse"]},
    )  # fmt: skip
    mean = float(estimates["exact"].mean())
    axes.axvline(mean, color=COLOURS["forward"], linewidth=1, linestyle="--", label=f"exact mean, {mean:.3g} nats")
    ends = max(max(abs(box["whislo"]), abs(box["whishi"])) for box in boxes)
    axes.set_xscale("symlog", linthresh=max(min(mean, ends / 10), 1e-12))
    axes.grid(False, axis="y")
    return _finish(figure, "box: quartiles; whiskers: 1 % and 99 %; diamond: mean")


def reward_kl_frontier(points: Iterable[tuple[float, float] | tuple[float, float, str]]) -> "Figure":
    """Reward against KL from the reference, (kl, reward) or (kl, reward, label) for each run or checkpoint. The line
    joins those that no other one beats with less KL and as much reward. KL in nats, as given: per token or sequence."""
    points = sorted(_some(points, "points"), key=lambda point: (point[0], -point[1]))
    best = [all(p[1] > other[1] for other in points[:i]) for i, p in enumerate(points)]
    middle = (points[0][0] + points[-1][0]) / 2
    figure, axes = _axes("Reward against KL", "KL from the reference (nats)", "mean reward")
    for wanted, style, label, colour in (
        (True, "o-", "frontier", COLOURS["reverse"]),
        (False, "o", "behind it", "#AAAAAA"),
    ):
        shown = [p for p, is_best in zip(points, best, strict=True) if is_best is wanted]
        if shown:
            axes.plot([p[0] for p in shown], [p[1] for p in shown], style, color=colour, label=label)
        for kl, reward, *name in shown:
            if name:  # labels fit above the frontier, but for its left end
                above = wanted and kl > middle
                place = {"xytext": (-5, 5), "ha": "right"} if above else {"xytext": (5, -11), "ha": "left"}
                text = axes.annotate(str(name[0]), (kl, reward), textcoords="offset points", fontsize=8, **place)
                text.set_parse_math(False)  # a "$" is a dollar
    axes.margins(0.12)
    return _finish(figure)


def _some(values: Iterable[Any], what: str) -> list[Any]:
    values = list(values)
    if not values:
        raise ValueError(f"nothing to plot: no {what}")
    return values


def _axes(title: str, x: str, y: str) -> "tuple[Figure, Axes]":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('klft.plots needs matplotlib: pip install "klft[plots]"') from error
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: "Figure", title: str | None = None) -> "Figure":
    """With a legend outside, where it hides nothing."""
    _some(figure.axes[0].get_legend_handles_labels()[0], "finite values")
    figure.legend(
        loc="outside lower left", ncols=2, frameon=False, fontsize=8, title=title, title_fontsize=8, alignment="left"
    )
    return figure
