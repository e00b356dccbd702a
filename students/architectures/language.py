"""Records of the supported language models."""

from __future__ import annotations

from dataclasses import replace

from students.architectures.record import Architecture

LLAMA = Architecture()
_CAPPED = replace(LLAMA, logit_cap="final_logit_softcapping")
_GEMMA = replace(_CAPPED, attn_exit="post_attention_layernorm", mlp_exit="post_feedforward_layernorm")
_EXAONE = replace(_GEMMA, prenorm=False, logit_cap=None)
_OLMO = replace(_EXAONE, whole_heads=True)
_K_IS_V = replace(_GEMMA, block_scale="layer_scalar", attn_in=("q_proj", "k_proj"), beside=("router", "experts"))
_GEMMA4 = replace(
    _K_IS_V,
    attn_in=LLAMA.attn_in,
    hybrid=_K_IS_V,
    without=("hidden_size_per_layer_input", "num_kv_shared_layers"),
)
_GLM = replace(LLAMA, mlp_in=("gate_up_proj",))
_GLM4 = replace(_GLM, attn_exit="post_self_attn_layernorm", mlp_exit="post_mlp_layernorm")
_GRANITE = replace(LLAMA, residual_scale="residual_multiplier", logit_divisor="logits_scaling")
_GRANITE_SHARED = replace(
    _GRANITE,
    mlp="shared_mlp",
    mlp_in=("input_linear",),
    mlp_out=("output_linear",),
    beside=("block_sparse_moe.router", "block_sparse_moe.experts"),
)
_COHERE = replace(LLAMA, logit_scale="logit_scale")
_UNGATED = replace(LLAMA, mlp_in=("up_proj",))
_GPT2 = Architecture("h", "attn", "mlp", ("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",), norm="ln_1")
_MIXTURE = replace(LLAMA, mlp_in=(), mlp_out=())
_LINEAR = replace(LLAMA, attn="linear_attn", attn_in=(), attn_out=())
_QWEN_HYBRID = replace(LLAMA, whole_heads=True, hybrid=_LINEAR)  # q_proj gives each head's query and output gate
_MIXTURE_HYBRID = replace(_MIXTURE, whole_heads=True, hybrid=replace(_LINEAR, mlp_in=(), mlp_out=()))
_LATENT = replace(LLAMA, attn_in=("q_a_proj", "kv_a_proj_with_mqa"), expand=("q_b_proj", "kv_b_proj"), whole_heads=True)
_LATENT_MIXTURE = replace(_LATENT, mlp_in=(), mlp_out=())
_BAMBA = replace(LLAMA, mlp="feed_forward")
_LFM2 = Architecture(
    *("layers", "self_attn", "feed_forward"),
    attn_out=("out_proj",),
    mlp_in=("w1", "w3"),
    mlp_out=("w2",),
    activation=None,
    norm="operator_norm",
)
_LFM2_MOE = replace(_LFM2, mlp_in=(), mlp_out=())

LANGUAGE_MODELS: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "gemma": LLAMA,
    "qwen2_vl_text": LLAMA,
    "qwen2_5_vl_text": LLAMA,
    "qwen3_vl_text": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_5_text": _QWEN_HYBRID,
    "olmo_hybrid": replace(_OLMO, hybrid=_LINEAR),
    "granitemoehybrid": replace(
        _GRANITE_SHARED, hybrid=replace(_GRANITE_SHARED, attn="mamba", attn_in=(), attn_out=())
    ),
    "bamba": replace(_BAMBA, hybrid=replace(_BAMBA, attn="mamba", attn_in=(), attn_out=())),
    "lfm2": replace(_LFM2, hybrid=replace(_LFM2, attn="conv", attn_in=(), attn_out=())),
    "lfm2_moe": replace(_LFM2_MOE, hybrid=replace(_LFM2_MOE, attn="conv", attn_in=(), attn_out=())),
    "ministral": LLAMA,
    "ministral3": LLAMA,
    "smollm3": LLAMA,
    "ernie4_5": LLAMA,
    "seed_oss": LLAMA,
    "hunyuan_v1_dense": LLAMA,
    "helium": LLAMA,
    "internlm3": LLAMA,
    "cwm": LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "vaultgemma": _CAPPED,
    "olmo": LLAMA,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "exaone4": _EXAONE,
    "phi": replace(LLAMA, attn_out=("dense",), mlp_in=("fc1",), mlp_out=("fc2",)),
    "phi3": replace(LLAMA, attn_in=("qkv_proj",), mlp_in=("gate_up_proj",)),
    "glm": _GLM,
    "glm4": _GLM4,
    "glm4v_text": _GLM4,
    "granite": _GRANITE,
    "granite_swa": replace(_GRANITE, whole_heads=True),
    "hyperclovax": replace(
        _GRANITE, attn_exit="post_norm1", mlp_exit="post_norm2", logit_scale="logits_scaling", logit_divisor=None
    ),
    "cohere": replace(_COHERE, whole_heads=True),
    "cohere2": _COHERE,
    "stablelm": replace(LLAMA, whole_heads=True),
    "nemotron": _UNGATED,
    "arcee": _UNGATED,
    "jais2": _UNGATED,
    "apertus": replace(_UNGATED, norm="attention_layernorm"),
    "nanochat": replace(_CAPPED, mlp_in=("fc1",), mlp_out=("fc2",)),
    "mixtral": _MIXTURE,
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "qwen3_vl_moe_text": _MIXTURE,
    "olmoe": replace(_MIXTURE, whole_heads=True),
    "qwen3_next": _MIXTURE_HYBRID,
    "qwen3_5_moe_text": _MIXTURE_HYBRID,
    "glm4_moe": _MIXTURE,
    "glm4v_moe_text": _MIXTURE,
    "phimoe": _MIXTURE,
    "minimax_m2": replace(_MIXTURE, whole_heads=True),
    "exaone_moe": _MIXTURE,
    "flex_olmo": replace(_OLMO, mlp_in=(), mlp_out=()),
    "hunyuan_v1_moe": _MIXTURE,
    "dots1": _MIXTURE,
    "afmoe": replace(  # its attention has a gate on the output, which reads what queries read
        _MIXTURE,
        attn_in=(*LLAMA.attn_in, "gate_proj"),
        attn_exit="post_attention_layernorm",
        mlp_exit="post_mlp_layernorm",
        whole_heads=True,
    ),
    "solar_open": _MIXTURE,
    "mellum": _MIXTURE,
    "hy_v3": _MIXTURE,
    "cohere2_moe": replace(_MIXTURE, logit_scale="logit_scale"),
    "ernie4_5_moe": _MIXTURE,
    "gpt_oss": replace(_MIXTURE, mlp_pair=True, whole_heads=True),
    "granitemoe": replace(_GRANITE, mlp="block_sparse_moe", mlp_in=(), mlp_out=()),
    "granitemoeshared": _GRANITE_SHARED,
    "granitemoe_swa": replace(_GRANITE_SHARED, whole_heads=True),
    "deepseek_v2": _LATENT_MIXTURE,
    "deepseek_v3": _LATENT_MIXTURE,
    "glm4_moe_lite": _LATENT_MIXTURE,
    "youtu": _LATENT,
    "starcoder2": replace(LLAMA, mlp_in=("c_fc",), mlp_out=("c_proj",)),
    "gpt_bigcode": _GPT2,
    "gpt2": _GPT2,
    "opt": Architecture(
        *("layers", "self_attn", ""),
        attn_out=("out_proj",),
        mlp_in=("fc1",),
        mlp_out=("fc2",),
        norm="self_attn_layer_norm",
        whole_heads=True,
    ),
    "gpt_neox": Architecture(
        "layers", "attention", "mlp", ("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)
    ),
}
"""Records by the config's `model_type`."""
