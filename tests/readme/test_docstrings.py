"""What `help()` says: every public object has a docstring that names its arguments, the doors an example that runs.

An argument is named in the docstring of the function or its class, or in the list of those that mean the same wherever
they stand (`klft.__doc__`). A dataclass's fields say it in a comment on their line, or as help text. What overrides a
method of transformers is documented there.
"""

import dataclasses
import inspect
import re
import textwrap

import pytest
import torch
from support import tiny, trainers
from transformers import Trainer

import klft

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def named(name, *texts):
    return any(re.search(rf"\b{name}\b", text or "") for text in texts)


def silent_fields(kind):
    """Fields of a dataclass of which nothing says what they are."""
    source, bases = inspect.getsource(kind), [base for base in kind.__mro__[1:] if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    commented = set(re.findall(r"^    (\w+):.*#", source, re.M))
    return [
        field.name for field in dataclasses.fields(kind)
        if field.init and field.name not in inherited | commented and "help" not in field.metadata
        and not named(field.name, kind.__doc__, klft.__doc__)
    ]  # fmt: skip


def silent_arguments(function, *around):
    """Arguments of a function that neither its docstring nor the ones around it name."""
    parameters = inspect.signature(function).parameters.values()
    texts = [function.__doc__, *around, klft.__doc__]
    return [
        p.name for p in parameters
        if p.kind not in VARIADIC and p.name[0] != "_" and p.name not in ("self", "cls") and not named(p.name, *texts)
    ]  # fmt: skip


def problems(name, found):
    """What is missing from the docstrings of a public object."""
    if not inspect.isclass(found):
        yield from ([f"{name}: {each}" for each in silent_arguments(found)] if found.__doc__ else [f"{name}: nothing"])
        return
    if "__doc__" not in vars(found) or not found.__doc__:
        yield f"{name}: nothing"
    if dataclasses.is_dataclass(found):
        yield from (f"{name}: {field}" for field in silent_fields(found))
    elif "__init__" in vars(found):
        yield from (f"{name}: {each}" for each in silent_arguments(found.__init__, found.__doc__))
    strangers = [base for base in found.__mro__[1:] if not base.__module__.startswith("klft")]
    strangers += [Trainer] if name.endswith("Mixin") else []
    for attribute, value in vars(found).items():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if (
            attribute[0] == "_"
            or not inspect.isfunction(function)
            or any(hasattr(base, attribute) for base in strangers)
        ):
            continue
        inherited = inspect.getdoc(getattr(found, attribute))
        if not inherited:
            yield f"{name}.{attribute}: nothing"
        yield from (f"{name}.{attribute}: {each}" for each in silent_arguments(function, inherited, found.__doc__))


@pytest.mark.parametrize("name", klft.__all__)
def test_a_public_object_says_what_its_arguments_are(name):
    assert list(problems(name, getattr(klft, name))) == []


def silent(x, scale, mask):
    """Says nothing of one: scale."""


class Silent:
    def method(self, amount):
        pass


@dataclasses.dataclass
class SilentFields:
    """Of these one: a."""

    a: int
    b: int  # said
    c: int = dataclasses.field(default=0, metadata={"help": "said"})
    d: int = 0


def test_what_says_nothing_is_reported():
    assert list(problems("f", silent)) == ["f: x"]
    assert list(problems("C", Silent)) == ["C: nothing", "C.method: nothing", "C.method: amount"]
    assert list(problems("D", SilentFields)) == ["D: d"]


# --- examples --------------------------------------------------------------------------------------------------------

DOORS = (
    "KLAnchorMixin", "KLPenalty", "KLReward", "FrozenReference", "PPOTrainer", "TokenKLLog", "fused_token_loss",
    "reverse_kl", "token_scores",
)  # fmt: skip


def example(name):
    """The lines under "Example:"."""
    (code,) = re.findall(r"^Example:\n((?:    .*\n|\n)+)", inspect.getdoc(getattr(klft, name)) + "\n", re.M)
    return textwrap.dedent(code).strip()


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """What a reader of an example has: two models, a tokenizer, a batch of texts, prompts, a reward function."""
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(3, tiny.VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0))
    model, ref_model = trainers.policy(), trainers.policy(5)
    hidden, ref_hidden = (m.model(ids).last_hidden_state[:, :-1].flatten(0, 1) for m in (model, ref_model))
    return {
        "model": model, "ref_model": ref_model, "tokenizer": tiny.tokenizer(), "input_ids": ids,
        "attention_mask": torch.ones_like(ids), "completion_mask": torch.arange(9).expand(4, -1) >= 3,
        "scores": torch.ones(4), "token_ids": ids[:, 1:].flatten(), "hidden": hidden, "ref_hidden": ref_hidden.detach(),
        "advantages": torch.ones(32), "texts": trainers.texts(), "prompts": tiny.prompts(16),
        "reward": trainers.reward_w5, "SFTConfig": trainers.sft_config,
        "logits": torch.randn(2, 3, 7), "ref_logits": torch.randn(2, 3, 7),
    }  # fmt: skip


@pytest.mark.parametrize("name", DOORS)
def test_the_example_of_a_door_runs(name, desk):
    code = example(name)
    assert 2 <= len(code.splitlines()) <= 9
    exec(compile(code, f"{name}.__doc__", "exec"), desk | {each: getattr(klft, each) for each in klft.__all__})
