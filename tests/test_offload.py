"""Law: where the weights of a model lie plays no part in what is measured of it; nothing that is put off is skipped."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

import repedit as rp
from repedit.arch import offload
from repedit.arch.infer import check_architecture
from repedit.arch.offload import execution_device
from repedit.data.corpus import tokens
from repedit.errors import NotFinite, OffloadedTensors
from repedit.hashing import fingerprint
from repedit.models.loading import check_finite_weights
from repedit.models.subject import subject_of
from repedit.neurons.scores import outgoing_norms
from repedit.stats import CrossMoments, Moments
from tests.edits import mask, projection
from tests.test_distributed import values
from tests.test_export_safety import content
from tests.tiny import ids, logits, tiny

PLACES = {
    "llama": ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head"),
    "mixtral": ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head"),
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f", "lm_head"),
}
STATISTICS = {
    "activity": ("*.mlp.neurons", {}),
    "gradients": ("*.attn.neurons", {"gradients": True}),
    "moments": ("*.mlp.out,1.resid.mid", {"statistic": Moments}),
    "cross": ("1.mlp.out", {"statistic": CrossMoments, "gradients": True}),
}


def spread(family, folder, change=None):
    """A model with its first layer in memory, and on disk what comes behind it."""
    model = copy.deepcopy(tiny(family).model)
    if change is not None:
        with torch.no_grad():
            change(model)
    places = {name: "disk" if "1" in name or "norm" in name or "ln_f" in name else "cpu" for name in PLACES[family]}
    return rp.wrap(dispatch_model(model, device_map=places, main_device="cpu", offload_dir=folder))


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_those_of_a_model_in_memory(name, family, tmp_path):
    away, (sites, options) = spread(family, tmp_path), STATISTICS[name]
    assert any(p.device.type == "meta" for p in away.model.parameters())
    corpus = tokens([{"input_ids": ids()}])
    found, expected = (rp.collect(s, corpus, sites, progress=False, **options) for s in (away, tiny(family)))
    assert found.model == expected.model and list(found) == list(expected)
    for site in expected:
        for mine, theirs in zip(values(found[site]), values(expected[site]), strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("family", PLACES)
def test_a_hooked_edit_acts_on_it(family, tmp_path):
    away, near = spread(family, tmp_path), tiny(family)
    for edit in (projection(near, "1.mlp.out"), mask(near, "1.mlp.neurons")):
        with edit.hooked(away), edit.hooked(near):
            edited = logits(near)
            assert torch.equal(logits(away), edited)
        assert torch.equal(logits(away), logits(near)) and not torch.equal(edited, logits(near))


def turned(model):
    model.model.layers[1].mlp.down_proj.weight[0, 0] += 1


def test_a_fingerprint_holds_what_is_put_off(tmp_path):
    one, other = spread("llama", tmp_path / "one"), spread("llama", tmp_path / "other", turned)
    assert fingerprint(one.model) == tiny("llama").fingerprint() != fingerprint(other.model)


def test_leaving_out_what_is_put_off_would_be_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "_stores", lambda module, leaf: ())
    one, other = spread("llama", tmp_path / "one"), spread("llama", tmp_path / "other", turned)
    assert fingerprint(one.model) == fingerprint(other.model)


def test_edits_in_place_are_refused_and_export_streams_the_files(source, tmp_path):
    edit = mask(tiny("llama"), "1.mlp.neurons")
    away = spread("llama", tmp_path / "away")
    with pytest.raises(OffloadedTensors, match=r"not in memory \(model\.layers\.1"):
        rp.apply(edit, away)
    with pytest.raises(OffloadedTensors, match=r"export\(edit, source=directory"):
        rp.export(edit, away, tmp_path / "none")
    rp.export(edit, subject_of(away.model, source=source), tmp_path / "out")
    rp.export(edit, source, tmp_path / "expected")
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_a_damaged_weight_on_disk_is_found(tmp_path):
    def damage(model):
        model.model.layers[1].mlp.down_proj.weight[2, 3] = torch.nan

    away = spread("llama", tmp_path, damage)
    with pytest.raises(NotFinite, match=r"layers\.1\.mlp\.down_proj\.weight' is not finite at \(2, 3\)"):
        check_finite_weights(away.model)


def test_a_layer_computes_where_its_weights_are_or_are_brought():
    here, there = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    assert execution_device(here) == torch.device("cpu") and execution_device(there) == torch.device("meta")
    there._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert execution_device(nn.Sequential(there)) == torch.device("cuda:1")
    there._hf_hook = SimpleNamespace(hooks=(SimpleNamespace(), SimpleNamespace(execution_device="cuda:3")))
    assert execution_device(there) == torch.device("cuda:3")


def test_values_are_read_wherever_they_are(tmp_path):
    away, near = spread("llama", tmp_path), tiny("llama")
    assert all(torch.equal(away.value(name), near.value(name)) for name in near.specs)
    assert torch.equal(
        outgoing_norms(away, rp.Site.parse("1.mlp.neurons")), outgoing_norms(near, rp.Site.parse("1.mlp.neurons"))
    )
    nowhere = rp.wrap(copy.deepcopy(near.model).to("meta"))
    with pytest.raises(OffloadedTensors, match=r"norm\.weight has a shape and no values.*load its weights"):
        nowhere.value("model.norm.weight")


def test_a_check_of_the_family_needs_the_weights_in_memory(tmp_path):
    with pytest.raises(OffloadedTensors, match=r"not in memory \(model\.layers\.1.*without device_map to check"):
        check_architecture(spread("llama", tmp_path).model)
