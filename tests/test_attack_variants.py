"""Attacks no defence was tuned against: other ways to retrain, four fifths of the facts, early MLPs, loud directions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Scratch, Setup, Work, built, planned
from repedit.auditing.attacks import tuning
from repedit.auditing.attacks import weights as quietening
from repedit.auditing.attacks.tuning import Tuning, examples, shuffled, tune
from repedit.auditing.attacks.variants import (
    FOUR_FIFTHS,
    STANDARD,
    VARIANTS,
    early_mlps,
    retraining,
    rtt_four_fifths,
)
from repedit.auditing.attacks.weights import head_rows, loudest, projections, quiet, quieten, suspicious
from repedit.auditing.data import AuditData, audit_data
from repedit.auditing.runner import _folds
from repedit.data import Splits
from repedit.data.fact_sets import entity_of
from repedit.errors import ArgumentError, UnknownName
from repedit.hashing import fingerprint
from repedit.models.subject import Subject
from tests.teachable_models import blank, facts, pupil, splits
from tests.tiny import tiny


def never_longer(monkeypatch) -> None:
    """Trainings of so few steps that they teach nothing are not repeated with more."""
    monkeypatch.setattr(tuning, "_nearest", lambda trials, results: None)


def given(monkeypatch, attack) -> list[Tuning]:
    """The tunings that an attack trains with; nothing is trained."""
    seen: list[Tuning] = []
    never_longer(monkeypatch)
    monkeypatch.setattr(tuning, "tune", lambda s, d, t, **rest: seen.append(t) or tuning.TuningLog((), 0))
    attack(pupil(), splits())
    return seen


def test_variants_are_tried_as_they_are_written_down(monkeypatch):
    found = given(monkeypatch, retraining(variants=tuple(VARIANTS), scale=2.0))
    assert found == [replace(one, rate=2 * one.rate) for one in VARIANTS.values()]
    assert {one.rank for one in found if one.how == "lora"} >= {4, 8, 16, 32, 64, 128, 256}
    assert {one.optimizer for one in found} == {"adamw", "lion", "sgd"}
    assert {one.steps for one in found} == {40, 200, 500} and {one.loss for one in found} == {"answer", "sequence"}


def test_a_retraining_in_other_ways_learns_t_and_changes_nothing():
    subject = pupil()
    before = fingerprint(subject.model)
    found = retraining(variants=("rank=4", "optimizer=lion"), scale=20.0)(subject, splits())
    assert found.settings == (
        "lr=0.01 step=20 rank=4", "lr=0.01 step=40 rank=4", "lr=0.0002 step=20 optimizer=lion", "lr=0.0002 step=40 optimizer=lion",
    )  # fmt: skip
    assert (found.status, found.items) == ("ran", tuple(f.id for f in facts(8, 12)))
    assert fingerprint(subject.model) == before


def changed(subject, layers: tuple[int, ...]) -> set[str]:
    """The weights that a training of the MLPs in some layers moves."""
    scratch = Scratch(subject).subject
    tune(scratch, shuffled(examples(scratch, facts(0, 8)), 8, 0), Tuning(1e-2, steps=2, how="mlps", layers=layers),
         at=(), measure=lambda step: None)  # fmt: skip
    before = dict(subject.model.named_parameters())
    return {name for name, p in scratch.model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("layers", [(0,), (0, 1)], ids=str)
def test_only_the_mlps_of_the_layers_are_trained(layers):
    parts = ("gate_proj", "up_proj", "down_proj")
    assert changed(blank(), layers) == {f"model.layers.{i}.mlp.{part}.weight" for i in layers for part in parts}


def test_a_training_of_every_weight_is_caught(monkeypatch):
    monkeypatch.setattr(tuning, "_mlp_matrices", lambda subject, given: list(subject.model.parameters()))
    assert any("self_attn" in name for name in changed(blank(), (0,)))


def test_early_layers_are_a_share_of_all_and_at_least_one(monkeypatch):
    found = given(monkeypatch, early_mlps(rates=(1e-3,), shares=(0.1, 0.5, 1.0)))
    assert [(one.how, one.layers) for one in found] == [("mlps", (0,)), ("mlps", (0, 1))]
    monkeypatch.undo()
    never_longer(monkeypatch)
    assert early_mlps(rates=(1e-3,), steps=2)(pupil(), splits()).settings == (
        "lr=0.001 step=1 layers=1", "lr=0.001 step=2 layers=1",
    )  # fmt: skip


def audited(count: int = 40, folds: int = 2) -> AuditData:
    """Facts in folds, one nearly repeated by another."""
    people = tuple(
        replace(facts()[0], id=str(i), entity=f"person {i}", prompt=f"person {i} likes") for i in range(count)
    )
    return audit_data(
        people, ("text",), unrelated=None, holdout=None, folds=folds, train_fraction=0.5, seed=0, most=None
    )


def check_fifths(fifths: tuple[Splits, ...], data: AuditData) -> None:
    asked = [fact.id for part in fifths for fact in part.test]
    assert sorted(asked) == sorted(fact.id for fact in data.tested)
    for part in fifths:
        assert not {entity_of(fact) for fact in part.train} & {entity_of(fact) for fact in part.test}
        assert len(part.train) >= 0.8 * len(data.forget)


def attack_of(record: AttackRecord) -> Attack:
    """An attack of a record that does nothing."""
    return Attack(record, {}, lambda subject, splits, seed: None, Work(1))


@pytest.mark.parametrize("folds", [1, 2])
def test_four_fifths_are_trained_on_and_every_fact_is_asked_once(folds):
    data = audited(folds=folds)
    check_fifths(data.fifths, data)
    assert [number for number, _ in _folds(attack_of(FOUR_FIFTHS), data, None)] == [0, 1, 2, 3, 4]
    assert len(list(_folds(attack_of(AttackRecord("other", uses_train=True)), data, None))) == folds


def test_halves_in_the_place_of_fifths_are_caught():
    data = audited()
    with pytest.raises(AssertionError):
        check_fifths(data.folds, data)


def test_invented_facts_are_asked_in_every_fifth():
    also = audited(16)
    parts = [part for _, part in _folds(attack_of(FOUR_FIFTHS), audited(), also)]
    assert all(
        len(part.test) == len(own.test) + len(new.test)
        for part, own, new in zip(parts, audited().fifths, also.fifths, strict=True)
    )
    assert all(len(part.train) == 32 for part in parts)


def test_four_fifths_train_longer_so_that_each_fact_is_seen_as_often(monkeypatch):
    never_longer(monkeypatch)
    ((attack,),) = [built(("rtt_four_fifths",), Setup("standard"))]
    assert attack.options["steps"] == 64 and rtt_four_fifths(rates=(1e-3,), steps=2)(pupil(), splits()).settings == (
        "lr=0.001 step=1", "lr=0.001 step=2",
    )  # fmt: skip


def check_quiet(change) -> None:
    """One loud direction is gone, or as loud as the next, and everything else is as it was."""
    weight = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for matrix in (weight, weight.mT, weight[0]):
        sizes = torch.linalg.svdvals(matrix)
        assert_close(torch.linalg.svdvals(change(matrix, 2, "cut"))[..., :4], sizes[..., 2:], rtol=0, atol=1e-8)
        level = torch.linalg.svdvals(change(matrix, 2, "level"))
        assert_close(level, torch.cat([sizes[..., 2:3], sizes[..., 2:3], sizes[..., 2:]], -1), rtol=0, atol=1e-8)


def test_the_loudest_directions_are_taken_down_exactly():
    check_quiet(quiet)
    small = torch.eye(2)
    assert quiet(small, 2, "cut") is small


def test_a_cut_of_the_quietest_directions_is_caught():
    def wrong(weight, top, way):
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        s[..., -top:] = 0
        return u @ torch.diag_embed(s) @ vh

    with pytest.raises(AssertionError):
        check_quiet(wrong)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_only_the_matrices_that_were_asked_for_change(family):
    subject = tiny(family)
    scratch = Scratch(subject).subject
    some = dict(list(projections(scratch).items())[:2])
    quieten(scratch, some, 1, "cut")
    before = dict(subject.model.named_parameters())
    moved = {name for name, p in scratch.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(some)


def test_loud_directions_are_asked_about_without_training(monkeypatch):
    subject = pupil()
    before, seen = fingerprint(subject.model), []
    inner = quietening.quieten
    monkeypatch.setattr(
        quietening, "quieten", lambda s, names, *rest: seen.append((len(names), *rest)) or inner(s, names, *rest)
    )
    found = loudest(tops=(1,))(subject, splits())
    assert found.settings == ("top=1 cut write", "top=1 level write", "top=1 cut all", "top=1 level all")
    assert [number for number, *_ in seen] == [4, 4, 14, 14] and found.status == "ran"
    assert fingerprint(subject.model) == before and isinstance(loudest().run(subject, splits(), 0), AttackResult)


def test_no_new_attack_is_in_fast_and_full_tries_more():
    new = {"loudest", "early_mlps", "retraining", "rtt_four_fifths", "reverse"}
    assert not new & set(planned("fast")) and new <= set(planned("standard"))
    (standard,), (full,) = (built(("retraining",), Setup(budget)) for budget in ("standard", "full"))
    assert standard.options["variants"] == list(STANDARD) and full.options["variants"] == list(VARIANTS)
    assert (standard.work.steps, full.work.steps) == (400, 1260)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (UnknownName, "variant 'rank=5'; did you mean", lambda: retraining(variants=("rank=5",))),
        (ArgumentError, "variants is empty; give some of", lambda: retraining(variants=())),
        (ArgumentError, r"rates=\(.*\), scale=0.0; give at least one rate", lambda: retraining(scale=0.0)),
        (ArgumentError, r"shares=\(0.0,\); give at least one, above 0", lambda: early_mlps(shares=(0.0,))),
        (ArgumentError, r"tops=\(0,\); give whole numbers of at least 1", lambda: loudest(tops=(0,))),
        (UnknownName, "way 'drop'; valid names: cut, level", lambda: loudest(ways=("drop",))),
        (ArgumentError, r"layers=\(1,\) with how='full'; only how='lora' and how='mlps'", lambda: Tuning(1.0, layers=(1,))),
        (ArgumentError, r"MLPs were asked for in layers \[2\]; the model has layers 0 to 1", lambda: changed(blank(), (2,))),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


# --- Input embeddings given back by the output head

NAMES = [70, 71, 72, 73]


def merged_in_the_input(turn: torch.Tensor | None = None) -> tuple[Subject, torch.Tensor]:
    """A model in which some tokens have one input embedding, while the head has their own, perhaps turned; and these."""
    subject = blank(tie_word_embeddings=False)
    table, head = (m.weight for m in (subject.model.get_input_embeddings(), subject.model.get_output_embeddings()))
    with torch.no_grad():
        head.copy_(table if turn is None else table @ turn)
        before = table.detach().clone()
        table[NAMES] = table[NAMES].mean(0)
    return subject, before


def asked_tables(monkeypatch, subject: Subject) -> dict[str, torch.Tensor]:
    """The input embeddings with which the attack asks, by setting."""
    tables, plain = [], quietening.ask
    monkeypatch.setattr(
        quietening, "ask",
        lambda s, f: tables.append(s.model.get_input_embeddings().weight.detach().clone()) or plain(s, f),
    )  # fmt: skip
    return dict(zip(head_rows()(subject, splits()).settings, tables, strict=True))


def the_names_come_back(tables: dict[str, torch.Tensor], setting: str, before: torch.Tensor) -> None:
    torch.testing.assert_close(tables[setting], before, atol=1e-3, rtol=1e-3)


def test_the_head_gives_merged_embeddings_back(monkeypatch):
    subject, before = merged_in_the_input()
    kept = fingerprint(subject.model)
    tables = asked_tables(monkeypatch, subject)
    assert list(tables) == ["as it is", "every row", "rows", "mapped"]
    for setting in ("every row", "rows", "mapped"):
        the_names_come_back(tables, setting, before)
    with pytest.raises(AssertionError):
        the_names_come_back(tables, "as it is", before)
    assert fingerprint(subject.model) == kept


def test_a_head_in_another_basis_gives_them_back_through_the_map_of_the_other_tokens(monkeypatch):
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0]
    subject, before = merged_in_the_input(turn)
    tables = asked_tables(monkeypatch, subject)
    the_names_come_back(tables, "mapped", before)
    with pytest.raises(AssertionError):
        the_names_come_back(tables, "rows", before)


def test_suspicious_tokens_share_an_embedding_or_lie_off_the_map():
    head = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    table = head.clone()
    table[[3, 4]] = table[[3, 4]].mean(0)
    table[9] += 5.0
    rows, mapped = suspicious(table, head)
    assert rows.tolist() == [3, 4, 9]
    assert_close(mapped, head[rows], atol=1e-4, rtol=1e-4)
    assert suspicious(head, head)[0].tolist() == []
    assert len(suspicious(torch.ones(5, 2), torch.ones(5, 2))[0]) == 5


def test_one_matrix_for_both_has_nothing_to_give_back():
    subject = blank(tie_word_embeddings=True)
    found = head_rows()(subject, splits())
    assert (found.status, found.settings, found.reason) == (
        "ran",
        ("as it is",),
        "input and output embeddings are one matrix",
    )
    record = head_rows().record
    assert record.unchanged(subject).answers == {} and record.unchanged(merged_in_the_input()[0]) is None
    assert "head_rows" in planned("quick")
