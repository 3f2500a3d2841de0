"""A pickle runs code when it is read. None is: not as weights, not as an adapter, not in a checkpoint to resume."""

import contextlib
import json
import os
import pickle
import shutil

import pytest
import torch
from support import tiny
from transformers import AutoModelForCausalLM

from klft.diagnostics.loading import load_models
from klft.loading import load_model
from klft.ppo.checkpoint import MARKER, checksum
from klft.ppo.inputs import load_policy
from klft.ppo.rewards import as_reward_functions


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def old_pickle(folder, size):
    """A payload of that many bytes as torch before 1.6 wrote it, and reads it still, whatever follows it."""
    payload = pickle.dumps(Payload(folder), protocol=2)
    return payload + bytes(size - len(payload))


@pytest.fixture
def ran(tmp_path):
    """The folder that a payload makes; it is not there in the end either."""
    folder, live = tmp_path / "ran", tmp_path / "live.bin"
    for write in (lambda: torch.save({"x": Payload(folder)}, live), lambda: live.write_bytes(old_pickle(folder, 999))):
        write()
        with contextlib.suppress(RuntimeError):  # the second holds nothing else
            torch.load(live, weights_only=False)
        folder.rmdir()  # as a payload, it works
    yield folder
    assert not folder.exists()


# --- weights ---------------------------------------------------------------------------------------------------------


def whole(folder, ran):
    torch.save({"lm_head.weight": Payload(ran)}, folder / "pytorch_model.bin")


def sharded(folder, ran):
    torch.save({"lm_head.weight": Payload(ran)}, folder / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def in_disguise(folder, ran):
    torch.save({"lm_head.weight": Payload(ran)}, folder / "model.safetensors")


ROLES = {
    "policy": (tiny.llama, load_policy),
    "policy compared": (tiny.llama, lambda name: load_models(name, name)),
    "reference": (tiny.llama, lambda name: load_model(name, "reference")),
    "reward model": (tiny.critic, as_reward_functions),
    "value model": (tiny.critic, lambda name: load_model(name, "value model", classifier=True)),
}


@pytest.mark.parametrize("write", [whole, sharded, in_disguise])
@pytest.mark.parametrize("role", ROLES)
def test_a_model_in_a_pickle_is_refused_unread(role, write, ran, tmp_path):
    make, load = ROLES[role]
    folder = tmp_path / "model"
    make().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    write(folder, ran)
    with pytest.raises(ValueError, match=rf"^\w[\w ]* {folder}: .*model\.safetensors") as said:
        load(str(folder))
    assert "\n" not in str(said.value)


def test_not_even_where_safetensors_are_not_asked_for(ran, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    whole(tmp_path / "model", ran)
    with pytest.raises(ValueError, match=r"^model .*weights_only"):
        load_policy(str(tmp_path / "model"), {"use_safetensors": False})


def test_an_adapter_in_a_pickle_is_refused_unread(ran, tmp_path):
    from peft import get_peft_model

    tiny.llama().save_pretrained(tmp_path / "base")
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tiny.lora())
    adapter.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    torch.save({"base_model.model.lm_head.weight": Payload(ran)}, tmp_path / "adapter/adapter_model.bin")
    for load in (load_policy, lambda name: load_model(name, "reference")):
        with pytest.raises(ValueError, match=r"adapter.*adapter_model\.safetensors") as said:
            load(str(tmp_path / "adapter"))
        assert "\n" not in str(said.value)


# --- checkpoints -----------------------------------------------------------------------------------------------------

SAVING = {"save_strategy": "steps", "save_steps": 1.0}
READ = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny.trainer(folder, max_steps=1, **SAVING).train()
    return folder


def poisoned(saved, folder, file, ran):
    """A copy of the run in which a file is a payload of as many bytes; the model's has the name that such a one has."""
    shutil.copytree(saved, folder)
    path = folder / "checkpoint-1" / file
    size = path.stat().st_size
    if file == "model.safetensors":
        path.unlink()
        path = path.with_name("pytorch_model.bin")
    path.write_bytes(old_pickle(ran, size))
    return folder / "checkpoint-1"


def sealed(checkpoint, checksums):
    """As who can write the file can do it: the marker is made anew, with checksums or without, as it was until 0.3."""
    marker = json.loads((checkpoint / MARKER).read_text())
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != MARKER]
    marker["files"] = {p.relative_to(checkpoint).as_posix(): p.stat().st_size for p in files}
    del marker["checksums"]
    if checksums:
        marker["checksums"] = {name: checksum(checkpoint / name) for name in marker["files"]}
    (checkpoint / MARKER).write_text(json.dumps(marker))


@pytest.mark.parametrize("file", [*READ, "training_args.bin"])
def test_a_payload_in_a_checkpoint_is_refused_by_its_checksum(file, saved, ran, tmp_path):
    checkpoint = poisoned(saved, tmp_path / "run", file, ran)
    with pytest.raises(ValueError, match=rf"cannot resume: .*{file} is (missing|not what was written)"):
        tiny.trainer(tmp_path / "run", max_steps=2).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("file", READ)
def test_a_payload_with_a_fitting_checksum_is_not_run(file, checksums, saved, ran, tmp_path):
    checkpoint = poisoned(saved, tmp_path / "run", file, ran)
    sealed(checkpoint, checksums)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        tiny.trainer(tmp_path / "run", max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_the_arguments_in_a_checkpoint_are_not_read(saved, ran, tmp_path):
    checkpoint = poisoned(saved, tmp_path / "run", "training_args.bin", ran)
    sealed(checkpoint, checksums=True)
    run = tiny.trainer(tmp_path / "run", max_steps=2)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 2
