"""PPO of models that are compiled, and of one whose own gradient is NaN under padding."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import tiny
from support.wrappers import COMPILED, DeepSpeedEngine

from klft.models import zero_pad_embedding
from klft.ppo.rollout import forward_with_values

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def numbers(run):
    run.train()
    kept = ("loss", "grad_norm", "kl/reverse/mean", "ppo/policy_loss/mean")
    return [entry[name] for entry in tiny.step_logs(run) for name in kept]


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [None, *COMPILED[:2]])
def test_a_compiled_policy_trains_as_one_that_is_not(wrapped, tmp_path):
    torch._dynamo.reset()
    plain = numbers(tiny.trainer(tmp_path / "plain", tiny.llama(), max_steps=2, self_test=True))
    model, changed = tiny.llama(), {"torch_compile": True, "torch_compile_backend": "eager"}
    if wrapped is not None:
        model, changed = wrapped(model), {}
    run = tiny.trainer(tmp_path / "compiled", model, max_steps=2, self_test=True, **changed)
    assert numbers(run) == pytest.approx(plain, rel=1e-4, abs=1e-6)
    run.save_model(str(tmp_path / "saved"))
    assert "model.embed_tokens.weight" in load_file(tmp_path / "saved" / "model.safetensors")


def test_the_training_forward_of_an_engine(tmp_path):
    run = tiny.trainer(tmp_path, tiny.llama())
    rows = [{"prompt": "w1 w2"}, {"prompt": "w3 w4 w5"}]
    completions, *_ = run._collector._generate(run.model.eval(), rows)
    expected = forward_with_values(run.model, run.model, completions)
    mine = forward_with_values(DeepSpeedEngine(run.model), run.model, completions)
    for got, wanted in zip(mine, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_gradient_of_gemma3n_at_padding_is_said_to_be_its_own(tmp_path):
    sizes = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0,
        "vocab_size": tiny.VOCABULARY, "vocab_size_per_layer_input": tiny.VOCABULARY, "sliding_window": 8,
    }  # fmt: skip
    special = {"pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(**sizes, **special, activation_sparsity_pattern=[0.0, 0.0])
    model = transformers.Gemma3nForCausalLM(config)
    assert zero_pad_embedding(model) == tiny.PAD
    assert zero_pad_embedding(tiny.gpt2()) is None
    with pytest.raises(RuntimeError, match=r"The embedding of the pad id 0 is all zeros.*Gemma3n.*tokenizer.eos_token"):
        tiny.trainer(tmp_path, model, max_steps=2).train()
