"""Law: two ranks take the steps of one process, whether each holds all weights or a part of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import repedit as rp
from repedit.data import Row
from repedit.delta import Delta
from repedit.distributed import ProcessGroup
from repedit.unlearning import schedule, trainer
from repedit.unlearning.forget_gradient import CommonPart, LeadingDirections, SharpnessAware
from repedit.unlearning.parameters import Lora, Mask, Parameters
from repedit.unlearning.recipe import OptimizerConfig
from repedit.unlearning.recipes import RECIPES
from repedit.unlearning.trainer import check_shardable, micro_batches
from tests.gloo_processes import together
from tests.saved_models import saved
from tests.unlearning_cases import rows, sides, subject

NAMES = ("blur_npo", "grad_diff", "npo_gdr", "rmu", "surgery", "dpo")
SLOW = pytest.mark.slow
Cases = tuple[tuple[str, bool], ...]
"""Recipes, and whether the weights are sharded."""


UPDATE = tuple(Row(row.prompt, "figs", f"new {row.id}") for row in rows(0, 3))


def learned(name: str, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Three steps of a recipe on five rows a side, so that two ranks never have equally many."""
    recipe = replace(RECIPES[name](), batch_size=5, lr=1e-3, length=64, steps=3, stop=())
    if name == "cir":
        recipe = replace(recipe, gradient_filter=CommonPart(2, 3, every=2))
    elif name == "rep_select":
        recipe = replace(recipe, gradient_filter=LeadingDirections(3, every=2))
    else:
        recipe = replace(recipe, parameters=Parameters())
    sets = {"forget": rows(0, 5), "retain": rows(6, 11)} | ({"update": UPDATE} if name == "surgery" else {})
    delta = rp.unlearn(subject(), recipe=recipe, micro_batch=2, progress=False, **(sets | options))
    return dict(delta.tensors), [{k: v for k, v in record.items() if k != "seconds"} for record in delta.log]


def several(cases: Cases, broken: bool = False, options: dict[str, Any] | None = None) -> dict[Any, Any]:
    """The same for several recipes, whole or sharded; as a broken twin every rank keeps its own gradients."""
    if broken:
        trainer.sum_gradients = lambda ranks, parameters: None  # type: ignore[assignment]
    return {(name, shard): learned(name, shard=shard, **(options or {})) for name, shard in cases}


def ranks_equal_one(cases: Cases, broken: bool = False, **options: Any) -> None:
    """The weights of two ranks are those of one process, and the ranks agree to the bit, as do their logs."""
    first, second = together(several, cases, broken, options)
    for case in cases:
        alone, log = learned(case[0], **options)
        mine, theirs = first[case], second[case]
        assert set(mine[0]) == set(theirs[0]) == set(alone)
        assert all(torch.equal(value, theirs[0][n]) for n, value in mine[0].items()), "the ranks part"
        assert mine[1] == theirs[1]
        for n, value in alone.items():
            assert float((mine[0][n] - value).norm() / value.norm()) <= 1e-6, f"{case}: {n} differs from one process"
        for here, there in zip(mine[1], log, strict=True):
            assert here["losses"] == pytest.approx(there["losses"], rel=1e-9) and here["rows"] == there["rows"]
            assert here["norm"] == pytest.approx(there["norm"], rel=1e-9)


def test_two_ranks_equal_one():
    ranks_equal_one((("blur_npo", False), ("rmu", True)))


@SLOW
def test_two_ranks_equal_one_for_every_recipe():
    ranks_equal_one(tuple((name, shard) for name in NAMES for shard in (False, True)))


@SLOW
def test_two_ranks_equal_one_with_a_mask():
    """20 steps' worth of weight decay would show on the entries that must stay."""
    mask = Mask({"model.layers.0.mlp.down_proj.weight": torch.arange(48)[:, None] % 3 == 0})
    ranks_equal_one((("grad_diff", False), ("grad_diff", True)), parameters=Parameters("0", mask=mask))


@SLOW
def test_two_ranks_equal_one_with_another_forget_gradient():
    ranks_equal_one((("cir", False), ("rep_select", False), ("mudman", False)))


def test_ranks_that_keep_their_own_gradients_are_caught():
    with pytest.raises(AssertionError, match="the ranks part"):
        ranks_equal_one((("grad_diff", False),), broken=True)


class Halt(Exception):
    """A break in the middle."""


def resumed(folder: str, shard: bool) -> bool:
    """Whether a run that was broken off after two steps of three ends as one that was not."""
    broken = [False]

    def ask(_subject: Any) -> float:
        if broken[0]:
            raise Halt
        return 0.0

    options = {"shard": shard, "stop": (schedule.metric(ask, above=1.0, every=2),)}
    whole, _ = learned("blur_npo", **options)
    options |= {"resume": folder, "checkpoint_every": 1}
    broken[0] = True
    with pytest.raises(Halt):
        learned("blur_npo", **options)
    broken[0] = False
    again, log = learned("blur_npo", **options)
    return len(log) == 3 and all(torch.equal(value, again[name]) for name, value in whole.items())


@SLOW
@pytest.mark.parametrize("shard", [False, True])
def test_ranks_resume(shard, tmp_path):
    assert together(resumed, str(tmp_path), shard) == [True, True]


@pytest.mark.parametrize(("count", "size", "micro"), [(5, 2, 2), (1, 3, 4), (7, 3, 2), (4, 1, 3)])
def test_every_row_counts_once(count, size, micro):
    """And every rank takes as many forward passes."""
    held = [micro_batches(ProcessGroup(rank, size), range(10, 10 + count), micro) for rank in range(size)]
    assert sorted(row for share in held for part in share if part.is_real for row in part.rows) == [
        *range(10, 10 + count)
    ]
    assert len({len(share) for share in held}) == 1
    assert all(part.rows for share in held for part in share)


def unlike(_first: int) -> str:
    """What is said where the second rank was given other rows."""
    import os

    rank = int(os.environ["RANK"])
    with pytest.raises(rp.errors.FingerprintError) as caught:
        rp.unlearn(subject(), recipe=rp.recipes.grad_diff(), **sides(forget=rows(rank, 6)), steps=1, progress=False)
    return str(caught.value)


def test_ranks_with_other_rows_are_refused():
    for message in together(unlike, 0):
        assert message.startswith("ranks 0 and 1 have different inputs: data is") and "give every process" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "shard=True and this is the only process; start several with torchrun"),
        ({"ranks": 2, "parameters": Parameters(lora=Lora(2))}, "shard=True and lora were both given"),
        ({"ranks": 2, "optimizer": OptimizerConfig("adafactor")}, "shard=True and optimizer adafactor were both given"),
        (
            {"ranks": 2, "adversary": SharpnessAware()},
            "takes its forget gradient at other weights, filters or masks it",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(options, message):
    ranks = options.pop("ranks", 1)
    with pytest.raises(rp.errors.ArgumentError, match=message):
        check_shardable(replace(RECIPES["grad_diff"](), **options), ranks)
    if ranks == 1:
        with pytest.raises(rp.errors.ArgumentError, match=message):
            rp.unlearn(subject(), recipe=rp.recipes.grad_diff(), **sides(), shard=True)


@SLOW
def test_the_verb_runs_under_torchrun(tmp_path):
    """Two ranks that shard, one file; the difference is that of one process."""
    model = saved(tmp_path / "lm")
    verb = ["-m", "repedit", "unlearn", str(model), "--recipe", "grad_diff", "--steps", "2"]
    verb += ["--set", "batch_size=4", "--set", "lr=1e-3"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for name, command in (("one", [*verb]), ("two", [*torchrun, *verb, "--shard", "--gradient-checkpointing"])):
        out = tmp_path / f"{name}.safetensors"
        command += ["--out", str(out), "--device", "cpu"]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("written:") == 1
        found.append(Delta.load(out).tensors)
    for name, value in found[0].items():
        # float32, and Adam divides by small numbers.
        assert float((found[1][name] - value).norm() / value.norm()) <= 1e-2
