"""Trainers of transformers and TRL, small enough to train in a second: what KLAnchorMixin and KLReward are put into."""

from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from klft.integrations import KLAnchorMixin
from support import tiny


class AnchoredSFT(KLAnchorMixin, SFTTrainer):
    """As the README has it."""


class AnchoredGRPO(KLAnchorMixin, GRPOTrainer):
    """As the README has it."""


class AnchoredTrainer(KLAnchorMixin, Trainer):
    """As the README has it."""


def policy(seed: int = 0, **changed: Any) -> Any:
    """A llama without dropout: two runs draw the same."""
    return tiny.llama(seed, attention_dropout=0.0, **changed)


def _common(output_dir: Any, changed: dict[str, Any]) -> dict[str, Any]:
    """Plain gradient descent: Adam would hide the size of a gradient."""
    return {
        "output_dir": str(output_dir), "use_cpu": tiny.ON_CPU, "report_to": "none", "save_strategy": "no", "seed": 3,
        "logging_steps": 1, "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "optim": "sgd", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "max_steps": 4,
        "per_device_train_batch_size": 4, "dataloader_pin_memory": False,
    } | changed  # fmt: skip


def sft_config(output_dir: Any, **changed: Any) -> SFTConfig:
    return SFTConfig(**_common(output_dir, {"max_length": 32, "loss_type": "nll"} | changed))


def grpo_config(output_dir: Any, **changed: Any) -> GRPOConfig:
    return GRPOConfig(
        **_common(
            output_dir,
            {"num_generations": 4, "max_completion_length": 6, "beta": 0.0, "gradient_accumulation_steps": 2} | changed,
        )
    )


def arguments(output_dir: Any, **changed: Any) -> TrainingArguments:
    return TrainingArguments(**_common(output_dir, changed))


def texts(n: int = 32) -> Dataset:
    """Ids and labels: texts of three to nine tokens, of which some begin with a prompt."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, tiny.VOCABULARY, (3 + i % 7,), generator=generator).tolist() for i in range(n)]
    labels = [[-100] * (i % 3) + row[i % 3 :] for i, row in enumerate(rows)]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def reward_w5(completions: list, **_: Any) -> list[float]:
    """How often w5 is said, and a little for every word, so that groups differ."""
    return [sum(0.3 + (word == "w5") for word in text.split()) / 4 for text in completions]


def grpo(make: type, model: Any, args: GRPOConfig, **more: Any) -> Any:
    """A GRPO trainer on eight prompts."""
    return make(
        model, reward_funcs=[reward_w5], args=args, train_dataset=tiny.prompts(16),
        processing_class=tiny.tokenizer(), **more,
    )  # fmt: skip


def parameters(model: Any) -> torch.Tensor:
    """All weights, flat, in float64."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])
