"""What must not change between a checkpoint and the run that continues it: compared, named, and let through by name."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase, TrainerCallback

from klft.penalty import KLPenalty
from klft.ppo.config import PPOConfig
from klft.ppo.guards import on_all_ranks
from klft.ppo.inputs import prompt_rows
from klft.ppo.rewards import RewardFunction, reward_name, reward_names
from klft.ppo.value import is_value_parameter
from klft.prompts import encode_prompts, template_arguments
from klft.references import AdapterReference, FrozenReference, Reference
from klft.references.protocol import parts_of

# Beginnings of the names of fields that a resumed run may change freely; every other field must stay as it was.
FREE = (
    # how long (but see _length)
    "max_steps", "num_train_epochs", "total_episodes",
    # what is shown, saved, evaluated, and where to
    "output_dir", "overwrite_output_dir", "resume_", "save_", "enable_jit_checkpoint", "push_to_hub", "hub_", "log",
    "disable_tqdm", "report_to", "run_name", "project", "trackio_", "num_completions_to_print", "kl_log_tokens",
    "self_test", "eval_", "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "restore_callback_states", "do_", "debug", "skip_memory_metrics",
    # where, and in which order of the same operations, it is computed
    "use_cpu", "local_rank", "ddp_", "dataloader_", "gradient_checkpointing", "activation_checkpointing",
    "torch_empty_cache_steps", "reward_timeout", "reference_placement", "reward_model_placement",
    "tokens_per_micro_batch",
)  # fmt: skip
# What the state in a checkpoint was made for, or holds itself: a change would not fit, or would do nothing.
FIXED = {
    "world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "num_ppo_epochs", "num_mini_batches",
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "optimizer",
}  # fmt: skip
# Changes of these change which prompts come next.
_ORDER = {"seed", "data_seed", "train_sampling_strategy", "prompts", "prompt_texts", "chat_template_kwargs"}
_PATHS = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}  # of a PEFT configuration: free


def models_and_data(
    policy: nn.Module,
    penalty: KLPenalty,
    reward_funcs: list[RewardFunction],
    prompts: Dataset | None,
    optimizer: Optimizer | None,
) -> dict[str, Any]:
    """What a run is made of beside its arguments, as names and hashes; before it has trained anything.

    Of weights that are trained, the checkpoint has the values: here are their names, shapes and dtypes. Of frozen ones
    a few numbers too. `optimizer`: the one that was passed, or None.
    """
    named = list(policy.named_parameters())
    value = [(name, p) for name, p in named if is_value_parameter(name)]
    config = getattr(policy, "peft_config", {})
    adapters = {name: c.to_dict() for name, c in config.items()}
    return {
        "policy": _described(policy, [(name, p) for name, p in named if not is_value_parameter(name)]),
        "value_model": _described(None, value),
        "reference": [f"{weight:g} {_reference(part)}" for weight, part in parts_of(penalty.reference)],
        "peft": sorted(adapters),
        **{f"peft.{name}.{k}": v for name, c in adapters.items() for k, v in c.items() if k not in _PATHS},
        "optimizer": optimizer and f"{type(optimizer).__qualname__} {optimizer.defaults}",
        "reward_funcs": reward_names(reward_funcs),
        "reward_code": [_source_of(f) for f in reward_funcs],
        "token_rule": penalty.token_rule and reward_name(penalty.token_rule),
        "prompts": len(prompts or ()),
        "prompt_texts": prompts and _hash_of(prompts),
    }


def _described(module: nn.Module | None, named: Iterable[tuple[str, Tensor]], *, values: bool = True) -> str:
    """Class, number of tensors, and a hash of their names, shapes, dtypes and, of frozen ones, some values."""
    digest, named = xxhash.xxh3_64(), list(named)
    for name, t in named:
        digest.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        if not values or t.requires_grad:
            continue
        whole = t.full_tensor() if isinstance(t, DTensor) else t
        plain = type(whole) in (Tensor, nn.Parameter) and not whole.is_meta  # not packed by a quantiser
        if plain and whole.numel():
            some = whole.detach().reshape(-1)[:: max(whole.numel() // 8, 1)][:8]
            digest.update(some.to("cpu", torch.float64).numpy().tobytes())
    kind = "" if module is None else f"{type(module).__name__.removeprefix('FSDP')} of "  # FSDP2 makes subclasses
    return f"{kind}{len(named)} tensors, {digest.hexdigest()[:8]}"


def _reference(part: Reference) -> str:
    if not isinstance(part, (FrozenReference, AdapterReference)):
        return f"{type(part).__name__} {part.name}"
    model, moves = part.model, bool(part.state_dict())
    how = f" decay {getattr(part, 'decay', None)} every {getattr(part, 'every', None)}" if moves else ""
    return f"{type(part).__name__}{how} {_described(model, model.named_parameters(), values=not moves)}"


def _source_of(f: Any) -> str:
    """Module and name of a reward function, its label and what is known of its model."""
    while isinstance(f, functools.partial):
        f = f.func
    code = f if hasattr(f, "__qualname__") else type(f)
    model, label = getattr(f, "model", None), getattr(f, "label", None)
    judge = f" {_described(model, model.named_parameters())}" if isinstance(model, nn.Module) else ""
    return f"{code.__module__}.{code.__qualname__}" + (f" label {label}" if label is not None else "") + judge


def _hash_of(prompts: Dataset) -> str:
    digest, rows = xxhash.xxh3_64(), prompt_rows(prompts)
    for column in rows.column_names:
        for value in rows[column][:]:
            digest.update(f"{value!r}\n".encode(errors="backslashreplace"))
    return digest.hexdigest()


def hash_prompts(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> str:
    """Hash of the token ids of some rows' prompts, before they are cut."""
    templates = [template_arguments(row, args.chat_template_kwargs) for row in rows]
    ids = encode_prompts(tokenizer, [row["prompt"] for row in rows], None, templates)
    return xxhash.xxh3_64(repr(ids).encode()).hexdigest()


def check_prompts(
    expected: str, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, args: PPOConfig, among: Accelerator
) -> None:
    """Raise RuntimeError, on all ranks, where the dataloader gives a resumed run other prompts than come next."""

    def check() -> None:
        if among.is_main_process and hash_prompts(rows, tokenizer, args) != expected:
            why = " ignore_data_skip=True begins the pass over the prompts anew." if args.ignore_data_skip else ""
            raise RuntimeError(
                "the first rollout after resuming got other prompts than the uninterrupted run would have had, "
                f"{rows[0]['prompt']!r:.80} first.{why} Is the dataloader another one, or the tokenizer?"
            )

    on_all_ranks(among, check)


def run_settings(
    args: PPOConfig, known: dict[str, Any], next_rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """All that a checkpoint is compared by, as JSON has it. `known`: of `models_and_data`; next_rows: of prompts."""
    fields = {name: value for name, value in args.to_dict().items() if not name.startswith(FREE)}
    settings = fields | {"world_size": args.world_size} | _length(args) | known
    settings["next_prompts"] = hash_prompts(next_rows, tokenizer, args)
    return json.loads(json.dumps(settings, default=lambda v: sorted(v) if isinstance(v, (set, frozenset)) else str(v)))


def _length(args: PPOConfig) -> dict[str, Any]:
    """What the learning rate's schedule ends with, if it ends."""
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if name in ("constant", "constant_with_warmup") and not 0 < args.warmup_steps < 1:
        return {"max_steps": None, "num_train_epochs": None}
    by_steps = args.max_steps > 0
    return {
        "max_steps": args.max_steps if by_steps else None,
        "num_train_epochs": None if by_steps else args.num_train_epochs,
    }


def check_same_run(
    folder: Path, saved: dict[str, Any], now: dict[str, Any], allowed: list[str] | None, accelerator: Accelerator
) -> set[str]:
    """Names of the settings that changed, all of them `allowed`, as the main process sees it.

    What an older klft did not save is not compared. Raises ValueError, on all ranks, that names every other change, and
    for an allowed name that is no setting.
    """

    def compare() -> set[str]:
        return _changes(folder, saved, now, set(allowed or ())) if accelerator.is_main_process else set()

    return gather_object([on_all_ranks(accelerator, compare)])[0]


def _changes(folder: Path, saved: dict[str, Any], now: dict[str, Any], allowed: set[str]) -> set[str]:
    if unknown := allowed - now.keys():
        raise ValueError(f"resume_changes: {', '.join(sorted(unknown))} is no setting that a resumed run is held to")
    saved = {"token_rule": None} | saved  # before there were any
    changed = {name for name in now if name in saved and saved[name] != now[name]}
    if changed & _ORDER:
        changed.discard("next_prompts")  # it follows
    refused = sorted(changed - (allowed - FIXED))
    if refused:
        told = "; ".join(f"{name}: {saved[name]!r} in the checkpoint, {now[name]!r} now" for name in refused)
        fixed = ", ".join(sorted(FIXED & changed))
        held = f" ({fixed} may not: the saved state is bound to it)" if fixed else ""
        raise ValueError(
            f"{folder} was written by another run: {told}. Put these back to resume, or name in resume_changes what "
            f"may change{held}, or start anew in another output_dir."
        )
    return changed


class ScaleLearningRate(TrainerCallback):
    """Multiply the learning rates that a checkpoint restored, once: optimizer and scheduler hold the old ones."""

    def __init__(self, factor: float):
        self.factor = factor

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        for group in optimizer.param_groups:
            group.update({key: group[key] * self.factor for key in ("lr", "initial_lr") if key in group})
        held = lr_scheduler.state_dict()
        scaled = {k: [lr * self.factor for lr in held[k]] for k in ("base_lrs", "_last_lr") if k in held}
        lr_scheduler.load_state_dict(held | scaled)
        self.factor = 1.0
