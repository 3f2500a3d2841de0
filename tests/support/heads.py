"""A small Llama, its own logits with their gradients, and the same through hidden states and its head."""

import torch
import transformers

from klft.heads import LMHead
from klft.models import hidden_states

V = 37
IDS = torch.randint(3, V, (2, 5), generator=torch.Generator().manual_seed(0))

LLAMA_LIKE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
SMALL = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# name -> (class, (scale, softcap) that the head must have, configuration)
FAMILIES = {
    "llama": ("Llama", (1, None), LLAMA_LIKE),
    "llama tied": ("Llama", (1, None), LLAMA_LIKE | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", (1, None), LLAMA_LIKE),
    "qwen3": ("Qwen3", (1, None), LLAMA_LIKE),
    "mistral": ("Mistral", (1, None), LLAMA_LIKE),
    "mixtral": ("Mixtral", (1, None), LLAMA_LIKE | {"num_local_experts": 2, "experts_implementation": "eager"}),
    "phi": ("Phi", (1, None), LLAMA_LIKE),  # a bias on the head
    "olmo2": ("Olmo2", (1, None), LLAMA_LIKE),
    "gemma2": ("Gemma2", (1, 3.0), LLAMA_LIKE | {"final_logit_softcapping": 3.0}),
    "gemma2 uncapped": ("Gemma2", (1, None), LLAMA_LIKE | {"final_logit_softcapping": None}),
    "gemma3": ("Gemma3", (1, 3.0), LLAMA_LIKE | {"final_logit_softcapping": 3.0}),
    "cohere": ("Cohere", (0.25, None), LLAMA_LIKE | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", (0.25, None), LLAMA_LIKE | {"logit_scale": 0.25}),
    "granite": ("Granite", (1 / 3, None), LLAMA_LIKE | {"logits_scaling": 3.0}),
    "hyperclovax": ("HyperCLOVAX", (3, None), LLAMA_LIKE | {"logits_scaling": 3.0}),
    "minicpm3": (  # its logits_scaling divides the hidden states, ahead of the head
        "MiniCPM3", (1, None),
        {k: v for k, v in LLAMA_LIKE.items() if k != "head_dim"} | {
            "dim_model_base": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
            "v_head_dim": 4, "num_key_value_heads": 4},
    ),
    "falcon_h1": (
        "FalconH1", (0.3, None),
        LLAMA_LIKE | {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                      "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    ),
    "recurrent_gemma": (
        "RecurrentGemma", (1, 3.0),
        LLAMA_LIKE | {"logits_soft_cap": 3.0, "lru_width": 16, "block_types": ["recurrent", "attention"],
                      "attention_window_size": 16},
    ),
    "mamba": ("Mamba", (1, None), {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}),
    "gpt2": ("GPT2", (1, None), {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),  # tied
    "gpt_neox": ("GPTNeoX", (1, None), {k: v for k, v in LLAMA_LIKE.items() if "key" not in k and k != "head_dim"}),
    "gptj": ("GPTJ", (1, None), {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4}),
    "opt": ("OPT", (1, None), {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                               "word_embed_proj_dim": 16, "max_position_embeddings": 32}),
    "bloom": ("Bloom", (1, None), {"hidden_size": 16, "n_layer": 2, "n_head": 4}),
}  # fmt: skip


def llama(dtype=torch.float64, **changed):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL | LLAMA_LIKE | changed)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def build(name, dtype=torch.float64, seed=0):
    family, _, changed = FAMILIES[name]
    torch.manual_seed(seed)
    names = (f"{family}TextConfig", f"{family}Config")
    config = next(filter(None, (getattr(transformers, name, None) for name in names)))(**SMALL | changed)
    made = (getattr(transformers, f"{family}{suffix}", None) for suffix in ("ForCausalLM", "LMHeadModel"))
    model = next(filter(None, made))(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases start at 0, norms at 1: nothing would show if they were left out
            if p.ndim == 1:
                p.add_(torch.randn_like(p) / 10)
    return model


def gradients(model):
    found = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def projection(logits):
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    return (logits * weights).sum()


def own(model, **inputs):
    """The model's own logits, and the gradients of a projection of them."""
    logits = model(input_ids=IDS, **inputs).logits
    projection(logits).backward()
    return logits.detach(), gradients(model)


def read(model, **inputs):
    """The same through hidden states and the head."""
    with hidden_states(model) as kept:
        output = model(input_ids=IDS, **inputs)
    assert output.logits.shape[-2] == 0, "no logits were computed"
    head = LMHead.from_model(model)
    logits = head.logits(kept.hidden)
    projection(logits).backward()
    return logits.detach(), gradients(model), head


def hooks_of(model):
    return [(m, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
