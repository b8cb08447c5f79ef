"""The family table: a new family is a row here and a fixture line in tests/tiny.py.

`_SHRINKS` states what changes when a family gets fewer neurons, fewer heads or a narrower stream; `repedit.slimmed` and
`repedit.sliced` refuse a family without an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from repedit.arch.spec import Architecture, BiasFlag, BranchRow, Experts, Reader, Shrink, attention, mlp, register
from repedit.sites import Point

_QKVO = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_ATTENTION_BIAS = {Point.ATTN_OUT: BiasFlag("attention_bias", _QKVO)}
_BOTH_BIASES = {
    **_ATTENTION_BIAS,
    Point.MLP_OUT: BiasFlag("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
}


def _experts(count: str = "num_experts") -> BranchRow:
    """The row of an MLP of experts."""
    return BranchRow("mlp", (Experts(count=count),), outputs=("mlp",))


_LLAMA = Architecture(
    model_type="llama", base="model", blocks="layers", block=((attention(), mlp()),), bias_flags=_BOTH_BIASES
)
_GEMMA = replace(_LLAMA, model_type="gemma", embedding_scaled=True, unit_gain=True, bias_flags=_ATTENTION_BIAS)
_SANDWICH = replace(
    _GEMMA,
    block=((attention(norm="post_attention_layernorm"), mlp(norm="post_feedforward_layernorm")),),
)
_GPT2 = Architecture(
    model_type="gpt2",
    base="transformer",
    blocks="h",
    block=((attention("attn.c_proj", Reader("attn.c_attn", layout="tail")), mlp("mlp.c_proj", "mlp.c_fc")),),
    embeddings=("wte", "wpe"),
    centered=True,
    transposed=True,
    gated=False,
)
_EXPERTS = replace(_LLAMA, block=((attention(), _experts()),), bias_flags=_ATTENTION_BIAS)

_TABLE = (
    _LLAMA,
    replace(_LLAMA, model_type="mistral", gguf="llama", bias_flags={}),
    replace(_LLAMA, model_type="qwen2", bias_flags={}),
    replace(_LLAMA, model_type="qwen3", bias_flags=_ATTENTION_BIAS),
    replace(_LLAMA, model_type="smollm3"),
    _GEMMA,
    replace(_SANDWICH, model_type="gemma2"),
    replace(_SANDWICH, model_type="gemma3_text", gguf="gemma3"),
    replace(_SANDWICH, model_type="olmo2", embedding_scaled=False, unit_gain=False),
    _GPT2,
    replace(
        _GPT2,
        model_type="gpt_neo",
        block=((attention("attn.attention.out_proj", "attn.attention.v_proj"), mlp("mlp.c_proj", "mlp.c_fc")),),
        transposed=False,
    ),
    replace(
        _GPT2,
        model_type="gptj",
        block=((attention("attn.out_proj", "attn.v_proj"), mlp("mlp.fc_out", "mlp.fc_in")),),
        embeddings=("wte",),
        transposed=False,
        parallel=True,
    ),
    Architecture(
        model_type="gpt_neox",
        gguf="gptneox",
        base="gpt_neox",
        blocks="layers",
        block=(
            (
                attention("attention.dense", Reader("attention.query_key_value", 2, 3, "per_head")),
                mlp("mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
            ),
        ),
        embeddings=("embed_in",),
        centered=True,
        gated=False,
        parallel="use_parallel_residual",
    ),
    Architecture(
        model_type="opt",
        base="model.decoder",
        blocks="layers",
        block=((attention("self_attn.out_proj"), mlp("fc2", "fc1")),),
        embeddings=("embed_tokens", "embed_positions"),
        centered=True,
        gated=False,
        requires=(("do_layer_norm_before", True, "this is the post-norm variant (OPT-350m)"),),
    ),
    replace(
        _LLAMA,
        model_type="phi",
        gguf="phi2",
        block=((attention("self_attn.dense"), mlp("mlp.fc2", "mlp.fc1")),),
        centered=True,
        gated=False,
        parallel=True,
        bias_flags={},
    ),
    replace(
        _LLAMA,
        model_type="phi3",
        block=(
            (
                attention(values=Reader("self_attn.qkv_proj", layout="tail")),
                mlp("mlp.down_proj", Reader("mlp.gate_up_proj", 0, 2), Reader("mlp.gate_up_proj", 1, 2)),
            ),
        ),
        bias_flags={},
    ),
    replace(_LLAMA, model_type="stablelm", centered=True, parallel="use_parallel_residual", bias_flags={}),
    replace(
        _LLAMA,
        model_type="starcoder2",
        block=((attention(), mlp("mlp.c_proj", "mlp.c_fc")),),
        centered=True,
        gated=False,
        bias_flags={},
    ),
    replace(_LLAMA, model_type="cohere", gguf="command-r", centered=True, parallel=True, bias_flags=_ATTENTION_BIAS),
    replace(
        _EXPERTS,
        model_type="mixtral",
        gguf="llama",
        bias_flags={},
        block=((attention(), _experts("num_local_experts")),),
    ),
    replace(_EXPERTS, model_type="olmoe"),
    replace(_EXPERTS, model_type="qwen3_moe", gguf="qwen3moe", block=((attention(), mlp()), (attention(), _experts()))),
)

# --- What changes with the widths of a family

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

_SHRINKS: Mapping[str, Shrink] = {
    "llama": replace(_RMS, heads_must_divide_width=True),
    "mistral": _RMS,
    "qwen2": _RMS,
    "qwen3": replace(_RMS, head_norms=_QK_NORM),
    "smollm3": _RMS,
    "gemma": _RMS,
    "gemma2": replace(_RMS, heads_must_divide_width=True, whole_stream=_POST_NORM),
    "gemma3_text": replace(_RMS, heads_must_divide_width=True, whole_stream=_POST_NORM),
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

for _row in _TABLE:
    register(replace(_row, shrink=_SHRINKS.get(_row.model_type)))
