"""resolve_reference: one reference of whatever a user hands over, checked before anything is frozen."""

import copy
import inspect

import peft
import pytest
import torch
from support import tiny
from support.penalties import GivenReference
from torch import nn

from klft import AdapterReference, FrozenReference, KLPenalty
from klft.diagnostics import TokenKLCallback
from klft.references import Reference, resolve_reference
from klft.scoring import score_texts


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_what_is_a_reference_already_is_taken_as_it_is():
    for reference in (FrozenReference(tiny.llama(5)), GivenReference(torch.zeros(1, 1, 3))):
        assert resolve_reference(reference) is reference
        assert resolve_reference(reference, tiny.llama()) is reference


def test_a_model_is_frozen():
    model = tiny.llama(5).train()
    reference = resolve_reference(model, tiny.llama())
    assert isinstance(reference, FrozenReference)
    assert trainable(model) == []
    assert not model.training


def test_none_is_the_policy_without_its_adapter():
    policy = peft.get_peft_model(tiny.llama(), tiny.lora())
    assert isinstance(resolve_reference(None, policy), AdapterReference)
    for nothing in (tiny.llama(), None):
        with pytest.raises(ValueError, match="no PEFT adapter"):
            resolve_reference(None, nothing)


def view_of(policy):
    other = tiny.llama(5)
    other.lm_head.weight = policy.lm_head.weight
    return other


@pytest.mark.parametrize(
    ("make", "said"), [(lambda p: p, "the policy itself"), (view_of, "shares the policy's memory")]
)
def test_the_policy_is_refused_and_stays_trainable(make, said, tmp_path):
    """By name and by shared storage, wherever a reference is taken; nothing is frozen on the way."""
    policy = tiny.llama().train()
    before = trainable(policy)
    for take in (
        lambda r: resolve_reference(r, policy),
        lambda r: score_texts(policy, r, tiny.tokenizer(), ["w1 w2"], batch_size=1, max_length=8),
        lambda r: tiny.trainer(tmp_path, policy, given={"reference": r}),
    ):
        with pytest.raises(ValueError, match=said):
            take(make(policy))
        assert trainable(policy) == before
        assert policy.training


def test_anything_else_is_named():
    for strange in ("a/model", 3, nn.Linear):
        with pytest.raises(TypeError, match="must be a model or a klft reference"):
            resolve_reference(strange)
    with pytest.raises(TypeError, match="causal language model, got Linear"):
        resolve_reference(nn.Linear(2, 2))


@pytest.mark.parametrize("make", [FrozenReference, lambda m: AdapterReference(peft.get_peft_model(m, tiny.lora()))])
def test_both_obey_the_protocol(make):
    reference = make(tiny.llama(5))
    members = [name for name in vars(Reference) if not name.startswith("_")]
    assert members
    for name in members:
        assert hasattr(reference, name), name
        declared = inspect.getattr_static(Reference, name)
        if inspect.isfunction(declared):
            mine = inspect.signature(getattr(type(reference), name))
            assert list(mine.parameters) == list(inspect.signature(declared).parameters), name
    assert isinstance(reference, Reference)
    assert reference.vocab_size == tiny.VOCABULARY
    assert reference.max_positions == 64
    assert reference.state_dict() == {}
    ids = torch.tensor([[4, 5, 6]])
    hidden, head = reference.hidden(ids, torch.ones_like(ids))
    torch.testing.assert_close(head.logits(hidden), reference.logits(ids, torch.ones_like(ids)))
    assert reference.logits(ids, torch.ones_like(ids), 1).shape == (1, 1, tiny.VOCABULARY)


class Recorded:
    """A reference that is no klft class: the base model behind the protocol, with a note of what was asked."""

    name, vocab_size, max_positions = "recorded", tiny.VOCABULARY, 64

    def __init__(self):
        self.inner, self.asked = FrozenReference(tiny.llama(5)), []

    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(self.inner, name)


def test_a_class_of_ones_own_serves_everywhere(tmp_path):
    ours, theirs = FrozenReference(tiny.llama(5)), Recorded()
    logs = []
    for i, reference in enumerate((ours, theirs)):
        run = tiny.trainer(tmp_path / str(i), given={"reference": reference}, max_steps=2)
        run.train()
        logs.append(tiny.step_logs(run))
    assert logs[0] == logs[1]
    assert KLPenalty(theirs).reference is theirs
    both = [
        list(score_texts(tiny.llama(), r, tiny.tokenizer(), ["w1 w2 w3"], batch_size=1, max_length=8))
        for r in (ours, theirs)
    ]
    assert torch.equal(both[0][0].scores.reverse_kl, both[1][0].scores.reverse_kl)
    TokenKLCallback(theirs, ["w1"], max_new_tokens=6).on_train_begin(
        tiny.config(tmp_path / "callback"), copy.copy(run.state), None, model=tiny.llama(),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    assert "model" not in theirs.asked


def test_the_old_names_warn_and_work():
    reference, policy = FrozenReference(tiny.llama(5)), tiny.llama()
    ids = torch.tensor([[4, 5, 6]])
    with pytest.warns(DeprecationWarning, match=r"use reference\.logits"):
        old = reference(ids, torch.ones_like(ids), 2)
    assert torch.equal(old, reference.logits(ids, torch.ones_like(ids), 2))
    with pytest.warns(DeprecationWarning, match=r"use reference\.check_independent"):
        reference.check_apart_from(policy)
