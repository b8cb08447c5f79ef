"""A Trainer's log tells how many facts a model knows before, while and after it is fine-tuned."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

import repedit as rp
from repedit.data import Facts
from repedit.errors import ArgumentError, DataError
from repedit.metrics import facts as module
from tests.teachable_models import facts as taught_facts
from tests.teachable_models import taught

STEPS = 5


class Rows(torch.utils.data.Dataset):
    """One row of token ids, which is also its own label."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.arange(4, 10)
        return {"input_ids": ids, "labels": ids}


def logged(subject, facts, folder, *, model=None, every=2, lr=0.0):
    """The rows that the callback adds to the log of a training of five steps."""
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=lr, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    callback = rp.trainer_callback(subject, facts, every=every)
    trainer = Trainer(subject.model if model is None else model, arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    return [row for row in trainer.state.log_history if any(key.startswith("facts/") for key in row)]


def check_log(subject, facts, folder):
    rows = logged(subject, facts, folder)
    known = rp.facts_accuracy(subject, facts).accuracy
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert [row[f"facts/{facts.name}"] for row in rows] == [known] * 4  # with a rate of 0 nothing changes


@pytest.fixture
def subject():
    lm = taught()
    return rp.wrap(copy.deepcopy(lm.model), lm.tokenizer)


@pytest.fixture
def facts():
    return Facts(taught_facts(), (), "likes")


def test_every_measurement_is_logged(subject, facts, tmp_path):
    check_log(subject, facts, tmp_path)


def test_a_measurement_of_something_else_is_noticed(subject, facts, tmp_path, monkeypatch):
    assert rp.facts_accuracy is module.facts_accuracy  # the package remembers what it looked up
    monkeypatch.setattr(module, "facts_accuracy", lambda subject, facts: SimpleNamespace(accuracy=-1.0))
    with pytest.raises(AssertionError):
        check_log(subject, facts, tmp_path)


def test_training_is_seen(subject, facts, tmp_path):
    rows = logged(subject, {"a": facts, "b": facts}, tmp_path, lr=1.0)
    assert rows[0]["facts/a"] == rows[0]["facts/b"] > rows[-1]["facts/a"], "a rate of 1 ruins what the model knew"


def test_another_model_is_refused(subject, facts, tmp_path):
    with pytest.raises(ArgumentError, match="trains another model than the callback measures; wrap the model"):
        logged(subject, facts, tmp_path, model=copy.deepcopy(subject.model))


def test_no_facts_and_no_steps_are_refused(subject, facts):
    with pytest.raises(DataError, match="was given no facts to ask"):
        rp.trainer_callback(subject, {})
    with pytest.raises(ArgumentError, match="every=0; give at least 1"):
        rp.trainer_callback(subject, facts, every=0)


@pytest.mark.usefixtures("unchecked")
def test_what_could_not_be_measured_later_is_refused_at_once(subject, facts):
    for given, what in (("likes", "facts='likes': a str was given where .* Facts is needed"), ([facts], "facts: a list was given"), ({"a": None}, r"facts\['a'\]: None was given where Facts is")):  # fmt: skip
        with pytest.raises(DataError, match=what):
            rp.trainer_callback(subject, given)
    with pytest.raises(ArgumentError, match="every: None was given where a whole number is needed"):
        rp.trainer_callback(subject, facts, every=None)
    with pytest.raises(ArgumentError, match="needs a tokenizer"):
        rp.trainer_callback(rp.wrap(subject.model), facts)
