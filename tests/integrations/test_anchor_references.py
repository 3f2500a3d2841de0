"""Every kind of reference in KLAnchorMixin: several at once, one that follows, one from a file, an adapter."""

import pytest
import torch
from support import tiny
from support.anchors import COEF, another, exact, k3_in_the_loss, sft, trained_grpo
from support.trainers import AnchoredGRPO, AnchoredSFT, grpo_config, parameters, policy, sft_config, texts

from klft import (
    CachedReference,
    EMAReference,
    FixedKL,
    FrozenReference,
    KLPenalty,
    MixtureReference,
    TopKReference,
)
from klft.integrations.backbone import BackboneCalls


def twice_and_half():
    """2 and 0.5 of one reference: together 2.5 of it."""
    return MixtureReference([(2.0, policy(seed=5)), (0.5, policy(seed=5))])


def test_a_mixture_of_one_reference_twice_is_their_sum(tmp_path):
    args = sft_config(tmp_path, learning_rate=0.02)
    mixed = sft(AnchoredSFT, args, penalty=exact(reference=twice_and_half()))
    single = sft(AnchoredSFT, args, penalty=exact(coef=2.5 * COEF))
    assert (parameters(mixed.model) - parameters(single.model)).abs().max() < 1e-6
    logs = [[log for log in run.state.log_history if "loss" in log] for run in (mixed, single)]
    for a, b in zip(*logs, strict=True):
        assert a["kl/forward/mean"] == pytest.approx(2.5 * b["kl/forward/mean"], rel=1e-4)
        assert "kl/k1/mean" not in a
        assert a["kl/nonfinite/count"] == 0


def test_a_mixture_under_another_divergence_is_their_sum(tmp_path):
    args = sft_config(tmp_path, learning_rate=0.02)
    mixed = sft(AnchoredSFT, args, penalty=another(reference=twice_and_half()))
    single = sft(AnchoredSFT, args, penalty=another(coef=2.5 * COEF))
    assert (parameters(mixed.model) - parameters(single.model)).abs().max() < 1e-6


@pytest.mark.parametrize(("estimator", "placement"), [
    pytest.param("k3", "loss", marks=pytest.mark.slow), pytest.param("k1", "reward", marks=pytest.mark.slow),
    ("exact", "both"),
])  # fmt: skip
def test_a_mixture_in_grpo_is_the_sum(tmp_path, estimator, placement):
    args = grpo_config(tmp_path, learning_rate=0.02)
    runs = [
        trained_grpo(
            AnchoredGRPO, args,
            penalty=KLPenalty(reference, estimator=estimator, placement=placement, controller=FixedKL(coef)),
        )
        for reference, coef in ((twice_and_half(), 0.1), (FrozenReference(policy(seed=5)), 0.25))
    ]  # fmt: skip
    a, b = (parameters(run.model) for run in runs)
    assert (a - b).abs().max() < 2e-6


def test_a_mixture_takes_one_pass_of_the_policy(tmp_path, monkeypatch):
    counts = []
    left = BackboneCalls.__exit__

    def leave(self, *error):
        counts.append(len(self.calls))
        return left(self, *error)

    monkeypatch.setattr(BackboneCalls, "__exit__", leave)
    sft(AnchoredSFT, sft_config(tmp_path), penalty=exact(reference=twice_and_half()))
    assert counts == [1] * 4


def test_a_cached_reference_is_the_one_it_was_written_from(tmp_path):
    rows = [torch.tensor([ids]) for ids in texts()["input_ids"]]
    batches = [(ids, torch.ones_like(ids)) for ids in rows]
    CachedReference.write(tmp_path / "cache", FrozenReference(policy(seed=5)), batches)
    for more in ({}, {"packing": True, "max_length": 24, "per_device_train_batch_size": 2}):
        args = sft_config(tmp_path, **more)
        cached = sft(AnchoredSFT, args, penalty=exact(reference=CachedReference(tmp_path / "cache")))
        live = sft(AnchoredSFT, args, penalty=exact())
        assert (parameters(cached.model) - parameters(live.model)).abs().max() < 1e-6


def test_a_reference_that_is_synced_in_every_step_is_the_policy(tmp_path):
    run = sft(AnchoredSFT, sft_config(tmp_path), penalty=lambda model: exact(reference=EMAReference(model, decay=0.0)))
    assert all(log["kl/reverse/mean"] == 0.0 for log in run.state.log_history if "loss" in log)
    slow = sft(AnchoredSFT, sft_config(tmp_path), penalty=lambda model: exact(reference=EMAReference(model, decay=0.9)))
    assert [log for log in slow.state.log_history if "loss" in log][-1]["kl/reverse/mean"] > 1e-6


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_reference_that_follows_is_resumed(tmp_path, adapter):
    def run(folder, steps, resume=None):
        args = sft_config(folder, max_steps=steps, save_strategy="steps", save_steps=2)
        trainer = AnchoredSFT(
            policy(), args=args, train_dataset=texts(), processing_class=tiny.tokenizer(),
            peft_config=tiny.lora() if adapter else None,
            penalty=lambda model: exact(reference=EMAReference(model, decay=0.5)),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    rest = run(tmp_path / "cut", 4, True)
    assert torch.equal(parameters(whole.model), parameters(rest.model))
    (tmp_path / "cut" / "checkpoint-2").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"follows the policy, and its state is to be found beside .*move the"):
        run(tmp_path / "rest", 4, str(tmp_path / "elsewhere"))


def test_a_reference_without_hidden_states_is_refused(tmp_path):
    known = TopKReference(torch.zeros(1, 2, 1, dtype=torch.long), torch.zeros(1, 2, 1), torch.zeros(1, 2))
    with pytest.raises(TypeError, match=r"TopKReference has no hidden states to be compared .*KLPenalty.measure"):
        sft(AnchoredSFT, sft_config(tmp_path), penalty=exact(reference=known))


def test_a_mixture_of_k3_is_not_k3_of_a_mixture(tmp_path):
    """The sum is of estimates: an oracle of one of them, beside it."""
    both = MixtureReference([(1.0, policy(seed=5)), (1.0, policy(seed=6))])
    args = grpo_config(tmp_path, learning_rate=0.02)
    mixed = trained_grpo(AnchoredGRPO, args, penalty=k3_in_the_loss(reference=both))
    single = trained_grpo(AnchoredGRPO, args, penalty=k3_in_the_loss())
    assert (parameters(mixed.model) - parameters(single.model)).abs().max() > 1e-4
