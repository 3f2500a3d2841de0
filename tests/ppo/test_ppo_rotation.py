"""What a run deletes: its own old checkpoints, and what it left when it was killed; nothing else."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from support import tiny

from klft.ppo.checkpoint import MARKER, checkpoints, checksum, newest_complete, read_marker, what_is_wrong

SAVING = {"save_strategy": "steps", "save_steps": 1.0}


def start(folder, steps, **changed):
    return tiny.trainer(folder, **SAVING, max_steps=steps, **changed)


def names(folder):
    return sorted(p.name for p in folder.glob("*checkpoint*"))


@pytest.mark.parametrize("limit", [2, None])
def test_a_clock_that_was_ahead_deletes_and_hides_nothing(limit, tmp_path):
    start(tmp_path, 2).train()
    for folder in checkpoints(tmp_path):
        marker = read_marker(folder)
        (folder / MARKER).write_text(json.dumps(marker | {"written": marker["written"] + 60}))
        os.utime(folder, (time.time() + 60,) * 2)
    start(tmp_path, 4, save_total_limit=limit).train(resume_from_checkpoint=True)
    assert newest_complete(tmp_path).name == "checkpoint-4"
    assert names(tmp_path) == [f"checkpoint-{n}" for n in ((3, 4) if limit else (1, 2, 3, 4))]


def test_a_run_that_went_back_keeps_what_it_writes(tmp_path):
    start(tmp_path, 4).train()
    start(tmp_path, 2, save_total_limit=2).train(tmp_path / "checkpoint-1")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_others_checkpoints_stay(tmp_path):
    """The user's copies, another run's, one that is damaged, and one of a klft that named no run."""
    start(tmp_path / "other", 1).train()
    run = tmp_path / "run"
    start(run, 1).train()
    (run / "checkpoint-best").mkdir()
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-1-keep")
    shutil.copytree(tmp_path / "other" / "checkpoint-1", run / "checkpoint-3")
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-77")
    (run / "checkpoint-77" / MARKER).write_text(json.dumps({"files": read_marker(run / "checkpoint-1")["files"]}))
    theirs = (run / "checkpoint-3" / MARKER).read_bytes()
    start(run, 4, save_total_limit=1).train(run / "checkpoint-1")
    assert names(run) == [
        "checkpoint-1-keep", "checkpoint-3-replaced-1", "checkpoint-4", "checkpoint-77", "checkpoint-best",
    ]  # fmt: skip
    assert (run / "checkpoint-3-replaced-1" / MARKER).read_bytes() == theirs
    start(run, 1, overwrite_output_dir=True).train()
    assert names(run) == ["checkpoint-1", "checkpoint-1-keep", "checkpoint-3-replaced-1", "checkpoint-best"]


def test_a_continuation_is_of_the_same_run(tmp_path):
    start(tmp_path / "a", 1).train()
    start(tmp_path / "a", 2).train(resume_from_checkpoint=True)
    start(tmp_path / "b", 1).train()
    one, two, other = (read_marker(tmp_path / p) for p in ("a/checkpoint-1", "a/checkpoint-2", "b/checkpoint-1"))
    assert one["run"] == two["run"] != other["run"]
    assert (one["order"], two["order"]) == (1, 2)


def test_what_a_kill_left_goes_once_the_lock_is_held(tmp_path):
    start(tmp_path, 1).train()
    left = [tmp_path / "tmp-checkpoint-2", tmp_path / "tmp-replaced-checkpoint-1"]
    mine = [tmp_path / "tmp-checkpoint-notes", tmp_path / "tmp-else"]
    for folder in left + mine:
        (folder / "inner").mkdir(parents=True)
    start(tmp_path, 2).train(resume_from_checkpoint=True)
    assert not any(folder.exists() for folder in left)
    assert all(folder.exists() for folder in mine)


def test_a_lock_that_was_removed_is_noticed_before_anything_is_saved(tmp_path):
    class Removes(tiny.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                (tmp_path / ".klft.lock").unlink()

    with pytest.raises(RuntimeError, match=r"klft\.lock was removed .* another run .*checkpoint-1"):
        start(tmp_path, 3, given={"callbacks": [Removes()]}).train()
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_flipped_bit_is_found_by_name(tmp_path):
    start(tmp_path, 2).train()
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert what_is_wrong(path.parent, content=False) is None
    assert str(path) in what_is_wrong(path.parent)
    run = start(tmp_path, 3)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was written"):
        start(tmp_path, 4).train(path.parent)


def test_a_state_that_lacks_a_key_is_refused_by_it(tmp_path):
    start(tmp_path, 1).train()
    folder = tmp_path / "checkpoint-1"
    state = json.loads((folder / "klft_state.json").read_text())
    del state["moments"]
    (folder / "klft_state.json").write_text(json.dumps(state))
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    (folder / MARKER).write_text(json.dumps({"files": {k: v for k, v in sizes.items() if k != MARKER}}))
    with pytest.raises(ValueError, match=r"klft_state\.json lacks moments"):
        start(tmp_path, 2).train(resume_from_checkpoint=True)


def test_a_checksum_is_of_every_byte_and_fast(tmp_path):
    path = Path(tmp_path / "big")
    path.write_bytes(bytes(1 << 26))
    began = time.perf_counter()
    whole = checksum(path)
    assert (1 << 26) / (time.perf_counter() - began) > 1e8, "bytes per second: 1e9 and more where the core is free"
    with path.open("r+b") as file:
        file.seek((1 << 26) - 1)
        file.write(b"1")
    assert checksum(path) != whole


def test_an_output_dir_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*file/run' cannot be written"):
        start(tmp_path / "file" / "run", 1, given={"model": str(tmp_path / "nowhere")})
