"""What the recipes of PPO share: refused options, a run with an evaluation before and after it, and what is printed."""

import math
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import datasets
import torch
import transformers
from accelerate.utils import gather_object
from ppo_trackers import group_charts, send_page
from rich.console import Console
from rich.table import Table
from transformers import TrainerState
from trl import ModelConfig, get_peft_config

from klft import AdapterReference, PPOConfig, PPOTrainer
from klft.parallel import gathered
from klft.ppo.collector import continue_prompts
from klft.ppo.completions import readable
from klft.ppo.rewards import call_reward_functions, is_judged, reward_weights
from klft.prompts import TEMPLATE_COLUMNS, template_arguments
from klft.writing import did_you_mean, two_digits

TABLE_ROWS = 14
EXAMPLES = 3
SCORE, KL = "eval_reward/score/mean", "eval_kl/sequence/reverse/mean"


# --- arguments -------------------------------------------------------------------------------------------------------


def check_processes(wanted: int | None, found: int) -> None:
    """Raise ValueError where another number of processes runs than was asked for."""
    if wanted not in (None, found):
        way_out = "Launch as the first line of this recipe shows, or say --processes with the number you want."
        raise ValueError(f"asked for {wanted} process(es), got {found}. {way_out}")


def adapter_config(model_args: ModelConfig, policy: torch.nn.Module) -> Any:
    """The LoRA that the options ask for, or None. Raises ValueError for modules that the policy does not have."""
    config: Any = get_peft_config(model_args)
    names = getattr(config, "target_modules", None)
    if isinstance(names, str) and re.fullmatch(r"[\w.]+", names):  # ModelConfig takes one name out of its list ...
        names = config.target_modules = {names}  # ... and PEFT would read it as a pattern of whole names
    known = {name for name, module in policy.named_modules() if isinstance(module, torch.nn.Linear)}
    for name in sorted(names) if isinstance(names, (set, list)) else ():
        if not any(f".{each}".endswith(f".{name}") for each, _ in policy.named_modules()):
            ends = sorted({each.rpartition(".")[2] for each in known})
            raise ValueError(
                f"--lora_target_modules {name}: the model has no such module{did_you_mean(name, ends)} "
                f"Its linear layers: {', '.join(ends)}"
            )
    return config


# --- training --------------------------------------------------------------------------------------------------------


def no_bars_of_libraries() -> None:
    """Loading and saving show no bars of their own: they would stand between the lines of a run."""
    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


def say_loading(name: str, args: PPOConfig) -> None:
    """Name what is being loaded: a large model takes minutes."""
    if args.process_index == 0:
        print(f"loading {name}", flush=True)


def console_of(trainer: Any) -> Console:
    """A console that prints from the first process only."""
    return Console(quiet=not trainer.is_world_process_zero(), markup=False, highlight=False, soft_wrap=True)


def train(
    trainer: Any, card: Callable[[dict[str, float], dict[str, float]], str] | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Train and save; (metrics before, metrics after) on the evaluation prompts, empty where there are none.

    All processes evaluate, train and save together. `card`: the text of README.md, from both metrics.
    """
    args = trainer.args
    group_charts(trainer)
    if trainer.eval_dataset:
        held_out = f"measuring {len(trainer.eval_dataset)} held-out prompts before training, and once more after it"
        console_of(trainer).print(held_out)
    before = trainer.evaluate() if trainer.eval_dataset else {}
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    send_page(trainer)
    after = trainer.evaluate() if trainer.eval_dataset else {}
    if card is not None:
        trainer.card = card(before, after)  # also what a push to the hub takes along
    trainer.save_model(args.output_dir)
    if card is not None:
        trainer.create_model_card()  # in the place of PEFT's
    return before, after


# --- what both models say --------------------------------------------------------------------------------------------


@contextmanager
def reference_model(trainer: PPOTrainer):
    """The trainer's reference as a model to generate from: the policy without its adapter, or the frozen copy."""
    reference: Any = trainer.penalty.reference
    if isinstance(reference, AdapterReference):
        with policy_model(trainer) as policy, policy.disable_adapter():
            yield policy
    else:
        with reference.placement.in_use(), gathered(reference.model):
            yield reference.model


@contextmanager
def policy_model(trainer: Any):
    """The trainer's policy as a model to generate from, whole on every process."""
    with gathered(trainer.model_wrapped):
        yield trainer.accelerator.unwrap_model(trainer.model)


@torch.no_grad()
def completions_of(trainer: Any, model: Any, rows: list[dict[str, Any]]) -> tuple[list[Any], list[list[int]]]:
    """(a completion of each row's prompt as the reward functions see it, its token ids), sampled as in training."""
    args, written, ids = trainer.args, [], []
    vocab_size = trainer.scorer.shared_vocab(trainer.accelerator.unwrap_model(trainer.model))
    for start in range(0, len(rows), args.per_device_eval_batch_size):
        batch = rows[start : start + args.per_device_eval_batch_size]
        completions, _, texts, _ = continue_prompts(model, batch, trainer.processing_class, args, vocab_size)
        written += texts
        ids += [row[m].tolist() for row, m in zip(completions.completion_ids, completions.mask, strict=True)]
    return written, ids


def call_rewards(
    functions: list[Any],
    rows: list[dict[str, Any]],
    completions: list[Any],
    completion_ids: list[list[int]],
    args: PPOConfig,
    trainer_state: TrainerState,
) -> torch.Tensor:
    """Scores [completions, functions] by reward functions, called as PPOTrainer does; NaN where one does not apply."""
    return call_reward_functions(
        functions,
        [row["prompt"] for row in rows],
        completions,
        completion_ids,
        {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
        [template_arguments(row, args.chat_template_kwargs) for row in rows],
        timeout=args.reward_timeout,
        trainer_state=trainer_state,
        log_metric=lambda name, value: None,
        log_extra=lambda name, values: None,
    )


def total_scores(trainer: Any, rows: list[dict], said: tuple[list[Any], list[list[int]]]) -> list[float | None]:
    """The weighted sum of the reward functions for each completion; None where none of them applies."""
    scores = call_rewards(trainer.reward_funcs, rows, *said, trainer.args, trainer.state)
    weights = reward_weights(trainer.args.reward_weights, len(trainer.reward_funcs))
    totals = (scores * weights).nansum(-1).tolist()
    return [total if judged else None for total, judged in zip(totals, is_judged(scores).tolist(), strict=True)]


def continued_by_both(trainer: Any, count: int) -> list[dict[str, Any]]:
    """The first `count` evaluation prompts (without them: of training) continued by reference and policy, sampled.

    One row each: the prompt, with what a conversation is rendered by; both continuations, as the reward functions see
    them; their scores, None where no function gives one. The processes share the prompts out, and all must call.
    """
    args = trainer.args
    dataset = trainer.eval_dataset or trainer.train_dataset
    count = min(count, len(dataset))
    rank, processes = args.process_index // args.tp_size, args.world_size // args.tp_size
    # As many for each process, since a sharded reward model computes on all of them at once: the first ones repeat.
    mine = [i % count for i in range(rank, -(-count // processes) * processes, processes)]
    rows = [dataset[i] for i in mine]
    said = {}
    for name, model in (("reference", reference_model(trainer)), ("policy", policy_model(trainer))):
        torch.manual_seed(args.seed + rank)
        with model as whole:
            said[name] = completions_of(trainer, whole, rows)
    scores = {name: total_scores(trainer, rows, texts) for name, texts in said.items()}
    made = [
        {name: row[name] for name in ("prompt", *TEMPLATE_COLUMNS) if name in row}
        | {"completion": said["policy"][0][i], "score": scores["policy"][i]}
        | {"reference_completion": said["reference"][0][i], "reference_score": scores["reference"][i]}
        for i, row in enumerate(rows)
    ]
    by_prompt = dict(reversed(gather_object(list(zip(mine, made, strict=True)))))
    return [by_prompt[i] for i in range(count)]


def samples_table(samples: list[dict[str, Any]]) -> Table:
    """The first of what `continued_by_both` made."""
    table = Table(title="the same prompts, continued by both, with their scores", show_lines=True)
    for name in ("prompt", "the reference", "score", "the policy", "score"):
        table.add_column(name)
    for row in samples[:EXAMPLES]:
        cells = [readable(row[name]) for name in ("prompt", "reference_completion", "completion")]
        scores = ["" if row[name] is None else two_digits(row[name]) for name in ("reference_score", "score")]
        table.add_row(cells[0], cells[1], scores[0], cells[2], scores[1])
    return table


# --- tables ----------------------------------------------------------------------------------------------------------


CURVE = ("step", "score", "reverse KL", "forward KL", "k1", "k3", "coef", "tokens")


def curve(history: list[dict]) -> list[list[str]]:
    """Score, KL and its estimators by step, as CURVE names them: at most TABLE_ROWS rows, the last one among them."""
    logs = [log for log in history if "kl/sequence/reverse/mean" in log]
    stride, rows = len(logs) // TABLE_ROWS + 1, []
    for log in reversed(logs[::-1][::stride]):  # every stride-th log, counted from the last
        # The logs have nats per token; times tokens per completion they are nats per sequence.
        length = log["completions/mean_length"]
        kls = [log[f"kl/{name}/mean"] * length for name in ("reverse", "forward", "k1", "k3")]
        numbers = [log.get("reward/score/mean", math.nan), *kls, log["kl/coef"]]
        rows.append([str(log["step"]), *map(two_digits, numbers), f"{length:.1f}"])
    return rows


def kl_table(history: list[dict]) -> Table:
    """The curve as a table for the terminal."""
    table = Table(title="score, and KL to the reference in nats per sequence")
    for name in CURVE:
        table.add_column(name, justify="right")
    for row in curve(history):
        table.add_row(*row)
    return table


def mean_score(metrics: dict[str, float], count: int) -> str:
    """The mean score of an evaluation on `count` prompts, +- its standard error; nan where none was judged."""
    deviation = metrics.get(SCORE.replace("mean", "std"))  # over all, not a sample's
    error = f" ± {two_digits(deviation / math.sqrt(count - 1))}" if deviation is not None and count > 1 else ""
    return f"{two_digits(metrics.get(SCORE, math.nan))}{error}"


def same_score(history: list[dict]) -> str | None:
    """That all completions of training had one score, or none, in words for the end of a run."""
    logs = [log for log in history if "kl/coef" in log]
    scores = {log.get("reward/score/mean") for log in logs}
    if len(scores) != 1 or any(log.get("reward/score/std") for log in logs):
        return None
    (score,), trained = scores, f"{logs[-1]['episode']:.0f} completions"
    learnt = "nothing but the KL was learnt" if any(log["kl/coef"] for log in logs) else "nothing was learnt"
    if score is None:
        return f"None of the {trained} was given a score: {learnt}."
    return f"The score was the same, {two_digits(score)}, for all {trained}: {learnt}."


def print_results(
    trainer: Any, console: Console, before: dict[str, float], after: dict[str, float], samples: list[dict[str, Any]]
) -> None:
    """The KL table, what both models say to the samples' prompts, and score and KL on evaluation prompts."""
    history = trainer.state.log_history
    console.print(kl_table(history) if curve(history) else "No rollout was logged: there is no table of score and KL.")
    if samples:
        console.print(samples_table(samples))
    if before and after:
        count = len(trainer.eval_dataset)
        console.print(
            f"On {count} held-out prompts the mean score went from {mean_score(before, count)} to "
            f"{mean_score(after, count)},\n"
            f"at an exact reverse KL of {two_digits(after[KL])} nats per sequence."
        )
    if problem := same_score(history):
        console.print(problem)
