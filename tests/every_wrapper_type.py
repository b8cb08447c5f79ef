"""A tiny random model of every image-text-to-text type of the installed transformers.

The text decoder is the tiny one of tests/every_causal_type.py: the structure of the type's default config with small
sizes. Image, video and audio encoders have one layer. The special tokens of a wrapper lie above the ids that
`tests.tiny.ids` produces.
"""

from __future__ import annotations

import copy
import re
import tempfile
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig

from tests import every_causal_type
from tests.every_causal_type import VOCABULARY, redraw

LARGEST = 400_000
"""Parameters of the largest tiny model; a config of which one field stayed large is refused before it is built."""

WRAPPER_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))

_NEEDS_AN_IMAGE = "it does not run without an image"
NOT_A_DECODER: dict[str, str] = {
    "blip": "it does not run without an image: each layer of its BERT decoder attends to it",
    "blip-2": _NEEDS_AN_IMAGE,
    "diffusion_gemma": "it denoises blocks of tokens by diffusion instead of predicting the next token",
    "florence2": "it is an encoder-decoder (BART)",
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

_WIDTH = every_causal_type.SMALL["hidden_size"]


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0} | more


# Three sections of the rotary part of a head, for time, height and width: half of its 10 or 6 or 12 columns.
_SECTIONS = {"rope_parameters": _rope(mrope_section=[2, 2, 1])}
_INTERLEAVED = {"rope_parameters": _rope(mrope_section=[2, 2, 1], mrope_interleaved=True)}
_SECTIONS_OF_6 = {"rope_parameters": _rope(mrope_section=[1, 1, 1])}
_SECTIONS_OF_HALF = {
    "head_dim": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": _rope(mrope_section=[1, 1, 1], partial_rotary_factor=0.5),
}
_LINEAR_AND_FULL = {
    "head_dim": 12,
    "rope_parameters": _rope(mrope_section=[1, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5),
}
_WINDOWED = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
_DENSE_THEN_SPARSE = {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]}

DECODERS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "head_dim": 10,
        "rope_parameters": {"sliding_attention": _rope(mrope_section=[2, 2, 1]), "full_attention": None},
    },
    "cosmos3_edge_text": _SECTIONS,
    "deepseek_ocr2_text": _DENSE_THEN_SPARSE | {"num_experts_per_tok": 2},
    "ernie4_5_vl_moe_text": _SECTIONS_OF_6
    | _DENSE_THEN_SPARSE
    | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 12]},  # text and image experts
    "gemma4_unified_text": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "glm4v_moe_text": _SECTIONS_OF_HALF,
    "glm4v_text": _SECTIONS_OF_HALF,
    "glm5_next_text": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "indexed_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "indexer_types": ["full", "full"],
        "qk_rope_head_dim": 0,
        "linear_num_heads": 3,
        "index_kpool": 2,
        "hc_mult": 2,
    },
    "glm_ocr_text": _SECTIONS_OF_6,
    "hunyuan_vl_text": {"rope_parameters": _rope(mrope_section=[1, 2, 1, 1])},
    "mistral_large4_text": {
        "num_hidden_layers": 2,
        "layer_types": ["indexed_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
        "indexer_types": ["full", "full"],
        "no_rope_layers": [1, 0],
        "rope_parameters": _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "molmo2_text": {"additional_vocab_size": 5},
    "muse_spark_text": {"mlp_layer_types": ["dense", "sparse"], "moe_hidden_size": 16},
    "paddleocr_vl_text": _SECTIONS,
    "persimmon": {"hidden_size": _WIDTH, "num_attention_heads": 3},
    "qwen2_5_omni_text": _SECTIONS_OF_6,
    "qwen2_5_vl_text": _SECTIONS_OF_6,
    "qwen2_vl_text": _SECTIONS_OF_6,
    "qwen3_5_moe_text": _LINEAR_AND_FULL,
    "qwen3_5_text": _LINEAR_AND_FULL,
    "qwen3_omni_moe_text": _INTERLEAVED,
    "qwen3_vl_moe_text": _INTERLEAVED,
    "qwen3_vl_text": _INTERLEAVED,
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 5,
        "num_sliding_attention_heads": 6,
        "share_expert_dim": 20,
    },
    "unlimited_ocr_text": {"num_key_value_heads": 4},
}
"""What a text decoder needs beyond tests/every_causal_type.py: published values whose default is degenerate."""

_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
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
    "max_position_embeddings": 64,
    "num_position_embeddings": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "encoder_hidden_size": 16,
    "projection_dim": _WIDTH,
    "output_dim": _WIDTH,
    "out_hidden_size": _WIDTH,
    "text_hidden_size": _WIDTH,
    "adapter_out_dim": _WIDTH,
}
"""Small values of the config fields of image, video and audio encoders."""

_CONNECTOR: dict[str, Any] = {
    "hidden_size": _WIDTH,
    "projection_dim": _WIDTH,
    "out_hidden_size": 16,
    "vision_hidden_size": 16,
    "projection_hidden_size": 16,
    "projector_hidden_size": 16,
    "merged_hidden_size": 16,
    "alignment_intermediate_size": 16,
    "latent_query_num": 4,
}
"""Small values of the config fields of wrappers themselves."""

_VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 8}
_SAM = {"output_channels": 16, "global_attn_indexes": [0], "window_size": 2, "downsample_channels": [16, 16]}
_ENCODERS: dict[str, dict[str, Any]] = {
    "blip_2_qformer": {"cross_attention_frequency": 1},
    "chameleon_vqgan": _VQ | {"resolution": 32, "num_embeddings": 8},
    "dots3_note_audio_encoder": {"downsample_hidden_size": 8, "adapter_input_size": 16},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 16,
        "mlp_layer_types": ["sparse"],
        "num_local_experts": 4,
        "moe_intermediate_size": 12,
        "per_layer_config": {},
    },
    "emu3_vqgan": _VQ | {"codebook_size": 8, "embed_dim": 4, "latent_channels": 4, "attn_resolutions": [1]},
    "gemma3n_audio": {"vocab_offset": VOCABULARY + 3, "vocab_size": 3, "conf_num_hidden_layers": 1},
    "gemma3n_vision": {"vocab_offset": VOCABULARY, "vocab_size": 3},
    "gemma4_audio": {"subsampling_conv_channels": [4, 4], "output_proj_dims": 16},
    "gemma4_unified_audio": {"audio_embed_dim": 16},
    "gemma4_unified_vision": {"mm_embed_dim": 16, "mm_posemb_size": 4, "output_proj_dims": 16},
    "gemma4_vision": {"position_embedding_size": 4},
    "glm5_next_vision": {"projection_intermediate_size": 16},
    "got_ocr2_vision": _SAM,
    "hunyuan_vl_vision": {"max_vit_seq_len": 16, "img_max_token_num": 4, "max_image_size": 64, "min_image_size": 32},
    "idefics2_perceiver": {"hidden_size": _WIDTH, "resampler_n_latents": 4, "resampler_depth": 1}
    | {"resampler_n_heads": 2, "resampler_head_dim": 8},
    "inkling2_vision": {"projection_hidden_dim": 16, "posemb_grid_size": 4},
    "inkling_audio": {"n_mel_bins": 4, "mel_vocab_size": 8},
    "janus_vision_model": {"depth": 2},
    "janus_vqgan": _VQ | {"num_embeddings": 8, "embed_dim": 8, "image_token_embed_dim": _WIDTH, "num_patches": 2},
    "kosmos_2_5_vision_model": {"max_num_patches": 16},
    "llama4_vision_model": {
        "intermediate_size": 64,  # four patches become one
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    },
    "mllama_vision_model": {"num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 32},
    "molmo2_adapter": {"vision_feature_layer": [-1, -1]},
    "molmo2_vision": {"image_size": [32, 32]},
    "muse_spark_audio": {"patch_sizes": [4, 2], "hidden_sizes": [8, 8], "depths": [1, 1], "num_hidden_layers": 2},
    "pp_chart2table_vision": _SAM,
    "qwen3_omni_moe_audio_encoder": {"downsample_hidden_size": 8},
    "radio": {"video_temporal_patch_size": 2, "max_img_size": 32},
    "sam_vision_model": _SAM,
}
"""What an encoder needs beyond `_ENCODER`."""

_SIGLIP = {"model_type": "siglip_vision_model"} | {
    name: _ENCODER[name]
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
}
_WRAPPERS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": VOCABULARY}},
    "deepseek_ocr2": {"vision_config": {"sam_config": _SAM}},
    "emu3": {"vocabulary_map": {"<image>": VOCABULARY}},
    "evolla": {"aligner_num_add_layers": 1, "resampler_depth": 1, "resampler_dim_head": 8, "resampler_heads": 2},
    # Published ones use encoders of timm, which needs torchvision; the wrapper accepts every type of encoder.
    "fast_vlm": {"vision_config": _SIGLIP},
    "perception_lm": {"vision_config": _SIGLIP | {"model_args": {"embed_dim": 16}}},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},  # one head of the Q-former for each 64 columns
    },
    "unlimited_ocr": {"vision_config": {"sam_config": _SAM}},
}
"""What a wrapper needs beyond `_CONNECTOR` and its parts."""


class ImageEncoderWithoutTimm(PreTrainedModel):
    """Stands in for the image encoder of Gemma 3n, which exists only in timm and needs torchvision."""

    config_class = Gemma3nVisionConfig

    def __init__(self, config: Gemma3nVisionConfig) -> None:
        super().__init__(config)
        self.patches = torch.nn.Linear(3, config.hidden_size)
        self.post_init()


AutoModel.register(Gemma3nVisionConfig, ImageEncoderWithoutTimm, exist_ok=True)


def small_config(model_type: str, text_type: str | None = None, **changes: Any) -> PreTrainedConfig:
    """A config with the structure of the published models, a tiny text decoder and tiny encoders.

    Args:
        model_type: type of the wrapper.
        text_type: type of its text decoder; that of the default config where it is None.
        changes: fields of the wrapper's config.
    """
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    tokens = _special_tokens(default)
    values: dict[str, Any] = {name: VOCABULARY + position for position, name in enumerate(tokens)}
    vocabulary = {"vocab_size": VOCABULARY + len(tokens)}
    for name, part in _parts_of(default).items():
        values[name] = _small_encoder(part)
    if "text_config" not in config_class.sub_configs:  # the wrapper is the decoder
        own = _merged(values, vocabulary | _WRAPPERS.get(model_type, {}))
        config = every_causal_type.small_config(model_type, **(own | changes))
    else:
        text_type = text_type or default.text_config.model_type
        text = vocabulary | DECODERS.get(text_type, {})
        values["text_config"] = every_causal_type.small_config(text_type, **text)
        connector = {name: value for name, value in _CONNECTOR.items() if hasattr(default, name)}
        config = config_class(**(_merged(connector | values, _WRAPPERS.get(model_type, {})) | changes))
    config._attn_implementation = config._experts_implementation = "eager"  # grouped_mm knows no float64
    return config


def tiny_wrapper(
    model_type: str, dtype: torch.dtype = torch.float32, text_type: str | None = None, **changes: Any
) -> PreTrainedModel:
    """A fresh tiny model of `small_config` in eval mode, the same one every time; it runs on token ids alone.

    In another dtype it is what transformers loads from the float32 checkpoint.
    """
    return copy.deepcopy(_model(model_type, dtype, text_type, tuple(sorted(changes.items()))))


def _special_tokens(config: PreTrainedConfig) -> list[str]:
    """Fields that hold the id of one token of an image, a video or a sound."""
    values = config.to_dict()
    ordinary = every_causal_type.SMALL.keys() | {"decoder_start_token_id"}
    names = {name for name in values if re.search(r"_token_(id|index)$", name)} - ordinary
    return sorted(name for name in names if not isinstance(values[name], list))


def _parts_of(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configs of the encoders inside a config by field, those included that are optional."""
    parts = {}
    for name, part_class in type(config).sub_configs.items():
        part = getattr(config, name, None)
        if part is None and issubclass(part_class, PreTrainedConfig):
            part = part_class()
        if isinstance(part, PreTrainedConfig) and name != "text_config":
            parts[name] = part
    return parts


def _small_encoder(default: PreTrainedConfig) -> dict[str, Any]:
    known = default.to_dict().keys() | type(default).attribute_map.keys()
    values = {name: value for name, value in _ENCODER.items() if name in known}
    values |= {name: _small_encoder(part) for name, part in _parts_of(default).items()}
    return _merged(values, _ENCODERS.get(default.model_type, {})) | {"model_type": default.model_type}


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The values with the changes, where the configs of parts are changed field by field."""
    nested = {
        name: _merged(values[name], change)
        for name, change in changes.items()
        if name.endswith("_config") and isinstance(values.get(name), dict)
    }
    return values | changes | nested


@cache
def _model(
    model_type: str, dtype: torch.dtype, text_type: str | None, changes: tuple[tuple[str, Any], ...]
) -> PreTrainedModel:
    model_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    if dtype != torch.float32:
        with tempfile.TemporaryDirectory() as checkpoint:
            tiny_wrapper(model_type, text_type=text_type, **dict(changes)).save_pretrained(checkpoint)
            eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
            return model_class.from_pretrained(checkpoint, dtype=dtype, **eager)
    config = small_config(model_type, text_type, **dict(changes))
    with torch.device("meta"):
        size = model_class._from_config(copy.deepcopy(config)).num_parameters()
    if size > LARGEST:
        raise ValueError(f"the tiny {model_type} has {size} parameters; make more of its fields small")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, model_type)))
        model = model_class._from_config(config, dtype=torch.float32).eval()
        redraw(model)
    return model
