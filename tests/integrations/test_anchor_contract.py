"""What KLAnchorMixin refuses by name, what it says where an upstream contract is broken, and what it logs."""

import json

import pytest
import torch
from support import tiny
from support.anchors import COEF, exact, k3_in_the_loss, sft, trained_grpo
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
from transformers import DataCollatorForSeq2Seq, TrainerCallback
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer, SFTTrainer

from klft import AdapterReference, AdaptiveKL, FixedKL, FrozenReference, KLPenalty, reverse_kl
from klft.diagnostics import read_records
from klft.integrations import KLAnchorMixin
from klft.token_rules import burn_in

# ---- an upstream contract that is broken -----------------------------------------------------------------------------


class TwoForwards(SFTTrainer):
    """A trainer whose loss takes a second forward with a gradient."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss + 0 * model(input_ids=inputs["input_ids"]).logits.sum()


class NoForward(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return sum(p.sum() for p in model.parameters())


class RenamedKey(AnchoredGRPO):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        renamed = {name.replace("completion_mask", "response_mask"): value for name, value in inputs.items()}
        return super().compute_loss(model, renamed, return_outputs, num_items_in_batch)


class OtherLossType(AnchoredGRPO):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.args.loss_type = "next_years"
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class OtherCount(AnchoredSFT):
    """A trainer that counts its tokens in another way."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch + 1)


def mixed(trainer):
    return type(f"Anchored{trainer.__name__}", (KLAnchorMixin, trainer), {})


@pytest.mark.parametrize(("make", "says"), [
    (mixed(TwoForwards), r"2 forwards of the LlamaModel with a gradient .*exactly one.*transformers 5.*TRL 1"),
    (mixed(NoForward), r"0 forwards of the LlamaModel.*TRL 1"),
    (OtherCount, r"KLAnchorMixin counts \d+ tokens in this optimizer step and the trainer \d+"),
])  # fmt: skip
def test_a_broken_contract_of_sft_is_named(tmp_path, make, says):
    with pytest.raises(RuntimeError, match=says):
        sft(make, sft_config(tmp_path), penalty=exact())


@pytest.mark.parametrize(("make", "says"), [
    (RenamedKey, r"no completion_mask; it has .*response_mask.*transformers 5.*TRL 1"),
    (OtherLossType, r"loss_type='next_years' \(transformers 5.*TRL 1.*choose one of grpo, sapo"),
])  # fmt: skip
def test_a_broken_contract_of_grpo_is_named(tmp_path, make, says):
    with pytest.raises(ValueError, match=says):
        trained_grpo(make, grpo_config(tmp_path), penalty=k3_in_the_loss())


# ---- refused before training -----------------------------------------------------------------------------------------


def penalty_with(**changed):
    settings = {"estimator": "exact", "placement": "loss", "controller": FixedKL(COEF)} | changed
    return KLPenalty(FrozenReference(policy(seed=5)), **settings)


@pytest.mark.parametrize(("changed", "says"), [
    ({"penalty": penalty_with(placement="both")}, "needs rewards, and SFTTrainer has none: use KLPenalty"),
    ({"penalty": penalty_with(estimator="k3")}, "labels are given texts: use estimator='exact'"),
    ({"penalty": penalty_with(), "measure_every": -1}, "measure_every must be a whole number >= 0, got -1"),
    ({"penalty": penalty_with(), "measure_every": 2.0}, "measure_every must be a whole number >= 0, got 2.0"),
])  # fmt: skip
def test_what_sft_cannot_do_is_refused(tmp_path, changed, says):
    with pytest.raises(ValueError, match=says):
        AnchoredSFT(
            policy(), args=sft_config(tmp_path), train_dataset=texts(), processing_class=tiny.tokenizer(), **changed
        )


def test_tables_need_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"measure_every writes texts, .* no processing_class: give it the tokenizer"):
        AnchoredTrainer(policy(), args=arguments(tmp_path), penalty=exact(), measure_every=1)


def test_a_reward_per_token_needs_a_ratio_per_token(tmp_path):
    args = grpo_config(tmp_path, loss_type="grpo", importance_sampling_level="sequence")
    with pytest.raises(ValueError, match=r"placement='both' .*importance_sampling_level='sequence'.*use placement='lo"):
        grpo(AnchoredGRPO, policy(), args, penalty=penalty_with(placement="both"))


def test_a_reference_that_shares_the_weights_is_refused(tmp_path):
    model = policy()
    with pytest.raises(ValueError, match="shares the policy's memory"):
        sft(AnchoredSFT, sft_config(tmp_path), model=model, penalty=lambda m: exact(reference=FrozenReference(m)))


def test_a_learnt_prompt_is_refused(tmp_path):
    from peft import PromptTuningConfig

    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="learns a prompt, whose virtual tokens shift every position"):
        sft(AnchoredSFT, sft_config(tmp_path), peft_config=config, penalty=exact())


def test_beta_and_a_penalty_are_the_kl_twice(tmp_path):
    model = policy()
    model.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    with pytest.raises(ValueError, match=r"beta=0.1, which counts the KL twice: set beta=0"):
        grpo(AnchoredGRPO, model, grpo_config(tmp_path, beta=0.1), penalty=k3_in_the_loss())


def test_other_losses_are_refused_with_what_to_use(tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "bf16": False}
    with pytest.raises(TypeError, match=r"not that of RLOOTrainer .*use KLReward"):
        mixed(RLOOTrainer)(
            policy(), reward_funcs=[tiny.count_w5], processing_class=tiny.tokenizer(), train_dataset=tiny.prompts(16),
            args=RLOOConfig(beta=0.0, num_generations=4, per_device_train_batch_size=4, **common),
            penalty=k3_in_the_loss(),
        )  # fmt: skip
    pairs = tiny.Dataset.from_dict({"prompt": ["w1 w2"] * 8, "chosen": ["w3"] * 8, "rejected": ["w4"] * 8})
    with pytest.raises(TypeError, match=r"not that of DPOTrainer .*use a loop of your own"):
        mixed(DPOTrainer)(
            policy(), policy(), processing_class=tiny.tokenizer(), train_dataset=pairs, args=DPOConfig(**common),
            penalty=exact(),
        )  # fmt: skip


def test_a_batch_without_labels_is_named(tmp_path):
    class Bare(AnchoredTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            del inputs["labels"]
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Bare(
        policy(), args=arguments(tmp_path), train_dataset=texts(), processing_class=tiny.tokenizer(),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()), penalty=exact(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"no labels .* it has attention_mask, input_ids"):
        trainer.train()


def test_the_self_test_finds_a_backbone_that_is_not_what_the_head_reads(tmp_path):
    model = policy()
    plain = type(model).forward

    def scaled(self, *args, **kwargs):  # as MiniCPM3: something between backbone and head
        head, kept = self.lm_head.forward, self.lm_head
        kept.forward = lambda hidden: head(hidden / 2)
        try:
            return plain(self, *args, **kwargs)
        finally:
            del kept.forward

    model.forward = scaled.__get__(model)
    trainer = AnchoredTrainer(
        model, args=arguments(tmp_path, remove_unused_columns=False), train_dataset=texts(),
        processing_class=tiny.tokenizer(), data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()), penalty=exact(),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="policy: backbone: its last hidden state times its head is not what"):
        trainer.train()


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_a_monitor_writes_the_trainers_own_tokens(tmp_path):
    plain = sft(SFTTrainer, sft_config(tmp_path / "plain"))
    watched = sft(AnchoredSFT, sft_config(tmp_path), penalty=exact(coef=0.0), measure_every=2)
    assert torch.equal(parameters(plain.model), parameters(watched.model))
    table, _ = read_records(tmp_path)
    assert (tmp_path / "kl" / "report.html").stat().st_size > 10_000
    assert sorted(set(table["step"].to_pylist())) == [1, 3]
    logged = [log.get("kl/reverse/mean") for log in watched.state.log_history if "loss" in log]
    rows = table.to_pylist()
    for step, value in zip((1, 3), logged[::2], strict=True):
        own = [row["reverse_kl"] for row in rows if row["step"] == step and row["reverse_kl"] is not None]
        assert value == pytest.approx(sum(own) / len(own), rel=1e-5)
    assert logged[1::2] == [None, None]
    trained_on = {tuple(row[row.index(-100) :]) if -100 in row else tuple(row) for row in texts()["input_ids"]}
    by_text = {}
    for row in rows:
        by_text.setdefault((row["step"], row["sample_id"]), []).append(row["token_id"])
    assert set(map(tuple, by_text.values())) <= trained_on
    assert all(not row["sampled"] for row in rows)
    with pytest.raises(ValueError, match="Resume it, remove them, or name another output_dir"):
        sft(AnchoredSFT, sft_config(tmp_path), penalty=exact(coef=0.0), measure_every=2)


def test_tables_of_completions_and_of_packed_texts(tmp_path):
    trained_grpo(AnchoredGRPO, grpo_config(tmp_path / "grpo"), penalty=k3_in_the_loss(), measure_every=1)
    table, _ = read_records(tmp_path / "grpo")
    assert all(row["sampled"] != row["is_prompt"] for row in table.to_pylist())
    packed = {"packing": True, "max_length": 24, "per_device_train_batch_size": 2}
    sft(AnchoredSFT, sft_config(tmp_path / "sft", **packed), penalty=exact(), measure_every=1)
    table, _ = read_records(tmp_path / "sft")
    by_text = {}
    for row in table.to_pylist():
        by_text.setdefault((row["step"], row["sample_id"]), []).append(row["token_id"])
    assert set(map(tuple, by_text.values())) <= {tuple(row) for row in texts()["input_ids"]}
    assert len(by_text) > 16


def test_logs_are_of_all_tokens_since_the_last(tmp_path):
    """The logged KL, against logits; in evaluation likewise."""
    model, other = policy(), policy(seed=5).eval()
    args = sft_config(tmp_path, learning_rate=0.0, max_steps=8, logging_steps=8, eval_strategy="steps", eval_steps=8)
    run = sft(AnchoredSFT, args, model=model, penalty=exact("reverse"), eval_dataset=texts(12))
    data, total, count = texts(), 0.0, 0
    for rows, name in ((data, "kl/reverse/mean"), (texts(12), "eval_kl/reverse/mean")):
        total = count = 0.0
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            ids, counted = torch.tensor([ids]), torch.tensor(labels)[1:] != -100
            with torch.no_grad():
                kl = reverse_kl(model(input_ids=ids).logits[0, :-1], other(input_ids=ids).logits[0, :-1])[counted]
            total, count = total + float(kl.sum()), count + len(kl)
        (logged,) = [log[name] for log in run.state.log_history if name in log]
        assert logged == pytest.approx(total / count, rel=1e-5)
    log = next(log for log in run.state.log_history if "loss" in log)
    assert log["kl/tokens/count"] == sum(sum(i != -100 for i in labels[1:]) for labels in data["labels"])
    assert log["kl/coef"] == COEF
    assert "kl/k1/mean" not in log, "labels are not sampled from the policy"


def test_each_evaluation_logs_its_own_tokens_by_its_own_name(tmp_path):
    """Two data sets, another prefix, and a prediction before it, whose tokens are its own."""
    sets = {"a": texts(12), "b": texts(20)}
    trainer = AnchoredTrainer(
        policy(), args=arguments(tmp_path), train_dataset=texts(), eval_dataset=sets, penalty=exact(),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()), processing_class=tiny.tokenizer(),
    )  # fmt: skip
    counts = {name: sum(i != -100 for labels in rows["labels"] for i in labels[1:]) for name, rows in sets.items()}
    assert trainer.predict(sets["b"]).metrics["test_kl/tokens/count"] == counts["b"]
    metrics = trainer.evaluate()
    assert {name: metrics[f"eval_{name}_kl/tokens/count"] for name in sets} == counts
    assert trainer.evaluate(sets["a"], metric_key_prefix="held_out")["held_out_kl/tokens/count"] == counts["a"]
    trainer.train()
    assert not any(name.startswith("train_kl") for line in trainer.state.log_history for name in line)


def test_a_second_training_does_not_write_into_the_tables_of_the_first(tmp_path):
    trainer = sft(AnchoredSFT, sft_config(tmp_path, max_steps=1), penalty=exact(), measure_every=1)
    with pytest.raises(ValueError, match="Resume it, remove them, or name another output_dir"):
        trainer.train()


def test_training_starts_anew_after_an_interruption_inside_a_step(tmp_path):
    class Interrupt(TrainerCallback):
        fresh = True

        def on_substep_end(self, args, state, control, **kwargs):
            if self.fresh:
                self.fresh = False
                raise KeyboardInterrupt

    trainer = AnchoredSFT(
        policy(), args=sft_config(tmp_path, gradient_accumulation_steps=2), train_dataset=texts(), penalty=exact(),
        processing_class=tiny.tokenizer(), callbacks=[Interrupt()],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_controller_sees_nats_per_sequence_once_per_step(tmp_path):
    seen = []

    class Watched(AdaptiveKL):
        def update(self, sequence_kl, episodes):
            seen.append((sequence_kl, episodes))
            return super().update(sequence_kl, episodes)

    penalty = penalty_with(controller=Watched(0.5, target=1.0, horizon=60))
    run = sft(AnchoredSFT, sft_config(tmp_path, gradient_accumulation_steps=2), penalty=penalty)
    assert [episodes for _, episodes in seen] == [8] * 4
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["kl/sequence/reverse/mean"] for log in logs] == pytest.approx([nats for nats, _ in seen], rel=1e-5)
    assert penalty.coef != 0.5
    assert [log["kl/coef"] for log in logs][-1] == penalty.coef


def test_a_token_rule_leaves_tokens_out(tmp_path):
    """Weight 0 on ids that the labels do not hold changes nothing to the bit; on all of them it is no penalty."""
    args = sft_config(tmp_path)
    ones = sft(AnchoredSFT, args, penalty=penalty_with(token_rule=lambda ids, mask, scores: mask.float()))
    plain = sft(AnchoredSFT, args, penalty=penalty_with())
    none = sft(AnchoredSFT, args, penalty=penalty_with(token_rule=lambda ids, mask, scores: 0.0 * mask))
    bare = sft(SFTTrainer, args)
    assert torch.equal(parameters(ones.model), parameters(plain.model))
    assert (parameters(none.model) - parameters(bare.model)).abs().max() < 1e-7
    assert (parameters(plain.model) - parameters(bare.model)).abs().max() > 1e-3


def test_a_rule_of_positions_counts_along_sequences_of_packed_rows(tmp_path):
    """Weights in the tables: the first two counted tokens of every text, packed or not."""
    for name, more in {"rows": {}, "packed": {"packing": True, "max_length": 24}}.items():
        penalty = penalty_with(token_rule=burn_in(2))
        sft(AnchoredSFT, sft_config(tmp_path / name, **more), penalty=penalty, measure_every=1)
        by_text = {}
        for row in read_records(tmp_path / name)[0].to_pylist():
            if row["logp"] is not None:
                by_text.setdefault((row["step"], row["sample_id"]), []).append(row["weight"])
        assert len(by_text) >= 16
        assert all(weights == [0.0, 0.0, *[1.0] * (len(weights) - 2)][: len(weights)] for weights in by_text.values())


def test_an_adapter_that_a_trainer_makes_has_its_base_as_the_reference(tmp_path):
    penalty = lambda model: exact(reference=AdapterReference(model))
    run = sft(AnchoredSFT, sft_config(tmp_path), peft_config=tiny.lora(), penalty=penalty)
    first, *_, last = [log["kl/forward/mean"] for log in run.state.log_history if "loss" in log]
    assert first < 1e-9 < last


@pytest.mark.parametrize("restores", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_the_whole_one(tmp_path, restores):
    """An interrupted run, its checkpoint moved elsewhere: weights and coefficient of the run that was not."""

    def run(folder, steps, resume=None):
        args = sft_config(
            folder, max_steps=steps, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-3,
            restore_callback_states_from_checkpoint=restores,
        )  # fmt: skip
        penalty = penalty_with(controller=AdaptiveKL(0.5, target=1.0, horizon=60))
        trainer = AnchoredSFT(
            policy(), args=args, train_dataset=texts(), processing_class=tiny.tokenizer(), penalty=penalty
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "first", 2)
    (tmp_path / "first" / "checkpoint-2").rename(tmp_path / "elsewhere")
    state = json.loads((tmp_path / "elsewhere" / "klft_penalty.json").read_text())
    assert state["klft.KLAnchor"]["coef"] != 0.5
    rest = run(tmp_path / "rest", 4, str(tmp_path / "elsewhere"))
    assert torch.equal(parameters(whole.model), parameters(rest.model))
    assert whole.penalty.coef == rest.penalty.coef != 0.5


def test_what_the_loss_does_not_need_is_measured_before_a_log(tmp_path):
    """The penalty's own KL over all tokens since the last log, the other direction over those of the last step."""
    runs = {}
    for every in (1, 4):
        args = sft_config(tmp_path, logging_steps=every, max_steps=4)
        run = sft(AnchoredSFT, args, penalty=exact())
        runs[every] = [log for log in run.state.log_history if "loss" in log]
    (log,), each = runs[4], runs[1]
    counts = [one["kl/tokens/count"] for one in each]
    mean = sum(one["kl/forward/mean"] * n for one, n in zip(each, counts, strict=True)) / sum(counts)
    assert log["kl/tokens/count"] == sum(counts)
    assert log["kl/forward/mean"] == pytest.approx(mean, rel=1e-5)
    for key in ("kl/reverse/mean", "entropy/policy/mean", "entropy/reference/mean"):
        assert log[key] == pytest.approx(each[-1][key], rel=1e-5)
    assert set(log) == set(each[0])


def test_an_evaluation_that_comes_first_is_tested_too(tmp_path):
    """A reference with fewer ids than the tokenizer has."""
    trainer = AnchoredSFT(
        policy(), args=sft_config(tmp_path), train_dataset=texts(), eval_dataset=texts(12),
        processing_class=tiny.tokenizer(), penalty=exact(reference=FrozenReference(tiny.llama(5, vocab_size=28))),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"before the first step: .*vocabulary"):
        trainer.evaluate()
