"""RLOOTrainer and GRPOTrainer of TRL in the tiny world, with a policy that starts away from its reference."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from support import tiny

ENDS = [tiny.EOS, 4, 8, 12, 16, 20]  # so many ids end a completion that about half of them end within six tokens


def saved(folder: Path | str, seed: int = 5, **changed: Any) -> str:
    """Path of a model without dropout, for trainers that load their reference themselves, by the policy's name."""
    path = str(Path(folder) / "reference")
    tiny.llama(seed, attention_dropout=0.0, **changed).save_pretrained(path)
    return path


def reference(path: str) -> Any:
    """The model that lies there."""
    return AutoModelForCausalLM.from_pretrained(path)


def policy(path: str, seed: int = 0, **changed: Any) -> Any:
    """Another model, of which TRL thinks that it was loaded from `path`."""
    model = tiny.llama(seed, **{"attention_dropout": 0.0} | changed)
    model.config._name_or_path = path
    model.generation_config.eos_token_id = ENDS
    return model


def trainer(
    folder: Path | str,
    model: Any,
    rewards: list,
    kind: type = RLOOTrainer,
    data: Any = None,
    given: dict | None = None,
    **changed: Any,
) -> Any:
    """Four quiet steps on the CPU, two completions for each of two prompts; no KL unless beta says so."""
    config = GRPOConfig if issubclass(kind, GRPOTrainer) else RLOOConfig
    args = config(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "optim": "sgd",  # AdamW makes steps of noise where a gradient is about 0
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 6,
            "beta": 0.0,
            "bf16": False,
        }
        | changed
    )
    given = {"processing_class": tiny.tokenizer(), "train_dataset": data or tiny.prompts()} | (given or {})
    return kind(model=model, reward_funcs=rewards, args=args, **given)


def largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Over all parameters."""
    theirs = dict(b.named_parameters())
    return max(float((p - theirs[name]).detach().abs().max()) for name, p in a.named_parameters())
