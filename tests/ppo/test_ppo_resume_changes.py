"""A resumed run that is another one is refused by all that differs; what is named in resume_changes may differ."""

import json
import re
import shutil

import pytest
import torch
from support import tiny

SAVING = {"save_strategy": "steps", "save_steps": 1.0, "max_steps": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints 1 and 2; the same with an adapter."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.trainer(folder / "full", **SAVING).train()
    tiny.trainer(folder / "lora", given={"peft_config": tiny.lora()}, **SAVING).train()
    return folder


@pytest.fixture
def resume(saved, tmp_path):
    """Continue a copy of that run, with something changed; the trainer after it."""

    def go(kind="full", model=None, reward=tiny.mixed, data=None, given=None, **changed):
        shutil.copytree(saved / kind, tmp_path / "run")
        run = tiny.trainer(tmp_path / "run", model, reward, data, given=given, **SAVING | {"max_steps": 3} | changed)
        run.train(resume_from_checkpoint=True)
        return run

    return go


def mixed(completion_ids, **_):
    return [0.0] * len(completion_ids)


def wider():
    config = tiny.lora()
    config.lora_alpha = 16
    return config


DIFFERENT = {
    "learning rate": ({"learning_rate": 0.05}, ["learning_rate: 0.01 in the checkpoint, 0.05 now"]),
    "several": ({"adam_beta1": 0.5, "max_grad_norm": 0.1}, ["adam_beta1: 0.9 in", "max_grad_norm: 1.0 in"]),
    "optimizer": ({"optim": "sgd"}, ["optim: 'adamw_torch_fused' in the checkpoint, 'sgd' now"]),
    "precision": ({"bf16": True}, ["bf16: False in"]),
    "order": ({"train_sampling_strategy": "sequential"}, ["train_sampling_strategy: 'random' in"]),
    "schedule": ({"lr_scheduler_type": "linear"}, ["lr_scheduler_type: 'constant' in", "max_steps: None in"]),
    "prompts": ({"data": tiny.Dataset.from_dict({"prompt": ["w9"] * 64})}, ["prompt_texts: "]),
    "reward": ({"reward": mixed}, ["reward_code: ['support.tiny.mixed'] in", f"{__name__}.mixed'] now"]),
    "reference": ({"given": {"reference": tiny.llama(9)}}, ["reference: ['1 FrozenReference LlamaForCausalLM of "]),
    "model": ({"model": tiny.gpt2()}, ["policy: 'LlamaForCausalLM of ", "'GPT2LMHeadModel of "]),
    "dtype": ({"model": tiny.llama().to(torch.bfloat16)}, ["policy: "]),
    "value model": ({"given": {"value_model": tiny.critic()}}, ["value_model: '2 tensors"]),
    "an adapter": ({"given": {"peft_config": tiny.lora()}}, ["peft: [] in the checkpoint, ['default'] now"]),
    "another adapter": ({"kind": "lora", "given": {"peft_config": wider()}}, ["peft.default.lora_alpha: 8 in"]),
    "another base": ({"kind": "lora", "model": tiny.llama(9), "given": {"peft_config": tiny.lora()}}, ["policy: "]),
}


@pytest.mark.parametrize(("changed", "named"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_every_difference_is_named_in_one_message(changed, named, resume):
    with pytest.raises(ValueError, match="was written by another run") as caught:
        resume(**changed)
    assert all(each in str(caught.value) for each in named), str(caught.value)
    assert "resume_changes" in str(caught.value)
    assert "next_prompts" not in str(caught.value)


def test_what_only_says_how_long_and_what_is_shown_is_free(resume):
    run = resume(
        logging_steps=2.0, run_name="other", save_total_limit=3, eval_steps=7.0, max_steps=4, log_level="error"
    )
    assert run.state.global_step == 4


def test_what_is_named_may_change_and_has_its_effect(resume):
    run = resume(learning_rate=0.02, kl_coef=0.3, seed=8, resume_changes=["learning_rate", "kl_coef", "seed"])
    assert {group["lr"] for group in run.optimizer.param_groups} == {0.02}
    assert run.state.log_history[-2]["learning_rate"] == 0.02
    assert run.state.log_history[-2]["kl/coef"] == 0.3


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("learning_rat", {}, "resume_changes: learning_rat is no setting"),
        ("adam_beta1", {"adam_beta1": 0.5}, "(adam_beta1 may not: the saved state is bound to it)"),
    ],
)
def test_a_name_that_is_none_or_cannot_change_is_refused(name, changed, message, resume):
    with pytest.raises(ValueError, match=re.escape(message)):
        resume(resume_changes=[name], **changed)


def test_a_checkpoint_that_says_less_is_held_to_what_it_says(saved, tmp_path):
    """As an older klft wrote them: sizes and no checksums, fewer settings."""
    shutil.copytree(saved / "full", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-2"
    state, marker = (json.loads((folder / name).read_text()) for name in ("klft_state.json", "_COMPLETE"))
    state["run"] = {k: v for k, v in state["run"].items() if k in ("seed", "kl_coef", "prompts")}
    (folder / "klft_state.json").write_text(json.dumps(state))
    marker["files"]["klft_state.json"] = (folder / "klft_state.json").stat().st_size
    (folder / "_COMPLETE").write_text(json.dumps({"files": marker["files"]}))
    run = tiny.trainer(tmp_path / "run", **SAVING | {"max_steps": 3})
    with pytest.raises(ValueError, match="seed: 42 in"):
        tiny.trainer(tmp_path / "run", **SAVING | {"max_steps": 3}, seed=1).train(folder)
    run.train(folder)
    assert run.state.global_step == 3


def test_other_prompts_than_those_that_come_next_are_noticed(resume):
    """The dataloader itself goes wrong: ignore_data_skip begins the pass anew."""
    with pytest.raises(RuntimeError, match=r"got other prompts than .* ignore_data_skip=True"):
        resume(ignore_data_skip=True, resume_changes=["ignore_data_skip"])
