"""Tiny language models of every supported architecture, a few thousand parameters each, and a tokenizer for them.

With a tokenizer of made-up words, a saved model is a folder on which a whole run takes about a second.
"""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_LLAMA = dict(
    vocab_size=120,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GEMMA = dict(_LLAMA, head_dim=16, sliding_window=6, query_pre_attn_scalar=16)
_CAPS = dict(final_logit_softcapping=3.0, attn_logit_softcapping=5.0)
_SCALED = dict(residual_multiplier=0.5, embedding_multiplier=3.0, attention_multiplier=0.125)
_GPT2 = dict(vocab_size=120, n_embd=32, n_layer=3, n_head=4, n_positions=64)
_NEOX = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
TINY = {
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", dict(_LLAMA, sliding_window=6)),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", dict(_LLAMA, head_dim=16)),
    "gemma2": ("Gemma2Config", dict(_GEMMA, **_CAPS)),
    "gemma3": ("Gemma3TextConfig", dict(_GEMMA, layer_types=["sliding_attention", "full_attention"] * 2)),
    "phi3": ("Phi3Config", _LLAMA),
    "olmo2": ("Olmo2Config", _LLAMA),
    "glm4": ("Glm4Config", dict(_LLAMA, head_dim=8)),
    "smollm3": ("SmolLM3Config", dict(_LLAMA, no_rope_layer_interval=2)),
    "granite": ("GraniteConfig", dict(_LLAMA, **_SCALED, logits_scaling=2.0)),
    "cohere2": ("Cohere2Config", dict(_LLAMA, head_dim=8, sliding_window=6, logit_scale=0.25)),
    "starcoder2": ("Starcoder2Config", dict(_LLAMA, sliding_window=None)),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
}
_TWO = dict(_LLAMA, num_hidden_layers=2)
_WIDE = dict(_TWO, head_dim=16)
_WINDOW = dict(_TWO, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
_GEMMA4 = dict(
    **dict(_WINDOW, head_dim=16, global_head_dim=24, num_global_key_value_heads=1),
    **dict(attention_k_eq_v=True, final_logit_softcapping=3.0),
)
_MIXTURE = dict(_LLAMA, num_experts_per_tok=3)
_ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))
_GRANITE_MOE = dict(_MIXTURE, **_SCALED, num_local_experts=8, logits_scaling=2.0)
_QWEN_MOE = dict(_MIXTURE, num_experts=8, moe_intermediate_size=24)
_ONE_SLIDES = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention", "full_attention"])
_SLIDING_MOE = dict(_QWEN_MOE, **_ONE_SLIDES, head_dim=16)
_ROUTED_MOE = dict(_MIXTURE, n_routed_experts=8, moe_intermediate_size=24)
_RANKS = dict(q_lora_rank=20, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=10, v_head_dim=12)
_LATENT = {**_LLAMA, **_RANKS, "num_key_value_heads": 4}
_LATENT_MOE = dict(
    **{**_ROUTED_MOE, **_LATENT},
    **dict(n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1),
)
TINY_MIXTURES = {
    "mixtral": ("MixtralConfig", dict(_MIXTURE, num_local_experts=8, sliding_window=6)),
    "olmoe": ("OlmoeConfig", dict(_MIXTURE, num_experts=8, clip_qkv=2.0)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(_QWEN_MOE, head_dim=16, decoder_sparse_step=2)),
    "qwen2_moe": ("Qwen2MoeConfig", dict(_QWEN_MOE, shared_expert_intermediate_size=40)),
    "glm4_moe": ("Glm4MoeConfig", dict(_MIXTURE, head_dim=8, n_routed_experts=8, moe_intermediate_size=24)),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", dict(_LLAMA, moe_k=3, moe_num_experts=8, moe_intermediate_size=24)),
    "gpt_oss": ("GptOssConfig", dict(_MIXTURE, num_local_experts=8, head_dim=8, sliding_window=6, **_ROPE)),
    "gemma4_moe": (
        "Gemma4TextConfig",
        dict(
            **dict(_GEMMA4, hidden_size_per_layer_input=0, enable_moe_block=True),
            **dict(num_experts=8, top_k_experts=3, moe_intermediate_size=24),
        ),
    ),
    "granitemoe": ("GraniteMoeConfig", _GRANITE_MOE),
    "granitemoeshared": ("GraniteMoeSharedConfig", dict(_GRANITE_MOE, shared_intermediate_size=48)),
    "granitemoe_swa": ("GraniteMoeSWAConfig", dict(_GRANITE_MOE, **_ONE_SLIDES, shared_intermediate_size=48)),
    "phimoe": (
        "PhimoeConfig",
        dict(_LLAMA, num_local_experts=8, sliding_window=6, router_jitter_noise=0.4, lm_head_bias=True),
    ),
    "minimax_m2": ("MiniMaxM2Config", dict(_MIXTURE, num_local_experts=8, head_dim=16)),
    "exaone_moe": ("ExaoneMoeConfig", dict(_SLIDING_MOE, first_k_dense_replace=1, routed_scaling_factor=1.0)),
    "flex_olmo": ("FlexOlmoConfig", dict(_MIXTURE, num_experts=8)),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", dict(_LLAMA, num_experts=8, moe_topk=3, head_dim=16)),
    "dots1": ("Dots1Config", dict(_ROUTED_MOE, n_shared_experts=1, first_k_dense_replace=1)),
    "afmoe": ("AfmoeConfig", dict(_SLIDING_MOE, num_shared_experts=1, route_scale=0.4)),
    "solar_open": ("SolarOpenConfig", dict(_ROUTED_MOE, head_dim=16)),
    "mellum": ("MellumConfig", _SLIDING_MOE),
    "hy_v3": ("HYV3Config", dict(_QWEN_MOE, head_dim=16, router_scaling_factor=1.0)),
    "cohere2_moe": ("Cohere2MoeConfig", dict(_MIXTURE, num_experts=8, head_dim=16, sliding_window=6, logit_scale=0.25)),
    "deepseek_v2": ("DeepseekV2Config", dict(_LATENT_MOE, topk_method="group_limited_greedy", q_lora_rank=None)),
    "deepseek_v3": ("DeepseekV3Config", dict(_LATENT_MOE, routed_scaling_factor=1.0)),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", dict(_LATENT_MOE, routed_scaling_factor=1.0)),
}
"""Mixtures of experts; some have blocks with a dense MLP, others experts that every token uses."""
_YARN = dict(rope_type="yarn", rope_theta=1e4, factor=16.0, original_max_position_embeddings=4)
MORE = {
    "gemma4": ("Gemma4TextConfig", dict(_GEMMA4, hidden_size_per_layer_input=0)),
    "gemma4_unified": ("Gemma4UnifiedTextConfig", _GEMMA4),
    "ministral": ("MinistralConfig", dict(_WINDOW, head_dim=16)),
    "ministral3": ("Ministral3Config", dict(_WIDE, rope_parameters=dict(_YARN, llama_4_scaling_beta=0.5))),
    "ernie4_5": ("Ernie4_5Config", dict(_WIDE, use_bias=True)),
    "seed_oss": ("SeedOssConfig", dict(_WIDE, attention_out_bias=True)),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", _WIDE),
    "helium": ("HeliumConfig", dict(_TWO, head_dim=8)),
    "internlm3": ("InternLM3Config", dict(_TWO, head_dim=8)),
    "cwm": ("CwmConfig", dict(_WINDOW, head_dim=16)),
    "vaultgemma": ("VaultGemmaConfig", dict(_GEMMA, **_CAPS, num_hidden_layers=2)),
    "olmo": ("OlmoConfig", dict(_TWO, clip_qkv=1.0)),
    "olmo3": ("Olmo3Config", _WINDOW),
    "exaone4": ("Exaone4Config", dict(_WINDOW, head_dim=16)),
    "phi": ("PhiConfig", dict(_TWO, qk_layernorm=True)),
    "glm": ("GlmConfig", dict(_TWO, head_dim=8)),
    "granite_swa": ("GraniteSWAConfig", dict(_WINDOW, **_SCALED, logits_scaling=2.0)),
    "hyperclovax": ("HyperCLOVAXConfig", dict(_WIDE, **_SCALED, logits_scaling=0.5, use_post_norm=True)),
    "cohere": ("CohereConfig", dict(_TWO, logit_scale=0.25, use_qk_norm=True)),
    "stablelm": ("StableLmConfig", dict(_TWO, qk_layernorm=True, use_qkv_bias=True)),
    "nemotron": ("NemotronConfig", _WIDE),
    "arcee": ("ArceeConfig", _WIDE),
    "jais2": ("Jais2Config", dict(_TWO, head_dim=8)),
    "apertus": ("ApertusConfig", dict(_TWO, **_ROPE)),
    "youtu": ("YoutuConfig", dict(_LATENT, num_hidden_layers=2)),
    "nanochat": ("NanoChatConfig", dict(_TWO, final_logit_softcapping=3.0)),
    "gpt_bigcode": ("GPTBigCodeConfig", dict(_GPT2, n_layer=2, bos_token_id=1, eos_token_id=2)),
}
"""Models whose parts are those of models in TINY, put together otherwise: test_architectures.py checks each."""

TINY_FLAT = {
    "opt": (
        "OPTConfig",
        dict(
            **dict(vocab_size=120, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
            **dict(max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        ),
    ),
}
"""Models whose blocks run the linear layers of their MLP themselves."""

_DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6)
_KINDS = ["linear_attention", "full_attention", "linear_attention"]
_SHARED = dict(_QWEN_MOE, **_DELTA, head_dim=16, layer_types=_KINDS, shared_expert_intermediate_size=40)
_MAMBA = dict(
    **dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=6, mamba_n_groups=2),
    **dict(mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=8),
)
_GRANITE4 = dict(_GRANITE_MOE, **_MAMBA, layer_types=_KINDS, shared_intermediate_size=48)
TINY_HYBRIDS = {
    "qwen3_5": ("Qwen3_5TextConfig", dict(_LLAMA, **_DELTA, head_dim=16, layer_types=_KINDS)),
    "olmo_hybrid": ("OlmoHybridConfig", dict(_LLAMA, **_DELTA, layer_types=_KINDS)),
    "granite4": ("GraniteMoeHybridConfig", dict(_GRANITE4, num_local_experts=0)),
    "granite4_moe": ("GraniteMoeHybridConfig", _GRANITE4),
    "bamba": ("BambaConfig", dict(_LLAMA, **_MAMBA, attn_layer_indices=[1])),
    "lfm2": ("Lfm2Config", dict(_LLAMA, layer_types=["conv", "full_attention", "conv"])),
    "lfm2_moe": ("Lfm2MoeConfig", dict(_QWEN_MOE, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1)),
    "qwen3_next": ("Qwen3NextConfig", dict(_SHARED, decoder_sparse_step=2)),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", _SHARED),
}
"""Models of which some blocks have linear attention, Mamba 2 or a short convolution in place of attention."""


def make_tiny(name: str, **overrides: object) -> PreTrainedModel:
    """Return a randomly initialised model whose weights are large enough for every branch to change the logits."""
    kind, settings = (TINY | TINY_MIXTURES | MORE | TINY_FLAT | TINY_HYBRIDS)[name]
    if name == "gemma3":
        settings = dict(settings, num_hidden_layers=4)
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**settings, **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 3):
                parameter.mul_(4)
            elif name in (*MORE, *TINY_FLAT, *TINY_HYBRIDS, "gpt_oss") and not parameter.any():
                parameter.normal_(std=0.3)  # biases and the like, which start at 0
        for block in model.modules():
            if hasattr(block, "layer_scalar"):
                block.layer_scalar.fill_(0.6)
            if hasattr(block, "per_expert_scale"):
                block.scale.mul_(4)
                block.per_expert_scale.uniform_(0.5, 1.5)
    return model


def make_tokenizer(bos: bool = False, template: str | None = None, words: int = 5000) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w0, w1, ..., whose ids start at 3; bos: texts start with <s>."""
    vocabulary = {"<unk>": 0, "</s>": 1, "<s>": 2, **{f"w{i}": i + 3 for i in range(words)}}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    if bos:
        model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", eos_token="</s>", bos_token="<s>", chat_template=template
    )


RUN_SETTINGS = [
    *("data.window=32", "data.held_out=2", "calibration.windows=4"),
    *("train.window=16", "train.steps=6", "train.batch=2", "train.precision=float32"),
    *("train.log_every=1", "train.save_every=2", "train.warmup=2"),
]
"""Settings under which a run on a tiny model takes about a second."""
