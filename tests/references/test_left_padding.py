"""Models that do not leave left padding out of their logits, or that see what follows, are refused by name."""

import pytest
import torch
import transformers
from support import tiny

from klft import FrozenReference
from klft.models import check_causal, check_left_padding
from klft.scoring import score_texts

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
REFUSED = {
    "Rwkv": {"attention_hidden_size": 32},
    "RecurrentGemma": {
        "lru_width": 32, "attention_window_size": 8, "head_dim": 8, "block_types": ["recurrent", "attention"],
    },
    "DeepseekV4": {"layer_types": ["compressed_sparse_attention"] * 2, "head_dim": 8, "q_lora_rank": 16},
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


def prophetnet():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "decoder_ffn_dim": 64, "num_decoder_layers": 2, "pad_token_id": 0}
    config = transformers.ProphetNetConfig(**sizes, num_decoder_attention_heads=4, init_std=0.2)
    return transformers.ProphetNetForCausalLM(config).eval()


class Bidirectional(transformers.LlamaForCausalLM):
    """Without a causal mask, whatever its configuration says."""

    def forward(self, input_ids=None, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        output.logits = output.logits + output.logits.mean(1, keepdim=True)
        return output


def bidirectional():
    return Bidirectional(tiny.llama().config).eval()


@pytest.mark.parametrize("made", [prophetnet, bidirectional])
def test_models_that_see_what_follows(made, tmp_path):
    one = made()
    refused = pytest.raises(TypeError, match=f"{type(one).__name__} sees what follows.*Use a causal language model")
    with refused:
        check_causal(one)
    with refused:
        FrozenReference(one).logits(ROW, torch.ones_like(ROW))
    with refused:
        list(score_texts(one, tiny.llama(), tiny.tokenizer(), ["w1 w2 w3"], batch_size=1, max_length=9))
    with refused:
        tiny.trainer(tmp_path, one)


def test_a_policy_that_reads_padding_is_refused_before_training(tmp_path):
    with pytest.raises(TypeError, match="model: RwkvForCausalLM does not leave padding out"):
        tiny.trainer(tmp_path, model("Rwkv"), given={"reference": tiny.llama(vocab_size=40)})
