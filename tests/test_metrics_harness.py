"""The harness on a model in memory, with a task and data of one's own: it counts what repedit counts."""

import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import repedit as rp
from repedit.cli import app
from repedit.data import Fact
from repedit.errors import ArgumentError, DataError, MissingDependency, NotFound, TargetExists, UnknownName
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


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_task(folder, domain: str) -> None:
    """A task asks the facts of a domain, to the letter."""
    asked, data = rp.data.facts(domain).forget, rows_of(folder / f"repedit_{domain}.jsonl")
    task = yaml.safe_load((folder / f"repedit_{domain}.yaml").read_text())
    assert task["task"] == f"repedit_{domain}" and task["dataset_kwargs"]["data_files"]["test"] == str(
        folder / f"repedit_{domain}.jsonl"
    )
    assert (task["doc_to_text"], task["doc_to_choice"], task["doc_to_target"]) == ("{{prompt}}", "choices", "label")
    assert [(r["prompt"], tuple(r["choices"]), r["choices"][r["label"]]) for r in data] == [
        (f.prompt, f.choices, f.answer) for f in asked
    ]


def test_the_built_in_facts_are_written_as_tasks(tmp_path):
    folder = tmp_path / "made here"
    assert harness.write_tasks(folder) == tuple(f"repedit_{domain}" for domain in rp.data.DOMAINS)
    for domain in rp.data.DOMAINS:
        check_task(folder, domain)
    assert "Apache-2.0" in (folder / "repedit_nouns.yaml").read_text()
    assert harness.write_tasks(folder, "nouns") == ("repedit_nouns",), "the same again is no conflict"
    with pytest.raises(TargetExists, match=r"repedit_nouns.jsonl exists and holds something else; move it away"):
        harness.write_tasks(folder, "nouns", seed=1)


def test_a_wrong_label_is_caught(tmp_path, monkeypatch):
    plain = harness._row
    monkeypatch.setattr(harness, "_row", lambda f: json.dumps(json.loads(plain(f)) | {"label": 0}) + "\n")
    harness.write_tasks(tmp_path, "nouns")
    with pytest.raises(AssertionError):
        check_task(tmp_path, "nouns")


def test_facts_of_your_own_are_a_task_too(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(json.dumps({"id": str(i), "prompt": f"{i} is", "answer": f"a{i}"}) + "\n" for i in range(9))
    )
    assert harness.write_tasks(tmp_path / "tasks", [path, "nouns"]) == ("repedit_mine", "repedit_nouns")
    first = rows_of(tmp_path / "tasks" / "repedit_mine.jsonl")[0]
    assert len(first["choices"]) == 8 and first["choices"][first["label"]] == "a0"
    note = (tmp_path / "tasks" / "repedit_mine.yaml").read_text()
    assert "under the terms of that file" in note and "Apache" not in note


def test_a_task_in_a_script_without_spaces_has_none_before_its_choices(tmp_path):
    for name, prompts in (("cjk", ("日本の首都は", "中国の首都は")), ("mixed", ("日本の首都は", "Italy is"))):
        rows = [{"id": p, "prompt": p, "answer": p[:1], "choices": [p[:1], "x"]} for p in prompts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    harness.write_tasks(tmp_path, tmp_path / "cjk.jsonl")
    assert yaml.safe_load((tmp_path / "repedit_cjk.yaml").read_text())["target_delimiter"] == ""
    with pytest.raises(
        DataError, match="task 'repedit_mixed': some prompts end in a script with spaces and some in one without"
    ):
        harness.write_tasks(tmp_path, tmp_path / "mixed.jsonl")


@pytest.mark.parametrize(("names", "error", "message"), [
    ((), ArgumentError, r"names=\[\]; give at least one, each once"),
    (("nouns", "nouns"), ArgumentError, "give at least one, each once"),
    (("noun",), UnknownName, "no built-in facts are called 'noun', and a file ends in .jsonl; did you mean 'nouns'"),
    ("same.jsonl", DataError, "fact 'x' has no choices, and its domain has no other answers; give it some"),
])  # fmt: skip
def test_tasks_that_cannot_be_written_are_refused(names, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "who is", "answer": "one"}
    (tmp_path / "same.jsonl").write_text("\n".join(json.dumps(row | {"id": i, "prompt": f"{i} is"}) for i in "xyz"))
    with pytest.raises(error, match=message):
        harness.write_tasks(tmp_path / "tasks", names)
    assert not (tmp_path / "tasks").exists()


def test_the_command_line_writes_tasks_and_says_how_to_run_them(tmp_path):
    said = CliRunner().invoke(app, ["tasks", str(tmp_path), "--facts", "nouns,symbols"]).stdout
    assert (
        "lm-eval run --model hf" in said and f"--include_path {tmp_path} --tasks repedit_nouns,repedit_symbols" in said
    )
    found = json.loads(CliRunner().invoke(app, ["tasks", str(tmp_path), "--json"]).stdout)
    assert found["tag"] == harness.TAG and len(found["tasks"]) == len(list(tmp_path.glob("*.yaml"))) == len(
        rp.data.DOMAINS
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_harness_counts_every_built_in_fact_as_repedit_does(family, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra repedit[eval]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    subject = small(family)
    names = harness.write_tasks(tmp_path)
    found = harness.evaluate(subject, harness.TAG, include=tmp_path, batch_size=64)
    for name, domain in zip(names, rp.data.DOMAINS, strict=True):
        known = rp.facts_accuracy(subject, rp.data.facts(domain))
        items = {sample["doc"]["id"]: bool(sample["acc"]) for sample in found["samples"][name]}
        assert [items[i] for i in known.ids] == known.correct.tolist(), domain
        assert 0 < known.accuracy < 1, "a measure that moves"
