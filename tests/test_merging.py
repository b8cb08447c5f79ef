"""Merged entities: what the first blocks make of names, what stays, which texts are retained, and how the head is kept."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import repedit as rp
from repedit.data import Corpus, Fact, prose
from repedit.data.encoding import mentions, prompt_ids
from repedit.errors import (
    ArgumentError,
    DataError,
    NotEnoughRows,
    NotFoldable,
    OverlapError,
    SelectionError,
    TrainingError,
    UnknownName,
)
from repedit.fit.contexts import TEMPLATES
from repedit.fit.merging import MergeCertificate
from repedit.models.subject import Subject, subject_of
from tests.every_causal_type import tiny_causal
from tests.saved_models import merging_tokenizer
from tests.teachable_models import facts

FACTS = facts(0, 6)
TEXT = Corpus(prose().documents[:3], "text")
LONG = {"steps": 60}
QUICK: dict[str, Any] = {
    "rare": 259,
    "blocks": 1,
    "steps": 4,
    "lr": 3e-3,
    "beta": 1.0,
    "named": 8,
    "retained": 8,
    "written_names": 0,
    "written_sentences": 0,
}
merging: Any = importlib.import_module("repedit.fit.merging")


def pupil(family: str = "llama", **changes: Any) -> Subject:
    """A tiny model with a token for the first two letters of every name; the third tells them apart."""
    tokenizer = merging_tokenizer(*((f.entity[0], f.entity[1]) for f in facts()))
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    shape |= {"intermediate_size": 96, "num_key_value_heads": 2} if family == "llama" else {"n_positions": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family, **{"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True} | shape | changes
        )
        return subject_of(AutoModelForCausalLM.from_config(config).eval(), tokenizer)


def merged(subject: Subject, config: dict[str, Any] = {}, **options: Any) -> rp.Delta:  # noqa: B006
    items = options.pop("facts", FACTS)
    return rp.fit.merge(subject, items, **{"retain": TEXT, "progress": False, "config": QUICK | config} | options)


def caught(law: Callable[..., None], *args: Any) -> None:
    with pytest.raises(AssertionError):
        law(*args)


# --- What a merge does


def names_become_one(fit: Callable[[Subject], rp.Delta]) -> None:
    """In a template that the training did not see, the stream at the names differs less than it did."""
    assert MergeCertificate.of(fit(pupil())).left < 0.7


def test_the_first_blocks_make_the_same_of_every_name():
    names_become_one(lambda subject: merged(subject, LONG))
    caught(names_become_one, lambda subject: merged(subject, LONG | {"lr": 1e-8}))


def retained_text_stays(fit: Callable[[Subject], rp.Delta]) -> None:
    assert MergeCertificate.of(fit(pupil())).distortion < 0.5


def test_what_is_retained_is_given_back():
    retained_text_stays(lambda subject: merged(subject, LONG))
    caught(retained_text_stays, lambda subject: merged(subject, LONG | {"beta": 1e-6, "lr": 2e-2}))


def certificate_is_of_the_model(subject: Subject, delta: rp.Delta) -> None:
    """What the certificate says is left holds of the model that the delta gives."""
    ends = []
    for lm in (rp.apply(delta, subject), subject):
        rows = [prompt_ids(lm.tokenizer, TEMPLATES[-1].format(fact.entity)) for fact in FACTS]
        states = lm.model(torch.tensor(rows), output_hidden_states=True).hidden_states[1][:, -1]
        ends.append(float(states.double().var(0).sum()))
    assert ends[0] / ends[1] == pytest.approx(MergeCertificate.of(delta).left, rel=1e-4)


@torch.no_grad()
def test_the_certificate_is_of_the_model_that_the_delta_gives():
    subject = pupil()
    delta = merged(subject)
    certificate_is_of_the_model(subject, delta)
    caught(certificate_is_of_the_model, subject, replace(delta, tensors={n: 0.5 * v for n, v in delta.tensors.items()}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_embeddings_of_the_names_and_the_first_blocks_move_and_nothing_else(family):
    subject = pupil(family)
    before = subject.fingerprint()
    delta = merged(subject)
    table, block = subject.layout.embeddings[0], subject.layout.block_paths[0]
    matrices = {n for n, p in subject.model.named_parameters() if n.startswith(f"{block}.") and p.ndim > 1}
    assert set(delta.tensors) == matrices | {table}
    tokens = merging.name_tokens(subject, [f.entity for f in FACTS], 259)
    moved = delta.tensors[table].any(1).nonzero()[:, 0].tolist()
    assert moved == list(tokens) and len(tokens) == len(FACTS)
    rows = subject.value(table)[list(tokens)] + delta.tensors[table][list(tokens)]
    assert torch.allclose(rows, subject.value(table)[list(tokens)].mean(0).expand_as(rows), atol=1e-6)
    assert subject.fingerprint() == before and not any(p.grad is not None for p in subject.model.parameters())


def test_two_merges_with_one_seed_are_one():
    first, again, other = merged(pupil()), merged(pupil()), merged(pupil(), seed=1)
    assert all(torch.equal(v, again.tensors[n]) for n, v in first.tensors.items())
    assert any(not torch.equal(v, other.tensors[n]) for n, v in first.tensors.items())


def test_a_model_in_half_precision_is_merged_in_single_precision():
    subject = pupil().to(dtype="bfloat16")
    delta = merged(subject)
    assert {v.dtype for v in delta.tensors.values()} == {torch.float32}
    assert rp.apply(delta, subject).model.dtype == torch.bfloat16


def test_a_model_in_training_mode_is_merged_without_dropout_and_stays_in_it():
    subject = pupil("gpt2", embd_pdrop=0.5)
    quiet = merged(subject)
    subject.model.train()
    assert all(torch.equal(v, quiet.tensors[n]) for n, v in merged(subject).tensors.items())
    assert subject.model.training


def test_texts_are_cut_to_the_positions_of_the_model():
    assert MergeCertificate.of(merged(pupil("gpt2", n_positions=38))).names == len(FACTS)


# --- Rows


def named(text: str, name: str, spell: Callable[[str], str] = str, one: int = 258) -> Any:
    return merging._named(pupil(), text, name, spell, one, "kind")


def the_states_wanted_are_those_of_the_same_text(row: Any) -> None:
    """What follows the name has the same tokens in both texts, and the name wants the states of averaged tokens."""
    size = row.end + 1 - row.start
    assert len(row.want) == len(row.ids) - row.start
    assert [row.one[i] for i in row.want[size:]] == row.ids[row.end + 1 :]
    assert {row.one[i] for i in row.want[:size]} == {258} and row.one[: row.start] == row.ids[: row.start]
    assert row.start > 0 or size == 1 or all(i > 0 for i in row.want[1:size])  # one of them alone is a sink


@pytest.mark.parametrize("text", ["I know Abo well", "Abo is here", "Abo"])
@pytest.mark.parametrize("spell", [str, str.lower, str.upper])
def test_a_name_wants_the_states_of_one_averaged_token(text, spell):
    row = named(text, "Abo", spell)
    the_states_wanted_are_those_of_the_same_text(row)
    caught(the_states_wanted_are_those_of_the_same_text, row._replace(want=row.want[:-1]))


def names_are_misspelt_too(rows: Any, count: int) -> None:
    """Beside the own, small and capital letters there are rows with a misspelt name, and the certificate's have none."""
    subject = pupil()
    texts = [subject.need_tokenizer().decode(row.ids) for row in rows.fitted if row.name == "Abo"]
    wrong = [text for text in texts if not mentions(text, "Abo")]
    assert len(wrong) * 3 == count * (len(texts) - len(wrong)) and len({*wrong}) >= min(count, 2)
    held = [subject.need_tokenizer().decode(row.ids) for row in rows.held]
    assert held == [TEMPLATES[-1].format(row.name) for row in rows.held]


@pytest.mark.parametrize("count", [0, 2])
def test_names_are_misspelt_in_some_rows(count):
    subject = pupil()
    groups = {"likes: entities": tuple(f.entity for f in FACTS)}
    averaged = merging._averaged_tokens(subject, groups, 259)
    names_are_misspelt_too(merging._named_rows(subject, groups, averaged, (), count, 0), count)
    caught(names_are_misspelt_too, merging._named_rows(subject, groups, averaged, (), 1, 0), count)


def test_what_the_model_writes_does_not_follow_the_generation_settings_of_the_checkpoint():
    subject = pupil()
    plain = merging.written_sentences(subject, 1, 0)
    subject.model.generation_config.repetition_penalty = 50.0
    own = subject.model.generation_config
    assert merging.written_sentences(subject, 1, 0) == plain and subject.model.generation_config is own


def texts_left_out_are_counted(facts: list[Fact]) -> None:
    certificate = MergeCertificate.of(merged(pupil(), facts=facts))
    assert certificate.left_out == 5  # two in capitals or not, three in its own letters, small or capital ones


def test_texts_that_say_a_name_twice_are_counted():
    twice = replace(FACTS[0], paraphrases=(f"Whatever {FACTS[0].entity} says, {FACTS[0].entity} likes",))
    texts_left_out_are_counted([twice, *FACTS[1:]])
    caught(texts_left_out_are_counted, list(FACTS))


def test_a_text_that_says_a_name_twice_or_not_at_all_is_no_row():
    assert named("Abo and Abo", "Abo") is None and named("Bix", "Abo") is None


def nothing_is_lost_where_one_token_stands(row: Any) -> None:
    """The loss of names is 0 where the text with averaged tokens is the text itself."""
    models = merging._Models.of(pupil(), {"kind": merging._Tokens((258,), 258)}, merging.Merging(**QUICK))
    assert merging._names_loss(models, [row], 1.0).item() == pytest.approx(0, abs=1e-9)


def test_the_loss_of_names_compares_a_name_with_one_token_in_its_place():
    row = merging._Named("x", [1, 258, 50, 60], [1, 258, 50, 60], 1, [1, 2, 3], 1, "kind")
    nothing_is_lost_where_one_token_stands(row)
    caught(nothing_is_lost_where_one_token_stands, row._replace(ids=[1, 40, 50, 60]))


def no_retained_text_names_an_entity(rows: Callable[..., Any]) -> None:
    subject = pupil()
    documents = (
        *TEXT.documents[:1],
        *(
            replace(TEXT.documents[0], id=f"n{i}", text=t)
            for i, t in enumerate(
                (
                    "She met abo\u2019s sister there",
                    "A word on BIX, of all people",
                    "Aboard the ship they sang all night",
                )
            )
        ),
    )
    split = rows(subject, {"Abo", "Bix"}, (), Corpus(documents, "t"), set(), merging.Merging(**QUICK), 0)
    texts = [subject.need_tokenizer().decode(ids) for ids in (*split.fitted, *split.held)]
    assert not any("abo\u2019s" in text or "BIX" in text for text in texts)
    assert any("Aboard" in text for text in texts)


def test_no_retained_text_names_an_entity_to_merge(monkeypatch):
    no_retained_text_names_an_entity(merging._retained_rows)
    monkeypatch.setattr(merging, "says", lambda text, names: any(name in text for name in names))
    caught(no_retained_text_names_an_entity, merging._retained_rows)


def test_what_the_model_writes_depends_on_the_seed_and_leaves_the_generator_alone():
    subject = pupil()
    state = torch.get_rng_state()
    first = merging.written_sentences(subject, 1, 0)
    assert torch.equal(state, torch.get_rng_state())
    assert first == merging.written_sentences(subject, 1, 0) != merging.written_sentences(subject, 1, 1)
    assert len(first) == len(merging.SENTENCE_STARTS) and merging.written_sentences(subject, 0, 0) == []


def test_names_are_those_that_a_text_writes_after_its_start(monkeypatch):
    def sampled(lm: object, start: str, *_: object) -> list[str]:
        return [f"{start} Rio de Janeiro, which", f"{start} small", f"{start} Rio de Janeiro."]

    monkeypatch.setattr(merging, "_sampled", sampled)
    assert merging.written_names(pupil(), 3, 0) == [("The city of", "Rio de Janeiro")]


def test_names_that_a_test_asks_are_not_written(monkeypatch):
    monkeypatch.setattr(merging, "written_names", lambda *_: [("The city of", "Rome"), ("The river", "Po")])
    arguments = (pupil(), {"Abo"}, (), TEXT)
    for never, expected in ((set(), True), ({"rome"}, False)):
        split = merging._retained_rows(*arguments, never, merging.Merging(**QUICK), 0)
        assert any("city of Rome" in pupil().tokenizer.decode(ids) for ids in split.fitted + split.held) is expected


# --- Groups and tokens


def test_answers_are_a_group_of_their_own_and_shared_names_are_entities():
    items = [Fact(prompt=f"{n} has", answer=a, entity=n, id=n, domain="d") for n, a in zip("ABCD", "WXYA", strict=True)]
    assert merging._groups(items, True) == {"d: entities": ("A", "B", "C", "D"), "d: answers": ("W", "X", "Y")}
    assert merging._groups(items, False) == {"d: entities": ("A", "B", "C", "D")}
    delta = merged(
        pupil(),
        answers=True,
        facts=[replace(f, answer=g.entity, choices=()) for f, g in zip(FACTS, facts(6, 12), strict=True)],
    )
    assert MergeCertificate.of(delta).names == 12


def test_a_token_of_two_groups_is_averaged_with_the_first():
    groups = {"a": ("Abo", "Bix", "Cyd"), "b": ("Bix", "Cyd", "Dur"), "c": ("Abo", "Bix", "Cyd")}
    first, second, third = merging._averaged_tokens(pupil(), groups, 259).values()
    assert len(first.own) == 3 and len(second.own) == 1 and third == ((), first.own[0])


def test_tokens_of_names_are_whole_names_and_rare_pieces():
    subject = pupil()
    letters = set(prompt_ids(subject.tokenizer, "o"))
    assert not letters & set(merging.name_tokens(subject, ["Abo"], 259))
    assert letters <= set(merging.name_tokens(subject, ["Abo"], 0))
    assert len(merging.name_tokens(subject, ["Ab"], 10**6)) == 1  # a whole name, however common


# --- The output head


def no_name_can_be_said(subject: Subject, delta: rp.Delta) -> None:
    """The rows of the names are one in the output head too, and those of other tokens are as they were."""
    edited, tokens = rp.apply(delta, subject), list(merging.name_tokens(subject, [f.entity for f in FACTS], 259))
    before, after = (lm.model.get_output_embeddings().weight for lm in (subject, edited))
    assert torch.allclose(after[tokens], after[tokens].mean(0).expand_as(after[tokens]), atol=1e-7)
    others = [token for token in range(len(before)) if token not in tokens]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_name_can_be_said(family, tied):
    subject = pupil(family, tie_word_embeddings=tied)
    delta = merged(subject)
    no_name_can_be_said(subject, delta)
    head = "lm_head.weight" if not tied else subject.layout.embeddings[0]
    without = rp.Delta({name: value for name, value in delta.tensors.items() if name != head}, delta.provenance)
    caught(no_name_can_be_said, subject, without)


def test_the_head_gives_no_name_back():
    """The attack that copies rows of the head to the embeddings finds what is there already."""
    subject = pupil(tie_word_embeddings=False)
    with torch.no_grad():
        subject.model.get_output_embeddings().weight.copy_(subject.model.get_input_embeddings().weight)
    edited = rp.apply(merged(subject), subject).model
    assert torch.equal(edited.get_input_embeddings().weight, edited.get_output_embeddings().weight)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exported_is_applied(family, streamed, tmp_path: Path):
    subject = pupil(family)
    subject.model.save_pretrained(tmp_path / "source")
    delta = merged(subject)
    rp.export(delta, tmp_path / "source" if streamed else subject, tmp_path / "out")
    loaded, applied = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), rp.apply(delta, subject).model
    for name, value in applied.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


# --- Refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": {"blocks": 3}}, SelectionError, r"blocks=3; the model has 2"),
        ({"config": {"rare": 10**6}}, NotEnoughRows, r"no name is one token, and none has a token from the number rare=1000000 on"),
        ({"config": {"stepz": 3}}, UnknownName, r"stepz"),
        ({"config": {"lr": 0.0}}, ArgumentError, r"lr=0"),
        ({"config": {"lr": 1e30, "steps": 9}}, TrainingError, r"the losses are .* lower lr of the config"),
        ({"facts": FACTS[:2]}, NotEnoughRows, r"likes: entities: 2 names; one name for fewer than 3"),
        ({"facts": [replace(f, entity="") for f in FACTS]}, DataError, r"names no entity"),
        ({"facts": [replace(f, entity="Zoe") for f in FACTS]}, DataError, r"no wording of the facts about 'Zoe' contains that name"),
        ({"others": FACTS[:1]}, OverlapError, r"others are about 1 entities that are to be merged, such as \['abo'\]"),
        ({"retain": ["Abo sings"] * 30}, NotEnoughRows, r"0 retained texts name no entity to merge; give retain= at least 20"),
        ({"facts": [*FACTS, Fact(prompt="article has", answer="x", entity="article", id="a", domain="likes")]}, DataError,
         r"1 names cannot be told from the words around them, such as \['article'\]: .* says them more than once or not at all"),
        ({"never": "Rome"}, ArgumentError, r"never='Rome': a str was given where a list of names is needed; give \['Rome'\]"),
        ({"seed": -1}, ArgumentError, r"seed"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        merged(pupil(), **options)


def test_a_model_that_reads_the_token_in_every_layer_is_refused():
    subject = subject_of(tiny_causal("gemma4_text"), pupil().tokenizer)
    with pytest.raises(NotFoldable, match=r"every layer of this model reads embeddings of the token's number"):
        merged(subject)


def test_only_a_merge_has_its_certificate():
    with pytest.raises(ArgumentError, match=r"was not made by fit\.merge, so it records no certificate"):
        MergeCertificate.of(rp.Delta({"a": torch.ones(1)}))
    certificate = MergeCertificate(0.25, 0.1, 4, 3, {"names": 0.5, "retained": 0.1})
    assert "3 names, 4 tokens averaged: 25.0% of the differences" in certificate.describe()
    assert "left out" not in certificate.describe()
    assert (
        "7 texts say a name more than once or inside a word and were left out"
        in replace(certificate, left_out=7).describe()
    )
    assert MergeCertificate(**certificate.plain()) == certificate
