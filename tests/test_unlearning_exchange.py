"""Laws of localized training: which answers are exchanged, what is in the batches, which tensors move."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import repedit as rp
from repedit.data import facts
from repedit.data.fact_sets import with_paraphrases
from repedit.errors import ArgumentError, DataError
from repedit.unlearning import sampling
from repedit.unlearning.sampling import Exchange, exchanged_rows
from tests.teachable_models import facts as likes
from tests.unlearning_cases import subject, training

CAPITALS = facts("capitals").forget[:12]
TEMPLATE = "{answer} is liked by"


def test_the_reverse_form_follows_from_a_wording():
    given = exchanged_rows(with_paraphrases(CAPITALS), Exchange(), 0)
    told = {row.id: row for row in given}
    for fact in CAPITALS:
        name, false = fact.id, told[f"{fact.id} exchanged"].answer
        told_backwards = fact.prompt.removesuffix(" is").replace("The", "the")  # some with another article: the Sudan
        assert told[f"{name} reversed"].text == f"{false} is {told_backwards}"
        assert {told[f"{name}#{i} exchanged"].answer for i in range(1, 5)} == {false} != {fact.answer}
    assert len(given) == 6 * len(CAPITALS)


def answers_differ(seed=0):
    """Every fact gets a wrong answer, and the answers are a permutation."""
    rows = likes(0, 12)
    given = [row.answer for row in exchanged_rows(rows, Exchange(reverse=False), seed)]
    assert all(new != row.answer for new, row in zip(given, rows, strict=True)), "an answer is its own"
    assert sorted(given) == sorted(row.answer for row in rows)
    return given


def test_every_fact_gets_the_answer_of_another():
    assert len({tuple(answers_differ(seed)) for seed in range(4)}) == 4
    assert answers_differ(3) == answers_differ(3)


def test_a_plain_shuffle_is_caught(monkeypatch):
    def shuffled(answers, domain, seed):
        given = random.Random(seed).sample(list(answers.values()), len(answers))
        return dict(zip(answers, given, strict=True))

    monkeypatch.setattr(sampling, "_exchange", shuffled)
    with pytest.raises(AssertionError, match="its own"):
        answers_differ()


def both_directions_are_trained():
    run = training(rp.recipes.localized(layers="0", template=TEMPLATE), forget=likes(0, 8), retain=likes(8, 14))
    decode = run.trainable.subject.tokenizer.decode
    texts = [decode(row.input_ids[0]) for row in run.data.rows["exchanged"]]
    assert sum("likes" in text for text in texts) == 8
    assert sum("is liked by" in text for text in texts) == 8, "the reverse form is missing"
    drawn = {i for step in range(8) for i in run.order.at(step).rows["exchanged"]}
    assert drawn == set(range(16))
    labels = [row.input_ids[row.answer] for row in run.data.rows["exchanged"][8:]]
    assert [decode(x).strip() for x in labels] == [fact.entity for fact in likes(0, 8)]


def test_the_reverse_form_is_in_the_batches():
    both_directions_are_trained()


def test_a_missing_reverse_form_is_caught(monkeypatch):
    monkeypatch.setattr(sampling, "_reversed", lambda *_: [])
    with pytest.raises(AssertionError, match="reverse form is missing"):
        both_directions_are_trained()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_mlps_of_the_layers_move(family):
    recipe = rp.recipes.localized(layers="1", template=TEMPLATE, batch_size=4)
    sets = {"forget": likes(0, 8), "retain": likes(8, 14), "steps": 3, "progress": False}
    delta = rp.unlearn(subject(family), recipe=recipe, **sets)
    parts = ("gate_proj", "up_proj", "down_proj") if family == "llama" else ("c_fc", "c_proj")
    path = "model.layers.1.mlp" if family == "llama" else "transformer.h.1.mlp"
    assert set(delta.tensors) == {f"{path}.{part}.weight" for part in parts}
    assert delta.provenance["options"]["exchange"]["template"] == TEMPLATE
    again, other = (rp.unlearn(subject(family), recipe=recipe, seed=seed, **sets) for seed in (0, 1))
    assert all(torch.equal(v, again.tensors[n]) for n, v in delta.tensors.items())
    assert other.provenance["data"]["exchanged"] != delta.provenance["data"]["exchanged"]


def test_a_recipe_file_names_it(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "localized"\n[options]\nlayers = "3"\n[exchange]\nreverse = false', encoding="utf-8")
    found = rp.recipes.read(path)
    assert found.exchange == Exchange(reverse=False) and found.parameters.layers == "3"
    small = rp.recipes.small(rp.recipes.localized())
    assert small.parameters.layers == "0-11" and small.steps == 60


def test_what_cannot_be_exchanged_is_refused():
    rows = likes(0, 8)
    with pytest.raises(ArgumentError, match=r"template='liked by' does not contain \{answer\}"):
        Exchange(template="liked by")
    with pytest.raises(DataError, match="has no wording of the form 'The capital of France is'"):
        exchanged_rows(rows, Exchange(), 0)
    with pytest.raises(DataError, match="names no entity"):
        exchanged_rows([replace(row, entity="") for row in rows], Exchange(template=TEMPLATE), 0)
    same = [replace(row, answer=rows[0].answer) for row in rows[:6]]
    with pytest.raises(DataError, match=r"of 8 facts of domain 'likes' have the same answer"):
        exchanged_rows([*same, *rows[6:]], Exchange(reverse=False), 0)
    with pytest.raises(DataError, match="is running text; this recipe needs rows"):
        training(rp.recipes.localized(layers="0"), forget=["some text to be forgotten"], retain=rows)
