"""PPOConfig: choices and precisions of the Trainer's own fields, refused by name before a model is loaded."""

import sys
from enum import Enum

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from klft import PPOConfig
from klft.arguments import one_line_errors
from klft.ppo.fields import choices


def config(**more):
    return PPOConfig(**({"output_dir": "unused", "report_to": "none", "use_cpu": True} | more))


CHOICES = ("optim", "lr_scheduler_type", "save_strategy", "eval_strategy", "logging_strategy", "hub_strategy")


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["bogus", None, False, 3, ["no"]])
def test_an_unknown_choice_of_the_trainers_is_refused_by_name_with_the_known_ones(name, value):
    known = getattr(TrainingArguments(output_dir="unused", use_cpu=True), name)
    with pytest.raises(ValueError, match=rf"^PPOConfig: {name} must be one of .*\b{known.value}\b.*, got ") as refused:
        config(**{name: value})
    assert str(refused.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(("options", "said"), [
    ({"optim": "adamw_troch"}, "optim is unknown. Did you mean 'adamw_torch'? It must be one of adamw_torch, "),
    ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type is unknown. Did you mean 'cosine'?"),
    ({"save_strategy": "step"}, "save_strategy is unknown. Did you mean 'steps'?"),
    ({"eval_strategy": "epochs"}, "eval_strategy is unknown. Did you mean 'epoch'? It must be one of no, "),
    ({"kl_estimator": "exakt"}, "kl_estimator is unknown. Did you mean 'exact'?"),
])  # fmt: skip
def test_a_similar_choice_is_named_and_survives_the_line(options, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe"])
    with pytest.raises(SystemExit), one_line_errors():
        config(**options)
    assert f"error: PPOConfig: {said}" in capsys.readouterr().err


def test_no_choice_of_the_trainers_is_left_out():
    made = TrainingArguments(output_dir="unused", use_cpu=True)
    assert {name for name, value in vars(made).items() if isinstance(value, Enum)} == set(CHOICES)
    assert set(CHOICES) <= set(choices(TrainingArguments))


@pytest.mark.parametrize("value", ["no", SaveStrategy.NO, "best"])
def test_a_choice_is_taken_as_text_or_as_what_the_trainer_makes_of_it(value):
    assert config(save_strategy=value, optim="sgd").save_strategy == value


@pytest.mark.parametrize(("option", "said"), [
    ("fp16", "fp16 needs a GPU, and this runs on a CPU: leave it out, or say bf16=True"),
    ("tf32", "tf32 needs a GPU, and this runs on a CPU: leave it out, or say bf16=True"),
    ("fp16_full_eval", "fp16_full_eval casts the policy for an evaluation, and not its value function: leave it out"),
    ("bf16_full_eval", "bf16_full_eval casts the policy for an evaluation, and not its value function: leave it out"),
])  # fmt: skip
def test_a_precision_that_cannot_be_had_is_refused(option, said):
    with pytest.raises(ValueError, match=f"^PPOConfig: {said}"):
        config(**{option: True})
    assert config(**{option: False}).use_cpu


def test_bf16_on_a_cpu_is_taken():
    assert config(bf16=True, tf32=None).mixed_precision == "bf16"
