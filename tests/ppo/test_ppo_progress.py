"""What PPOTrainer says while it trains: a line per rollout, with or without a progress bar."""

import re
import sys

import pytest
from support import tiny
from transformers import PrinterCallback, ProgressCallback

from klft.ppo import RolloutProgress
from klft.writing import two_digits

SETTINGS = {"max_steps": 4, "num_ppo_epochs": 2, "disable_tqdm": False, "kl_coef": 0.25}
PHASES = ("generate", "score", "reward", "train")


def trained(tmp_path, **changed):
    run = tiny.trainer(tmp_path, **(SETTINGS | changed))
    run.train()
    return run


def on_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


@pytest.mark.parametrize(("direction", "terminal"), [("reverse", False), ("reverse", True), ("forward", False)])
def test_a_line_per_rollout_without_a_bar(direction, terminal, tmp_path, capsys, monkeypatch):
    if terminal:
        on_terminal(monkeypatch)
    estimator = {"reverse": "k1", "forward": "exact"}[direction]
    placement = {"reverse": "reward", "forward": "loss"}[direction]
    changed = {"kl_direction": direction, "kl_estimator": estimator, "kl_placement": placement}
    run = trained(tmp_path, disable_tqdm=terminal, **changed)
    said = capsys.readouterr()
    assert "it/s" not in said.err
    assert "\r" not in said.err
    first, *lines = said.out.splitlines()
    assert first == "2 rollout(s) of 4 completions to train on, 2 step(s) each; a line per rollout"
    assert len(lines) == 2
    logs = [log for log in run.state.log_history if "loss" in log]
    for line, log in zip(lines, logs[::2], strict=True):  # a rollout is in the log of its first step
        numbers = [log["reward/score/mean"], log[f"kl/sequence/{direction}/mean"], 0.25]
        shown = re.match(r"step (\d): score +(\S+), KL +(\S+) nats, coef +(\S+); \d+ tokens/s, ", line)
        assert shown is not None
        assert list(shown.groups()) == [str(log["step"]), *map(two_digits, numbers)]
    assert float(numbers[1]) > 0
    # Seconds are of all steps since the last line.
    seconds = dict(re.findall(r"(\w+) ([\d.e-]+)", lines[1].partition("seconds: ")[2]))
    assert {name: seconds[name] for name in PHASES} == {
        name: two_digits(sum(log.get(f"time/{name}/seconds", 0.0) for log in logs[1:3])) for name in PHASES
    }


def test_the_first_line_says_what_is_done_first_and_how_much_of_the_last_rollout_is_used(tmp_path, capsys):
    trained(tmp_path, max_steps=3, self_test=True)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "2 rollout(s) of 4 completions to train on, 2 step(s) each, of the last one 1; "
        "first a check on three short rows (self_test); a line per rollout"
    )


def test_a_bar_on_a_terminal_names_the_phase_and_leaves_none_of_the_evaluation(tmp_path, capsys, monkeypatch):
    on_terminal(monkeypatch)
    given = {"eval_dataset": tiny.prompts(8)}
    run = tiny.trainer(tmp_path, given=given, **SETTINGS)
    run.evaluate()
    before = capsys.readouterr()
    assert before.out == ""
    assert before.err.rpartition("\r")[2].strip() == ""
    run.train()
    said = capsys.readouterr()
    assert [line[:6] for line in said.out.replace("\r", "\n").splitlines() if "KL" in line] == ["step 1", "step 3"]
    assert "generate:" in said.err
    assert "train: 100%" in said.err
    assert said.err.endswith("\n")


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_the_trainers_own_is_replaced_and_a_users_kept(disable_tqdm, tmp_path):
    class Mine(ProgressCallback):
        pass

    mine = Mine()
    run = tiny.trainer(tmp_path, given={"callbacks": [mine]}, disable_tqdm=disable_tqdm)
    kinds = [type(callback) for callback in run.callback_handler.callbacks]
    assert mine in run.callback_handler.callbacks
    assert kinds.count(RolloutProgress) == 1
    assert not {ProgressCallback, PrinterCallback} & set(kinds)


@pytest.mark.parametrize(("changed", "lines", "when"), [
    ({"max_steps": 1, "logging_steps": 2}, ["step 1"], "a line per rollout"),
    ({"max_steps": 3, "logging_steps": 2}, ["step 2", "step 3"], "a line per rollout"),
    ({"max_steps": 4, "logging_steps": 4}, ["step 4"], "a line every 4 steps, and at the end"),
    ({"max_steps": 4, "logging_steps": 10}, ["step 4"], "a line every 10 steps, and at the end"),
    ({"max_steps": 4, "logging_steps": 0.75}, ["step 3"], "a line every 3 steps, and at the end"),
    ({"max_steps": 20, "logging_steps": 13}, ["step 13", "step 20"], "a line every 13 steps, and at the end"),
    ({"max_steps": 3, "logging_strategy": "epoch"}, ["step 3"], "a line per pass over the prompts, and at the end"),
    ({"max_steps": 2, "logging_strategy": "no"}, [], "none is logged (logging_strategy: no)"),
])  # fmt: skip
def test_no_rollout_ends_without_its_line(changed, lines, when, tmp_path, capsys):
    run = trained(tmp_path, **{"logging_steps": 2, "num_ppo_epochs": 2} | changed)
    first, *said = capsys.readouterr().out.splitlines()
    assert first.partition("; ")[2] == when
    assert [line.partition(":")[0].replace("  ", " ") for line in said] == lines
    rollouts = [log for log in run.state.log_history if "kl/coef" in log]
    assert len(rollouts) == len(lines)
    if lines:
        assert rollouts[-1]["episode"] == run.episodes


def test_scores_of_none_leave_their_place_out(tmp_path, capsys):
    trained(tmp_path, reward=lambda completions, **_: [None] * len(completions), max_steps=2)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert line.startswith("step 1: KL")


@pytest.mark.parametrize(("value", "shown"), [
    (0.0, "0.0"), (0.00042, "0.00042"), (5.3e-7, "5.3e-07"), (0.5, "0.50"), (-1.0, "-1.0"), (12.4, "12"), (99.4, "99"),
    (99.6, "100"), (3141.5, "3142"), (float("nan"), "nan"), (float("-inf"), "-inf"),
])  # fmt: skip
def test_two_digits(value, shown):
    assert two_digits(value) == shown
