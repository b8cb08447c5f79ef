"""Ablations of outputs at names: they find where a planted fact enters, and leave what they do not touch as it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import repedit as rp
from repedit.errors import ArgumentError, DataError, NotEnoughRows, NotFinite, UnknownName, UnknownSite
from repedit.metrics import location
from repedit.metrics.facts import choice_scores
from repedit.metrics.location import POSITIONS, _kinds
from repedit.metrics.relearning import Relearning, relearned
from repedit.models.subject import Subject, subject_of
from repedit.unlearning.sampling import cycled
from tests.teachable_models import blank, facts, taught
from tests.test_overwrite import caught

FACTS = facts(0, 16)


@cache
def pupil() -> Subject:
    return taught()


def located(subject: Subject | None = None, **options: Any) -> Any:
    return rp.locate(pupil() if subject is None else subject, FACTS, **options)


LETTERS = tuple(
    replace(f, prompt=f"{f.entity} is\n", answer=f.answer[0], choices=tuple(choice[0] for choice in f.choices))
    for f in FACTS
)
"""Facts whose answers are one token, predicted at the last position of the prompt: nothing later can read the name."""


def attention_brings_the_name_to_the_end(found: Any) -> None:
    """Without what attention adds at the last position, the answer is the same for every name; without the MLPs it is not."""
    row = {(r.point, r.position): r.accuracy["facts"] for r in found.rows}
    assert found.before["facts"] > 0.9
    assert row["attn.out", "last"] <= 5 / 16
    assert row["mlp.out", "last"] > 5 / 16 and row["attn.out", "elsewhere"] > 5 / 16


def test_answers_go_with_what_attention_brings_to_the_last_position():
    lm = taught(texts=tuple(fact.text for fact in LETTERS))
    found = rp.locate(lm, LETTERS, layers="0-1", positions=("last", "elsewhere"))
    attention_brings_the_name_to_the_end(found)
    swapped = {"last": "elsewhere", "elsewhere": "last"}
    rows = tuple(replace(row, position=swapped[row.position]) for row in found.rows)
    caught(attention_brings_the_name_to_the_end, replace(found, rows=rows))


def replacing_by_itself_changes_nothing(patch: Callable[[Any], None]) -> None:
    """An ablation that puts back what is there gives the scores of the model as it is, to the last rounding."""
    from repedit.metrics import location

    found = location._Prompts(pupil(), FACTS, pupil().select("0-1.mlp.out"), "exchange", 0)
    patch(found)
    options = [fact.choices for fact in FACTS]
    hooks = lambda part: location.installed(pupil().model, found._hooks(pupil().select("0-1.mlp.out"), "subject", part))  # noqa: E731
    same, plain = (choice_scores(pupil(), FACTS, options, 32, prompts=p) for p in (hooks, None))
    assert all(abs(a - b).max() < 1e-4 for (a, _), (b, _) in zip(same, plain, strict=True))


def test_an_exchange_with_oneself_changes_nothing():
    replacing_by_itself_changes_nothing(lambda found: setattr(found, "donors", list(range(len(FACTS)))))
    caught(replacing_by_itself_changes_nothing, lambda found: None)


def test_positions_are_a_partition_without_the_first():
    subject = blank()
    ids, kinds = _kinds(subject, FACTS[0])
    named = {
        POSITIONS[k]: subject.tokenizer.decode([i for i, j in zip(ids, kinds, strict=True) if j == k]) for k in range(4)
    }
    assert int(kinds[0]) == -1 and not (kinds[1:] == -1).any()
    assert named == {"subject_last": "o", "subject_earlier": "b", "last": "s", "elsewhere": " like"}


def the_whole_name_is_ablated(position: str) -> None:
    """Every token of the name gets the mean of its own kind, and no other token changes."""
    prompts = location._Prompts(pupil(), FACTS, pupil().select("0-1.mlp.out"), "mean", 0)
    site = pupil().select("1.mlp.out")[0]
    (hook,) = prompts._hooks([site], position, [0], width=12)
    states = torch.randn(1, 12, 48)
    written, kinds = hook.function(states), prompts.kinds[0]
    own = [
        (kinds == POSITIONS.index(name)).nonzero().flatten().tolist() for name in ("subject_earlier", "subject_last")
    ]
    for name, places in zip(("subject_earlier", "subject_last"), own, strict=True):
        for place in places:
            assert torch.allclose(written[0, place], prompts.means[site, "likes", POSITIONS.index(name)].float())
    others = [place for place in range(12) if place not in own[0] + own[1]]
    assert torch.equal(written[0, others], states[0, others])


def test_the_subject_is_all_tokens_of_its_name():
    the_whole_name_is_ablated("subject")
    caught(the_whole_name_is_ablated, "subject_last")
    touched = located(layers="0", points=("mlp.out",), positions=("subject", "subject_earlier")).rows[0].touched
    assert touched["facts"] == len(FACTS)


def test_sets_are_told_apart_by_entity():
    same = tuple(replace(f, id=f"s{f.id}", domain="same", prompt=f"{f.entity} wants") for f in FACTS[:4])
    other = tuple(
        replace(f, id=f"o{f.id}", domain="other", entity=f"{f.entity}x", prompt=f"{f.entity}x has") for f in FACTS[:3]
    )
    found = located(against=(*same, *other), layers="0", points=("mlp.out",), positions=("subject_last",))
    assert dict(found.counts) == {"facts": 16, "same subjects": 4, "other subjects": 3}
    assert set(found.rows[0].accuracy) == set(found.before) == set(found.counts)


def test_layers_are_ablated_alone_or_together():
    every = located(points=("mlp.out",), positions=("subject_last",))
    assert [row.layers for row in every.rows] == ["0", "1"]
    assert [row.layers for row in located(layers=("0-1", "1"), points=("mlp.out",), positions=("last",)).rows] == [
        "0-1",
        "1",
    ]


def test_a_seed_reproduces_and_the_value_is_shown():
    options = {"layers": "0-1", "points": ("mlp.out",), "positions": ("subject_last", "last"), "how": "exchange"}
    first, second = (located(**options) for _ in range(2))
    assert first.to_json() == second.to_json() and json.loads(first.to_json())["how"] == "exchange"
    header, before, *rows = first.table()
    assert header[:3] == ("layers", "point", "position") and before[2] == "none" and len(rows) == 2
    figure = rp.plot.ablations(first)
    assert "Accuracy on facts" in figure.get_suptitle() and "exchange" in figure.get_suptitle()


# --- Relearning with an ablation held


def nothing_is_learned_past_the_ablation(found: Any) -> None:
    """Where no prompt can tell names apart, not even the taught half gets more than its most frequent answer."""
    rows = {(r.point, r.position): r.accuracy for r in found.rows}
    assert found.before["T after relearning"] > 0.9 and rows["attn.out", "elsewhere"]["T after relearning"] > 0.9
    assert rows["attn.out", "last"]["T after relearning"] <= 3 / 8
    assert rows["attn.out", "last"]["V after relearning"] <= 3 / 8


def test_what_relearning_brings_back_is_asked_and_learned_with_the_ablation(monkeypatch):
    lm = taught(texts=tuple(fact.text for fact in LETTERS))
    options: dict[str, Any] = {
        "layers": "0-1", "points": ("attn.out",), "positions": ("last", "elsewhere"),
        "relearning": Relearning(lr=3e-3, steps=20),
    }  # fmt: skip
    found = rp.locate(lm, LETTERS, **options)
    assert found.before["facts"] > 0.9 and found.counts["T after relearning"] == found.counts["V after relearning"] == 8
    nothing_is_learned_past_the_ablation(found)
    hooks = location._Prompts._hooks
    monkeypatch.setattr(  # the copy is neither trained nor asked with the ablation
        location._Prompts, "_hooks",
        lambda self, sites, position, part, student=None, width=None: hooks(self, () if student else sites, position, part, student, width),
    )  # fmt: skip
    caught(nothing_is_learned_past_the_ablation, rp.locate(lm, LETTERS, **options))


def held_values_are_those_of_the_first_wordings(values: Callable[[Any], Any]) -> None:
    """In rows of several lengths the hooks of training write the mean over all facts at one kind of position, only there."""
    worded = tuple(replace(f, paraphrases=(f"Now {f.entity} really likes",)) for f in FACTS)
    site = pupil().select("1.mlp.out")[0]
    asked = location._Prompts(pupil(), worded, [site], "mean", 0)
    held = location._Held(pupil(), worded, asked, Relearning())
    part, kind = (0, 1), POSITIONS.index("subject_last")
    held.taught.means = values(held)
    (hook,) = held.taught._hooks([site], "subject_last", part, blank(), 40)
    states = torch.randn(2, 40, 48)
    written = hook.function(states)
    for row, number in enumerate(part):
        place = held.taught.kinds[number].tolist().index(kind)
        assert torch.allclose(written[row, place], asked.means[site, "likes", kind].float())
        written[row, place] = states[row, place]
    assert torch.equal(written, states)


def test_what_is_held_in_training_is_what_replaces_outputs_when_asked():
    held_values_are_those_of_the_first_wordings(lambda held: held.taught.means)
    caught(held_values_are_those_of_the_first_wordings, lambda held: {k: 2 * v for k, v in held.taught.means.items()})


def training_is_the_plain_loop(settings: Relearning) -> None:
    """Without hooks, the copy is what a plain loop over the same rows gives, and the model itself stays as it was."""
    lm, plain = pupil(), copy.deepcopy(pupil().model)
    student = relearned(lm, FACTS[:6], lambda *_: (), settings)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(5):
        loss = torch.zeros(())
        texts = [(f.prompt, f" {f.answer}") for i in cycled("relearning", 6, 3, step, 0) for f in [FACTS[i]]]
        tokens = [[lm.tokenizer.encode(t, add_special_tokens=not k) for k, t in enumerate(pair)] for pair in texts]
        for prompt, answer in tokens:
            logits = plain(torch.tensor([prompt + answer])).logits[0]
            picked = logits[len(prompt) - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(picked, torch.tensor(answer), reduction="sum")
        optimizer.zero_grad()
        (loss / sum(len(answer) for _, answer in tokens)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    pairs = zip(student.model.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in pairs)
    assert lm.fingerprint() == subject_of(pupil().model, lm.tokenizer).fingerprint()


def test_relearning_is_the_plain_loop():
    training_is_the_plain_loop(Relearning(lr=1e-3, steps=5, batch_size=3))
    caught(training_is_the_plain_loop, Relearning(lr=1e-3, steps=5, batch_size=3, seed=1))


WORDED = tuple(replace(f, prompt=f"so {f.entity}", paraphrases=(f"{f.entity} likes",)) for f in FACTS)
"""The first wording ends with the name, so it has no last position of its own; the other one has."""

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "position": (lambda: located(positions=("first",)), UnknownName, "positions='first' does not exist"),
    "point": (lambda: located(points=("mlp.neurons",)), UnknownName, "points='mlp.neurons' does not exist"),
    "way": (lambda: located(how="zero"), UnknownName, "how='zero' does not exist"),
    "layers": (lambda: located(layers="0-9"), UnknownSite, r"asks for layers 0\.\.9; layers are 0\.\.1"),
    "a site": (lambda: located(layers="0.mlp.out"), UnknownSite, "give layers alone"),
    "no layer": (lambda: located(layers=()), ArgumentError, "layers names none"),
    "two entities": (lambda: rp.locate(pupil(), FACTS[:2]), NotEnoughRows, "has 2 entities"),
    "no entity": (lambda: rp.locate(pupil(), (replace(FACTS[0], entity=""),)), DataError, "names no entity"),
    "not found": (lambda: rp.locate(pupil(), (replace(FACTS[0], entity="Zyx"),)), DataError, "the tokens of 'Zyx' are not in the prompt"),
    "no choices": (lambda: rp.locate(pupil(), (replace(FACTS[0], choices=()),)), DataError, "has no choices"),
    "exchange held": (lambda: located(how="exchange", relearning=Relearning()), ArgumentError, "how='exchange' with relearning"),
    "no step": (lambda: Relearning(steps=0), ArgumentError, "steps"),
    "no rate": (lambda: Relearning(lr=0.0), ArgumentError, "lr"),
    "a wording without the name": (
        lambda: rp.locate(
            pupil(), [replace(f, paraphrases=("Who likes",)) for f in FACTS], layers="0", relearning=Relearning(steps=1)
        ),
        DataError, "not in the prompt|not in its wording",
    ),
    "no value to hold": (
        lambda: rp.locate(pupil(), WORDED, layers="0", positions=("last",), relearning=Relearning(steps=1)),
        DataError, "no first wording of domain 'likes' has one",
    ),
    "not finite": (lambda: relearned(pupil(), FACTS, lambda *_: (), Relearning(lr=1e30, steps=3)), NotFinite, "relearning, step [23]: the loss is"),
    "set": (lambda: located(layers="0").grid("others"), UnknownName, "on='others' was not measured"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_located_is_refused(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call()
