"""Law: statistics that several processes collect are those of one."""

from __future__ import annotations

import os

import pytest
import torch

import repedit as rp
from repedit.activations.collection import Collection
from repedit.distributed import ProcessGroup
from repedit.errors import CheckpointError, FingerprintError, NotFinite, ProcessFailed
from repedit.io import archive
from repedit.stats import Activity, CrossMoments, Moments
from tests.gloo_processes import together
from tests.unlearning_cases import subject

TEXTS = tuple(f"Line {i} of a short text, number {i * i}, and {'more ' * (i % 5)}words." for i in range(11))
STATISTICS = {
    "activity": ("*.mlp.neurons", {}),
    "gradients": ("*.mlp.neurons,*.attn.neurons", {"gradients": True}),
    "moments": ("*.mlp.out,1.resid.mid", {"statistic": Moments}),
    "cross": ("0.mlp.out", {"statistic": CrossMoments, "gradients": True}),
}


def collected(limit=None, broken="", dtype=torch.float64):
    """By statistic: what is compared of every site, and the tokens counted."""
    if broken == "total":
        ProcessGroup.sum = lambda self, value: value  # type: ignore[method-assign]
    if broken == "shift":
        Moments.reset = lambda self: Moments.__init__(self, self.width)  # type: ignore[method-assign,misc]
    corpus, found = rp.data.read(list(TEXTS)), {}
    for name, (sites, options) in STATISTICS.items():
        made = rp.collect(
            subject(dtype=dtype), corpus, sites, batch_size=2, length=64, limit_tokens=limit, progress=False, **options
        )
        found[name] = {str(site): values(s) for site, s in made.items()}, made.seen, made.counted
    return found


def values(statistic):
    """(sums, covariances) that a merge must keep."""
    if isinstance(statistic, Activity):
        sums = {k: v for k, v in statistic._items() if v is not None and k not in ("shift", "total", "square")}
        return {**sums, "mean": statistic.mean}, {"variance": statistic.variance}
    assert isinstance(statistic, Moments | CrossMoments)
    return {"mean": statistic.mean, "count": torch.tensor(float(statistic.count))}, {"covariance": statistic.covariance}


def check_equal(limit=None, broken="", size=2, dtype=torch.float64):
    alone, held = collected(limit, "", dtype), together(collected, limit, broken, dtype, size=size)
    for mine in held:
        for name, (sites, seen, counted) in alone.items():
            assert mine[name][1:] == (seen, counted)
            for site, sides in sites.items():
                for side, tolerance in zip((0, 1), (1e-12, 1e-11), strict=True):
                    for key, value in sides[side].items():
                        error = (mine[name][0][site][side][key] - value).norm() / value.norm().clamp(min=1e-300)
                        assert float(error) <= tolerance, f"{name} {site} {key}: {float(error)}"


@pytest.mark.parametrize(
    ("size", "limit", "dtype"), [(2, None, torch.float64), (3, 100, torch.float64), (2, None, torch.float32)]
)
def test_ranks_collect_what_one_process_collects(size, limit, dtype):
    check_equal(limit, size=size, dtype=dtype)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_saved_collection_is_the_collection(name, tmp_path):
    sites, options = STATISTICS[name]
    made = rp.collect(subject(), rp.data.read(list(TEXTS)), sites, progress=False, **options)
    made.save(tmp_path / "a.safetensors")
    again = Collection.load(tmp_path / "a.safetensors")
    assert list(again) == list(made) and again.kind == made.kind
    assert all(
        getattr(again, key) == getattr(made, key)
        for key in ("model", "corpus", "data_hash", "rule", "counted", "group_sizes", "gated")
    )
    for site in made:
        mine, other = made[site].state(), again[site].state()
        assert set(mine) == set(other) and all(torch.equal(value, other[key]) for key, value in mine.items())
    both = made + again
    assert both.counted == 2 * made.counted and repr(both[next(iter(made))])


def test_another_file_is_no_collection(tmp_path):
    archive.write(tmp_path / "b.safetensors", "scores", {"x": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="does not hold a collection"):
        Collection.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize(("broken", "dtype"), [("total", torch.float64), ("shift", torch.float32)])
def test_sums_that_stay_apart_and_shifts_of_their_own_are_caught(broken, dtype):
    with pytest.raises(AssertionError):
        check_equal(broken=broken, dtype=dtype)


def alone():
    found = ProcessGroup()
    value = torch.ones(2)
    return found.sum(value) is value and found.broadcast(value) is value and not found.any(False) and found.any(True)


def test_one_process_waits_for_nobody():
    assert alone()
    with pytest.raises(NotFinite, match="mine"):
        ProcessGroup().check_alive(NotFinite("mine"))


def other_texts(_):
    rank = int(os.environ["RANK"])
    with pytest.raises(FingerprintError, match="ranks 0 and 1 have different inputs: data_hash is"):
        rp.collect(subject(), rp.data.read(list(TEXTS[rank:])), progress=False)
    with pytest.raises(FingerprintError, match="ranks 0 and 1 have different inputs: batch_size is 2 and 3"):
        rp.collect(subject(), rp.data.read(list(TEXTS)), batch_size=2 + rank, progress=False)
    return True


def one_fails(_):
    """The second rank meets a model that is broken there alone; both end, each with its reason."""
    rank = int(os.environ["RANK"])
    lm = subject()
    error, match = (
        (ProcessFailed, "rank 1 of 2 failed, so nothing was merged: NotFinite")
        if rank == 0
        else (NotFinite, "broken here")
    )

    def count(batch):
        if rank == 1:
            raise NotFinite("broken here")
        return batch.attention_mask

    with pytest.raises(error, match=match):
        rp.collect(lm, rp.data.read(list(TEXTS)), batch_size=2, count=count, progress=False)
    return True


def one_batch(_=None):
    """One batch for two ranks: the second has no rows, but knows the width of the labels."""

    def labels(batch):
        return torch.arange(batch.input_ids.numel() * 2.0).reshape(*batch.input_ids.shape, 2)

    made = rp.collect(
        subject(), rp.data.read([TEXTS[0]]), "0.mlp.out", statistic=CrossMoments, labels=labels, progress=False
    )
    return next(iter(made.values())).covariance


def test_a_rank_without_a_batch_adds_nothing():
    expected = one_batch()
    for found in together(one_batch, 0):
        assert float((found - expected).norm() / expected.norm()) <= 1e-11


@pytest.mark.parametrize("case", [other_texts, one_fails])
def test_ranks_that_cannot_go_on_say_why(case):
    assert together(case, 0) == [True, True]
