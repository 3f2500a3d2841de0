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
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

import klft
from klft.cli import one_line_errors, parse_arguments

try:
    from matplotlib import pyplot as plt
except ModuleNotFoundError:
    print("mode_seeking: the pictures need matplotlib: pip install klft[plots]", file=sys.stderr)
    raise SystemExit(2) from None

BLUE, RED, ORANGE, GREY = "#0072B2", "#D55E00", "#E69F00", "#BBBBBB"  # Okabe-Ito, and grey for P
STYLE = {"backend": "agg", "figure.figsize": (11, 6), "figure.constrained_layout.use": True, "font.size": 16}
# From mean 5 jsd ends in its wide optimum, 0.255; on a mode (mean 0, variance 4) it is lower, 0.216.
FITS = {"forward KL": (klft.forward_kl, {"color": BLUE, "lw": 9, "alpha": 0.6}),
        "backward KL": (klft.reverse_kl, {"color": RED, "lw": 4}),
        "jsd": (klft.jsd, {"color": "black", "lw": 2, "ls": (0, (6, 4))}),
        "skew": (klft.skew_kl, {"color": ORANGE, "lw": 4, "ls": ":"})}  # fmt: skip
BOTH = {"forward KL": (klft.forward_kl, BLUE), "backward KL": (klft.reverse_kl, RED)}
# "The food was ...": word -> its embedding (x, y) and the reference's probability. Nine valid words in three groups;
# three adjectives that lie between the groups but fit no food; three words that are no adjectives, far out.
WORDS = {"delicious": (2.2, 2.1, 0.160), "tasty": (2.6, 1.5, 0.140), "great": (2.2, 0.9, 0.120),
         "awful": (-2.5, 2.1, 0.120), "bland": (-2.1, 1.5, 0.100), "stale": (-2.5, 0.9, 0.080),
         "cold": (-0.3, -2.3, 0.110), "warm": (0.1, -2.9, 0.090), "hot": (-0.3, -3.5, 0.074),
         "wooden": (-0.4, 0.7, 0.001), "legal": (-1.0, -0.6, 0.001), "electric": (0.4, 0.0, 0.001),
         "Tuesday": (5.7, -4.6, 0.001), "quickly": (-6.6, -4.6, 0.001), "of": (0.1, 7.2, 0.001)}  # fmt: skip


@dataclass
class Settings:
    output_dir: str = "runs/mode_seeking"
    grid: int = 2801
    steps: int = 200
    smoke: bool = False


def student(points: Tensor, theta: Tensor) -> Tensor:
    """Logits [*, V] of Q over points [V, D]: a Gaussian; theta [*, D + 1] is its centre and its log sd."""
    # Over words it is a language-model head, (h.e_v - |e_v|^2 / 2) / s^2: D numbers of context h and one temperature.
    # That caps its capacity: of two words and one between them, the one between is never the least likely.
    return -(points - theta[..., None, :-1]).square().sum(-1) / (2 * torch.exp(2 * theta[..., -1:]))


def fit(divergence, points: Tensor, p: Tensor, start: list[float], variance: float, steps: int) -> Tensor:
    """theta where gradient descent on divergence(Q, P) ends, from a Gaussian with that start and variance."""
    theta = torch.tensor([*start, math.log(variance) / 2], dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([theta], 1, steps, None, 1e-9, 1e-14, line_search_fn="strong_wolfe")

    def loss() -> float:
        descent.zero_grad()
        (value := divergence(student(points, theta), p)).backward()
        return value.item()

    descent.step(loss)
    if math.isnan(loss()) or theta.grad is None or theta.grad.abs().max() > 1e-6:
        raise ValueError(f"a fit did not converge within steps = {steps}: give it more")
    return theta.detach()


def publish(folder: Path, name: str, title: str, columns: list[str], rows: dict[str, list[float]]) -> None:
    plt.legend()
    plt.savefig(folder / f"mode_seeking_{name}.png")
    plt.close()
    table = Table(*[Column(name, justify="right" if i else "left") for i, name in enumerate(columns)], title=title)
    for name, row in rows.items():
        table.add_row(name, *[f"{value:.3f}" for value in row])
    Console().print(table)


def on_an_axis(folder: Path, grid: int, steps: int) -> None:
    x, means = torch.linspace(-60, 80, grid, dtype=torch.float64), torch.arange(-28, 48.25, 0.25).double()
    slide = student(x[:, None], torch.stack([means, torch.full_like(means, math.log(2))], -1))  # sd 2, at each mean
    p = torch.logaddexp(slide[means == 0], slide[means == 20])[0]  # log-densities on an axis are logits
    fits, per_unit = {}, (grid - 1) / 140
    plt.fill_between(x, p.softmax(0) * per_unit, color=GREY, label="P: means 0 and 20, variance 4")
    for name, (divergence, line) in FITS.items():
        theta = fit(divergence, x[:, None], p, [5.0], 5.0, steps)
        q, mean, variance = student(x[:, None], theta), theta[0].item(), math.exp(2 * theta[1])
        fits[name] = [mean, variance, *[kl(q, p).item() for kl in (divergence, klft.forward_kl, klft.reverse_kl)]]
        plt.plot(x, q.softmax(0) * per_unit, label=f"{name}: mean {mean:.1f}, variance {variance:.1f}", **line)
    title = "Forward KL spreads over both modes, backward KL stays with one"
    plt.gca().set(xlim=(-22, 42), ylim=(0, 0.32), xlabel="outcome", ylabel="probability density", title=title)
    publish(folder, "fits", "One Gaussian Q fitted to P", ["minimised", "mean", "variance", "value", *BOTH], fits)
    plt.fill_between(x, 0.3, 0.3 * torch.exp(2 * p.softmax(0) / p.softmax(0).max()), color=GREY, label="P")
    zones = {"far from both modes": [-20.0], "on one mode": [0.0], "between the modes": [10.0]}
    for name, (divergence, color) in BOTH.items():
        kl = divergence(slide, p.expand_as(slide))
        plt.semilogy(means, kl, lw=4, color=color, marker="o", ms=12, markevery=[32, 112, 152], label=name)
        for row in zones.values():
            row.append(kl[means == row[0]].item())
            plt.text(row[0], row[-1] * (1.3 if color == BLUE else 0.5), f"{row[-1]:.3g}", color=color, ha="center")
    plt.xticks([-20, 0, 10, 20], ["-20\nfar from both", "0\non one mode", "10\nbetween", "20\n"])
    title = "A narrow Q: forward KL is least between the modes, backward KL on one"
    plt.gca().set(xlim=(-25, 45), ylim=(0.3, 400), xlabel="mean of Q (variance 4)", ylabel="KL in nats", title=title)
    publish(folder, "zones", "Where a narrow Q (variance 4) sits", ["zone", "mean", *BOTH], zones)


def on_words(folder: Path, steps: int) -> None:
    table = torch.tensor(list(WORDS.values()), dtype=torch.float64)
    points, p, valid = table[:, :2], table[:, 2].log(), table[:, 2] > 0.01
    students = {"reference P": (p, GREY)}
    for name, (divergence, color) in BOTH.items():  # one start per valid word; the best is kept
        fits = [student(points, fit(divergence, points, p, start, 1.0, steps)) for start in points[valid].tolist()]
        students[f"{name} fit"] = (min(fits, key=lambda q, d=divergence: d(q, p)), color)
    for i, (name, (q, color)) in enumerate(students.items()):
        label = f"{name}: {q.softmax(0)[valid].sum():.1%} on valid words"
        plt.bar((torch.arange(len(q)) + 0.28 * (i - 1)).numpy(), q.softmax(0).numpy(), 0.28, color=color, label=label)
    plt.axvspan(8.5, 14.5, color="#F0F0F0", zorder=0, label="words that do not fit")
    plt.xticks(range(len(p)), list(WORDS), rotation=40, ha="right", rotation_mode="anchor")
    plt.gca().set(ylabel="probability", title='"The food was ...": forward KL covers and leaks, backward KL picks')
    logits = torch.stack([q for q, _ in students.values()])
    rows = dict(zip(WORDS, logits.softmax(-1).T.tolist(), strict=True))
    rows |= {"on valid words": logits.softmax(-1)[:, valid].sum(-1).tolist(), "entropy": klft.entropy(logits).tolist()}
    rows |= {f"{name} to P": divergence(logits, p.expand_as(logits)).tolist() for name, (divergence, _) in BOTH.items()}
    publish(folder, "words", "The food was ...", ["word", *students], rows)


if __name__ == "__main__":
    with one_line_errors():
        (settings,) = parse_arguments((Settings,))
        if settings.grid < 141 or settings.steps < 1:
            raise ValueError(f"needs grid >= 141 and steps >= 1; got grid = {settings.grid}, steps = {settings.steps}")
        (folder := Path(settings.output_dir)).mkdir(parents=True, exist_ok=True)
        plt.rcParams.update({**STYLE, "savefig.dpi": 60 if settings.smoke else 160})  # pyright: ignore
        on_an_axis(folder, min(settings.grid, 561) if settings.smoke else settings.grid, settings.steps)
        on_words(folder, settings.steps)
    print(f"Pictures: {folder}/mode_seeking_*.png. Next: edit WORDS in this file, see which ones each direction keeps.")
