"""A map at the input of a layer is the same hooked and folded, and statistics there are those of plain numpy."""

import numpy as np
import pytest
import torch
from torch import nn

import repedit as rp
from repedit.errors import (
    ArgumentError,
    FingerprintError,
    HookError,
    NoOpEdit,
    NoSignal,
    NotEnoughRows,
    NotFoldable,
    ShapeError,
    UnknownName,
)
from repedit.vision import Task, apply, class_eraser, editing, erase_class, fold, hooked, statistics, zero_units
from tests.classifiers import LIMITS, drawn, original, reading, request

pytestmark = pytest.mark.numeric


X = torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LAYERS = {
    "linear": lambda: nn.Linear(5 * 16, 4),
    "linear, no bias": lambda: nn.Linear(5 * 16, 4, bias=False),
    "padded": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "bare": lambda: nn.Conv2d(5, 7, 3),
    "no bias": lambda: nn.Conv2d(5, 7, (3, 2), bias=False),
    "stride": lambda: nn.Conv2d(5, 6, 3, stride=2, padding=1),
    "dilation": lambda: nn.Conv2d(5, 3, 2, dilation=2),
    "one by one, same": lambda: nn.Conv2d(5, 3, 1, padding="same"),
    "circular": lambda: nn.Conv2d(5, 3, 3, padding=1, padding_mode="circular"),
}
PADDED = ("padded", "stride")
LINEAR, AFFINE = ("low rank", "mask", "chain"), ("centred", "fill")
CASES = [(name, kind) for name in LAYERS for kind in LINEAR + AFFINE if name not in PADDED or kind in LINEAR]


def maps(width, seed=5):
    draw = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(width, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    center, keep = torch.randn(width, generator=draw, dtype=torch.float64), torch.rand(width, generator=draw) > 0.4
    mask = rp.Diagonal.mask(keep)
    return {
        "low rank": rp.LowRank.oblique(u, v),
        "mask": mask,
        "chain": rp.Chain((rp.LowRank.oblique(u, v), mask)),
        "centred": rp.LowRank.oblique(u, v, center),
        "fill": rp.Diagonal.fill(keep, center),
    }


def hooked_equals_folded(name, kind, dtype=torch.float64):
    model = reading(LAYERS[name](), 5, dtype)
    map_ = maps(80 if name.startswith("linear") else 5)[kind]
    with hooked(model, "place", map_):
        expected = model(X.to(dtype))
    found = apply(fold(model, "place", map_), model)(X.to(dtype))
    assert float((found - expected).detach().abs().max()) <= LIMITS[dtype]
    assert float((found - model(X.to(dtype))).detach().abs().max()) > 1e-3, "the map changes nothing"


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_hooked_equals_folded(name, kind, dtype):
    hooked_equals_folded(name, kind, dtype)


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("kind", AFFINE)
def test_padding_does_not_carry_an_offset(name, kind):
    with pytest.raises(NotFoldable, match=r"pads its input with zeros.*use a linear map.*or padding 0"):
        fold(reading(LAYERS[name](), 5, torch.float64), "place", maps(5)[kind])


SABOTAGE = {
    "the offset is forgotten": ("bare", "centred", lambda m: m.setattr(rp.LowRank, "offset", None)),
    "zeros that pad are taken for inputs": ("padded", "centred", lambda m: m.setattr(editing, "_pads", lambda _: False)),
    "the map is transposed": (
        "padded",
        "low rank",
        lambda m: m.setattr(rp.LowRank, "right", lambda self, w, *, out=None: w - (w @ self.v) @ self.u.T),
    ),
    "only the first place of a kernel carries the offset": (
        "bare",
        "centred",
        lambda m: m.setattr("repedit.plan.Operation._edited", _first_place(m)),
    ),
}  # fmt: skip


def _first_place(_patch):
    from repedit.plan import Operation

    whole = Operation._edited

    def edited(self, w, read):
        if self.kind != "carry":
            return whole(self, w, read)
        carried = (self.weight.read(read(self.weight.tensor)) @ self.constant).reshape(len(w), -1)
        return w + carried[:, :1]

    return edited


@pytest.mark.parametrize("broken", SABOTAGE)
def test_a_broken_fold_is_caught(broken, monkeypatch):
    name, kind, sabotage = SABOTAGE[broken]
    sabotage(monkeypatch)
    with pytest.raises(AssertionError):
        hooked_equals_folded(name, kind)


def test_groups_fold_where_the_map_does_not_mix_them():
    u = torch.zeros(6, 2, dtype=torch.float64)
    u[:3, 0], u[3:, 1] = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, 1.0, 3.0])
    model = reading(nn.Conv2d(6, 8, 3, groups=2), 6, torch.float64)
    for map_ in (rp.LowRank.projection(u, torch.ones(6, dtype=torch.float64)), rp.Diagonal.mask(torch.arange(6) != 4)):
        with hooked(model, "place", map_):
            expected = model(X)
        torch.testing.assert_close(apply(fold(model, "place", map_), model)(X), expected, rtol=0, atol=1e-10)
    mixed = rp.LowRank.projection(torch.ones(6, 1, dtype=torch.float64))
    with pytest.raises(NotFoldable, match="2 groups of 3 channels, and the map mixes groups"):
        fold(model, "place", mixed)


def test_an_absent_bias_is_added_and_listed():
    model = reading(LAYERS["no bias"](), 5, torch.float64)
    delta = fold(model, "place", maps(5)["centred"])
    assert delta.provenance["added"] == ["place.bias"] and apply(delta, model).place.bias is not None
    half = apply(delta * 0.5, model)
    torch.testing.assert_close(2 * half.place.bias, apply(delta, model).place.bias)
    assert model.place.bias is None and "added" not in fold(model, "place", maps(5)["low rank"]).provenance


def test_what_cannot_be_folded_is_refused():
    model = reading(LAYERS["bare"](), 5, torch.float64)
    with pytest.raises(ShapeError, match="the map has width 4, the input of 'place' has width 5"):
        fold(model, "place", maps(4)["mask"])
    with pytest.raises(NotFoldable, match="'act' is a ReLU, which is not a linear function"):
        fold(model, "act", maps(5)["mask"])
    with pytest.raises(UnknownName, match="no module 'plaice'; did you mean 'place'"):
        fold(model, "plaice", maps(5)["mask"])
    tied = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    tied[2].weight = tied[0].weight
    with pytest.raises(NotFoldable, match=r"shared by 0.weight and 2.weight"):
        fold(tied, "2", maps(5)["mask"])
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
    with pytest.raises(NotFoldable, match="computed from others"):
        fold(nn.Sequential(computed), "0", maps(5)["mask"])


def test_hooks_are_gone_after_an_exception():
    model, before = reading(LAYERS["bare"](), 5, torch.float64), None
    before = model(X)
    with (
        pytest.raises(ShapeError, match="the map has width 4, the tensor has width 5"),
        hooked(model, "place", maps(4)["mask"]),
    ):
        model(X)
    assert torch.equal(model(X), before)


def test_a_delta_of_another_model_is_refused():
    model, other = (reading(LAYERS["bare"](), 5, torch.float64, seed=s) for s in (0, 1))
    delta = fold(model, "place", maps(5)["mask"])
    with pytest.raises(FingerprintError, match=r"place.weight holds other values"):
        apply(delta, other)
    assert torch.equal(apply(delta, other, any_model=True).place.bias, other.place.bias)
    with pytest.raises(FingerprintError, match=r"no tensor is called 'place\.weight'"):
        apply(delta, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(NoOpEdit, match="the edit changes nothing"):
        apply(fold(model, "place", rp.Diagonal.mask(torch.ones(5, dtype=torch.bool))), model)


def test_an_edit_of_a_language_model_is_refused():
    from repedit.lower import lower

    edit = rp.Edit({rp.Site.parse("0.mlp.out"): maps(5)["mask"]})
    with pytest.raises(ArgumentError, match="Edit names sites of a language model"):
        lower(edit, None, {})


# Statistics.


@pytest.fixture(scope="module")
def measured():
    """A network with five channels on images five pixels wide, so that a wrong axis has the right width."""
    model = reading(nn.Conv2d(5, 3, 1), 5, torch.float64)
    model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    images = drawn(40, channels=2, size=7, labels=3)
    assert model[:2](images.x).shape[1:] == (5, 5, 5)
    return model, Task("place", {"beginning": ("first",), "intermediate": ("act",), "final": ("place",)}), images


def rows_are_those_of_numpy(model, task, images):
    z = model[:2](images.x).detach().numpy().transpose(0, 2, 3, 1).reshape(-1, 5)
    one_hot = np.eye(3)[np.repeat(images.y.numpy(), 25)]
    found = {
        k: statistics(model, task, images, "place", statistic=k)["place"]
        for k in (rp.Activity, rp.Moments, rp.CrossMoments)
    }
    activity, moments, cross = found.values()
    expected = {
        "mean": (activity.mean, z.mean(0)),
        "abs": (activity.abs / activity.count, np.abs(z).mean(0)),
        "moments": (moments.mean, z.mean(0)),
        "covariance": (moments.covariance, np.cov(z.T, bias=True)),
        "cross": (cross.covariance, (z - z.mean(0)).T @ (one_hot - one_hot.mean(0)) / len(z)),
    }
    for name, (mine, theirs) in expected.items():
        assert np.abs(mine.numpy() - theirs).max() <= 1e-10, name


def test_statistics_equal_numpy(measured):
    rows_are_those_of_numpy(*measured)


def test_a_wrong_axis_is_caught(measured, monkeypatch):
    monkeypatch.setattr(editing, "axis_of", lambda _: -1)
    with pytest.raises(AssertionError, match="mean"):
        rows_are_those_of_numpy(*measured)


def test_batch_size_and_order_do_not_matter(measured, monkeypatch):
    model, task, images = measured
    once = statistics(model, task, images, "place", "first", statistic=rp.Moments)
    shuffled = images[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    monkeypatch.setattr(
        "repedit.vision.data.Images.batches", lambda self: (self[slice(i, i + 7)] for i in range(0, 40, 7))
    )
    again = statistics(model, task, shuffled, "place", "first", statistic=rp.Moments)
    for path in ("place", "first"):
        torch.testing.assert_close(again[path].covariance, once[path].covariance, rtol=0, atol=1e-10)


def test_the_classes_are_those_of_language_models():
    import repedit.stats

    assert editing.Activity is repedit.stats.Activity and editing.Moments is repedit.stats.Moments
    assert editing.LowRank is rp.LowRank and editing.score is rp.score and editing.top is rp.top


def test_scores_and_fits_take_what_a_classifier_gave(measured, tmp_path):
    model, task, images = measured
    forget, retain = images[images.y == 1], images[images.y != 1]
    f, r = (statistics(model, task, part, "place", "first") for part in (forget, retain))
    keep = rp.top(rp.score(f, r, warn=False), fraction=0.2)
    assert sorted(keep) == ["first", "place"] and sum(int((~mask).sum()) for mask in keep.values()) == 1
    f.save(tmp_path / "f.safetensors")
    assert list(type(f).load(tmp_path / "f.safetensors")) == ["first", "place"]
    moments = [statistics(model, task, part, statistic=rp.Moments)["place"] for part in (forget, retain)]
    assert rp.fit.mean_difference(*moments).width == 5


def test_statistics_that_cannot_be_had_are_refused(measured):
    model, task, images = measured
    with pytest.raises(NotEnoughRows, match="no images to measure"):
        statistics(model, task, images[slice(0, 0)])
    with pytest.raises(UnknownName, match="statistic=Tensor; valid names: Activity"):
        statistics(model, task, images, statistic=torch.Tensor)
    unused = nn.Sequential(model, nn.Identity())
    unused[1].spare = nn.Linear(2, 2)
    with pytest.raises(HookError, match=r"never calls '1.spare'"):
        statistics(unused.double(), Task("0.place", dict.fromkeys(task.parts, ("0",))), images, "1.spare")


# Erasing.


def sides(model, task, splits):
    return [statistics(model, task, part, statistic=rp.Moments)["final"] for part in (splits.forget, splits.retain)]


@pytest.fixture(scope="module")
def wide():
    splits = request(dtype=torch.float64)
    return (*original(splits), splits)


def one_mean_is_left(model, task, splits):
    forget, retain = sides(model, task, splits)
    eraser = editing.class_eraser(forget, retain)
    assert eraser.rank_removed == 1
    f, r = (task.feature(model, part) for part in (splits.forget, splits.retain))
    assert float((f.mean(0) - r.mean(0)).abs().max()) > 1e-3
    assert float((eraser(f).mean(0) - eraser(r).mean(0)).abs().max()) <= 1e-10
    assert float((eraser(r).mean(0) - r.mean(0)).abs().max()) <= 1e-10
    edited = apply(erase_class(model, task, splits), model)
    means = [task.logits(edited, part).mean(0) for part in (splits.forget, splits.retain)]
    assert float((means[0] - means[1]).abs().max()) <= 1e-9


def test_the_eraser_leaves_one_mean(wide):
    one_mean_is_left(*wide)


def test_an_eraser_without_its_normalisation_is_caught(wide, monkeypatch):
    def unscaled(forget, retain, **options):
        right = class_eraser(forget, retain, **options)
        return rp.LowRank((forget.mean - retain.mean)[:, None], right.v, right.center)

    monkeypatch.setattr(editing, "class_eraser", unscaled)
    with pytest.raises(AssertionError):
        one_mean_is_left(*wide)


def test_a_linear_eraser_folds_into_a_padded_convolution(wide):
    model, task, splits = wide
    with pytest.raises(NotFoldable, match="use a linear map"):
        erase_class(model, task, splits, module="intermediate.0")
    delta = erase_class(model, task, splits, module="intermediate.0", affine=False)
    assert list(delta.tensors) == ["intermediate.0.weight"] and delta.provenance["rank"] == 1


def test_an_eraser_needs_rows_and_a_difference(wide):
    model, task, splits = wide
    forget, retain = sides(model, task, splits)
    few = statistics(model, task, splits.retain[slice(0, 12)], statistic=rp.Moments)["final"]
    with pytest.raises(NotEnoughRows, match="retain has 12 rows of width 12, 13 are needed"):
        class_eraser(forget, few)
    one = statistics(model, task, splits.forget[slice(0, 1)], statistic=rp.Moments)["final"]
    with pytest.raises(NotEnoughRows, match="forget has 1 rows of width 12, 2 are needed"):
        class_eraser(one, retain)
    with pytest.raises(NoSignal, match="the means of forget and retain agree"):
        class_eraser(retain, retain)
    with pytest.raises(ArgumentError, match="ridge=0"):
        class_eraser(forget, retain, ridge=0.0)
    with pytest.raises(ShapeError, match="forget has width 4, retain 12"):
        class_eraser(rp.Moments(4), retain)


def test_zeroed_units_are_the_ones_named(wide):
    model, task, splits = wide
    delta = zero_units(model, task, splits, fraction=0.25)
    units = delta.provenance["options"]["units"]
    columns = apply(delta, model).final.weight.abs().sum(0)
    assert len(units) == 3 and (columns == 0).nonzero()[:, 0].tolist() == units
