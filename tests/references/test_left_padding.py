"""Models that do not leave left padding out of their logits are refused by name."""

import pytest
import torch
import transformers
from support import tiny

from klft import FrozenReference
from klft.models import check_left_padding

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
REFUSED = {
    "Rwkv": {"attention_hidden_size": 32},
    "RecurrentGemma": {
        "lru_width": 32, "attention_window_size": 8, "head_dim": 8, "block_types": ["recurrent", "attention"],
    },
    "Bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
}  # fmt: skip
ROW = torch.tensor([[5, 6, 7]])
PADDED, MASK = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])


def model(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | REFUSED[name])
    made = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.15)
    return made


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_read_padding(name):
    reference = FrozenReference(model(name))
    reference.logits(ROW, torch.ones_like(ROW))  # without padding it is as good as another
    with pytest.raises(TypeError, match=f"{name}ForCausalLM does not leave padding out"):
        reference.logits(PADDED, MASK)


@pytest.mark.parametrize("made", [tiny.llama, tiny.gpt2])
def test_models_that_do_not(made):
    one = made().eval()
    check_left_padding(one)
    reference = FrozenReference(one)
    alone = reference.logits(ROW, torch.ones_like(ROW))
    torch.testing.assert_close(reference.logits(PADDED, MASK)[:, -3:], alone)
