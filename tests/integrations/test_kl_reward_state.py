"""The controller's state is in the trainer's checkpoints: a resumed run is the run that was not interrupted."""

import json
import logging
import shutil

import pytest
from support import rloo, tiny

from klft import AdaptiveKL, FixedKL
from klft.integrations import KLReward


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return rloo.saved(tmp_path_factory.mktemp("reference"))


def start(folder, path, max_steps, coef=None, **changed):
    kl = KLReward(rloo.reference(path), coef=coef or AdaptiveKL(0.1, target=0.5, horizon=40))
    changed = {"save_strategy": "steps", "save_steps": 2, "num_iterations": 2} | changed
    run = rloo.trainer(folder, rloo.policy(path), [tiny.mixed, kl], max_steps=max_steps, **changed)
    kl.bind(run)
    return run, kl


def logged(run):
    """Without the wall clock."""
    return [
        {key: value for key, value in log.items() if key != "step_time"}
        for log in run.state.log_history
        if "loss" in log
    ]


@pytest.mark.parametrize("restoring", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resumed_run_is_the_whole_one_wherever_its_checkpoint_lies(restoring, path, tmp_path):
    changed = {"restore_callback_states_from_checkpoint": restoring}
    whole, whole_kl = start(tmp_path / "whole", path, 4)
    whole.train()
    cut, _ = start(tmp_path / "cut", path, 2)
    cut.train()
    moved = shutil.move(tmp_path / "cut" / "checkpoint-2", tmp_path / "moved")
    rest, kl = start(tmp_path / "rest", path, 4, **changed)
    rest.train(resume_from_checkpoint=str(moved))
    assert not tiny.unequal(tiny.parameters(whole.model), tiny.parameters(rest.model))
    assert logged(whole) == logged(rest)
    assert kl.penalty.state_dict() == whole_kl.penalty.state_dict()
    assert kl.penalty.coef == pytest.approx(0.1 * (1 + 0.2 * 4 / 40) ** 2)
    saved = json.loads((tmp_path / "moved" / "trainer_state.json").read_text())["stateful_callbacks"]["klft.KLReward"]
    assert saved["coef"] == pytest.approx(0.1 * (1 + 0.2 * 4 / 40))


def test_checkpoint_without_the_state_is_named(path, tmp_path, caplog):
    plain = rloo.trainer(tmp_path, rloo.policy(path), [tiny.mixed], max_steps=2, save_strategy="steps", save_steps=2)
    plain.train()
    run, kl = start(tmp_path, path, 3)
    with caplog.at_level(logging.WARNING, "klft"):
        run.train(resume_from_checkpoint=True)
    assert "the checkpoint of step 2 has no state of klft.KLReward: its coefficient starts at 0.1" in caplog.text
    assert kl.penalty.coef > 0.1


def test_another_controller_than_the_checkpoints_is_refused(path, tmp_path):
    start(tmp_path, path, 2)[0].train()
    with pytest.raises(ValueError, match="AdaptiveKL"):
        start(tmp_path, path, 4, coef=FixedKL(0.1))[0].train(resume_from_checkpoint=True)
