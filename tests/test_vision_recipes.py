"""Recipes forget by data and by training, and say exactly what they changed and how."""

import json
from dataclasses import replace

import pytest
import torch
from scipy import stats

import repedit as rp
from repedit.errors import ArgumentError, NotEnoughRows, TrainingError, UnknownName
from repedit.vision import (
    Condense,
    GanConfig,
    Relabel,
    Synthesize,
    Task,
    alternating_schedule,
    apply,
    ascend,
    condense,
    erase_class,
    finetune,
    multi_gan,
    recipes,
    relabel,
    retrain,
    salun,
    scrub,
    train_gan,
    trained_on,
    zero_units,
)
from repedit.vision.editing import difference, tensors_of
from tests.classifiers import drawn, normed, original, request

QUICK = GanConfig(steps=4)
RECIPES = {
    "finetune": lambda m, t, s, seed: finetune(m, t, s, epochs=1, seed=seed),
    "ascend": lambda m, t, s, seed: ascend(m, t, s, epochs=1, seed=seed),
    "relabel": lambda m, t, s, seed: relabel(m, t, s, epochs=1, seed=seed),
    "multi_gan": lambda m, t, s, seed: multi_gan(m, t, s, gan=QUICK, epochs=1, seed=seed),
    "condense": lambda m, t, s, seed: condense(
        m, t, s, plan=Condense(k=3, steps=3), schedule=alternating_schedule(epochs=1, hold=0, final_steps=1), seed=seed
    ),
    "scrub": lambda m, t, s, seed: scrub(m, t, s, epochs=2, max_epochs=1, seed=seed),
    "salun": lambda m, t, s, seed: salun(m, t, s, epochs=1, seed=seed),
    "erase_class": lambda m, t, s, seed: erase_class(m, t, s),
    "zero_units": lambda m, t, s, seed: zero_units(m, t, s, fraction=0.2),
}


@pytest.fixture(scope="module")
def setting():
    splits = request()
    return (*original(splits), splits)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_repeats_and_says_how_it_was_made(name, setting):
    model, task, splits = setting
    before, state = {n: v.clone() for n, v in tensors_of(model).items()}, torch.random.get_rng_state()
    first, again = (RECIPES[name](model, task, splits, 2) for _ in range(2))
    assert first.tensors and all(torch.equal(v, again.tensors[n]) for n, v in first.tensors.items())
    assert all(torch.equal(v, before[n]) for n, v in tensors_of(model).items())
    assert torch.equal(state, torch.random.get_rng_state())
    made = first.provenance
    assert made["method"] == name and set(made) >= {"plan", "schedule", "seed", "seconds", "model", "options", "start"}
    assert set(made["seconds"]) == {"offline", "online"} and json.dumps(dict(made))


def differs_exactly(model, task, splits):
    """apply(delta, model) is the trained model, buffers included, to one rounding."""
    from repedit.vision import train

    trained = train(model, task, splits.retain, epochs=1)
    delta = difference(model, trained, {"method": "test"})
    found, expected = tensors_of(apply(delta, model)), tensors_of(trained)
    for name, value in expected.items():
        assert torch.equal(found[name], value) or float((found[name] - value).detach().abs().max()) <= 1.2e-7 * float(
            value.detach().abs().max()
        ), name
    return delta


def test_a_delta_is_the_trained_model(tmp_path):
    splits, model = request(), normed()
    delta = differs_exactly(model, Task(), splits)
    moved = {"beginning.1.running_mean", "beginning.1.num_batches_tracked", "intermediate.2.running_var"}
    assert moved < set(delta.tensors)
    delta.save(tmp_path / "delta.safetensors")
    loaded = rp.Delta.load(tmp_path / "delta.safetensors")
    one, two = (tensors_of(apply(d, model)) for d in (delta, loaded))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert one["beginning.1.num_batches_tracked"].dtype == torch.int64


def test_a_delta_without_buffers_is_caught(monkeypatch):
    from repedit.vision import editing

    monkeypatch.setattr(
        editing, "between", lambda m, new, p, inner=editing.between: inner(m, {n: v for n, v in new.items() if "running" not in n}, p)
    )  # fmt: skip
    with pytest.raises(AssertionError, match="running"):
        differs_exactly(normed(), Task(), request())


def test_deltas_of_classifiers_add_up(setting):
    model, task, splits = setting
    first, second = finetune(model, task, splits, epochs=1), erase_class(model, task, splits)
    both = apply([first, second], model)
    torch.testing.assert_close(both.final.weight, apply(first + second, model).final.weight)
    assert not torch.equal(both.final.weight, apply(first, model).final.weight)
    undone = apply(-first, apply(first, model), any_model=True)
    torch.testing.assert_close(undone.final.weight, model.final.weight)


def test_the_reference_never_saw_the_forget_images(setting):
    _, task, splits = setting
    reference = retrain(lambda: original(splits, epochs=1)[0].apply(_blank), task, splits, epochs=1)
    assert trained_on(reference) >= set(splits.retain.index.tolist())
    fresh = retrain(lambda: normed(), task, splits, epochs=1)
    assert trained_on(fresh) == set(splits.retain.index.tolist())


def _blank(module):
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


# Relabel.


def every_forget_label_changes(model, task, splits, mode):
    found = Relabel(mode)(model, task, splits, 1)
    assert bool((found.forget.y != splits.forget.y).all())
    assert torch.equal(found.retain.y, splits.retain.y) and torch.equal(found.forget.x, splits.forget.x)
    assert int(found.forget.y.min()) >= 0 and int(found.forget.y.max()) < splits.labels
    assert found.plans == (f"Relabel(mode='{mode}')",)


@pytest.mark.parametrize("mode", recipes.MODES)
def test_every_forget_label_changes(mode, setting):
    every_forget_label_changes(*setting, mode)


def test_a_label_that_may_stay_is_caught(setting, monkeypatch):
    monkeypatch.setitem(
        recipes.MODES, "random_other", lambda y, logits, draw: torch.randint(0, 4, y.shape, generator=draw)
    )
    monkeypatch.setitem(recipes.MODES, "runner_up", lambda y, logits, draw: logits.argmax(1))
    for mode in ("random_other", "runner_up"):
        with pytest.raises(AssertionError):
            every_forget_label_changes(*setting, mode)


def test_other_labels_are_uniform():
    y = recipes.other_labels(torch.full((5000,), 3), 10, torch.Generator().manual_seed(0))
    counts = y.bincount(minlength=10)
    assert counts[3] == 0 and stats.chisquare(counts[torch.arange(10) != 3].numpy()).pvalue > 1e-3


def test_likely_labels_are_those_of_the_model(setting):
    model, task, splits = setting
    order = task.logits(model, splits.forget).argsort(1, descending=True)
    others = [[int(i) for i in row if i != y] for row, y in zip(order, splits.forget.y, strict=True)]
    found = {
        mode: Relabel(mode)(model, task, splits, 0).forget.y.tolist()
        for mode in ("runner_up", "least_likely", "mirror")
    }
    assert found["runner_up"] == [row[0] for row in others] and found["least_likely"] == [row[-1] for row in others]
    assert found["mirror"] == (3 - splits.forget.y).tolist()


def test_relabelling_that_cannot_be_done_is_refused():
    splits = request(labels=3)
    model, task = original(splits, epochs=1)
    with pytest.raises(ArgumentError, match="C = 3 classes: the middle class maps to itself; use random_other"):
        relabel(model, task, splits, mode="mirror")
    with pytest.raises(UnknownName, match="mode='runner'; did you mean 'runner_up'"):
        Relabel("runner")
    narrow = request(label=3)
    with pytest.raises(ArgumentError, match="the model has C = 3 classes and forget has the label 3"):
        relabel(model, task, narrow)
    model.final = torch.nn.Linear(12, 1)
    with pytest.raises(ArgumentError, match=r"the model has C = 1 classes.*needs two classes"):
        relabel(model, task, splits)


# Drawn images.


def samples_are_images(shape, count=5):
    made = train_gan(drawn(16, channels=shape[0], size=shape[1], dtype=torch.float32), GanConfig(steps=2)).draw(
        count, seed=0
    )
    assert made.shape == (count, *shape) and float(made.min()) >= 0 and float(made.max()) <= 1
    assert float(made.std()) > 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (1, 28, 28), (3, 32, 32)])
def test_samples_are_images(shape):
    samples_are_images(shape)


def test_samples_outside_the_range_are_caught(monkeypatch):
    monkeypatch.setattr(recipes.nn, "Sigmoid", lambda: torch.nn.Identity())
    with pytest.raises(AssertionError):
        samples_are_images((1, 8, 8))


def test_a_gan_repeats():
    images = drawn(20, dtype=torch.float32)
    first, again, other = (train_gan(images, QUICK, seed=s).draw(3, seed=1) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def no_samples_is_relabel(model, task, splits):
    none, plain = multi_gan(model, task, splits, synthetic=0.0, epochs=1), relabel(model, task, splits, epochs=1)
    assert set(none.tensors) == set(plain.tensors)
    assert all(torch.equal(value, plain.tensors[name]) for name, value in none.tensors.items())


def test_no_samples_is_relabel(setting):
    no_samples_is_relabel(*setting)


def test_samples_that_are_drawn_all_the_same_are_caught(setting, monkeypatch):
    monkeypatch.setattr(recipes, "round", lambda value: 3, raising=False)
    monkeypatch.setattr(
        recipes, "train_gans", lambda s, g, **o: {n: train_gan(s.sets[n], QUICK) for n in ("retain", "forget")}
    )
    with pytest.raises(AssertionError):
        no_samples_is_relabel(*setting)


def test_multi_gan_always_shows_what_it_is_without_its_networks(setting):
    model, task, splits = setting
    made = multi_gan(model, task, splits, gan=QUICK, epochs=1).provenance
    plain = apply(relabel(model, task, splits, epochs=1), model)
    assert made["ablation"]["synthetic"] == 0
    assert made["ablation"]["accuracy"]["forget"] == task.accuracy(plain, splits.forget)
    assert set(made["accuracy"]) == {"retain", "forget", "test", "holdout", "remember"}
    drawn = {which: sum(made["drawn"][which].values()) for which in ("retain", "forget")}
    assert drawn == {"retain": round(len(splits.retain) / 4), "forget": len(splits.forget)}


def test_drawn_images_have_the_models_labels(setting):
    model, task, splits = setting
    found = Synthesize("forget", 9, QUICK)(model, task, splits, 0)
    extra = found.forget[slice(-9, None)]
    assert len(found.forget) == len(splits.forget) + 9 and torch.equal(found.retain.x, splits.retain.x)
    assert torch.equal(extra.y, task.logits(model, extra).argmax(1)) and bool((extra.index < 0).all())
    assert Synthesize("retain", 0)(model, task, splits, 0) is splits


def test_drawing_that_cannot_be_done_is_refused(setting):
    model, task, splits = setting
    with pytest.raises(NotEnoughRows, match="a GAN was asked for on 4 images; give at least 16"):
        multi_gan(model, task, replace(splits, forget=splits.forget[slice(0, 4)]))
    with pytest.raises(ArgumentError, match=r"synthetic=-1\.0; give 0 or more"):
        multi_gan(model, task, splits, synthetic=-1.0)
    with pytest.raises(ArgumentError, match="gans has test; give a generator for retain and one for forget"):
        multi_gan(model, task, splits, gans={"test": train_gan(splits.test, QUICK)})
    with pytest.raises(
        ArgumentError, match="images are 20x20; generators exist for sizes up to 16x16, and for 28x28 and 32x32"
    ):
        train_gan(drawn(16, size=20, dtype=torch.float32))
    with pytest.raises(UnknownName, match="which='test'; valid names: retain, forget"):
        Synthesize("test", 3)
    with pytest.raises(ArgumentError, match="count=-1"):
        Synthesize("retain", -1)
    with pytest.raises(ArgumentError, match="steps=0"):
        GanConfig(steps=0)


def test_a_gan_that_diverges_is_refused():
    with pytest.raises(TrainingError, match=r"step \d+, seed 3: the loss of the GAN is nan at lr 1e\+30; lower lr"):
        train_gan(drawn(20, dtype=torch.float32), GanConfig(lr=1e30, steps=50), seed=3)


def test_a_recipe_that_diverges_returns_nothing(setting):
    model, task, splits = setting
    with pytest.raises(TrainingError, match=r"step \d+, seed 1: the loss is (nan|inf).*lower lr"):
        multi_gan(model, task, splits, synthetic=0.0, epochs=3, lr=1e30, seed=1)


# The baselines.


def only_salient_weights_move(model, task, splits, percentile):
    delta = salun(model, task, splits, percentile=percentile, epochs=2)
    moved = sum(int((value != 0).sum()) for value in delta.tensors.values())
    whole = sum(p.numel() for p in model.parameters())
    assert moved <= (1 - percentile / 100) * whole + 1, "weights below the percentile moved"
    assert moved > 0.5 * (1 - percentile / 100) * whole
    assert abs(delta.provenance["salient"] - (1 - percentile / 100)) < 0.02


def test_only_salient_weights_move(setting):
    only_salient_weights_move(*setting, 80)


def test_a_mask_that_is_not_used_is_caught(setting, monkeypatch):
    from repedit.vision import recipes

    monkeypatch.setattr(recipes, "descend", lambda *a, before_step=None, inner=recipes.descend, **o: inner(*a, **o))
    with pytest.raises(AssertionError, match="weights below the percentile moved"):
        only_salient_weights_move(*setting, 80)


def test_scrub_ascends_only_in_its_first_epochs(setting, monkeypatch):
    """Minus a divergence on the forget images once, and a divergence with a cross entropy on the retain images each epoch."""
    from repedit.vision import recipes

    model, task, splits = setting
    seen, plain = [], recipes.descend

    def descend(student, optimizer, images, loss, **options):
        plain(student, optimizer, images, loss, **options)
        with torch.no_grad():
            seen.append((images is splits.forget, float(loss(student, images)) < 0))

    monkeypatch.setattr(recipes, "descend", descend)
    scrub(model, task, splits, epochs=2, max_epochs=1)
    assert seen == [(True, True), (False, False), (False, False)]
    with pytest.raises(ArgumentError, match="max_epochs=3 with epochs=2"):
        scrub(model, task, splits, epochs=2, max_epochs=3)
    with pytest.raises(ArgumentError, match="percentile=100"):
        salun(model, task, splits, percentile=100)


def test_ascent_raises_the_loss(setting):
    model, task, splits = setting
    edited = apply(ascend(model, task, splits, epochs=4, lr=1e-2), model)
    # By .09 to 1.2 over three seeds.
    assert float(task.losses(edited, splits.forget).mean()) > float(task.losses(model, splits.forget).mean()) + 0.01
