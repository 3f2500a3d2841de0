"""Forward KL is mean-seeking, backward KL is mode-seeking: on two Gaussian modes, and on the next word of a sentence.

    python recipes/mode_seeking.py --config recipes/mode_seeking.yaml     # add --smoke for a coarser axis

Q, the policy, has too little capacity for P, the reference. The forward KL is weighted by P: nothing valid may go
missing, so Q spreads, also over what lies between the modes. The backward KL is weighted by Q: nothing invalid may be
said, so Q stays with one mode. No sampling, no network: every number is an exact sum. Two CPU cores, 2026-11-22, 5 s:
forward fit at mean 10.000, variance 104.000; backward fit at mean 0.000, variance 4.000, where KL = ln 2 = 0.693. The
forward student has 67.4 % of its mass on valid words and covers all nine; the backward one 99.6 %, on three of them.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import klft
from klft.arguments import one_line_errors, parse_arguments
from klft.exits import exit_codes

try:
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    print("mode_seeking: the pictures need matplotlib: pip install klft[plots]", file=sys.stderr)
    raise SystemExit(2) from None

Divergence = Callable[[Tensor, Tensor], Tensor]  # (logits of Q, logits of P) -> nats

# klft puts the policy first: reverse_kl(q, p) is KL(Q||P), weighted by the policy. It is also called backward.
DIVERGENCES: dict[str, Divergence] = {
    "forward KL": klft.forward_kl,
    "backward KL": klft.reverse_kl,
    # From mean 5 jsd ends in its wide optimum, 0.255; on a mode (mean 0, variance 4) it is lower, 0.216.
    "jsd": klft.jsd,
    "skew": klft.skew_kl,
}
DIRECTIONS = ("forward KL", "backward KL")

# Okabe and Ito's colours, which colour-blind readers can tell apart, and grey for P. Three of the four fits lie on top
# of each other, so they are drawn as a broad band, a dashed line and a dotted one.
COLORS = {"forward KL": "#0072B2", "backward KL": "#D55E00", "jsd": "black", "skew": "#E69F00", "reference": "#BBBBBB"}
LINES = {
    "forward KL": {"linewidth": 9, "alpha": 0.6},
    "backward KL": {"linewidth": 4},
    "jsd": {"linewidth": 2, "linestyle": (0, (6, 4))},
    "skew": {"linewidth": 4, "linestyle": ":"},
}
STYLE = {"backend": "agg", "figure.figsize": (11, 6), "figure.constrained_layout.use": True, "font.size": 16}

# The axis: P is an equal mixture of two Gaussians, far enough apart that neither has mass on the other.
AXIS_START, AXIS_END = -60, 80
MODE_MEANS = (0, 20)
MODE_SD = 2.0
# Places for a Q that is as narrow as one mode.
ZONES = {"far from both modes": -20.0, "on one mode": 0.0, "between the modes": 10.0}

# "The food was ...": word -> its embedding (x, y) and the reference's probability. Nine valid words in three groups;
# three adjectives that lie between the groups but fit no food; three words that are no adjectives, far out.
WORDS = {
    "delicious": (2.2, 2.1, 0.160), "tasty": (2.6, 1.5, 0.140), "great": (2.2, 0.9, 0.120),
    "awful": (-2.5, 2.1, 0.120), "bland": (-2.1, 1.5, 0.100), "stale": (-2.5, 0.9, 0.080),
    "cold": (-0.3, -2.3, 0.110), "warm": (0.1, -2.9, 0.090), "hot": (-0.3, -3.5, 0.074),
    "wooden": (-0.4, 0.7, 0.001), "legal": (-1.0, -0.6, 0.001), "electric": (0.4, 0.0, 0.001),
    "Tuesday": (5.7, -4.6, 0.001), "quickly": (-6.6, -4.6, 0.001), "of": (0.1, 7.2, 0.001),
}  # fmt: skip


@dataclass
class Settings:
    """Fields of mode_seeking.yaml."""

    output_dir: str = "runs/mode_seeking"
    grid: int = 2801
    steps: int = 200
    smoke: bool = False


def student(points: Tensor, theta: Tensor) -> Tensor:
    """Logits [*, V] of Q, a Gaussian over points [V, D]; theta [*, D + 1] is its centre and its log sd."""
    # Over words it is a language-model head, (h.e_v - |e_v|^2 / 2) / s^2: D numbers of context h and one temperature.
    # That caps its capacity: of two words and one between them, the one between is never the least likely.
    centre, log_sd = theta[..., None, :-1], theta[..., -1:]
    squared_distance = (points - centre).square().sum(-1)
    return -squared_distance / (2 * torch.exp(2 * log_sd))


def fit(divergence: Divergence, points: Tensor, p: Tensor, start: list[float], variance: float, steps: int) -> Tensor:
    """Minimise divergence(Q, P) over theta by L-BFGS, from a Gaussian with this centre and variance."""
    theta = torch.tensor([*start, math.log(variance) / 2], dtype=torch.float64, requires_grad=True)
    # Tolerances near float64's: the tables have three decimals, and the loss is flat around its minimum.
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss_with_gradient() -> float:
        optimizer.zero_grad()
        loss = divergence(student(points, theta), p)
        loss.backward()
        return loss.item()

    # One step() of L-BFGS is up to `steps` iterations. It stops silently when they are used up, so look at the end.
    optimizer.step(loss_with_gradient)
    final_loss = loss_with_gradient()
    if math.isnan(final_loss) or theta.grad is None or theta.grad.abs().max() > 1e-6:
        raise ValueError(f"a fit did not converge within steps = {steps}: give it more")
    return theta.detach()


def publish(
    figure: Figure, folder: Path, *, name: str, title: str, columns: list[str], rows: dict[str, list[float]]
) -> None:
    """Save a figure as mode_seeking_NAME.png, and print the table that belongs to it."""
    figure.savefig(folder / f"mode_seeking_{name}.png")
    plt.close(figure)

    first, *others = columns
    table = Table(title=title)
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    for row_name, values in rows.items():
        table.add_row(row_name, *[f"{value:.3f}" for value in values])
    Console().print(table)


def on_an_axis(folder: Path, grid: int, steps: int) -> None:
    """One Gaussian for two modes: where each divergence ends, and what both KLs say of a narrow Q along the axis."""
    x = torch.linspace(AXIS_START, AXIS_END, grid, dtype=torch.float64)
    # Log-densities on an axis are logits: softmax makes them probabilities of the grid's points. V = grid, D = 1.
    modes = student(x[:, None], torch.tensor([[mean, math.log(MODE_SD)] for mean in MODE_MEANS], dtype=torch.float64))
    p = torch.logaddexp(modes[0], modes[1])
    fits_on_the_axis(folder, x, p=p, steps=steps)
    zones_of_the_axis(folder, x, p=p)


def fits_on_the_axis(folder: Path, x: Tensor, *, p: Tensor, steps: int) -> None:
    """Fit Q by each divergence; draw and tabulate where it ends."""
    points_per_unit = (len(x) - 1) / (AXIS_END - AXIS_START)  # turns probabilities of points into densities
    figure, axes = plt.subplots()
    label = "P: means 0 and 20, variance 4"
    axes.fill_between(x, p.softmax(0) * points_per_unit, color=COLORS["reference"], label=label)

    rows = {}
    for name, divergence in DIVERGENCES.items():
        # From mean 5, off centre on purpose: by symmetry a start at 10 would have no reason to choose a mode.
        theta = fit(divergence, points=x[:, None], p=p, start=[5.0], variance=5.0, steps=steps)
        q, mean, variance = student(x[:, None], theta), theta[0].item(), math.exp(2 * theta[1])
        values = [measure(q, p).item() for measure in (divergence, klft.forward_kl, klft.reverse_kl)]
        rows[name] = [mean, variance, *values]
        label = f"{name}: mean {mean:.1f}, variance {variance:.1f}"
        axes.plot(x, q.softmax(0) * points_per_unit, label=label, color=COLORS[name], **LINES[name])

    axes.set_title("Forward KL spreads over both modes, backward KL stays with one")
    axes.set(xlim=(-22, 42), ylim=(0, 0.32), xlabel="outcome", ylabel="probability density")
    axes.legend()
    columns = ["minimised", "mean", "variance", "value", *DIRECTIONS]
    publish(figure, folder, name="fits", title="One Gaussian Q fitted to P", columns=columns, rows=rows)


def zones_of_the_axis(folder: Path, x: Tensor, *, p: Tensor) -> None:
    """Slide a Q as narrow as one mode along the axis; draw both KLs, and tabulate them in three zones."""
    means = torch.arange(-28, 48.25, 0.25).double()
    q = student(x[:, None], torch.stack([means, torch.full_like(means, math.log(MODE_SD))], -1))  # [means, grid]
    places = {zone: means.tolist().index(mean) for zone, mean in ZONES.items()}

    # P as a silhouette at the bottom: its density in units of a logarithmic axis, two e-folds high.
    figure, axes = plt.subplots()
    density = p.softmax(0) / p.softmax(0).max()
    axes.fill_between(x, 0.3, 0.3 * torch.exp(2 * density), color=COLORS["reference"], label="P")

    rows = {zone: [mean] for zone, mean in ZONES.items()}
    for name, label_height in (("forward KL", 1.3), ("backward KL", 0.5)):  # a label above its line, and one below
        kl, color = DIVERGENCES[name](q, p.expand_as(q)), COLORS[name]
        marks = {"marker": "o", "markersize": 12, "markevery": list(places.values())}
        axes.semilogy(means, kl, linewidth=4, color=color, label=name, **marks)
        for zone, place in places.items():
            value = kl[place].item()
            rows[zone].append(value)
            axes.text(ZONES[zone], value * label_height, f"{value:.3g}", color=color, horizontalalignment="center")

    axes.set_xticks([-20, 0, 10, 20], labels=["-20\nfar from both", "0\non one mode", "10\nbetween", "20\n"])
    axes.set_title("A narrow Q: forward KL is least between the modes, backward KL on one")
    axes.set(xlim=(-25, 45), ylim=(0.3, 400), xlabel="mean of Q (variance 4)", ylabel="KL in nats")
    axes.legend()
    columns = ["zone", "mean", *DIRECTIONS]
    publish(figure, folder, name="zones", title="Where a narrow Q (variance 4) sits", columns=columns, rows=rows)


def on_words(folder: Path, steps: int) -> None:
    """A small next-word model fitted to the reference's words: who keeps which ones, and who leaks."""
    table = torch.tensor(list(WORDS.values()), dtype=torch.float64)
    points, probabilities = table[:, :2], table[:, 2]
    p, valid = probabilities.log(), probabilities > 0.01

    # One fit per valid word as a start, because the loss has several minima; the lowest is kept.
    students = {"reference P": p}
    for name in DIRECTIONS:
        divergence, candidates = DIVERGENCES[name], []
        for start in points[valid].tolist():
            theta = fit(divergence, points=points, p=p, start=start, variance=1.0, steps=steps)
            candidates.append(student(points, theta))
        values = [divergence(q, p).item() for q in candidates]
        students[f"{name} fit"] = candidates[values.index(min(values))]

    logits = torch.stack(list(students.values()))  # [students, words]
    mass_on_valid = logits.softmax(-1)[:, valid].sum(-1).tolist()
    rows = dict(zip(WORDS, logits.softmax(-1).T.tolist(), strict=True))
    rows["on valid words"] = mass_on_valid
    rows["entropy"] = klft.entropy(logits).tolist()
    for name in DIRECTIONS:
        rows[f"{name} to P"] = DIVERGENCES[name](logits, p.expand_as(logits)).tolist()

    # Three bars per word, side by side.
    figure, axes = plt.subplots()
    bar_width, colors = 0.28, [COLORS["reference"], *[COLORS[name] for name in DIRECTIONS]]
    for number, (name, q) in enumerate(students.items()):
        places = (torch.arange(len(q)) + bar_width * (number - 1)).numpy()
        label = f"{name}: {mass_on_valid[number]:.1%} on valid words"
        axes.bar(places, q.softmax(0).numpy(), width=bar_width, color=colors[number], label=label)
    axes.axvspan(8.5, 14.5, color="#F0F0F0", zorder=0, label="words that do not fit")
    axes.set_xticks(range(len(WORDS)), labels=list(WORDS), rotation=40, ha="right", rotation_mode="anchor")
    axes.set(ylabel="probability", title='"The food was ...": forward KL covers and leaks, backward KL picks')
    axes.legend()
    publish(figure, folder, name="words", title="The food was ...", columns=["word", *students], rows=rows)


def main(settings: Settings) -> None:
    """Check the settings, then draw and print everything."""
    if settings.grid < 141 or settings.steps < 1:
        raise ValueError(f"needs grid >= 141 and steps >= 1; got grid = {settings.grid}, steps = {settings.steps}")
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({**STYLE, "savefig.dpi": 60 if settings.smoke else 160})  # pyright: ignore
    grid = min(settings.grid, 561) if settings.smoke else settings.grid
    on_an_axis(folder, grid=grid, steps=settings.steps)
    on_words(folder, steps=settings.steps)
    print(f"Pictures: {folder}/mode_seeking_*.png. Next: edit WORDS in this file, see which ones each direction keeps.")


if __name__ == "__main__":
    with exit_codes(), one_line_errors():
        (settings,) = parse_arguments((Settings,))
        main(settings)
