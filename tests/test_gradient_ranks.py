"""Law: two ranks take the steps of one process, whether each holds all weights or a part of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import repedit as rp
from repedit.gradient.parallel import Ranks
from repedit.gradient.parameters import Parameters
from repedit.gradient.recipes import RECIPES
from tests.ranks import together
from tests.unlearned import rows, sides, subject

NAMES = ("blur_npo", "grad_diff", "npo_gdr", "rmu")
SLOW = pytest.mark.slow


def learned(name: str, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Three steps of a recipe on five rows a side, so that two ranks never have equally many."""
    recipe = replace(RECIPES[name](), parameters=Parameters(), batch_size=5, lr=1e-3, length=64, steps=3, stop=())
    sets = {"forget": rows(0, 5), "retain": rows(6, 11)}
    delta = rp.unlearn(subject(), recipe=recipe, micro_batch=2, progress=False, **(sets | options))
    return dict(delta.tensors), [{k: v for k, v in record.items() if k != "seconds"} for record in delta.log]


def several(names: tuple[str, ...], options: dict[str, Any], broken: bool = False) -> dict[str, Any]:
    """The same for several recipes; as a broken twin every rank keeps its own gradients."""
    if broken:
        Ranks.add_gradients = lambda self, parameters: None  # type: ignore[method-assign]
    return {name: learned(name, **options) for name in names}


def ranks_equal_one(names: tuple[str, ...], broken: bool = False, **options: Any) -> None:
    """The weights of two ranks are those of one process, and the ranks agree to the bit, as do their logs."""
    first, second = together(several, names, options, broken)
    for name in names:
        alone, log = learned(name)
        mine, theirs = first[name], second[name]
        assert set(mine[0]) == set(theirs[0]) == set(alone)
        assert all(torch.equal(value, theirs[0][n]) for n, value in mine[0].items()), "the ranks part"
        assert mine[1] == theirs[1]
        for n, value in alone.items():
            assert float((mine[0][n] - value).norm() / value.norm()) <= 1e-6, f"{name}: {n} differs from one process"
        for here, there in zip(mine[1], log, strict=True):
            assert here["losses"] == pytest.approx(there["losses"], rel=1e-9) and here["rows"] == there["rows"]
            assert here["norm"] == pytest.approx(there["norm"], rel=1e-9)


def test_two_ranks_equal_one():
    ranks_equal_one(("blur_npo", "rmu"))


@SLOW
def test_two_ranks_equal_one_for_other_recipes():
    ranks_equal_one(tuple(name for name in NAMES if name not in ("blur_npo", "rmu")))


def test_ranks_that_keep_their_own_gradients_are_caught():
    with pytest.raises(AssertionError, match="the ranks part"):
        ranks_equal_one(("grad_diff",), broken=True)


@pytest.mark.parametrize(("count", "size", "micro"), [(5, 2, 2), (1, 3, 4), (7, 3, 2), (4, 1, 3)])
def test_every_row_counts_once(count, size, micro):
    """And every rank takes as many forward passes."""
    held = [Ranks(rank, size).parts(range(10, 10 + count), micro) for rank in range(size)]
    assert sorted(row for parts in held for part in parts if part.counts for row in part.rows) == [
        *range(10, 10 + count)
    ]
    assert len({len(parts) for parts in held}) == 1
    assert all(part.rows for parts in held for part in parts)


def unlike(_first: int) -> str:
    """What is said where the second rank was given other rows."""
    import os

    rank = int(os.environ["RANK"])
    with pytest.raises(rp.errors.FingerprintError) as caught:
        rp.unlearn(subject(), recipe=rp.recipes.grad_diff(), **sides(forget=rows(rank, 6)), steps=1, progress=False)
    return str(caught.value)


def test_ranks_with_other_rows_are_refused():
    for message in together(unlike, 0):
        assert message.startswith("ranks 0 and 1 do not train the same: data is") and "give every process" in message
