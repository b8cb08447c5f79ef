"""Law: statistics that several processes collect are those of one."""

from __future__ import annotations

import os

import pytest
import torch

import repedit as rp
from repedit import container
from repedit.activations.collection import Collection
from repedit.errors import CheckpointError, FingerprintError, NotFinite, ProcessFailed
from repedit.ranks import Ranks
from repedit.stats import Activity, CrossMoments, Moments
from tests.ranks import together
from tests.unlearned import subject

TEXTS = tuple(f"Line {i} of a short text, number {i * i}, and {'more ' * (i % 5)}words." for i in range(11))
STATISTICS = {
    "activity": ("*.mlp.neurons", {}),
    "gradients": ("*.mlp.neurons,*.attn.neurons", {"gradients": True}),
    "moments": ("*.mlp.out,1.resid.mid", {"statistic": Moments}),
    "cross": ("0.mlp.out", {"statistic": CrossMoments, "gradients": True}),
}


def collected(limit=None, broken=""):
    """By statistic: what is compared of every site, and the tokens counted."""
    if broken:
        Ranks.total = lambda self, value: value  # type: ignore[method-assign]
    corpus, found = rp.data.read(list(TEXTS)), {}
    for name, (sites, options) in STATISTICS.items():
        made = rp.collect(
            subject(), corpus, sites, batch_size=2, length=64, limit_tokens=limit, progress=False, **options
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


def check_equal(limit=None, broken="", size=2):
    alone, held = collected(limit), together(collected, limit, broken, size=size)
    for mine in held:
        for name, (sites, seen, counted) in alone.items():
            assert mine[name][1:] == (seen, counted)
            for site, sides in sites.items():
                for side, tolerance in zip((0, 1), (1e-12, 1e-11), strict=True):
                    for key, value in sides[side].items():
                        error = (mine[name][0][site][side][key] - value).norm() / value.norm().clamp(min=1e-300)
                        assert float(error) <= tolerance, f"{name} {site} {key}: {float(error)}"


@pytest.mark.parametrize(("size", "limit"), [(2, None), (3, 100)])
def test_ranks_collect_what_one_process_collects(size, limit):
    check_equal(limit, size=size)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_saved_collection_is_the_collection(name, tmp_path):
    sites, options = STATISTICS[name]
    made = rp.collect(subject(), rp.data.read(list(TEXTS)), sites, progress=False, **options)
    made.save(tmp_path / "a.safetensors")
    again = Collection.load(tmp_path / "a.safetensors")
    assert list(again) == list(made) and again.kind == made.kind
    assert all(
        getattr(again, key) == getattr(made, key)
        for key in ("model", "corpus", "data_hash", "rule", "counted", "units", "gated")
    )
    for site in made:
        mine, other = made[site].state(), again[site].state()
        assert set(mine) == set(other) and all(torch.equal(value, other[key]) for key, value in mine.items())
    both = made + again
    assert both.counted == 2 * made.counted and repr(both[next(iter(made))])


def test_another_file_is_no_collection(tmp_path):
    container.write(tmp_path / "b.safetensors", "scores", {"x": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="does not hold a collection"):
        Collection.load(tmp_path / "b.safetensors")


def test_sums_that_stay_apart_are_caught():
    with pytest.raises(AssertionError):
        check_equal(broken="total")


def alone():
    found = Ranks()
    value = torch.ones(2)
    return found.total(value) is value and found.of_first(value) is value and not found.any(False) and found.any(True)


def test_one_process_waits_for_nobody():
    assert alone()
    with pytest.raises(NotFinite, match="mine"):
        Ranks().check_alive(NotFinite("mine"))


def other_texts(_):
    rank = int(os.environ["RANK"])
    with pytest.raises(FingerprintError, match="ranks 0 and 1 do not work on the same: data_hash is"):
        rp.collect(subject(), rp.data.read(list(TEXTS[rank:])), progress=False)
    with pytest.raises(FingerprintError, match="ranks 0 and 1 do not work on the same: batch_size is 2 and 3"):
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


def too_few(_):
    def labels(batch):
        return torch.ones(*batch.input_ids.shape, 2)

    rank = int(os.environ["RANK"])
    error, match = (
        (ProcessFailed, "NotEnoughRows: rank 1") if rank == 0 else (rp.errors.NotEnoughRows, "start fewer processes")
    )
    with pytest.raises(error, match=match):
        rp.collect(
            subject(), rp.data.read([TEXTS[0]]), "0.mlp.out", statistic=CrossMoments, labels=labels, progress=False
        )
    return True


@pytest.mark.parametrize("case", [other_texts, one_fails, too_few])
def test_ranks_that_cannot_go_on_say_why(case):
    assert together(case, 0) == [True, True]
