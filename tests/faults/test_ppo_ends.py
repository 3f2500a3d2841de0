"""Runs that end early, in this process: SIGTERM, a disk that is full, and runs that have ended already."""

import os
import resource
import signal
import threading

import pytest
from support import tiny

from klft.ppo import checkpoint_to_resume, finished_run
from klft.ppo.checkpoint import what_is_wrong

SAVES = {"save_strategy": "steps", "save_steps": 100.0}


class At(tiny.TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step, work):
        self.step, self.work = step, work

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.work()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def run(folder, *callbacks, **changed):
    settings = {"max_steps": 4, "num_ppo_epochs": 2, "given": {"callbacks": list(callbacks)}} | SAVES | changed
    return tiny.trainer(folder, **settings)


def test_after_sigterm_the_step_is_saved_and_the_rest_is_the_same_run(tmp_path):
    whole = run(tmp_path / "whole")
    whole.train()
    cut = run(tmp_path / "cut", At(2, terminate))
    with pytest.raises(SystemExit) as ended:
        cut.train()
    assert ended.value.code == 143
    assert cut.state.global_step == 3
    assert what_is_wrong(tmp_path / "cut" / "checkpoint-3") is None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    rest = run(tmp_path / "cut")
    rest.train(resume_from_checkpoint=True)
    assert not tiny.unequal(tiny.parameters(whole.model), tiny.parameters(rest.model))


def test_a_second_sigterm_does_not_cut_the_saving(tmp_path):
    cut = run(tmp_path, At(1, lambda: (terminate(), terminate())))
    with pytest.raises(SystemExit):
        cut.train()
    assert what_is_wrong(tmp_path / "checkpoint-2") is None


def test_sigterm_is_left_to_whoever_handles_it(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        run(tmp_path / "handled", At(1, terminate)).train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1]


def test_sigterm_is_as_it_was_where_nothing_is_saved_and_outside_the_main_thread(tmp_path):
    found = []
    look = At(1, lambda: found.append(signal.getsignal(signal.SIGTERM)))
    run(tmp_path / "unsaved", look, save_strategy="no").train()
    thread = threading.Thread(target=run(tmp_path / "thread", look).train)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL] * 2
    with pytest.raises(ValueError, match=r"enable_jit_checkpoint would be ignored: .*after a SIGTERM anyway"):
        tiny.config(tmp_path, enable_jit_checkpoint=True)


def test_a_disk_that_is_full_names_the_last_good_checkpoint_and_leaves_no_part(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fills = At(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1])))
    try:
        with pytest.raises(RuntimeError, match=r"checkpoint-2 could not be saved: .*\. The last good.*checkpoint-1\."):
            run(tmp_path, fills, save_steps=1.0).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-1"]
    run(tmp_path, save_steps=1.0).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("wanted", [3, 2])
def test_a_finished_run_that_is_resumed_has_its_weights_and_takes_no_step(wanted, tmp_path):
    first = run(tmp_path, max_steps=3)
    first.train()
    again = run(tmp_path, max_steps=wanted, resume_from_checkpoint="true")
    again.model.model.embed_tokens.weight.data.zero_()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert not tiny.unequal(tiny.parameters(first.model), tiny.parameters(again.model))
    line = f"{tmp_path}/checkpoint-3 is at step 3 of {wanted}: nothing is left to train"
    assert finished_run(again.args) == line
    assert checkpoint_to_resume(tmp_path, True) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("changed", [{"max_steps": 4}, {"resume_from_checkpoint": None}, {"max_steps": -1}])
def test_an_unfinished_run_is_not_finished(changed, tmp_path):
    run(tmp_path, max_steps=3).train()
    settings = {"max_steps": 3, "resume_from_checkpoint": "true"} | SAVES | changed
    assert finished_run(tiny.config(tmp_path, **settings)) is None


def test_a_finished_run_of_epochs_takes_no_step_either(tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 1.0, "data": tiny.prompts(8)}
    first = run(tmp_path, **settings)
    first.train()
    again = run(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == first.state.global_step
    assert not tiny.unequal(tiny.parameters(first.model), tiny.parameters(again.model))
