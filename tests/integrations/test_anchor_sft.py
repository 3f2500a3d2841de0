"""KLAnchorMixin in SFTTrainer and transformers.Trainer: a dense oracle, and a coefficient of 0 that changes nothing."""

import pytest
import torch
from support import families, tiny
from support.anchors import COEF, DenseOracle, another, exact, sft
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
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer
from trl import GRPOTrainer, SFTTrainer

from klft import AdapterReference, FrozenReference, reverse_kl
from klft.integrations import KLAnchorMixin


@pytest.mark.parametrize("direction", ["forward", pytest.param("reverse", marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [
    pytest.param({"gradient_accumulation_steps": 1}, marks=pytest.mark.slow),
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 2, "packing": True, "max_length": 24, "per_device_train_batch_size": 2},
    pytest.param({"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    pytest.param({"gradient_accumulation_steps": 2, "average_tokens_across_devices": False}, marks=pytest.mark.slow),
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


@pytest.mark.parametrize("settings", [
    {"gradient_accumulation_steps": 2},
    pytest.param({"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, marks=pytest.mark.slow),
], ids=["2", "checkpointing"])  # fmt: skip
def test_another_divergence_than_the_kl_equals_a_dense_oracle(tmp_path, settings):
    args = sft_config(tmp_path, **settings)
    dense = policy(seed=5).eval()
    oracle = sft(DenseOracle, args, reference=lambda ids: dense(input_ids=ids).logits, direction="jsd")
    ours = sft(AnchoredSFT, args, penalty=another("jsd"))
    assert (parameters(sft(SFTTrainer, args).model) - parameters(oracle.model)).abs().max() > 1e-3
    assert (parameters(ours.model) - parameters(oracle.model)).abs().max() < 1e-6
    logs = [log for log in ours.state.log_history if "loss" in log]
    assert all(
        {"divergence/mean", "divergence/sequence/mean", "kl/reverse/mean", "kl/coef"} <= log.keys() for log in logs
    )


def test_a_token_rule_weighs_another_divergence(tmp_path):
    args = sft_config(tmp_path, learning_rate=0.02)
    twice = another("jsd")
    twice.token_rule = lambda ids, mask, scores: 2.0 * mask
    a, b = (parameters(sft(AnchoredSFT, args, penalty=p).model) for p in (twice, another("jsd", coef=2 * COEF)))
    assert (a - b).abs().max() < 1e-6
    assert (a - parameters(sft(AnchoredSFT, args, penalty=another("jsd")).model)).abs().max() > 1e-4


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


# ---- what other trainers, models and collators do --------------------------------------------------------------------


def logged_against_each_text_alone(run, other):
    """The KL that a run with a learning rate of 0 logged of its 32 texts, and the same from logits, text by text."""
    values = []
    for ids in texts()["input_ids"]:
        with torch.no_grad():
            logits, ref_logits = (m(input_ids=torch.tensor([ids])).logits[0, :-1] for m in (run.model.eval(), other))
        values.append(reverse_kl(logits, ref_logits))
    (logged,) = [line["kl/reverse/mean"] for line in run.state.log_history if "loss" in line]
    assert logged == pytest.approx(float(torch.cat(values).mean()), rel=1e-5)


def one_step(tmp_path, model, other, collator=None, **changed):
    """A plain Trainer, all texts in one batch, all their tokens counted."""
    args = arguments(tmp_path, learning_rate=0.0, max_steps=1, per_device_train_batch_size=32, **changed)
    run = AnchoredTrainer(
        model, args=args, train_dataset=texts().map(lambda row: {"labels": row["input_ids"]}),
        data_collator=collator or DataCollatorForSeq2Seq(tiny.tokenizer()), processing_class=tiny.tokenizer(),
        penalty=exact("reverse", reference=FrozenReference(other)),
    )  # fmt: skip
    run.train()
    return run


def test_the_reference_keeps_flattened_texts_apart_where_the_policy_does(tmp_path):
    """The Trainer turns the policy's cache off, with which texts would see each other, and not the reference's."""
    other = policy(seed=5)
    assert other.config.use_cache
    run = one_step(tmp_path, policy(), other, DataCollatorWithFlattening())
    logged_against_each_text_alone(run, other)


def test_a_model_whose_first_tokens_the_trainer_counts(tmp_path):
    """transformers does not know GPT-2's loss by name, and counts labels that nothing predicts."""
    other = tiny.gpt2(5, dropout=0.0)
    logged_against_each_text_alone(one_step(tmp_path, tiny.gpt2(dropout=0.0), other), other)


@pytest.mark.parametrize("make", [arguments, sft_config])
def test_a_model_whose_head_calls_the_decoder_inside_its_backbone(tmp_path, make):
    """OPT: the backbone's own forward is never run."""
    model, other = (families.model("opt", seed) for seed in (0, 5))
    for dropout in (m for m in model.modules() if hasattr(m, "dropout")):
        dropout.dropout = 0.0
    if make is sft_config:
        args = sft_config(tmp_path, learning_rate=0.0, max_steps=1, per_device_train_batch_size=32)
        data = texts().map(lambda row: {"labels": row["input_ids"]})
        run = AnchoredSFT(
            model, args=args, train_dataset=data, processing_class=tiny.tokenizer(),
            penalty=exact("reverse", reference=FrozenReference(other)),
        )  # fmt: skip
        run.train()
    else:
        run = one_step(tmp_path, model, other)
    logged_against_each_text_alone(run, other)


def test_a_model_without_a_backbone_is_refused(tmp_path):
    """Llama 4's text model: what transformers takes for its backbone is the model itself."""
    with pytest.raises(RuntimeError, match="policy: backbone: its KL cannot be taken without logits"):
        one_step(tmp_path, families.model("llama4_text"), families.model("llama4_text", 5))


def test_a_reference_in_half_precision(tmp_path):
    run = one_step(tmp_path, policy(), policy(seed=5).bfloat16())
    assert run.state.log_history[0]["kl/reverse/mean"] > 0.1


class MeanOfABatch(Trainer):
    """A loss that does not read num_items_in_batch, as transformers documents it."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class AnchoredMean(KLAnchorMixin, MeanOfABatch):
    pass


def test_a_loss_that_the_trainer_scales_itself(tmp_path):
    """One text over and over: accumulation changes nothing to a mean, nor to the KL in it."""

    def run(make, steps):
        args = arguments(tmp_path, gradient_accumulation_steps=steps, max_steps=2)
        trainer = make(
            policy(), args=args, train_dataset=texts().select([8] * 32), processing_class=tiny.tokenizer(),
            data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()), penalty=exact(),
        )  # fmt: skip
        trainer.train()
        return parameters(trainer.model)

    once, thrice = run(AnchoredMean, 1), run(AnchoredMean, 3)
    assert (once - run(AnchoredTrainer, 1)).abs().max() < 1e-6
    assert (once - thrice).abs().max() < 1e-6


def test_a_loss_function_of_ones_own_without_a_count_is_divided_by_the_accumulation(tmp_path):
    """With shift_labels alone the Trainer counts nothing, and takes the function's loss as it is."""

    class Shifted(DataCollatorForSeq2Seq):
        def __call__(self, rows, return_tensors=None):
            batch = super().__call__(rows, return_tensors)
            labels = batch.pop("labels").roll(-1, 1)
            labels[:, -1] = -100
            return batch | {"shift_labels": labels}

    def weights(steps, size):
        model = policy()
        trainer = AnchoredTrainer(
            model, args=arguments(tmp_path, gradient_accumulation_steps=steps, per_device_train_batch_size=size,
                                  max_steps=1, remove_unused_columns=False),
            train_dataset=equal_lengths, data_collator=Shifted(tiny.tokenizer()), penalty=exact(),
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: 0.0 * outputs.logits.sum(),
        )  # fmt: skip
        trainer.train()
        return parameters(model)

    rows = [[3 + (7 * i + j) % 29 for j in range(6)] for i in range(8)]
    equal_lengths = tiny.Dataset.from_dict({"input_ids": rows, "labels": rows})
    assert (weights(1, 4) - parameters(policy())).abs().max() > 1e-3
    assert (weights(2, 2) - weights(1, 4)).abs().max() < 1e-6
