"""KLAnchorMixin in SFTTrainer and transformers.Trainer: a dense oracle, and a coefficient of 0 that changes nothing."""

import pytest
import torch
from support import tiny
from support.anchors import DenseOracle, exact, sft
from support.trainers import (
    AnchoredGRPO,
    AnchoredSFT,
    AnchoredTrainer,
    arguments,
    grpo,
    grpo_config,
    parameters,
    policy,
    sft_config,
    texts,
)
from transformers import DataCollatorForSeq2Seq, Trainer
from trl import GRPOTrainer, SFTTrainer

from klft import AdapterReference


@pytest.mark.parametrize("direction", ["forward", pytest.param("reverse", marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [
    {"gradient_accumulation_steps": 1},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 2, "packing": True, "max_length": 24, "per_device_train_batch_size": 2},
    {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
], ids=["1", "2", "packed", "checkpointing", "not across devices"])  # fmt: skip
def test_sft_equals_a_dense_oracle(tmp_path, direction, settings):
    args = sft_config(tmp_path, **settings)
    other = policy(seed=5).eval()
    oracle = sft(DenseOracle, args, reference=lambda ids: other(input_ids=ids).logits, direction=direction)
    ours = sft(AnchoredSFT, args, penalty=exact(direction))
    plain = sft(SFTTrainer, args)
    assert (parameters(plain.model) - parameters(oracle.model)).abs().max() > 1e-3
    assert (parameters(ours.model) - parameters(oracle.model)).abs().max() < 1e-6


def test_sft_with_lora_equals_a_dense_oracle(tmp_path):
    args = sft_config(tmp_path, gradient_accumulation_steps=2, learning_rate=0.5)
    base = policy().eval()  # its B matrix starts at zero: without its adapter the policy is where it began
    oracle = sft(
        DenseOracle, args, peft_config=tiny.lora(), reference=lambda ids: base(input_ids=ids).logits,
        direction="forward",
    )  # fmt: skip
    penalty = lambda model: exact(reference=AdapterReference(model))
    ours = sft(AnchoredSFT, args, peft_config=tiny.lora(), penalty=penalty)
    plain = sft(SFTTrainer, args, peft_config=tiny.lora())
    assert (parameters(plain.model) - parameters(oracle.model)).abs().max() > 1e-4
    assert (parameters(ours.model) - parameters(oracle.model)).abs().max() < 1e-6


# ---- a coefficient of 0 ----------------------------------------------------------------------------------------------


def trainer_run(make, args, **more):
    """transformers' own trainer, which computes logits."""
    trainer = make(
        policy(), args=args, train_dataset=texts(),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()), processing_class=tiny.tokenizer(), **more,
    )  # fmt: skip
    trainer.train()
    return trainer


def grpo_run(make, args, **more):
    trainer = grpo(make, policy(), args, **more)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("run", "plain", "anchored", "config"), [
    (sft, SFTTrainer, AnchoredSFT, sft_config),
    (trainer_run, Trainer, AnchoredTrainer, arguments),
    (grpo_run, GRPOTrainer, AnchoredGRPO, grpo_config),
], ids=["SFT", "Trainer", "GRPO"])  # fmt: skip
def test_a_coefficient_of_0_changes_nothing(tmp_path, run, plain, anchored, config):
    args = config(tmp_path, gradient_accumulation_steps=2)
    a = run(plain, args)
    b = run(anchored, args, penalty=exact(coef=0.0))
    assert torch.equal(parameters(a.model), parameters(b.model))
    logs = [line for line in b.state.log_history if "loss" in line]
    assert all(line["kl/reverse/mean"] > 0.01 for line in logs)
    skip = ("step_time", "train_", "kl/", "entropy/", "profiling")
    for line, other in zip(a.state.log_history, b.state.log_history, strict=True):
        same = {k: v for k, v in line.items() if not k.startswith(skip)}
        assert same == {k: other[k] for k in same}


def test_a_plain_trainer_equals_the_same_in_sft(tmp_path):
    sizes = {"gradient_accumulation_steps": 2, "seed": 3}
    ours = trainer_run(AnchoredTrainer, arguments(tmp_path, **sizes), penalty=exact())
    theirs = sft(AnchoredSFT, sft_config(tmp_path, **sizes), penalty=exact())
    assert (parameters(ours.model) - parameters(theirs.model)).abs().max() < 1e-6
