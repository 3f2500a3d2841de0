"""Fine-tune on something new and keep what the model knew: SFTTrainer with a KL anchor to where it started.

    python recipes/sft_anchor.py --config recipes/sft_anchor.yaml

A small language model has read product reviews (recipes/reviews.py), good and bad, of eight families of products: A.
Then it is fine-tuned on praise of a ninth, camping gear: B. Plain SFT also unlearns A. The anchor is one more term of
the loss: coef * KL between the reference's and the policy's next-token distributions, on B's own tokens alone. No text
of A is seen again; it can help because contexts are shared: after "The", the reference expects all products.

2026-11-27, one CPU core, about 5 minutes, three seeds, 95 % intervals. Plain SFT takes B's held-out NLL from 1.95 to
0.556 nats per token, and A's from 0.657 up to 1.143. A forward KL with coefficient 0.3 prevents 59 +- 1 % of that loss
of A, with B 7.7 % higher in the end; against plain SFT that is stopped where its B is the same it prevents 55 +- 3 %.
With 0.2: 52 +- 1 %, B 5.1 +- 0.7 % higher, and 49 +- 4 % at the same B. The reverse KL does less, with 0.3 46 +- 4 %, B
17 % higher, 27 +- 5 % at the same B: it only forbids what the reference would not say, while the forward one holds on
to all that it would. Trained twice as long (--steps 160) plain SFT overfits, B 0.612 and A 1.320; with the forward KL
and 0.3 B is 1.2 +- 0.9 % higher, and 63 +- 2 % of A's loss is prevented. recipes/sft_anchor_curves.png: all runs.
"""

import copy
import itertools
import math
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from reviews import CONFIG, write_reviews
from rich.console import Console
from rich.table import Table
from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from klft import FixedKL, FrozenReference, KLPenalty, token_logps
from klft.arguments import check_positive, check_writable, one_line_errors, parse_arguments
from klft.diagnostics.loading import quiet
from klft.exits import exit_codes
from klft.integrations import KLAnchorMixin
from klft.loading import load_model
from klft.prompts import pad

NEW_PRODUCT = "tent"  # its family is what B is about
COLORS = {"": "black", "forward": "#0072B2", "reverse": "#D55E00"}
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t by number of seeds


class AnchoredSFTTrainer(KLAnchorMixin, SFTTrainer):
    """SFTTrainer with one more argument, `penalty`."""


@dataclass
class Settings:
    """Fields of sft_anchor.yaml."""

    coefs: list[float] = field(default_factory=lambda: [0.2, 0.3])
    directions: list[str] = field(default_factory=lambda: ["forward", "reverse"])
    seeds: int = 3
    pretraining_steps: int = 800
    steps: int = 80
    eval_steps: int = 10
    batch_size: int = 16
    learning_rate: float = 2e-3
    output_dir: str = "runs/sft_anchor"
    smoke: bool = False


@dataclass
class Texts:
    """Token ids of reviews: those the reference reads, those of the fine-tuning, and held-out ones of both."""

    tokenizer: Any
    train_a: list[list[int]]
    held_out_a: list[list[int]]
    train_b: list[list[int]]
    held_out_b: list[list[int]]


def write_texts(smoke: bool) -> Texts:
    """Reviews of A and B, and a tokenizer of both."""
    grammar = yaml.safe_load(CONFIG.read_text())["grammar"]
    families_b = [family for family in grammar["products"] if NEW_PRODUCT in family["names"]]
    families_a = [family for family in grammar["products"] if family not in families_b]
    sizes_a, sizes_b = {"train": 4000, "held_out": 200}, {"train": 300, "held_out": 150}
    if smoke:
        sizes_a = sizes_b = {"train": 64, "held_out": 20}
    reviews_a = write_reviews(grammar | {"products": families_a}, sizes_a, rng=random.Random(0))
    praise = grammar | {"products": families_b, "labels": ["positive"]}
    reviews_b = write_reviews(praise, sizes_b, rng=random.Random(1))

    texts = [review["text"] for review in reviews_a + reviews_b]
    empty_tokenizer = GPT2Tokenizer(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<pad>")
    tokenizer = empty_tokenizer.train_new_from_iterator(texts, 600, show_progress=False)
    parts = [
        [tokenizer(review["text"] + "<eos>")["input_ids"] for review in reviews if review["split"] == split]
        for reviews in (reviews_a, reviews_b)
        for split in ("train", "held_out")
    ]
    return Texts(tokenizer, *parts)


@torch.no_grad()
def mean_nll(model: Any, rows: list[list[int]]) -> float:
    """Nats per token of these texts; the first token of a text is predicted by nothing."""
    total, count = 0.0, 0
    for start in range(0, len(rows), 100):
        ids, mask = pad(rows[start : start + 100], 0, side="right")
        logits = model(input_ids=ids, attention_mask=mask.long()).logits
        predicted = mask[:, 1:]
        total -= token_logps(logits[:, :-1][predicted], ids[:, 1:][predicted]).sum().item()
        count += int(predicted.sum())
    return total / count


class Curve(TrainerCallback):
    """NLL of held-out A and B while the policy trains."""

    def __init__(self, texts: Texts, every: int):
        self.texts, self.every, self.points = texts, every, []

    def on_step_end(self, args, state, control, model: Any = None, **kwargs):
        """Every so many steps, and after the last."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            model.eval()
            nll_a, nll_b = (mean_nll(model, rows) for rows in (self.texts.held_out_a, self.texts.held_out_b))
            self.points.append((state.global_step, nll_a, nll_b))
            model.train()


def sft_config(folder: Path, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> SFTConfig:
    """What all trainings share."""
    return SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=10,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def as_dataset(rows: list[list[int]]) -> Dataset:
    """Token ids, as SFTTrainer takes them."""
    return Dataset.from_dict({"input_ids": rows})


def make_reference(settings: Settings, texts: Texts) -> PreTrainedModel:
    """The model that has read A: a small Llama, trained from nothing."""
    set_seed(0)
    special_ids = {f"{name}_token_id": getattr(texts.tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(texts.tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=160,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **special_ids,
    )
    model = LlamaForCausalLM(config)
    options = {"steps": settings.pretraining_steps, "batch_size": 32, "learning_rate": 4e-3, "seed": 0}
    trainer = SFTTrainer(
        model=model,
        args=sft_config(Path(settings.output_dir), **options),
        train_dataset=as_dataset(texts.train_a),
        processing_class=texts.tokenizer,
    )
    trainer.train()
    # Loaded anew: the trainer has put a forward of its own into this object, and a copy would still run the original's.
    folder = Path(settings.output_dir) / "reference"
    model.save_pretrained(folder)
    texts.tokenizer.save_pretrained(folder)
    return load_model(folder)


def fine_tune(
    reference: Any, *, texts: Texts, settings: Settings, direction: str, coef: float, seed: int
) -> list[tuple[int, float, float]]:
    """Fine-tune a copy of the reference on B. Returns (step, NLL of A, NLL of B) along the way."""
    options = {"steps": settings.steps, "batch_size": settings.batch_size, "learning_rate": settings.learning_rate}
    curve = Curve(texts, settings.eval_steps)
    common: dict[str, Any] = {
        "model": copy.deepcopy(reference).requires_grad_(True),  # the reference is frozen
        "args": sft_config(Path(settings.output_dir), **options, seed=seed),
        "train_dataset": as_dataset(texts.train_b),
        "processing_class": texts.tokenizer,
        "callbacks": [curve],
    }
    if not coef:
        trainer = SFTTrainer(**common)
    else:
        # The whole difference. Exact KL over the vocabulary, of each token that the SFT loss counts.
        penalty = KLPenalty(
            FrozenReference(reference),
            direction=direction,  # pyright: ignore[reportArgumentType] - checked with the settings
            estimator="exact",
            placement="loss",
            controller=FixedKL(coef),
        )
        trainer = AnchoredSFTTrainer(**common, penalty=penalty)
    trainer.train()
    return curve.points


def at_equal_b(points: list[tuple[int, float, float]], nll_b: float) -> float:
    """A's NLL where the curve first comes down to this NLL of B, between the points around it; else where B is best."""
    for (_, a_before, b_before), (_, a_after, b_after) in itertools.pairwise(points):
        if b_after <= nll_b < b_before:
            share = (b_before - nll_b) / (b_before - b_after)
            return a_before + share * (a_after - a_before)
    return min(points, key=lambda point: point[2])[1]


def interval(values: list[float]) -> str:
    """Mean and its 95 % interval over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} +- {T_95.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def summarise(curves: dict[tuple[str, float], list], start: tuple[int, float, float]) -> Table:
    """One row per arm: both NLLs in the end, and how much of what plain SFT loses of A it keeps."""
    table = Table(
        title="Held-out NLL, nats per token; kept: share of what plain SFT loses of A, at its end / at this B"
    )
    for column in ("anchor", "A", "B", "B / plain B", "kept", "kept, equal B"):
        table.add_column(column, justify="left" if column == "anchor" else "right")
    table.add_row("before", f"{start[1]:.3f}", f"{start[2]:.3f}", "", "", "")
    plain = curves[("", 0.0)]
    for (direction, coef), arm in curves.items():
        ends = [points[-1] for points in arm]
        cells = [f"{statistics.mean(end[number] for end in ends):.3f}" for number in (1, 2)]
        if coef:
            pairs = list(zip(ends, plain, strict=True))
            cells.append(interval([end[2] / other[-1][2] for end, other in pairs]))
            for losses in (
                [(end[1] - start[1], other[-1][1] - start[1]) for end, other in pairs],
                [(end[1] - start[1], at_equal_b([start, *other], end[2]) - start[1]) for end, other in pairs],
            ):
                cells.append(interval([1 - ours / theirs for ours, theirs in losses]))
        table.add_row(f"{direction} {coef:g}" if coef else "none", *cells)
    return table


def draw(curves: dict[tuple[str, float], list], start: tuple[int, float, float], path: Path) -> None:
    """Both NLLs along training, one line per seed: right is what was learnt, up is what was lost."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), constrained_layout=True)
    largest = max(coef for _, coef in curves)
    for (direction, coef), arm in curves.items():
        style: dict[str, Any] = {"color": COLORS[direction], "linestyle": "--" if 0 < coef < largest else "-"}
        for number, points in enumerate(arm):
            label = (f"{direction} KL, coef {coef:g}" if coef else "no anchor") if number == 0 else None
            values_b, values_a = [point[2] for point in points], [point[1] for point in points]
            axes.plot(values_b, values_a, marker=".", label=label, **style)
            axes.plot(values_b[-1:], values_a[-1:], marker="o", **style)
    axes.axhline(start[1], color="#999999", linestyle=":", label="A before fine-tuning")
    axes.invert_xaxis()
    axes.set(xlabel="NLL of held-out B, nats per token: lower (right) is learnt", ylabel="NLL of held-out A")
    axes.set_title(f"What learning B costs of A (B before: {start[2]:.2f}); large dots: the end of training")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(settings: Settings) -> None:
    """Make the reference, fine-tune every arm with every seed, print the table, draw the picture."""
    if settings.smoke:
        settings.pretraining_steps, settings.steps, settings.eval_steps, settings.seeds = 5, 4, 2, 1
    folder = Path(settings.output_dir)
    texts = write_texts(settings.smoke)
    reference = make_reference(settings, texts)
    start = (0, mean_nll(reference, texts.held_out_a), mean_nll(reference, texts.held_out_b))
    print(f"before: A {start[1]:.3f}, B {start[2]:.3f}", flush=True)

    arms = [("", 0.0), *[(direction, coef) for direction in settings.directions for coef in settings.coefs]]
    curves: dict[tuple[str, float], list] = {arm: [] for arm in arms}
    for seed in range(settings.seeds):
        for direction, coef in arms:
            points = fine_tune(reference, texts=texts, settings=settings, direction=direction, coef=coef, seed=seed)
            curves[(direction, coef)].append(points)
            print(f"seed {seed}, {direction} {coef:g}: A {points[-1][1]:.3f}, B {points[-1][2]:.3f}", flush=True)

    Console().print(summarise(curves, start))
    draw(curves, start, path=folder / "sft_anchor.png")
    print(f"Picture: {folder}/sft_anchor.png")


if __name__ == "__main__":
    with exit_codes():
        with one_line_errors():
            (settings,) = parse_arguments((Settings,))
            check_positive(settings)
            if not settings.directions or not set(settings.directions) <= {"forward", "reverse"}:
                raise ValueError(f"directions: choose from forward, reverse; got {settings.directions}")
            check_writable(Path(settings.output_dir) / "sft_anchor.png")
            quiet()
        main(settings)
