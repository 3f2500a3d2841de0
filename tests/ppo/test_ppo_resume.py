"""A run that is interrupted and resumed is the run that was not: bit for bit, whatever happened to its files."""

import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import tiny
from support.processes import environment

from klft.ppo.checkpoint import MARKER, checkpoints, newest_complete, what_is_wrong
from klft.ppo.value import value_parameters

CYCLES = {"one epoch": {"num_ppo_epochs": 1}, "mid-cycle": {"num_ppo_epochs": 2, "num_mini_batches": 2}}
SAVING = {"save_strategy": "steps", "save_steps": 3.0}
ADAPTIVE = {"kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 60, "normalize_scores": True}


def kinds(name):
    """What to train: (model, arguments of the trainer). Anew each time, as a new process would."""
    if name == "value model":
        return tiny.llama(), {"value_model": tiny.critic()}
    if name == "adapter":
        return tiny.llama(), {"peft_config": tiny.lora()}
    if name == "peft model":
        from peft import get_peft_model

        torch.manual_seed(3)
        return get_peft_model(tiny.llama(), tiny.lora()), {}
    return tiny.llama(), {}


def start(folder, kind="head", max_steps=6, **changed):
    model, given = kinds(kind)
    return tiny.trainer(
        folder, model, given=given | changed.pop("given", {}), max_steps=max_steps,
        **{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2} | SAVING | changed,
    )  # fmt: skip


def optimizer_tensors(run):
    state = run.optimizer.state_dict()
    tensors = {f"{i}.{n}": t for i, entry in state["state"].items() for n, t in entry.items()}
    return tensors, [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]


def assert_the_same(run, other):
    assert run.state.global_step == other.state.global_step
    assert not tiny.unequal(tiny.parameters(run.model), tiny.parameters(other.model))
    assert not tiny.unequal(value_parameters(run.model), value_parameters(other.model))
    tensors, groups = optimizer_tensors(run)
    other_tensors, other_groups = optimizer_tensors(other)
    assert not tiny.unequal(tensors, other_tensors)
    assert groups == other_groups
    assert run.penalty.state_dict() == other.penalty.state_dict()
    assert run.episodes == other.episodes
    assert tiny.step_logs(run) == tiny.step_logs(other)


@pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES.keys())
@pytest.mark.parametrize("kind", ["head", "value model", "adapter", "peft model"])
def test_six_steps_are_three_and_three_more(cycle, kind, tmp_path):
    settings = cycle | ADAPTIVE
    whole = start(tmp_path / "whole", kind, **settings)
    whole.train()
    random_after = torch.get_rng_state()

    start(tmp_path / "cut", kind, 3, **settings).train()
    torch.manual_seed(99)
    rest = start(tmp_path / "cut", kind, **settings)
    rest.train(resume_from_checkpoint=True)
    assert torch.equal(torch.get_rng_state(), random_after)
    assert len(tiny.step_logs(rest)) == 6
    assert_the_same(whole, rest)
    assert rest.penalty.coef != 0.05
    assert value_parameters(rest.model)
    assert any(t.abs().sum() > 0 for t in value_parameters(rest.model).values())


def test_resuming_twice_and_across_an_epoch_of_prompts(tmp_path):
    """16 prompts, 4 to a rollout: the order of the second pass over them comes out of the seed as well."""
    data = tiny.prompts(16)

    def go(folder, steps, resume=None):
        run = tiny.trainer(folder, None, tiny.mixed, data, max_steps=steps, save_strategy="steps", save_steps=1.0)
        run.train(resume_from_checkpoint=resume)
        return run

    whole = go(tmp_path / "whole", 7)
    for steps in (2, 4, 5):
        go(tmp_path / "cut", steps, steps > 2)
    assert_the_same(whole, go(tmp_path / "cut", 7, True))


def test_a_stopped_rollout_stays_stopped(tmp_path):
    settings = {"num_ppo_epochs": 6, "target_kl": 1e-3, "learning_rate": 3e-2, "logging_steps": 6.0}
    whole = start(tmp_path / "whole", max_steps=8, **settings)
    whole.train()
    start(tmp_path / "cut", max_steps=3, **settings).train()
    saved = json.loads((tmp_path / "cut" / "checkpoint-3" / "klft_state.json").read_text())
    assert saved["cycle"]["stats"]["stopped"] is True
    rest = start(tmp_path / "cut", max_steps=8, **settings)
    rest.train(resume_from_checkpoint=True)
    assert not tiny.unequal(tiny.parameters(whole.model), tiny.parameters(rest.model))


def test_nothing_klft_writes_is_a_pickle(tmp_path):
    start(tmp_path, max_steps=3, num_ppo_epochs=4).train()
    folder = tmp_path / "checkpoint-3"
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {"klft_state.json", "klft/rollout_0.safetensors", MARKER, "model.safetensors"} <= names
    # What is left to torch.save is the Trainer's own: optimizer, scheduler, random state, arguments.
    pickles = {n for n in names if n.endswith((".pt", ".pth", ".bin", ".pkl"))}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    assert not list(tmp_path.glob("tmp-*"))


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    start(folder, max_steps=3, save_steps=1.0).train()
    return folder


@pytest.fixture
def run_folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def truncate(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-7])
    return "optimizer.pt"


def unmark(folder):
    (folder / MARKER).unlink()
    return MARKER


def delete(folder):
    (folder / "model.safetensors").unlink()
    return "model.safetensors"


def garble(folder):
    (folder / MARKER).write_text("{")
    return MARKER


DAMAGE = [truncate, unmark, delete, garble]


@pytest.mark.parametrize("damage", DAMAGE)
def test_true_takes_the_newest_complete_checkpoint_and_says_what_it_skipped(damage, run_folder, caplog):
    file = damage(run_folder / "checkpoint-3")
    run = start(run_folder, max_steps=5, save_steps=1.0)
    with caplog.at_level(logging.INFO):
        run.train(resume_from_checkpoint=True)
    skipped = [r.getMessage() for r in caplog.records if "skipping" in r.getMessage()]
    assert len(skipped) == 1
    assert "checkpoint-3" in skipped[0]
    assert file in skipped[0]
    whole = start(run_folder.parent / "whole", max_steps=5, save_strategy="no")
    whole.train()
    assert_the_same(whole, run)
    assert newest_complete(run_folder).name == "checkpoint-5"
    assert what_is_wrong(run_folder / "checkpoint-3") is None, "the damaged one was passed again and is replaced"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_named_damaged_checkpoint_is_refused_by_file(damage, run_folder):
    file = damage(run_folder / "checkpoint-3")
    run = start(run_folder, max_steps=5, save_steps=1.0)
    with pytest.raises(ValueError, match=f"cannot resume: .*{file}"):
        run.train(resume_from_checkpoint=str(run_folder / "checkpoint-3"))


def test_a_named_whole_checkpoint_is_taken(run_folder):
    run = start(run_folder, max_steps=3, save_steps=1.0)
    run.train(resume_from_checkpoint=str(run_folder / "checkpoint-1"))
    whole = start(run_folder.parent / "whole", max_steps=3, save_strategy="no")
    whole.train()
    assert_the_same(whole, run)


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        start(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 7}, "seed: 42 in the checkpoint, 7 now"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: 2 in the checkpoint, 4 now"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: 2 in the checkpoint, 1 now"),
        ({"num_ppo_epochs": 2}, "num_ppo_epochs: 1 in the checkpoint, 2 now"),
        ({"kl_coef": 0.1}, "kl_coef: 0.05 in the checkpoint, 0.1 now"),
        ({"temperature": 0.5}, "temperature: 1.0 in the checkpoint, 0.5 now"),
    ],
)
def test_another_run_is_refused_with_what_differs(changed, named, run_folder):
    with pytest.raises(ValueError, match="written by another run") as caught:
        start(run_folder, save_steps=1.0, **changed).train(resume_from_checkpoint=True)
    assert named in str(caught.value)


def test_another_number_of_processes_is_refused_by_name(run_folder):
    path = run_folder / "checkpoint-3" / "klft_state.json"
    state = json.loads(path.read_text())
    state["run"]["world_size"] = 4
    text = json.dumps(state)
    marker = run_folder / "checkpoint-3" / MARKER
    sizes = json.loads(marker.read_text())
    sizes["files"]["klft_state.json"] = len(text)
    del sizes["checksums"]  # as before there were any
    path.write_text(text)
    marker.write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match="world_size: 4 in the checkpoint, 1 now"):
        start(run_folder, save_steps=1.0).train(resume_from_checkpoint=True)


# ---- folders -----------------------------------------------------------------------------------------------------


def test_two_runs_do_not_share_a_folder(tmp_path):
    refused = []

    class Second(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(RuntimeError, match="another run is writing to") as caught:
                start(tmp_path).train()
            refused.append(str(caught.value))

    start(tmp_path, max_steps=1, given={"callbacks": [Second()]}).train()
    assert len(refused) == 1
    assert str(tmp_path) in refused[0]
    start(tmp_path, max_steps=1, overwrite_output_dir=True).train()  # free again


def test_the_folder_is_free_again_after_a_failure(tmp_path):
    def fails(completions, **_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny.trainer(tmp_path, None, fails, max_steps=1).train()
    tiny.trainer(tmp_path, max_steps=1).train()


def test_only_so_many_checkpoints_are_kept(tmp_path):
    start(tmp_path, max_steps=5, save_steps=1.0, save_total_limit=2).train()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-4"]
    assert all(what_is_wrong(p) is None for p in checkpoints(tmp_path))


@pytest.mark.parametrize("kind", ["head", "value model", "adapter", "peft model"])
def test_the_best_model_is_kept_and_loaded_at_the_end(kind, tmp_path):
    """The second checkpoint is best: everything that was trained, the value function too, is what it was then."""
    recorder = tiny.Recorder()
    best = {2: 1.0}

    class Scores:
        __name__ = "scores"

        def __call__(self, completions, held_out, trainer_state, **_):
            if held_out[0]:
                return [best.get(trainer_state.global_step, 0.0)] * len(completions)
            return [float(len(c)) / 10 for c in completions]

    model, given = kinds(kind)
    data, held_out = tiny.prompts(16, held_out=[0] * 16), tiny.prompts(4, held_out=[1] * 4)
    run = tiny.trainer(
        tmp_path, model, Scores(), data, given=given | {"eval_dataset": held_out, "callbacks": [recorder]},
        max_steps=4, save_strategy="steps", save_steps=1.0, eval_strategy="steps", eval_steps=1.0, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="eval_reward/score/mean", greater_is_better=True,
    )  # fmt: skip
    run.train()
    assert run.state.best_metric == 1.0
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-2"
    assert what_is_wrong(tmp_path / "checkpoint-2") is None
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-2"], "the newest, and the best"
    assert tiny.unequal(recorder.parameters[1], recorder.parameters[3])
    assert not tiny.unequal(tiny.parameters(run.model), recorder.parameters[1])


# ---- kill -9 -----------------------------------------------------------------------------------------------------


def child(folder):
    """Ten steps, one checkpoint each, resumed if there is one."""
    run = start(folder, max_steps=10, save_steps=1.0, num_ppo_epochs=2, logging_strategy="no")
    print("training", flush=True)
    run.train(resume_from_checkpoint=True if newest_complete(Path(folder)) else None)
    torch.save(tiny.parameters(run.model), Path(folder) / "end.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_a_run_killed_again_and_again_arrives_where_the_others_do(kills, tmp_path):
    whole = start(tmp_path / "whole", max_steps=10, save_strategy="no", num_ppo_epochs=2)
    whole.train()
    chance = random.Random(0)
    folder = tmp_path / "killed"
    folder.mkdir()

    def launch():
        command = [sys.executable, __file__, str(folder)]
        few = environment(KLFT_TEST_THREADS="1")
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=few)

    killed_at = []
    for _ in range(kills):
        process = launch()
        assert process.stdout.readline(), "the child did not start"
        # In or after the writing of the next checkpoint, at a random moment.
        before = len(list(folder.glob("*checkpoint-*")))
        while process.poll() is None and len(list(folder.glob("*checkpoint-*"))) == before:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_at.append(sorted(p.name for p in folder.glob("*checkpoint-*")))
        if len(checkpoints(folder)) > 7:  # start over, so that there is always something left to kill
            shutil.rmtree(folder)
            folder.mkdir()
    process = launch()
    output, _ = process.communicate()
    assert process.returncode == 0, f"{output}\nfolders after each kill: {killed_at}"
    assert not tiny.unequal(torch.load(folder / "end.pt"), tiny.parameters(whole.model))
    assert all(what_is_wrong(p) is None for p in checkpoints(folder))


if __name__ == "__main__":
    import conftest  # noqa: F401 - no hub, few threads

    child(sys.argv[1])
