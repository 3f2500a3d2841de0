"""Quantised heads are no matrix of numbers: measured from logits, and refused by name where a head is needed."""

import warnings

import pytest
import torch
from support import tiny
from torch import nn

from klft import FrozenReference
from klft.heads import LMHead
from klft.models import address, check_no_shared_storage, is_quantized, vocab_size
from klft.scoring import score_texts

TEXTS = ["w1 w2 w3", "w4 w5"]


class Packed4bit(nn.Linear):
    """As bitsandbytes' Linear4bit: two numbers in a byte, and a shape that says nothing."""

    def __init__(self, of):
        super().__init__(of.in_features, of.out_features, bias=False)
        self.dense = of.weight.detach().clone()
        self.weight = nn.Parameter(torch.zeros(of.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.dense.round(decimals=1))


def packed():
    model = tiny.llama().eval()
    model.lm_head = Packed4bit(model.lm_head)
    return model


def dynamic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(tiny.llama().eval(), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("made", [packed, dynamic])
def test_heads(made, tmp_path):
    model = made()
    assert is_quantized(model)
    assert not is_quantized(tiny.llama())
    assert vocab_size(model) == FrozenReference(made()).vocab_size == tiny.VOCABULARY
    refused = pytest.raises(TypeError, match=r"LlamaForCausalLM.* head .*")
    with refused:
        LMHead.from_model(model)
    with refused:
        tiny.trainer(tmp_path, model, given={"reference": tiny.llama()})


@pytest.mark.parametrize("made", [packed, dynamic])
@pytest.mark.parametrize("quantised", ["policy", "reference"])
def test_kl_from_logits(made, quantised):
    model, other = (made(), tiny.apart().eval()) if quantised == "policy" else (tiny.apart().eval(), made())
    (batch,) = score_texts(model, other, tiny.tokenizer(), TEXTS[:1], batch_size=1, max_length=8)
    ids = batch.token_ids
    z, y = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (model, other))
    expected = (z.exp() * (z - y)).sum(-1)
    torch.testing.assert_close(batch.scores.reverse_kl[0, 1:].double(), expected, rtol=1e-3, atol=1e-5)


class WithoutStorage(torch.Tensor):
    """As torchao's: a subclass that holds other tensors and has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{function} of a tensor without storage")


def test_weights_without_storage_share_none():
    kept, trained = nn.Linear(3, 3), nn.Linear(3, 3)
    for layer in (kept, trained):
        layer.weight = nn.Parameter(WithoutStorage(torch.zeros(3, 3)), requires_grad=False)
    assert address(kept.weight) is None
    check_no_shared_storage(kept, trained)
    trained.bias = kept.bias
    with pytest.raises(ValueError, match="parameter 'bias'"):
        check_no_shared_storage(kept, trained)


def test_a_head_without_storage_is_refused():
    model = tiny.llama()
    model.lm_head.weight = nn.Parameter(WithoutStorage(model.lm_head.weight.detach()), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"no plain floating-point weight \[V, D\] in its head \(Linear: a WithoutStorage"
    ):
        LMHead.from_model(model)
