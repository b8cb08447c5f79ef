"""Sampling: leak@k against enumeration, samples against one plain reading a sample, intervals against their definition."""

from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch

import repedit as rp
from repedit.auditing.attacks import samples
from repedit.auditing.attacks.samples import leak_at, sampling
from repedit.auditing.statistics import clopper_pearson, dkw_band
from repedit.data import Fact, Splits
from repedit.errors import ArgumentError, DataError, FractionError, NotFinite
from repedit.models.subject import subject_of
from tests.saved_models import byte_tokenizer
from tests.tiny import tiny

ALL = rp.data.invented(people=12, relations=1).forget
SPLITS = Splits(ALL[:2], ALL[2:4])


def subject(family: str = "llama"):
    """A tiny model of bytes; its logits are doubled, so that some tokens are likely and samples begin alike."""
    model = tiny(family, vocab_size=260).model
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2.0)
    return subject_of(model, byte_tokenizer())


@pytest.mark.parametrize("n", range(1, 9))
def test_leak_at_k_is_the_mean_over_all_subsets(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = [any(i < c for i in chosen) for chosen in combinations(range(n), k)]
            assert leak_at(n, c, k) == pytest.approx(np.mean(subsets), abs=1e-12)


def plainly(subject, fact: Fact, n: int, tokens: int, top_p: float, temperature: float) -> list[str]:
    """Samples with the draws of the attack, each a row of its own, the whole text read anew for every token."""
    chances, found = samples._chances(fact.id, tokens, n, 0), []
    for s in range(n):
        start = subject.tokenizer(fact.prompt)["input_ids"]
        ids = list(start)
        for t in range(tokens):
            with torch.no_grad():
                logits = subject.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            p, names = (logits / temperature).softmax(-1).double().sort(descending=True, stable=True)
            kept = int((p.cumsum(0) - p < top_p).sum())
            share = (p[:kept] / p[:kept].sum()).cumsum(0)
            ids.append(int(names[min(int((share <= chances[t, s]).sum()), kept - 1)]))
            if ids[-1] == subject.tokenizer.eos_token_id:
                break
        found.append(subject.tokenizer.decode(ids[len(start) :], skip_special_tokens=True))
    return found


def check_samples(subject, **options) -> None:
    """The law: what is drawn together is what is drawn alone."""
    found = samples.samples(subject, SPLITS.test, 4, seed=0, **options)
    tokens = 1 + max(len(fact.answer) for fact in SPLITS.test) + 4
    assert found == [plainly(subject, fact, 4, tokens, **options) for fact in SPLITS.test]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{"top_p": 0.9, "temperature": 1.0}, {"top_p": 0.5, "temperature": 2.0}], ids=str)
def test_samples_are_those_of_reading_each_alone(family, options):
    check_samples(subject(family), **options)


def test_samples_do_not_depend_on_how_many_are_read_together_nor_on_the_shortcut(monkeypatch):
    plain = samples.samples(subject(), SPLITS.test, 4)
    monkeypatch.setattr(samples, "_HEAD", 3)
    monkeypatch.setattr(samples, "_TOGETHER", 4)
    assert samples.samples(subject(), SPLITS.test, 4) == plain


def _first_row(plain):
    return lambda logits, rows, chances, **o: plain(logits, np.zeros_like(rows), chances, **o)


BROKEN = {
    "all samples from the first row": ("_inverse", _first_row),
    "all of the vocabulary": ("_inverse", lambda plain: lambda *a, top_p, **o: plain(*a, top_p=1.0, **o)),
    "no temperature": ("_inverse", lambda plain: lambda *a, temperature, **o: plain(*a, temperature=1.3, **o)),
    "the same draws for all facts": ("_chances", lambda plain: lambda name, *a: plain("x", *a)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sampling_is_caught(name, monkeypatch):
    where, broken = BROKEN[name]
    model, options = subject(), {"top_p": 0.5, "temperature": 1.0}
    tokens = 1 + max(len(fact.answer) for fact in SPLITS.test) + 4
    expected = [plainly(model, fact, 4, tokens, **options) for fact in SPLITS.test]
    monkeypatch.setattr(samples, where, broken(getattr(samples, where)))
    assert samples.samples(model, SPLITS.test, 4, seed=0, **options) != expected


@pytest.mark.parametrize(("top_p", "nucleus"), [(1.0, 4), (0.9, 3), (0.75, 2), (0.55, 1), (0.5, 1), (0.1, 1)])
def test_tokens_come_as_often_as_the_nucleus_says(top_p, nucleus):
    p = torch.tensor([[0.15, 0.6, 0.05, 0.2]], dtype=torch.float64)
    grid = (np.arange(1000) + 0.5) / 1000
    found = samples._inverse(p.log(), np.zeros(1000, dtype=int), grid, top_p=top_p, temperature=1.0)
    kept = sorted(p[0].tolist(), reverse=True)[:nucleus]
    expected = [x / sum(kept) * (x in kept) for x in p[0].tolist()]
    assert np.abs(np.bincount(found, minlength=4) / 1000 - expected).max() <= 0.001


def texts_of(monkeypatch, *rows: str) -> None:
    """Let the samples of the facts be the words of the rows."""
    monkeypatch.setattr(samples, "samples", lambda *a, **o: [row.split() for row in rows])


def test_the_best_of_the_first_k_counts_and_all_n_are_used_for_the_estimate(monkeypatch):
    facts = tuple(replace(fact, answer="Élan", choices=()) for fact in ALL[:3])
    texts_of(monkeypatch, "no elan no no", "ELAN! no no no", "no eland no no")
    found = sampling(n=4, ks=(1, 2, 4))(subject(), Splits((), facts))
    assert found.settings == ("leak@1", "leak@2", "leak@4")
    assert found.correct.tolist() == [[0, 1, 0], [1, 1, 0], [1, 1, 0]]
    assert found.graded.tolist() == [[0.25, 0.25, 0], [0.5, 0.5, 0], [1, 1, 0]]
    assert found.details["leak@1"]["mean"] == pytest.approx(0.5 / 3)
    assert found.details["leak@4"]["share interval"] == pytest.approx(list(clopper_pearson(2, 3)))


def test_a_secret_that_greedy_answers_hide_is_caught(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(["yes", "no"], 16, p=[0.1, 0.9])) for _ in range(200)]
    facts = tuple(Fact(id=f"f{i}", prompt="is it", answer="yes") for i in range(200))
    texts_of(monkeypatch, *rows)
    found = sampling()(subject(), Splits((), facts))
    for name, k in (("leak@1", 1), ("leak@4", 4), ("leak@16", 16)):
        low, high = found.details[name]["share interval"]
        assert low < 1 - 0.9**k < high and abs(found.details[name]["mean"] - (1 - 0.9**k)) < 0.05


def test_a_sample_ends_where_the_text_ends(monkeypatch):
    model = subject()
    end = model.tokenizer.eos_token_id
    drawn = iter([[66, 67], [end, 68], [69], *[[70]] * 40])
    monkeypatch.setattr(samples, "_inverse", lambda logits, rows, *a, **o: np.array(next(drawn))[: len(rows)])
    first, second = samples.samples(model, SPLITS.test[:1], 2)[0]
    assert first == model.tokenizer.decode([66])
    assert second.startswith(model.tokenizer.decode([67, 68, 69, 70]))


def test_the_seed_and_the_id_decide_and_no_global_generator_is_used():
    model, before = subject(), torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    found = samples.samples(model, SPLITS.test, 4)
    assert samples.samples(model, SPLITS.test[::-1], 4)[::-1] == found
    assert samples.samples(model, SPLITS.test, 4, seed=1) != found
    assert len({text for drawn in found for text in drawn}) > len(found)
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpy_before).all()


@pytest.mark.parametrize(("right", "n"), [(0, 9), (3, 9), (9, 9), (40, 100)])
def test_clopper_pearson_cuts_tails_of_half_alpha(right, n):
    low, high = clopper_pearson(right, n, 0.1)
    above = sum(comb(n, i) * low**i * (1 - low) ** (n - i) for i in range(right, n + 1))
    below = sum(comb(n, i) * high**i * (1 - high) ** (n - i) for i in range(right + 1))
    assert above == pytest.approx(0.05 if right else 1.0) and below == pytest.approx(0.05 if right < n else 1.0)


def test_the_band_is_as_wide_as_its_formula_and_steps_with_the_sample():
    band = dkw_band([0.5, 0.25, 0.5, 1.0], 0.5)
    width = np.sqrt(np.log(4) / 8)
    assert band.points.tolist() == [0.25, 0.5, 0.5, 1.0]
    assert band.upper == pytest.approx(np.minimum([0.25 + width, 0.75 + width, 0.75 + width, 1], 1))
    assert band.lower == pytest.approx(np.maximum([0.25 - width, 0.75 - width, 0.75 - width, 1 - width], 0))


def test_the_bounds_of_the_mean_are_those_of_the_extreme_distributions():
    values = np.random.default_rng(0).beta(2, 5, 40)
    band, at = dkw_band(values), (np.arange(200_000) + 0.5) / 200_000
    share = np.searchsorted(band.points, at, side="right") / 40
    expected = [1 - np.clip(share + s * band.width, 0, 1).mean() for s in (1, -1)]
    assert band.mean() == pytest.approx(tuple(expected), abs=1e-4)
    assert band.mean()[0] < values.mean() < band.mean()[1]


def test_bands_hold_the_mean_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = dkw_band(rng.uniform(size=20), 0.3).mean()
        held += low <= 0.5 <= high
    assert held >= 140


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: sampling(n=4), ArgumentError, r"ks=\(1, 4, 16\), n=4; each k is a number of samples"),
        (lambda: sampling(ks=()), ArgumentError, r"ks=\(\), n=16"),
        (lambda: sampling(temperature=0.0), ArgumentError, "temperature=0.0; give a number above 0"),
        (lambda: sampling(top_p=0.0), FractionError, "top_p=0.0; give a fraction above 0"),
        (lambda: leak_at(4, 5, 1), ArgumentError, "n=4 samples, c=5 right, k=1"),
        (lambda: leak_at(4, 1, 0), ArgumentError, "k is 1 to n"),
        (lambda: clopper_pearson(3, 2), ArgumentError, "3 successes of 2"),
        (lambda: clopper_pearson(1, 2, 1.0), FractionError, "alpha=1.0; give a fraction"),
        (lambda: dkw_band([]), DataError, "a band from 0 values"),
        (lambda: dkw_band([float("nan")]), DataError, "all finite"),
        (lambda: samples.samples(subject(), (), 2), DataError, "there are no facts to sample"),
    ],
)
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_probabilities_that_are_no_numbers_are_an_error_of_the_attack():
    model = subject()
    with torch.no_grad():
        model.model.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(NotFinite, match="attack 'sampling': the probabilities of the next token are not finite"):
        sampling(n=2, ks=(1,))(model, SPLITS)


def test_a_prompt_without_tokens_is_refused(monkeypatch):
    model = subject()
    empty = replace(model, tokenizer=lambda *a, **o: {"input_ids": []})
    with pytest.raises(DataError, match="the prompt has no tokens; give a longer one"):
        samples.samples(empty, SPLITS.test, 2)
