"""Importances and their combinations are their formulas, at any scale of a layer."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

import repedit as rp
from repedit.data.corpus import tokens
from repedit.neurons.scores import IMPORTANCES, outgoing_norms
from tests.handmade_collections import WIDTHS, collection, pair, rows_of
from tests.tiny import ids, tiny

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
quick = settings(deadline=None, max_examples=30)


FORMULAS = {
    "abs": lambda z, g: z.abs().mean(0),
    "rms": lambda z, g: (z**2).mean(0).sqrt(),
    "std": lambda z, g: ((z**2).mean(0) - z.mean(0) ** 2).sqrt(),
    "frequency": lambda z, g: (z > 0).double().mean(0),
    "gxa": lambda z, g: (z * g).abs().mean(0),
    "taylor": lambda z, g: (z * g).mean(0).abs(),
    "fisher": lambda z, g: ((z * g) ** 2).mean(0),
    "attribution": lambda z, g: -(z * g).mean(0),
    "attribution_mean": lambda z, g: ((z.mean(0) - z) * g).mean(0),
}


@pytest.mark.parametrize("name", IMPORTANCES)
@quick
@given(seed=st.integers(0, 10**6), n=st.integers(2, 60))
def test_importance_is_its_formula(name, seed, n):
    for site, (z, g) in rows_of(seed, n=n).items():
        found = IMPORTANCES[name](collection({site: (z, g)}, "x")[site])
        torch.testing.assert_close(found, FORMULAS[name](z, g), rtol=1e-8, atol=1e-10)


def _split(joined, like):
    return dict(zip(like, torch.as_tensor(joined).split([len(v) for v in like.values()]), strict=True))


def _ranks(values):
    return _split(rankdata(torch.cat(list(values.values()))) / sum(WIDTHS.values()), values)


def _difference(f, r, lam=1.0, whole=False):
    total = [torch.cat(list(side.values())).sum() for side in (f, r)]
    return {s: f[s] / (total[0] if whole else f[s].sum()) - lam * r[s] / (total[1] if whole else r[s].sum()) for s in f}


def _ratio(f, r, eps=1e-3):
    return {s: f[s] / (r[s] + eps * r[s].sort().values[(len(r[s]) - 1) // 2]) for s in f}


def _setdiff(f, r, q, p):
    joined = [torch.cat(list(side.values())) for side in (f, r)]
    most = torch.zeros(len(joined[0])).index_fill(0, joined[0].argsort(descending=True)[: int(q * 11)], 1)
    held = torch.zeros(len(joined[0])).index_fill(0, joined[1].argsort(descending=True)[: int(p * 11)], 1)
    return _split(most * (1 - held), f)


COMBINED = {
    "difference": ({}, lambda f, r, j: _difference(f, r)),
    "difference, lam": ({"lam": 2.5}, lambda f, r, j: _difference(f, r, 2.5)),
    "difference, all": ({"norm": "all"}, lambda f, r, j: _difference(f, r, whole=True)),
    "ratio": ({}, lambda f, r, j: _ratio(f, r)),
    "ratio, rel": ({"eps": "rel:0.5"}, lambda f, r, j: _ratio(f, r, 0.5)),
    "ratio, absolute": ({"eps": 0.25}, lambda f, r, j: {s: f[s] / (r[s] + 0.25) for s in f}),
    "logratio": ({"eps": 0.25}, lambda f, r, j: {s: (f[s] + 0.25).log() - (r[s] + 0.25).log() for s in f}),
    "rank": ({}, lambda f, r, j: {s: _ranks(_ratio(f, r))[s] + 0.3 * _ranks(j)[s] for s in f}),
    "rank, lam": ({"lam": 2.0}, lambda f, r, j: {s: _ranks(_ratio(f, r))[s] + 2 * _ranks(j)[s] for s in f}),
}


@pytest.mark.parametrize("name", COMBINED)
@quick
@given(seed=st.integers(0, 10**6))
def test_combination_is_its_formula(name, seed):
    rows, (forget, retain) = pair(seed)
    options, formula = COMBINED[name]
    scores = rp.score(forget, retain, combine=name.split(",")[0], warn=False, **options)
    f, r = ({s: FORMULAS["abs"](z, g) for s, (z, g) in side.items()} for side in rows)
    expected = formula(f, r, {s: FORMULAS["gxa"](z, g) for s, (z, g) in rows[0].items()})
    for site, found in scores.items():
        torch.testing.assert_close(found.values, expected[site], **CLOSE)


@pytest.mark.parametrize(("q", "p"), [(3 / 11, 5 / 11), (2 / 11, 9 / 11), (9 / 11, 2 / 11), (1.0, 0.0), (8 / 11, 1.0)])
def test_setdiff_is_one_set_without_the_other_with_ties_by_importance(q, p):
    rows, (forget, retain) = pair(3)
    scores = rp.score(forget, retain, combine="setdiff", q=q, p=p, warn=False)
    f, r = ({s: FORMULAS["abs"](z, g) for s, (z, g) in side.items()} for side in rows)
    for site, inside in _setdiff(f, r, q + 1e-12, p + 1e-12).items():
        values = scores[site].values
        assert torch.equal(values >= 1, inside.bool())
        for group in (inside.bool(), ~inside.bool()):
            assert torch.equal(values[group].argsort(), f[site][group].argsort())


def test_exchanging_the_sets_changes_the_sign_of_the_difference():
    _, (forget, retain) = pair(5)
    there, back = rp.score(forget, retain, warn=False), rp.score(retain, forget, warn=False)
    assert all(torch.equal(there[site].values, -back[site].values) for site in there)


@pytest.mark.parametrize("combine", ["difference", "ratio", "logratio", "rank"])
@pytest.mark.parametrize("importance", ["abs", "rms", "std", "gxa"])
def test_rescaling_a_layer_changes_no_score(combine, importance):
    scaled = [rows_of(7), rows_of(8)]
    plain = rp.score(*map(collection, scaled, "fr"), importance=importance, combine=combine, warn=False)
    for rows in scaled:
        site, (z, g) = next(iter(rows.items()))
        rows[site] = (z * 1024, g / (1024 if combine == "rank" else 1))
    again = rp.score(*map(collection, scaled, "fr"), importance=importance, combine=combine, warn=False)
    for site in plain:
        torch.testing.assert_close(plain[site].values, again[site].values, **CLOSE)


@pytest.mark.parametrize("combine", ["difference", "ratio", "logratio", "rank", "setdiff"])
@pytest.mark.parametrize("dead", [(2,), (0, 1, 2, 3), tuple(range(5))], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_dead_neurons_are_finite_and_never_first(combine, dead, scale):
    rows = rows_of(1, scale, dead), rows_of(2, scale, dead)
    retain = {site: (torch.where(torch.arange(z.shape[1]) == 4, 0.0, z), g) for site, (z, g) in rows[1].items()}
    scores = rp.score(collection(rows[0], "f"), collection(retain, "r"), combine=combine, q=0.5, p=0.5, warn=False)
    for found in scores.values():
        assert bool(torch.isfinite(found.values).all())
        assert all(found.values[i] == found.values.min() for i in dead)


def test_signed_attribution_is_its_plain_difference_when_insisted_on():
    rows, (forget, retain) = pair(2)
    scores = rp.score(forget, retain, importance="attribution", signed=True, lam=5.0, warn=False)
    for site, (z, g) in rows[0].items():
        expected = FORMULAS["attribution"](z, g) - 5 * FORMULAS["attribution"](*rows[1][site])
        torch.testing.assert_close(scores[site].values, expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "mixtral"])
def test_weighted_importance_is_times_the_norm_of_the_outgoing_weights(family):
    subject, site = tiny(family), rp.Site.parse("1.mlp.neurons")
    sides = [rp.collect(subject, tokens([{"input_ids": ids(seed=seed)}])) for seed in (1, 2)]
    plain, weighted = (rp.score(*sides, combine="ratio", eps=0.0, weighted=w, subject=subject, warn=False) for w in (False, True))  # fmt: skip
    torch.testing.assert_close(plain[site].values, weighted[site].values, rtol=1e-6, atol=0)
    branch, weights = subject.layout.branch(1, site.point), dict(subject.model.named_parameters())
    columns = [
        weights[p.out.tensor] if p.out.expert is None else weights[p.out.tensor][p.out.expert] for p in branch.parts
    ]
    norms = torch.cat([(w.T if p.out.transposed else w).double().norm(dim=0) for w, p in zip(columns, branch.parts, strict=True)])  # fmt: skip
    torch.testing.assert_close(outgoing_norms(subject, site), norms, **CLOSE)
    difference = rp.score(*sides, weighted=True, subject=subject, warn=False)[site].values
    f, r = (IMPORTANCES["abs"](side[site]) * norms for side in sides)
    torch.testing.assert_close(difference, f / f.sum() - r / r.sum(), **CLOSE)


def _with_sink(neuron, size):
    first = {site: torch.ones(1, z.shape[1]).double().index_fill(1, torch.tensor([neuron]), size) for site, (z, _) in rows_of().items()}  # fmt: skip
    return collection(rows_of(1), "f", first=first), collection(rows_of(2), "r")


@pytest.mark.parametrize(("importance", "guard", "guarded"), [("abs", True, True), ("abs", False, False), ("rms", True, True), ("std", True, True), ("fisher", True, True), ("rms", False, False)])  # fmt: skip
def test_sinks_are_named_and_guarded_where_asked(importance, guard, guarded):
    scores = rp.score(*_with_sink(3, 101.0), importance=importance, protect_sinks=guard, warn=False)
    for found in scores.values():
        assert found.sinks == (3,) and found.protected is guarded
        assert torch.equal(found.values == -torch.inf, (torch.arange(len(found.values)) == 3) & guarded)


@pytest.mark.parametrize(("size", "sinks"), [(100.0, ()), (100.1, (3,)), (1e4, (3,))])
def test_a_sink_exceeds_a_hundred_times_the_median(size, sinks):
    assert rp.score(*_with_sink(3, size), warn=False)["0.mlp.neurons"].sinks == sinks


def test_neurons_that_fire_at_the_first_position_of_a_sparse_layer_are_no_sinks():
    first = {s: torch.zeros(1, z.shape[1]).double().index_fill(1, torch.tensor([1]), 2.0) for s, (z, _) in rows_of().items()}  # fmt: skip
    scores = rp.score(
        collection(rows_of(1), "f", first=first), collection(rows_of(2), "r"), importance="rms", warn=False
    )
    assert all(found.sinks == () for found in scores.values())


def test_agreement_is_spearmans_correlation_and_the_median_over_sites():
    rows, (forget, retain) = pair(4)
    found, scores = (
        rp.agreement(forget, retain, importance="rms"),
        rp.score(forget, retain, importance="rms", warn=False),
    )
    f, r = ({s: FORMULAS["rms"](z, g).numpy() for s, (z, g) in side.items()} for side in rows)
    assert found == {s: pytest.approx(spearmanr(f[s], r[s]).statistic) for s in f}
    assert found == {s: score.agreement for s, score in scores.items()}
    assert scores.agreement == pytest.approx(sum(found.values()) / 2)


def test_nearly_equal_importances_warn():
    rows = rows_of(1)
    near = {site: (z * 1.01, g) for site, (z, g) in rows.items()}
    message = "median Spearman 1.00, worst 0.mlp.neurons with 1.00. A score would remove both; choose a retain set"
    with pytest.warns(rp.CollinearWarning, match=message):
        rp.score(collection(rows, "f"), collection(near, "r"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rp.score(collection(rows, "f"), collection(near, "r"), warn=False)


def test_different_importances_do_not_warn():
    rows = rows_of(1)
    turned = {site: (z.flip(1), g) for site, (z, g) in rows.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rp.score(collection(rows, "f"), collection(turned, "r")).agreement < 0.65


def test_provenance_names_the_options_the_data_and_the_model():
    _, (forget, retain) = pair(1)
    found = rp.score(forget, retain, importance="rms", combine="ratio", eps="rel:0.1", warn=False).provenance
    assert (
        found["options"] | {"importance": "rms", "combine": "ratio", "eps": "rel:0.1", "protect_sinks": True}
        == found["options"]
    )
    assert found["data"] == {role: {"name": role, "hash": role, "tokens": 40} for role in ("forget", "retain")}
    assert found["model"] == "m" * 64
