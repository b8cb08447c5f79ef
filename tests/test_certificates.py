"""Certificates: what is measured of a fold, and what is refused."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
import torch

import repedit as rp
from repedit.errors import ArgumentError, CheckpointError, NotFoldable, PlanMismatch
from repedit.kernels.dispatch import LEAK_LIMITS
from repedit.rewrite import certificate as certificate_module
from tests.edits import mask, projection
from tests.test_laws import every_dtype, every_family
from tests.tiny import tiny
from tests.tolerances import short, within


@every_dtype
@every_family
@pytest.mark.parametrize("site", ["1.mlp.out", "0.attn.out"])
def test_a_fold_leaves_only_rounding(family, site, dtype):
    subject = tiny(family, dtype)
    edit = projection(subject, site)
    found = rp.certificate(rp.apply(edit, subject), edit, subject)
    post = subject.layout.branch(1, rp.Point.MLP_OUT).gain is not None
    assert (found.form, found.rank) == ("folded", 3)
    assert found.exactness == ("subspace-exact" if post else "exact")
    assert found.worst_leak <= LEAK_LIMITS[dtype]
    for row in found.tensors.values():
        assert row.rank == 3 and row.leak_computed <= 1e-5
        within(abs(row.residue), f"residue, {short(dtype)}")


def test_the_leak_is_the_one_computed_by_hand():
    subject = tiny("llama", torch.bfloat16)
    edit = projection(subject, "1.mlp.out")
    edited = rp.apply(edit, subject)
    ((name, row),) = rp.certificate(edited, edit, subject).tensors.items()
    u = next(iter(edit.maps.values())).u.double()
    old, new = (u.T @ dict(s.model.named_parameters())[name].detach().double() for s in (subject, edited))
    assert row.leak == pytest.approx(float(new.norm() / old.norm()), rel=1e-4)
    assert row.residue == pytest.approx(float((old * new).sum() / old.square().sum()), rel=1e-4, abs=1e-6)
    assert row.leak > 100 * row.leak_computed and row.dtype == "bfloat16"


def test_weights_that_were_not_edited_are_a_hook_and_hold_everything():
    subject = tiny("llama")
    edit = projection(subject, "1.mlp.out")
    found = rp.certificate(subject, edit, subject)
    assert found.form == "hook" and found.worst_leak == pytest.approx(1.0)
    assert "whoever removes the hook has the original back" in found.describe()


def test_half_a_fold_is_refused():
    subject = tiny("llama")
    edit = projection(subject, "1.mlp.out") | projection(subject, "0.attn.out")
    half = rp.apply(projection(subject, "1.mlp.out"), subject)
    with pytest.raises(
        PlanMismatch, match=r"1 of 2 tensors still hold removed directions, such as .*layers\.0.* \(leak 1\)"
    ):
        rp.certificate(half, edit, subject)


def test_an_affine_map_is_measured_about_its_center():
    for family in ("gpt2", "llama"):
        subject = tiny(family)
        edit = projection(subject, "1.mlp.out", center=True)
        found = rp.certificate(rp.apply(edit, subject), edit, subject)
        assert found.form == "folded" and len(found.tensors) == 2 and found.worst_leak < 1e-5


def test_a_stream_erasure_and_a_reader_side_edit_are_certified_too():
    subject = tiny("llama")
    edit = rp.erase_stream(subject, torch.randn(24, 2, dtype=torch.float64)) | projection(subject, "0.mlp.neurons")
    found = rp.certificate(rp.apply(edit, subject), edit, subject)
    assert found.rank == 2 * 5 + 3 and len(found.tensors) == 5 and found.worst_leak < 1e-5


def test_the_manifest_carries_the_certificate_and_files_can_be_certified(tmp_path: Path):
    subject = tiny("llama")
    edit = projection(subject, "1.mlp.out")
    rp.export(rp.Edit({}), subject, tmp_path / "original", allow_identity=True)
    rp.export(edit, tmp_path / "original", tmp_path / "edited", dtype="bfloat16")
    written = json.loads((tmp_path / "edited" / "repedit.json").read_text())["certificate"]
    found = rp.certificate(tmp_path / "edited", edit, tmp_path / "original")
    assert written == json.loads(json.dumps(found.plain()))
    assert found.tensors["model.layers.1.mlp.down_proj.weight"].dtype == "bfloat16"
    assert json.loads((tmp_path / "original" / "repedit.json").read_text())["certificate"] is None
    with pytest.raises(ArgumentError, match="edited is in memory and original a directory"):
        rp.certificate(subject, edit, tmp_path / "original")


def test_edits_without_a_projection_or_without_weights_are_refused():
    subject = tiny("llama")
    pruned = mask(subject, "1.mlp.neurons")
    with pytest.raises(ArgumentError, match="the edit holds no projection"):
        rp.certificate(rp.apply(pruned, subject), pruned, subject)
    with pytest.raises(NotFoldable, match="residual stream"):
        rp.certificate(subject, projection(subject, "0.resid.post"), subject)


def low_rank(inner, d, seed=0):
    """A map x - U V^T x with V orthonormal and V^T U as given."""
    v = torch.linalg.qr(
        torch.randn(d, len(inner), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).Q
    return rp.LowRank(v @ torch.tensor(inner, dtype=torch.float64), v)


SCALED, TURNED, HALF = [[0.5, 0.0], [0.0, 0.9]], [[0.0, 1.0], [-1.0, 0.0]], [[1.0, 0.7], [0.0, 0.5]]


@pytest.mark.parametrize("site", ["1.mlp.out", "1.mlp.neurons", "0.attn.out"])
@pytest.mark.parametrize("inner", [SCALED, TURNED])
def test_a_map_that_removes_nothing_is_certified_to_keep_everything(inner, site, tmp_path: Path):
    subject = tiny("llama")
    edit = rp.Edit({rp.Site.parse(site): low_rank(inner, subject.layout.width_of(1, rp.Site.parse(site).point))})
    edited = rp.apply(edit, subject)
    found = rp.certificate(edited, edit, subject)
    assert (found.form, found.rank, found.worst_leak, dict(found.tensors)) == ("folded", 0, 1.0, {})
    ((name, reason),) = found.uncertified.items()
    assert reason.startswith("a map x - U V^T x with V^T U != I keeps 2 of its 2 directions")
    assert f"{name}: {reason}" in found.describe() and "the weights hold the map" in found.describe()
    rp.export(edit, subject, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "repedit.json").read_text())["certificate"] == json.loads(
        json.dumps(found.plain())
    )
    # The map has an inverse, so that the original comes back from the edited weights.
    map_ = next(iter(edit.maps.values()))
    inverse = torch.linalg.inv(map_.as_matrix())
    new, old = (s.value(name).double() for s in (edited, subject))
    back = new @ inverse if site.endswith("neurons") else inverse @ new
    within(float((back - old).norm() / old.norm()), "logits, float32")


@pytest.mark.parametrize("site", ["1.mlp.out", "1.mlp.neurons"])
@pytest.mark.parametrize("center", [False, True])
def test_of_a_map_that_removes_some_directions_those_are_certified(site, center):
    subject = tiny("gpt2")
    where = rp.Site.parse(site)
    map_ = low_rank(HALF, subject.layout.width_of(1, where.point))
    if center:
        map_ = rp.LowRank(map_.u, map_.v, torch.randn(map_.width, dtype=torch.float64))
    edit = rp.Edit({where: map_})
    found = rp.certificate(rp.apply(edit, subject), edit, subject)
    assert (found.form, found.rank) == ("folded", 1) and found.worst_leak < LEAK_LIMITS[torch.float32]
    assert all("keeps 1 of its 2 directions" in reason for reason in found.uncertified.values())
    assert set(found.uncertified) == set(found.tensors)
    with pytest.raises(PlanMismatch, match="still hold removed directions"):
        other = rp.apply(rp.Edit({where: low_rank(HALF, map_.width, seed=1)}), subject)
        rp.certificate(other, edit, subject)


def test_a_projection_beside_another_map_says_which_tensor_is_not_certified():
    subject = tiny("llama")
    edit = projection(subject, "0.mlp.out") | rp.Edit({rp.Site.parse("1.mlp.out"): low_rank(SCALED, 24)})
    found = rp.certificate(rp.apply(edit, subject), edit, subject)
    assert list(found.tensors) == ["model.layers.0.mlp.down_proj.weight"] and found.worst_leak < 1e-5
    assert list(found.uncertified) == ["model.layers.1.mlp.down_proj.weight"]
    assert "uncertified" not in rp.certificate(rp.apply(projection(subject, "0.mlp.out"), subject),
                                               projection(subject, "0.mlp.out"), subject).plain()  # fmt: skip


def test_all_directions_of_a_map_taken_for_removed_would_leak(monkeypatch):
    monkeypatch.setattr(certificate_module, "_removed", lambda op: torch.eye(op.map.u.shape[1], dtype=torch.float64))
    subject = tiny("llama")
    edit = rp.Edit({rp.Site.parse("1.mlp.out"): low_rank(HALF, 24)})
    with pytest.raises(PlanMismatch, match="still hold removed directions"):
        rp.certificate(rp.apply(edit, subject), edit, subject)


SUMMARIES = {
    "projection": (lambda lm: projection(lm, "0.mlp.out"), {}, r"3 directions over 1 tensor, exact, largest leak .*down_proj\.weight\)"),
    "nothing whole": (lambda lm: rp.Edit({rp.Site.parse("1.mlp.out"): low_rank(SCALED, 24)}), {}, "no direction is removed whole, so none is certified"),
    "half": (lambda lm: rp.Edit({rp.Site.parse("1.mlp.out"): low_rank(HALF, 24)}), {}, "1 direction over 1 tensor, exact"),
    "both": (lambda lm: projection(lm, "0.mlp.out") | rp.Edit({rp.Site.parse("1.mlp.out"): low_rank(SCALED, 24)}), {}, "3 directions over 1 tensor, exact"),
    "neurons": (lambda lm: mask(lm, "0.mlp.neurons"), {}, "no certificate: nothing was projected"),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMMARIES)
def test_every_place_says_the_same_of_a_certificate(name, tmp_path: Path):
    make, options, sentence = SUMMARIES[name]
    subject = tiny("llama")
    record = rp.export(make(subject), subject, tmp_path / "out", **options)
    plain = json.loads((tmp_path / "out" / "repedit.json").read_text())["certificate"]
    pushed = rp.push(tmp_path / "out", "someone/edited").describe()
    assert re.search(sentence, pushed)
    if plain is None:
        return
    found = certificate_module.Certificate.of(plain)
    assert found.plain() == {**record.certificate, "tensors": found.plain()["tensors"]} and found.summary in pushed
    assert found.summary[1:] in found.describe() and found.summary in brief(tmp_path / "out")


def brief(folder: Path) -> str:
    """What the page of a run says first of an export."""
    from types import SimpleNamespace

    from repedit.report.pages import ENVIRONMENT
    from repedit.report.run_pages import _certificate
    from repedit.rewrite.verification import verification

    parts = ENVIRONMENT.get_template("run_parts.html.jinja2").module
    run = SimpleNamespace(checkpoints={"out": verification(folder)}, audits={}, label=lambda out: out)
    return html.unescape(str(parts.brief(run, [], _certificate)))


@pytest.mark.parametrize("values", [{}, {"tensors": 3}, {"tensors": {"w": {}}}, {"tensors": {}, "future": 1}])
def test_what_is_no_certificate_is_refused(values):
    with pytest.raises(CheckpointError, match="the certificate in a manifest cannot be read"):
        certificate_module.Certificate.of(values)
