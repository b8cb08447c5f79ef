"""What is measured does not depend on the mode a model is in, nor on what other threads do with it."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

import repedit as rp
from repedit import hooks
from repedit.activations.collection import peaks
from repedit.auditing.attacks.probing import lens, states
from repedit.auditing.floors import perplexity
from repedit.data import Fact
from repedit.errors import ModelBusy
from repedit.fit.gates import gates
from repedit.hooks import Hook, claimed, evaluating, installed
from repedit.metrics import membership
from repedit.metrics.answers import readings
from repedit.metrics.generation import generate, side_by_side
from repedit.plot.neurons import activations
from tests.edits import mask, projection
from tests.laws import mode_does_not_matter
from tests.saved_models import byte_tokenizer
from tests.tiny import logits, tiny

TEXT = rp.data.read(["the quick brown fox jumps over it", "a second text of other words"])
OTHER = rp.data.read(["once more with other words in it"])
FACTS = tuple(Fact(id=str(i), prompt=f"{i} is", answer="odd", choices=("odd", "even")) for i in range(3))


@pytest.fixture(scope="module")
def lm():
    """GPT-2, whose config has dropout of 0.1."""
    return replace(tiny("gpt2", vocab_size=260, n_positions=256), tokenizer=byte_tokenizer())


def _sums(collection):
    return [value.state() for value in collection.values()]


def _bars(lm):
    figure = activations(lm, "1.mlp.neurons", 3, TEXT, OTHER, bins=8)
    return [patch.get_data().values.tolist() for patch in figure.axes[0].patches]


MEASUREMENTS = {
    "collect": lambda lm: _sums(rp.collect(lm, TEXT)),
    "collect with gradients": lambda lm: _sums(rp.collect(lm, TEXT, gradients=True)),
    "moments": lambda lm: _sums(rp.collect(lm, TEXT, "1.mlp.out", statistic=rp.Moments)),
    "predictions": lambda lm: rp.predictions(lm, TEXT).loss.tolist(),
    "predictions of an edit": lambda lm: rp.predictions(lm, TEXT, edit=mask(lm, "1.mlp.neurons")).loss.tolist(),
    "peaks": lambda lm: peaks(lm, TEXT, mask(lm, "1.mlp.neurons")),
    "examples": lambda lm: rp.max_activating(lm, TEXT, "1.mlp.neurons").activations,
    "choices": lambda lm: rp.facts_accuracy(lm, FACTS).graded.tolist(),
    "greedy": lambda lm: rp.facts_accuracy(lm, FACTS, how="greedy").graded.tolist(),
    "generate": lambda lm: generate(lm, ["hello", "one"], max_new_tokens=6, progress=False),
    "compare": lambda lm: rp.compare(lm, lm, [TEXT], prompts=["hello"], tokens=4).base_text,
    "stream": lambda lm: list(side_by_side([lm], ["hello"], max_new_tokens=4)),
    "answers": lambda lm: readings(lm, FACTS),
    "membership": lambda lm: membership.scores(lm, ["some text", "another text"]),
    "perplexity": lambda lm: perplexity(lm, TEXT, tokens=50),
    "architecture": lambda lm: rp.check_architecture(lm.model),
    "states": lambda lm: states(lm, [[5, 6, 7]], [rp.Site.parse("1.resid.mid")]),
    "lens": lambda lm: lens(lm, torch.ones(2, 24)),
    "histogram": _bars,
    "gates": lambda lm: gates(lm, forget=TEXT, retain=OTHER, steps=20, length=8, lr=0.3, retain_weight=0.0, progress=False).hash,
}  # fmt: skip


@pytest.mark.parametrize("measure", MEASUREMENTS)
def test_the_mode_of_the_model_does_not_matter(lm, measure):
    mode_does_not_matter(lm, MEASUREMENTS[measure])


def test_modes_come_back_after_an_exception_and_nested(lm):
    parts = list(lm.model.modules())
    modes = [number % 3 == 0 for number, _ in enumerate(parts)]
    for part, mode in zip(parts, modes, strict=True):
        part.training = mode
    with pytest.raises(KeyError, match="a fault"), evaluating(lm.model), evaluating(lm.model):
        assert not any(part.training for part in parts)
        lm.model.train()
        raise KeyError("a fault")
    assert [part.training for part in parts] == modes
    lm.model.eval()


def test_an_edit_that_the_user_hooks_leaves_the_mode_alone(lm):
    lm.model.train()
    with mask(lm, "1.mlp.neurons").hooked(lm):
        assert lm.model.training and not torch.equal(logits(lm), logits(lm))
    lm.model.eval()


# Threads.


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(hooks, "WAIT", 0.05)


def in_thread(function, name="other"):
    """The result or the error of a call in another thread; a deadlock fails the test."""
    with ThreadPoolExecutor(1, thread_name_prefix=name) as pool:
        return pool.submit(function).result(timeout=60)


def test_measuring_waits_for_the_hooks_of_another_thread(lm):
    expected, over, begun = rp.predictions(lm, TEXT).loss.tolist(), threading.Event(), threading.Event()

    def hook():
        while not over.is_set():
            with projection(lm, "1.mlp.out").hooked(lm):
                begun.set()
                over.wait(0.01)

    thread = threading.Thread(target=hook)
    thread.start()
    begun.wait(60)
    found = [rp.predictions(lm, TEXT).loss.tolist() for _ in range(3)]
    over.set()
    thread.join(60)
    assert found == [expected] * 3 and not thread.is_alive()


def test_collections_of_several_threads_are_those_of_one(lm):
    expected = repr(_sums(rp.collect(lm, TEXT)))
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(lambda: repr(_sums(rp.collect(lm, TEXT, progress=False)))) for _ in range(4)]
        assert {item.result(timeout=120) for item in found} == {expected}


def test_a_thread_that_waits_in_vain_is_refused_and_both_are_named(lm, impatient):
    edit = projection(lm, "1.mlp.out")
    named = r"the GPT2LMHeadModel is in use by thread 'MainThread'; thread 'other_0' cannot use it at the same time"
    with edit.hooked(lm):
        for work in (lambda: rp.predictions(lm, TEXT), lambda: edit.hooked(lm).__enter__()):
            with pytest.raises(ModelBusy, match=named):
                in_thread(work)
        with mask(lm, "0.mlp.neurons").hooked(lm):  # contexts of one thread nest
            rp.predictions(lm, TEXT)
    assert in_thread(lambda: rp.predictions(lm, TEXT)).count.sum()


def test_a_pass_of_another_thread_through_hooks_is_refused(lm):
    expected = logits(lm)
    with projection(lm, "1.mlp.out").hooked(lm):
        before = logits(lm)
        with pytest.raises(
            ModelBusy, match=r"'MainThread' has hooks on the GPT2LMHeadModel that thread 'other_0' runs"
        ):
            in_thread(lambda: logits(lm))
        assert torch.equal(logits(lm), before)
    assert torch.equal(in_thread(lambda: logits(lm)), expected)


def test_two_threads_that_want_each_others_model_do_not_wait_for_ever(impatient):
    first, second, both = nn.Identity(), nn.Identity(), threading.Barrier(2)

    def take(one, other):
        with claimed(one):
            both.wait(60)
            try:
                with claimed(other):
                    return True
            except ModelBusy:
                return False

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(take, *pair) for pair in ((first, second), (second, first))]
        assert [item.result(timeout=60) for item in found] != [True, True]
    with claimed(first), claimed(second):
        pass


def test_a_thread_that_ended_in_its_context_is_named_until_the_context_is_left():
    model = nn.Identity()
    context = claimed(model)
    in_thread(context.__enter__, "gone")
    with pytest.raises(ModelBusy, match="thread 'gone_0', which has ended without leaving its context"), claimed(model):
        pass
    context.__exit__(None, None, None)
    with claimed(model):
        pass


def test_tasks_of_one_thread_are_told_apart(lm):
    async def hook(hooked):
        with projection(lm, "1.mlp.out").hooked(lm):
            hooked.set()
            await asyncio.sleep(0)

    async def both():
        hooked = asyncio.Event()
        task = asyncio.create_task(hook(hooked), name="hooking")
        await hooked.wait()
        with pytest.raises(ModelBusy, match="task 'hooking'; thread 'MainThread', task"):
            rp.predictions(lm, TEXT)
        await task
        return rp.predictions(lm, TEXT)

    assert asyncio.run(both()).count.sum()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_knows_what_threads_held_and_waits_for_nobody():
    held, free, over, begun = nn.Identity(), nn.Identity(), threading.Event(), threading.Event()

    def hold():
        with claimed(held):
            begun.set()
            over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait(60)
    child = os.fork()
    if not child:
        try:
            with claimed(free):
                pass
            with claimed(held):
                os._exit(1)
        except ModelBusy:
            os._exit(0)
        finally:
            os._exit(2)
    over.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_copy_of_a_hooked_model_is_nobodys():
    model = nn.Sequential(nn.Identity()).eval()
    with installed(model, [Hook(model[0], "output", lambda x: x + 1)]):
        twin = copy.deepcopy(model)
    assert torch.equal(in_thread(lambda: twin(torch.zeros(2))), torch.ones(2))
