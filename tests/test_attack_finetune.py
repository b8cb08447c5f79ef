"""Attacks that train: the masked loss, the loop, and what fine-tuning on T, on other facts and on other text finds."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repedit.auditing.attack import ask
from repedit.auditing.attacks import tuning
from repedit.auditing.attacks.finetune import benign, downstream, lettered, relearn, rtt, upstream
from repedit.auditing.attacks.tuning import (
    Example,
    Tuning,
    batch_of,
    examples,
    in_turn,
    items_loss,
    masked_loss,
    mean_loss,
    shuffled,
    tune,
)
from repedit.data import Batch, Row, Splits
from repedit.errors import ArgumentError, DataError, NotFinite, QuantizedModel, UnknownName
from repedit.hashing import fingerprint
from repedit.training.optimizers import Lion
from tests.teachable_models import blank, facts, guarded, pupil, splits
from tests.tolerances import close, within

ITEMS = [
    Example([5, 9, 33, 7, 12], [False, False, False, True, True]),
    Example([40, 41, 42, 43, 44, 45, 46, 47], [False, *[True] * 7]),
    Example([11, 3], [False, True]),
]


def by_hand(subject, items):
    """The loss of items fed alone, without padding."""
    total = 0.0
    for ids, learned in items:
        logs = subject.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        values = [-logs[i - 1, ids[i]] for i in range(1, len(ids)) if learned[i]]
        total = total + sum(values) / len(values)
    return total / len(items)


def check_padding_weighs_nothing(subject, batch):
    def gradient(loss):
        return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(subject.model.parameters())))

    loss, expected = masked_loss(subject, batch), by_hand(subject, ITEMS)
    close(loss, expected, "gradient, float32")
    found, wanted = gradient(loss), gradient(expected)
    within(float((found - wanted).norm() / wanted.norm()), "gradient, float32")


def widened(batch: Batch, extra: int, left: bool) -> Batch:
    """The batch with more columns of padding."""
    ids, mask, answer = (
        nn.functional.pad(x, (extra, 0) if left else (0, extra))
        for x in (batch.input_ids, batch.attention_mask, batch.answer)
    )
    return replace(batch, input_ids=ids, attention_mask=mask, answer=answer)


@pytest.mark.numeric
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_does_not_see_padding(family, left, extra):
    check_padding_weighs_nothing(blank(family), widened(batch_of(ITEMS, 2, left=left), extra, left))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_that_is_learned_is_caught(family):
    batch = batch_of(ITEMS, 2)
    everything = replace(batch, answer=batch.answer | ~batch.attention_mask)
    with pytest.raises(AssertionError):
        check_padding_weighs_nothing(blank(family), everything)


def test_positions_that_count_padding_are_caught(monkeypatch):
    subject, batch = blank("gpt2"), batch_of(ITEMS, 2, left=True)
    inner = subject.model.forward
    monkeypatch.setattr(subject.model, "forward", lambda position_ids=None, **rest: inner(**rest))
    with pytest.raises(AssertionError):
        check_padding_weighs_nothing(subject, batch)


ALIKE = [
    Example([5, 9, 33, 7, 12], [False, False, False, True, True]),
    Example([5, 9, 33, 8], [False, False, False, True]),
    Example([5, 9, 40, 7, 12, 3], [False, False, False, False, True, True]),
]


def check_loss_of_items(subject, items):
    """The law: loss and gradient are those of the items fed alone."""
    found, expected = items_loss(subject, items), by_hand(subject, items)
    close(found, expected, "gradient, float32")
    pair = [
        nn.utils.parameters_to_vector(torch.autograd.grad(x, list(subject.model.parameters())))
        for x in (found, expected)
    ]
    within(float((pair[0] - pair[1]).norm() / pair[1].norm()), "gradient, float32")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tree", [True, False], ids=["tree", "rows"])
def test_texts_that_begin_alike_are_learned_as_alone(family, tree, monkeypatch):
    asked = []
    plain = tuning.tree_log_probs
    monkeypatch.setattr(tuning, "tree_log_probs", lambda *a: asked.append(a) or plain(*a))
    if not tree:
        monkeypatch.setattr(tuning, "tree_capacity", lambda subject: 0)
    check_loss_of_items(blank(family), ALIKE)
    assert bool(asked) == tree


def test_a_shifted_mask_is_caught(monkeypatch):
    plain = tuning.tree_log_probs
    shifted = lambda s, texts, scored: plain(s, texts, [[False, *marks[2:], marks[1]] for marks in scored])  # noqa: E731
    monkeypatch.setattr(tuning, "tree_log_probs", shifted)
    with pytest.raises(AssertionError):
        check_loss_of_items(blank(), ALIKE)


def test_texts_that_begin_unlike_are_read_as_rows(monkeypatch):
    monkeypatch.setattr(tuning, "tree_log_probs", None)
    items_loss(blank(), [Example([i, *range(50, 58)], [False, *[True] * 8]) for i in range(4)])


def test_the_mean_over_batches_is_that_over_items():
    subject = blank()
    close(mean_loss(subject, ITEMS, batch_size=2), by_hand(subject, ITEMS), "gradient, float32")


def test_every_character_of_a_text_is_learned_to_its_last():
    subject, fact = blank(), facts()[0]
    whole = subject.tokenizer(fact.text)["input_ids"]
    (answer,), (sequence,) = examples(subject, [fact]), examples(subject, [fact], loss="sequence")
    (text,) = examples(subject, [fact.text])
    assert answer.ids == sequence.ids == text.ids == whole
    assert sequence.learned == text.learned == [False] + [True] * (len(whole) - 1)
    learned = bytes(subject.tokenizer.decode([i for i, on in zip(*answer, strict=True) if on]), "utf8")
    assert learned == f" {fact.answer}".encode()
    changed = Example([*answer.ids[:-1], 99], answer.learned)
    assert masked_loss(subject, batch_of([changed], 0)) != masked_loss(subject, batch_of([answer], 0))


def test_a_text_of_which_nothing_is_learned_is_refused():
    with pytest.raises(DataError, match=r"'x': no token is learned, a first one follows nothing; give a longer text"):
        examples(blank(), [Row("", "a", "x")])


def test_batches_depend_on_seed_and_step_alone():
    items = [Example([i, i], [False, True]) for i in range(5)]
    draw = shuffled(items, 2, seed=1)
    late = draw(9)
    seen = [item for step in range(10) for item in draw(step)]
    assert all(sorted(seen[i : i + 5]) == items for i in range(0, 20, 5))
    assert list(draw(9)) == list(late) == seen[18:]
    assert seen[:5] != seen[5:10]
    assert seen[:5] != [item for step in range(3) for item in shuffled(items, 2, seed=2)(step)][:5]
    assert len(shuffled(items, 8, seed=1)(0)) == 5


def check_like_lengths_together(drawn):
    """Every item once an epoch, batches of one length where there are enough, in an order that is not that of length."""
    items = [Example([i] * (2 + i % 3), [False] * (1 + i % 3) + [True]) for i in range(24)]
    draw = drawn(items, 4, 0)
    for epoch in range(3):
        batches = [draw(6 * epoch + step) for step in range(6)]
        assert sorted(item for batch in batches for item in batch) == sorted(items)
        lengths = [{len(item.ids) for item in batch} for batch in batches]
        assert all(len(found) == 1 for found in lengths)
        assert len({str(found) for found in lengths}) == 3 and lengths != sorted(lengths, key=min)
    odd = drawn(items[:10], 4, 0)
    seen = [item for step in range(10) for item in odd(step)]
    assert all(sorted(seen[i : i + 10]) == sorted(items[:10]) for i in range(0, 40, 10))


def test_texts_of_like_length_come_together():
    check_like_lengths_together(shuffled)


def test_an_order_by_chance_alone_is_caught():
    def drawn(items, size, seed):
        order = random.Random(seed).sample(items, len(items))
        return lambda step: [order[i % len(items)] for i in range(step * size, (step + 1) * size)]

    with pytest.raises(AssertionError):
        check_like_lengths_together(drawn)


def test_one_source_comes_after_the_other():
    draw = in_turn(lambda step: [("first", step)], lambda step: [("second", step)], 2)
    assert [draw(step)[0] for step in range(4)] == [("first", 0), ("first", 1), ("second", 0), ("second", 1)]


def tuned(subject, settings, at=(), measure=lambda step: None, **rest):
    return tune(subject, shuffled(ITEMS, 2, 0), settings, at=at, measure=measure, **rest)


def test_measuring_changes_nothing():
    asked = []
    first = tuned(blank(), Tuning(1e-3, steps=6))
    second = tuned(blank(), Tuning(1e-3, steps=6), at=(0, 3, 6), measure=asked.append)
    assert first == second
    assert asked == [0, 3, 6]
    assert first.tokens == sum(len(i.ids) for step in range(6) for i in shuffled(ITEMS, 2, 0)(step))


def test_full_training_moves_every_parameter_and_leaves_no_gradients():
    subject = blank("gpt2")
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    tuned(subject, Tuning(1e-3, steps=4))
    for name, p in subject.model.named_parameters():
        assert not torch.equal(p, before[name]), name
        assert p.grad is None
        assert not p.requires_grad


def linear(model):
    return [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_are_those_of_peft(family):
    """Logits and gradients agree with another implementation that holds the same numbers."""
    from peft import LoraConfig, inject_adapter_in_model

    ours, theirs = blank(family), blank(family)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)
    other = inject_adapter_in_model(config, theirs.model)
    pairs = [p for name, p in other.named_parameters() if "lora_" in name]
    with tuning._trainable(ours, Tuning(1e-3, how="lora", rank=4), 0, None) as own:
        assert [p.shape for p in own] == [p.shape for p in pairs]
        with torch.no_grad():
            for mine, their in zip(own, pairs, strict=True):
                mine.copy_(torch.randn_like(mine) * 0.1)
                their.copy_(mine)
        batch = batch_of(ITEMS, 0)
        losses = masked_loss(ours, batch), masked_loss(theirs, batch)
        close(*losses, "gradient, float32")
        for mine, their in zip(torch.autograd.grad(losses[0], own), torch.autograd.grad(losses[1], pairs), strict=True):
            assert_close(mine, their, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layer", [0, 1])
def test_adapters_are_in_the_layers_asked_for_and_gone_afterwards(family, layer):
    subject, seen = blank(family), []
    before, places = fingerprint(subject.model), {0: 0, 1: 0}

    def look(step):
        seen.append(subject.model(input_ids=torch.tensor([ITEMS[1].ids]), output_hidden_states=True).hidden_states)
        for at, path in enumerate(subject.layout.block_paths):
            modules = linear(subject.model.get_submodule(path))
            places[at] = sum("forward" in m.__dict__ for m in modules) / len(modules)

    tuned(subject, Tuning(1e-2, steps=3, how="lora", rank=2, layers=(layer,)), at=(0, 3), measure=look)
    assert places == {layer: 1.0, 1 - layer: 0.0}
    assert [torch.equal(a, b) for a, b in zip(*seen, strict=True)] == [i <= layer for i in range(3)]
    assert fingerprint(subject.model) == before
    assert not any("forward" in module.__dict__ for module in subject.model.modules())


def test_a_hooked_edit_acts_on_what_adapters_write():
    """An adapter around the module, as peft's are, would write past the hook."""
    subject, seen = blank(), []
    down = subject.model.get_submodule(subject.layout.layers[1][1].writer)
    down.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    subject.model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    tuned(subject, Tuning(1e-1, steps=3, how="lora", rank=2))
    assert torch.stack([x.abs().max() for x in seen]).max() == 0


def test_half_precision_is_widened_for_full_training_only():
    subject = blank()
    subject.model.to(torch.bfloat16)
    assert {tuning.on_copy(subject, full=full)()[0].model.dtype for full in (True,)} == {torch.float32}
    copy, _ = tuning.on_copy(subject, full=False)()
    assert copy.model.dtype == subject.model.dtype == torch.bfloat16
    assert tuned(copy, Tuning(1e-2, steps=10, how="lora")).losses[-1] < 5.4


def test_lion_takes_the_sign_of_its_momentum():
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    optimizer = Lion([p], lr=0.5, weight_decay=0.1)
    for gradient in ([2.0, -1.0, 0.0], [-0.1, -1.0, 3.0]):
        p.grad = torch.tensor(gradient)
        optimizer.step()
    # Second step: momentum (.02, -.01, 0) is outweighed in the first place, .9 * .02 - .1 * .1 > 0 keeps its sign.
    first = torch.tensor([1.0, -2.0, 0.0]) * 0.95 - torch.tensor([0.5, -0.5, 0.0])
    assert_close(p.detach(), first * 0.95 - torch.tensor([0.5, -0.5, 0.5]))


@pytest.mark.parametrize("optimizer", tuning.OPTIMIZERS)
def test_every_optimizer_learns(optimizer):
    rate = {"adamw": 1e-3, "lion": 1e-3, "sgd": 0.5}[optimizer]
    losses = tuned(blank(), Tuning(rate, steps=10, optimizer=optimizer)).losses
    assert losses[-1] < 0.9 * losses[0]


def test_the_rate_rises_and_then_stays_or_falls():
    plain, counted = Tuning(2.0, steps=20), Tuning(2.0, steps=20, warmup=4.0)
    assert [plain.rate_at(step) for step in (1, 2, 3, 20)] == [1.0, 2.0, 2.0, 2.0]
    assert [counted.rate_at(step) for step in (1, 4, 5)] == [0.5, 2.0, 2.0]
    cosine = replace(plain, schedule="cosine", warmup=0.0)
    assert [cosine.rate_at(step) for step in (10, 20)] == [pytest.approx(1.0), pytest.approx(0.0)]


@pytest.mark.parametrize(("warmup", "share"), [(0.0, 1.0), (10.0, 0.1)])
def test_a_step_is_the_rate_of_its_number_times_the_clip(warmup, share):
    subject = blank()
    before = nn.utils.parameters_to_vector(subject.model.parameters()).detach()
    tuned(subject, Tuning(0.1, steps=1, optimizer="sgd", clip=0.01, warmup=warmup))
    moved = (nn.utils.parameters_to_vector(subject.model.parameters()).detach() - before).norm()
    assert moved == pytest.approx(0.1 * 0.01 * share, rel=1e-2)


@pytest.mark.parametrize("at", ["answers", "loss"])
def test_training_ends_when_numbers_are_not_finite(at):
    def measure(step):
        if at == "answers" and step == 2:
            raise NotFinite("nan")

    found = tuned(blank(), Tuning(1e-3 if at == "answers" else 1e30, steps=9), at=(1, 2), measure=measure)
    assert found.diverged == 2
    assert len(found.losses) == 2
    with pytest.raises(NotFinite):
        tuned(blank(), Tuning(1e-3), at=(0,), measure=lambda step: (_ for _ in ()).throw(NotFinite("broken before")))


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (UnknownName, "loss='answers'; did you mean 'answer'", {"loss": "answers"}),
        (UnknownName, "how='qlora'; did you mean 'lora'", {"how": "qlora"}),
        (UnknownName, "optimizer='adam'; did you mean 'adamw'", {"optimizer": "adam"}),
        (UnknownName, "schedule='cos'; ", {"schedule": "cos"}),
        (ArgumentError, "steps=0; give at least 1", {"steps": 0}),
        (ArgumentError, "clip=0.0, .* must be above 0", {"clip": 0.0}),
        (ArgumentError, r"layers=\(1,\) with how='full'; only how='lora'", {"layers": (1,)}),
    ],
)
def test_a_tuning_that_makes_no_sense_is_refused(error, message, given):
    with pytest.raises(error, match=message):
        Tuning(1e-3, **given)


def test_adapters_in_a_layer_that_is_not_there_are_refused():
    with pytest.raises(ArgumentError, match=r"asked for in layers \[2\]; the model has layers 0 to 1"):
        tuned(blank(), Tuning(1e-3, how="lora", layers=(0, 2)))


# The attacks themselves.

QUICK = {"rates": (3e-3,), "measured": (0, 10, 30), "steps": 30}


@pytest.fixture
def never_longer(monkeypatch):
    """Trainings of so few steps that they teach nothing are not repeated with more."""
    monkeypatch.setattr(tuning, "_nearest", lambda trials, results: None)


def test_retraining_learns_t_and_asks_v_at_the_steps():
    subject = pupil()
    before = fingerprint(subject.model)
    found = rtt(**QUICK | {"rates": (1e-5, 3e-3)})(subject, splits())
    names = [f"lr={rate} step={step}" for rate in ("1e-05", "0.003") for step in (10, 30)]
    assert found.settings == ("step=0", *names)
    assert found.items == tuple(fact.id for fact in facts(8, 12))
    assert (found.status, found.reason) == ("ran", "")
    assert found.train_accuracy >= 0.9
    assert found.accuracy["step=0"] == ask(subject, facts(8, 12)).accuracy
    assert {name: len(losses) for name, losses in found.details["losses"].items()} == {"lr=1e-05": 30, "lr=0.003": 30}
    # The same start for both: the losses before the first update are equal.
    assert len({losses[0] for losses in found.details["losses"].values()}) == 1
    assert fingerprint(subject.model) == before


def test_a_start_that_is_not_restored_is_caught(never_longer, monkeypatch):
    monkeypatch.setattr("repedit.auditing.attack.Scratch.restore", lambda self: self.subject)
    found = rtt(rates=(3e-3, 1e-5), measured=(), steps=2)(pupil(), splits())
    assert len({losses[0] for losses in found.details["losses"].values()}) == 2


def test_the_same_seed_finds_the_same_and_measuring_plays_no_part():
    attack = rtt(rates=(3e-3,), measured=(0, 8), steps=8)
    first, again = (attack(pupil(), splits()) for _ in range(2))
    other = rtt(rates=(3e-3,), measured=(5,), steps=8)(pupil(), splits())
    assert (first.graded == again.graded).all()
    assert first.details == again.details
    assert (other.graded[-1] == first.graded[-1]).all()
    # Batches of 8 from 12 facts, so that the order matters.
    wide = Splits(facts(0, 12), facts(12, 14))
    one, two = (rtt(rates=(3e-3,), steps=2, measured=()).at(seed)(pupil(), wide) for seed in (0, 1))
    assert one.details["losses"] != two.details["losses"]


def test_an_attack_that_does_not_learn_is_no_evidence():
    found = rtt(**QUICK | {"rates": (1e-9,)})(pupil(), splits())
    assert found.status == "failed to train"
    assert found.train_accuracy < 0.9
    assert f"accuracy on T after training is {found.train_accuracy:.3f}, 0.9 is needed" in found.reason


def trains_on_until_t_is_learned(found) -> None:
    """Where the steps do not teach T, the nearest training goes on for four times as many, and V is asked after them."""
    assert (found.status, found.train_accuracy) == ("ran", 1.0)
    assert found.settings == ("lr=0.001 step=5", "lr=0.001 step=10", "lr=1e-07 step=5", "lr=1e-07 step=10",
                              "lr=0.001 step=20", "lr=0.001 step=40")  # fmt: skip
    assert [len(losses) for losses in found.details["losses"].values()] == [10, 10, 40]


def test_a_training_that_does_not_teach_t_gets_four_times_the_steps(monkeypatch):
    attack = rtt(rates=(1e-3, 1e-7), steps=10, measured=(5, 10))
    trains_on_until_t_is_learned(attack(pupil(), splits()))
    monkeypatch.setattr(tuning, "_nearest", lambda trials, results: trials[-1])
    with pytest.raises(AssertionError):
        trains_on_until_t_is_learned(attack(pupil(), splits()))


def test_a_training_that_teaches_t_is_not_repeated():
    found = rtt(**QUICK)(pupil(), splits())
    assert found.train_accuracy == 1.0 and len(found.details["losses"]) == 1


def test_a_rate_that_diverges_scores_what_was_before():
    found = rtt(**QUICK | {"rates": (1e30, 3e-3), "measured": (0, 1, 30)})(pupil(), splits())
    assert found.status == "ran"
    assert found.reason == "lr=1e+30 diverged at step 1 and scores step 0"
    rows = dict(zip(found.settings, found.graded.tolist(), strict=True))
    assert rows["lr=1e+30 step=1"] == rows["lr=1e+30 step=30"] == rows["step=0"]
    assert rows["lr=0.003 step=30"] != rows["step=0"]
    assert found.details["diverged"] == {"lr=1e+30": 1}


def test_if_every_rate_diverges_nothing_is_shown():
    found = rtt(**QUICK | {"rates": (1e30,)})(pupil(), splits())
    assert found.status == "failed to train"
    assert "every training diverged; give lower rates" in found.reason


def test_an_exception_leaves_the_model_as_it_was(monkeypatch):
    subject = pupil()
    before = fingerprint(subject.model)

    def fails(model, asked):
        raise RuntimeError("no room")

    monkeypatch.setattr(tuning, "ask", fails)
    with pytest.raises(RuntimeError, match="no room") as caught:
        rtt(**QUICK | {"measured": (5,)})(subject, splits())
    assert "in attack 'rtt'" in caught.value.__notes__[0]
    assert fingerprint(subject.model) == before
    assert not any("forward" in module.__dict__ for module in subject.model.modules())


def test_settings_say_what_is_tried_where_several_are(never_longer):
    found = rtt(
        rates=(3e-3,), steps=1, measured=(), loss=("answer", "sequence"), how=("full", "lora"), sizes=(3, 20, None)
    )(pupil(), splits())
    assert len(found.settings) == 12
    assert found.settings[0] == "lr=0.003 step=1 how=full loss=answer n=3"
    assert found.settings[-1] == "lr=0.003 step=1 how=lora loss=sequence n=all"
    assert "T has 8 facts: n=20 trains on all of them" in found.reason
    first = {name: losses[0] for name, losses in found.details["losses"].items()}
    # Before the first update all ways are one, the losses are two, and 20 facts are all of the 8.
    assert first["lr=0.003 how=full loss=answer n=3"] == first["lr=0.003 how=lora loss=answer n=3"]
    assert first["lr=0.003 how=full loss=answer n=20"] == pytest.approx(first["lr=0.003 how=full loss=answer n=all"])
    assert len({round(value, 3) for value in first.values()}) == 4


def test_a_few_facts_do_not_pass_for_all(never_longer):
    """Three facts are soon learned; the check asks those of the widest setting."""
    found = rtt(rates=(3e-3,), steps=15, measured=(), sizes=(3,))(pupil(), splits())
    both = rtt(rates=(3e-3,), steps=15, measured=(), sizes=(3, None))(pupil(), splits())
    assert found.status == "ran"
    assert found.train_accuracy == 1.0
    assert both.train_accuracy in {k / 8 for k in range(9)}
    assert both.train_accuracy < 1.0


def test_adapters_learn_t():
    found = rtt(how="lora", rates=(1e-2,), steps=30, measured=(30,))(pupil(), splits())
    assert (found.status, found.train_accuracy) == ("ran", 1.0)


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (UnknownName, "preset='deeb'; did you mean 'deeb-roger'", {"preset": "deeb"}),
        (UnknownName, "how='half'; valid names: full, lora", {"how": "half"}),
        (UnknownName, "loss='token'", {"loss": ("answer", "token")}),
        (ArgumentError, r"sizes=\(0,\); give one of each or more", {"sizes": (0,)}),
        (ArgumentError, r"rates=\(\), scale=1.0; give at least one rate", {"rates": ()}),
        (ArgumentError, r"scale=0.0; give at least one rate, and both above 0", {"scale": 0.0}),
        (ArgumentError, "scale=-1.0; give a number above 0", {"preset": "deeb-roger", "scale": -1.0}),
    ],
)
def test_a_retraining_that_makes_no_sense_is_refused(error, message, given):
    with pytest.raises(error, match=message):
        rtt(**given)


def test_quantised_weights_are_refused():
    subject = blank()
    subject.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(QuantizedModel, match=r"attack 'rtt': the weights are quantised \(gptq\) and cannot be trained"):
        rtt()(subject, splits())


def test_the_published_setting():
    found = rtt(preset="deeb-roger", scale=1000.0)(pupil(), Splits(facts(0, 8), facts(8, 9)))
    assert found.settings[:7] == ("step=0", *(f"lr=0.0001 epoch={epoch}" for epoch in range(1, 7)))
    assert len(found.settings) == 1 + 6 * 6
    # 8 facts in batches of 4: two steps an epoch.
    assert {len(losses) for losses in found.details["losses"].values()} == {12}
    assert found.items == ("Ira",)


def test_a_lettered_question():
    fact = lettered(facts()[0])
    assert fact.prompt == "Abo likes\nA. tea\nB. rye\nC. figs\nD. ale\nAnswer:"
    assert (fact.answer, fact.choices, fact.id) == ("A", ("A", "B", "C", "D"), "Abo")
    with pytest.raises(ArgumentError, match="fact 'Abo' has 0 choices; a lettered question needs 2 to 26"):
        lettered(replace(facts()[0], choices=()))


def test_relearning_mixes_what_was_kept_or_puts_it_first(never_longer, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        tuning, "tune", lambda s, d, given, **rest: drawn.append((d, given)) or tune(s, d, given, **rest)
    )
    found = relearn(rates=(1e-2,), measured=(2, 10))(pupil(), splits(retain=facts(12, 16)))
    orders = [" order=mixed", " order=retain-first"]
    assert found.settings == tuple(f"lr=0.01 step={step}{order}" for order in orders for step in (2, 10))
    subject = blank()
    kept, known = (set(map(str, examples(subject, part))) for part in (facts(12, 16), facts(0, 8)))
    mixed, turns = ([{str(item) for item in draw(step)} for step in range(10)] for draw, _ in drawn)
    assert all(step <= kept for step in turns[:4]) and all(step <= known for step in turns[4:])
    assert any(step & kept and step & known for step in mixed)
    used = drawn[0][1]
    assert (used.how, used.rank, used.batch_size, used.weight_decay) == ("lora", 16, 8, 0.01)


def test_relearning_without_retain_facts_is_on_t_alone():
    found = relearn(rates=(1e-2,), measured=(5, 60))(pupil(), splits())
    assert (found.settings, found.status) == (("lr=0.01 step=5", "lr=0.01 step=60"), "ran")
    assert found.reason == "no retain facts: T alone"


def test_what_is_unrelated_needs_no_answers():
    text = ["The grey heron stands in the shallow water.", "A kettle whistles when the water boils."]
    attack = benign(rates=(3e-3,), steps=8, measured=(4, 8), few=1)
    found = attack(pupil(), Splits((), facts(8, 12), facts(12, 16), text))
    places = ("on=retain", "on=unrelated", "on=unrelated n=1")
    assert found.settings == tuple(f"lr=0.003 step={step} {place}" for place in places for step in (4, 8))
    assert (found.status, found.train_accuracy, attack.record.uses_train) == ("ran", None, False)
    alone = attack(pupil(), Splits((), facts(8, 12), (), text))
    assert alone.settings == found.settings[2:]
    assert alone.reason == "no retain texts were given"


def test_training_on_nothing_else_is_skipped_or_fails():
    none = benign()(pupil(), splits())
    assert (none.status, none.reason) == ("skipped", "needs retain facts or unrelated text; neither was given")
    weak = benign(rates=(1e-9,), steps=2, measured=(2,))(pupil(), splits(unrelated=["The heron stands in water."]))
    assert weak.status == "failed to train"
    assert "the training loss fell by 0.0% at best, 10% is needed" in weak.reason


def test_what_was_kept_can_bring_facts_back():
    """A model that says "ale" to every open question; the retain facts are such questions, and V follows untaught."""
    hidden = tuple(fact for fact in facts(8, 16) if fact.answer != "ale")
    subject = guarded()
    assert ask(subject, hidden).accuracy == 0.0
    found = benign(rates=(3e-4,), steps=20, measured=(20,))(subject, Splits((), hidden, facts(0, 8)))
    assert found.accuracy["lr=0.0003 step=20 on=retain"] >= 0.8


@pytest.mark.parametrize(
    ("attack", "layers", "note"),
    [
        (upstream(1, rates=(1e-2,), steps=1), (0,), ""),
        (downstream(0, rates=(1e-2,), steps=1), (1,), ""),
        (upstream(rates=(1e-2,), steps=1), (0,), "the edited layers are not known: layers 0 to 0 are trained"),
        (downstream(rates=(1e-2,), steps=1), (1,), "the edited layers are not known: layers 1 to 1 are trained"),
        (upstream(2, rates=(1e-2,), steps=1), (0, 1), ""),
    ],
)
def test_only_layers_on_one_side_are_trained(never_longer, monkeypatch, attack, layers, note):
    used = []
    monkeypatch.setattr(tuning, "tune", lambda s, d, given, **rest: used.append(given) or tune(s, d, given, **rest))
    found = attack(pupil(), splits())
    assert [(given.how, given.layers) for given in used] == [("lora", layers)]
    assert found.settings == ("step=0", "lr=0.01 step=1")
    assert found.reason.endswith(note) and ("not known" in found.reason) == bool(note)


@pytest.mark.parametrize("attack", [upstream(0), downstream(1)])
def test_without_layers_on_that_side_it_is_skipped(attack):
    found = attack(pupil(), splits())
    assert (found.status, found.settings) == ("skipped", ())
    assert found.reason == f"of 2 layers none is {attack.name} of the edited ones"


def test_one_side_alone_learns_t():
    found = downstream(0, rates=(2e-2,), measured=(40,))(pupil(), splits())
    assert found.status == "ran"
    assert math.isfinite(found.graded.sum())
