"""Moments are collected of the very tensor that an edit is given, with earlier edits active."""

from contextlib import nullcontext

import pytest
import torch

import repedit as rp
from repedit.activations.collection import positions
from repedit.arch import hooks_at
from repedit.data import Batch, Tokens
from repedit.data.corpus import tokens
from repedit.edit import Edit
from repedit.errors import ArgumentError, DataError, FingerprintError, ShapeError, TooLarge, UnknownName, UnknownSite
from repedit.hooks import installed
from repedit.stats import CrossMoments, Moments
from tests.edits import projection
from tests.laws import FLOAT32_ATTENTION, seen_at, wide
from tests.test_moments import assert_merged
from tests.tiny import FAMILIES, ids, logits, tiny
from tests.tolerances import relative, within


def _sites(subject):
    points = subject.layout.points_at(1)
    return [rp.Site(1, p) for p in points if not (p == "mlp.neurons" and subject.layout.branch(1, p).routed)]


def _given_to_an_edit(subject, site, edit=None):
    """The tensor that a replacing hook at a site gets, installed after the edit."""
    seen = []

    def replace(x, _at, _tokens):
        seen.append(x.detach().clone())
        return x

    hooks = hooks_at(subject.model, subject.layout, site, replace, replaces=True)
    with edit.hooked(subject) if edit else nullcontext(), installed(subject.model, hooks):
        logits(subject)
    return seen[0]


def _captured_is_hooked(subject, edit=None, collect=rp.collect):
    counted = (torch.arange(33) % 11 > 0).reshape(3, 11)
    for site in _sites(subject):
        found = collect(subject, tokens([{"input_ids": ids()}]), site, statistic=Moments, edit=edit)[site]
        given = _given_to_an_edit(subject, site, edit)
        expected = Moments(found.width).update(given, counted.reshape(given.shape[:-1]))
        assert torch.equal(found.second, expected.second) and torch.equal(found.mean, expected.mean), str(site)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_captured_tensor_is_the_hooked_tensor(family):
    _captured_is_hooked(tiny(family, torch.float64))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_an_earlier_edit_is_seen_at_its_own_site_and_after(family):
    subject = tiny(family, torch.float64)
    edit = Edit({site: next(iter(projection(subject, str(site)).maps.values())) for site in _sites(subject)})
    _captured_is_hooked(subject, edit)
    out = rp.Site(1, rp.Point.MLP_OUT)
    found = rp.collect(subject, tokens([{"input_ids": ids()}]), out, statistic=Moments, edit=edit)[out]
    assert float((found.second @ edit.maps[out].u).abs().max()) <= 1e-12 * float(found.second.abs().max())


def test_an_edit_that_is_not_active_is_caught():
    subject = tiny("llama", torch.float64)
    with pytest.raises(AssertionError, match=r"1.mlp.out"):
        _captured_is_hooked(
            subject,
            projection(subject, "1.mlp.out"),
            lambda *arguments, edit, **options: rp.collect(*arguments, **options),
        )


def test_hidden_states_of_the_next_index_are_caught():
    """Index l of hidden_states is the input of block l, and the last one is after the final norm."""
    subject = tiny("llama", torch.float64)

    def published(subject, corpus, site, **_):
        with torch.no_grad():
            states = subject.model(input_ids=ids(), output_hidden_states=True).hidden_states[site.layer]
        return {site: Moments(24).update(states[:, 1:])}

    with pytest.raises(AssertionError):
        _captured_is_hooked(subject, collect=published)


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral", "gptj"])
def test_padding_of_a_batch_does_not_matter(family):
    subject, x = tiny(family, torch.float64), ids(4, 9)
    sites = ["*.mlp.out", "1.resid.post", "0.attn.out"]
    batch = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    with wide(subject):
        whole = rp.collect(subject, tokens([{"input_ids": x}]), sites, statistic=Moments)
        for pad in ((0, 3), (0, 17), (3, 0), (4, 2)):
            corpus = tokens([{name: torch.nn.functional.pad(value, pad) for name, value in batch.items()}])
            padded = rp.collect(subject, corpus, sites, statistic=Moments)
            for site in whole:
                error = relative(padded[site].second, whole[site].second)
                within(error, f"padding, {'float32 attention' if family in FLOAT32_ATTENTION else 'float64'}")


def _answered(mask=None):
    x = ids()
    answer = torch.zeros_like(x).bool()
    answer[0, 5:7] = answer[1, 9] = answer[2, 10] = True
    entity = torch.zeros_like(x).bool()
    entity[0, 2:4] = entity[1, 6] = True
    mask = torch.ones_like(x).bool() if mask is None else mask
    return Tokens((Batch(x, mask, ("a", "b", "c"), answer, entity),))


def _first_order(subject, site, corpus, found, loss):
    """Moving x to x + s A x changes the loss by s * sum g . A x = s * n tr(A E[x g^T]); A the direction of most change."""
    a = found.second.T / found.second.norm()
    counted = corpus.items[0].attention_mask & (torch.arange(11) > 0)

    def moved(step):
        def visit(x, _at, _tokens):
            return x + step * counted.reshape(*x.shape[:-1], 1) * (x @ a.T)

        with installed(subject.model, hooks_at(subject.model, subject.layout, site, visit, replaces=True)):
            return float(loss(logits(subject)))

    # RMS norms and rotary angles are float32 inside, whose rounding a smaller step would show.
    step = 1e-3
    slope = (moved(step) - moved(-step)) / (2 * step)
    within(abs(found.count * float(found.second.norm()) / slope - 1), "finite difference")


@pytest.mark.numeric
@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "gpt_neox", "mixtral"])
def test_cross_moments_with_gradients_are_the_first_order_change_of_the_loss(family, answers):
    subject, x = tiny(family, torch.float64), ids()
    corpus = _answered() if answers else tokens([{"input_ids": x}])
    target = corpus.items[0].answer if answers else torch.arange(11).expand(3, 11) > 0

    def loss(found):
        return -found[:, :-1].log_softmax(-1).gather(2, x[:, 1:, None])[..., 0][target[:, 1:]].sum()

    for site in _sites(subject):
        found = rp.collect(subject, corpus, site, statistic=CrossMoments, gradients=True)[site]
        _first_order(subject, site, corpus, found, loss)


def test_cross_moments_with_labels_are_covariances():
    subject, x = tiny("opt", torch.float64), ids()
    one_hot = torch.nn.functional.one_hot(x % 3, 3).double()
    site = rp.Site.parse("1.mlp.neurons")
    found = rp.collect(subject, tokens([{"input_ids": x}]), site, statistic=CrossMoments, labels=lambda _: one_hot)[
        site
    ]
    rows = seen_at(subject, site).reshape(3, 11, -1)[:, 1:].reshape(30, -1)
    expected = CrossMoments(40, 3).update(rows, one_hot[:, 1:].reshape(30, 3))
    assert torch.equal(found.covariance, expected.covariance) and found.count == 30
    with pytest.raises(
        ShapeError, match=r"batch 0: the labels of a batch have shape \(3, 10, 3\), its tokens \(3, 11\)"
    ):
        rp.collect(subject, tokens([{"input_ids": x}]), statistic=CrossMoments, labels=lambda _: one_hot[:, 1:])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("answer", [(0, 5), (0, 6), (1, 9), (2, 10)]),
        ("before_answer", [(0, 4), (0, 5), (1, 8), (2, 9)]),
        ("entity", [(0, 3), (1, 6)]),
        ("content", [(row, t) for row in range(3) for t in range(1, 11)]),
    ],
)
def test_positions_count_what_they_name(kind, expected):
    subject, counted = tiny("llama", torch.float64), torch.zeros(3, 11).bool()
    for place in expected:
        counted[place] = True
    found = rp.collect(subject, _answered(), "1.mlp.out", statistic=Moments, count=positions(kind))
    rows = seen_at(subject, rp.Site.parse("1.mlp.out"))[counted]
    assert found.counted == len(expected) and torch.equal(found["1.mlp.out"].second, Moments(24).update(rows).second)


def test_positions_that_cannot_be_counted_are_refused():
    with pytest.raises(UnknownName, match=r"positions\('answers'\) does not exist; did you mean 'answer'"):
        positions("answers")
    with pytest.raises(
        DataError, match=r"positions\('entity'\) needs batches that mark their entity; this corpus marks"
    ):
        rp.collect(tiny("llama"), tokens([{"input_ids": ids()}]), count=positions("entity"))
    subject = tiny("llama")
    kinds = [rp.collect(subject, _answered(), count=positions(kind)) for kind in ("answer", "entity")]
    with pytest.raises(FingerprintError, match="cannot merge collections: rule is"):
        kinds[0] + kinds[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"statistic": CrossMoments}, ArgumentError, "give gradients=True or labels=, one of them"),
        ({"statistic": CrossMoments, "gradients": True, "labels": lambda b: b}, ArgumentError, "one of them"),
        ({"statistic": Moments, "gradients": True}, ArgumentError, "gradients=True plays no part in Moments"),
        ({"labels": lambda b: b}, ArgumentError, "labels= play no part in Activity; use statistic=CrossMoments"),
        ({"statistic": dict}, ArgumentError, "statistic=dict: it must be Activity, Moments or CrossMoments"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        rp.collect(tiny("llama"), tokens([{"input_ids": ids()}]), **options)


def test_neurons_of_experts_have_no_covariance():
    with pytest.raises(
        UnknownSite, match=r"0.mlp.neurons holds the neurons of several experts.*Collect Moments at 0.mlp.out"
    ):
        rp.collect(tiny("mixtral"), tokens([{"input_ids": ids()}]), statistic=Moments)


def test_covariances_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr("repedit.activations.collection._free", lambda device: 20_000)
    corpus = tokens([{"input_ids": ids()}])
    with pytest.raises(TooLarge, match=r"moments of 2 sites take 2.56e-05 GB, 2e-05 GB are free; choose fewer sites"):
        rp.collect(tiny("llama"), corpus, "*.mlp.neurons", statistic=Moments)
    assert len(rp.collect(tiny("llama"), corpus, "*.mlp.out", statistic=Moments)) == 2


def test_collections_of_moments_add_up():
    subject, parts = tiny("llama", torch.float64), [tokens([{"input_ids": ids(seed=seed)}]) for seed in (1, 2)]
    first, second = (rp.collect(subject, part, "*.mlp.out", statistic=Moments) for part in parts)
    both = rp.collect(subject, tokens([{"input_ids": ids(seed=s)} for s in (1, 2)]), "*.mlp.out", statistic=Moments)
    assert_merged((first + second)["1.mlp.out"], both["1.mlp.out"])
    active = rp.collect(subject, parts[0], "*.mlp.neurons")
    with pytest.raises(FingerprintError, match="cannot merge collections: kind is Moments and Activity"):
        first + active
