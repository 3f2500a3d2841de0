"""PPOConfig: TrainingArguments plus what PPO and its KL penalty need, every field checked before a model is loaded."""

import dataclasses
import json
import math
import os
import typing
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, TrainingArguments

from klft.controllers import AdaptiveKL, Controller, FixedKL, PIController, TargetKL
from klft.estimators import DIRECTIONS
from klft.penalty import ESTIMATES, PLACEMENTS, KLPenalty, check_combination, effective_placement
from klft.references import Reference

CONTROLLERS = ("fixed", "adaptive", "pi", "target")
VOCABULARY_SPLITS = ("auto", "tp", "dp", "none")

# What every number must satisfy: name -> (lower bound, inclusive?, upper bound, inclusive?)
_BOUNDS: dict[str, tuple[float, bool, float, bool]] = {
    "total_episodes": (1, True, math.inf, False),
    "num_ppo_epochs": (1, True, math.inf, False),
    "num_mini_batches": (1, True, math.inf, False),
    "max_prompt_length": (1, True, math.inf, False),
    "max_completion_length": (1, True, math.inf, False),
    "temperature": (1e-3, True, math.inf, False),
    "top_p": (0, False, 1, True),
    "top_k": (0, True, math.inf, False),
    "kl_coef": (0, True, math.inf, False),
    "kl_target": (0, False, math.inf, False),
    "kl_horizon": (1, True, math.inf, False),
    "target_kl": (0, False, math.inf, False),
    "cliprange": (0, False, math.inf, False),
    "cliprange_value": (0, False, math.inf, False),
    "dual_clip": (1, False, math.inf, False),
    "vf_coef": (0, True, math.inf, False),
    "gamma": (0, True, 1, True),
    "lam": (0, True, 1, True),
    "reward_clip": (0, False, math.inf, False),
    "missing_eos_penalty": (0, True, math.inf, False),
    "num_completions_to_print": (0, True, math.inf, False),
    "kl_log_tokens": (0, True, math.inf, False),
    # The Trainer's own, which it takes as they come.
    "per_device_train_batch_size": (1, True, math.inf, False),
    "per_device_eval_batch_size": (1, True, math.inf, False),
    "gradient_accumulation_steps": (1, True, math.inf, False),
    "max_steps": (-1, True, math.inf, False),
    "num_train_epochs": (0, False, math.inf, False),
    "max_grad_norm": (0, True, math.inf, False),
    "weight_decay": (0, True, math.inf, False),
    "save_steps": (0, False, math.inf, False),
    "logging_steps": (0, False, math.inf, False),
    "seed": (0, True, math.inf, False),
    "learning_rate": (0, True, math.inf, False),
    "adam_epsilon": (0, True, math.inf, False),
}
_CHOICES = {
    "kl_estimator": ESTIMATES,
    "kl_direction": DIRECTIONS,
    "kl_placement": PLACEMENTS,
    "kl_controller": CONTROLLERS,
    "kl_shard_vocab": VOCABULARY_SPLITS,
}


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of PPOTrainer. One optimizer step is one PPO minibatch, so clipping, schedule, logging and saving are
    the Trainer's. A rollout takes `per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches`
    prompts on each process and is used for `num_ppo_epochs` passes.

    Raises ValueError for a wrong type, NaN, a number out of range, an unknown choice, an option that would be ignored.
    """

    total_episodes: int | None = field(
        default=None, metadata={"help": "Stop after this many completions; sets max_steps."}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps per pass over a rollout."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Keep the last so many tokens of a prompt; None keeps all."}
    )
    max_completion_length: int = field(default=64, metadata={"help": "Tokens generated at most."})
    temperature: float = field(default=1.0, metadata={"help": "For sampling and for every log-probability and KL."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; below 1 sampling is off-policy."})
    top_k: int = field(default=0, metadata={"help": "Sample among the k likeliest; 0 = all. Above 0: off-policy."})
    generation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "More GenerationConfig fields, as a dict or JSON."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Coefficient of the KL penalty (its start if adaptive)."})
    kl_estimator: str = field(
        default="k1", metadata={"help": f"One of {', '.join(ESTIMATES)}; exact: loss and reward."}
    )
    kl_direction: str = field(default="reverse", metadata={"help": "reverse = KL(policy||reference), or forward."})
    kl_placement: str = field(default="reward", metadata={"help": f"One of {', '.join(PLACEMENTS)}."})
    kl_controller: str = field(default="fixed", metadata={"help": f"One of {', '.join(CONTROLLERS)}."})
    kl_target: float | None = field(
        default=None, metadata={"help": "KL per sequence, in nats, that a controller aims at."}
    )
    kl_horizon: int = field(default=10000, metadata={"help": "Episodes over which kl_controller=adaptive reacts."})
    kl_shard_vocab: str = field(
        default="auto",
        metadata={
            "help": "Who computes which rows of the vocabulary. auto: as the head lies; tp: its rows, as tensor "
            "parallelism laid them; dp: data-parallel processes share them and swap hidden states; none: everyone all."
        },
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "Skip the rest of a rollout once KL(old||new) per token passes this."}
    )
    cliprange: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip of the value function's change."})
    dual_clip: float | None = field(
        default=None, metadata={"help": "Bound (> 1) on the ratio where the advantage is negative."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Rescale per-token rewards to unit variance."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One per reward function; default 1."})
    normalize_scores: bool = field(
        default=False, metadata={"help": "Scores minus their running mean, over their running deviation."}
    )
    reward_clip: float | None = field(default=None, metadata={"help": "Clip of the score, after normalising."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion that did not end."}
    )
    bootstrap_truncated: bool = field(
        default=False, metadata={"help": "Value of the last state, not 0, after a completion that did not end."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Without it the first ratio is not 1."})
    log_completions: bool = field(default=False, metadata={"help": "Print and save a table of completions."})
    num_completions_to_print: int = field(default=4, metadata={"help": "Rows of that table."})

    kl_log_tokens: int = field(
        default=0, metadata={"help": "Write a token-level KL table of every so many rollouts, and a page; 0 = none."}
    )

    # The Trainer's own fields whose stock default does not suit PPO.
    learning_rate: float = field(default=3e-6, metadata={"help": "AdamW's initial learning rate."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "AdamW's epsilon; 1e-5 is PPO's usual one."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two logs."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay off: it logs a NaN loss as 0.0."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns go to the reward functions."})

    def __post_init__(self):
        problems = [p for f in dataclasses.fields(PPOConfig) for p in _problem(f, getattr(self, f.name))]
        problems += self._contradictions() if not problems else []
        if problems:
            raise ValueError("PPOConfig: " + "; ".join(problems))
        if not torch.accelerator.is_available():
            # Without this, a launcher's several processes on a CPU would each train alone and never say so.
            self.use_cpu = True
        super().__post_init__()
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != self.world_size:
            raise ValueError(
                f"PPOConfig: {launched} processes were launched, but this one sees a world of {self.world_size}: they "
                "would train apart. Set ACCELERATE_USE_CPU=true on a CPU, and make PPOConfig before any Accelerator."
            )
        if self.kl_controller == "adaptive" and 0.2 * self.episodes_per_rollout >= self.kl_horizon:
            raise ValueError(
                f"PPOConfig: kl_horizon={self.kl_horizon} is too short for {self.episodes_per_rollout} episodes per "
                f"rollout: one update could take kl_coef to 0. Take more than {self.episodes_per_rollout / 5:.0f}."
            )
        if self.total_episodes is not None:
            self.max_steps = math.ceil(self.total_episodes / self.episodes_per_rollout) * self.steps_per_rollout

    def _contradictions(self) -> list[str]:
        found = []
        steers = self.kl_controller != "fixed"
        if steers and self.kl_target is None:
            found.append(f"kl_controller={self.kl_controller!r} needs kl_target, in nats per sequence")
        if steers and self.kl_coef == 0:
            found.append(f"kl_controller={self.kl_controller!r} multiplies kl_coef, so kl_coef=0 would stay 0")
        if not steers and self.kl_target is not None:
            found.append("kl_target would be ignored with kl_controller='fixed'; say kl_controller='adaptive'")
        if self.kl_controller != "adaptive" and self.kl_horizon != 10000:
            found.append("kl_horizon would be ignored: only kl_controller='adaptive' has one")
        try:
            check_combination(self.kl_direction, self.kl_estimator, self.kl_placement)
        except ValueError as error:
            found.append(str(error))
        if self.total_episodes is not None and self.max_steps > 0:
            found.append("total_episodes and max_steps say the same thing; give one of them")
        if self.logging_nan_inf_filter:
            found.append("logging_nan_inf_filter must be False: it would log a NaN loss as 0.0")
        if self.dataloader_num_workers:
            found.append("dataloader_num_workers must be 0: prompts are tokenised during the rollout")
        return found

    @staticmethod
    def resumed_fields() -> list[str]:
        """Own fields that a resumed run may not change: all but those that only say how long, or what is shown."""
        free = {"total_episodes", "log_completions", "num_completions_to_print", "kl_log_tokens"}
        own = [f.name for f in dataclasses.fields(PPOConfig) if f.name in PPOConfig.__annotations__]
        inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
        return [name for name in own if name not in free | inherited]

    @property
    def rollout_batch_size(self) -> int:
        """Prompts of one rollout, on each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def episodes_per_rollout(self) -> int:
        """Completions of one rollout, over all processes."""
        return self.rollout_batch_size * self.world_size

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps made from one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def micro_batches_per_rollout(self) -> int:
        """Forward-backward passes made from one rollout, on each process."""
        return self.steps_per_rollout * self.gradient_accumulation_steps

    def generation_config(self, eos_token_ids: list[int], pad_token_id: int) -> GenerationConfig:
        """How completions are sampled: the fields here, then `generation_kwargs` over them."""
        extra = self.generation_kwargs
        extra = json.loads(extra) if isinstance(extra, str) else dict(extra or {})
        own = {
            "max_new_tokens": self.max_completion_length,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "eos_token_id": eos_token_ids,
            "pad_token_id": pad_token_id,
        }
        return GenerationConfig(**(own | extra))

    def penalty(self, reference: Reference) -> KLPenalty:
        """The penalty against `reference` that the kl_* fields describe."""
        return KLPenalty(
            reference,
            direction=self.kl_direction,
            estimator=self.kl_estimator,
            placement=effective_placement(self.kl_estimator, self.kl_placement),
            controller=self.controller(),
        )

    def controller(self) -> Controller:
        """The controller that the kl_* fields describe."""
        if self.kl_controller == "fixed":
            return FixedKL(self.kl_coef)
        assert self.kl_target is not None
        if self.kl_controller == "adaptive":
            return AdaptiveKL(self.kl_coef, self.kl_target, self.kl_horizon)
        return {"pi": PIController, "target": TargetKL}[self.kl_controller](self.kl_coef, self.kl_target)


def _unfit_for_generation(name: str) -> str | None:
    if name in ("temperature", "top_p", "top_k"):
        return f"{name} is a field of its own"
    if name in ("max_new_tokens", "max_length"):
        return f"{name} is max_completion_length here"
    if name in ("do_sample", "num_beams", "num_return_sequences", "eos_token_id", "pad_token_id"):
        return f"{name} cannot be changed: PPO samples one completion per prompt, until a known end"
    return None if name in GenerationConfig().to_dict() else f"generation has no setting {name!r}"


def _problem(f: dataclasses.Field, value: typing.Any) -> list[str]:
    """What is wrong with one of our own fields; TrlParser lets wrong types, NaN and unknown choices through."""
    if f.name in _CHOICES and value not in _CHOICES[f.name]:
        return [f"{f.name} must be one of {', '.join(_CHOICES[f.name])}, got {value!r}"]
    if f.name in _BOUNDS:
        if value is None and f.default is None:
            return []
        whole = f.type in (int, int | None, "int", "int | None")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return [f"{f.name} must be {'a whole number' if whole else 'a number'}, got {value!r}"]
        low, low_in, high, high_in = _BOUNDS[f.name]
        inside = (value >= low if low_in else value > low) and (value <= high if high_in else value < high)
        if not inside:
            upper = "" if high == math.inf else f" and {'<=' if high_in else '<'} {high}"
            return [f"{f.name} must be finite and {'>=' if low_in else '>'} {low}{upper}, got {value!r}"]
    if f.type is bool and f.name in PPOConfig.__annotations__ and not isinstance(value, bool):
        return [f"{f.name} must be true or false, got {value!r}"]
    if f.name == "generation_kwargs" and value is not None:
        try:
            given = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError:
            given = None
        if not isinstance(given, dict):
            return [f"generation_kwargs must be a dict, or one in JSON, got {value!r}"]
        return [f"generation_kwargs: {why}" for why in map(_unfit_for_generation, given) if why]
    if f.name == "reward_weights" and value is not None:
        numbers = isinstance(value, list) and all(
            isinstance(w, (int, float)) and not isinstance(w, bool) and math.isfinite(w) for w in value
        )
        return [] if numbers else [f"reward_weights must be a list of finite numbers, got {value!r}"]
    return []
