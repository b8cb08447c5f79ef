"""The family table: a new family is a row here and a fixture line in tests/tiny.py.

`shrink` states what changes when a family gets fewer neurons, fewer heads or a narrower stream; `repedit.slimmed` and
`repedit.sliced` refuse a family without it.
"""

from __future__ import annotations

from dataclasses import replace

from repedit.arch.spec import Architecture, BiasFlag, BranchRow, Experts, Reader, Shrink, attention, mlp, register
from repedit.sites import Point

_RMS = Shrink()
_DIVIDED = replace(_RMS, heads_must_divide_width=True)
_POST_NORM = "post-norms follow its writers, so that a stream erasure is itself only subspace-exact"
_SPREAD = "its q and k norms run over all heads together"
_QK_NORM = {"self_attn.q_proj": "self_attn.q_norm", "self_attn.k_proj": "self_attn.k_norm"}


def _fixed(heads: str = "hidden_size // heads", mlp: str = "intermediate_size") -> Shrink:
    """What changes in a family that computes the head width from the width of the stream."""
    reason = f"the width of a head is computed from the width of the stream ({heads})"
    return replace(_RMS, mlp=mlp, whole_heads=reason, whole_stream=reason)


_QKVO = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_ATTENTION_BIAS = {Point.ATTN_OUT: BiasFlag("attention_bias", _QKVO)}
_MLP_BIAS = {Point.MLP_OUT: BiasFlag("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))}


def _experts(count: str = "num_experts") -> BranchRow:
    """The row of an MLP of experts."""
    return BranchRow("mlp", (Experts(count=count),), outputs=("mlp",))


_MISTRAL = Architecture(
    model_type="mistral", gguf="llama", base="model", blocks="layers", block=((attention(), mlp()),), shrink=_RMS
)
_QWEN2 = replace(_MISTRAL, model_type="qwen2", gguf="")
_QWEN3 = replace(_QWEN2, model_type="qwen3", bias_flags=_ATTENTION_BIAS, shrink=replace(_RMS, head_norms=_QK_NORM))
_GEMMA = replace(_QWEN2, model_type="gemma", embedding_scaled=True, unit_gain=True, bias_flags=_ATTENTION_BIAS)
_GEMMA2 = replace(
    _GEMMA,
    model_type="gemma2",
    block=((attention(norm="post_attention_layernorm"), mlp(norm="post_feedforward_layernorm")),),
    shrink=replace(_DIVIDED, whole_stream=_POST_NORM),
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
    shrink=_fixed(mlp="n_inner"),
)
_TABLE = (
    replace(_QWEN2, model_type="llama", bias_flags=_ATTENTION_BIAS | _MLP_BIAS, shrink=_DIVIDED),
    _MISTRAL,
    _QWEN2,
    _QWEN3,
    replace(_QWEN2, model_type="smollm3", bias_flags=_ATTENTION_BIAS | _MLP_BIAS),
    _GEMMA,
    _GEMMA2,
    replace(_GEMMA2, model_type="gemma3_text", gguf="gemma3"),
    replace(
        _GEMMA2,
        model_type="olmo2",
        embedding_scaled=False,
        unit_gain=False,
        shrink=replace(_RMS, whole_heads=_SPREAD, whole_stream=_POST_NORM),
    ),
    _GPT2,
    replace(
        _GPT2,
        model_type="gpt_neo",
        block=((attention("attn.attention.out_proj", "attn.attention.v_proj"), mlp("mlp.c_proj", "mlp.c_fc")),),
        transposed=False,
        shrink=_fixed(),
    ),
    replace(
        _GPT2,
        model_type="gptj",
        block=((attention("attn.out_proj", "attn.v_proj"), mlp("mlp.fc_out", "mlp.fc_in")),),
        embeddings=("wte",),
        transposed=False,
        parallel=True,
    ),
    replace(
        _GPT2,
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
        transposed=False,
        parallel="use_parallel_residual",
        shrink=_fixed(),
    ),
    replace(
        _GPT2,
        model_type="opt",
        base="model.decoder",
        blocks="layers",
        block=((attention("self_attn.out_proj"), mlp("fc2", "fc1")),),
        embeddings=("embed_tokens", "embed_positions"),
        transposed=False,
        requires=(("do_layer_norm_before", True, "this is the post-norm variant (OPT-350m)"),),
        shrink=_fixed(mlp="ffn_dim"),
    ),
    replace(
        _QWEN2,
        model_type="phi",
        gguf="phi2",
        block=((attention("self_attn.dense"), mlp("mlp.fc2", "mlp.fc1")),),
        centered=True,
        gated=False,
        parallel=True,
        shrink=replace(_RMS, mlp_norm="input_layernorm", final_norm="final_layernorm", epsilon="layer_norm_eps"),
    ),
    replace(
        _QWEN2,
        model_type="phi3",
        block=(
            (
                attention(values=Reader("self_attn.qkv_proj", layout="tail")),
                mlp("mlp.down_proj", Reader("mlp.gate_up_proj", 0, 2), Reader("mlp.gate_up_proj", 1, 2)),
            ),
        ),
        shrink=replace(_RMS, heads=("self_attn.qkv_proj",)),
    ),
    replace(
        _QWEN2,
        model_type="stablelm",
        centered=True,
        parallel="use_parallel_residual",
        shrink=_fixed("heads x width == hidden_size"),
    ),
    replace(
        _QWEN2,
        model_type="starcoder2",
        block=((attention(), mlp("mlp.c_proj", "mlp.c_fc")),),
        centered=True,
        gated=False,
        shrink=replace(_RMS, epsilon="norm_epsilon"),
    ),
    replace(
        _QWEN2,
        model_type="cohere",
        gguf="command-r",
        centered=True,
        parallel=True,
        bias_flags=_ATTENTION_BIAS,
        shrink=replace(_RMS, mlp_norm="input_layernorm", epsilon="layer_norm_eps"),
    ),
    replace(_MISTRAL, model_type="mixtral", block=((attention(), _experts("num_local_experts")),)),
    replace(
        _QWEN3,
        model_type="olmoe",
        block=((attention(), _experts()),),
        shrink=replace(_RMS, whole_heads=_SPREAD, whole_stream=_SPREAD),
    ),
    replace(
        _QWEN3,
        model_type="qwen3_moe",
        gguf="qwen3moe",
        block=((attention(), mlp()), (attention(), _experts())),
        shrink=replace(_QWEN3.shrink or _RMS, expert="moe_intermediate_size"),
    ),
)

for _row in _TABLE:
    register(_row)
