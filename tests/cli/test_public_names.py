"""The public names, the arguments they take, and that nothing public is typed `Any`."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

import klft
import klft.diagnostics
import klft.ppo
from klft.ppo.fields import VALIDATORS

EMPTY = inspect.Parameter.empty
PPO = (
    "model reward_funcs args train_dataset eval_dataset=None processing_class=None reference=None value_model=None "
    "peft_config=None callbacks=None optimizers=(None,None)"
)
SIGNATURES = {
    "reverse_kl": "logits ref_logits",
    "forward_kl": "logits ref_logits",
    "entropy": "logits",
    "jsd": "logits ref_logits weight=0.5",
    "skew_kl": "logits ref_logits alpha=0.1",
    "skew_reverse_kl": "logits ref_logits alpha=0.1",
    "alpha_divergence": "logits ref_logits alpha=0.5",
    "renyi_divergence": "logits ref_logits alpha=0.5",
    "k1": "logp ref_logp",
    "k2": "logp ref_logp",
    "k3": "logp ref_logp",
    "forward_k1": "logp ref_logp",
    "forward_k3": "logp ref_logp",
    "estimate_kl": "logp ref_logp * direction='reverse' estimator='k1' gradient='none' behaviour_logp=None",
    "top_k_kl": "logits ref_logits token_ids k * direction='reverse' behaviour_logp=None",
    "LMHead": "weight bias=None scale=1.0 softcap=None shard=None",
    "VocabShard": "start stop vocab_size group=None",
    "linear_divergence": (
        "hidden head ref_hidden ref_head * divergence='reverse_kl' temperature=1.0 backend='auto' **params"
    ),
    "token_scores": "hidden head token_ids ref_hidden=None ref_head=None * temperature=1.0",
    "fused_token_loss": ("loss_fn hidden head token_ids ref_hidden=None ref_head=None * temperature=1.0 per_token=()"),
    "FrozenReference": "model",
    "AdapterReference": "peft_model",
    "FixedKL": "coef",
    "AdaptiveKL": "coef target horizon",
    "KLPenalty": (
        "reference * direction='reverse' estimator='k1' placement='reward' controller clip=None token_rule=None"
    ),
    "KLPenalty.measure": "self logits input_ids attention_mask mask * behaviour_logp=None temperature=1.0",
    "KLPenalty.measure_hidden": (
        "self hidden head token_ids mask ref_hidden ref_head * behaviour_logp=None temperature=1.0"
    ),
    "KLPenalty.rewards": "self scores kl",
    "KLPenalty.losses": "self kl",
    "KLPenalty.token_losses": "self scores",
    "KLPenalty.update": "self kl",
    "KLPenalty.state_dict": "self",
    "KLPenalty.load_state_dict": "self state",
    "shape_rewards": "scores kl mask * coef",
    "token_logps": "logits labels",
    "PPOTrainer": PPO,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_public_name_takes_what_the_contract_says(name):
    """In order, with these defaults; what was added since comes after them, and has a default."""
    found: Any = klft
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters
    only_by_name = False
    seen = []
    for word in SIGNATURES[name].split():
        if word == "*":
            only_by_name = True
            continue
        argument, _, default = word.partition("=")
        if argument.startswith("**"):
            assert parameters[argument[2:]].kind is inspect.Parameter.VAR_KEYWORD
            seen.append(argument[2:])
            continue
        seen.append(argument)
        parameter = parameters[argument]
        assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) == only_by_name, argument
        if default:
            assert repr(parameter.default).replace(" ", "") == default, argument
    assert [p for p in parameters if p in seen] == seen
    assert all(p.default is not EMPTY for p in parameters.values() if p.name not in seen)


def public_callables():
    for module in (klft, klft.diagnostics, klft.ppo):
        for name in module.__all__:
            found = getattr(module, name)
            if not inspect.isclass(found):
                if callable(found):
                    yield f"{module.__name__}.{name}", found
                continue
            for attribute, value in vars(found).items():
                own = not attribute.startswith("_") or attribute == "__init__"
                if own and inspect.isfunction(value):
                    yield f"{module.__name__}.{name}.{attribute}", value


def test_no_public_argument_is_any_or_without_a_type():
    untyped = [
        f"{name}: {parameter}"
        for name, function in public_callables()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("self", "cls")
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # a base class's
        and (parameter.annotation is EMPTY or parameter.annotation in (Any, "Any"))
    ]
    assert untyped == []
    assert len(list(public_callables())) > 60


README = (Path(__file__).parents[2] / "README.md").read_text()


def test_what_the_readme_names_is_at_the_top():
    """Each `klft.a.b` is there after `import klft` alone; what a package offers and the README names needs no path."""
    dotted = set(re.findall(r"\bklft\.([a-z_]\w*(?:\.\w+)*|[A-Z]\w*(?:\.\w+)?)", README)) - {"html"}
    assert len(dotted) > 10
    for path in dotted:
        found: Any = klft
        for part in path.split("."):
            found = getattr(found, part)
    packages = (klft.diagnostics, klft.integrations, klft.penalty, klft.ppo, klft.references)
    classes = {name for package in packages for name in package.__all__ if name[0].isupper() and not name.isupper()}
    named = {
        word for code in re.findall(r"`[^`]+`|^```.*?^```", README, re.M | re.S) for word in re.findall(r"\w+", code)
    }
    assert {"KLPenalty", "KLReward", "TokenKLLog"} <= named & classes
    assert named & classes - set(klft.__all__) == set()


def test_dir_lists_all_that_can_be_had_and_nothing_else():
    assert {*klft.__all__, "__version__", "diagnostics", "integrations", "plots", "token_rules"} <= set(dir(klft))
    assert [name for name in dir(klft) if not name.startswith("_") and not hasattr(klft, name)] == []
    own = {path.stem for path in Path(klft.__file__).parent.iterdir()}
    assert [name for name in dir(klft) if name[0] != "_" and name not in own | set(klft.__all__)] == []


def test_a_module_is_there_without_an_import_of_its_own():
    code = "import sys, klft; klft.token_rules.burn_in(2); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_every_field_of_ones_own_has_a_validator():
    inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    own = {field.name for field in dataclasses.fields(klft.PPOConfig)} - inherited
    assert own - VALIDATORS.keys() == set()
    assert VALIDATORS.keys() - {field.name for field in dataclasses.fields(klft.PPOConfig)} == set()
