"""Exports from a directory whose files hold tensors under other names or in other forms than the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import repedit as rp
from repedit import plan as plans
from repedit.arch import MatrixView, match_layout
from repedit.arch.storage import Piece, StoredIn
from repedit.delta import Delta
from repedit.edit import Edit
from repedit.errors import NotFoldable
from repedit.io.checkpoint import SINGLE, open_shards
from repedit.models.subject import Subject
from repedit.plan import Operation, Plan
from repedit.rewrite.checkpoint_architecture import used_specs
from repedit.rewrite.verification import reload_check
from tests.edits import mask, projection
from tests.every_causal_type import DECODERS, tiny_causal
from tests.every_wrapper_type import tiny_wrapper

FAST = ("deepseek_v3", "gpt_oss", "llama4", "qwen2_moe")
TYPES = (
    *FAST,
    *("ernie4_5_moe", "gemma3", "granitemoehybrid", "jamba", "llava", "nemotron_h", "phimoe", "qwen3_vl_moe"),
)


def built(model_type: str, **changes: Any) -> Any:
    """A tiny causal model, or a tiny wrapper."""
    return (tiny_causal if model_type in DECODERS else tiny_wrapper)(model_type, **changes)


def of_every_branch(subject: Subject) -> Edit:
    """Half of the neurons of every branch pruned, and two directions removed from its output."""
    maps = {}
    for layer, branches in enumerate(subject.layout.layers):
        for branch in branches:
            maps |= (
                mask(subject, f"{layer}.{branch.inner}").maps | projection(subject, f"{layer}.{branch.outer}", 2).maps
            )
    return Edit(maps, {"method": "test"})


def difference(subject: Subject) -> Delta:
    """A random difference in every parameter."""
    generator = torch.Generator().manual_seed(0)
    parameters = subject.model.named_parameters()
    return Delta({n: 0.01 * torch.randn(p.shape, generator=generator) for n, p in parameters}, {"method": "test"})


def exporting_equals_applying(model: Any, folder: Path, change: Callable[[Subject], Any] = of_every_branch) -> None:
    """Files of a directory are edited as the model in memory is, and no byte of another tensor changes."""
    model.save_pretrained(folder / "plain")
    (folder / "plain" / "preprocessor_config.json").write_text("{}")
    subject = rp.wrap(model)
    record = rp.export(change(subject), folder / "plain", folder / "edited")
    edited = type(model).from_pretrained(folder / "edited", dtype="auto").state_dict()
    assert_close(edited, dict(rp.apply(change(subject), subject).model.state_dict()), rtol=0, atol=0, equal_nan=True)
    before, after = (load_file(folder / name / SINGLE) for name in ("plain", "edited"))
    untouched = before.keys() - record.plan.keys()
    assert before.keys() == after.keys()
    assert all(before[n].numpy().tobytes() == after[n].numpy().tobytes() for n in untouched)
    assert not any(torch.equal(before[n], after[n]) for n in record.plan)
    assert (folder / "edited" / "preprocessor_config.json").read_text() == "{}"


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=() if t in FAST else pytest.mark.slow) for t in TYPES])
def test_an_edit_of_every_branch(model_type, tmp_path):
    exporting_equals_applying(built(model_type), tmp_path)


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "gpt_neox", "gpt_oss", "llama4"])
def test_a_delta(model_type, tmp_path):
    exporting_equals_applying(built(model_type), tmp_path, difference)


def test_files_without_the_prefix_of_the_base_model(tmp_path):
    def save(folder: Path) -> None:
        original(folder)
        short = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / SINGLE).items()}
        save_file(short, folder / SINGLE, {"format": "pt"})

    model = built("gpt2")
    original, model.save_pretrained = model.save_pretrained, save
    exporting_equals_applying(model, tmp_path)


def test_leaving_out_an_expert_breaks_the_law(tmp_path, monkeypatch):
    original = plans._Files.operations

    def all_but_one(files, name):
        yield from (op for op in original(files, name) if ".experts.2." not in op.view.tensor)

    monkeypatch.setattr(plans._Files, "operations", all_but_one)
    with pytest.raises(AssertionError, match="experts"):
        exporting_equals_applying(built("qwen2_moe"), tmp_path)


# --- Wrappers


@pytest.mark.parametrize("model_type", ["llama4", "llava"])
def test_a_wrapper_is_loaded_by_its_own_class(model_type, tmp_path):
    model = built(model_type)
    model.save_pretrained(tmp_path / "plain")
    record = rp.export(of_every_branch(rp.wrap(model)), tmp_path / "plain", tmp_path / "edited")
    assert record.loaders == ("transformers.AutoModelForImageTextToText", "repedit.load")
    assert "Plain `AutoModelForImageTextToText.from_pretrained` loads" in (tmp_path / "edited/README.md").read_text()
    assert reload_check(tmp_path / "edited").parameters == sum(p.numel() for p in model.parameters())


def untying(subject: Subject, folder: Path) -> Plan:
    """A plan that doubles the token embedding and leaves the head as it is."""
    tokens, head = subject.layout.embeddings[0], subject.layout.head
    double = rp.Diagonal(torch.full((subject.layout.width,), 2.0))
    plan = Plan(
        {tokens: (Operation("outputs", MatrixView(tokens, transposed=True), double),)},
        {},
        "live",
        unties={head: tokens},
        config={"tie_word_embeddings": False},
    )
    return plans.plan_for_files(plan, used_specs(open_shards(folder)))


@pytest.mark.parametrize("model_type", ["gemma3", "llama4", "kosmos-2.5"])
def test_an_untied_head_of_a_wrapper_stays_untied(model_type, tmp_path):
    model = built(model_type, tie_word_embeddings=True)
    model.config.get_text_config(decoder=True).tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "plain")
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    record = rp.export(untying(rp.wrap(model), tmp_path / "plain"), tmp_path / "plain", tmp_path / "edited")
    edited = type(model).from_pretrained(tmp_path / "edited")
    assert torch.equal(edited.get_output_embeddings().weight, table)
    assert torch.equal(edited.get_input_embeddings().weight, 2 * table)
    config = json.loads((tmp_path / "edited" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert len(record.unties) == 1


# --- What files cannot take


def test_a_conversion_that_is_not_understood_is_refused_where_an_edit_needs_it(tmp_path):
    model = built("molmo2")
    model.save_pretrained(tmp_path / "plain")
    subject = rp.wrap(model)
    with pytest.raises(
        NotFoldable, match=r"v_proj.weight cannot be edited in the files .*att_proj.*Split.*edit the model in memory"
    ):
        rp.export(of_every_branch(subject), tmp_path / "plain", tmp_path / "edited")
    rp.export(projection(subject, "0.mlp.out"), tmp_path / "plain", tmp_path / "edited")


VIEWS = {
    "all": MatrixView("w"),
    "columns": MatrixView("w", transposed=True),
    "up": MatrixView("w", parts=2, part=1),
    "tail": MatrixView("w", start=4),
    "alternating": MatrixView("w", groups=4, parts=2, part=1),
}
STORED = {
    "whole": [Piece("a")],
    "transposed": [Piece("a", transposed=True)],
    "two": [Piece("a", part=0, parts=2), Piece("b", part=1, parts=2)],
    "two of columns": [Piece("a", part=0, parts=2, axis=1), Piece("b", part=1, parts=2, axis=1)],
    "a part": [Piece("a", stored_part=1, stored_parts=3)],
    "a part of columns": [Piece("a", stored_part=1, stored_parts=3, axis=1)],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("pieces", STORED.values(), ids=STORED)
@pytest.mark.parametrize("experts", ["none", "fused", "apart"])
def test_a_view_of_files_shows_what_the_view_in_memory_shows(view, pieces, experts):
    """Or there is none: never another one."""
    shape = (8, 6) if experts == "none" else (3, 8, 6)
    if experts == "apart":
        pieces = [replace(p, name=f"{p.name}{e}", expert=e) for p in pieces for e in range(3)]
    if experts == "fused":
        pieces = [replace(p, axis=p.axis + 1) for p in pieces]
    if experts != "none":
        view = replace(view, expert=1)
    memory, files = torch.randn(shape), {}
    for piece in pieces:
        files[piece.name] = stored_as(piece, piece.in_memory(memory))
    shown = StoredIn(tuple(pieces), shape, tuple(files)).view(view)
    if shown is None:
        assert pieces[0] != Piece(pieces[0].name)
    else:
        assert torch.equal(shown.read(files[shown.tensor]), view.read(memory))


def stored_as(piece: Piece, values: Tensor) -> Tensor:
    """A tensor on disk that holds these values and, in its other parts, zeros."""
    others = [torch.zeros_like(values)] * (piece.stored_parts - 1)
    tensor = torch.cat([*others[: piece.stored_part], values, *others[piece.stored_part :]], piece.axis)
    return tensor.mT if piece.transposed else tensor


def test_most_of_these_views_are_found():
    views = [StoredIn(tuple(p), (8, 6), ("a",)).view(v) for p in STORED.values() for v in VIEWS.values()]
    assert sum(view is not None for view in views) == 14


def test_a_layout_of_files_has_the_names_in_memory(tmp_path):
    model = built("qwen2_moe")
    model.save_pretrained(tmp_path)
    subject, specs = rp.wrap(model), used_specs(open_shards(tmp_path))
    assert match_layout(subject.architecture, specs) == subject.layout
    assert specs.files == open_shards(tmp_path).specs
