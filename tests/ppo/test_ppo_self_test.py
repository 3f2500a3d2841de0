"""Before the first rollout: what is wrong ends the run, what is right costs nothing but time, which is logged."""

import copy
from contextlib import nullcontext

import pytest
import torch
from support import tiny

from klft import FrozenReference
from klft.models import disable_dropout
from klft.ppo import self_test


def trained(folder, **changed):
    run = tiny.trainer(folder, max_steps=3, self_test=True, **changed)
    run.train()
    return run


def stops(run, said):
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(
        RuntimeError, match=rf"self-test before the first step: .*{said}.*self_test=False leaves it out"
    ):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(t, before[name]) for name, t in run.model.state_dict().items())


@pytest.mark.parametrize(
    "given", [{}, {"peft_config": tiny.lora()}, {"reference": tiny.apart()}, {"value_model": tiny.critic()}]
)
def test_training_is_the_same_with_and_without(tmp_path, given):
    runs = []
    for tested in (True, False):
        run = tiny.trainer(tmp_path / str(tested), max_steps=3, self_test=tested, given=copy.deepcopy(given))
        run.train()
        runs.append(run)
    for own, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(own, other)
    assert tiny.step_logs(runs[0]) == tiny.step_logs(runs[1])


def test_its_time_is_logged_once(tmp_path):
    run = trained(tmp_path)
    summary = run.state.log_history[-1]
    assert 0 < summary["self_test/seconds"] < 60
    assert not any("self_test/seconds" in log for log in run.state.log_history[:-1])
    run = tiny.trainer(tmp_path / "off", max_steps=1)
    run.train()
    assert "self_test/seconds" not in run.state.log_history[-1]


def test_once_per_trainer(tmp_path, monkeypatch):
    calls = []
    original = self_test.run_self_test
    monkeypatch.setattr(
        self_test, "run_self_test", lambda *a, **k: calls.append(k["starts_equal"]) or original(*a, **k)
    )
    run = tiny.trainer(tmp_path, max_steps=1, self_test=True)
    run.train()
    run.train()  # the policy has moved: it does not start as the reference any more
    assert calls == [True]


def test_a_resumed_policy_has_left_its_reference(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1.0, "num_ppo_epochs": 1}
    tiny.trainer(tmp_path, max_steps=2, **options).train()
    run = tiny.trainer(tmp_path, max_steps=3, self_test=True, **options)  # it may be another when a run goes on
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3


def test_another_reference_on_purpose_is_no_fault(tmp_path):
    trained(tmp_path, given={"reference": tiny.apart()})


def test_a_reference_that_was_swapped(tmp_path):
    run = tiny.trainer(tmp_path, max_steps=1, self_test=True)
    run.scorer.reference = FrozenReference(tiny.apart())
    stops(run, "start: the policy starts as the reference, and their KL is")


def test_another_temperature(tmp_path):
    run = tiny.trainer(tmp_path, max_steps=1, self_test=True)
    run.scorer.temperature = 0.5
    stops(run, r"sampling: tokens were sampled from another distribution .*\(0.5 here\)")


@pytest.mark.parametrize("changed", [{"top_p": 0.9}, {"top_k": 5}, {"generation_kwargs": {"repetition_penalty": 1.3}}])
def test_a_sampler_that_is_asked_to_differ_is_no_fault(tmp_path, changed):
    trained(tmp_path, **changed)


def test_dropout_in_the_loss(tmp_path, monkeypatch):
    run = tiny.trainer(tmp_path, tiny.llama(attention_dropout=0.0), max_steps=1, self_test=True)
    for layer in run.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    monkeypatch.setattr(self_test, "quiet", lambda model: model.train())
    stops(run, "loss: the policy has other probabilities in the loss")
    disable_dropout(run.model)


def test_dropout_that_is_wanted_is_no_fault(tmp_path):
    trained(tmp_path, disable_dropout=False)


def test_an_adapter_that_stays_on(tmp_path):
    run = tiny.trainer(tmp_path, max_steps=1, self_test=True, given={"peft_config": tiny.lora()})
    run.model.disable_adapter = nullcontext
    stops(run, "reference stays: weights that are trained move the reference")


def test_a_frozen_policy(tmp_path):
    run = tiny.trainer(tmp_path, max_steps=1, self_test=True)
    for name, p in run.model.named_parameters():
        p.requires_grad_("v_head" in name)
    stops(run, "policy moves: the policy's probabilities do not depend on the weights that are trained")


def test_an_optimizer_of_another_model(tmp_path):
    run = tiny.trainer(tmp_path, max_steps=1, self_test=True)
    run.create_optimizer()
    del run.optimizer.param_groups[0]["params"][:3]
    stops(run, "optimizer: the optimizer lacks 3 of")
