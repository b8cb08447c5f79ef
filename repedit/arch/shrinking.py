"""What has to change with it when a family gets fewer neurons, fewer heads or a narrower stream.

A model that ignores one of these facts still runs and gives other logits, so each row is proved by the laws of
tests/test_slim.py and tests/test_slice.py before it may say that a width can change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Shrink:
    """Names in the config and in a block of what depends on a width; paths are relative to a block."""

    mlp: str = "intermediate_size"
    """Config field that holds the number of neurons of an MLP."""
    expert: str = ""
    """Config field for the neurons of one expert, where dense layers have a field of their own."""
    heads: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Modules that give queries, keys and values; one module where their rows are stacked in this order."""
    attention_norm: str = "input_layernorm"
    """The norm whose output the attention reads."""
    mlp_norm: str = "post_attention_layernorm"
    """The norm whose output the MLP and a router read."""
    final_norm: str = "norm"
    """The norm in the backbone whose output the head reads."""
    epsilon: str = "rms_norm_eps"
    """Config field of what the norms add to the mean square."""
    head_norms: Mapping[str, str] = field(default_factory=dict)
    """Module of `heads` -> the norm of head width that its rows pass and that adds the same epsilon."""
    divides: bool = False
    """The config insists that the number of heads divides the width of the stream."""
    whole_heads: str = ""
    """Why the number of heads cannot change; empty where it can."""
    whole_stream: str = ""
    """Why the width of the stream cannot change; empty where it can."""


_RMS = Shrink()
_LAYER_NORM = replace(_RMS, epsilon="layer_norm_eps")
_QK_NORM = {"self_attn.q_proj": "self_attn.q_norm", "self_attn.k_proj": "self_attn.k_norm"}


def _fixed(heads: str, mlp: str = "intermediate_size") -> Shrink:
    """A family that computes the head width from the width of the stream."""
    reason = f"the width of a head is computed from the width of the stream ({heads})"
    return replace(_RMS, mlp=mlp, whole_heads=reason, whole_stream=reason)


_SPREAD = "its q and k norms run over all heads together"
_POST_NORM = "post-norms follow its writers, so that a stream erasure is itself only subspace-exact"
_BY_DIVISION = "hidden_size // heads"

SHRINKS: Mapping[str, Shrink] = {
    "llama": replace(_RMS, divides=True),
    "mistral": _RMS,
    "qwen2": _RMS,
    "qwen3": replace(_RMS, head_norms=_QK_NORM),
    "smollm3": _RMS,
    "gemma": _RMS,
    "gemma2": replace(_RMS, divides=True, whole_stream=_POST_NORM),
    "gemma3_text": replace(_RMS, divides=True, whole_stream=_POST_NORM),
    "olmo2": replace(_RMS, whole_heads=_SPREAD, whole_stream=_POST_NORM),
    "gpt2": _fixed(_BY_DIVISION, mlp="n_inner"),
    "gpt_neo": _fixed(_BY_DIVISION),
    "gptj": _fixed(_BY_DIVISION, mlp="n_inner"),
    "gpt_neox": _fixed(_BY_DIVISION),
    "opt": _fixed(_BY_DIVISION, mlp="ffn_dim"),
    "stablelm": _fixed("heads x width == hidden_size"),
    "phi": replace(_LAYER_NORM, mlp_norm="input_layernorm", final_norm="final_layernorm"),
    "phi3": replace(_RMS, heads=("self_attn.qkv_proj",)),
    "starcoder2": replace(_RMS, epsilon="norm_epsilon"),
    "cohere": replace(_LAYER_NORM, mlp_norm="input_layernorm"),
    "mixtral": _RMS,
    "olmoe": replace(_RMS, whole_heads=_SPREAD, whole_stream=_SPREAD),
    "qwen3_moe": replace(_RMS, expert="moe_intermediate_size", head_norms=_QK_NORM),
}
