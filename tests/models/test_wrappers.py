"""Models inside DeepSpeed's engine and torch.compile: the same numbers as without, everywhere a model is taken."""

import copy

import peft
import pytest
import torch
from support import tiny
from support.heads import IDS, llama, own, read
from support.wrappers import WRAPPERS, DeepSpeedEngine

from klft import AdapterReference, FrozenReference, KLPenalty
from klft.models import base_of, causal_inputs, hidden_states, max_positions, vocab_size
from klft.references import resolve_reference
from klft.scoring import Scorer, score_texts

# dynamo's own, at every graph break of a model that is trained
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
each_wrapper = pytest.mark.parametrize("wrapped", WRAPPERS)
LEFT = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
MASK = (LEFT != 0).long()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def adapted():
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny.llama(), tiny.lora())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.5)
    return model.eval()


@each_wrapper
def test_the_model_inside(wrapped):
    model = llama()
    assert base_of(wrapped(model)) is model
    adapter = adapted()
    assert base_of(wrapped(adapter)) is adapter.get_base_model()
    assert vocab_size(wrapped(model)) == model.config.vocab_size
    assert max_positions(wrapped(model)) == 32
    assert set(causal_inputs(wrapped(model), LEFT, MASK)) == set(causal_inputs(model, LEFT, MASK))


@each_wrapper
def test_hidden_states_and_head(wrapped):
    model = llama()
    logits, theirs = own(model)
    model = wrapped(model)
    model(input_ids=IDS)  # a compiled one has a graph with its head now
    for _ in range(2):
        mine, found, head = read(model)
        torch.testing.assert_close(mine, logits, rtol=1e-12, atol=1e-12)
        assert head.weight is base_of(model).lm_head.weight
        assert len(found) == len(theirs)
        for gradient, expected in zip(found.values(), theirs.values(), strict=True):
            assert (gradient - expected).norm() <= 1e-10 * expected.norm()
    torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once_with_its_head_and_once_without():
    graphs = []
    model = torch.compile(llama(), backend=lambda graph, _inputs: graphs.append(graph) or graph.forward)
    counts = []
    for _ in range(4):
        with hidden_states(model):
            model(input_ids=IDS)
        model(input_ids=IDS)
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts[1:] == counts[1:2] * 3


@each_wrapper
def test_references(wrapped):
    model = tiny.llama().eval()
    frozen, expected = FrozenReference(wrapped(copy.deepcopy(model))), FrozenReference(copy.deepcopy(model))
    torch.testing.assert_close(frozen.logits(LEFT, MASK), expected.logits(LEFT, MASK))
    hidden, head = frozen.hidden(LEFT, MASK)
    torch.testing.assert_close(head.logits(hidden), expected.logits(LEFT, MASK))
    assert frozen.name == "LlamaForCausalLM"
    for given in (model, wrapped(model)):
        with pytest.raises(ValueError, match=r"the policy itself|shares the policy's memory"):
            resolve_reference(given, wrapped(model))


@each_wrapper
def test_adapters(wrapped):
    model = adapted()
    with model.disable_adapter():
        expected = model(**causal_inputs(model, LEFT, MASK)).logits
    for reference in (AdapterReference(wrapped(model)), resolve_reference(None, wrapped(model))):
        torch.testing.assert_close(reference.logits(LEFT, MASK), expected)
    moved = wrapped(model)(**causal_inputs(model, LEFT, MASK)).logits
    assert not torch.allclose(moved, expected), "the adapter is on again"


@each_wrapper
def test_penalty_and_scores(wrapped):
    model, other = tiny.llama().eval(), tiny.apart().eval()
    kl = {}
    counted = MASK.bool() & (torch.arange(5) > 2)
    for policy, reference in ((model, other), (wrapped(copy.deepcopy(model)), wrapped(copy.deepcopy(other)))):
        penalty = KLPenalty(FrozenReference(reference))
        logits = policy(**causal_inputs(policy, LEFT, MASK)).logits
        measured = penalty.measure(logits, LEFT, MASK, counted).scores
        scored = Scorer(FrozenReference(reference)).score_batch(policy, LEFT, MASK, counted)
        texts = score_texts(policy, reference, tiny.tokenizer(), ["w1 w2 w3", "w4 w5"], batch_size=2, max_length=8)
        kl[policy] = [
            measured.logp.detach(),
            measured.ref_logp,
            scored.reverse_kl,
            *(batch.scores.forward_kl for batch in texts),
        ]
    for mine, expected in zip(*kl.values(), strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(mine, expected)


def test_attributes_of_the_stand_in_are_those_of_an_engine():
    engine = DeepSpeedEngine(llama())
    assert engine.config == {"train_batch_size": 4}
    assert engine.get_output_embeddings() is engine.module.lm_head
