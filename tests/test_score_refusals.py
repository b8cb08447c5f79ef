"""Scores that would mislead are refused, with what to do instead."""

import re

import pytest

import repedit as rp
from repedit.errors import (
    ArgumentError,
    FingerprintError,
    MissingStatistic,
    OverlapError,
    ShapeError,
    UnknownName,
    UnsuitableImportance,
)
from tests.handmade_collections import WIDTHS, collection, pair, rows_of

REFUSALS = {
    "unknown importance": ({"importance": "asb"}, UnknownName, "importance='asb' does not exist; did you mean 'abs'. All: abs, rms, std"),
    "unknown combination": ({"combine": "diference"}, UnknownName, "combine='diference' does not exist; did you mean 'difference'"),
    "unknown second": ({"combine": "rank", "second": "gax"}, UnknownName, "second='gax' does not exist; did you mean 'gxa'"),
    "unknown norm": ({"norm": "layers"}, UnknownName, "norm='layers'; did you mean 'layer'"),
    "eps without a kind": ({"combine": "ratio", "eps": "1e-3"}, UnknownName, "eps='1e-3'; write 'rel:1e-3' .times the layer's median"),
    "eps of another kind": ({"combine": "logratio", "eps": "abs:1"}, UnknownName, "eps='abs:1'; write"),
    "eps without a number": ({"combine": "rank", "eps": "rel:"}, UnknownName, "eps='rel:'; write"),
    "negative eps": ({"combine": "ratio", "eps": -1.0}, UnknownName, "eps=-1.0; write 'rel:1e-3' .*or a number >= 0"),
    "nan eps": ({"combine": "ratio", "eps": "rel:nan"}, UnknownName, "eps='rel:nan'; write"),
    "signed ratio": ({"importance": "attribution", "combine": "ratio", "signed": True}, UnsuitableImportance, "selectivity -13.7 at 1 % and -7.8 at 3 %; use importance='gxa'"),
    "signed difference": ({"importance": "attribution_mean"}, UnsuitableImportance, "combine='difference' with signed=True to insist"),
    "weights absent": ({"weighted": True}, ArgumentError, "weighted=True needs the outgoing weights: pass subject="),
    "setdiff alone": ({"combine": "setdiff"}, ArgumentError, "combine='setdiff' needs the fractions q and p .*q=None, p=None"),
    "setdiff per cent": ({"combine": "setdiff", "q": 5.0, "p": 0.1}, ArgumentError, r"found q=5.0, p=0.1"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_choice_that_cannot_work_is_refused(options, error, message):
    _, (forget, retain) = pair()
    with pytest.raises(error, match=message):
        rp.score(forget, retain, warn=False, **options)


@pytest.mark.parametrize("importance", ["gxa", "taylor", "fisher"])
def test_gradient_importances_need_gradient_sums(importance):
    _, (forget, retain) = pair(gradients=False)
    with pytest.raises(MissingStatistic, match=re.escape("collect with collect(..., gradients=True)")):
        rp.score(forget, retain, importance=importance)


def test_frequency_is_refused_on_gated_neurons_unless_insisted_on():
    _, (forget, retain) = pair(gated=True)
    with pytest.raises(
        UnsuitableImportance, match=r"arbitrary sign: measured selectivity -5.5 .* use importance='abs'"
    ):
        rp.score(forget, retain, importance="frequency")
    assert len(rp.score(forget, retain, importance="frequency", signed=True, warn=False)) == 2
    assert len(rp.score(*pair()[1], importance="frequency", warn=False)) == 2


MISMATCHES = {
    "same data": ({"data_hash": "forget"}, OverlapError, r"are the same data \('forget'\); a score would be noise"),
    "models": ({"model": "n" * 64}, FingerprintError, "forget was collected on model mmmmmmmmmmmm, retain on nnnnnnnnnnnn"),
    "edits": ({"edit": "abc"}, FingerprintError, "forget was collected with edit none, retain with abc; collect both alike"),
    "rules": ({"rule": {"first_position": True}}, FingerprintError, "with rule none, retain with .'first_position': True"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), MISMATCHES.values(), ids=MISMATCHES)
@pytest.mark.parametrize("function", [rp.score, rp.agreement])
def test_collections_that_do_not_belong_together_are_refused(function, changes, error, message):
    with pytest.raises(error, match=message):
        function(collection(rows_of(), "forget"), collection(rows_of(1), "retain", **changes))


def test_sites_and_widths_must_agree():
    forget = collection(rows_of(), "f")
    with pytest.raises(ShapeError, match=r"forget has 2 sites, retain 1; they differ at 1.mlp.neurons"):
        rp.score(forget, collection(rows_of(widths={"0.mlp.neurons": 6}), "r"))
    with pytest.raises(ShapeError, match=r"1.mlp.neurons: widths 5 and 4; were they collected on the same model"):
        rp.score(forget, collection(rows_of(widths=WIDTHS | {"1.mlp.neurons": 4}), "r"))
    with pytest.raises(OverlapError, match="a score would be noise"):
        rp.score(forget, forget)
    with pytest.raises(UnknownName, match="importance='bas' does not exist"):
        rp.agreement(forget, collection(rows_of(1), "r"), importance="bas")
