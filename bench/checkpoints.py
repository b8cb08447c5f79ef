"""Checkpoints of any size in the shape of Llama, written tensor by tensor: with values, or as sparse files with none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from repedit.arch import TensorSpec
from repedit.io.checkpoint import INDEX
from repedit.io.safetensors import header_bytes, raw_bytes

LLAMA_70B = {"d": 8192, "mlp": 28672, "layers": 80, "heads": 64, "kv_heads": 8, "vocabulary": 128256}
LLAMA_3B = {"d": 3072, "mlp": 8192, "layers": 16, "heads": 24, "kv_heads": 8, "vocabulary": 32768}
"""Half the layers and a quarter of the words of a model of three billion parameters."""


def llama(
    folder: Path,
    *,
    d: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    shard_bytes: int,
    sparse: bool = False,
) -> Path:
    """A bfloat16 checkpoint of these sizes in shards; sparse files hold a header and no values."""
    folder.mkdir(parents=True)
    specs = {
        name: TensorSpec(shape, torch.bfloat16)
        for name, shape in _shapes(d, mlp, layers, d // heads * kv_heads, vocabulary)
    }
    shards = list(_sharded(specs, shard_bytes))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    generator = torch.Generator().manual_seed(0)
    for name, part in zip(names, shards, strict=True):
        head, ranges = header_bytes(part, {"format": "pt"})
        with open(folder / name, "wb") as file:
            file.write(head)
            for spec in () if sparse else part.values():
                file.write(raw_bytes((torch.randn(spec.shape, generator=generator) * 0.02).to(spec.dtype)))
            file.truncate(max(stop for _, stop in ranges.values()))
    index = {"weight_map": {tensor: name for name, part in zip(names, shards, strict=True) for tensor in part}}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, **index}))
    (folder / "config.json").write_text(json.dumps(_config(d, mlp, layers, heads, kv_heads, vocabulary)))
    return folder


def _shapes(d: int, mlp: int, layers: int, kv: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (vocabulary, d)
    for i in range(layers):
        for leaf, shape in (("q", (d, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, d))):
            yield f"model.layers.{i}.self_attn.{leaf}_proj.weight", shape
        for leaf, shape in (("gate", (mlp, d)), ("up", (mlp, d)), ("down", (d, mlp))):
            yield f"model.layers.{i}.mlp.{leaf}_proj.weight", shape
        for leaf in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{leaf}.weight", (d,)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (vocabulary, d)


def _sharded(specs: dict[str, TensorSpec], shard_bytes: int) -> Iterator[dict[str, TensorSpec]]:
    part: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        if part and sum(s.nbytes for s in part.values()) + spec.nbytes > shard_bytes:
            yield part
            part = {}
        part[name] = spec
    yield part


def _config(d: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": d,
        "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
