"""A tiny random model of every causal-LM model type of the installed transformers.

The structure of each type's default config is kept: kinds of layers, shared experts, latent attention, sliding
windows, tied weights, biases. Only sizes are reduced, and multipliers whose default is 1 get another value.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 61
LARGEST = 300_000
"""Parameters of the largest tiny model; a config of which one field stayed large is refused before it is built."""

CAUSAL_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

_ENCODER_DECODER = "an encoder-decoder: its decoder reads an encoder's states through cross-attention"
_WRAPPER = "a wrapper: see the image-text table"
_DRAFTER = "a draft model: it reads the hidden states and the keys of another model instead of token ids"
NOT_A_DECODER: dict[str, str] = {
    "bart": _ENCODER_DECODER,
    "bigbird_pegasus": _ENCODER_DECODER,
    "blenderbot": _ENCODER_DECODER,
    "blenderbot-small": _ENCODER_DECODER,
    "marian": _ENCODER_DECODER,
    "mbart": _ENCODER_DECODER,
    "musicgen": _ENCODER_DECODER,
    "musicgen_melody": _ENCODER_DECODER,
    "mvp": _ENCODER_DECODER,
    "pegasus": _ENCODER_DECODER,
    "plbart": _ENCODER_DECODER,
    "prophetnet": _ENCODER_DECODER,
    "trocr": _ENCODER_DECODER,
    "whisper": _ENCODER_DECODER,
    "dots3_note": _WRAPPER,
    "emu3": _WRAPPER,
    "fuyu": _WRAPPER,
    "gemma3": _WRAPPER,
    "gemma3n": _WRAPPER,
    "gemma4": _WRAPPER,
    "gemma4_unified": _WRAPPER,
    "got_ocr2": _WRAPPER,
    "llama4": _WRAPPER,
    "mllama": _WRAPPER,
    "qwen3_5": _WRAPPER,
    "qwen3_5_moe": _WRAPPER,
    "qwen4_exp": _WRAPPER,
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
}

_DECODERS = """
afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam bert bert-generation big_bird biogpt bitnet bloom
blt camembert codegen cohere cohere2 cohere2_moe cohere_compass_text cpmant ctrl cwm data2vec-text dbrx deepseek_v2
deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 dots3_note_text electra ernie ernie4_5 ernie4_5_moe exaone4
exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text
gemma4_unified_text git glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium
hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder
jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text longcat_flash mamba mamba2
megatron-bert mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral
modernbert-decoder moshi moss_transcribe_diarize mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe
openai-gpt opt persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe
qwen3_next qwen4_exp_text recurrent_gemma reformer rembert roberta roberta-prelayernorm roc_bert roformer rwkv
seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod youtu
zamba zamba2 zaya
"""
DECODERS: tuple[str, ...] = tuple(_DECODERS.split())
"""Types of which there is a tiny model, encoders with a causal head included."""

SMALL: dict[str, Any] = {
    # Widths
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "d_model": 24,
    "n_embd": 24,
    "intermediate_size": 40,
    "ffn_dim": 40,
    "ffn_hidden_size": 40,
    "dense_intermediate_size": 40,
    "embedding_size": 20,
    "query_pre_attn_scalar": 10,
    # Positions
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "sliding_window": 5,
    # Layers: `_layers` shortens the lists of kinds
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_hidden_layers": 2,
    # Attention
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "q_lora_rank": 12,
    "kv_lora_rank": 14,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    # Experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 20,
    "shared_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    # State-space and linear-attention mixers
    "mamba_n_heads": 4,
    "mamba_d_head": 12,
    "mamba_d_state": 8,
    "mamba_dt_rank": 3,
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 3,
    "n_groups": 2,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_heads": 4,
    "linear_head_dim": 6,
    # Multipliers: published models do not have the default of 1
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
    # Tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Small values of config fields. A field that is None by default stays None, apart from the width of a head."""

_ROTARY_PART = {"head_dim": 12}
"""Half a head, or a quarter of it, is rotated: the part must be even."""
_ROTARY_PART_OF_HIDDEN = {"hidden_size": 32}
_EXPERT_GROUPS = {"n_group": 2, "topk_group": 1}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
_BLT = {"vocab_size": VOCABULARY, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40} | {
    "max_position_embeddings": 64
}
_PER_LAYER_INPUTS = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 6}
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
}
_INKLING = {"unpadded_vocab_size": VOCABULARY, "d_rel": 6, "rel_extent": 16} | {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 10,
}
_SHARED_TRANSFORMER = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
}

EXTRA: dict[str, dict[str, Any]] = {
    "afmoe": {"mup_enabled": True},
    "aria_text": {"moe_num_experts": 4},
    "axk1": _EXPERT_GROUPS,
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 1, "head_dim": 6},
    "bamba": {"hidden_size": 32, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "beam": _EXPERT_GROUPS,
    "blt": {
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 31,
        "patcher_config": _BLT | {"hidden_size": 24, "sliding_window": 5},
        "encoder_config": _BLT | {"hidden_size": 16, "hidden_size_global": 32, "num_hidden_layers": 1},
        "decoder_config": _BLT | {"hidden_size": 16, "hidden_size_global": 32},
        "global_config": _BLT | {"hidden_size": 32},
        "local_attention_window_len": 5,
    },
    "codegen": {"rotary_dim": 4},
    "cohere2_moe": {"num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": None},
    },
    "cpmant": {"dim_ff": 40, "dim_head": 10, "prompt_types": 3, "prompt_length": 4, "segment_types": 3},
    "ctrl": {"dff": 40},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"hidden_size": 24, "ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_hidden_layers": 2, "num_experts_per_tok": 2},
    "deepseek_v3": _EXPERT_GROUPS,
    "deepseek_v32": _EXPERT_GROUPS,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 12,
        "qk_rope_head_dim": 4,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "o_groups": 2,
        "o_lora_rank": 6,
        "index_topk": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "head_dim": 16,
        "shared_experts_intermediate_size": 20,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 10,
    },
    "falcon_h1": {
        "mamba_d_ssm": 48,
        "lm_head_multiplier": 0.5,
        "mlp_multipliers": [0.9, 0.4],
        "key_multiplier": 0.4,
        "attention_out_multiplier": 0.9,
        "attention_in_multiplier": 1.2,
        "ssm_multipliers": [0.4, 0.25, 0.2, 0.5, 0.3],
        "ssm_in_multiplier": 1.3,
        "ssm_out_multiplier": 0.3,
    },
    "flint": {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "mlp_only_layers": [0]}
    | {"num_hidden_layers": 3},
    "gemma3n_text": _PER_LAYER_INPUTS
    | _SHARED_KEYS
    | {"laurel_rank": 6, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    # Experts of the 26B model with the per-layer inputs and shared keys of the smaller ones.
    "gemma4_text": _PER_LAYER_INPUTS
    | _SHARED_KEYS
    | {"global_head_dim": 16, "use_double_wide_mlp": True}
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "git": {"vision_config": _TOWER | {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4}},
    "glm": _ROTARY_PART,
    "glm4": _ROTARY_PART,
    "glm4_moe": _ROTARY_PART,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gpt_neox": _ROTARY_PART_OF_HIDDEN,
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "helium": {"head_dim": 6},
    "inkling2_text": _INKLING | {"n_layers_per_attn_res_block": 1},
    "inkling_text": _INKLING
    | {"layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"], "mlp_layer_types": ["dense", "sparse", "sparse"]}
    | {"num_hidden_layers": 3, "swa_num_key_value_heads": 4},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "laguna": _ROTARY_PART
    | {"layer_types": ["full_attention", "sliding_attention"], "num_attention_heads_per_layer": [4, 8]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm3": _ROTARY_PART,
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 5},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 4},
    "mamba2": {"head_dim": 12},
    "mellum": {"layer_types": ["sliding_attention", "full_attention"]},
    "mimo_v2_flash": _ROTARY_PART,
    "minicpm3": {"dim_model_base": 16},
    "minimax": {"block_size": 4}
    | {
        f"{branch}_{factor}_factor": value
        for branch in ("full_attn", "linear_attn", "mlp")
        for factor, value in (("alpha", 3.5), ("beta", 0.7))
    },
    "minimax_m3_vl_text": _ROTARY_PART
    | {"layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"]}
    | {"rotary_dim": 6, "index_block_size": 2, "index_topk_blocks": 2},
    "ministral": {"layer_types": ["full_attention", "sliding_attention"]},
    "modernbert-decoder": {"local_attention": 10},
    "moss_transcribe_diarize": {
        "text_config": {"model_type": "qwen3", "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 10}
        | {"num_key_value_heads": 2, "hidden_size": 24, "intermediate_size": 40, "vocab_size": VOCABULARY}
        | {"max_position_embeddings": 64},
        "audio_config": _TOWER | {"num_hidden_layers": 1, "num_mel_bins": 8, "max_source_positions": 16},
    },
    "nemotron": _ROTARY_PART | {"num_key_value_heads": 2},
    "persimmon": _ROTARY_PART_OF_HIDDEN,
    "phi": _ROTARY_PART_OF_HIDDEN,
    "phi4_multimodal": {
        "vision_config": _TOWER | {"num_hidden_layers": 2, "image_size": 8, "crop_size": 8, "patch_size": 4},
        "audio_config": _TOWER
        | {"num_blocks": 2, "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8}
        | {"input_size": 16, "bias_max_distance": 4},
    },
    "qwen4_exp_text": _ROTARY_PART
    | {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}}
    | {"eos_token_id": 2, "hc_lowrank": 6, "ple_layer_ids": [1], "heads_per_ngram": 2, "ngram_vocab_size_base": 20}
    | {"make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2}
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
    | {"indexer_budget": 4, "indexer_compress_ratio": 2},
    "recurrent_gemma": _ROTARY_PART | {"num_hidden_layers": 3, "lru_width": 24},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 10,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (8, 16),
        "feed_forward_size": 40,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "rembert": {"input_embedding_size": 20, "output_embedding_size": 28},
    "roc_bert": {"pronunciation_embed_dim": 6, "pronunciation_vocab_size": 7}
    | {"shape_embed_dim": 8, "shape_vocab_size": 9},
    "stablelm": _ROTARY_PART_OF_HIDDEN,
    "xlm": {"causal": True},
    "xlnet": {"d_inner": 40},
    "xmod": {"default_language": "en_XX"},
    "zamba": _SHARED_TRANSFORMER,
    "zamba2": _SHARED_TRANSFORMER | {"n_mamba_heads": 4, "adapter_rank": 6},
    "zaya": _ROTARY_PART | {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
"""What one model type needs beyond `SMALL`; published values where the default of a config is degenerate."""


def small_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The default config of a model type with small sizes and one layer of each kind."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    fields = {field.name for field in dataclasses.fields(config_class)}
    aliases = getattr(config_class, "attribute_map", {})
    # A field that is named itself wins over another name of it.
    small = {aliases[name]: value for name, value in SMALL.items() if name in aliases}
    small |= {name: value for name, value in SMALL.items() if name in fields}
    values = {name: vars(default).get(aliases.get(name, name)) for name in small}
    small = {name: value for name, value in small.items() if name == "head_dim" or values[name] is not None}
    if "qk_rope_head_dim" in fields:
        small.pop("head_dim", None)  # derived from the rotary part
    if "kv_lora_rank" in fields:
        small["num_key_value_heads"] = small["num_attention_heads"]  # each head has keys and values of its own
    if "is_decoder" in fields:
        small["is_decoder"] = True
    config = config_class(**(small | _layers(default, fields) | EXTRA.get(model_type, {}) | changes))
    config._attn_implementation = config._experts_implementation = "eager"  # grouped_mm knows no float64
    return config


def tiny_causal(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A fresh tiny model of a model type in eval mode, the same one every time.

    In another dtype it is what transformers loads from the float32 checkpoint: some types keep routers, attention
    sinks or decay rates in float32.
    """
    return copy.deepcopy(_model(model_type, dtype, tuple(sorted(changes.items()))))


PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "no_rope_layers")
"""Config fields that hold one entry a layer."""


def _layers(default: PreTrainedConfig, fields: set[str]) -> dict[str, Any]:
    """The per-layer lists of a default config, cut to the first layer of each kind, in order; at least two layers."""
    lists = {name: list(getattr(default, name)) for name in PER_LAYER if name in fields and getattr(default, name)}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
    if not kinds:
        return {}
    kinds = kinds * 2 if len(kinds) == 1 else kinds
    shortened = {name: list(column) for name, column in zip(lists, zip(*kinds, strict=True), strict=True)}
    return shortened | ({"num_hidden_layers": len(kinds)} if "num_hidden_layers" in fields else {})


@cache
def _model(model_type: str, dtype: torch.dtype, changes: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    if dtype != torch.float32:
        with tempfile.TemporaryDirectory() as checkpoint:
            tiny_causal(model_type, **dict(changes)).save_pretrained(checkpoint)
            eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
            return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **eager)
    config = small_config(model_type, **dict(changes))
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters()
    if size > LARGEST:
        raise ValueError(f"the tiny {model_type} has {size} parameters; make it smaller in EXTRA")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(sum(map(ord, model_type)))
        model = AutoModelForCausalLM.from_config(config).eval()
        redraw(model)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # the experts of each token, fixed in the checkpoint
                buffer.copy_(torch.rand(len(buffer), config.n_routed_experts).argsort(-1)[:, : buffer.shape[1]])
    return model


@torch.no_grad()
def redraw(model: PreTrainedModel) -> None:
    """Give every parameter, and every buffer that training changes, a random value that matters for the logits."""
    for name, parameter in model.named_parameters():
        parameter.copy_(_redrawn(name, parameter))
    for name, buffer in model.named_buffers():
        if name.endswith(_LEARNED_BUFFERS):
            buffer.copy_(_redrawn(name, buffer))


_LEARNED_BUFFERS = (
    "e_score_correction_bias",
    "expert_bias",
    "balancing_biases",
    "layer_scalar",
    "rotary_emb.alpha",
)
"""Ends of names of buffers whose values come from training."""
_LOGARITHMS = ("A_log", "dt_proj_bias")
"""Ends of names of matrices that hold logarithms of rates, as vectors do elsewhere."""


def _redrawn(name: str, initial: torch.Tensor) -> torch.Tensor:
    """Random weights large enough that every branch matters; gains and biases away from their defaults.

    Vectors move away from their initial values: a gain stays near one, a gain stored as its distance from one near
    zero, and a decay rate in its domain. Matrices are drawn around zero, or around the value they all start at.
    """
    noise = torch.randn_like(initial)
    if initial.ndim < 2 or initial.numel() == max(initial.shape) or name.endswith(_LOGARITHMS):
        return initial + 0.2 * noise
    first = initial.flatten()[0]
    return torch.where((initial == first).all(), first, 0.0) + 0.3 * noise
