"""How PPO's recipe ends, as a user starts it: on a poor console, with an error, by Ctrl-C, once it is done already."""

import pytest
from safetensors.torch import load_file
from support import tiny
from support.processes import launch, python
from support.recipes import RECIPES

pytestmark = pytest.mark.slow
JUDGE = """
import os, signal

def score(completion_ids, trainer_state, **_):
    if trainer_state.global_step >= 3 and os.environ.get("RANK", "1") == "1":
        if os.environ.get("FAULT") == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        if os.environ.get("FAULT") == "raises":
            raise ValueError("\\x1b[2Jthe reward of\\x07 step 3")
    return [(7 * sum(ids) % 11) / 5 for ids in completion_ids]
"""
OPTIONS = {
    "dataset_name": "prompts.txt", "reward": "judge:score", "max_steps": 6, "save_steps": 1, "logging_steps": 1,
    "per_device_train_batch_size": 2, "num_mini_batches": 1, "num_ppo_epochs": 2, "max_completion_length": 6,
    "kl_log_tokens": 0, "learning_rate": 1e-2, "self_test": "false",
}  # fmt: skip
POLICY = "tiny \u2192"  # the recipe prints its name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder to start the recipe in: model, prompts and the reward's module."""
    folder = tmp_path_factory.mktemp("world")
    tiny.llama().save_pretrained(folder / POLICY)
    tiny.tokenizer().save_pretrained(folder / POLICY)
    (folder / "judge.py").write_text(JUDGE)
    (folder / "prompts.txt").write_text("\n".join(tiny.prompts(16)["prompt"]))
    return folder


def run(world, output, *more, processes=1, **variables):
    options = OPTIONS | {"model_name_or_path": POLICY, "output_dir": output, "processes": processes}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    arguments = ["--config", RECIPES / "ppo_reviews.yaml", *arguments, *more]
    start = python if processes == 1 else launch
    return start(str(RECIPES / "ppo_reviews.py"), *arguments, timeout=200, cwd=world, **variables)


@pytest.fixture(scope="module")
def whole(world):
    """The uninterrupted run, on a console of ASCII alone."""
    return run(world, "whole", PYTHONIOENCODING="ascii")


def tensors(folder):
    """Of every file, also the checkpoints': the policy's, the value function's, the rollout's."""
    return {
        f"{path.relative_to(folder)} {name}": tensor
        for path in folder.rglob("*.safetensors") for name, tensor in load_file(path).items()
    }  # fmt: skip


def test_a_console_that_cannot_show_a_character_changes_nothing(whole):
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "policy tiny \\u2192" in whole.stdout


def test_ctrl_c_and_a_resume_are_the_uninterrupted_run(whole, world):
    cut = run(world, "cut", FAULT="ctrl-c")
    assert cut.returncode == 130, cut.stderr[-3000:]
    assert cut.stderr.endswith("\nerror: interrupted (Ctrl-C)\n")
    assert "Traceback" not in cut.stderr
    assert sorted(p.name for p in (world / "cut").glob("checkpoint-*"))[-1] == "checkpoint-4"
    assert not list((world / "cut").glob("*.safetensors"))
    rest = run(world, "cut", "--resume_from_checkpoint", "true")
    assert rest.returncode == 0, rest.stderr[-3000:]
    assert "policy tiny \u2192" in rest.stdout
    expected, found = tensors(world / "whole"), tensors(world / "cut")
    assert not tiny.unequal(expected, found)
    at_5, at_6 = (found[f"checkpoint-{step}/model.safetensors lm_head.weight"] for step in (5, 6))
    assert (at_5 - at_6).abs().max() > 1e-3


def last_lines(text):
    return [line.strip() for line in text.splitlines() if line.strip(" =-")]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_is_said_last_and_without_control_characters(processes, world):
    done = run(world, f"raises on {processes}", processes=processes, FAULT="raises")
    assert done.returncode == 1
    assert last_lines(done.stderr)[-1] == "ValueError: \\x1b[2Jthe reward of\\x07 step 3"
    assert "\x1b[2J" not in done.stderr + done.stdout
    assert "\x07" not in done.stderr + done.stdout
    assert "in score" in done.stderr


def test_a_finished_run_that_is_resumed_says_so_in_one_line_on_two_processes(whole, world):
    again = run(world, "whole", "--resume_from_checkpoint", "true", processes=2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout == "whole/checkpoint-6 is at step 6 of 6: nothing is left to train\n"
