"""What PPO's recipes send to trackers: klft's metrics under their own names, texts only where they are asked for."""

import pytest
from support import tiny
from support.recipes import RECIPES

LOGS = {"loss": 1.0, "epoch": 2.0, "kl/reverse/mean": 3.0, "reward/score/mean": 4.0, "eval_kl/reverse/mean": 5.0}


@pytest.fixture
def trackers(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import ppo_trackers

    return ppo_trackers


def test_a_log_is_split_into_klfts_metrics_and_the_rest(trackers):
    ours, others = trackers.split(LOGS)
    assert ours == {"kl/reverse/mean": 3.0, "reward/score/mean": 4.0}
    assert ours | others == LOGS


@pytest.mark.parametrize("log_completions", [True, False])
def test_each_metric_is_sent_once_and_texts_if_asked_for(trackers, log_completions, tmp_path, capsys):
    stock, own, tables = {}, {}, []

    class Stock:
        def on_log(self, args, state, control, logs=None, **kwargs):
            stock.setdefault(state.global_step, {}).update(logs)

    class Kept(trackers.Grouped, Stock):
        def send(self, numbers, step):
            own.setdefault(step, {}).update(numbers)

        def send_table(self, rows, step):
            tables.append((step, trackers.cells(rows)))

    run = tiny.trainer(tmp_path, max_steps=2, log_completions=log_completions)
    kept = Kept()
    kept.trainer = run
    log = run.callback_handler.on_log

    def on_log(args, state, control, logs):
        kept.on_log(args, state, control, logs=logs)
        return log(args, state, control, logs)

    run.callback_handler.on_log = on_log
    run.train()
    for step in (1, 2):
        (entry,) = [e for e in run.state.log_history if e["step"] == step and "loss" in e]
        assert own[step].items() <= entry.items()
        assert {"kl/coef", "reward/score/mean", "time/train/seconds", "ppo/ratio/mean"} <= own[step].keys()
        assert "loss" in stock[step]
        assert not any("/" in name for name in stock[1])
    assert [step for step, _ in tables] == ([1, 2] if log_completions else [])
    if log_completions:
        assert len(tables[0][1]) == 4
        assert all(isinstance(row[0], str) for row in tables[0][1])


def test_none_is_replaced_where_none_is_asked_for(trackers, tmp_path):
    run = tiny.trainer(tmp_path)
    before = list(run.callback_handler.callbacks)
    trackers.group_charts(run)
    trackers.send_page(run)
    assert run.callback_handler.callbacks == before


def test_tensorboard(trackers, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    monkeypatch.chdir(tmp_path)
    data = {"eval_dataset": tiny.prompts(8)}
    run = tiny.trainer(tmp_path / "out", report_to=["tensorboard"], max_steps=1, log_completions=True, given=data)
    trackers.group_charts(run)
    run.evaluate()
    run.train()
    files = sorted((tmp_path / "out" / "runs").glob("events*"))
    assert not (tmp_path / "runs").exists()  # where transformers alone puts what is logged before training
    tags = [value.tag for file in files for event in EventFileLoader(str(file)).Load() for value in event.summary.value]
    assert {tag.partition("/")[0] for tag in tags} >= {"kl", "reward", "ppo", "time", "eval", "train"}
    assert {"kl/reverse/mean", "eval/kl/reverse/mean", "train/loss"} <= set(tags)
    assert any(tag.startswith("completions/text_summary") for tag in tags)


def test_trackio_has_one_run_of_training_and_both_evaluations(trackers, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    data = {"eval_dataset": tiny.prompts(8)}
    run = tiny.trainer(tmp_path / "out", report_to=["trackio"], max_steps=1, log_completions=True, given=data)
    trackers.group_charts(run)
    run.evaluate()
    run.train()
    run.evaluate()
    assert run.args.run_name.startswith("out-")  # under which transformers takes it up again
