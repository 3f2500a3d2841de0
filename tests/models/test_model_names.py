"""A model's name that leads nowhere: what is said, and that nothing heavy is imported and no hub asked to say it."""

import json
import subprocess
import sys
import time

import pytest
from support import tiny
from support.processes import environment

from klft.diagnostics.loading import load_models
from klft.hub import check_model_name
from klft.loading import load_model, load_tokenizer


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to stand in: a model in `policy`, checkpoints in `run`, and a file."""
    monkeypatch.chdir(tmp_path)
    for folder in ("policy", "run/checkpoint-20", "run/checkpoint-100"):
        tiny.llama().save_pretrained(folder)
        time.sleep(0.01)  # the newest is the last
    (tmp_path / "texts.txt").write_text("w1\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


def cached(name, folder):
    """A hub's cache that holds something of a model."""
    (folder / f"models--{name.replace('/', '--')}").mkdir(parents=True)
    return str(folder)


NOWHERE = [
    ("./polcy", "there is no such folder. Did you mean 'policy'?"),
    ("{here}/polcy", "there is no such folder. Did you mean '{here}/policy'?"),
    ("run/checkpoint-10/", "there is no such folder. Did you mean 'run/checkpoint-100'?"),
    ("../nothing/like/it", "there is no such folder"),
    ("~/policy", "there is no such folder"),
    ("a/b/c", "there is no such folder"),
    ("polcy", "there is no such folder, and HF_HUB_OFFLINE is set, so the hub is not asked: it is not in its cache, "),
    ("my/policy", "there is no such folder, and HF_HUB_OFFLINE is set, so the hub is not asked: "),
    ("texts.txt", "it is a file; name the folder of a model"),
    ("run", "the folder holds no model (no config.json and no adapter_config.json). "
            "Did you mean 'run/checkpoint-100'?"),
    ("x" * 5000, "there is no such folder, and HF_HUB_OFFLINE is set"),
    ("nul\0nul", "there is no such folder, and HF_HUB_OFFLINE is set"),
    ("empty", "the folder holds no model (no config.json and no adapter_config.json)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "said"), NOWHERE)
def test_a_name_that_leads_nowhere_is_explained(name, said, here):
    name, said = name.format(here=here), said.format(here=here)
    for load in (check_model_name, load_model):
        with pytest.raises(ValueError, match=r"^model ") as error:
            load(name, "model")
        assert str(error.value).startswith(f"model {name}: {said}")
        assert "Repo id" not in str(error.value)
        assert "connect" not in str(error.value)
    with pytest.raises(ValueError, match=r"^reference "):
        load_models("policy", name)  # before the policy's tokenizer, which is not there either


def test_a_similar_folder_is_named_for_a_name_that_could_be_the_hubs(here):
    with pytest.raises(ValueError, match=r"it is not in its cache, .*\. Did you mean 'policy'\?$"):
        load_model("polcy")


def test_names_that_lead_somewhere_pass(here, monkeypatch):
    check_model_name("policy", "model")
    check_model_name(here / "run/checkpoint-20", "model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cached("my/policy", here / "cache"))
    check_model_name("my/policy", "model")  # what is missing of it, its loader says
    with pytest.raises(ValueError, match=r"^model my/policy: there is no such folder, and HF_HUB_OFFLINE is set"):
        load_model("my/policy")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    check_model_name("your/policy", "model")  # the hub knows


def test_a_tokenizer_alone_needs_no_model_beside_it(here):
    tiny.tokenizer().save_pretrained("empty")
    assert len(load_tokenizer("empty")) == len(tiny.tokenizer())


def test_the_base_of_an_adapter_is_named_as_such(here):
    config = {"peft_type": "LORA", "base_model_name_or_path": "./polcy", "task_type": "CAUSAL_LM", "r": 2}
    (here / "empty/adapter_config.json").write_text(json.dumps(config))
    said = r"^model empty: its base model \./polcy: there is no such folder\. Did you mean 'policy'\?$"
    with pytest.raises(ValueError, match=said):
        load_model("empty")


def test_nothing_heavy_is_imported_to_say_so(here):
    code = "import sys, klft.hub\nprint([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == "[]"
