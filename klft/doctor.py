"""`klft doctor`: this machine, and a policy with its reference, checked before they are trained. See klft.checks."""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from klft.checks import Check, Setup, run_checks
from klft.writing import visible

PING_SECONDS = 60
FREE_GIGABYTES = 2  # a checkpoint of a small model with its optimizer


def environment() -> Iterator[Check]:
    """Python, packages, device, disk, two processes that meet."""
    yield _python()
    yield _packages()
    yield _device()
    yield _disk(Path.cwd())
    yield _two_processes()


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Check("python", "ok" if good else "problem", found if good else f"{found}: klft needs 3.11 or newer")


def _packages() -> Check:
    """Every package klft needs, at least as new as it asks for."""
    from packaging.requirements import Requirement

    wanted = [Requirement(each) for each in requires("klft") or ()]
    found, wrong = [], []
    for each in wanted:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(each.name)
        except PackageNotFoundError:
            wrong.append(f"{each.name} is missing")
            continue
        found.append(f"{each.name} {installed}")
        if not each.specifier.contains(installed, prereleases=True):
            wrong.append(f"{each.name} {installed} is not {each.specifier}")
    if wrong:
        return Check("packages", "problem", f"{'; '.join(wrong)}: pip install -U klft brings what it needs")
    return Check("packages", "ok", ", ".join(found))


def _device() -> Check:
    import torch

    if not torch.accelerator.is_available():
        return Check("device", "ok", f"CPU, {torch.get_num_threads()} threads; no GPU that torch can use")
    if not torch.cuda.is_available():
        return Check("device", "ok", str(torch.accelerator.current_accelerator()))
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        import triton  # noqa: F401 - klft's kernels need it
    except ImportError:
        return Check(
            "device", "note", f"{', '.join(names)}, without triton: klft's kernels are torch's, which is slower"
        )
    return Check("device", "ok", f"{', '.join(names)}, CUDA {torch.version.cuda}")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free / 1e9
    if free < FREE_GIGABYTES:
        return Check("disk", "problem", f"{free:.1f} GB are free in {folder}: a checkpoint would not fit; make room")
    return Check("disk", "ok", f"{free:.0f} GB are free in {folder}")


def _two_processes() -> Check:
    """Two processes that add up a number, as a launched training would."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        meeting: Any = mp.spawn(_ping, (folder,), nprocs=2, join=False)  # pyright: ignore[reportPrivateImportUsage]
        until = time.monotonic() + PING_SECONDS
        try:
            while not meeting.join(timeout=max(0.1, until - time.monotonic())):
                if time.monotonic() >= until:
                    raise TimeoutError(f"no answer after {PING_SECONDS} s")
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
            return Check("processes", "problem", f"two processes could not meet ({reason}): launched runs would hang")
        finally:
            for process in meeting.processes:
                if process.is_alive():
                    process.kill()
    return Check("processes", "ok", "two of them met, and added up a number")


def _ping(rank: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    number = torch.ones(1)
    dist.all_reduce(number)
    if number.item() != 2:
        raise RuntimeError(f"1 + 1 was {number.item()}")
    dist.barrier()
    dist.destroy_process_group()


def models(
    model: str, reference: str | None, *, dtype: str, device: str | None, trust_remote_code: bool, adapter: bool
) -> list[Check]:
    """The checks of klft.checks on models as `klft diff` loads them; without REF, of MODEL against itself."""
    from klft.diagnostics.loading import load_models, quiet

    quiet()
    other = None if adapter else reference or model
    policy, resolved, tokenizer = load_models(
        model, other, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    if adapter:
        _train_adapter(policy)
    return run_checks(Setup(policy, resolved, tokenizer, starts_equal=True if other == model else None))


def _train_adapter(policy: Any) -> None:
    """Ask for the gradient of the adapter's weights, as a training would."""
    marks = [getattr(policy.base_model, "prefix", ""), "prompt_encoder", "modules_to_save"]
    for name, p in policy.named_parameters():
        if any(mark and mark in name for mark in marks) and p.is_floating_point():
            p.requires_grad_(True)


def render(checks: list[Check]) -> str:
    """A line per check, then what to do."""
    width = max(len(check.name) for check in checks)
    lines = [f"{check.status:8} {check.name:{width}}  {visible(check.text)}" for check in checks]
    wrong = sum(check.status == "problem" for check in checks)
    return "\n".join([*lines, f"{len(checks)} checks, {wrong or 'no'} problem{'s' if wrong > 1 else ''}"])
