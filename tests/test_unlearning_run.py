"""One run from end to end: what it changes, what it leaves alone, what it writes down."""

from __future__ import annotations

import json

import pytest
import torch

import repedit as rp
from repedit.delta import Delta
from repedit.unlearning import schedule, trainer
from tests.simulated_kills import dies
from tests.test_delta import export_equals_apply
from tests.tolerances import DTYPES
from tests.unlearning_cases import sides, subject, values

QUICK = {"steps": 3, "batch_size": 3, "lr": 1e-3, "progress": False}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unlearned_applies_exports_and_reloads_bitwise(family, dtype, tmp_path):
    lm = subject(family, dtype)
    before = values(lm)
    delta = rp.unlearn(lm, recipe=rp.recipes.grad_diff(), **sides(), **QUICK)
    assert all(torch.equal(p, before[n]) for n, p in values(lm).items())
    delta.save(tmp_path / "d.safetensors")
    export_equals_apply(lm, Delta.load(tmp_path / "d.safetensors"), tmp_path / "out")
    assert [record["step"] for record in delta.log] == [0, 1, 2]


@pytest.mark.parametrize("recipe", ["ga", "grad_diff", "npo_gdr"])
def test_forgetting_raises_the_forget_loss(recipe):
    delta = rp.unlearn(
        subject(), recipe=getattr(rp.recipes, recipe)(), **sides(), steps=8, batch_size=6, lr=1e-3, progress=False
    )
    assert delta.log[-1]["nll"]["forget"] > delta.log[0]["nll"]["forget"]


def trained(folder, **more) -> bytes:
    """The bytes of a delta after five steps whose state is saved after each second one."""
    options = {"steps": 5, "batch_size": 3, "lr": 1e-3, "progress": False, "checkpoint_every": 2}
    files = {"resume": folder, "log": folder / "log"}
    delta = rp.unlearn(subject(), recipe=rp.recipes.blur_npo(), **sides(), **options | files | more)
    delta.save(folder / "delta")
    return (folder / "delta").read_bytes()


def test_a_training_that_is_killed_at_any_write_ends_with_the_same_bytes(tmp_path):
    """Also one that is killed again while it goes on."""
    folder = tmp_path / "whole"
    folder.mkdir()
    whole, log = trained(folder), steps_of(folder)
    (tmp_path / "killed").mkdir()
    for k in range(1, 60, 3):
        done = dies(k, lambda: trained(tmp_path / "killed"), tmp_path / "killed")
        if not done and k % 2:
            continue
        assert trained(tmp_path / "killed") == whole and steps_of(tmp_path / "killed") == log
        for path in (tmp_path / "killed").iterdir():
            path.unlink()
        if done:
            break
    assert done


def steps_of(folder) -> list:
    """The log without the seconds that steps took."""
    rows = map(json.loads, (folder / "log").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_training_that_a_rule_ended_does_not_go_on(tmp_path):
    rule = schedule.loss_above("forget", 0.0)
    whole = trained(tmp_path, stop=[rule])
    assert trained(tmp_path, stop=[rule]) == whole
    assert len(Delta.load(tmp_path / "delta").log) == 1


def test_going_on_past_a_rule_would_be_caught(tmp_path, monkeypatch):
    rule = schedule.loss_above("forget", 0.0)
    whole = trained(tmp_path, stop=[rule])
    honest = trainer.Training._stopped
    monkeypatch.setattr(trainer.Training, "_stopped", lambda run: honest(run) if len(run.log) > 1 else None)
    assert trained(tmp_path, stop=[rule]) != whole
