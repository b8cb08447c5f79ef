"""Tiny random models of every family: random norm gains and biases, grouped heads, odd head widths."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from repedit.models.subject import Subject, subject_of

VOCABULARY = 61
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 10}
_OLD = {
    "vocab_size": VOCABULARY,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED | {"tie_word_embeddings": True},
    "mistral": _WIDE,
    "qwen2": _GROUPED,
    "qwen3": _WIDE,
    "smollm3": _GROUPED,
    "gemma": _WIDE,
    "gemma2": _WIDE,
    "gemma3_text": _WIDE,
    "gpt2": _OLD,
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gptj": _OLD | {"rotary_dim": 4},
    "gpt_neox": _COMMON,
    "opt": _COMMON | {"ffn_dim": 40, "word_embed_proj_dim": 24},
    "phi": _GROUPED | {"hidden_size": 32},
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
    "cohere": _GROUPED,
    "mixtral": _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _WIDE
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
}
FAMILIES = tuple(CONFIGS)


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Subject:
    """A fresh tiny model of a family, the same one every time."""
    model = copy.deepcopy(_model(family, tuple(sorted(changes.items()))))
    for parameter in model.parameters():
        # Buffers keep their dtype, as they do when a checkpoint is loaded: rotary frequencies stay float32.
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return subject_of(model)


def ids(rows: int = 3, length: int = 11, seed: int = 0) -> torch.Tensor:
    """Token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(subject: Subject, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Logits on fixed ids."""
    with torch.no_grad():
        return subject.model(input_ids=ids() if tokens is None else tokens, use_cache=False).logits


@cache
def _model(family: str, changes: tuple[tuple[str, Any], ...]) -> Any:
    config = AutoConfig.for_model(family, **(CONFIGS[family] | dict(changes)))
    config._attn_implementation = config._experts_implementation = "eager"  # grouped_mm knows no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, family)))
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                # Weights large enough that every branch matters; gains and biases away from their defaults.
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2))
                if "norm" in name or ".ln_" in name:
                    parameter.add_(0.0 if "gemma" in family or name.endswith("bias") else 1.0)
    return model
