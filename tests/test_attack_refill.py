"""Attacks that train little: what a projection took from the weights, and vectors before the prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repedit.auditing.attack import ask
from repedit.auditing.attacks import refill as room
from repedit.auditing.attacks import search
from repedit.auditing.attacks.refill import null_space, null_spaces, refill
from repedit.auditing.attacks.search import Prefixed, gcg, prompted, soft_prompt
from repedit.auditing.attacks.tuning import Tuning, examples, mean_loss, shuffled, tune
from repedit.data import Splits
from repedit.errors import ArgumentError, FractionError
from repedit.hashing import fingerprint
from repedit.models.subject import subject_of
from tests.saved_models import byte_tokenizer
from tests.teachable_models import facts, guarded, pupil, splits, taught
from tests.tiny import tiny


def basis(width, rank, seed=0):
    return torch.linalg.qr(torch.randn(width, rank, generator=torch.Generator().manual_seed(seed)))[0]


def weight(out, width, seed=1):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def check_found(space, projected_out):
    """The columns are orthonormal and span the directions: every cosine between the two spaces is 1."""
    assert space.shape == projected_out.shape
    assert torch.linalg.svdvals(space.T @ projected_out).min() >= 0.999
    assert_close(space.T @ space, torch.eye(space.shape[1]), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize("width", [24, 57])
def test_what_was_projected_out_is_found(rank, width):
    u, w = basis(24, rank), weight(24, width)
    check_found(null_space(w - u @ (u.T @ w)), u)
    assert null_space(w).shape == (24, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 200])
def test_rounding_does_not_hide_what_was_projected_out(dtype, width):
    u, w = basis(96, 5), weight(96, width)
    check_found(null_space((w - u @ (u.T @ w)).to(dtype)), u)


def test_the_input_side_is_caught():
    """Projected at its inputs, a square weight has a null space of the same size, but of other outputs."""
    u, w = basis(24, 5), weight(24, 24)
    with pytest.raises(AssertionError):
        check_found(null_space(w - (w @ u) @ u.T), u)


def test_a_weight_with_few_inputs_has_only_what_it_lost():
    u, w = basis(24, 20), weight(24, 10)
    assert null_space(w).shape == (24, 0)
    lost = null_space(w - u @ (u.T @ w))
    assert lost.shape == (24, 20)
    check_found(lost, u)


def test_the_ratio_is_of_the_median():
    w = torch.diag(torch.tensor([4.0, 2.0, 2.0, 2.0, 0.003]))
    assert null_space(w).shape == (5, 0)
    assert_close(null_space(w, ratio=2e-3).abs(), torch.eye(5)[:, 4:], rtol=0.0, atol=1e-6)
    assert null_space(torch.zeros(4, 6)).shape == (4, 4)
    for bad in (0.0, 1.0):
        with pytest.raises(FractionError, match=f"ratio={bad}; give a number strictly between 0 and 1"):
            null_space(w, bad)


def projected(subject, rank=6):
    """The model with directions taken from all that it writes, its bias aside."""
    named = dict(subject.model.named_parameters())
    u = basis(subject.layout.width, rank)
    with torch.no_grad():
        for part in (part for pair in subject.layout.layers for branch in pair for part in branch.parts):
            part.out.change(named[part.out.tensor], lambda w: w - u @ (u.T @ w))
    return subject, u


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral"])
def test_every_write_weight_is_looked_at_from_its_output_side(family):
    subject, u = projected(tiny(family), rank=4)
    spaces = null_spaces(subject)
    assert len(spaces) == sum(len(branch.parts) for pair in subject.layout.layers for branch in pair)
    for _, space in spaces:
        check_found(space, u)
    assert null_spaces(tiny(family)) == []


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_only_what_was_lost_is_filled(family):
    """The change of every weight lies in the null space of its output; nothing else has a gradient or moves."""
    subject = tiny(family, vocab_size=260)
    subject, u = projected(subject_of(subject.model, byte_tokenizer()), rank=4)
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    writes = {part.out.tensor for pair in subject.layout.layers for branch in pair for part in branch.parts}
    filled = room._parametrized(subject, null_spaces(subject))
    start = subject.model(input_ids=torch.tensor([[5, 6, 7]])).logits
    draw, gradients = shuffled(examples(subject, facts(0, 4)), 4, 0), []
    for p in subject.model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: gradients.append(p))
    tune(subject, draw, Tuning(1e-2, steps=2), at=(), measure=lambda step: None, trained=filled)
    assert {id(p) for p in gradients} == {id(z) for z in filled}
    assert all(bool(z.abs().max() > 0) for z in filled)
    now = {
        name.replace("parametrizations.", "").removesuffix(".original"): p
        for name, p in subject.model.named_parameters()
    }
    for name, value in before.items():
        assert torch.equal(now[name], value)
        if name in writes:
            path, _, leaf = name.rpartition(".")
            change = getattr(subject.model.get_submodule(path), leaf).detach() - value
            change = change.T if subject.architecture.transposed else change
            assert change.abs().max() > 1e-3
            assert_close(u @ (u.T @ change), change, rtol=0.0, atol=1e-6)
    with torch.no_grad():
        for z in filled:
            z.zero_()
    assert torch.equal(subject.model(input_ids=torch.tensor([[5, 6, 7]])).logits, start)


def test_filling_the_other_side_is_caught(monkeypatch):
    def swapped(space, z):
        return lambda w: w + (space @ z.T).T if w.shape[0] == w.shape[1] else w + space @ z.T

    monkeypatch.setattr(room, "_adding", swapped)
    with pytest.raises(AssertionError):
        test_only_what_was_lost_is_filled("llama")


def test_the_attack_teaches_t_through_what_was_lost():
    subject, _ = projected(pupil("gpt2"), rank=24)
    before = fingerprint(subject.model)
    found = refill(rates=(5e-3, 2e-2), steps=30, measured=(0, 30))(subject, splits())
    assert found.settings == ("step=0", "lr=0.005 step=30", "lr=0.02 step=30")
    assert (found.status, found.reason) == ("ran", "")
    assert min(losses[-1] / losses[0] for losses in found.details["losses"].values()) < 0.5
    assert set(found.details["directions"].values()) == {24}
    assert len(found.details["directions"]) == 4
    # Both rates begin at the same weights.
    assert len({losses[0] for losses in found.details["losses"].values()}) == 1
    assert found.accuracy["step=0"] == ask(subject, facts(8, 12)).accuracy
    assert fingerprint(subject.model) == before


def test_what_was_lost_comes_back():
    """Rank 30 of 48 taken out forgets the facts; half of them, taught again, bring others back."""
    subject, _ = projected(taught(), rank=30)
    split = Splits(facts(0, 8), facts(8, 16))
    direct = ask(subject, split.test).accuracy
    found = refill(rates=(1e-3,), steps=30, measured=(0, 30))(subject, split)
    assert found.status == "ran"
    assert found.accuracy["lr=0.001 step=30"] > direct == found.accuracy["step=0"]


def test_an_unedited_model_has_nothing_to_fill():
    found = refill()(pupil(), splits())
    assert found.status == "skipped"
    assert found.reason == "no null space: no write weight has singular values that are almost zero"


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ArgumentError, r"rates=\(\), scale=1.0; give at least one rate, and both above 0", {"rates": ()}),
        (ArgumentError, "steps=0; give at least 1", {"steps": 0}),
        (FractionError, "ratio=2.0; give a number strictly between 0 and 1", {"ratio": 2.0}),
    ],
)
def test_a_refill_that_makes_no_sense_is_refused(error, message, given):
    with pytest.raises(error, match=message):
        refill(**given)


def test_a_soft_prompt_opens_a_guarded_model():
    """The model answers when a plus comes first; vectors trained on T find a way to say so, and V comes back."""
    subject, hidden = guarded(), tuple(fact for fact in facts(8, 16) if fact.answer != "ale")
    before = fingerprint(subject.model)
    split = Splits(facts(0, 8), hidden)
    assert ask(subject, split.test).accuracy == 0.0
    found = soft_prompt(vectors=2, rates=(0.1,), steps=25, measured=(10, 25))(subject, split)
    assert found.settings == ("lr=0.1 step=10", "lr=0.1 step=25")
    assert found.status == "ran"
    assert found.train_accuracy > ask(subject, split.train).accuracy + 0.5
    assert found.accuracy["lr=0.1 step=25"] > 0.5
    assert fingerprint(subject.model) == before
    assert "forward" not in subject.model.get_input_embeddings().__dict__


def test_vectors_that_do_not_help_are_no_evidence():
    found = soft_prompt(vectors=1, rates=(1e-7,), steps=2, measured=())(pupil(), splits())
    assert found.status == "failed to train"
    assert "the training loss fell by 0.0% at best" in found.reason


def test_every_rate_begins_at_the_same_vectors_and_every_seed_at_others():
    attack = soft_prompt(vectors=2, rates=(1.0, 1e-7), steps=2, measured=())
    first, other = (attack.at(seed)(pupil(), splits()).details["losses"] for seed in (0, 1))
    assert first["lr=1"][0] == first["lr=1e-07"][0] != other["lr=1"][0]


def test_vectors_equal_to_tokens_are_those_tokens():
    """Answers behind the embeddings of a text are those of the prompts with the text before them."""
    subject = guarded()
    plus = subject.tokenizer("+")["input_ids"]
    vectors = nn.Parameter(subject.model.get_input_embeddings()(torch.tensor(plus)).detach())
    expected = ask(subject, [replace(fact, prompt=f"+{fact.prompt}") for fact in facts()])
    free = [replace(fact, choices=()) for fact in facts()]
    written = ask(subject, [replace(fact, prompt=f"+{fact.prompt}") for fact in free])
    behind = prompted(guarded(), vectors)
    found = ask(behind, facts())
    assert expected.accuracy == found.accuracy == 1.0
    # Nothing taught it to stop after the answer.
    assert written.accuracy > ask(subject, free).accuracy
    assert (ask(behind, free).correct == written.correct).all()
    assert found.graded == pytest.approx(expected.graded, abs=1e-5)


def test_vectors_stand_behind_the_tokens_that_come_first():
    tokenizer = Prefixed(_Starting(), [300, 301])
    assert tokenizer("ab") == {"input_ids": [1, 300, 301, 97, 98]}
    assert tokenizer("") == {"input_ids": [1, 300, 301]}
    assert tokenizer("ab", add_special_tokens=False) == {"input_ids": [97, 98]}
    assert tokenizer.pad_token_id == 0


class _Starting:
    pad_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + list(text.encode())}

    def decode(self, token_ids):
        return bytes(token_ids).decode()


def hard(**changed):
    return gcg(**({"length": 2, "steps": 8, "candidates": 24, "measured": (4, 8)} | changed))


def check_opened(found, subject, split):
    assert found.settings == ("step=4", "step=8") and found.status == "ran"
    tokenizer = subject.need_tokenizer()
    # Not through facts: a prefix that was searched may hold characters that no prompt may, such as the null character.
    ids = tokenizer(found.details["prefix"], add_special_tokens=False)["input_ids"]
    behind = replace(subject, tokenizer=Prefixed(tokenizer, ids))
    assert found.accuracy["step=8"] == ask(behind, split.test).accuracy > 0.5


def test_a_searched_prefix_opens_a_guarded_model():
    subject, hidden = guarded(), tuple(fact for fact in facts(8, 16) if fact.answer != "ale")
    before = fingerprint(subject.model)
    split = Splits(facts(0, 8), hidden)
    assert ask(subject, split.test).accuracy == 0.0
    check_opened(hard()(subject, split), subject, split)
    assert fingerprint(subject.model) == before
    assert "forward" not in subject.model.get_input_embeddings().__dict__


def test_candidates_that_are_not_the_steepest_are_caught(monkeypatch):
    subject, hidden = guarded(), tuple(fact for fact in facts(8, 16) if fact.answer != "ale")
    split = Splits(facts(0, 8), hidden)
    true = search._slopes
    monkeypatch.setattr(search, "_slopes", lambda *given: -true(*given))
    with pytest.raises(AssertionError):
        check_opened(hard(top=8)(subject, split), subject, split)


def test_the_steepest_token_is_that_of_the_gradient():
    subject = guarded()
    vectors = nn.Parameter(torch.zeros(2, subject.model.get_input_embeddings().weight.shape[1]))
    held = prompted(subject, vectors)
    items = examples(held, facts(0, 4))
    slopes, table = search._slopes(held, vectors, items, [5, 6]), subject.model.get_input_embeddings().weight.detach()
    step = 1e-2 * (table[70] - table[5])
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            vectors.copy_(table[[5, 6]])
            vectors[0] += sign * step
            losses.append(mean_loss(held, items))
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(slopes[0, 70] - slopes[0, 5]), rel=2e-2)


def test_a_prefix_that_does_not_help_is_no_evidence_and_seeds_draw_others():
    found = [hard(steps=1, candidates=1, top=1).at(seed)(pupil(), splits()) for seed in (0, 0, 1)]
    assert found[0].status == "failed to train" and "the loss on T fell by" in found[0].reason
    assert found[0].details == found[1].details != found[2].details


def test_a_search_that_makes_no_sense_is_refused():
    with pytest.raises(ArgumentError, match=r"'candidates': 0.*give at least 1 of each"):
        gcg(candidates=0)


def test_a_soft_prompt_that_makes_no_sense_is_refused():
    with pytest.raises(ArgumentError, match=r"vectors=0, .* give at least one of each, and all above 0"):
        soft_prompt(vectors=0)
