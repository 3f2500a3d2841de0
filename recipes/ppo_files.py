"""Files that recipes/ppo.py leaves in output_dir: run.yaml, log.jsonl, samples.jsonl, and the card, README.md."""

import dataclasses
import json
import math
import platform
import shlex
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
import yaml
from ppo_options import QUANTISATION
from ppo_run import CURVE, KL, curve, mean_score, same_score
from transformers import TrainerCallback, TrainingArguments

import klft
from klft import AdapterReference, PPOConfig, PPOTrainer
from klft.arguments import fits, hints
from klft.writing import atomic_write, two_digits

SAMPLED = 64  # training prompts that are continued where none are held out
# What belongs to one start, to one machine, or to nobody else.
NOT_AGAIN = {"resume_from_checkpoint", "overwrite_output_dir", "hub_token", "smoke", *QUANTISATION}


# --- run.yaml --------------------------------------------------------------------------------------------------------


def settings(named: Iterable[str], *configs: Any) -> dict[str, Any]:
    """Every option of the recipe, the model and PPO; those of TrainingArguments that are `named`, as they came out."""
    found = {}
    others = {f.name for f in dataclasses.fields(TrainingArguments)} - set(named)
    for config in configs:
        types = hints(type(config))
        for name in types.keys() - NOT_AGAIN - (others if isinstance(config, PPOConfig) else set()):
            value = as_yaml(getattr(config, name))
            found[name] = value if fits(value, types[name]) else [value]  # ModelConfig takes one out of its list
    if found.get("total_episodes") is not None:
        found.pop("max_steps", None)  # it follows
    return dict(sorted(found.items()))


def as_yaml(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(name): as_yaml(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [as_yaml(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def again(path: Path) -> str:
    """The command that runs the settings of a run.yaml again."""
    return f"python recipes/ppo.py --config {shlex.quote(str(path))} --output_dir ANOTHER"


def write_settings(path: Path, found: dict[str, Any]) -> None:
    """The settings as YAML that `recipes/ppo.py --config` takes."""
    head = "# The settings of this run. To run it again, from the folder it was started in:\n"
    head += f"#   {again(path)}\n"
    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
    with atomic_write(path) as file:
        file.write((head + text).encode())


# --- log.jsonl -------------------------------------------------------------------------------------------------------


class LogLines(TrainerCallback):
    """Writes each log as one line of JSON; after a resume the file has what the checkpoint's run had logged by then."""

    def __init__(self, path: Path):
        self.path, self.early = path, []
        self.training = False

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        """Append the log."""
        if not state.is_world_process_zero:
            return
        if not self.training and state.global_step == 0:  # the evaluation before training, which makes a new state
            self.early.append(state.log_history[-1])
            self._write(self.early)
        else:
            with self.path.open("a") as file:
                file.write(line_of(state.log_history[-1]))

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin with what was logged before this training, be it by the run that it continues."""
        self.training = True
        if state.is_world_process_zero:
            self._write([*self.early, *state.log_history])

    def _write(self, logs: list[dict[str, Any]]) -> None:
        with atomic_write(self.path) as file:
            file.write("".join(map(line_of, logs)).encode())


def line_of(log: dict[str, Any]) -> str:
    """One log as a line; JSON has no NaN and no infinity, they are null."""
    plain = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in log.items()}
    return json.dumps(plain, default=float) + "\n"


# --- samples.jsonl, and the next command -----------------------------------------------------------------------------


def samples_wanted(trainer: PPOTrainer) -> int:
    """All held-out prompts; without them, some of those that were trained on."""
    held_out: Any = trainer.eval_dataset
    return len(held_out) if held_out else SAMPLED


def write_samples(samples: list[dict[str, Any]], path: Path) -> None:
    """One line of JSON per prompt."""
    with atomic_write(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in samples).encode())


def next_command(trainer: PPOTrainer, reference: str, trust_remote_code: bool) -> str:
    """`klft diff` of the policy against the reference on samples.jsonl, ready to be run."""
    folder = Path(trainer.args.output_dir or ".")
    adapter = isinstance(trainer.penalty.reference, AdapterReference)
    models = [str(folder), "--adapter"] if adapter else [str(folder), reference]
    trusted = ["--trust-remote-code"] if trust_remote_code else []
    texts = ["--texts", str(folder / "samples.jsonl"), "-o", str(folder / "diff.html")]
    return shlex.join(["klft", "diff", *models, *texts, *trusted])


# --- the card --------------------------------------------------------------------------------------------------------


def card(
    described: dict[str, str],
    settings: dict[str, Any],
    measured: tuple[dict[str, float], ...],
    history: list[dict],
    command: str,
) -> str:
    """README.md of output_dir: what was trained, against what, and what came of it. measured: (before, after)."""
    before, after = measured
    name = str(settings["model_name_or_path"])
    front: dict[str, Any] = {"tags": ["klft", "ppo"], "pipeline_tag": "text-generation"}
    front["library_name"] = "peft" if settings["use_peft"] else "transformers"
    if not Path(name).exists():
        front["base_model"] = name  # the hub's name for it
    rows = "\n".join(f"| {key} | {value} |".replace("\n", " ") for key, value in described.items())
    results = "No prompts were held out, so nothing was measured before and after."
    if before and after:
        count = int(described["held out"])
        results = (
            f"On {count} held-out prompts, sampled:\n\n| | before | after |\n|---|---|---|\n"
            f"| mean score | {mean_score(before, count)} | {mean_score(after, count)} |\n"
            f"| exact reverse KL to the reference, nats per sequence "
            f"| {two_digits(before[KL])} | {two_digits(after[KL])} |"
        )
    results += f"\n\n{problem}" if (problem := same_score(history)) else ""
    lines = [CURVE, ["---:"] * len(CURVE), *curve(history)]
    course = "\n".join(f"| {' | '.join(line)} |" for line in lines) if curve(history) else "No rollout was logged."
    versions = f"klft {klft.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}, "
    versions += f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"""---
{yaml.safe_dump(front).strip()}
---

# {Path(name).name}, trained by PPO under a KL penalty

| | |
|---|---|
{rows}

{results}

In training, on each rollout's own prompts (KL in nats per sequence):

{course}

Run again: `{again(Path(settings["output_dir"]) / "run.yaml")}` ([run.yaml](run.yaml) has all settings, `log.jsonl`
every log, `samples.jsonl` prompts continued by the policy and by its reference, with their scores). Where in the text
the two part:

```
{command}
```

Made with {versions}.
"""


class CardPPOTrainer(PPOTrainer):
    """PPOTrainer that writes `card` where the Trainer and PEFT write their own."""

    card = ""

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """README.md of output_dir; also when the policy is pushed to the hub."""
        if self.is_world_process_zero() and self.card:
            with atomic_write(Path(self.args.output_dir or ".") / "README.md") as file:
                file.write(self.card.encode())
