"""A post-norm that multiplies some channels by zero, as real Gemma 3 models have them, is checked and folded like any other."""

import pytest
import torch

import repedit as rp
from repedit.arch.infer import check_architecture
from repedit.errors import NotFoldable, UnknownArchitecture
from repedit.lower import lower
from repedit.plan import Plan
from tests import laws
from tests.edits import mask, projection
from tests.tiny import logits, tiny

FAMILIES = ("gemma2", "gemma3_text", "olmo2")
GAINS = {"zero": 0.0, "tiny": 1e-30, "negative tiny": -1e-30}
DEAD = [0, 5, 11]


def with_gains(family, value, dtype=torch.float32):
    """A tiny model whose post-norms multiply three channels by a value."""
    subject = tiny(family, dtype)
    for layer in range(2):
        for point in (rp.Point.ATTN_OUT, rp.Point.MLP_OUT):
            name = subject.layout.branch(layer, point).gain
            subject.model.get_parameter(name).data[DEAD] = value - (1.0 if subject.architecture.unit_gain else 0.0)
    return subject


every = pytest.mark.parametrize(("family", "gain"), [(f, g) for f in FAMILIES for g in GAINS.values()])


@every
def test_the_row_of_such_a_model_is_proved(family, gain):
    assert check_architecture(with_gains(family, gain).model).passed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_that_silences_its_branch_is_named(family):
    subject = tiny(family)
    name = subject.layout.branch(1, rp.Point.MLP_OUT).gain
    subject.model.get_parameter(name).data[:] = -1.0 if subject.architecture.unit_gain else 0.0
    with pytest.raises(
        UnknownArchitecture, match=rf"{name} multiplies every channel by zero, so 1\.mlp\.out adds nothing"
    ):
        check_architecture(subject.model)


@every
@pytest.mark.parametrize("site", ["1.mlp.out", "0.attn.out"])
def test_a_projection_before_such_a_norm_removes_the_subspace(family, gain, site):
    subject = with_gains(family, gain)
    laws.subspace_is_gone(subject, projection(subject, site))


@every
def test_it_points_where_the_hook_points(family, gain):
    subject = with_gains(family, gain)
    edit = projection(subject, "1.mlp.out")
    (map_,) = edit.maps.values()
    hooked = map_(laws.seen_at(subject, rp.Site.parse("1.mlp.out")))
    folded = laws.seen_at(rp.apply(edit, subject), rp.Site.parse("1.mlp.out"))
    assert float(torch.nn.functional.cosine_similarity(hooked, folded, dim=-1).min()) > 1 - 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_holds_the_weights_of_the_edited_model(family, tmp_path):
    subject = with_gains(family, 0.0)
    laws.rewritten_equals_exported(subject, projection(subject, "1.mlp.out"), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_gains_are_gains(family):
    subject = with_gains(family, -0.7)
    edit = projection(subject, "1.mlp.out")
    laws.subspace_is_gone(subject, edit)
    gain = subject.layout.branch(1, rp.Point.MLP_OUT).gain
    assert gain not in lower(edit, subject.architecture, subject.specs).resolved(subject.value).operations


def test_an_edit_of_neurons_leaves_the_norm_alone():
    subject = with_gains("gemma3_text", 0.0)
    laws.hooked_equals_rewritten(subject, mask(subject, "1.mlp.neurons"))


def test_two_edits_with_a_delta_between_them_are_refused(monkeypatch):
    subject = with_gains("olmo2", 0.0)
    edit = projection(subject, "1.mlp.out")
    delta = rp.Delta({"model.norm.weight": torch.ones(24)})
    with pytest.raises(NotFoldable, match="some of whose gains are 0, more than once in this plan; apply"):
        rp.apply([edit, delta, edit], subject)


def test_a_fold_that_divides_by_zero_is_caught(monkeypatch):
    subject = with_gains("olmo2", 0.0)
    monkeypatch.setattr(Plan, "resolved", lambda plan, read: plan)
    with pytest.raises(AssertionError):
        laws.subspace_is_gone(subject, projection(subject, "1.mlp.out"))
    assert bool(torch.isfinite(logits(subject)).all())
