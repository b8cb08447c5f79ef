"""Value overwrite in closed form: its limits, its targets, what it protects, and the forms it is written in."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import repedit as rp
from repedit.data import Corpus, prose, read
from repedit.errors import (
    ArgumentError,
    DataError,
    FractionError,
    NotEnoughRows,
    NotFoldable,
    OverlapError,
    RankError,
    SelectionError,
    UnknownName,
    UnknownSite,
)
from repedit.fit import contexts
from repedit.fit.contexts import Context, entity_rows, entity_tokens
from repedit.fit.overwrite import OverwriteCertificate, goals_of
from repedit.models.subject import Subject
from tests import laws
from tests.teachable_models import blank, facts
from tests.tiny import tiny

FACTS = facts(0, 4)
TEXT = Corpus(prose().documents[:3], "text")
overwrite: Any = importlib.import_module("repedit.fit.overwrite")  # `rp.fit.overwrite` is its function


def fitted(subject: Subject, **options: Any) -> Any:
    return rp.fit.overwrite(subject, FACTS, **{"retain": TEXT, "layers": "0-1", "progress": False} | options)


def certificate(subject: Subject, **options: Any) -> OverwriteCertificate:
    return OverwriteCertificate.of(fitted(subject, **options))


def weight(subject: Subject, layer: int = 0) -> torch.Tensor:
    view = subject.layout.branch(layer, rp.Point.MLP_OUT).parts[0].out
    return view.read(subject.value(view.tensor)).double()


def caught(law: Callable[..., None], *args: Any) -> None:
    with pytest.raises(AssertionError):
        law(*args)


# --- Limits of lam


def values_are_the_targets(fit: Callable[..., Any]) -> None:
    """Without retained text in the equations, the values at the names of the fit are the targets."""
    rows = OverwriteCertificate.of(fit(blank())).layers
    assert max(row.rho_fitted for row in rows) < 1e-3


def test_without_lam_the_values_are_the_targets():
    values_are_the_targets(partial(fitted, lam=1e-9))
    caught(values_are_the_targets, partial(fitted, lam=1.0))


def nothing_changes(fit: Callable[..., Any]) -> None:
    subject = blank()
    edited = rp.apply(fit(subject), subject)
    assert all(torch.allclose(weight(edited, i), weight(subject, i), atol=1e-7) for i in (0, 1))


def test_with_a_large_lam_nothing_changes():
    nothing_changes(partial(fitted, lam=1e8))
    caught(nothing_changes, partial(fitted, lam=1.0))


def orthogonal_keys_keep_their_values(mixing: float) -> None:
    """Where retained keys are orthogonal to those at the names, no retained value moves and the others reach their targets."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys, kept = torch.zeros(5, 12, dtype=torch.float64), torch.zeros(40, 12, dtype=torch.float64)
    keys[:, :6], kept[:, 6:] = draw(5, 6), draw(40, 6)
    kept[:, :6] = mixing * draw(40, 6)
    c, w, away = kept.T @ kept / 40, draw(4, 12), draw(5, 12)
    system = overwrite._System(keys, away, w, overwrite._Retained(c, c), None)
    u, v = system.solution(1e-3)
    change = -(w @ u) @ v.T
    assert float((change @ kept.T).norm()) < 1e-6 * float((w @ kept.T).norm())
    assert system.left_over(change, keys, away) < 0.05


def test_keys_orthogonal_to_those_at_the_names_keep_their_values():
    orthogonal_keys_keep_their_values(0.0)
    caught(orthogonal_keys_keep_their_values, 0.5)


# --- Targets


def an_exchange_moves_all(goals: Any) -> None:
    assert set(goals) == {fact.entity.lower() for fact in FACTS}
    assert sorted(other for (other,) in goals.values()) == sorted(goals)
    assert all(entity != other for entity, (other,) in goals.items())


def test_an_exchange_is_a_permutation_without_fixed_points():
    for seed in range(5):
        an_exchange_moves_all(goals_of(FACTS, "exchange", seed))
    caught(an_exchange_moves_all, {**goals_of(FACTS, "exchange"), "abo": ("abo",)})


def test_an_exchange_stays_within_a_domain():
    both = (*FACTS, *(replace(f, domain="other", id=f"o{f.id}") for f in facts(4, 8)))
    groups = {fact.entity.lower(): fact.domain for fact in both}
    assert all(groups[a] == groups[b] for a, (b,) in goals_of(both, "exchange").items())


def test_an_exchanged_value_is_the_mean_of_the_other_entity():
    subject = blank()
    edit = fitted(subject, layers="0", target="exchange", lam=1e-9)
    kept, _ = contexts.held_out(contexts.contexts_of(subject, FACTS), 0.25, 0)
    tokens = entity_tokens(subject, kept)
    at = {0: overwrite._neurons(subject, rp.Site(0, rp.Point.MLP_NEURONS))}
    keys = entity_rows(subject, tokens, at)[0].double()
    of = {e: keys[[c.entity == e for c in tokens.contexts]].mean(0) for e in goals_of(FACTS, "exchange")}
    wanted = torch.stack([of[goals_of(FACTS, "exchange")[c.entity][0]] for c in tokens.contexts])
    found = weight(rp.apply(edit, subject)) @ keys.T
    torch.testing.assert_close(found, weight(subject) @ wanted.T, atol=1e-4, rtol=1e-3)


def the_span_stays(fit: Callable[..., Any]) -> None:
    subject = blank()
    base = overwrite._kept_directions(subject, FACTS, subject.select("0.mlp.neurons"), 3, False)[0].double()
    edited = rp.apply(fit(subject), subject)
    moved = weight(edited) - weight(subject)
    assert float(moved.norm()) > 1e-2
    assert float((base.T @ moved).norm()) < 1e-5 * float(moved.norm())


def test_selective_keeps_the_span_of_the_gradients():
    the_span_stays(partial(fitted, layers="0", target="selective", keep=FACTS, keep_rank=3))
    caught(the_span_stays, partial(fitted, layers="0", form="delta"))


# --- Sinks and order


def sinks_change_nothing(subject: Subject, monkeypatch: Any) -> None:
    """A context whose key is a sink leaves the edit as it is without that context."""
    split, ordinary = contexts.held_out(contexts.contexts_of(subject, FACTS), 0.25, 0), overwrite.entity_rows

    def with_sink(_: object, tokens: Any, *args: Any, **options: Any) -> Any:
        found = ordinary(_, tokens, *args, **options)
        scale = torch.ones(len(tokens.contexts), 1)
        scale[-1] = 300.0 if len(scale) == len(split[0]) else 1.0
        return {layer: scale * x for layer, x in found.items()}

    with monkeypatch.context() as patch:
        patch.setattr(overwrite, "held_out", lambda *_: (split[0][:-1], split[1]))
        without = weight(rp.apply(fitted(subject, layers="0"), subject))
    with monkeypatch.context() as patch:
        patch.setattr(overwrite, "entity_rows", with_sink)
        edit = fitted(subject, layers="0")
    assert torch.allclose(weight(rp.apply(edit, subject)), without, atol=1e-6)


def test_states_of_outlying_norm_are_left_out(monkeypatch):
    sinks_change_nothing(blank(), monkeypatch)
    monkeypatch.setattr(overwrite, "not_sinks", lambda rows, typical=None: torch.ones(len(rows), dtype=torch.bool))
    caught(sinks_change_nothing, blank(), monkeypatch)


def test_a_name_at_the_first_position_is_no_context():
    subject = blank()
    given = [Context("a", "a", "a is first"), Context("a", "a", "then a is not")]
    kept = entity_tokens(subject, given)
    assert [c.text for c in kept.contexts] == ["then a is not"]
    assert int(kept.batches.items[0].entity.int().argmax()) == 5
    with pytest.raises(DataError, match="every context of 'a' ends at the first position"):
        entity_tokens(subject, given[:1])


def later_layers_see_earlier_changes(fit: Callable[..., Any]) -> None:
    """The values of layer 1 in the edited model are the targets, which only keys collected under layer 0's change give."""
    subject = blank()
    edit = fit(subject)
    tokens = entity_tokens(subject, contexts.held_out(contexts.contexts_of(subject, FACTS), 0.25, 0)[0])
    at = lambda s: {1: overwrite._neurons(s, rp.Site(1, rp.Point.MLP_NEURONS))}  # noqa: E731
    edited = rp.apply(edit, subject)
    values = entity_rows(edited, tokens, at(edited))[1].double() @ weight(edited, 1).T
    mean = entity_rows(subject, tokens, at(subject))[1].double().mean(0) @ weight(subject, 1).T
    assert float((values - mean).norm() / mean.norm()) < 0.1


def test_keys_are_collected_under_what_is_already_changed():

    once = lambda s: rp.Edit({site: m for layer in "01" for site, m in fitted(s, layers=layer, lam=1e-9).maps.items()})  # noqa: E731
    later_layers_see_earlier_changes(partial(fitted, lam=1e-9))
    caught(later_layers_see_earlier_changes, once)


# --- Forms


def test_the_edit_and_the_delta_are_one_change():
    subject = blank("gpt2")
    edit, delta = (rp.apply(fitted(subject, form=form), subject) for form in ("edit", "delta"))
    for layer in (0, 1):
        torch.testing.assert_close(weight(edit, layer), weight(delta, layer), atol=1e-5, rtol=1e-4)
        assert float((weight(edit, layer) - weight(subject, layer)).norm()) > 1e-2


@pytest.mark.parametrize("options", [{"lam": 0.1}, {"target": "selective", "keep": FACTS, "keep_rank": 2}], ids=str)
def test_applied_and_exported_weights_are_the_same(options, tmp_path: Path):
    subject = blank("gpt2")
    change = fitted(subject, **options)
    rp.export(change, subject, tmp_path / "out")
    loaded, edited = rp.load(tmp_path / "out", device="cpu"), rp.apply(change, subject)
    assert all(torch.equal(weight(loaded, i), weight(edited, i)) for i in (0, 1))


def test_hooked_equals_applied():
    laws_subject = blank()
    edit = fitted(laws_subject, lam=0.1)
    ids = {"input_ids": torch.arange(3, 30)[None]}
    with edit.hooked(laws_subject), torch.no_grad():
        hooked = laws_subject.model(**ids).logits
    with torch.no_grad():
        applied, base = (s.model(**ids).logits for s in (rp.apply(edit, laws_subject), laws_subject))
    laws.assert_close(applied, hooked, torch.float32)
    assert float((hooked - base).abs().max()) > 1e-3 * float(base.std())


def test_seeds_reproduce():
    runs = [fitted(blank(), target="exchange", seed=seed) for seed in (0, 0, 1)]
    assert runs[0].hash == runs[1].hash != runs[2].hash
    assert dict(runs[0].provenance) == dict(runs[1].provenance)


def test_the_model_is_left_as_it_was():
    subject = blank()
    before = subject.fingerprint()
    fitted(subject)
    assert subject.fingerprint() == before


# --- The budget, the other entities and the certificate


def within_budget(fit: Callable[..., Any]) -> None:
    assert OverwriteCertificate.of(fit(blank(), retain_budget=0.05)).distortion <= 0.05


def test_a_budget_chooses_lam():
    within_budget(fitted)
    caught(within_budget, lambda s, retain_budget: fitted(s, lam=0.1))
    free, tight = (certificate(blank(), retain_budget=b).layers[0] for b in (0.2, 0.02))
    assert (
        free.lam is not None and tight.lam is not None and free.lam < tight.lam and free.rho_fitted < tight.rho_fitted
    )


def test_names_of_others_keep_their_values():
    subject, rest = blank(), facts(8, 12)
    tokens = entity_tokens(subject, contexts.contexts_of(subject, rest))
    at = {0: overwrite._neurons(subject, rp.Site(0, rp.Point.MLP_NEURONS))}
    keys = entity_rows(subject, tokens, at)[0].double()
    moved = [
        float(((weight(rp.apply(fitted(subject, layers="0", others=o), subject)) - weight(subject)) @ keys.T).norm())
        for o in ((), rest)
    ]
    assert moved[1] < 0.5 * moved[0]


def test_the_certificate_is_read_from_the_provenance():
    edit = fitted(blank())
    found = OverwriteCertificate.of(edit)
    assert [row.layer for row in found.layers] == [0, 1] and "layer 1: " in found.describe()
    assert found.plain()["layers"][0]["contexts"] == found.layers[0].contexts > 20
    with pytest.raises(ArgumentError, match=r"was not made by fit\.overwrite"):
        OverwriteCertificate.of(rp.Edit({}))


# --- Contexts


@pytest.mark.parametrize("kind", contexts.KINDS)
def test_every_kind_of_context_names_the_entity(kind):
    subject = blank()
    found = contexts.contexts_of(subject, FACTS, (kind,))
    tokens = entity_tokens(subject, found)
    assert {c.entity for c in found} == {fact.entity.lower() for fact in FACTS}
    batch = tokens.batches.items[0]
    for row, context in enumerate(tokens.contexts[: len(batch.document)]):
        end = int(batch.entity[row].int().argmax())
        assert subject.tokenizer.decode(batch.input_ids[row][: end + 1]).endswith(context.name)
    assert not any(fact.answer in c.text for c in found for fact in FACTS if kind == "templates")


def test_names_in_retained_text_are_found():
    subject = blank()
    tokens = entity_tokens(subject, contexts.contexts_of(subject, FACTS))
    (batch,) = read(["There was nobody to be seen.", "We met Abo there."]).batches(subject.tokenizer)
    ends = contexts.name_ends(batch, tokens.names)
    assert int(ends.sum()) == 1 and bool(ends[1, len("We met Abo") - 1])


# --- Refusals

NAMELESS = (*FACTS[:3], replace(FACTS[3], entity=""))
LOST = (*FACTS[:3], replace(FACTS[3], entity="Zyx"))
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no entity": (lambda: rp.fit.overwrite(blank(), NAMELESS), DataError, "names no entity, so there is no token to edit"),
    "no facts": (lambda: rp.fit.overwrite(blank(), ()), DataError, "there are no facts"),
    "name not found": (lambda: rp.fit.overwrite(blank(), LOST, retain=TEXT), DataError, "no wording of the facts about 'Zyx' contains that name"),
    "two entities": (lambda: rp.fit.overwrite(blank(), FACTS[:2], target="exchange"), NotEnoughRows, "has 2 entities, target='exchange' needs at least 3"),
    "one context": (lambda: fitted(blank(), contexts=("wordings",)), NotEnoughRows, "has one context"),
    "layers": (lambda: fitted(blank(), layers="0-7"), UnknownSite, r"asks for layers 0\.\.7; layers are 0\.\.1"),
    "a point": (lambda: fitted(blank(), layers="0.mlp.out"), UnknownSite, "give layers alone"),
    "budget": (lambda: fitted(blank(), retain_budget=1e-12), SelectionError, r"retain_budget=1e-12 cannot be met"),
    "budget and lam": (lambda: fitted(blank(), retain_budget=0.1, lam=0.1), ArgumentError, "a budget chooses lam"),
    "lam": (lambda: fitted(blank(), lam=0.0), ArgumentError, "lam=0.0"),
    "target": (lambda: fitted(blank(), target="men"), UnknownName, "target='men' does not exist; did you mean 'mean'"),
    "method": (lambda: fitted(blank(), method="liner"), UnknownName, "did you mean 'linear'"),
    "kind": (lambda: fitted(blank(), contexts=("words",)), UnknownName, "did you mean 'wordings'"),
    "holdout": (lambda: fitted(blank(), holdout=1.0), FractionError, "strictly between 0 and 1"),
    "form": (lambda: fitted(blank(), target="selective", keep=FACTS, form="edit"), NotFoldable, "is no map of the keys"),
    "keep": (lambda: fitted(blank(), target="selective"), ArgumentError, "give keep="),
    "keep_rank": (lambda: fitted(blank(), target="selective", keep=FACTS, keep_rank=48), RankError, "at most 47 stay"),
    "others": (lambda: fitted(blank(), others=FACTS[:1]), OverlapError, "others are about 1 entities that are to be overwritten"),
    "short text": (lambda: fitted(blank(), retain=["A short text."]), NotEnoughRows, "needs at least 96"),
    "experts": (lambda: fitted(tiny("mixtral")), NotFoldable, "needs one dense matrix"),
    "post-norm": (lambda: fitted(tiny("gemma2"), target="selective", keep=FACTS), NotFoldable, "a norm lies between this MLP and the stream"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_overwritten_is_refused(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call()
