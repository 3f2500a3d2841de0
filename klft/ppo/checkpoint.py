"""Checkpoints that are either whole or not there.

The Trainer writes into `tmp-checkpoint-N`; then every file is flushed to disk, `_COMPLETE` (a JSON of file sizes) is
written last, and the folder is renamed to `checkpoint-N`. Resuming takes the newest complete one, and says what it
skipped. klft's own state is JSON and safetensors; no pickle.
"""

import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from klft.ppo.guards import on_all_ranks
from klft.writing import KL_FILES, atomic_write, check_unused, remove_files, sync_file, sync_folder

if TYPE_CHECKING:
    from klft.ppo.config import PPOConfig

logger = logging.get_logger(__name__)

MARKER = "_COMPLETE"
STATE_FILE = "klft_state.json"
RUN_FILES = ("checkpoint-[0-9]*", *KL_FILES, "completions/*.parquet")  # what two runs in one folder would mix
_FOLDER = re.compile(r"checkpoint-(\d+)")


def commit(folder: Path, final: Path) -> None:
    """Flush everything under `folder`, write the marker, rename to `final`."""
    sizes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync_file(path)
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(inner)
    with atomic_write(folder / MARKER) as file:
        file.write(json.dumps({"files": sizes, "written": time.time()}, indent=1).encode())
    replaced = final.with_name(f"tmp-replaced-{final.name}")
    if final.exists():  # a run that went back and came by here again
        os.rename(final, replaced)
    os.rename(folder, final)
    shutil.rmtree(replaced, ignore_errors=True)
    sync_folder(final.parent)


def what_is_wrong(folder: Path) -> str | None:
    """None for a complete checkpoint, else what is missing or cut short, by name."""
    try:
        sizes = dict(json.loads((folder / MARKER).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return (
            f"{folder} has no readable {MARKER}: it was never finished" if folder.is_dir() else f"{folder} is not there"
        )
    if not sizes:
        return f"{folder / MARKER} names no file"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
    return None


def _written(folder: Path) -> float:
    try:
        return float(json.loads((folder / MARKER).read_text())["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.stat().st_mtime  # unfinished: it is skipped, but by name, so it must come in its turn


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders named checkpoint-N, complete or not: last written first, so that a new run's 5 precedes an old 20."""
    numbered = [
        (int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := _FOLDER.fullmatch(p.name)) and p.is_dir()
    ]
    return [path for _, path in sorted(numbered, key=lambda f: (_written(f[1]), f[0]), reverse=True)]


def newest_complete(output_dir: Path) -> Path | None:
    """The newest complete checkpoint; what had to be skipped is logged by name."""
    for folder in checkpoints(output_dir):
        problem = what_is_wrong(folder)
        if problem is None:
            return folder
        logger.warning(f"skipping an incomplete checkpoint: {problem}")
    return None


def resume_hint(output_dir: Path) -> str:
    """A sentence that names the checkpoint to resume from."""
    good = newest_complete(output_dir)
    return f"The last good checkpoint is {good}." if good else "There is no checkpoint to go back to."


def write_state(folder: Path, state: dict) -> None:
    """klft's state beside the Trainer's: plain numbers and names."""
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1, allow_nan=False))


def read_state(folder: Path) -> dict:
    """Read it back. Raises ValueError that names the file if it is not there or not JSON."""
    path = folder / STATE_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot resume from {folder}: {path} is unreadable ({error})") from error


def write_rollout(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    """This process's rollout; not beside the model, where vLLM reads every *.safetensors."""
    (folder / "klft").mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"klft/rollout_{rank}.safetensors")


def read_rollout(folder: Path, rank: int) -> dict[str, Tensor]:
    """Read it back, from where it was until klft 0.2 too."""
    path, before = folder / f"klft/rollout_{rank}.safetensors", folder / f"klft_rollout_{rank}.safetensors"
    return load_file(before if before.exists() else path)


def differences(saved: dict, current: dict) -> list[str]:
    """Changes between two flat dictionaries, as `name: saved -> current`."""
    return [f"{k}: {saved.get(k)!r} -> {v!r}" for k, v in current.items() if saved.get(k) != v]


def resolve_checkpoint(output_dir: Path, wanted: str | os.PathLike | bool | None) -> Path | None:
    """The checkpoint to resume from: the folder named, or for True the complete one written last.

    Raises ValueError if the named one is damaged (the file is named), or for True if there is none.
    """
    if not wanted or str(wanted).lower() == "false":
        return None
    if not isinstance(wanted, bool) and str(wanted).lower() != "true":
        problem = what_is_wrong(Path(wanted))
        if problem:
            raise ValueError(f"cannot resume: {problem}")
        return _with_optimizer(Path(wanted))
    newest = newest_complete(output_dir)
    if newest is None:
        raise ValueError(f"cannot resume: there is no complete checkpoint in {output_dir}")
    logger.warning(f"resuming from {newest}")
    return _with_optimizer(newest)


def _with_optimizer(folder: Path) -> Path:
    """The folder. ValueError for one of save_only_model=True: its continuation would be another run."""
    if not [*folder.glob("optimizer*"), *folder.glob("global_step*"), *folder.glob("pytorch_model_fsdp*")]:
        raise ValueError(
            f"cannot resume: {folder} holds the model only (save_only_model=True), no optimizer and no random state. "
            "Start a new run from it: PPOTrainer(model=that folder)"
        )
    return folder


def check_output_dir(args: "PPOConfig") -> None:
    """What `PPOTrainer.train` would refuse about `args.output_dir`, in time: before a model is loaded.

    Raises ValueError for a checkpoint to resume from that is not there or damaged, and for a folder that holds another
    run, unless that is resumed or `overwrite_output_dir` is set.
    """
    output_dir = Path(args.output_dir or ".")
    resumed = resolve_checkpoint(output_dir, args.resume_from_checkpoint)
    if not args.overwrite_output_dir:
        _check_unused(output_dir, resumed)


def claim(output_dir: Path, resumed: Path | None, accelerator: Accelerator, *, overwrite: bool) -> None:
    """Make output_dir this run's: empty, or resumed, or emptied. Raises ValueError, on all ranks, for another run's."""

    def check() -> None:
        if accelerator.is_main_process and not overwrite:
            _check_unused(output_dir, resumed)
        elif accelerator.is_main_process and not _continues(output_dir, resumed):
            remove_files(output_dir, RUN_FILES)

    on_all_ranks(accelerator, check)


def _continues(output_dir: Path, resumed: Path | None) -> bool:
    return resumed is not None and resumed.resolve().parent == output_dir.resolve()


def _check_unused(output_dir: Path, resumed: Path | None) -> None:
    if not _continues(output_dir, resumed):
        way_out = "Continue it with resume_from_checkpoint=True, or replace it with overwrite_output_dir=True"
        check_unused(output_dir, RUN_FILES, way_out + ", or name another output_dir.")


@contextmanager
def locked(output_dir: Path, accelerator: Accelerator):
    """Hold output_dir for one run; a second one is refused on all its ranks. The system frees it if this one dies."""
    lock = FileLock(output_dir / ".klft.lock")

    def take() -> None:
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise RuntimeError(
                    f"another run is writing to {output_dir}; wait for it, or choose another output_dir"
                ) from error

    on_all_ranks(accelerator, take)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def hub_folder(args: Any):
    """What the Trainer uploads inside lies in output_dir/hub: output_dir itself holds prompts and completions."""
    output_dir = args.output_dir
    args.output_dir = str(Path(output_dir) / "hub")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        args.output_dir = output_dir


@contextmanager
def writing(trainer: Any, final: Path):
    """The Trainer's own saving, pointed at a temporary folder inside; sealed, rotated and pushed on the way out."""
    args, accelerator = trainer.args, trainer.accelerator
    output_dir, push = args.output_dir, args.push_to_hub
    unfinished = final.with_name(f"tmp-{final.name}")
    if args.should_save:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    args.output_dir, args.push_to_hub = str(unfinished), False  # a push would upload what is not finished yet
    try:
        yield unfinished / final.name
    finally:
        args.output_dir, args.push_to_hub = output_dir, push
    accelerator.wait_for_everyone()
    if args.should_save:
        state = trainer.state
        best = final.with_name(f"checkpoint-{state.best_global_step}") if state.best_global_step else None
        if best is not None and (best == final or best.exists()):
            state.best_model_checkpoint = str(best)
            state.save_to_json(str(unfinished / final.name / "trainer_state.json"))
        commit(unfinished / final.name, final)
        try:
            unfinished.rmdir()
        except OSError:  # something else was written there
            shutil.rmtree(unfinished)
        rotate_checkpoints(output_dir, args.save_total_limit, state.best_model_checkpoint, use_mtime=True)
    accelerator.wait_for_everyone()
    if push:
        with hub_folder(args):
            trainer.push_in_progress = getattr(trainer, "push_in_progress", None)
            trainer._push_from_checkpoint(str(final))  # what the Trainer's own saving calls; obeys hub_strategy
