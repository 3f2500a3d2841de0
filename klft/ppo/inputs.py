"""PPOTrainer's arguments, checked and made into what it trains with: models, tokenizer, datasets, prompt order."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from klft.models import base_of, check_vocabularies, require_causal_lm, vocab_size
from klft.ppo import value as value_function
from klft.ppo.config import PPOConfig
from klft.references import AdapterReference, FrozenReference, Reference, resolve_reference

logger = logging.get_logger(__name__)


def load_policy(model: nn.Module | str) -> nn.Module:
    """A model id or path -> a causal LM; a model is checked and passed through."""
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True)
    require_causal_lm(model, "model")
    return model


def load_tokenizer(processing_class: PreTrainedTokenizerBase | None, model: nn.Module) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the model's own. Without a pad token EOS pads: masks come from lengths, never from it."""
    tokenizer = processing_class or AutoTokenizer.from_pretrained(base_of(model).config._name_or_path)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no completion could ever end; set tokenizer.eos_token")
    if tokenizer.pad_token_id is None:
        logger.info(f"the tokenizer has no pad token; padding with its EOS token {tokenizer.eos_token!r}")
    return tokenizer


def build_policy_and_reference(
    model: Any, reference: Any, value_model: Any, peft_config: Any, tokenizer: Any
) -> tuple[nn.Module, Reference]:
    """(policy with its value function and adapter, checked reference).

    The reference given (a model is frozen); by default the policy with its adapter off, or a frozen copy of it as it is
    now. Refuses one that would move with the policy, or speaks about another vocabulary.
    """
    peft = peft_config is not None or hasattr(model, "peft_config")
    if reference is None and not peft:
        reference = FrozenReference(copy.deepcopy(model))
    # Before the value function is attached: it is trained, and no part of the reference.
    resolved = None if reference is None and peft_config is not None else resolve_reference(reference, model)
    if resolved is not None:
        check_vocabularies(tokenizer, policy=vocab_size(model), reference=resolved.vocab_size)
    policy: Any = attach_value_and_adapter(model, value_model, peft_config)
    return policy, resolved or AdapterReference(policy)


def require_readable_head(reference: Reference) -> None:
    """Raise TypeError where a loss of exact KL, which is taken without logits, cannot be had from the reference."""
    one = torch.zeros(1, 1, dtype=torch.long)
    try:
        reference.hidden(one, torch.ones_like(one))
    except TypeError as error:
        raise TypeError(
            f"kl_estimator='exact' takes its loss without logits, and the reference's head cannot be read: {error}. "
            "kl_estimator='k1' needs no head of the reference"
        ) from error


def attach_value_and_adapter(model: Any, value_model: Any, peft_config: Any) -> nn.Module:
    """Give the policy its value function and, with `peft_config`, its adapter."""
    if value_model is None:
        value_function.attach_value_head(model)
        if peft_config is not None:
            # PEFT freezes what it does not own; listed here the head is trained, and saved with the adapter.
            peft_config = copy.copy(peft_config)
            peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), "v_head"})
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    if value_model is not None:
        value_function.attach_value_model(model, value_model)
    value_function.install_hooks(model)
    return model


def check_dataset(dataset: Any, name: str, at_least: int) -> Dataset:
    """Check for a `prompt` column and enough rows; drop empty prompts and say how many.

    Raises TypeError for a streaming dataset, ValueError for a missing column or too few rows.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name}: expected a datasets.Dataset with a length, got {type(dataset).__name__}")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{name} needs a column 'prompt' (text or messages); it has {dataset.column_names}")
    clash = {"prompts", "completions", "completion_ids"} & set(dataset.column_names)
    if clash:
        raise ValueError(f"{name}: rename the column(s) {sorted(clash)}; reward functions get the sampled ones")
    strange = next((i for i, p in enumerate(dataset["prompt"]) if p and not isinstance(p, (str, list))), None)
    if strange is not None:
        raise ValueError(f"{name}: prompt {strange} must be text or messages, got {dataset['prompt'][strange]!r}")
    filled = [i for i, p in enumerate(dataset["prompt"]) if p and not (isinstance(p, str) and p.isspace())]
    if len(filled) < len(dataset):
        logger.warning(f"{name}: dropped {len(dataset) - len(filled)} empty prompt(s) of {len(dataset)}")
        dataset = dataset.select(filled)
    if len(dataset) < at_least:
        raise ValueError(
            f"{name} has {len(dataset)} prompt(s), and one rollout takes {at_least} = per_device_train_batch_size * "
            "gradient_accumulation_steps * num_mini_batches * processes. Make one of those smaller."
        )
    return dataset


def check_datasets(train: Any, evaluation: Any, per_rollout: int) -> tuple[Any, Any]:
    """Both datasets checked; the evaluation's may be a dictionary of several."""
    if train is not None:
        train = check_dataset(train, "train_dataset", per_rollout)
    if isinstance(evaluation, dict):
        evaluation = {name: check_dataset(d, f"eval_dataset[{name!r}]", 1) for name, d in evaluation.items()}
    elif evaluation is not None:
        evaluation = check_dataset(evaluation, "eval_dataset", 1)
    return train, evaluation


class RolloutSampler(Sampler):
    """Indices as the dataloader must yield them: each rollout's prompts, once for every micro-batch made of it.

    The Trainer counts one dataloader batch per micro-batch; the repeats are what a rollout is used for. The order
    depends on seed and epoch alone, so every process and every resumed run draws the same.
    """

    def __init__(self, size: int, per_rollout: int, repeats: int, seed: int, shuffle: bool):
        self.size, self.per_rollout, self.repeats, self.seed, self.shuffle = size, per_rollout, repeats, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.per_rollout * self.per_rollout * self.repeats

    def __iter__(self):
        order = range(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
        for start in range(0, self.size - self.per_rollout + 1, self.per_rollout):
            for _ in range(self.repeats):
                yield from order[start : start + self.per_rollout]


def rollout_dataloader(dataset: Any, args: PPOConfig, collate: Callable) -> DataLoader:
    """Prompts, as many per batch as a process needs for one rollout, repeated for every micro-batch made of it."""
    sampler = RolloutSampler(
        size=len(dataset),
        per_rollout=args.episodes_per_rollout,
        repeats=args.micro_batches_per_rollout,
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle=args.train_sampling_strategy != "sequential",
    )
    return DataLoader(dataset, batch_size=args.rollout_batch_size, sampler=sampler, collate_fn=collate, drop_last=True)
