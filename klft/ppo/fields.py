"""What each field of PPOConfig may be, and which of the Trainer's say nothing to PPO.

Imports no transformers: a wrong number on a command line is to be answered before that has taken its seconds.
"""

import json
import math
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from klft.choices import LEAST_TEMPERATURE
from klft.controllers import Shape
from klft.estimators import DIRECTIONS
from klft.parallel import PLACEMENTS as MODEL_PLACEMENTS
from klft.penalty import ESTIMATES, PLACEMENTS, check_combination
from klft.prompts import why_no_template_kwargs
from klft.scoring import SHARDINGS
from klft.writing import did_you_mean

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from klft.ppo.config import PPOConfig

SCHEDULES: dict[str, Shape] = {"scheduled": "linear", "scheduled_cosine": "cosine"}
CONTROLLERS = ("fixed", "adaptive", "pi", "target", *SCHEDULES)

Validator = Callable[[Any], str | None]
"""What is wrong with a value, to follow the field's name ("must be ..., got ..."), or None."""


def number(
    *, least: float | None = None, above: float | None = None, most: float = math.inf, below: float = math.inf,
    whole: bool = False, optional: bool = False,
) -> Validator:  # fmt: skip
    """A finite number >= `least` or > `above`, and <= `most` and < `below`; `optional`: or None."""

    def validate(value: Any) -> str | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return f"must be {'a whole number' if whole else 'a number'}, got {value!r}"
        over = value > above if above is not None else value >= (least or 0)
        if over and math.isfinite(value) and value <= most and (value < below or below == math.inf):
            return None
        lower = f"> {above}" if above is not None else f">= {least or 0}"
        upper = f" and <= {most}" if most < math.inf else f" and < {below}" if below < math.inf else ""
        return f"must be finite and {lower}{upper}, got {value!r}"

    return validate


def choice(*known: str, optional: bool = False) -> Validator:
    """One of some names; `optional`: or None."""

    def validate(value: Any) -> str | None:
        if value in known or (optional and value is None):
            return None
        similar = did_you_mean(value if isinstance(value, str) else "", known)  # first: the line may be cut
        return f"{f'is unknown{similar} It ' if similar else ''}must be one of {', '.join(known)}, got {value!r:.80}"

    return validate


def boolean(value: Any) -> str | None:
    """True or False, and not a number that could pass for it."""
    return None if isinstance(value, bool) else f"must be true or false, got {value!r}"


def finite_numbers(value: Any) -> str | None:
    """None, or a list of finite numbers."""
    numbers = isinstance(value, list) and all(number(least=-math.inf)(each) is None for each in value)
    return None if value is None or numbers else f"must be a list of finite numbers, got {value!r}"


def names(value: Any) -> str | None:
    """None, or a list of names."""
    fine = isinstance(value, list) and all(isinstance(n, str) and n[:1].isalpha() for n in value)
    return None if value is None or fine else f"must be a list of names, got {value!r}"


def as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A dict, or one in JSON; empty for None."""
    return json.loads(value) if isinstance(value, str) else dict(value or {})


def json_object(value: Any) -> str | None:
    """None, a dict, or one in JSON."""
    if value is None:
        return None
    try:
        given = json.loads(value) if isinstance(value, str) else value  # a list in JSON is no dict, and is refused
    except json.JSONDecodeError:
        given = None
    return None if isinstance(given, dict) else f"must be a dict, or one in JSON, got {value!r}"


def generation_settings(value: Any) -> str | None:
    """None, a dict of GenerationConfig's fields that PPO leaves open, or one in JSON."""
    wrong = json_object(value)
    if wrong or value is None:
        return wrong
    given = as_dict(value)
    problems = [why for why in map(_unfit_for_generation, given) if why]
    answers = {name: GENERATION_VALUES[name](given[name]) for name in GENERATION_VALUES if name in given}
    problems += [f"{name} {why}" for name, why in answers.items() if why]
    return f"cannot be used: {'; '.join(problems)}" if problems else None


def _unfit_for_generation(name: str) -> str | None:
    if name in ("temperature", "top_p", "top_k"):
        return f"{name} is a field of its own"
    if name in ("max_new_tokens", "max_length"):
        return f"{name} is max_completion_length here"
    if name in ("do_sample", "num_beams", "num_return_sequences", "eos_token_id", "pad_token_id"):
        return f"{name} cannot be changed: PPO samples one completion per prompt, until a known end"
    if name == "return_dict_in_generate" or name.startswith("output_"):
        return f"{name} changes what generate returns: PPO takes the tokens, and scores them itself"
    from transformers import GenerationConfig

    return None if name in GenerationConfig().to_dict() else f"generation has no setting {name!r}"


def warmup(value: Any) -> str | None:
    """A number of steps, or a share of all below 1."""
    wrong = number()(value)
    return wrong or (f"must be whole, or below 1 for a share, got {value!r}" if value > 1 and value % 1 else None)


def trackers(value: Any) -> str | None:
    """Names of trackers that are installed, "all" or "none"."""
    from transformers.integrations import get_available_reporting_integrations

    names = [value] if isinstance(value, str) else list(value or [])
    missing = sorted(set(names) - {"all", "none", *get_available_reporting_integrations()})
    if not missing:
        return None
    ours = all(name in ("tensorboard", "trackio", "wandb") for name in missing)
    way_out = f"pip install klft[{','.join(missing)}]" if ours else "pip install it"
    return f"names {', '.join(map(repr, missing))}, which is unknown or not installed: {way_out}, or say none"


def scheduler_problem(args: "TrainingArguments") -> str | None:
    """What the learning-rate schedule says to its lr_scheduler_kwargs."""
    import torch
    from transformers import SchedulerType, get_scheduler

    optimizer, schedule = torch.optim.SGD([torch.zeros(1)]), SchedulerType(args.lr_scheduler_type)
    try:
        get_scheduler(schedule, optimizer, 0, 2, args.lr_scheduler_kwargs)  # pyright: ignore
    except (TypeError, ValueError) as error:
        return f"lr_scheduler_kwargs do not go with lr_scheduler_type={schedule.value}: {error}"
    return None


def _precision_problems(args: "TrainingArguments") -> list[str]:
    """Precisions that are asked for and cannot be had. (bf16 on a CPU can.)"""
    import torch

    on_cpu = args.use_cpu or not torch.accelerator.is_available()
    of_gpus = [name for name in ("fp16", "tf32") if on_cpu and getattr(args, name)]
    whole = [name for name in ("fp16_full_eval", "bf16_full_eval") if getattr(args, name)]
    found = [f"{name} needs a GPU, and this runs on a CPU" for name in of_gpus]
    found += [f"{name} casts the policy for an evaluation, and not its value function" for name in whole]
    return [f"{problem}: leave it out, or say bf16=True" for problem in found]


_COUNT, _POSITIVE = number(least=1, whole=True), number(above=0)
GENERATION_VALUES: dict[str, Validator] = {  # what generate would refuse once the models are loaded, or never
    "repetition_penalty": _POSITIVE,
    "encoder_repetition_penalty": _POSITIVE,
    "no_repeat_ngram_size": number(whole=True, optional=True),
    "min_new_tokens": number(whole=True, optional=True),
    "min_p": number(most=1, optional=True),
    "typical_p": number(above=0, most=1, optional=True),
    "epsilon_cutoff": number(below=1, optional=True),
    "eta_cutoff": number(below=1, optional=True),
}
# TrlParser lets wrong types, NaN and unknown choices through, and the Trainer takes its own fields as they come.
VALIDATORS: dict[str, Validator] = {
    "model_init_kwargs": json_object,
    "total_episodes": number(least=1, whole=True, optional=True),
    "num_ppo_epochs": _COUNT,
    "num_mini_batches": _COUNT,
    "max_prompt_length": number(least=1, whole=True, optional=True),
    "max_completion_length": _COUNT,
    "temperature": number(least=LEAST_TEMPERATURE),
    "tokens_per_micro_batch": number(least=1, whole=True, optional=True),
    "top_p": number(above=0, most=1),
    "top_k": number(whole=True),
    "generation_kwargs": generation_settings,
    "chat_template_kwargs": why_no_template_kwargs,
    "kl_coef": number(),
    "kl_coef_end": number(optional=True),
    "kl_estimator": choice(*ESTIMATES),
    "kl_direction": choice(*DIRECTIONS),
    "kl_placement": choice(*PLACEMENTS),
    "kl_controller": choice(*CONTROLLERS),
    "kl_shard_vocab": choice(*SHARDINGS),
    "reference_placement": choice(*MODEL_PLACEMENTS, optional=True),
    "reward_model_placement": choice(*MODEL_PLACEMENTS, optional=True),
    "kl_target": number(above=0, optional=True),
    "kl_horizon": _COUNT,
    "target_kl": number(above=0, optional=True),
    "cliprange": _POSITIVE,
    "cliprange_low": number(above=0, optional=True),
    "cliprange_high": number(above=0, optional=True),
    "cliprange_value": _POSITIVE,
    "dual_clip": number(above=1, optional=True),
    "vf_coef": number(),
    "gamma": number(most=1),
    "lam": number(most=1),
    "whiten_rewards": boolean,
    "reward_weights": finite_numbers,
    "normalize_scores": boolean,
    "reward_clip": number(above=0, optional=True),
    "missing_eos_penalty": number(optional=True),
    "bootstrap_truncated": boolean,
    "disable_dropout": boolean,
    "self_test": boolean,
    "log_completions": boolean,
    "num_completions_to_print": number(whole=True),
    "kl_log_tokens": number(whole=True),
    "overwrite_output_dir": boolean,
    "resume_changes": names,
    "reward_timeout": number(above=0, optional=True),
    # The Trainer's own.
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "max_steps": number(least=-1, whole=True),
    "num_train_epochs": _POSITIVE,
    "max_grad_norm": number(),
    "weight_decay": number(),
    "save_steps": _POSITIVE,
    "logging_steps": _POSITIVE,
    "seed": number(whole=True),
    "learning_rate": number(),
    "adam_epsilon": number(),
    "adam_beta1": number(below=1),
    "adam_beta2": number(below=1),
    "warmup_steps": warmup,
    "eval_steps": number(above=0, optional=True),
    "save_total_limit": number(least=1, whole=True, optional=True),
    "report_to": trackers,
    "log_level": choice("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": choice("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "logging_nan_inf_filter": boolean,
    "remove_unused_columns": boolean,
}


def choices(config: type) -> dict[str, Validator]:
    """A choice for each field of an enum's type, by name: the Trainer's enums have messages that name no field."""
    return {
        name: choice(*(member.value for member in kind))
        for name, hint in get_type_hints(config).items()
        for kind in get_args(hint)
        if isinstance(kind, type) and issubclass(kind, Enum)
    }


# Fields of the Trainer that say nothing to PPO, as the Trainer has them by default, and why.
_OWN_LOSS, _OWN_METRICS = "PPO's loss has no labels", "evaluation measures rollouts, and computes no other metrics"
OWN_ORDER = "prompts are drawn and tokenised for each rollout"
IGNORED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, _OWN_LOSS),
    "label_names": (None, _OWN_LOSS),
    "include_for_metrics": ([], _OWN_METRICS),
    "batch_eval_metrics": (False, _OWN_METRICS),
    "eval_do_concat_batches": (True, _OWN_METRICS),
    "eval_use_gather_object": (False, _OWN_METRICS),
    "eval_accumulation_steps": (None, _OWN_METRICS),
    "prediction_loss_only": (False, _OWN_METRICS),
    "enable_jit_checkpoint": (False, "a checkpoint is saved after a SIGTERM anyway, at the end of a step"),
    "include_num_input_tokens_seen": ("no", "batches are prompts, whose tokens it cannot count"),
    "auto_find_batch_size": (False, "the sizes of a rollout follow from the batch size, which cannot change meanwhile"),
    "length_column_name": ("length", OWN_ORDER),
    "dataloader_persistent_workers": (False, OWN_ORDER),
    "dataloader_multiprocessing_context": (None, OWN_ORDER),
}


# --- fields against each other ----------------------------------------------------------------------------------------


def _controller_contradictions(args: "PPOConfig") -> list[str]:
    """Fields that the controller needs, and those it would ignore."""
    name, end, target = f"kl_controller={args.kl_controller!r}", args.kl_coef_end, args.kl_target
    scheduled = args.kl_controller in SCHEDULES
    aims, paced = not scheduled and args.kl_controller != "fixed", ("adaptive", *SCHEDULES)
    lost = not (args.kl_controller in paced or args.kl_horizon == 10000)
    found = [
        (aims and target is None, f"{name} needs kl_target, in nats per sequence"),
        (aims and args.kl_coef == 0, f"{name} multiplies kl_coef, so kl_coef=0 would stay 0"),
        (not aims and target is not None, f"kl_target would be ignored with {name}; say 'adaptive'"),
        (scheduled and end is None, f"{name} needs kl_coef_end, the coefficient it ends at"),
        (not scheduled and end is not None, f"kl_coef_end would be ignored with {name}; say 'scheduled'"),
        (lost, f"kl_horizon would be ignored with {name}: only {', '.join(paced)} have one"),
    ]
    return [problem for holds, problem in found if holds]


def contradictions(args: "PPOConfig") -> list[str]:
    """What its fields say against each other. Reads them by name: whatever has them all can be asked."""
    problems = _controller_contradictions(args) + _precision_problems(args)
    try:
        check_combination(args.kl_direction, args.kl_estimator, args.kl_placement)
    except ValueError as error:
        problems.append(str(error))
    for name, (default, why) in IGNORED.items():
        given = getattr(args, name, default)
        if given != default and not (given in (None, False) and default in ([], "no")):  # other words for it
            problems.append(f"{name} would be ignored: {why}; leave it at {default!r}")
    if args.train_sampling_strategy not in ("random", "sequential"):
        problems.append(f"train_sampling_strategy must be random or sequential: {OWN_ORDER}, without their lengths")
    if args.log_completions and args.logging_strategy == "no":
        problems.append("log_completions would be ignored with logging_strategy='no': they are shown with the logs")
    if args.total_episodes is not None and args.max_steps > 0:
        problems.append("total_episodes and max_steps say the same thing; give one of them")
    if (budget := args.tokens_per_micro_batch) is not None:
        most = args.max_completion_length + (args.max_prompt_length or 1)
        if budget < most:
            problems.append(f"tokens_per_micro_batch={budget} is below {most}: one prompt and completion")
        if args.gradient_accumulation_steps < 2:
            problems.append(
                "tokens_per_micro_batch needs gradient_accumulation_steps >= 2 (say 2, and half of "
                "per_device_train_batch_size): all passes but the last run before gradients are synchronised"
            )
    if args.neftune_noise_alpha is not None:
        problems.append("neftune_noise_alpha puts noise on the loss's forward alone: the first ratio is not 1")
    if args.logging_nan_inf_filter:
        problems.append("logging_nan_inf_filter must be False: it would log a NaN loss as 0.0")
    if args.dataloader_num_workers:
        problems.append("dataloader_num_workers must be 0: prompts are tokenised during the rollout")
    return problems
