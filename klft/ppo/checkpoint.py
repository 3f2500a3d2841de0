"""Checkpoints that are either whole or not there.

The Trainer writes into `tmp-checkpoint-N`; then every file is flushed to disk, `_COMPLETE` (a JSON of file sizes,
checksums and the run they belong to) is written last, and the folder is renamed to `checkpoint-N`. Resuming takes the
newest complete one, and says what it skipped. Which is newest is counted, not told by a clock. Only a run's own
checkpoints are ever deleted: those it wrote, or the run that it continues. klft's own state is JSON and safetensors;
no pickle.
"""

import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
import uuid
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from klft.ppo.guards import on_all_ranks
from klft.writing import KL_FILES, atomic_write, check_unused, remove_files, sync_file, sync_folder

if TYPE_CHECKING:
    from klft.ppo.config import PPOConfig

logger = logging.get_logger(__name__)

MARKER = "_COMPLETE"
STATE_FILE = "klft_state.json"
STATE_KEYS = {"run", "step", "controller", "moments", "episodes", "cycle"}
_FOLDER = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"tmp-(replaced-)?checkpoint-\d+")


def checksum(path: Path) -> str:
    """XXH3 of a file's bytes: 2.3 GB per second of one core, reading included; zlib.crc32 does 1.3."""
    digest, buffer = xxhash.xxh3_64(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def commit(folder: Path, final: Path, run: str) -> None:
    """Flush everything under `folder`, write the marker, rename to `final`. `run`: the id of the run it belongs to.

    What is there already goes if it is this run's, which went back and came by here again, and is set aside otherwise.
    """
    sizes, checksums = {}, {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        sizes[name], checksums[name] = path.stat().st_size, checksum(path)
        sync_file(path)
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(inner)
    order = 1 + max((read_marker(p).get("order", 0) for p in checkpoints(final.parent)), default=0)
    marker = {"files": sizes, "checksums": checksums, "run": run, "order": order, "written": time.time()}
    with atomic_write(folder / MARKER) as file:
        file.write(json.dumps(marker, indent=1).encode())
    own = read_marker(final).get("run") == run
    replaced = _moved_away(final, own=own) if final.exists() else None
    os.rename(folder, final)
    if replaced and own:
        shutil.rmtree(replaced, ignore_errors=True)
    sync_folder(final.parent)


def _moved_away(folder: Path, *, own: bool) -> Path:
    names = (f"{folder.name}-replaced-{n}" for n in count(1))
    free = next(p for p in map(folder.with_name, names) if not p.exists())
    new = folder.with_name(f"tmp-replaced-{folder.name}") if own else free
    os.rename(folder, new)
    if not own:
        logger.warning(f"{folder} was in the way, damaged or another run's: it is {new} now")
    return new


def read_marker(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: files, checksums, run, order, written; empty if it was never finished.

    Until klft 0.3 there were sizes only, no checksums, run and order.
    """
    try:
        marker = dict(json.loads((folder / MARKER).read_text()))
        return marker if isinstance(marker["files"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def what_is_wrong(folder: Path, *, content: bool = True) -> str | None:
    """None for a complete checkpoint, else what is missing, cut short or changed, by name. `content`: read all."""
    marker = read_marker(folder)
    if not marker:
        return (
            f"{folder} has no readable {MARKER}: it was never finished" if folder.is_dir() else f"{folder} is not there"
        )
    if not marker["files"]:
        return f"{folder / MARKER} names no file"
    for name, size in marker["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
    for name, written in marker.get("checksums", {}).items() if content else ():
        if checksum(folder / name) != written:
            return f"{folder / name} is not what was written: its checksum differs"
    return None


def _age(folder: Path) -> tuple[float, float, int]:
    """What sorts checkpoints: a counter, whatever clocks said. The unfinished come last: they are skipped by name."""
    marker, number = read_marker(folder), int(folder.name.rpartition("-")[2])
    if not marker:
        return math.inf, 0, number
    return marker.get("order", 0), marker.get("written", 0), number


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders named checkpoint-N, complete or not: last written first, so that a new run's 5 precedes an old 20."""
    return sorted(
        (p for p in output_dir.glob("checkpoint-*") if _FOLDER.fullmatch(p.name) and p.is_dir()), key=_age, reverse=True
    )


def newest_complete(output_dir: Path, *, content: bool = True) -> Path | None:
    """The newest complete checkpoint; what had to be skipped is logged by name. `content`: as for `what_is_wrong`."""
    for folder in checkpoints(output_dir):
        problem = what_is_wrong(folder, content=content)
        if problem is None:
            return folder
        logger.warning(f"skipping an incomplete checkpoint: {problem}")
    return None


def run_id(resumed: Path | None) -> str:
    """The id of the run that a checkpoint belongs to, which its continuation inherits; else a new one."""
    return (read_marker(resumed).get("run") if resumed else None) or uuid.uuid4().hex


def rotate(output_dir: Path, run: str, limit: int | None, best: str | None) -> None:
    """Delete this run's own oldest complete checkpoints beyond `limit`; never the newest, nor the best."""
    complete = [p for p in checkpoints(output_dir) if what_is_wrong(p, content=False) is None]
    own = [p for p in complete if read_marker(p).get("run") == run]
    protected = {p.resolve() for p in own[:1]} | ({Path(best).resolve()} if best else set())
    old = [p for p in reversed(own) if p.resolve() not in protected]
    for folder in old[: max(len(own) - max(limit, len(protected)), 0)] if limit and limit > 0 else ():
        shutil.rmtree(_moved_away(folder, own=True), ignore_errors=True)


def resume_hint(output_dir: Path) -> str:
    """A sentence that names the checkpoint to resume from."""
    good = newest_complete(output_dir, content=False)
    return f"The last good checkpoint is {good}." if good else "There is no checkpoint to go back to."


def write_state(folder: Path, state: dict) -> None:
    """klft's state beside the Trainer's: plain numbers and names."""
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1, allow_nan=False))


def read_state(folder: Path) -> dict:
    """Read it back. Raises ValueError that names the file if it is not there, not JSON, or lacks a key."""
    path = folder / STATE_FILE
    try:
        state = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot resume from {folder}: {path} is unreadable ({error})") from error
    if missing := STATE_KEYS - state.keys():
        raise ValueError(f"cannot resume from {folder}: {path} lacks {', '.join(sorted(missing))}")
    return state


def write_rollout(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    """This process's rollout; not beside the model, where vLLM reads every *.safetensors."""
    (folder / "klft").mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"klft/rollout_{rank}.safetensors")


def read_rollout(folder: Path, rank: int) -> dict[str, Tensor]:
    """Read it back, from where it was until klft 0.2 too."""
    path, before = folder / f"klft/rollout_{rank}.safetensors", folder / f"klft_rollout_{rank}.safetensors"
    return load_file(before if before.exists() else path)


def resolve_checkpoint(
    output_dir: Path, wanted: str | os.PathLike | bool | None, *, content: bool = True
) -> Path | None:
    """The checkpoint to resume from: the folder named, or for True the complete one written last.

    `content`: also compare every file's checksum. Raises ValueError if the named one is damaged (the file is named), or
    for True if there is none.
    """
    if not wanted or str(wanted).lower() == "false":
        return None
    if not isinstance(wanted, bool) and str(wanted).lower() != "true":
        problem = what_is_wrong(Path(wanted), content=content)
        if problem:
            raise ValueError(f"cannot resume: {problem}")
        return _with_optimizer(Path(wanted))
    newest = newest_complete(output_dir, content=content)
    if newest is None:
        raise ValueError(f"cannot resume: there is no complete checkpoint in {output_dir}")
    logger.warning(f"resuming from {newest}")
    return _with_optimizer(newest)


def resolve_on_all_ranks(
    output_dir: Path, wanted: str | os.PathLike | bool | None, accelerator: Accelerator
) -> Path | None:
    """`resolve_checkpoint`, read by the main process and the same on all."""

    def resolve() -> Path | None:
        return resolve_checkpoint(output_dir, wanted) if accelerator.is_main_process else None

    return gather_object([on_all_ranks(accelerator, resolve)])[0]


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

    Raises ValueError for a folder that cannot be written, for a checkpoint to resume from that is not there or damaged
    (by names and sizes; checksums are compared when training starts), and for a folder that holds another run, unless
    that is resumed or `overwrite_output_dir` is set.
    """
    check_writable(args)
    output_dir = Path(args.output_dir or ".")
    resumed = resolve_checkpoint(output_dir, args.resume_from_checkpoint, content=False)
    if not args.overwrite_output_dir:
        _check_unused(output_dir, resumed)


def check_writable(args: "PPOConfig") -> None:
    """Make output_dir, where this process is to save. Raises ValueError where no file can be written there."""
    output_dir = Path(args.output_dir or ".")
    try:
        if args.should_save:
            output_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output_dir) as file:
                file.write(b"klft")
    except OSError as error:
        raise ValueError(
            f"output_dir={str(output_dir)!r} cannot be written: {error}. Name a folder that can, with space left"
        ) from error


def finished_run(args: "PPOConfig") -> str | None:
    """For a run to resume that is at `max_steps` already, a line that says so: a loop that restarts it may end."""
    folder = resolve_checkpoint(Path(args.output_dir or "."), args.resume_from_checkpoint)
    step = read_state(folder)["step"] if folder and args.max_steps > 0 else -1
    return (
        f"{folder} is at step {step} of {args.max_steps}: nothing is left to train"
        if step >= args.max_steps > 0
        else None
    )


def claim(output_dir: Path, resumed: Path | None, accelerator: Accelerator, *, overwrite: bool) -> None:
    """Make output_dir this run's: empty, or resumed, or emptied. Raises ValueError, on all ranks, for another run's."""

    def check() -> None:
        if accelerator.is_main_process and not overwrite:
            _check_unused(output_dir, resumed)
        elif accelerator.is_main_process and not _continues(output_dir, resumed):
            remove_files(output_dir, _run_files(output_dir))

    on_all_ranks(accelerator, check)


def _run_files(output_dir: Path) -> list[str]:
    """What two runs in one folder would mix, as patterns; not a checkpoint-best or checkpoint-1-keep of the user's."""
    return [*sorted(p.name for p in checkpoints(output_dir)), *KL_FILES, "completions/*.parquet"]


def _continues(output_dir: Path, resumed: Path | None) -> bool:
    return resumed is not None and resumed.resolve().parent == output_dir.resolve()


def _check_unused(output_dir: Path, resumed: Path | None) -> None:
    if not _continues(output_dir, resumed):
        way_out = "Continue it with resume_from_checkpoint=True, or replace it with overwrite_output_dir=True"
        check_unused(output_dir, _run_files(output_dir), way_out + ", or name another output_dir.")


@contextmanager
def locked(output_dir: Path, accelerator: Accelerator):
    """Hold output_dir for one run; a second one is refused on all its ranks. The system frees it if this one dies.

    The main process holds it, by flock: from another machine it is seen where the filesystem passes locks on (NFS does;
    Lustre when mounted with -o flock, not with -o localflock).

    Yields a function that raises RuntimeError once somebody has removed the lock, when a second run could take it.
    Removes what runs that were killed while saving have left.
    """
    path = output_dir / ".klft.lock"
    lock, taken = FileLock(path), []

    def take() -> None:
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise RuntimeError(
                    f"another run is writing to {output_dir}; wait for it, or choose another output_dir"
                ) from error
            taken.append(path.stat())
            for left in (p for p in output_dir.glob("tmp-*checkpoint-*") if _LEFTOVER.fullmatch(p.name)):
                shutil.rmtree(left, ignore_errors=True)

    def check() -> None:
        if taken and not (path.exists() and os.path.samestat(path.stat(), taken[0])):
            raise RuntimeError(
                f"{path} was removed or replaced while this run was training, so another run may be writing there too. "
                f"Nothing more is saved. {resume_hint(output_dir)}"
            )

    on_all_ranks(accelerator, take)
    try:
        yield lambda: on_all_ranks(accelerator, check)
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
def own_rotation(args: Any):
    """No rotation by the Trainer inside: it goes by names and clocks, and at the end it deletes the newest checkpoint.

    Yields the limit, for `rotate`.
    """
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield limit
    finally:
        args.save_total_limit = limit


def _check_shared(folder: Path) -> None:
    """Raise RuntimeError where the main process's part of a checkpoint is not seen from here: on another machine."""
    if not (folder / STATE_FILE).exists():
        raise RuntimeError(
            f"from {platform.node()}, where this process runs, the main process's {STATE_FILE} in {folder} is not to "
            "be seen: output_dir must lie on a filesystem that all machines share"
        )


@contextmanager
def writing(trainer: Any, final: Path, run: str, limit: int | None):
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
    on_all_ranks(accelerator, lambda: _check_shared(unfinished / final.name))
    if args.should_save:
        state = trainer.state
        best = final.with_name(f"checkpoint-{state.best_global_step}") if state.best_global_step else None
        if best is not None and (best == final or best.exists()):
            state.best_model_checkpoint = str(best)
            state.save_to_json(str(unfinished / final.name / "trainer_state.json"))
        commit(unfinished / final.name, final, run)
        try:
            unfinished.rmdir()
        except OSError:  # something else was written there
            shutil.rmtree(unfinished)
        rotate(Path(output_dir), run, limit, state.best_model_checkpoint)
    accelerator.wait_for_everyone()
    if push:
        with hub_folder(args):
            trainer.push_in_progress = getattr(trainer, "push_in_progress", None)
            trainer._push_from_checkpoint(str(final))  # what the Trainer's own saving calls; obeys hub_strategy
