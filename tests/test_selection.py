"""Selection: how many neurons go, which ones, what is left in their place, and controls of the same size."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import repedit as rp
from repedit.errors import ArgumentError, FractionError, MissingStatistic, SelectionError, ShapeError, UnknownName
from tests.edits import projection
from tests.handmade_collections import collection, rows_of
from tests.tiny import tiny

MLP, ATTN = ("0.mlp.neurons", "1.mlp.neurons"), ("0.attn.neurons", "1.attn.neurons")


def _scores(*values, sites=MLP, units=None, sinks=()):
    found = {}
    for name, row in zip(sites, values, strict=True):
        site = rp.Site.parse(name)
        row = torch.as_tensor(row, dtype=torch.float64)
        found[site] = rp.Score(site, row, "abs", "difference", 0.5, sinks, group_sizes=units or {})
    return rp.Scores(found, {"method": "by hand", "options": {"importance": "abs"}, "model": "m" * 64})


def _random(width=50, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return _scores(*(torch.randn(width, generator=generator) for _ in range(2)), **options)


def _pruned(keep):
    return {str(site): (~mask).nonzero()[:, 0].tolist() for site, mask in keep.items()}


def _count(keep):
    return sum(int((~mask).sum()) for mask in keep.values())


@given(n=st.integers(1, 300), percent=st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_k_is_the_floor_of_the_fraction_as_it_is_written(n, percent):
    scores, expected = _scores(torch.randn(n), sites=MLP[:1]), percent * n // 100
    if expected:
        assert _count(rp.top(scores, fraction=percent / 100)) == expected
    else:
        with pytest.raises(SelectionError, match="selects none"):
            rp.top(scores, fraction=percent / 100)


def test_29_per_cent_of_a_hundred_are_29():
    assert _count(rp.top(_random(), fraction=0.29)) == 29


def test_the_highest_scores_go():
    keep = rp.top(_scores([0.1, 0.9, 0.3], [0.8, 0.2, 0.7]), fraction=0.5)
    assert _pruned(keep) == {"0.mlp.neurons": [1], "1.mlp.neurons": [0, 2]}


@given(seed=st.integers(0, 10**6), fractions=st.tuples(st.integers(1, 100), st.integers(1, 100)))
@settings(max_examples=40, deadline=None)
def test_the_mask_of_a_smaller_fraction_is_part_of_that_of_a_larger(seed, fractions):
    scores = _random(seed=seed)
    small, large = (rp.top(scores, fraction=f / 100) for f in sorted(fractions))
    assert all(not bool((large[site] & ~small[site]).any()) for site in small)


def test_ties_go_to_the_lower_layer_then_the_lower_index():
    assert _pruned(rp.top(_scores([1, 2, 1], [2, 1, 1]), fraction=4 / 6)) == {MLP[0]: [0, 1, 2], MLP[1]: [0]}
    assert _pruned(rp.top(_scores([1] * 3, [1] * 3), fraction=4 / 6)) == {MLP[0]: [0, 1, 2], MLP[1]: [0]}


def test_the_layer_scope_takes_the_same_fraction_of_each():
    keep = rp.top(_scores([9, 8, 7, 6], [1, 2, 3, 4]), fraction=0.5, scope="layer")
    assert _pruned(keep) == {MLP[0]: [0, 1], MLP[1]: [2, 3]}


def test_a_cap_bounds_the_share_of_a_layer():
    keep = rp.top(_scores([9, 8, 7, 6], [1, 2, 3, 4]), fraction=0.5, cap_per_layer=0.75)
    assert _pruned(keep) == {MLP[0]: [0, 1, 2], MLP[1]: [3]}


def test_protected_neurons_stay():
    protect = {rp.Site.parse(MLP[0]): torch.tensor([True, False, True, False])}
    keep = rp.top(_scores([9, 8, 7, 6], [1, 2, 3, 4]), fraction=0.5, protect=protect)
    assert _pruned(keep) == {MLP[0]: [1, 3], MLP[1]: [2, 3]}


def test_neurons_with_score_minus_infinity_stay():
    keep = rp.top(_scores([-torch.inf, 1, 2], [-torch.inf, 3, 4]), fraction=4 / 6)
    assert _pruned(keep) == {MLP[0]: [1, 2], MLP[1]: [1, 2]}


HEADS = {"head": 3, "kv_group": 6}


@pytest.mark.parametrize(("unit", "size"), HEADS.items())
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_units_are_whole_and_chosen_by_their_mean(unit, size, seed, k):
    scores = _random(12, seed, sites=ATTN, units=HEADS)
    units = 24 // size
    keep = rp.top(scores, fraction=k / units, unit=unit)
    means = torch.cat([s.values.unflatten(0, (-1, size)).mean(1) for s in scores.values()])
    gone = torch.cat([~mask for mask in keep.values()]).unflatten(0, (-1, size))
    assert bool((gone.all(1) == gone.any(1)).all())
    assert set(gone.all(1).nonzero()[:, 0].tolist()) == set(means.argsort(descending=True)[:k].tolist())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_heads_of_a_model_have_the_width_of_its_weights(family):
    from tests.planted_neurons import texts

    sides = [rp.collect(tiny(family), texts(forget=side), "*.attn.neurons") for side in (True, False)]
    scores = rp.score(*sides, warn=False)
    width, e = len(scores["0.attn.neurons"].values), {"llama": 6, "qwen3": 10}[family]
    assert dict(scores["0.attn.neurons"].group_sizes) == {"head": e, "kv_group": 2 * e} and width == 4 * e
    assert _count(rp.top(scores, fraction=1 / 8, unit="head")) == e
    assert _count(rp.top(scores, fraction=1 / 4, unit="kv_group")) == 2 * e


def test_zero_fill_is_a_mask_and_untouched_sites_are_left_out():
    edit = rp.prune(_scores([9, 8, 7], [1, 2, 3]), fraction=0.5)
    assert list(map(str, edit.maps)) == [MLP[0]]
    assert edit.maps[rp.Site.parse(MLP[0])].scale.tolist() == [0, 0, 0]


def test_mean_fill_holds_neurons_at_their_retain_mean():
    rows = rows_of(1)
    retain, values = collection(rows, "retain"), [torch.arange(len(g[0])) for _, g in rows.values()]
    for given_ in (retain, {site: z.mean(0) for site, (z, _) in rows.items()}):
        edit = rp.prune(_scores(*values), fraction=0.5, fill="mean", values=given_)
        for site, map_ in edit.maps.items():
            expected = torch.where(map_.kept, 0.0, rows[site][0].mean(0).float())
            torch.testing.assert_close(map_(torch.zeros(map_.width)), expected, rtol=1e-5, atol=1e-6)


def test_peak_fill_holds_neurons_at_the_values_given():
    edit = rp.prune(_scores([1, 2], [3, 4]), fraction=0.25, fill="peak", values={rp.Site.parse(MLP[1]): torch.tensor([5.0, 7.0])})  # fmt: skip
    assert edit.maps[rp.Site.parse(MLP[1])](torch.ones(2)).tolist() == [1.0, 7.0]


def test_provenance_says_how_the_neurons_were_chosen():
    edit = rp.prune(_scores([9, 8, 7], [1, 2, 3], sinks=(0, 2)), fraction=2 / 6, cap_per_layer=0.7)
    options = edit.provenance["options"]
    assert options == {"importance": "abs", "fraction": 2 / 6, "scope": "global", "cap_per_layer": 0.7, "unit": "neuron", "fill": "zero"}  # fmt: skip
    assert edit.provenance["sinks"] == {MLP[0]: [0]} and edit.provenance["agreement"] == 0.5
    assert "sink neurons pruned at 0.mlp.neurons: [0]" in edit.describe()


def test_the_hash_of_an_edit_is_of_its_maps_alone(tmp_path):
    edit = rp.prune(_random(), fraction=0.3)
    edit.save(tmp_path / "edit.safetensors")
    assert rp.Edit(edit.maps, {"method": "other"}).hash == edit.hash == rp.Edit.load(tmp_path / "edit.safetensors").hash
    moved = {rp.Site(site.layer + 2, site.point): map_ for site, map_ in edit.maps.items()}
    assert len({edit.hash, rp.Edit(moved).hash, rp.prune(_random(), fraction=0.31).hash, rp.Edit({}).hash}) == 4


def _counts(edit):
    return {str(site): map_.rank_removed for site, map_ in edit.maps.items()}


@given(seed=st.integers(0, 10**6), percent=st.integers(1, 99))
@settings(max_examples=30, deadline=None)
def test_a_random_control_prunes_as_many_at_each_site(seed, percent):
    edit = rp.prune(_random(seed=seed), fraction=percent / 100)
    control = rp.random_like(edit, seed=seed)
    assert _counts(control) == _counts(edit) and all(map_.is_mask for map_ in control.maps.values())
    assert control.hash == rp.random_like(edit, seed=seed).hash
    assert control.provenance == {"method": "random control", "options": {"match": "layer"}, "seed": seed, "model": "m" * 64}  # fmt: skip


def test_random_controls_differ_by_seed_and_from_the_edit():
    edit = rp.prune(_random(), fraction=0.3)
    assert len({edit.hash, *(rp.random_like(edit, seed=seed).hash for seed in range(5))}) == 6


def test_a_uniform_control_spreads_the_same_total():
    edit = rp.prune(_scores([9] * 10, range(10)), fraction=0.75)
    assert _counts(edit) == {MLP[0]: 10, MLP[1]: 5}
    assert _counts(rp.random_like(edit, seed=0, match="uniform")) == {MLP[0]: 8, MLP[1]: 7}
    widths = {rp.Site(layer, rp.Point.MLP_NEURONS): 10 for layer in range(4)}
    spread = rp.random_like(edit, seed=0, match="uniform", widths=widths)
    assert list(_counts(spread).values()) == [4, 4, 4, 3]


REFUSALS = {
    "per cent": ({"fraction": 5.0}, FractionError, r"fraction=5.0: a fraction lies in \[0, 1\]; did you mean 0.05\?"),
    "negative": ({"fraction": -0.1}, FractionError, r"fraction=-0.1: a fraction lies in \[0, 1\]$"),
    "nan": ({"fraction": float("nan")}, FractionError, "fraction=nan: a fraction lies in"),
    "cap": ({"fraction": 0.1, "cap_per_layer": 50.0}, FractionError, "cap_per_layer=50.0: .*did you mean 0.5"),
    "none": ({"fraction": 0.009}, SelectionError, "fraction=0.009 of 100 neurons selects none; the smallest fraction that selects one is 0.01"),
    "zero": ({"fraction": 0.0}, SelectionError, r"fraction=0.0 of 100 neurons selects none"),
    "too many": ({"fraction": 0.6, "cap_per_layer": 0.5}, SelectionError, "asks for 60 of 100 neurons, 50 may be selected; lower the fraction, raise cap"),
    "scope": ({"fraction": 0.1, "scope": "layers"}, UnknownName, "scope='layers'; did you mean 'layer'"),
    "unit": ({"fraction": 0.1, "unit": "heads"}, UnknownName, "unit='heads'; did you mean 'head'"),
    "heads": ({"fraction": 0.1, "unit": "head"}, ArgumentError, "unit='head' is for attn.neurons; 0.mlp.neurons has no heads"),
    "protect": ({"fraction": 0.1, "protect": {rp.Site.parse(MLP[1]): torch.ones(3)}}, ShapeError, r"protect\[1.mlp.neurons\] has shape \(3,\), the site has width 50"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("function", [rp.top, rp.prune])
def test_a_selection_that_cannot_be_met_is_refused(function, options, error, message):
    with pytest.raises(error, match=message):
        function(_random(), **options)


FILLS = {
    "unknown": ({"fill": "men"}, UnknownName, "fill='men'; did you mean 'mean'"),
    "no mean": ({"fill": "mean"}, MissingStatistic, "fill='mean' needs values=the retain collection"),
    "no peak": ({"fill": "peak"}, MissingStatistic, re.escape("fill='peak' needs values=rp.peaks(")),
    "site": ({"fill": "mean", "values": {}}, MissingStatistic, r"fill='mean' needs values for 0.mlp.neurons; collect that"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), FILLS.values(), ids=FILLS)
def test_a_fill_without_values_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        rp.prune(_random(), fraction=0.5, **options)


def test_controls_are_for_masks():
    with pytest.raises(ArgumentError, match=r"random_like needs an edit made of neuron masks; 0.mlp.out is not one"):
        rp.random_like(projection(tiny("llama"), "0.mlp.out"), seed=0)
    with pytest.raises(UnknownName, match="match='layers'; did you mean 'layer'"):
        rp.random_like(rp.prune(_random(), fraction=0.1), seed=0, match="layers")
