"""One tiny model of every causal-LM family of the installed transformers, built from its default configuration."""

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

V = 64

# Fields, by what they mean in most configurations. A family where one means something else is in OVERRIDES.
_VALUES = {
    V: """vocab_size vocab_size_per_layer_input unpadded_vocab_size max_position_embeddings n_positions max_seq_len
        n_ctx""",
    32: """hidden_size d_model n_embd dim_model hidden_dim embedding_size emb_dim attention_hidden_size lru_width
        intermediate_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size ffn_dim dff
        n_inner encoder_ffn_dim decoder_ffn_dim dim_ff ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp
        shared_experts_intermediate_size prefix_dense_intermediate_size dense_intermediate_size mamba_d_ssm
        moe_shared_expert_intermediate_size block_ff_dim backbone_hidden_size embedding_dim image_size""",
    16: """index_n_heads kv_lora_rank q_lora_rank o_lora_rank index_head_dim hidden_size_per_layer_input mamba_d_head
        mamba_headdim""",
    8: """head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim global_head_dim swa_head_dim dim_head
        linear_key_head_dim linear_value_head_dim rotary_dim state_size mamba_d_state mamba_chunk_size
        chunk_size sliding_window sliding_window_size attention_window_size window_size laurel_rank mamba_dt_rank
        time_step_rank index_topk
        kv_channels ssm_state_size patch_size d_kv""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts
        n_routed_experts num_local_experts moe_num_experts mamba_n_heads mamba_num_heads n_mamba_heads
        swa_num_attention_heads linear_num_value_heads attention_heads""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads n_head_kv
        num_kv_heads num_global_key_value_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok
        moe_topk top_k_experts moe_k H_cycles L_cycles mamba_n_groups n_groups
        depth""",
    1: """n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace
        num_dense_layers""",
}  # fmt: skip
SMALL: dict[str, Any] = {name: value for value, names in _VALUES.items() for name in names.split()}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1, "is_decoder": True}
SMALL |= {"num_kv_shared_layers": 0, "num_mtp_layers": 0, "num_nextn_predict_layers": 0, "sep_token_id": 2}

_BLT = {"hidden_size_global": 64}
_DOTS3 = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
    "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
_QWEN4 = {
    "head_dim": 16, "hc_lowrank": 8, "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2, "heads_per_ngram": 2, "ple_embed_dim": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_config": _BLT,
        "decoder_config": _BLT,
        "global_config": {"hidden_size": 64},
        "encoder_hash_byte_group_vocab": 100,
        "encoder_hash_byte_group_size": [3, 4],
    },
    "cohere": {"logit_scale": 1.5},
    "cohere2": {"logit_scale": 1.5},
    "cohere2_moe": {"logit_scale": 1.5},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "dots3_note_text": _DOTS3,
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 2},
    "roc_bert": {"shape_embed_dim": 8, "pronunciation_embed_dim": 8, "shape_vocab_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """Model types that AutoModelForCausalLM takes."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def small_config(config_class: Any, **changed: Any) -> Any:
    """The smallest configuration that has every kind of layer of the default one."""
    default = config_class()
    names = {f for f in config_class.__dataclass_fields__ if f not in changed}
    options = {name: SMALL[name] for name in names if name in SMALL}
    if "kv_lora_rank" in names:
        options["num_key_value_heads"] = SMALL["num_attention_heads"]
    kinds = [list(dict.fromkeys(getattr(default, name, None) or ())) for name in ("layer_types", "mlp_layer_types")]
    layers = max(2, *map(len, kinds))
    for name, values in zip(("layer_types", "mlp_layer_types"), kinds, strict=True):
        if name in names and values:
            options[name] = (values * layers)[:layers]
            options["num_hidden_layers"] = layers
    for name, sub_class in config_class.sub_configs.items():
        given = changed.pop(name, {})
        sub = getattr(default, name, None)
        if sub is not None and name not in changed:
            options[name] = small_config(type(sub) if sub_class is AutoConfig else sub_class, **given)
    return config_class(**options | changed)


def model(family: str, seed: int = 0) -> nn.Module:
    """A tiny one with weights drawn wide, in eval mode, in float32."""
    config = small_config(CONFIG_MAPPING[family], **OVERRIDES.get(family, {}))
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1 and p.requires_grad:  # not tables of sinusoids
                p.normal_(0, 0.12)
    return made
