"""PPOConfig: TrainingArguments plus what PPO and its KL penalty need, every field checked before a model is loaded."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, TrainingArguments

from klft.controllers import AdaptiveKL, Controller, FixedKL, PIController, ScheduledKL, TargetKL
from klft.parallel import why_no_zero3
from klft.penalty import ESTIMATES, PLACEMENTS, KLPenalty, TokenRule, effective_placement
from klft.ppo.fields import (
    SCHEDULES,
    VALIDATORS,
    as_dict,
    choices,
    contradictions,
    scheduler_problem,
)  # fmt: skip
from klft.references import Reference


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of PPOTrainer. One optimizer step is one PPO minibatch, so clipping, schedule, logging and saving are
    the Trainer's. A rollout takes `per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches`
    prompts on each process and is used for `num_ppo_epochs` passes.

    Raises ValueError for a wrong type, NaN, a number out of range, an unknown choice, an option that would be ignored.
    """

    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Arguments of from_pretrained for a model given by name, as a dict or JSON; dtype float32."},
    )
    total_episodes: int | None = field(
        default=None, metadata={"help": "Stop after this many completions; sets max_steps."}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps per pass over a rollout."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Keep the last so many tokens of a prompt; None keeps all."}
    )
    max_completion_length: int = field(default=64, metadata={"help": "Tokens generated at most."})
    tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a forward pass at most, padding included: a minibatch's rows are sorted by length and "
            "cut by it, into equally many passes on every process. Any prompt and completion together must fit. None: "
            "each pass has per_device_train_batch_size rows."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "For sampling and for every log-probability and KL."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; below 1 sampling is off-policy."})
    top_k: int = field(default=0, metadata={"help": "Sample among the k likeliest; 0 = all. Above 0: off-policy."})
    generation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "More GenerationConfig fields, as a dict or JSON."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Arguments of the chat template, as a dict or JSON; a column of that name goes over them."},
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Coefficient of the KL penalty; its start if it changes."})
    kl_coef_end: float | None = field(
        default=None, metadata={"help": "Coefficient after kl_horizon episodes, for kl_controller=scheduled."}
    )
    kl_estimator: str = field(
        default="k1", metadata={"help": f"One of {', '.join(ESTIMATES)}; exact: loss and reward."}
    )
    kl_direction: str = field(default="reverse", metadata={"help": "reverse = KL(policy||reference), or forward."})
    kl_placement: str = field(default="reward", metadata={"help": f"One of {', '.join(PLACEMENTS)}."})
    kl_controller: str = field(
        default="fixed",
        metadata={"help": "fixed; adaptive, pi, target: to kl_target; scheduled, scheduled_cosine: to kl_coef_end."},
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "KL per sequence, in nats, that a controller aims at."}
    )
    kl_horizon: int = field(
        default=10000, metadata={"help": "Episodes that adaptive needs to react, a schedule to end."}
    )
    kl_shard_vocab: str = field(
        default="auto",
        metadata={
            "help": "Vocabulary sharding. auto: follow the head's placement; tp: use the TP shards; dp: shard over "
            "data-parallel ranks, all-gather hidden states; none: replicated."
        },
    )
    reference_placement: str | None = field(
        default=None,
        metadata={
            "help": "Where a reference model lies. replicated: on every process; sharded: split over them, by FSDP2; "
            "offloaded: on the CPU between uses. Default: as it was made, replicated."
        },
    )
    reward_model_placement: str | None = field(
        default=None, metadata={"help": "Where reward models lie: replicated, sharded or offloaded, likewise."}
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "Skip the rest of a rollout once KL(old||new) per token passes this."}
    )
    cliprange: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    cliprange_low: float | None = field(default=None, metadata={"help": "Below 1, instead of cliprange."})
    cliprange_high: float | None = field(default=None, metadata={"help": "Above 1, instead of cliprange (DAPO)."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip of the value function's change."})
    dual_clip: float | None = field(
        default=None, metadata={"help": "Bound (> 1) on the ratio where the advantage is negative."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Rescale per-token rewards to unit variance."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One per reward function; default 1."})
    reward_timeout: float | None = field(
        default=None, metadata={"help": "End the run if a reward function takes longer, in seconds; None: never."}
    )
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
    self_test: bool = field(
        default=True, metadata={"help": "Check policy, reference and optimizer on three short rows before step 1."}
    )
    log_completions: bool = field(default=False, metadata={"help": "Print and save a table of completions."})
    num_completions_to_print: int = field(default=4, metadata={"help": "Rows of that table."})

    kl_log_tokens: int = field(
        default=0,
        metadata={"help": "Write a token-level KL table of every so many rollouts and the last; and a page. 0: none."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Remove another run's checkpoints, tables and page from output_dir, unless it is resumed."},
    )
    resume_changes: list[str] | None = field(
        default=None,
        metadata={"help": "Settings that a resumed run may change, by name; others must be as in the checkpoint."},
    )

    # The Trainer's own fields whose stock default does not suit PPO.
    learning_rate: float = field(default=3e-6, metadata={"help": "AdamW's initial learning rate."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "AdamW's epsilon; 1e-5 is PPO's usual one."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two logs."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay off: it logs a NaN loss as 0.0."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns go to the reward functions."})

    def __post_init__(self):
        validators = VALIDATORS | choices(TrainingArguments)
        answers = {name: validate(getattr(self, name)) for name, validate in validators.items()}
        problems = [f"{name} {why}" for name, why in answers.items() if why]
        problems += contradictions(self) if not problems else []
        if problems:
            raise ValueError("PPOConfig: " + "; ".join(problems))
        if not torch.accelerator.is_available():
            # Without this, a launcher's several processes on a CPU would each train alone and never say so.
            self.use_cpu = True
        super().__post_init__()
        if self.use_cpu and self.ddp_timeout != TrainingArguments.ddp_timeout:
            raise ValueError(
                f"PPOConfig: ddp_timeout={self.ddp_timeout} would be ignored on a CPU, by transformers: leave it out. "
                "reward_timeout ends reward functions that hang"
            )
        problem = scheduler_problem(self) or why_no_zero3(self)
        if problem:
            raise ValueError(f"PPOConfig: {problem}")
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
        self._count_steps()

    @property
    def model_options(self) -> dict[str, Any]:
        """model_init_kwargs as a dict."""
        return as_dict(self.model_init_kwargs)

    @property
    def rollout_batch_size(self) -> int:
        """Prompts of one rollout, on each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def clip_sides(self) -> tuple[float, float]:
        """The ratio stays in 1 - first ... 1 + second."""
        low, high = (self.cliprange if each is None else each for each in (self.cliprange_low, self.cliprange_high))
        return low, high

    @property
    def episodes_per_rollout(self) -> int:
        """Completions of one rollout, over all processes; those of a tensor-parallel group have theirs in common."""
        return self.rollout_batch_size * (self.world_size // self.tp_size)

    tp_size = 1  # tensor-parallel size, known once the model is loaded; no field

    def split_tensors(self, processes: int) -> None:
        """So many processes in a row hold one model together, by tensor parallelism, and have the same samples."""
        self.tp_size = processes
        self._count_steps()

    def _count_steps(self) -> None:
        if self.total_episodes is not None:
            self.max_steps = math.ceil(self.total_episodes / self.episodes_per_rollout) * self.steps_per_rollout

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps made from one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def micro_batches_per_rollout(self) -> int:
        """Forward-backward passes made from one rollout, on each process."""
        return self.steps_per_rollout * self.gradient_accumulation_steps

    def generation_config(self, eos_token_ids: list[int], pad_token_id: int) -> GenerationConfig:
        """Sampling settings: the fields here, then `generation_kwargs` over them.

        A completion ends with one of `eos_token_ids`; `pad_token_id` follows it.
        """
        extra = as_dict(self.generation_kwargs)
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

    def penalty(self, reference: Reference, token_rule: TokenRule | None = None) -> KLPenalty:
        """The penalty against `reference` that the kl_* fields describe; `token_rule` as KLPenalty's."""
        placement = effective_placement(self.kl_estimator, self.kl_placement)
        names: Any = {"direction": self.kl_direction, "estimator": self.kl_estimator, "placement": placement}  # checked
        return KLPenalty(reference, **names, controller=self.controller(), token_rule=token_rule)

    def controller(self) -> Controller:
        """The controller that the kl_* fields describe."""
        if self.kl_controller == "fixed":
            return FixedKL(self.kl_coef)
        if self.kl_controller in SCHEDULES:
            assert self.kl_coef_end is not None
            return ScheduledKL(self.kl_coef, self.kl_coef_end, self.kl_horizon, SCHEDULES[self.kl_controller])
        assert self.kl_target is not None
        if self.kl_controller == "adaptive":
            return AdaptiveKL(self.kl_coef, self.kl_target, self.kl_horizon)
        return {"pi": PIController, "target": TargetKL}[self.kl_controller](self.kl_coef, self.kl_target)
