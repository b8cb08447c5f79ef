"""Exports of other shapes: the files hold the smaller model, say which loaders read it, and load without repedit."""

from __future__ import annotations

import json
import logging
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import repedit as rp
from repedit.cli import app
from repedit.errors import ArgumentError, CheckpointError, NotSliceable, NotSlimmable
from repedit.io.checkpoint import open_shards
from repedit.rewrite.slim import slim_plan
from tests import laws
from tests.edits import mask, projection, pruned_groups, pruned_layers
from tests.saved_models import saved
from tests.test_slice import basis, erasure
from tests.tiny import ids, tiny

SLIM = {"structure": "slim", "multiple": 4}
RAGGED = {"structure": "slim", "layout": "ragged"}
SLICE = {"structure": "slice"}
PLAIN = ("transformers.AutoModelForCausalLM", "repedit.load")


def plain(folder: Path) -> rp.Subject:
    """The directory as transformers alone reads it."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return rp.wrap(model)


def same(found: rp.Subject, expected: rp.Subject) -> bool:
    mine, theirs = (dict(s.model.named_parameters(remove_duplicate=False)) for s in (found, expected))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def numbers(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3_moe"])
def test_slim_files_hold_the_slim_model(family, tmp_path: Path):
    subject = tiny(family)
    edit = pruned_layers(subject)
    subject.model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    for source in (tmp_path / "in", subject):
        record = rp.export(edit, source, tmp_path / "out", **SLIM, overwrite=True)
        assert record.loaders == PLAIN and (record.structure, record.layout) == ("slim", "uniform")
        expected = rp.slimmed(edit, subject, multiple=4)
        assert same(plain(tmp_path / "out"), expected)
        gone = laws.parameters(subject) - laws.parameters(expected)
        assert gone > 0 and record.parameters["before"] - record.parameters["after"] == gone
        # At most 4 KB of the file are its header.
        assert numbers(tmp_path / "in") - numbers(tmp_path / "out") >= 0.95 * gone - 1024


@pytest.mark.parametrize("family", ["llama", "mixtral", "phi"])
def test_sliced_files_hold_the_sliced_model(family, tmp_path: Path):
    subject = tiny(family)
    edit = erasure(subject)
    subject.model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    for source in (tmp_path / "in", subject):
        record = rp.export(edit, source, tmp_path / "out", **SLICE, overwrite=True)
        assert record.loaders == PLAIN and record.structure == "slice" and record.layout is None
        assert same(plain(tmp_path / "out"), rp.sliced(edit, subject))
    rp.export(edit, subject, tmp_path / "erased")
    untied = open_shards(tmp_path / "erased").specs
    gone = sum(prod(spec.shape) for spec in untied.values()) - record.parameters["after"]
    assert gone == laws.parameters(rp.apply(edit, subject)) - laws.parameters(rp.sliced(edit, subject)) > 0
    assert numbers(tmp_path / "erased") - numbers(tmp_path / "out") >= 0.95 * gone - 1024


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_ragged_files_are_read_by_repedit_and_by_nothing_else(family, tmp_path: Path, caplog):
    subject = tiny(family)
    edit = pruned_layers(subject)
    with caplog.at_level(logging.INFO, "repedit"):
        record = rp.export(edit, subject, tmp_path / "out", **RAGGED)
    assert "out is read by repedit.load" in caplog.text and record.loaders == ("repedit.load",)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "only `repedit.load` reads this directory" in card and "Plain `AutoModel" not in card
    found = rp.load(tmp_path / "out", attention="eager")
    assert same(found, rp.slimmed(edit, subject, layout="ragged"))
    assert record.widths == {str(i): mlp.parts[0].stop for i, (_, mlp) in enumerate(found.layout.layers)}
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_layers_that_come_out_alike_are_no_longer_ragged(tmp_path: Path):
    subject = tiny("llama")
    alike = rp.Edit({s: rp.Diagonal.mask(torch.arange(40) >= 9) for s in subject.select("*.mlp.neurons")})
    record = rp.export(alike, subject, tmp_path / "out", **RAGGED)
    assert (record.layout, record.loaders, set(record.widths.values())) == ("uniform", PLAIN, {31})
    assert same(plain(tmp_path / "out"), rp.slimmed(alike, subject, layout="ragged"))


def test_a_ragged_directory_stays_ragged_in_later_exports(tmp_path: Path):
    subject = tiny("llama")
    rp.export(pruned_layers(subject), subject, tmp_path / "one", **RAGGED)
    ragged = rp.load(tmp_path / "one", attention="eager")
    later = projection(ragged, "1.mlp.out")
    for source in (tmp_path / "one", ragged, rp.slimmed(pruned_layers(subject), subject, layout="ragged")):
        record = rp.export(later, source, tmp_path / "two", overwrite=True)
        assert record.layout == "ragged" and record.structure == "keep" and record.loaders == ("repedit.load",)
        assert same(rp.load(tmp_path / "two"), rp.apply(later, ragged))
    record = rp.export(erasure(ragged), tmp_path / "one", tmp_path / "three", **SLICE)
    assert record.layout == "ragged" and same(rp.load(tmp_path / "three"), rp.sliced(erasure(ragged), ragged))


def test_widths_that_do_not_fit_the_files_are_refused(tmp_path: Path):
    subject = tiny("llama")
    rp.export(pruned_layers(subject), subject, tmp_path / "out", **RAGGED)
    path = tmp_path / "out" / "repedit.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"widths": {"0": 3, "1": 4}}))
    with pytest.raises(CheckpointError, match=r"holds MLPs of widths \[\d+, \d+\], its repedit.json records \[3, 4\]"):
        rp.load(tmp_path / "out")
    path.write_text(json.dumps(record | {"widths": None}))
    with pytest.raises(CheckpointError, match="has layout 'ragged' and no widths by layer"):
        rp.load(tmp_path / "out")
    path.write_text(json.dumps(record | {"layout": "uniform"}))
    with pytest.raises(CheckpointError, match="does not hold the model its config describes"):
        rp.load(tmp_path / "out")


def test_exports_of_other_shapes_stand_on_their_own(tmp_path: Path):
    subject = tiny("llama")
    edit = pruned_layers(subject) | pruned_groups(subject)
    rp.export(edit, subject, tmp_path / "slim", structure="slim")
    slim = rp.slimmed(edit, subject)
    rp.export(erasure(slim), tmp_path / "slim", tmp_path / "both", **SLICE)
    both = rp.sliced(erasure(slim), slim)
    assert rp.reload_check(tmp_path / "both").parameters == laws.parameters(both)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    erased = rp.apply([edit, erasure(slim)], subject).model.generate(ids(), **options)
    assert torch.equal(plain(tmp_path / "both").model.generate(ids(), **options), erased)


def test_the_manifest_the_card_and_the_certificate_say_what_a_slice_is(tmp_path: Path):
    subject = tiny("llama")
    edit = erasure(subject)
    rp.export(rp.Edit({}), subject, tmp_path / "original", allow_identity=True)
    rp.export(edit, tmp_path / "original", tmp_path / "out", **SLICE, dtype="bfloat16")
    record = json.loads((tmp_path / "out" / "repedit.json").read_text())
    found = rp.certificate(tmp_path / "out", edit, tmp_path / "original")
    assert record["certificate"] == json.loads(json.dumps(found.plain())) and found.form == "sliced"
    assert record["plan"]["model.layers.0.mlp.up_proj.weight"] | {"sha256_before": 0, "sha256_after": 0} == {
        "operations": ["reads: 24 coordinates of the stream become 20, model.layers.0.post_attention_layernorm.weight absorbed"],
        "relative_change": None, "sha256_before": 0, "sha256_after": 0,
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "has 20 coordinates where the base has 24" in card and "learn it there again" in card
    assert f"{record['parameters']['after']:,} parameters, those of the base {record['parameters']['before']:,}" in card


def test_a_head_that_files_hold_although_it_is_tied_is_sliced_as_a_reader(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    subject = tiny("llama")
    subject.model.save_pretrained(tmp_path / "in")
    weights = load_file(tmp_path / "in" / "model.safetensors")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | head, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    rp.export(erasure(subject), tmp_path / "in", tmp_path / "out", **SLICE)
    assert same(plain(tmp_path / "out"), rp.sliced(erasure(subject), subject))


def test_several_edits_slim_as_one_and_a_plan_is_taken_as_it_is(tmp_path: Path):
    subject = tiny("llama")
    first, second = pruned_layers(subject), mask(subject, "0.mlp.neurons", 0.2, seed=7)
    record = rp.export([first, second], subject, tmp_path / "out", **RAGGED)
    expected = rp.slimmed(first | second, subject, layout="ragged")
    assert same(rp.load(tmp_path / "out"), expected) and record.layout == "ragged"
    rp.export(rp.Edit({}), subject, tmp_path / "original", allow_identity=True)
    plan = slim_plan(first, subject.architecture, open_shards(tmp_path / "original").specs)
    rp.export(plan, tmp_path / "original", tmp_path / "planned")
    assert same(plain(tmp_path / "planned"), rp.slimmed(first, subject))
    with pytest.raises(ArgumentError, match="the plan has structure 'slim', 'slice' was asked for; pass the edit"):
        rp.export(plan, tmp_path / "original", tmp_path / "none", **SLICE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"structure": "thin"}, ArgumentError, "structure='thin' is 'keep', 'slim' or 'slice'"),
        ({"layout": "ragged"}, ArgumentError, "layout='ragged', multiple=None with structure='keep': layout belongs"),
        ({"multiple": 8}, ArgumentError, "multiple=8 with structure='keep'"),
        ({"structure": "slice", "layout": "ragged"}, ArgumentError, "with structure='slice': layout belongs to 'slim'"),
        ({"structure": "slice", "tied": "both"}, ArgumentError, "a sliced head is always untied"),
        (SLICE, NotSliceable, "build it with erase_stream"),
    ],
)
def test_options_of_another_structure_are_refused(options, error, message, tmp_path: Path):
    subject = tiny("llama")
    with pytest.raises(error, match=message):
        rp.export(pruned_layers(subject), subject, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_delta_and_nothing_are_refused(tmp_path: Path):
    subject = tiny("llama")
    delta = rp.Delta({"model.norm.weight": torch.ones(24)})
    with pytest.raises(
        NotSlimmable, match="a delta changes values and removes nothing that structure='slim' could cut"
    ):
        rp.export([pruned_layers(subject), delta], subject, tmp_path / "out", structure="slim")
    with pytest.raises(NotSliceable, match="structure='slice' could cut; apply it first"):
        rp.export(delta, subject, tmp_path / "out", **SLICE)
    with pytest.raises(ArgumentError, match="no edit was given"):
        rp.export([], subject, tmp_path / "out", **SLICE)


def test_a_config_that_refuses_is_heard_before_anything_is_written(tmp_path: Path):
    subject = tiny("phi3")
    subject.model.config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "factor": 1.0,
        "original_max_position_embeddings": 64, "short_factor": [1.0] * 3, "long_factor": [1.0] * 3,
    }  # fmt: skip
    with pytest.raises(NotSliceable, match=r"the config of phi3 refuses hidden_size=20.*length 2, got 3"):
        rp.export(erasure(subject), subject, tmp_path / "out", **SLICE)
    assert not list(tmp_path.iterdir())


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output + str(result.exception)
    return " ".join(result.output.split())


@pytest.mark.filterwarnings("ignore::repedit.neurons.scores.CollinearWarning")
def test_verbs_write_other_shapes_and_say_who_reads_them(tmp_path: Path):
    model = saved(tmp_path / "tiny")
    words = ("prune", model, "--fraction", "0.4", "--limit-tokens", "400", "--structure", "slim", "--layout", "ragged")
    text = run(*words, "--out", tmp_path / "ragged")
    assert "read by: repedit.load" in text and "plain transformers cannot, its layers have different widths" in text
    words = (
        "prune",
        model,
        "--fraction",
        "0.01",
        "--limit-tokens",
        "400",
        "--structure",
        "slim",
        "--out",
        tmp_path / "none",
    )
    with pytest.raises(
        NotSlimmable,
        match=r"nothing would be cut.*what was computed is kept in \S+none.rescued.safetensors: repedit apply",
    ):
        CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert rp.Edit.load(tmp_path / "none.rescued.safetensors").maps and not (tmp_path / "none").exists()
    rp.erase_stream(rp.load(model), basis()).save(tmp_path / "edit.safetensors")
    sliced = ("apply", tmp_path / "edit.safetensors", model, "--structure", "slice")
    assert "coordinates of the stream become 20" in run(*sliced, "--dry-run")
    text = run(*sliced, "--out", tmp_path / "sliced", "--no-verify", "--json")
    found = json.loads(text[text.index("{") :])
    assert found["loaders"] == list(PLAIN) and found["structure"] == "slice"
    wrong = (*sliced, "--structure", "slim", "--out", "e.safetensors")
    with pytest.raises(ArgumentError, match="--structure slim writes a checkpoint: give a directory"):
        CliRunner().invoke(app, [str(w) for w in wrong], catch_exceptions=False)
    refused = CliRunner().invoke(app, [str(w) for w in (*sliced, "--structure", "thin")], env={"COLUMNS": "200"})
    assert refused.exit_code == 2 and "'thin' is not one of 'keep', 'slim', 'slice'" in refused.output
