"""Records of the supported language models."""

from __future__ import annotations

from dataclasses import replace

from students.architectures.record import Architecture

LLAMA = Architecture()
_GEMMA = replace(
    LLAMA,
    attn_exit="post_attention_layernorm",
    mlp_exit="post_feedforward_layernorm",
    logit_cap="final_logit_softcapping",
)
_MIXTURE = replace(LLAMA, mlp_in=(), mlp_out=())
_GLM = replace(LLAMA, attn_exit="post_self_attn_layernorm", mlp_exit="post_mlp_layernorm", mlp_in=("gate_up_proj",))

LANGUAGE_MODELS: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "gemma": LLAMA,
    "qwen2_vl_text": LLAMA,
    "qwen2_5_vl_text": LLAMA,
    "qwen3_vl_text": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": replace(_GEMMA, prenorm=False, whole_heads=True, logit_cap=None),
    "phi3": replace(LLAMA, attn_in=("qkv_proj",), mlp_in=("gate_up_proj",)),
    "glm4": _GLM,
    "glm4v_text": _GLM,
    "smollm3": LLAMA,
    "granite": replace(LLAMA, residual_scale="residual_multiplier", logit_divisor="logits_scaling"),
    "cohere2": replace(LLAMA, logit_scale="logit_scale"),
    "mixtral": _MIXTURE,
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "olmoe": replace(_MIXTURE, whole_heads=True),
    "glm4_moe": _MIXTURE,
    "ernie4_5_moe": _MIXTURE,
    "granitemoe": replace(
        _MIXTURE, mlp="block_sparse_moe", residual_scale="residual_multiplier", logit_divisor="logits_scaling"
    ),
    "starcoder2": replace(LLAMA, mlp_in=("c_fc",), mlp_out=("c_proj",)),
    "gpt2": Architecture("h", "attn", "mlp", ("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",), norm="ln_1"),
    "gpt_neox": Architecture(
        "layers", "attention", "mlp", ("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)
    ),
}
"""Records by the config's `model_type`."""
