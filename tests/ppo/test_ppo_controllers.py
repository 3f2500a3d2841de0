"""Controllers in PPO, wherever the KL goes: what they are shown, when the coefficient changes, what is resumed."""

import json

import pytest
import torch
from support import tiny

from klft import AdaptiveKL, FixedKL, PIController, ScheduledKL, TargetKL
from klft.penalty import KLPenalty

COEF, TARGET = 0.2, 2.0
# name -> (its own options, a fresh one by the library's own class)
CONTROLLERS = {
    "fixed": ({}, lambda: FixedKL(COEF)),
    "adaptive": ({"kl_target": TARGET, "kl_horizon": 30}, lambda: AdaptiveKL(COEF, TARGET, 30)),
    "pi": ({"kl_target": TARGET}, lambda: PIController(COEF, TARGET)),
    "target": ({"kl_target": TARGET}, lambda: TargetKL(COEF, TARGET)),
    "scheduled": ({"kl_coef_end": 0.05, "kl_horizon": 20}, lambda: ScheduledKL(COEF, 0.05, 20)),
    "scheduled_cosine": ({"kl_coef_end": 0.05, "kl_horizon": 20}, lambda: ScheduledKL(COEF, 0.05, 20, "cosine")),
}
FORMS = [("k1", "reward"), ("k3", "loss"), ("exact", "loss"), ("k3", "both"), ("exact", "both")]


def make(folder, name, form, **changed):
    return tiny.trainer(
        folder, kind=tiny.SeenTrainer, given={"reference": tiny.apart()},
        **{
            "max_steps": 12, "num_ppo_epochs": 2, "num_mini_batches": 2, "per_device_train_batch_size": 4,
            "kl_controller": name, "kl_coef": COEF, "kl_estimator": form[0], "kl_placement": form[1],
        } | CONTROLLERS[name][0] | changed,
    )  # fmt: skip


QUICK = [(name, form) for name in CONTROLLERS for form in FORMS if form == FORMS[0] or name == "adaptive"]
PAIRS = [
    pytest.param(name, form, id="-".join((name, *form)), marks=[] if (name, form) in QUICK else [pytest.mark.slow])
    for name in CONTROLLERS
    for form in FORMS
]


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_the_coefficient_in_use_is_the_controllers_and_changes_between_rollouts_only(name, form, tmp_path, monkeypatch):
    """8 completions to a rollout, 4 steps on each: what every loss and reward was taken with, against the controller
    run by hand on the logged nats per sequence."""
    in_loss, in_reward = [], []
    losses, rewards = KLPenalty.losses, KLPenalty.rewards

    def spy_losses(self, kl):
        found = losses(self, kl)
        # The sum is linear in the coefficient: divided by that of coefficient 1 it is the one that was used.
        with torch.no_grad():
            in_loss.append(float(found.sum() / self.token_kl(kl, "unbiased").sum()))
        return found

    def spy_rewards(self, scores, kl):
        found, charge = rewards(self, scores, kl), self.reward_kl(kl)
        if float(charge.abs().sum()):
            in_reward.append(float((scores.sum() - found.sum()) / charge.sum()))
        return found

    monkeypatch.setattr(KLPenalty, "losses", spy_losses)
    monkeypatch.setattr(KLPenalty, "rewards", spy_rewards)
    run = make(tmp_path, name, form)
    run.train()
    controller, wanted = CONTROLLERS[name][1](), []
    for log in tiny.step_logs(run):
        if "kl/coef" in log:  # of a rollout
            assert log["kl/coef"] == pytest.approx(controller.coef, rel=1e-12)
            assert log["kl/sequence/reverse/mean"] == pytest.approx(
                log["kl/reverse/mean"] * log["completions/mean_length"], rel=1e-6
            )
            wanted.append(controller.coef)
            controller.update(log["kl/sequence/reverse/mean"], 8)
    assert len(wanted) == 3
    assert len(set(wanted)) == (1 if name == "fixed" else 3)
    assert run.penalty.coef == pytest.approx(controller.coef, rel=1e-9)
    each = len(in_loss) // 3
    assert in_loss == pytest.approx([coef for coef in wanted for _ in range(each)], rel=1e-4)
    assert each == (0 if form[1] == "reward" else 4)
    assert in_reward == ([] if form[1] == "loss" else pytest.approx(wanted, rel=1e-3))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("adaptive", ("exact", "loss")),
        ("pi", ("k3", "loss")),
        ("target", ("k3", "both")),
        ("scheduled", ("exact", "both")),
    ],
)
def test_a_checkpoint_holds_the_controller_and_a_resumed_run_goes_on_with_it(name, form, tmp_path):
    """Cut after 6 of 12 steps, in the middle of the second rollout: the coefficient is the second one's."""
    saving = {"save_strategy": "steps", "save_steps": 6.0}
    whole = make(tmp_path / "whole", name, form, **saving)
    whole.train()
    cut = make(tmp_path / "cut", name, form, **saving | {"max_steps": 6})
    cut.train()
    saved = json.loads((tmp_path / "cut" / "checkpoint-6" / "klft_state.json").read_text())["controller"]
    assert saved == cut.penalty.state_dict()
    assert saved["coef"] != COEF
    rest = make(tmp_path / "cut", name, form, **saving)
    rest.train(resume_from_checkpoint=True)
    assert rest.penalty.state_dict() == whole.penalty.state_dict() != saved
    assert tiny.step_logs(rest) == tiny.step_logs(whole)
    assert not tiny.unequal(tiny.parameters(whole.model), tiny.parameters(rest.model))


def test_a_run_resumed_with_another_schedule_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6.0}
    make(tmp_path, "scheduled", FORMS[0], **saving | {"max_steps": 6}).train()
    other = make(tmp_path, "scheduled", FORMS[0], **saving | {"kl_coef_end": 0.1})
    with pytest.raises(ValueError, match=r"kl_coef_end: 0\.05 in the checkpoint, 0\.1 now"):
        other.train(resume_from_checkpoint=True)


def test_a_schedule_may_begin_without_a_penalty(tmp_path):
    run = make(tmp_path, "scheduled", ("exact", "both"), kl_coef=0, kl_coef_end=0.4, kl_horizon=16)
    run.train()
    coefs = [log["kl/coef"] for log in tiny.step_logs(run) if "kl/coef" in log]
    assert coefs == pytest.approx([0.0, 0.2, 0.4])
