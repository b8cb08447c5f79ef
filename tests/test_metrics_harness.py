"""The harness on a model in memory, with a task and data of one's own: it counts what repedit counts."""

import json

import numpy as np
import pytest

import repedit as rp
from repedit.data import Fact
from repedit.errors import ArgumentError, MissingDependency, NotFound
from repedit.metrics import harness
from tests.test_attack_weights import small

WORDS = ("ab", "ba", "cd", "xyz")
FACTS = [Fact(id=str(i), prompt=f"{'pqr'[i % 3]}{i} is", answer=WORDS[i % 4], choices=WORDS) for i in range(12)]
TASK = """
task: own_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f.prompt, "choices": f.choices, "label": f.choices.index(f.answer)} for f in FACTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(TASK.format(path=tmp_path / "rows.jsonl"))
    return tmp_path


def test_a_local_task_counts_what_repedit_counts(tasks):
    pytest.importorskip("lm_eval", reason="needs the extra repedit[eval]")
    subject = small("gpt2")
    before, known = subject.fingerprint(), rp.facts_accuracy(subject, FACTS)
    found = harness.evaluate(subject, "own_choices", include=tasks)
    assert found["results"]["own_choices"]["acc,none"] == pytest.approx(known.accuracy)
    items = {sample["doc_id"]: sample["acc"] for sample in found["samples"]["own_choices"]}
    assert np.array_equal([items[i] for i in range(12)], known.correct) and subject.fingerprint() == before
    assert len(harness.evaluate(subject, ["own_choices"], include=tasks, limit=5)["samples"]["own_choices"]) == 5


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingDependency, match=r"the harness needs lm-eval: pip install lm-eval==0\.4\.13"):
        harness.evaluate(small("gpt2"), "own_choices")


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"tasks": []}, ArgumentError, r"tasks=\[\], limit=None, batch_size=8; give a task"),
    ({"tasks": "a", "limit": 0}, ArgumentError, r"tasks=\['a'\], limit=0, batch_size=8; give a task, and numbers of at"),
    ({"tasks": "a", "include": "nowhere"}, NotFound, "nowhere is not a directory; give the one that holds the YAML files"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        harness.evaluate(small("gpt2"), **options)


@pytest.mark.slow
def test_a_task_that_does_not_exist_is_refused(tasks):
    pytest.importorskip("lm_eval", reason="needs the extra repedit[eval]")
    with pytest.raises(rp.errors.UnknownName, match="no task is called 'own_choice'; did you mean 'own_choices'"):
        harness.evaluate(small("gpt2"), "own_choice", include=tasks)
