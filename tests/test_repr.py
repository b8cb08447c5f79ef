"""What a notebook shows of a value is one line that tells what it is."""

from __future__ import annotations

import re

import pytest
import torch

import repedit as rp
from tests.edits import mask, projection
from tests.saved_models import saved

pytestmark = pytest.mark.filterwarnings("ignore::repedit.neurons.scores.CollinearWarning")


def certified(lm):
    edit = projection(lm, "0.mlp.out", 2)
    return rp.certificate(edit.apply(lm), edit, lm)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    lm = rp.load(saved(folder / "tiny"))
    sets, options = (rp.data.code(), rp.data.prose()), {"limit_tokens": 300}
    sides = [rp.collect(lm, c, **options) for c in sets]
    edit = mask(lm, "1.mlp.neurons")
    return {
        "subject": lm,
        "collection": sides[0],
        "scores": rp.score(*sides),
        "edit": edit,
        "no edit": rp.Edit({}),
        "examples": rp.max_activating(lm, sets[0], **options),
        "predictions": rp.predictions(lm, sets[1], **options),
        "trajectory": rp.trajectory(lm, *sets, steps=1, collect_options=options, evaluate_options=options),
        "manifest": rp.export(edit, lm, folder / "out"),
        "comparison": rp.compare(lm, edit.apply(lm), [sets[0]], prompts=["a"], tokens=2, **options),
        "no comparison": rp.compare(lm, lm),
        "splits": rp.data.Splits.of(rp.data.facts("capitals")),
        "certificate": certified(lm),
    }


SHOWN = {
    "subject": r"Subject\(llama, 2 layers, width 24, [\d,]+ parameters, from tiny\)",
    "collection": r"Collection\(Activity at 2 sites, [\d,]+ tokens of code\)",
    "scores": r"Scores\(256 neurons at 2 sites, difference of abs\)",
    "edit": r"Edit\(test: 1 sites, 1\.mlp\.neurons to 1\.mlp\.neurons, removes rank \d+ in all\)",
    "no edit": r"Edit\(by hand: no site, removes rank 0 in all\)",
    "examples": r"Examples\(256 neurons at 2 sites, \d+ chunks of code\)",
    "predictions": r"Predictions\([\d,]+ tokens, [\d.]+% right, loss [\d.]+ nats a token\)",
    "trajectory": r"Trajectory\(2 steps to 0\.\d+: forget drop -?[\d.]+ %, retain drop -?[\d.]+ %\)",
    "comparison": r"Comparison\(code: drop .* nats a token; 1 prompts\)",
    "no comparison": r"Comparison\(no text; 0 prompts\)",
    "splits": r"Splits\(76 facts in T, 75 in V, 1008 to retain\)",
    "certificate": r"Certificate\(folded: 2 directions over 1 tensor, exact, largest leak .* [\d.e-]+ \(model\.\S+\)\)",
    "manifest": r"Manifest\(test: 3 tensors edited, \d+ files\)",
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_value_is_shown_in_one_line(made, name):
    assert re.fullmatch(SHOWN[name], repr(made[name])), repr(made[name])


def test_the_largest_scores_are_named(made):
    scores = made["scores"]
    found = scores.largest(7)
    every = torch.cat([score.values for score in scores.values()]).sort(descending=True).values
    assert [value for *_, value in found] == every[:7].tolist()
    assert all(float(scores[site].values[neuron]) == value for site, neuron, value in found)


def test_an_edit_counts_what_it_removes(made):
    edit = projection(made["subject"], "0.mlp.out") | made["edit"]
    total = sum(map_.rank_removed for map_ in edit.maps.values())
    assert f"removes rank {total} in all" in repr(edit)
