"""A tiny random model of every image-text-to-text type of the installed transformers.

Each has the structure of the published models: every kind of layer, grouped heads, routed and shared experts, shared
key-value layers, rotary sections. Special image, video and audio tokens lie above id 60, so that `tests.tiny.ids`
never produces one.
"""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig

WORDS = 61
"""Token ids below this are ordinary; the special tokens of a wrapper follow."""
LARGEST = 400_000
"""Parameters a tiny model may have. Default configurations have up to a thousand billion."""

WRAPPER_TYPES: tuple[str, ...] = tuple(sorted(CLASSES))

_NEEDS_AN_IMAGE = "it does not run without an image"
NOT_A_DECODER: dict[str, str] = {
    "blip": "it does not run without an image: each layer of its BERT decoder attends to it",
    "blip-2": _NEEDS_AN_IMAGE,
    "diffusion_gemma": "it denoises blocks of tokens by diffusion instead of predicting the next token",
    "florence2": "its text model is an encoder-decoder (BART)",
    "idefics": _NEEDS_AN_IMAGE,
    "instructblip": _NEEDS_AN_IMAGE,
    "instructblipvideo": "it does not run without a video",
    "kosmos-2": _NEEDS_AN_IMAGE,
    "pi0": "it predicts the actions of a robot by flow matching and has no logits over tokens",
    "pix2struct": "it is an encoder-decoder that reads image patches only",
    "pp_formulanet": "it is an encoder-decoder that reads images only (MBART decoder)",
    "t5gemma2": "it is an encoder-decoder (T5Gemma 2)",
    "udop": "it is an encoder-decoder (T5 with page layout)",
    "vision-encoder-decoder": "it is an encoder-decoder of any image encoder and any decoder with cross-attention",
}

# Fields of text decoders. A value is used where the configuration of a type has the field.
_TEXT: dict[str, Any] = {
    "hidden_size": 24,
    "embed_dim": 24,
    "intermediate_size": 40,
    "ffn_dim": 40,
    "word_embed_proj_dim": 24,
    "num_hidden_layers": 2,
    "layers": 2,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "initializer_range": 0.02,
}
# Fields of image, video and audio encoders and of what connects them with the decoder.
_SIDE: dict[str, Any] = {
    "hidden_size": 16,
    "d_model": 16,
    "embed_dim": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "encoder_layers": 1,
    "n_layers": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "encoder_ffn_dim": 24,
    "mlp_dim": 24,
    "image_size": 32,
    "patch_size": 16,
    "out_hidden_size": 24,
    "text_hidden_size": 24,
    "output_dim": 24,
    "projection_dim": 16,
    "encoder_hidden_size": 16,
    "vocab_size": WORDS,
    "num_position_embeddings": 4,
    "max_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}


def _rope(theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | more


def _layers(*kinds: str, **more: Any) -> dict[str, Any]:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds)} | more


_WINDOWED = _layers("sliding_attention", "full_attention", sliding_window=4)
_GLOBAL_AND_LOCAL = {
    "sliding_attention": _rope(),
    "full_attention": _rope(1_000_000.0, rope_type="proportional", partial_rotary_factor=0.5),
}
_DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_RELATIVE = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 4,
    "d_rel": 4,
    "rel_extent": 16,
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_HYBRID = _layers(
    "linear_attention",
    "full_attention",
    head_dim=16,
    rope_parameters=_rope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True),
)
_INTERLEAVED = {"rope_parameters": _rope(mrope_section=[2, 1, 1], mrope_interleaved=True)}
_SECTIONS = {"rope_parameters": _rope(mrope_section=[1, 1, 1])}
_HALF_ROTARY = {
    "head_dim": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": _rope(mrope_section=[1, 1, 1], partial_rotary_factor=0.5),
}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}
# What differs by the type of a text decoder.
_DECODERS: dict[str, dict[str, Any]] = {
    "aria_text": {"intermediate_size": 16},
    "cohere2": _WINDOWED,
    "cohere_compass_text": _WINDOWED
    | {"rope_parameters": {"sliding_attention": _rope(mrope_section=[2, 1, 1]), "full_attention": None}},
    "cosmos3_edge_text": {"rope_parameters": _rope(mrope_section=[2, 1, 1])},
    "deepseek_ocr2_text": _DENSE_THEN_SPARSE,
    "deepseek_v3": _LATENT | {"n_group": 2, "topk_group": 1},
    "dots3_note_text": _layers(
        "indexed_attention",
        "sliding_attention",
        sliding_window=4,
        num_key_value_heads=4,
        head_dim=10,
        swa_num_attention_heads=2,
        swa_num_key_value_heads=2,
        swa_q_lora_rank=14,
        swa_kv_lora_rank=10,
        swa_head_dim=10,
        swa_qk_nope_head_dim=6,
        swa_v_head_dim=8,
        shared_experts_intermediate_size=16,
        **_DENSE_THEN_SPARSE,
    ),
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 12], "rope_parameters": _rope(mrope_section=[1, 1, 1])}
    | _DENSE_THEN_SPARSE,
    "exaone4": _WINDOWED,
    "gemma3_text": _WINDOWED,
    "gemma3n_text": _layers(
        *("sliding_attention", "full_attention") * 2,
        sliding_window=4,
        intermediate_size=[40] * 4,
        activation_sparsity_pattern=[0.5, 0.0, 0.5, 0.0],
        hidden_size_per_layer_input=6,
        num_kv_shared_layers=2,
        altup_num_inputs=3,
        laurel_rank=5,
    ),
    "gemma4_text": _layers(
        *("sliding_attention", "full_attention") * 2,
        sliding_window=4,
        hidden_size_per_layer_input=6,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        global_head_dim=12,
        rope_parameters=_GLOBAL_AND_LOCAL,
    ),
    "gemma4_unified_text": _WINDOWED
    | {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "global_head_dim": 12,
        "rope_parameters": _GLOBAL_AND_LOCAL,
    },
    "glm4v_text": _HALF_ROTARY,
    "glm4v_moe_text": _HALF_ROTARY,
    "glm5_next_text": _layers(
        "linear_attention",
        "indexed_attention",
        num_key_value_heads=4,
        qk_rope_head_dim=0,
        linear_head_dim=8,
        linear_num_heads=3,
        index_kpool=2,
        hc_mult=2,
        hc_sinkhorn_iters=4,
        **_DENSE_THEN_SPARSE,
    ),
    "glm_ocr_text": {"rope_parameters": _rope(mrope_section=[1, 1, 1])},
    "granite4_vision_text": _MULTIPLIERS,
    "hunyuan_vl_text": {"rope_parameters": _rope(mrope_section=[1, 1, 1, 1])},
    "hyperclovax": _MULTIPLIERS,
    "inkling2_text": _layers("hybrid_sliding", "hybrid", **_RELATIVE, n_layers_per_attn_res_block=1),
    "inkling_text": _layers("hybrid_sliding", "hybrid", **_RELATIVE, **_DENSE_THEN_SPARSE),
    "lfm2": _layers("conv", "full_attention", block_multiple_of=8),
    "lfm3": _layers(
        "conv",
        "sliding_attention",
        "full_attention",
        sliding_window=4,
        conv_L_cache=3,
        rope_parameters=_GLOBAL_AND_LOCAL,
    ),
    "llama4_text": _layers(
        "chunked_attention",
        "full_attention",
        no_rope_layers=[1, 0],
        moe_layers=[1],
        intermediate_size=16,
        intermediate_size_mlp=40,
        attention_chunk_size=8,
        floor_scale=4,
    ),
    "minimax_m3_vl_text": _layers(
        "full_attention",
        "minimax_m3_sparse",
        intermediate_size=16,
        dense_intermediate_size=40,
        shared_intermediate_size=20,
        rotary_dim=4,
        index_block_size=4,
        index_topk_blocks=2,
        **_DENSE_THEN_SPARSE,
    ),
    "mistral_large4_text": _LATENT
    | {
        "no_rope_layers": [1, 0],
        "rope_parameters": _rope(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=32.0,
            beta_slow=1.0,
            attention_factor=1.0,
        ),
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "molmo2_text": {"additional_vocab_size": 5},
    "muse_glimmer_text": _WINDOWED | {"layer_rope_theta": [10_000.0, 0]},
    "muse_spark_text": _WINDOWED | {"layer_rope_theta": [10_000.0, 0], "moe_hidden_size": 16} | _DENSE_THEN_SPARSE,
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
        "ssm_state_size": 6,
        "mamba_num_heads": 4,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "chunk_size": 4,
        "moe_shared_expert_intermediate_size": 20,
    },
    "paddleocr_vl_text": {"rope_parameters": _rope(mrope_section=[2, 1, 1])},
    "persimmon": {"num_attention_heads": 3},
    "qwen2_5_omni_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_omni_moe_text": _INTERLEAVED,
    "qwen3_vl_moe_text": _INTERLEAVED,
    "qwen3_vl_text": _INTERLEAVED,
    "qwen4_exp_text": _HYBRID
    | _layers(
        "linear_attention",
        "indexed_attention",
        hc_count=2,
        hc_lowrank=4,
        ple_layer_ids=[1],
        ple_embed_dim=8,
        heads_per_ngram=2,
        ngram_vocab_size_base=16,
        make_ngram_vocab_size_divisible_by=1,
        split_ngram_parts=1,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=4,
        indexer_compress_ratio=2,
    ),
    "step3p5": _layers(
        "full_attention", "sliding_attention", sliding_window=4, num_sliding_attention_heads=6, share_expert_dim=20
    )
    | _DENSE_THEN_SPARSE,
    "unlimited_ocr_text": _layers(*["reference_sliding_attention"] * 2, sliding_window=4, num_key_value_heads=4)
    | _DENSE_THEN_SPARSE,
}
# What differs by the type of an encoder.
_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 8,
    "num_embeddings": 8,
}
_SAM = {"output_channels": 16, "global_attn_indexes": [0], "window_size": 2, "downsample_channels": [16, 16]}
_SIDES: dict[str, dict[str, Any]] = {
    "chameleon_vqgan": _VQ | {"resolution": 32},
    "dots3_note_audio_encoder": {"downsample_hidden_size": 8, "adapter_input_size": 16, "adapter_out_dim": 24},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 16,
        "adapter_out_dim": 24,
        "mlp_layer_types": ["sparse"],
        "num_local_experts": 4,
        "moe_intermediate_size": 12,
        "per_layer_config": {},
    },
    "emu3_vqgan": _VQ | {"codebook_size": 8, "embed_dim": 4, "latent_channels": 4, "attn_resolutions": [1]},
    "blip_2_qformer": {"cross_attention_frequency": 1},
    "gemma3n_audio": {"vocab_offset": WORDS + 3, "vocab_size": 3, "conf_num_hidden_layers": 1},
    "gemma3n_vision": {"vocab_offset": WORDS, "vocab_size": 3},
    "glm5_next_vision": {"projection_intermediate_size": 16},
    "got_ocr2_vision": _SAM,
    "idefics2_perceiver": {"hidden_size": 24, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8},
    "inkling_audio": {"n_mel_bins": 4, "mel_vocab_size": 8},
    "inkling2_vision": {"projection_hidden_dim": 16, "posemb_grid_size": 4},
    "janus_vqgan": _VQ | {"embed_dim": 8, "image_token_embed_dim": 24, "projection_dim": 24, "num_patches": 2},
    "janus_vision_model": {"projection_dim": 24, "depth": 2},
    "llama4_vision_model": {
        "intermediate_size": 64,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    },
    "mllama_vision_model": {"num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 32},
    "molmo2_adapter": {"vision_feature_layer": [-1, -1]},
    "molmo2_vision": {"image_size": [32, 32]},
    "muse_glimmer_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "muse_spark_audio": {
        "patch_sizes": [4, 2],
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "out_hidden_size": 24,
    },
    "muse_spark_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "pp_chart2table_vision": _SAM,
    "qwen3_omni_moe_audio_encoder": {"downsample_hidden_size": 8},
    "radio": {"video_temporal_patch_size": 2},
    "sam_vision_model": _SAM,
}
# The published ones have an encoder of timm, which needs torchvision; the class accepts every type of encoder.
_IMAGE_ENCODER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 16,
}
# What differs by the type of a wrapper.
_WRAPPERS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": WORDS}},
    "cosmos3_edge": {"projector_hidden_size": 16},
    "cohere2_vision": {"alignment_intermediate_size": 32},
    "deepseek_ocr2": {"vision_config": {"sam_config": _SAM}},
    "emu3": {"vocabulary_map": {"<image>": WORDS}},
    "evolla": {"aligner_num_add_layers": 1, "resampler_depth": 1, "resampler_dim_head": 8, "resampler_heads": 2},
    "fast_vlm": {"vision_config": _IMAGE_ENCODER},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},  # one head of the Q-former for each 64 columns
    },
    "kimi_k25": {"projection_hidden_size": 16},
    "kosmos-2.5": {"latent_query_num": 4},
    "lfm2_vl": {"projector_hidden_size": 24},
    "lfm3_vl": {"projector_hidden_size": 24},
    "minimax_m3_vl": {"projector_hidden_size": 24, "merged_hidden_size": 24},
    "mistral4": {"num_key_value_heads": 4},
    "muse_glimmer": {"out_hidden_size": 16, "projector_hidden_size": 16},
    "muse_spark": {"out_hidden_size": 16, "projector_hidden_size": 16},
    "perception_lm": {"vision_config": _IMAGE_ENCODER | {"model_args": {"embed_dim": 16}}},
    "nemotron_h_omni": {"projector_hidden_size": 16, "vision_hidden_size": 16},
    "unlimited_ocr": {"vision_config": {"sam_config": _SAM}},
}


class ImageEncoderWithoutTimm(PreTrainedModel):
    """Stands in for the image encoder of Gemma 3n, which exists only in timm and needs torchvision."""

    config_class = Gemma3nVisionConfig

    def __init__(self, config: Gemma3nVisionConfig) -> None:
        super().__init__(config)
        self.patches = torch.nn.Linear(3, config.hidden_size)
        self.post_init()


AutoModel.register(Gemma3nVisionConfig, ImageEncoderWithoutTimm, exist_ok=True)


def small_config(model_type: str) -> PreTrainedConfig:
    """A configuration with a tiny decoder and tiny encoders, and the structure of the published models."""
    config_class = CONFIG_MAPPING[model_type]
    changes = _WRAPPERS.get(model_type, {})
    names = _special_tokens(config_class())
    size = WORDS + len(names)
    values = _fields(config_class, _TEXT | {"vocab_size": size, "vocab_size_per_layer_input": size})
    for position, name in enumerate(names):
        values[name] = WORDS + position
    config = config_class(**_merged(values, changes))
    for part in (config, *_parts(config)):
        part._attn_implementation = part._experts_implementation = "eager"  # grouped_mm knows no float64
    return config


def tiny_wrapper(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh tiny model of a type, the same one every time; it runs on token ids alone."""
    model = copy.deepcopy(_model(model_type))
    for parameter in model.parameters():
        # Buffers keep their dtype, as they do when a checkpoint is loaded: rotary frequencies stay float32.
        parameter.data = parameter.data.to(dtype)
    for part in (model.config, *_parts(model.config)):
        part.dtype = dtype
    return model


def _fields(config_class: type[PreTrainedConfig], table: dict[str, Any]) -> dict[str, Any]:
    default = config_class()
    known = default.to_dict().keys() | vars(default).keys() | config_class.attribute_map.keys()
    values = {name: value for name, value in table.items() if name in known}
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if not isinstance(part, PreTrainedConfig):
            continue
        text = table is not _SIDE and "text" in name
        special = (_DECODERS if text else _SIDES).get(part.model_type, {})
        values[name] = _merged(_fields(type(part), table if text else _SIDE), special) | {"model_type": part.model_type}
    return values


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for name, change in changes.items():
        old = result.get(name)
        nested = isinstance(change, dict) and isinstance(old, dict) and name.endswith("_config")
        result[name] = _merged(old, change) if nested else change
    return result


def _special_tokens(config: PreTrainedConfig) -> list[str]:
    ordinary = {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}
    values = config.to_dict()
    return sorted(
        name
        for name in values
        if re.search(r"_token_(id|index)$", name) and name not in ordinary and not isinstance(values[name], list)
    )


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    found = []
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            found += [part, *_parts(part)]
    return found


@cache
def _model(model_type: str) -> PreTrainedModel:
    model_class = getattr(transformers, CLASSES[model_type])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class._from_config(small_config(model_type)).parameters())
    if size > LARGEST:
        raise ValueError(f"{model_type} has {size} parameters, at most {LARGEST} are tiny: make more fields small")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, model_type)))
        model = model_class._from_config(small_config(model_type)).eval()
        for name, parameter in model.named_parameters():
            _redraw(name, parameter)
    return model


@torch.no_grad()
def _redraw(name: str, parameter: torch.Tensor) -> None:
    """Weights large enough that every branch matters; gains and biases away from their defaults."""
    if name.endswith(("A_log", "dt_bias")):  # decay rates and time steps of state-space layers
        return
    # A gain that starts at 0 multiplies by 1 + gain, as those of Gemma do.
    start = 1.0 if ("norm" in name or ".ln_" in name) and bool((parameter == 1).all()) else 0.0
    parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2) + start)
