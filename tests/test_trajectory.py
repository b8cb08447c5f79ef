"""Trajectories: masks that grow, runs that resume, and what is read off the points."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import repedit as rp
from repedit.activations.prediction import Predictions
from repedit.data import Corpus, Document
from repedit.data.corpus import tokens
from repedit.errors import ArgumentError, CheckpointError, FingerprintError, FractionError, OverlapError, SelectionError
from repedit.models.subject import Subject
from tests.char_tokenizer import CharTokenizer
from tests.planted_neurons import NEURONS, planted, texts
from tests.tiny import ids, logits, tiny


def _part(*seeds):
    return tokens([{"input_ids": ids(4, 12, seed)} for seed in seeds])


def _run(subject=None, **options):
    # Random tokens on a random model: both sets are alike, which is not what is tested here.
    options = {"fraction_per_step": 0.1, "steps": 3, "progress": False, "score_options": {"warn": False}} | options
    corpora = {"evaluate_forget": _part(3), "evaluate_retain": _part(4)}
    return rp.trajectory(subject or tiny("llama"), _part(1), _part(2), **(corpora | options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run without options, and the folder of its steps; neither is to be changed."""
    folder = tmp_path_factory.mktemp("steps")
    return _run(resume=folder), folder


@pytest.fixture
def steps(whole, tmp_path):
    """A copy of the steps of that run."""
    return shutil.copytree(whole[1], tmp_path / "steps")


def _gone(edit):
    return {(str(site), int(i)) for site, map_ in edit.maps.items() for i in (~map_.kept).nonzero()[:, 0]}


def _hashes(path):
    return [step.edit.hash for step in path.steps]


@pytest.mark.parametrize("recollect", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_masks_grow_by_the_same_count_from_nothing(family, recollect):
    path = _run(tiny(family), recollect=recollect)
    gone = [_gone(step.edit) for step in path.steps]
    assert [len(g) for g in gone] == [0, 8, 16, 24] and all(a < b for a, b in pairwise(gone))
    assert [step.fraction for step in path.steps] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_steps_are_evaluated_under_their_edit():
    subject = tiny("llama")
    step = _run(subject).steps[2]
    np.testing.assert_array_equal(step.forget.loss, rp.predictions(subject, _part(3), edit=step.edit).loss)
    np.testing.assert_array_equal(step.retain.loss, rp.predictions(subject, _part(4), edit=step.edit).loss)


def test_without_recollection_steps_are_prefixes_of_one_order():
    subject = tiny("llama")
    scores = rp.score(rp.collect(subject, _part(1)), rp.collect(subject, _part(2)), warn=False)
    path = _run(subject, recollect=False)
    expected = [rp.prune(scores, fraction=fraction).hash for fraction in (0.1, 0.2, 0.3)]
    assert _hashes(path)[1:] == expected


def test_with_recollection_the_pruned_model_is_scored(whole):
    subject, path = tiny("llama"), whole[0]
    first = path.steps[1].edit
    scores = rp.score(*(rp.collect(subject, _part(seed), edit=first) for seed in (1, 2)), warn=False)
    for site, map_ in first.maps.items():
        scores[site].values[~map_.kept] = torch.inf
    assert rp.prune(scores, fraction=0.2).hash == path.steps[2].edit.hash
    assert _hashes(path) != _hashes(_run(recollect=False))


def test_the_first_neurons_to_go_are_the_planted_ones():
    options = {"evaluate_forget": _part(3), "evaluate_retain": _part(4), "fraction_per_step": len(NEURONS) / 80}
    options |= {"steps": 1, "progress": False, "score_options": {"warn": False}}
    path = rp.trajectory(planted("llama"), texts(forget=True), texts(forget=False), **options)
    assert _gone(path.steps[1].edit) == {("1.mlp.neurons", neuron) for neuron in NEURONS}


def test_the_same_inputs_give_the_same_masks(whole):
    assert _hashes(_run()) == _hashes(whole[0])


def _texts(name):
    return Corpus(tuple(Document(f"{name}{i}", f"{name} text {i}, written for {name}" * 2) for i in range(8)), name)


def test_corpora_are_split_by_document_and_by_the_seed():
    subject = Subject(tiny("llama").model, CharTokenizer(), tiny("llama").architecture)
    options = {"fraction_per_step": 0.1, "steps": 1, "progress": False, "score_options": {"warn": False}}
    paths = [rp.trajectory(subject, _texts("forget"), _texts("retain"), seed=seed, **options) for seed in (0, 0, 1)]
    assert _hashes(paths[0]) == _hashes(paths[1]) and paths[0].provenance == paths[1].provenance
    assert paths[0].provenance["data"] != paths[2].provenance["data"]
    collected, evaluated = _texts("forget").halves(0)
    assert paths[0].provenance["data"]["forget"] == collected.hash
    assert set(paths[0].steps[0].forget.ids) == {d.id for d in evaluated.documents}


@pytest.mark.parametrize("recollect", [True, False])
def test_a_resumed_run_equals_an_unbroken_one(recollect, tmp_path):
    unbroken = _run(recollect=recollect)
    _run(recollect=recollect, steps=2, resume=tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("step-*")}
    resumed = _run(recollect=recollect, resume=tmp_path)
    assert _hashes(resumed) == _hashes(unbroken) and resumed.to_json() == unbroken.to_json()
    assert len(before) == 6 and all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())


def test_a_step_without_its_json_is_made_again(whole, steps):
    (steps / "step-002.json").unlink()
    shutil.copy(steps / "step-001.safetensors", steps / "step-002.safetensors")
    assert _hashes(_run(resume=steps)) == _hashes(whole[0])
    assert rp.Edit.load(steps / "step-002.safetensors").hash == whole[0].steps[2].edit.hash


def test_steps_that_an_earlier_version_saved_are_resumed(whole, steps):
    """They hold the value alone, without its key and hash."""
    for path in steps.glob("step-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text())["value"]))
    before = {path.name: path.stat().st_mtime_ns for path in steps.glob("step-*")}
    assert _hashes(_run(resume=steps)) == _hashes(whole[0])
    assert {path.name: path.stat().st_mtime_ns for path in steps.glob("step-*")} == before


@pytest.mark.parametrize("name", ["run.json", "step-001.json", "step-001.safetensors"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"fraction": NaN}'])
def test_a_damaged_step_is_refused(name, content, steps):
    (steps / name).write_text(content)
    with pytest.raises((CheckpointError, FingerprintError), match=str(steps)):
        _run(resume=steps)


CHANGES = {
    "fraction_per_step": {"fraction_per_step": 0.2},
    "recollect": {"recollect": False},
    "seed": {"seed": 7},
    "sites": {"sites": "0.mlp.neurons"},
    "options": {"importance": "rms"},
    "data": {"evaluate_retain": _part(5)},
    "cap_per_layer": {"cap_per_layer": 0.5},
    "model": {"subject": tiny("mistral")},
}


@pytest.mark.parametrize("key", CHANGES)
def test_steps_of_another_run_are_refused(key, steps):
    with pytest.raises(
        FingerprintError, match=f"holds steps of another run: {key} was .*, now .*; give another directory"
    ):
        _run(resume=steps, **CHANGES[key])


def test_stop_sees_the_trajectory_so_far_and_ends_it():
    seen: list[int] = []

    def stop(path: rp.Trajectory) -> bool:
        seen.append(len(path.steps))
        return len(path.steps) == 3

    assert len(_run(steps=6, stop=stop).steps) == 3 and seen == [2, 3]


def _predicted(subject, length=12):
    """Text that the model predicts without a mistake."""
    x = ids(4, 1, 9)
    while x.shape[1] < length:
        x = torch.cat([x, logits(subject, x)[:, -1:].argmax(-1)], 1)
    return tokens([{"input_ids": x}])


def test_the_run_ends_after_the_first_step_beyond_the_retain_limit():
    subject = tiny("llama")
    options = {"evaluate_retain": _predicted(subject), "steps": 10, "fraction_per_step": 0.02}
    drops = [drop for drop, _ in _run(subject, **options).drops()]
    assert drops[0] == 0 and drops[-1] > 0
    expected = next(i for i, drop in enumerate(drops) if drop > 5.0)
    assert len(_run(subject, max_retain_drop=5.0, **options).steps) == expected + 1 > 2


def test_collection_and_evaluation_must_not_share_chunks():
    with pytest.raises(OverlapError, match="collection and evaluation share 4 chunks of tokens; split by document, or"):
        _run(evaluate_forget=_part(3, 1))
    assert _run(evaluate_forget=_part(3, 1), steps=1, allow_overlap=True).provenance["overlap"] == 4
    assert _run(steps=1).provenance["overlap"] == 0


def test_steps_that_prune_more_than_everything_are_refused():
    with pytest.raises(FractionError, match=r"4 steps of 0.3 prune more than everything; at most 3 steps"):
        _run(steps=4, fraction_per_step=0.3)
    with pytest.raises(FractionError, match=r"fraction_per_step=2.0: .*did you mean 0.02"):
        _run(fraction_per_step=2.0)
    with pytest.raises(SelectionError, match=r"fraction=0.001 of 80 neurons selects none"):
        _run(fraction_per_step=0.001)


def test_everything_can_be_pruned():
    assert len(_gone(_run(steps=10).steps[-1].edit)) == 80


def test_tokens_cannot_be_split():
    with pytest.raises(ArgumentError, match=r"the retain batches are tokens, .* pass evaluate_retain"):
        _run(evaluate_retain=None)
    with pytest.raises(ArgumentError, match="this needs a tokenizer and the model was wrapped without one"):
        rp.trajectory(tiny("llama"), _texts("a"), _texts("b"), progress=False)


def test_a_step_composes_with_another_edit_of_the_model(whole):
    first, second = whole[0].steps[2].edit, _run(importance="rms").steps[1].edit
    joined = first | second
    assert joined.provenance["model"] == tiny("llama").fingerprint()
    assert _gone(joined) == _gone(first) | _gone(second)


def _points(*accuracies):
    """A trajectory made by hand from (retain, forget) hits of 100."""

    def side(hits):
        return Predictions(("a",), np.array([100]), np.array([hits]), np.array([100]), np.array([200.0 - hits]))

    steps = [rp.Step(i / 10, rp.Edit({}), side(f), side(r)) for i, (r, f) in enumerate(accuracies)]
    return rp.Trajectory(tuple(steps), {"method": "by hand"})


PATH = _points((50, 80), (48, 60), (45, 24), (40, 8), (0, 0))


def test_drops_and_selectivity_are_relative_to_the_first_step():
    assert np.array(PATH.drops()) == pytest.approx(np.array([(0, 0), (4, 25), (10, 70), (20, 90), (100, 100)]))
    assert PATH.selectivities() == pytest.approx([0, 21, 60, 70, 0])


@pytest.mark.parametrize(("limit", "step"), [(10.0, 2), (9.9, 1), (None, 3), (100.0, 3)])
def test_the_best_step_is_within_the_limit(limit, step):
    assert PATH.best(limit) is PATH.steps[step]


def test_no_step_within_the_limit_is_an_error():
    with pytest.raises(SelectionError, match=r"no step keeps the retain drop within 3.0 %; take smaller steps"):
        PATH.best(3.0)
    with pytest.raises(SelectionError, match="no step keeps"):
        _points((50, 80)).best(None)


def test_the_area_is_1_on_the_diagonal_0_when_only_forget_falls_and_2_when_only_retain_falls():
    assert _points((50, 80), (25, 40), (0, 0)).area() == pytest.approx(1.0)
    assert _points((50, 80), (50, 0), (0, 0)).area() == pytest.approx(0.0)
    assert _points((50, 80), (0, 80), (0, 0)).area() == pytest.approx(2.0)


def test_json_holds_every_step_and_the_provenance():
    found = json.loads(PATH.to_json())
    assert [row["selectivity"] for row in found["steps"]] == pytest.approx([0, 21, 60, 70, 0])
    assert found["steps"][1]["forget_loss"] == 1.4 and found["provenance"] == {"method": "by hand"}
    assert json.loads(_run(steps=1).to_json())["provenance"]["options"]["score"]["importance"] == "abs"


def test_functions_in_options_are_named_without_their_address(tmp_path: Path):
    def every(batch):
        return batch.attention_mask

    path = _run(steps=1, collect_options={"count": every}, resume=tmp_path)
    assert path.provenance["options"]["collect"]["count"].endswith("<locals>.every")
