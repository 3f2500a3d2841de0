"""What every test shares: no hub, few threads, the processes-on-CPU switch of accelerate; how tests are run."""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KLFT_TEST_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", os.environ["KLFT_TEST_THREADS"])  # of the processes that tests start, too

import beartype
import pytest
import torch

if os.environ.get("KLFT_TEST_DEVICE") != "cuda":  # trainers' tests on a card: CONTRIBUTING.md
    os.environ["ACCELERATE_USE_CPU"] = "true"
pytest.register_assert_rewrite("support")
from support.typechecks import any_text_for_names  # noqa: E402 - rewritten from here on

beartype.beartype = any_text_for_names(beartype.beartype)  # which jaxtyping looks up when klft is imported
torch.set_num_threads(int(os.environ["KLFT_TEST_THREADS"]))


def pytest_addoption(parser, pluginmanager):
    if not pluginmanager.hasplugin("xdist"):  # -p no:xdist: nobody else would know the options in pyproject.toml
        parser.addoption("--numprocesses")
        parser.addoption("--dist")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One process per core that this one may use, eight at most, as each takes a gigabyte; a single file is run here,
    since it takes a second process longer to start than most files take."""
    named = config.option.file_or_dir
    if len(named) == 1 and named[0].split("::")[0].endswith(".py"):
        return 0
    usable = getattr(os, "sched_getaffinity", None)
    return min(len(usable(0)) if usable else os.cpu_count() or 1, 8)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected is no garbage. Not to look through it meanwhile saves seconds, and not to do so in
    each `train()` halves the time of a test that trains."""
    gc.disable()
    found = yield
    gc.freeze()
    gc.enable()
    return found


@pytest.fixture
def on_the_card(monkeypatch):
    """For trainers on a GPU: the other tests are held to the CPU, and accelerate remembers it."""
    from accelerate.state import AcceleratorState

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def klft_command(monkeypatch, capsys, caplog):
    """klft_command("diff", ...) -> (exit code, stdout, stderr), in this process."""
    import datasets
    import transformers

    from klft.cli import main

    before = transformers.logging.get_verbosity()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["klft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told, warned = capsys.readouterr(), "".join(f"{record.getMessage()}\n" for record in caplog.records)
        caplog.clear()
        return ended.value.code or 0, told.out, warned + told.err

    yield run
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()
