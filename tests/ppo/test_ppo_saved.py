"""What PPO saves is the policy alone, as others load it; the value function lies in a file of its own."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import tiny
from transformers import AutoModelForCausalLM

from klft.diagnostics import TokenKLCallback
from klft.ppo.checkpoint import MARKER, commit
from klft.ppo.value import VALUE_FILE, value_parameters

KINDS = ["head", "value model", "adapter", "adapter and value model", "peft model"]


def start(folder, kind, max_steps=2, **changed):
    """A run that checkpoints its third step, within a rollout's epochs."""
    model, given = tiny.llama(), changed.pop("given", {})
    if kind.startswith("adapter"):
        given["peft_config"] = tiny.lora()
    if kind.endswith("value model"):
        given["value_model"] = tiny.critic()
    if kind == "peft model":
        from peft import get_peft_model

        torch.manual_seed(3)
        model = get_peft_model(model, tiny.lora())
    saving = {"save_strategy": "steps", "save_steps": 3.0}
    return tiny.trainer(folder, model, given=given, max_steps=max_steps, num_ppo_epochs=2, **saving | changed)


def keys(path):
    with safe_open(path, "pt") as file:
        return sorted(file.keys())


def of_values(names):
    return [name for name in names if "v_head" in name or "value_model" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_is_saved_alone_and_its_value_function_beside_it(kind, tmp_path):
    run = start(tmp_path / "run", kind, 3)
    run.train()
    run.save_model(str(tmp_path / "final"))
    peft = hasattr(run.model, "peft_config")
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-3"):
        weights = "adapter_model.safetensors" if peft else "model.safetensors"
        # vLLM reads every *.safetensors of the folder itself.
        assert [p.name for p in folder.glob("*.safetensors")] == [weights]
        names = keys(folder / weights)
        assert names
        assert all("lora_" in name for name in names) if peft else not of_values(names)
        if peft:
            assert not json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
        saved = load_file(folder / VALUE_FILE)
        assert not tiny.unequal(saved, value_parameters(run.model))
        assert any(t.abs().sum() > 0 for t in saved.values())
    assert not of_values(run.model.state_dict())


@pytest.mark.parametrize("kind", ["adapter", "adapter and value model", "peft model"])
def test_a_merged_adapter_is_saved_without_the_value_function(kind, tmp_path):
    run = start(tmp_path / "run", kind)
    run.train()
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        logits = run.model.eval()(ids).logits
    run.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert not of_values(keys(tmp_path / "merged" / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_modules_to_save_of_the_user_stay(tmp_path):
    config = tiny.lora()
    config.modules_to_save = ["lm_head"]
    run = start(tmp_path, "head", given={"peft_config": config})
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert json.loads((tmp_path / "final" / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    others = [n for n in keys(tmp_path / "final" / "adapter_model.safetensors") if "lora_" not in n]
    assert others == ["base_model.model.lm_head.weight"]


def test_loading_says_nothing_of_a_value_function(tmp_path, caplog):
    run = start(tmp_path, "head", 3)
    run.train()
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", output_loading_info=True)
    info = loaded[1]
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    start(tmp_path, "head", 4).train(resume_from_checkpoint=True)
    assert not [r.getMessage() for r in caplog.records if "missing keys" in r.getMessage()]


def opened(folder):
    """A checkpoint, moved and without its marker: to be changed and committed anew."""
    (folder / MARKER).unlink()
    return folder.rename(folder.with_name("opened"))


def as_klft_0_1_wrote_it(folder, kind):
    """The same checkpoint with the value function and the rollout where they were."""
    final, folder = folder, opened(folder)
    values = load_file(folder / VALUE_FILE)
    shutil.move(folder / "klft" / "rollout_0.safetensors", folder / "klft_rollout_0.safetensors")
    shutil.rmtree(folder / "klft")
    if kind in ("peft model", "adapter and value model"):
        save_file(values, folder / "value_function.safetensors")
    else:
        weights = folder / ("adapter_model.safetensors" if kind == "adapter" else "model.safetensors")
        prefix = {"head": "v_head.", "value model": "value_model.", "adapter": "base_model.model.v_head."}[kind]
        save_file(load_file(weights) | {prefix + n: t for n, t in values.items()}, weights, metadata={"format": "pt"})
    if kind == "adapter":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["v_head"]}))
    commit(folder, final, "the same")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_klft_0_1_resumes_to_the_same_run(kind, tmp_path):
    whole = start(tmp_path / "whole", kind, 5)
    whole.train()
    start(tmp_path / "cut", kind, 3).train()
    as_klft_0_1_wrote_it(tmp_path / "cut" / "checkpoint-3", kind)
    rest = start(tmp_path / "cut", kind, 5)
    rest.train(resume_from_checkpoint=True)
    assert not tiny.unequal(tiny.parameters(whole.model), tiny.parameters(rest.model))
    assert tiny.step_logs(whole) == tiny.step_logs(rest)


def test_a_checkpoint_without_a_value_function_is_refused(tmp_path):
    start(tmp_path, "head", 3).train()
    folder = opened(tmp_path / "checkpoint-3")
    (folder / VALUE_FILE).unlink()
    commit(folder, tmp_path / "checkpoint-3", "the same")
    with pytest.raises(ValueError, match="checkpoint-3 holds no value function"):
        start(tmp_path, "head", 5).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["adapter", "peft model"])
def test_the_callback_takes_the_base_model_of_an_adapter_with_a_value_head(kind, tmp_path):
    probes = TokenKLCallback(None, ["w1 w2"], every=1, max_new_tokens=4, output_dir=str(tmp_path / "probes"))
    start(tmp_path / "run", kind, 1, given={"callbacks": [probes]}).train()
    assert list((tmp_path / "probes" / "kl").glob("*.parquet"))
