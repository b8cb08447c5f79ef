"""The pieces of a checkpoint are its model: every tensor is rebuilt from them to the bit, and no tensor on disk is left."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose, WeightConverter

from repedit.arch.storage import Piece, StoredIn, storage
from repedit.io.checkpoint import SINGLE, open_shards
from repedit.io.safetensors import TensorSpec
from tests.every_causal_type import DECODERS, tiny_causal
from tests.every_wrapper_type import NOT_A_DECODER, WRAPPER_TYPES, tiny_wrapper
from tests.tiny import tiny

BUILDERS = {
    **dict.fromkeys(DECODERS, tiny_causal),
    # transformers does not find the tensors of shieldgemma2 again that it saves.
    **{model_type: tiny_wrapper for model_type in WRAPPER_TYPES if model_type not in (*NOT_A_DECODER, "shieldgemma2")},
}
FAST = {
    *("deepseek_v3", "gemma3", "gpt_neox", "gpt_oss", "granitemoe", "hrm_text", "jamba", "llava", "minimax"),
    *("minimax_m3_vl", "mixtral", "molmo2", "nemotron_h", "olmo_hybrid", "qwen2_moe", "qwen3_vl_moe"),
}
# Tensors without pieces by type, and the reason.
UNSUPPORTED = {
    "ernie4_5_vl_moe": (r"(text|vision)_moe\.experts\.", "ErnieFuseAndSplitTextVisionExperts"),
    "inkling2": (r"experts\.gate_up_proj", r"Interleave\(dim=1\)"),
    "inkling2_text": (r"experts\.gate_up_proj", r"Interleave\(dim=1\)"),
    "inkling_mm_model": (r"mlp\.((shared_)?experts\.)?(gate|up|gate_up)_proj", "Interleave"),
    "kimi_k25": (r"vision_tower.*\.attn\.[qkv]_proj", r"Chunk\(dim=0\), PermuteForRope"),
    "mistral_large4": (r"vision_tower.*\.attention\.[qk]_proj", "PermuteForRope"),
    "molmo2": (r"language_model\.(layers.*self_attn\.[qkv]_proj|embed_tokens)", r"Split\(dim=0\)|does not fit"),
    # 64 rows in three parts: 22, 22 and 20.
    "olmo_hybrid": (r"linear_attn\.conv1d", r"shape \(20, 1, 4\) does not fit the tensor of shape \(66, 1, 4\)"),
    "step3p7": (r"vision_model.*\.self_attn\.[qkv]_proj", r"Chunk\(dim=0\), PermuteForRope"),
}


def saved(model_type: str, folder: Path) -> tuple[PreTrainedModel, dict[str, StoredIn]]:
    """A tiny model, saved in the folder, and where it lies there."""
    model = BUILDERS[model_type](model_type)
    model.save_pretrained(folder)
    return model, storage(model, open_shards(folder).specs)


def rebuilt(like: Mapping[str, Tensor], stored: Mapping[str, StoredIn], folder: Path) -> dict[str, Tensor]:
    """Tensors in memory, made of nothing but their pieces in the folder; those without pieces as they are."""
    shards = open_shards(folder)
    result = {name: torch.full_like(tensor, -77) for name, tensor in like.items()}
    for name in like:
        for piece in stored[name].pieces:
            values = piece.on_disk(shards.read(piece.name))
            assert values.shape == piece.in_memory(result[name]).shape
            piece.in_memory(result[name]).copy_(values)
    return {name: tensor if stored[name].pieces else like[name] for name, tensor in result.items()}


def check(model: PreTrainedModel, stored: Mapping[str, StoredIn], folder: Path) -> None:
    """Every tensor of the model equals its pieces, and every tensor on disk is used once."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert_close(rebuilt(state, stored, folder), state, rtol=0, atol=0, equal_nan=True)
    uses: Counter[str] = Counter()
    for entry in {entry.pieces: entry for entry in stored.values()}.values():  # tied names share an entry
        uses.update({(piece.name, piece.stored_parts, piece.stored_part): 1 for piece in entry.pieces})
    assert set(uses.values()) <= {1}
    for name, parts, _ in uses:
        assert sum(other == name for other, _, _ in uses) == parts, name
    if all(entry.pieces for entry in stored.values()):
        assert {name for name, _, _ in uses} == set(open_shards(folder).entries)


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in FAST else pytest.mark.slow) for t in sorted(BUILDERS)]
)
def test_a_model_is_its_pieces(model_type, tmp_path):
    model, stored = saved(model_type, tmp_path)
    check(model, stored, tmp_path)
    pattern, reason = UNSUPPORTED.get(model_type, ("no tensor", ""))
    assert {name for name, entry in stored.items() if not entry.pieces} == set(
        filter(re.compile(pattern).search, stored)
    )
    assert all(entry.pieces or re.search(reason, entry.reason) for entry in stored.values())


def test_experts_lie_one_by_one(tmp_path):
    model = tiny("mixtral", num_local_experts=12).model  # as text, 10 comes before 2
    model.save_pretrained(tmp_path)
    stored = storage(model, open_shards(tmp_path).specs)
    check(model, stored, tmp_path)
    on_disk, experts = "model.layers.0.block_sparse_moe.experts.{}.{}.weight", "model.layers.0.mlp.experts"
    assert stored[f"{experts}.down_proj"].pieces[10] == Piece(on_disk.format(10, "w2"), expert=10)
    assert stored[f"{experts}.gate_up_proj"].pieces[10] == Piece(on_disk.format(10, "w1"), expert=10, part=0, parts=2)
    assert stored[f"{experts}.gate_up_proj"].pieces[22] == Piece(on_disk.format(10, "w3"), expert=10, part=1, parts=2)


# --- Broken twins


def exchanged(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    return tuple(replace(piece, part=piece.parts - 1 - piece.part) for piece in pieces)


def incomplete(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    return tuple(piece for piece in pieces if piece.expert != 2)


def renumbered(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    return tuple(replace(piece, expert=3 - piece.expert) for piece in pieces)


@pytest.mark.parametrize("fault", [exchanged, incomplete, renumbered])
def test_the_law_notices(fault, tmp_path):
    model, stored = saved("mixtral", tmp_path)
    check(model, stored, tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    with pytest.raises(AssertionError):
        check(model, stored | {name: replace(stored[name], pieces=fault(stored[name].pieces))}, tmp_path)


# --- Files that transformers reads, and does not write so


def changed(model: PreTrainedModel, folder: Path, change) -> dict[str, StoredIn]:
    """Where a model lies in its files after a change of their tensors."""
    model.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(folder / SINGLE)).items()}
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return storage(model, open_shards(folder).specs)


def of_the_base_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_transposed_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.mT if ".experts." in name and t.ndim == 3 else t for name, t in tensors.items()}


def with_legacy_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("language_model.model.", "model.language_model."): t for name, t in tensors.items()}


def with_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"model.layers.99.mtp.weight": torch.ones(2)}


def under_the_tied_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("qwen2_moe", of_the_base_model),
        ("qwen3_vl_moe", with_transposed_experts),
        ("llava", with_legacy_prefixes),
        ("mixtral", with_more),
        ("gemma3_text", under_the_tied_name),
    ],
)
def test_the_pieces_are_what_transformers_loads(model_type, change, tmp_path):
    model = BUILDERS[model_type](model_type)
    stored = changed(model, tmp_path, change)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert_close(rebuilt(loaded, stored, tmp_path), dict(model.state_dict()), rtol=0, atol=0)


def test_fused_experts_on_disk_are_whole(tmp_path):
    model = tiny_causal("qwen3_moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    stored = storage(model, open_shards(tmp_path).specs)
    check(model, stored, tmp_path)
    assert all(entry.pieces == (Piece(name),) for name, entry in stored.items())


def test_weights_on_the_meta_device_are_enough(tmp_path):
    model, stored = saved("qwen2_moe", tmp_path)
    assert storage(model.to("meta"), open_shards(tmp_path).specs) == stored


# --- What the files hold otherwise has a reason

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
EXPERT = "model.layers.0.mlp.experts.1"


def without_an_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(EXPERT)}


def without_the_gate_of_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != f"{EXPERT}.gate_proj.weight"}


def without_gates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "gate_proj" not in name}


def with_both(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {GATE_UP: torch.ones(4, 32, 24)}


def with_a_gate_for_an_up(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("experts.1.up_proj", "experts.4.gate_proj"): tensor for name, tensor in tensors.items()}


def with_wide_gates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([t, t]) if "gate_proj" in name else t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_an_expert, "6 tensors from .*experts.0.gate_proj.weight to .*experts.3.up_proj.weight do not make up"),
        (without_the_gate_of_one, "7 tensors from .* do not make up the tensor of shape"),
        (with_a_gate_for_an_up, "8 tensors from .* do not make up the tensor of shape"),
        (without_gates, "4 tensors from .*up_proj.weight do not make up the tensor of shape"),
        (with_both, "under two names: .*experts\\.0\\.gate_proj.weight and model.layers.0.mlp.experts.gate_up_proj"),
        (with_wide_gates, r"up_proj\.weight of shape \(16, 24\) does not fit the tensor of shape \(4, 64, 24\)"),
    ],
)
def test_files_that_do_not_fit_have_a_reason(change, reason, tmp_path):
    stored = changed(tiny_causal("qwen3_moe"), tmp_path, change)
    assert stored[GATE_UP].pieces == ()
    assert re.search(reason, stored[GATE_UP].reason)


@pytest.mark.parametrize("model_type", ["gpt_neox", "hrm_text"])
def test_a_tensor_under_two_names_has_a_reason(model_type, tmp_path):
    def with_all_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in (model.state_dict() | tensors).items()}

    model, stored = saved(model_type, tmp_path)
    renamed = {name for name, entry in stored.items() if entry.pieces != (Piece(name),)}
    stored = changed(model, tmp_path, with_all_names)
    assert renamed
    assert all("under two names" in stored[name].reason for name in renamed)


def test_shapes_are_those_of_the_files(tmp_path):
    def three_of_21_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.ones(21, 1, 4) if "_conv1d" in name else tensor for name, tensor in tensors.items()}

    stored = changed(tiny_causal("olmo_hybrid"), tmp_path, three_of_21_rows)
    assert stored["model.layers.0.linear_attn.conv1d.weight"].shape == (63, 1, 4)  # the config has 64


QUERY = "self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("operations", "transposed"),
    [
        ([Transpose(0, 1)], True),
        ([Transpose(0, 1, check_dims=True)], False),  # the matrix is square
        ([Transpose(1, 2)], None),
        ([Transpose(0, 1), Interleave(0)], None),
        ([MergeModulelist(1)], None),
        ([MergeModulelist(0), Transpose(0, 1)], None),
        ([MergeModulelist(0), Concatenate(0)], None),
    ],
    ids=str,
)
def test_a_conversion_is_understood_or_named(operations, transposed, monkeypatch):
    model = tiny_causal("llama")
    conversion = WeightConverter(QUERY, QUERY, operations)
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [conversion])
    name = f"model.layers.0.{QUERY}"
    reason = f"transformers converts it by {', '.join(map(str, operations))}" if transposed is None else ""
    pieces = () if transposed is None else (Piece(name, transposed=transposed),)
    square = {name: TensorSpec((24, 24), torch.float32)}
    model.get_submodule("model.layers.0.self_attn").q_proj.weight = torch.nn.Parameter(torch.ones(24, 24))
    assert storage(model, square) == {name: StoredIn(pieces, (24, 24), (name,), reason)}


def test_two_tensors_of_one_are_understood_only_as_its_parts(monkeypatch):
    model = tiny_causal("llama")
    conversion = WeightConverter(QUERY, [QUERY, QUERY.replace("q_", "o_")], [Transpose(0, 1)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [conversion])
    stored = storage(model, {f"model.layers.0.{QUERY}": TensorSpec((24, 24), torch.float32)})
    assert [entry.reason for entry in stored.values()] == ["transformers converts it by Transpose"] * 2
