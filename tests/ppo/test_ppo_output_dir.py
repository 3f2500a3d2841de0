"""A used output_dir: a second run there is refused in one line, unless it resumes the first one or replaces it."""

import sys
from pathlib import Path

import pytest
from support import tiny
from support.processes import launch, leave
from support.recipes import error_of

from klft.ppo import check_output_dir
from klft.ppo.checkpoint import checkpoints

SAVING = {"save_strategy": "steps", "save_steps": 1.0, "max_steps": 2}


def start(folder, **changed):
    return tiny.trainer(folder, **changed)


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")


KEPT = {
    "checkpoints": (SAVING, "checkpoint-1, checkpoint-2"),
    "tables": ({"kl_log_tokens": 1}, "kl/tokens_000001-r0.parquet, kl/report.html"),
    "completions": ({"log_completions": True}, "completions/completions_00001.parquet"),
}


@pytest.mark.parametrize(("settings", "named"), KEPT.values(), ids=KEPT.keys())
def test_a_second_run_is_refused_and_changes_nothing(settings, named, tmp_path):
    settings = {"max_steps": 1} | settings
    start(tmp_path, **settings).train()
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    second = start(tmp_path, **settings, seed=1)
    with pytest.raises(ValueError, match="holds another run") as caught:
        second.train()
    for said in (str(tmp_path), named, "resume_from_checkpoint=True", "overwrite_output_dir=True"):
        assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    with pytest.raises(ValueError, match="holds another run"):
        check_output_dir(tiny.config(tmp_path))


def test_overwriting_leaves_nothing_of_the_first_run_and_nothing_else_is_touched(tmp_path):
    settings = SAVING | {"kl_log_tokens": 1, "log_completions": True}
    start(tmp_path, **settings | {"max_steps": 3}).train()
    mine = [tmp_path / "notes.txt", tmp_path / "checkpoint-best" / "mine.txt", tmp_path / "kl" / "mine.csv"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    settings = settings | {"max_steps": 2, "overwrite_output_dir": True}
    check_output_dir(tiny.config(tmp_path, **settings))
    assert len(checkpoints(tmp_path)) == 3, "looking removes nothing"
    start(tmp_path, **settings).train()
    alone = tmp_path.parent / f"{tmp_path.name}-alone"
    start(alone, **settings).train()
    assert set(files(tmp_path)) - set(files(alone)) == {p.relative_to(tmp_path).as_posix() for p in mine}
    assert not set(files(alone)) - set(files(tmp_path))


def test_a_resumed_run_is_the_same_run_whether_it_may_overwrite_or_not(tmp_path):
    settings = SAVING | {"kl_log_tokens": 1}
    start(tmp_path, **settings).train()
    for steps, overwrite in ((3, False), (4, True)):
        changed = {"max_steps": steps, "overwrite_output_dir": overwrite}
        check_output_dir(tiny.config(tmp_path, **settings | changed, resume_from_checkpoint="true"))
        start(tmp_path, **settings | changed).train(resume_from_checkpoint=True)
    assert [p.name for p in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (4, 3, 2, 1)]
    assert len(list((tmp_path / "kl").glob("*.parquet"))) == 4


def test_a_checkpoint_from_elsewhere_makes_no_second_run_of_a_used_folder(tmp_path):
    start(tmp_path / "first", **SAVING).train()
    start(tmp_path / "second", **SAVING).train()
    with pytest.raises(ValueError, match="second holds another run"):
        start(tmp_path / "second", **SAVING | {"max_steps": 3}).train(tmp_path / "first" / "checkpoint-2")
    start(tmp_path / "third", **SAVING | {"max_steps": 3}).train(tmp_path / "first" / "checkpoint-2")


def test_a_trainer_trains_twice_in_its_own_folder(tmp_path):
    run = start(tmp_path, **SAVING, kl_log_tokens=1)
    run.train()
    run.train()


def test_a_folder_with_a_model_and_other_files_is_free(tmp_path):
    run = start(tmp_path, max_steps=1)
    run.save_model(str(tmp_path))
    (tmp_path / "kl").mkdir()
    (tmp_path / "tmp-checkpoint-1").mkdir()  # of a run that was killed while saving
    run.train()


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_recipe_refuses_before_it_loads_a_model(overwrite, tmp_path, monkeypatch, capsys):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 64)
    given = [
        "--processes", "1", "--output_dir", str(tmp_path / "out"), "--overwrite_output_dir", str(overwrite).lower(),
        "--model_name_or_path", str(tmp_path / "nowhere"), "--reward", "os:getcwd",
        "--dataset_name", str(tmp_path / "prompts.jsonl"),
    ]  # fmt: skip
    line = error_of("ppo_reviews", given, monkeypatch, capsys)
    assert ("nowhere" if overwrite else "holds another run: checkpoint-3. Continue it with") in line
    assert (tmp_path / "out" / "checkpoint-3").exists(), "not before training starts"


@pytest.mark.slow
def test_two_processes_refuse_and_overwrite_together(tmp_path):
    start(tmp_path, **SAVING | {"max_steps": 5}).train()
    done = launch(__file__, tmp_path, timeout=300)
    assert done.stdout.count("refused") == 2, done.stdout + done.stderr
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"], done.stderr


if __name__ == "__main__":
    import conftest  # noqa: F401 - no hub, few threads

    try:
        start(Path(sys.argv[1]), **SAVING).train()
    except (ValueError, RuntimeError) as error:
        print("refused" if "holds another run" in str(error) else error, flush=True)
    start(Path(sys.argv[1]), **SAVING, overwrite_output_dir=True).train()
    leave()
