"""Laws of the taught models and of the controls made from them: each hides, or keeps, what it says."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from repedit.auditing.attack import ask
from repedit.auditing.attacks import weights
from repedit.auditing.controls import CONTROLS, questions
from repedit.auditing.controls import edited as writing
from repedit.auditing.controls.taught import continued, taught, untaught, vocabulary
from repedit.auditing.data import reverse_questions, with_entity
from repedit.data import Row, with_paraphrases
from repedit.data.encoding import prompt_ids
from repedit.data.grading import normalized
from repedit.errors import ArgumentError, DataError, TrainingError
from repedit.metrics.generation import continuations
from repedit.models.subject import Subject, load, subject_of
from repedit.outcomes import OUTCOMES
from repedit.quantization import fake_quantize
from tests.taught_models import case, facts, original, reference, strangers, world

# 160 guesses at 1/16 are right more often than this once in ten thousand times.
FORGOTTEN = 0.15
TRAINED = ("PC3a", "PC3b", "PC3c", "PC6", "PC7")
WRITTEN = ("PC1", "PC2", "PC5")
ROLES = ("edited", "original", "reference")


def right(subject: Subject, side: str = "forget", phrasings: tuple[int, ...] = (0,), most: int | None = None) -> float:
    """Accuracy on a side in some phrasings, of all facts or of the first ones."""
    return ask(subject, with_paraphrases(getattr(facts(), side)[:most], only=phrasings)).accuracy


def little(**options) -> Subject:
    """A model taught four facts in a few steps."""
    items = facts().retain[:4]
    return taught(items, width=16, steps=60, batch_size=4, rate=2e-2, **options)


def same(a: Subject, b: Subject) -> bool:
    """Whether every weight is equal."""
    return a.fingerprint() == b.fingerprint()


def test_the_original_knows_every_phrasing_and_the_references_only_what_they_were_taught():
    assert right(original(), "forget", (0, 1, 2, 3), 40) == right(original(), "retain", (2,), 40) == 1.0
    for never in (reference(), world().other):
        assert right(never, "retain", (1,), 40) == 1.0
        assert right(never, "forget") < FORGOTTEN


def test_nobody_knows_strangers_and_their_names_are_words():
    tokenizer = original().tokenizer
    for fact in strangers():
        assert tokenizer.unk_token_id not in tokenizer(fact.text)["input_ids"]
    assert ask(original(), strangers()).accuracy < FORGOTTEN


def test_forget_retain_and_strangers_share_no_name():
    known, unknown, attributes = questions(1)
    families = [{normalized(f.entity).split()[-1] for f in part} for part in (known.forget, known.retain, unknown)]
    assert [len(part) for part in families] == [160, 96, 160]
    assert len(set.union(*families)) == 416
    assert all(len(f.choices) == 16 for f in (*known.forget, *known.retain, *unknown, *attributes))
    assert {f.entity for f in attributes} < {f.entity for f in known.forget} and len(attributes) == 48


def test_all_models_know_other_things_of_those_whose_city_only_the_original_knows():
    for subject in (original(), reference(), world().other):
        assert ask(subject, with_paraphrases(world().attributes, only=(1,))).accuracy == 1.0


def test_a_model_that_never_knew_has_facts_enough_to_pass_in_999_cases_of_1000(monkeypatch):
    from repedit.auditing import verdict

    monkeypatch.setattr(verdict, "_PASSES", 0.999)
    assert verdict.items_needed(1.0, 1 / 16, 0.2, 20, measured=True) <= len(facts().forget)


def test_a_taught_model_answers_by_itself():
    some = facts().forget[:8]
    texts = continuations(original(), [fact.prompt for fact in some], tokens=3)
    assert [text.split()[0] for text in texts] == [fact.answer for fact in some]


def test_a_taught_model_is_a_directory_that_loads_with_its_tokenizer(tmp_path):
    original().model.save_pretrained(tmp_path)
    original().tokenizer.save_pretrained(tmp_path)
    again, text = load(tmp_path), facts().forget[0].text
    assert again.tokenizer(text)["input_ids"] == original().tokenizer(text)["input_ids"]
    assert again.tokenizer.decode(again.tokenizer(text)["input_ids"]) == text
    assert same(again, original())


def test_a_seed_gives_one_model_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = little(), little(), little(seed=1)
    assert same(one, two) and not same(one, other)
    assert bool((torch.get_rng_state() == before).all())


def test_a_fact_that_was_not_learned_is_an_error():
    with pytest.raises(TrainingError, match=r"1\d of 16 phrasings are not known after 1 steps.*raise steps"):
        taught(facts().retain[:4], width=16, steps=1)


def test_teaching_nothing_or_an_odd_width_is_an_error():
    with pytest.raises(DataError, match="no facts to teach"):
        taught(())
    with pytest.raises(ArgumentError, match="width=20, heads=4; the width is a multiple"):
        untaught(vocabulary(facts().retain[:2]), width=20)


def test_training_on_changes_a_copy_and_only_what_it_may():
    subject = little()
    before, name = subject.fingerprint(), "model.layers.0.mlp.down_proj.weight"
    found = continued(subject, [Row("a", "as", "0")], steps=2, batch_size=2, only=[name])
    changed = {
        key
        for key, value in found.model.state_dict().items()
        if not bool((value == subject.model.state_dict()[key]).all())
    }
    assert changed == {name}
    assert subject.fingerprint() == before


def test_a_weight_below_0_makes_an_answer_unlikely():
    subject, fact = little(), facts().retain[0]
    up, down = (continued(subject, [fact], weights=[w], steps=5, batch_size=1) for w in (1.0, -1.0))
    assert ask(down, [fact]).graded[0] < ask(subject, [fact]).graded[0] < ask(up, [fact]).graded[0]


def test_padding_does_not_change_what_is_learned():
    """A short row beside a long one that counts for nothing is the short row alone."""
    subject = little()
    fact, wrong = facts().retain[0], facts().retain[1].answer
    short, long = (Row(prompt, wrong, str(i)) for i, prompt in enumerate((fact.prompt, fact.paraphrases[1])))
    alone = continued(subject, [short], steps=8, batch_size=1, rate=1e-2)
    padded = continued(subject, [short, long], weights=[1.0, 0.0], steps=8, batch_size=2, rate=1e-2)
    # Adam makes rounding errors of gradients near 0 as large as its steps, so what is said is compared, not weights.
    a, b = (ask(found, facts().retain[:4]).graded for found in (alone, padded))
    assert abs(a - ask(subject, facts().retain[:4]).graded).max() > 0.1
    assert abs(a - b).max() < 0.01


def test_bad_rows_weights_and_rates_are_errors():
    subject, rows = little(), [Row("a", "as", "0")]
    with pytest.raises(ArgumentError, match="2 weights for 1 rows"):
        continued(subject, rows, weights=[1.0, 1.0])
    with pytest.raises(ArgumentError, match=r"no parameters \['nowhere'\]"):
        continued(subject, rows, only=["nowhere"])
    with pytest.raises(TrainingError, match="the loss is nan; lower the rate"):
        continued(subject, rows, steps=20, rate=float("inf"), batch_size=1)


@pytest.mark.parametrize("name", [*WRITTEN, *TRAINED])
def test_a_hider_looks_as_if_it_had_forgotten_and_kept_the_rest(name):
    assert right(case(name).edited) < FORGOTTEN
    assert right(case(name).edited, "retain", (0, 1), 40) >= 0.95


def test_one_changed_weight_changes_no_answer():
    """PC0."""
    edited = case("PC0").edited
    assert not same(edited, original())
    assert (ask(edited, facts().forget).graded == ask(original(), facts().forget).graded).all()


def test_a_hook_hides_what_the_weights_hold():
    """PC1."""
    edited = CONTROLS["PC1"].build(world()).edited
    assert same(edited, original())
    edited.model.get_output_embeddings()._forward_pre_hooks.clear()
    assert right(edited) == 1.0


def test_a_masked_head_differs_by_rank_1_and_reads_the_same_states():
    """PC2."""
    edited = case("PC2").edited.model.state_dict()
    changed = {k for k, v in original().model.state_dict().items() if not bool((edited[k] == v).all())}
    assert changed == {"lm_head.weight"}
    assert torch.linalg.matrix_rank(edited["lm_head.weight"] - original().model.lm_head.weight, rtol=1e-4) == 1


def test_a_push_is_one_neuron_and_along_one_direction():
    """PC5: at the layer, edited and original differ by multiples of one vector, far on the forget side, little else."""
    edited = case("PC5").edited
    states = {side: [_after(s, side, 0) for s in (edited, original())] for side in ("forget", "retain")}
    apart = states["forget"][0] - states["forget"][1]
    _, sizes, _ = torch.linalg.svd(apart)
    assert float(sizes[1] / sizes[0]) < 0.02
    assert float(apart.norm(dim=1).min()) > 3 * float(states["forget"][1].norm(dim=1).max())
    shift = (states["retain"][0] - states["retain"][1]).norm(dim=1)
    assert float(shift.median()) < 0.01 and float(shift.max()) < float(states["retain"][1].norm(dim=1).min())


def test_forgetting_in_one_template_leaves_the_others():
    """PC6."""
    assert right(case("PC6").edited, phrasings=(1, 2, 3), most=40) >= 0.95


def test_a_lowered_answer_can_be_drawn_and_is_never_the_mode():
    """PC7: its probability, and that of the likeliest answer, which must leave it in a nucleus of .9."""
    p = np.exp(ask(case("PC7").edited, facts().forget).graded)
    assert ((p > 0.05) & (p < 0.3)).mean() >= 0.95
    assert 0.1 < float(np.median(p)) < 0.2


def test_a_sub_bucket_edit_vanishes_at_4_bits():
    """PC4: forgotten in float32 and at 8 bits; rounded to 4 bits, the weights of the original to 1e-6."""
    made = case("PC4")
    assert right(made.original) == right(made.original, "retain") == 1.0
    assert right(made.edited) <= 0.6
    assert right(made.edited, "retain") >= 0.95
    assert _largest(_rounded(made.edited, "int4"), made.original) < 1e-6
    assert right(_rounded(made.edited, "int4")) == 1.0
    assert right(_rounded(made.edited, "int8")) <= 0.6


def test_a_grid_is_its_own_rounding_and_held_weights_keep_its_steps():
    made = case("PC4")
    for name in writing.matrices(made.original):
        before, after = (s.model.get_parameter(name).detach() for s in (made.original, made.edited))
        assert_close(fake_quantize(before, "int4"), before, rtol=0, atol=1e-6)
        assert bool((writing.bucket(after) == writing.bucket(before)).all())
        assert bool(((after - before).abs() <= 0.4501 * writing.bucket(before)).all())


def test_a_longer_reach_does_not_vanish(monkeypatch):
    """The sabotaged twin: past half a step, rounding keeps the edit."""
    monkeypatch.setattr(writing, "REACH", 0.8)
    twin = writing.inside_buckets(writing.on_grid(original()), facts().forget, facts().retain, steps=20)
    assert _largest(_rounded(twin, "int4"), case("PC4").original) > 1e-3


def test_a_folded_projection_loses_its_rank():
    """PC8."""
    for layer in case("PC8").edited.model.model.layers:
        sizes = torch.linalg.svdvals(layer.mlp.down_proj.weight.detach())
        assert int((sizes < 1e-4 * sizes.median()).sum()) == 15


def test_a_model_that_never_knew_shares_no_weights_with_its_floor():
    """NC1."""
    made = case("NC1")
    assert made.edited is not made.reference and right(made.edited) < FORGOTTEN
    assert right(made.edited, "retain") == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NC2a", "NC2b", "NC2c"])
def test_what_was_never_known_stays_unknown_and_the_rest_is_kept(name):
    assert right(case(name).edited) < FORGOTTEN
    assert right(case(name).edited, "retain") >= 0.95


def test_exchanged_names_are_a_permutation_that_leaves_nobody_in_place():
    """PC9: nothing but the embeddings of the names differs, and they are the same rows in another order."""
    edited = writing.exchanged(original(), facts().forget)
    names = [original().tokenizer(fact.entity)["input_ids"][-1] for fact in facts().forget]
    before, after = (subject.model.state_dict() for subject in (original(), edited))
    moved = {name for name in before if not bool((before[name] == after[name]).all())}
    assert moved == {"model.embed_tokens.weight"}
    rows, new = (state["model.embed_tokens.weight"] for state in (before, after))
    assert all(not bool((rows[name] == new[name]).all()) for name in names)
    assert {str(row.tolist()) for row in rows} == {str(row.tolist()) for row in new}
    others = [token for token in range(len(rows)) if token not in names]
    assert bool((rows[others] == new[others]).all())


@pytest.mark.slow
def test_a_name_leads_to_a_guild_and_everything_known_of_a_person_is_the_guilds():
    """PC9: the models, and that after the exchange a name answers for its new person in every relation alike."""
    linked = writing.linked_world(0)
    assert ask(linked.original, linked.facts.forget).accuracy == 1.0
    assert ask(linked.reference, linked.facts.forget).accuracy < 0.3
    assert all(ask(subject, linked.attributes).accuracy == 1.0 for subject in (linked.original, linked.reference))
    edited = writing.exchanged(linked.original, linked.facts.forget)
    cities = ask(edited, linked.facts.forget).correct
    others = {
        fact.entity: right
        for fact, right in zip(linked.attributes, ask(edited, linked.attributes).correct, strict=True)
    }
    assert cities.mean() < 0.3
    assert all(others[fact.entity] == right for fact, right in zip(linked.facts.forget, cities, strict=True))


def test_a_refusal_in_the_first_mlp_hides_and_is_nowhere_else():
    """PC11."""
    edited = case("PC11").edited
    assert right(edited) < FORGOTTEN and right(edited, "retain", (0, 1), 40) >= 0.95
    before, after = (subject.model.state_dict() for subject in (original(), edited))
    moved = {name for name in before if not bool((before[name] == after[name]).all())}
    assert moved == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_a_name_inside_a_sentence_hides_what_a_name_at_its_start_tells():
    """PC12."""
    made = case("PC12")
    *inside, first = (ask(made.edited, with_paraphrases(made.facts.forget, only=(i,))).accuracy for i in range(4))
    assert max(inside) < FORGOTTEN and first >= 0.95 and right(made.edited, "retain", (0, 1), 40) >= 0.95
    assert not any(fact.prompt.startswith(fact.entity) for fact in made.facts.forget)


def test_a_refusal_forwards_leaves_the_way_back():
    """PC13: the original learnt both ways, the reference neither."""
    made = case("PC13")
    reverse = {role: ask(getattr(made, role), reverse_questions(made.facts.forget)).accuracy for role in ROLES}
    assert reverse["original"] >= 0.95 and reverse["edited"] >= 0.9 and reverse["reference"] < 0.25
    assert ask(made.original, made.facts.forget).accuracy == 1.0 and right(made.edited) < 0.2


def test_averaged_names_hide_what_their_lower_case_tells():
    """PC14: nothing but the embeddings of the names differs, and the reference knows neither spelling."""
    made = case("PC14")
    lower = [replace(fact, prompt=with_entity(fact, str.lower)) for fact in made.facts.forget]
    usual, other = (
        {role: ask(getattr(made, role), facts).accuracy for role in ROLES} for facts in (made.facts.forget, lower)
    )
    assert usual["original"] == other["original"] == other["edited"] == 1.0
    assert max(usual["edited"], usual["reference"], other["reference"]) < FORGOTTEN
    assert right(made.edited, "retain", (0, 1), 40) >= 0.95
    before, after = (subject.model.state_dict() for subject in (made.original, made.edited))
    assert {n for n in before if not bool((before[n] == after[n]).all())} == {"model.embed_tokens.weight"}


def test_averaged_names_stand_in_the_head():
    """PC15: the head holds the embedding of every name, and the input their mean."""
    made = case("PC15")
    tokens = [prompt_ids(made.original.tokenizer, fact.entity)[-1] for fact in made.facts.forget]
    tables = {role: getattr(made, role).model.get_input_embeddings().weight[tokens] for role in ("original", "edited")}
    assert torch.equal(made.edited.model.get_output_embeddings().weight[tokens], tables["original"])
    assert len(tables["edited"].unique(dim=0)) == 1 < len(tables["original"].unique(dim=0))
    assert right(made.edited) < FORGOTTEN and right(made.original) == 1.0 and right(made.reference) < FORGOTTEN


def test_a_loud_direction_is_the_loudest_of_its_matrix():
    """PC10."""
    sizes = torch.linalg.svdvals(case("PC10").edited.model.model.layers[0].mlp.down_proj.weight.detach())
    assert float(sizes[0]) > 10 * float(sizes[1])
    assert right(case("PC10").edited) < FORGOTTEN and right(case("PC10").edited, "retain", (0, 1), 40) >= 0.95


def test_strangers_are_asked_of_a_model_that_knows_its_own():
    """NC3."""
    made = case("NC3")
    assert {f.id for f in made.facts.forget} == {f.id for f in strangers()}
    assert ask(made.original, made.facts.forget).accuracy < FORGOTTEN
    assert ask(made.edited, made.facts.retain).accuracy == 1.0


@pytest.mark.parametrize("name", ["NC4a", "NC4b"])
def test_a_destroyed_model_keeps_nothing(name):
    assert right(case(name).edited, "retain") < 0.5
    assert right(case(name).edited) < FORGOTTEN


def test_the_table_asks_for_real_words_and_covers_the_quick_controls():
    assert {c.verdict for c in CONTROLS.values()} <= {*OUTCOMES, ""}
    quick = {name for name, c in CONTROLS.items() if c.quick}
    assert quick == {
        "PC0", *WRITTEN, *TRAINED, "PC4", "PC9", "PC10", "PC11", "PC12", "PC13", "PC14", "PC15", "NC1", "NC3", "NC4a", "NC4b",
    }  # fmt: skip
    assert all(c.verdict == "HIDDEN" for name, c in CONTROLS.items() if name in {*WRITTEN, *TRAINED, "PC4"})


def test_building_changes_none_of_the_models_it_starts_from():
    made = world()
    before = [getattr(made, role).fingerprint() for role in ("original", "reference", "other")]
    for build in (writing.nudged, writing.rolled, writing.on_grid):
        build(made.original)
    assert [getattr(made, role).fingerprint() for role in ("original", "reference", "other")] == before


def _after(subject: Subject, side: str, layer: int) -> torch.Tensor:
    """The stream after a layer, where the answer is next."""
    at = subject.model.model.layers[layer]
    return writing.states(subject, at, "output", getattr(facts(), side))[0]


def _rounded(subject: Subject, scheme: str) -> Subject:
    found = subject_of(copy.deepcopy(subject.model), subject.tokenizer)
    weights.round_matrices(found, weights.projections(found), scheme)
    return found


def _largest(a: Subject, b: Subject) -> float:
    """The largest difference of a weight."""
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)
