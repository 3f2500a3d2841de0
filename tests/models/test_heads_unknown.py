"""LMHead of classes klft does not know: accepted if one probe agrees with their logits, refused by name otherwise."""

import gc

import pytest
import torch
import transformers
from support.heads import IDS, LLAMA_LIKE, SMALL, V, hooks_of
from torch import nn

from klft import heads
from klft.heads import LMHead


class Renamed(transformers.LlamaForCausalLM):
    """A plain head in a class of one's own."""

    calls = 0

    def forward(self, input_ids=None, **inputs):
        self.calls += 1
        assert not self.training
        torch.rand(3)
        return super().forward(input_ids=input_ids, **inputs)


class NoCache(transformers.LlamaForCausalLM):
    """Cannot make a cache on its own, as hybrid models whose layers each keep another state."""

    def forward(self, input_ids=None, use_cache=None, **inputs):
        if use_cache is not False:
            raise AttributeError("no cache")
        return super().forward(input_ids=input_ids, use_cache=False, **inputs)


class Doubled(transformers.LlamaForCausalLM):
    """Does something to the logits that no configuration mentions."""

    def forward(self, *args, **inputs):
        output = super().forward(*args, **inputs)
        output.logits = output.logits * 1.01
        return output


class Capped(transformers.LlamaForCausalLM):
    """Scale and softcap, as its configuration says."""

    def forward(self, *args, **inputs):
        output = super().forward(*args, **inputs)
        cap = self.config.final_logit_softcapping
        output.logits = cap * torch.tanh(output.logits / self.config.logits_scaling / cap)
        return output


class Masked(transformers.LlamaForCausalLM):
    """One id can never be said."""

    def forward(self, *args, **inputs):
        output = super().forward(*args, **inputs)
        output.logits[..., 5] = torch.finfo(output.logits.dtype).min
        return output


class Two(nn.Module):
    """Not a linear layer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(V, 16))

    def forward(self, x):
        return torch.relu(self.inner(x)) @ self.weight.T


class Packed(nn.Linear):
    """As quantised layers are: integers, and a forward of its own."""

    def __init__(self):
        super().__init__(16, V, bias=False)
        self.weight = nn.Parameter(torch.randint(-9, 9, (V, 16), dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 9)


def of_class(cls, **changed):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL | LLAMA_LIKE | {"initializer_range": 0.02} | changed)
    return cls(config)


def test_an_unknown_class_is_accepted_if_its_logits_agree_on_one_probe_that_leaves_no_trace():
    model = of_class(Renamed)
    model.train()
    model.model.layers[1].eval()
    modes, state, before = [m.training for m in model.modules()], torch.get_rng_state(), hooks_of(model)
    head = LMHead.from_model(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks_of(model) == before
    assert all(p.grad is None for p in model.parameters())
    assert LMHead.from_model(model).weight is head.weight is model.lm_head.weight
    assert model.calls == 1, "the answer is remembered"


def test_the_probe_asks_for_no_cache():
    assert LMHead.from_model(of_class(NoCache)).scale == 1.0


def test_what_the_probe_found_is_forgotten_with_the_model():
    model = of_class(Renamed)
    LMHead.from_model(model)
    assert model in heads._probed
    count = len(heads._probed)
    del model
    gc.collect()
    assert len(heads._probed) < count


def test_the_probe_finds_what_the_configuration_says_though_logits_are_small():
    model = of_class(Capped, final_logit_softcapping=30.0, logits_scaling=2.0)
    head = LMHead.from_model(model)
    assert (head.scale, head.softcap) == (0.5, 30.0)
    assert model(input_ids=IDS).logits.abs().max() < 1, "so small that a softcap of 30 can hardly be seen"


def test_the_probe_finds_that_a_class_does_not_do_what_its_configuration_says():
    model = of_class(Renamed, final_logit_softcapping=30.0, logits_scaling=2.0).eval()
    head = LMHead.from_model(model)
    assert (head.scale, head.softcap) == (1.0, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_knows_precision(dtype):
    head = LMHead.from_model(of_class(Renamed).to(dtype).eval())
    assert (head.scale, head.softcap) == (1, None)


@pytest.mark.parametrize("cls", [Doubled, Masked])
def test_a_class_that_does_more_is_refused_by_name(cls):
    model = of_class(cls)
    for _ in range(2):
        with pytest.raises(TypeError, match=rf"{cls.__name__} is not known.*KLPenalty\.measure.*LMHead\("):
            LMHead.from_model(model)


@pytest.mark.parametrize("layer", [Two, Packed, lambda: nn.Sequential(nn.Linear(16, V))])
def test_a_head_that_is_not_linear_is_refused_by_name(layer):
    model = of_class(transformers.LlamaForCausalLM)
    model.set_output_embeddings(layer())
    assert model(input_ids=IDS).logits.shape == (2, 5, V)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.*KLPenalty\.measure"):
        LMHead.from_model(model)


def test_an_encoder_decoder_is_refused():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is not known"):
        LMHead.from_model(transformers.T5ForConditionalGeneration(config))
