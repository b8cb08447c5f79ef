"""A condensed retain set holds nothing of the forget images, and a schedule moves one part at a time."""

import copy
import logging
from dataclasses import replace

import pytest
import torch

from repedit.errors import ArgumentError, DataError, ShapeError, TrainingError, UnknownName
from repedit.vision import (
    PUBLISHED_SCHEDULES,
    Condense,
    Schedule,
    Stage,
    Task,
    alternating_schedule,
    buckets,
    condensation,
    condense,
    condensed_model,
    offline_schedule,
    small_cnn,
    train_scheduled,
    training,
)
from repedit.vision import condensation as condensing
from repedit.vision.condensation import bucket_sums as weighted_sum
from repedit.vision.condensation import match_features, reduced
from repedit.vision.editing import tensors_of
from repedit.vision.recipes import training_images
from tests.classifiers import drawn, normed, original, request

PLANS = [
    Condense(k=3, steps=5),
    Condense(k=3, steps=5, weights="simplex"),
    Condense(k=3, steps=5, contaminated="recondense"),
    Condense(k=3, method="medoid"),
    Condense(k=3, method="medoid", contaminated="recondense"),
    Condense(k=3, method="inversion", epochs=1),
]


@pytest.fixture(scope="module")
def setting():
    """A trained network and the request to forget images at random, so that buckets are mixed."""
    splits = request(n=200, train=120)
    model, task = original(splits)
    mixed = training_images(splits)
    mixed = mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(2))]
    return model, task, replace(splits, retain=mixed[slice(12, None)], forget=mixed[slice(0, 12)], plans=("random",))


# Fast distribution matching.


def joint_equals_a_loop(model, task, images, ids, weights):
    together, losses = match_features(model, task, images, ids, steps=20, weights=weights)
    apart = [
        match_features(
            model,
            task,
            images[ids == b],
            torch.zeros(int((ids == b).sum()), dtype=torch.int64),
            steps=20,
            weights=weights,
        )
        for b in range(int(ids.max()) + 1)
    ]
    alone = torch.cat([one.x for one, _ in apart])
    assert float((together.x - alone).abs().max()) <= 1e-5
    start = torch.stack([images.x[ids == b].mean(0) for b in range(len(alone))])
    assert float((together.x - start).abs().max()) > 1e-3, "the weights never moved"
    torch.testing.assert_close(losses, sum(loss for _, loss in apart), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("weights", ["free", "simplex"])
def test_all_buckets_at_once_equal_a_loop(setting, weights):
    model, task, splits = setting
    joint_equals_a_loop(model, task, splits.retain, buckets(model, task, splits.retain, 4), weights)


def test_a_softmax_over_all_buckets_is_caught(setting, monkeypatch):
    model, task, splits = setting
    ids = buckets(model, task, splits.retain, 4)

    def over_all(x, own, free, weights):
        return weighted_sum(x, own, free.softmax(0) * own.bincount()[own], "free")

    monkeypatch.setattr("repedit.vision.condensation.bucket_sums", over_all)
    with pytest.raises(AssertionError):
        joint_equals_a_loop(model, task, splits.retain, ids, "simplex")


def test_many_buckets_are_solved_in_parts(setting, monkeypatch):
    model, task, splits = setting
    ids = buckets(model, task, splits.retain, 4)
    whole, loss = match_features(model, task, splits.retain, ids, steps=5)
    monkeypatch.setattr("repedit.vision.condensation.BATCH", 3)
    parts, again = match_features(model, task, splits.retain, ids, steps=5)
    torch.testing.assert_close(parts.x, whole.x, rtol=0, atol=1e-5)
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=0)


def test_matching_that_diverges_is_refused(setting):
    model, task, splits = setting
    with pytest.raises(
        TrainingError, match=r"step \d+: the loss of feature matching is (nan|inf) at lr 1e\+30; lower lr"
    ):
        match_features(model, task, splits.retain, buckets(model, task, splits.retain, 2), lr=1e30)


def test_simplex_weights_keep_the_range_of_pixels(setting):
    model, task, splits = setting
    found, _ = match_features(
        model, task, splits.retain, buckets(model, task, splits.retain, 4), weights="simplex", lr=0.5
    )
    assert found.bounded and float(found.x.min()) >= 0 and float(found.x.max()) <= 1


# What reaches the reduced set.


def no_forget_pixel_matters(model, task, splits, plan):
    ids = buckets(model, task, training_images(splits), plan.k)
    other = replace(splits, forget=replace(splits.forget, x=1 - splits.forget.x))
    before, after = (condensation.reduced(model, task, s, ids, plan) for s in (splits, other))
    for name in ("x", "y", "index"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_no_pixel_of_a_forget_image_reaches_the_reduced_set(setting, plan):
    no_forget_pixel_matters(*setting, plan)


@pytest.mark.parametrize("plan", PLANS[:1] + PLANS[2:5], ids=repr)
def test_condensing_before_removing_is_caught(setting, plan, monkeypatch):
    def late(model, task, splits, ids, plan, *, seed=0):
        both = replace(splits, retain=training_images(splits), forget=splits.forget[slice(0, 0)])
        object.__setattr__(both.forget, "x", both.forget.x)
        return reduced(model, task, both, ids, plan, seed=seed)

    monkeypatch.setattr("repedit.vision.data.ImageSplits.__post_init__", lambda self: None)
    monkeypatch.setattr(condensation, "reduced", late)
    with pytest.raises(AssertionError):
        no_forget_pixel_matters(*setting, plan)


@pytest.mark.parametrize("method", ["fdm", "medoid"])
def test_forgetting_a_class_leaves_k_images_of_each_other(method):
    splits = request(label=2)
    model, task = original(splits, epochs=1)
    found = Condense(k=3, method=method, steps=2)(model, task, splits, 0)
    assert len(found.retain) == 3 * 3 and found.retain.y.bincount().tolist() == [3, 3, 0, 3]
    assert torch.equal(found.forget.x, splits.forget.x) and found.plans == (f"Condense(k=3, method='{method}', contaminated='residual', weights='free', steps=2, lr=0.001, epochs=200)",)  # fmt: skip


def test_recondensing_makes_one_image_a_bucket_with_a_retain_member(setting):
    model, task, splits = setting
    ids = buckets(model, task, training_images(splits), 3)
    found = reduced(model, task, splits, ids, Condense(k=3, steps=2, contaminated="recondense"))
    assert len(found) == len(ids[: len(splits.retain)].unique())


def expected_size_is_rho(m=10, p=0.1, groups=20):
    total = m * groups
    everything = drawn(total, labels=2)
    everything = everything.labelled(torch.arange(groups).repeat_interleave(m) % 2)
    ids, ratios = torch.arange(groups).repeat_interleave(m), []
    draw = torch.Generator().manual_seed(0)
    splits = request()
    for _ in range(200):
        order = torch.randperm(total, generator=draw)
        gone, kept = order[: round(p * total)], order[round(p * total) :]
        one = replace(splits, retain=everything[kept], forget=everything[gone], plans=("random",))
        # Which images are made does not matter for how many there are.
        size = condensation.reduced(None, None, one, torch.cat([ids[kept], ids[gone]]), Condense(method="medoid"))
        ratios.append(len(size) / len(kept))
    rho = 1 - (1 - p) ** (m - 1) + (1 - p) ** (m - 1) / m
    assert abs(sum(ratios) / 200 - rho) <= 0.02


@pytest.fixture
def counted(monkeypatch):
    def first_of_each(model, task, images, ids):
        return images[torch.stack([(ids == b).nonzero()[0, 0] for b in ids.unique()])]

    monkeypatch.setattr(condensation, "medoids", first_of_each)
    monkeypatch.setattr("repedit.vision.data.ImageSplits.__post_init__", lambda self: None)


def test_the_mean_size_is_rho(counted, monkeypatch):
    monkeypatch.setattr(
        condensation, "_condensed", lambda m, t, images, ids, plan, seed: condensation.medoids(m, t, images, ids)
    )
    monkeypatch.setattr(condensation, "reduced", _untyped(reduced))
    expected_size_is_rho()
    expected_size_is_rho(m=11, p=0.01)


def test_dropping_the_residual_is_caught(counted, monkeypatch):
    def short(model, task, splits, ids, plan):
        whole = _untyped(reduced)(model, task, splits, ids, plan)
        return whole[slice(0, len(whole) // 2)]

    monkeypatch.setattr(
        condensation, "_condensed", lambda m, t, images, ids, plan, seed: condensation.medoids(m, t, images, ids)
    )
    monkeypatch.setattr(condensation, "reduced", short)
    with pytest.raises(AssertionError):
        expected_size_is_rho()


def _untyped(function):
    """The function without the check of its argument types: this law needs no model."""
    return getattr(function, "__wrapped__", function)


def test_medoids_are_real_images(setting):
    model, task, splits = setting
    found = reduced(model, task, splits, buckets(model, task, training_images(splits), 3), PLANS[4])
    at = {int(i): n for n, i in enumerate(splits.retain.index)}
    assert all(torch.equal(x, splits.retain.x[at[int(i)]]) for x, i in zip(found.x, found.index, strict=True))


def test_batchnorm_does_not_move(setting):
    splits = request()
    model, task = normed().train(), Task()
    before = copy.deepcopy(model.state_dict())
    for plan in PLANS:
        plan(model, task, splits, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training


# The schedule.


def test_the_order_of_the_alternating_schedule():
    rows = alternating_schedule(epochs=4, hold=2, final_steps=7).stages
    assert [row.parts[0] for row in rows] == [
        "beginning",
        "final",
        "beginning",
        "final",
        "beginning",
        "beginning",
        "intermediate",
    ]
    assert [row.epochs for row in rows if row.data == "remember"] == [7, 7]
    assert (
        len(PUBLISHED_SCHEDULES["mlp"].stages) == 46
        and not PUBLISHED_SCHEDULES["cnn"].fresh
        and PUBLISHED_SCHEDULES["vgg16"].stages[0].batch_size == 256
    )


def only_the_active_part_moves(fresh, monkeypatch):
    """Tensors and optimizer state of every other part are the same bits before and after each row."""
    splits, task, seen = request(), Task(), {}
    snapshots = []
    inner = training.descend

    def watched(model, optimizer, images, **options):
        part = next(p for p in task.parts if any(q is own for own in model.get_submodule(p).parameters() for q in optimizer.param_groups[0]["params"]))  # fmt: skip
        before = copy.deepcopy(model.state_dict())
        others = {p: copy.deepcopy(o.state_dict()["state"]) for p, o in seen.items() if p != part}
        inner(model, optimizer, images, **options)
        seen[part] = optimizer
        held = {id(p) for p in optimizer.param_groups[0]["params"]}
        assert held == {id(p) for p in model.get_submodule(part).parameters()}, "the optimizer holds other parts"
        for name, value in model.state_dict().items():
            moved = not torch.equal(value, before[name])
            assert not moved or name.startswith(part), f"{name} moved while {part} was trained"
        for other, state in others.items():
            now = seen[other].state_dict()["state"]
            assert all(torch.equal(now[i][k], state[i][k]) for i in state for k in state[i])
        assert any(not torch.equal(v, before[n]) for n, v in model.state_dict().items() if n.startswith(part))
        snapshots.append(part)

    monkeypatch.setattr("repedit.vision.training.descend", watched)
    sets = {"reduced": splits.retain, "remember": splits.remember}
    train_scheduled(normed(), task, alternating_schedule(epochs=2, hold=1, final_steps=2, fresh=fresh), sets)
    assert snapshots == ["beginning", "final", "beginning", "intermediate"]


@pytest.mark.parametrize("fresh", [True, False])
def test_parts_that_do_not_learn_keep_their_bits(fresh, monkeypatch):
    only_the_active_part_moves(fresh, monkeypatch)


def test_one_optimiser_for_all_parts_is_caught(monkeypatch):
    monkeypatch.setattr(
        "repedit.vision.training.adam", lambda model, task, parts, lr: torch.optim.Adam(model.parameters(), lr=lr)
    )
    with pytest.raises(AssertionError, match="the optimizer holds other parts"):
        only_the_active_part_moves(False, monkeypatch)


def test_train_mode_in_every_part_is_caught(monkeypatch):
    from contextlib import contextmanager

    from repedit.vision import training as schedule

    inner = schedule.learning

    @contextmanager
    def loud(model, task, parts, seed):
        with inner(model, task, parts, seed):
            model.train()
            yield

    monkeypatch.setattr(schedule, "learning", loud)
    with pytest.raises(AssertionError, match=r"(running_mean|running_var|num_batches_tracked) moved while"):
        only_the_active_part_moves(True, monkeypatch)


def test_a_kept_optimiser_goes_on_where_it_stopped():
    splits, task = request(), Task()
    sets = {"reduced": splits.retain, "remember": splits.remember}
    fresh, kept = (
        train_scheduled(
            normed(), task, alternating_schedule(epochs=3, hold=0, final_steps=2, fresh=f), sets
        ).final.weight
        for f in (True, False)
    )
    assert not torch.equal(fresh, kept)


def test_offline_resets_the_final_part_and_is_timed_apart():
    splits = request()
    model, task = original(splits, epochs=1)
    quick = alternating_schedule(epochs=1, hold=0, final_steps=1)
    delta = condense(
        model, task, splits, plan=PLANS[3], schedule=quick, offline=offline_schedule(rounds=2, epochs=1, batch_size=64)
    )
    plain = condense(model, task, splits, plan=PLANS[3], schedule=quick)
    assert delta.provenance["seconds"]["offline"] > 0 and plain.provenance["seconds"]["offline"] == 0
    assert not torch.equal(delta.tensors["final.weight"], plain.tensors["final.weight"])
    assert [row.reset for row in offline_schedule(rounds=1).stages] == [True, False]
    sets = {"remember": splits.remember, "all": training_images(splits)}
    once = Schedule((Stage(("final",), "remember", 1, 1e-3),))
    reset = Schedule((*once.stages, Stage(("final",), "remember", 1, 1e-3, reset=True)))
    assert torch.equal(*(train_scheduled(model, task, s, sets).final.weight for s in (once, reset)))


# The recipe.


def test_a_class_that_retain_lacks_is_not_remembered(caplog):
    splits = request(label=1)
    model, task = original(splits, epochs=1)
    with caplog.at_level(logging.WARNING):
        delta = condense(
            model, task, splits, plan=PLANS[3], schedule=alternating_schedule(epochs=1, hold=0, final_steps=1)
        )
    assert delta.provenance["dropped_from_remember"] == [1] and "the classes [1] are not in retain" in caplog.text
    assert 1 in splits.remember.classes and 1 not in condensing.remembered(splits)[0].classes
    assert delta.provenance["reduced"] == 9 and delta.provenance["schedule"]["stages"][0]["parts"] == ["beginning"]


def test_condense_needs_images_to_remember():
    splits = request()
    model, task = original(splits, epochs=1)
    with pytest.raises(DataError, match=r"condense needs images to remember, and splits.remember is None"):
        condense(model, task, replace(splits, remember=None))
    alien = splits.remember[splits.remember.y == 1]
    with pytest.raises(DataError, match=r"remember has the classes \[1\], none of which retain has"):
        condense(model, task, replace(splits, remember=alien))


def test_a_condensed_model_learns_its_intermediate_part_alone():
    splits = request()
    model, task = original(splits, epochs=20)
    fresh = small_cnn(splits.retain, width=4, hidden=12, labels=4, seed=7).intermediate
    found = condensed_model(model, task, splits, fresh, plan=Condense(k=4, steps=5), epochs=100, lr=3e-3)
    before, after = tensors_of(model), tensors_of(found)
    assert all(torch.equal(after[n], before[n]) == (not n.startswith("intermediate")) for n in after)
    assert task.accuracy(found, splits.test) > 0.9 and not torch.equal(fresh[0].weight, found.intermediate[0].weight)
    several = Task("final", {"beginning": ("beginning",), "intermediate": ("intermediate.0", "intermediate.4"), "final": ("final",)})  # fmt: skip
    with pytest.raises(ArgumentError, match="the intermediate part is made of 2 modules"):
        condensed_model(model, several, splits, fresh)


def test_a_small_class_gets_fewer_clusters_and_is_named(setting, caplog):
    model, task, splits = setting
    images = splits.retain[splits.retain.y == 0][slice(0, 3)] + splits.retain[splits.retain.y == 1]
    with caplog.at_level(logging.WARNING):
        ids = buckets(model, task, images, 5)
    assert "k=5 is above the size of 1 classes" in caplog.text and "{0: 3}" in caplog.text
    assert sorted(ids.unique().tolist()) == list(range(8))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Condense(k=0), ArgumentError, "k=0; give at least 1, a whole number"),
        (
            lambda: Condense(method="fmd"),
            UnknownName,
            "method='fmd'; did you mean 'fdm'.*valid are fdm, medoid, inversion",
        ),
        (lambda: Condense(contaminated="drop"), UnknownName, "contaminated='drop'.*residual, recondense"),
        (lambda: Condense(weights="sum"), UnknownName, "weights='sum'.*free, simplex"),
        (lambda: alternating_schedule(epochs=3, hold=4), ArgumentError, "hold=4 with epochs=3"),
        (lambda: Stage(("begin",), "all", 1, 1e-3), UnknownName, "names 'begin'; did you mean 'beginning'"),
        (lambda: Stage(("final",), "all", 0, 1e-3), ArgumentError, "epochs=0"),
    ],
)
def test_choices_that_cannot_work_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_reduced_set_needs_one_bucket_an_image(setting):
    model, task, splits = setting
    with pytest.raises(ShapeError, match="3 buckets for 108 retain and 12 forget images"):
        reduced(model, task, splits, torch.arange(3), Condense())


def test_a_schedule_without_its_images_is_refused():
    with pytest.raises(DataError, match="stage 0 of the schedule trains on 'reduced', which has no images"):
        train_scheduled(normed(), Task(), alternating_schedule(), {"remember": request().remember})


def test_same_seed_same_bits():
    splits = request()
    model, task = original(splits, epochs=1)
    state = torch.random.get_rng_state()
    quick = alternating_schedule(epochs=1, hold=0, final_steps=1)
    first, second = (
        condense(model, task, splits, plan=Condense(k=3, steps=5), schedule=quick, seed=4) for _ in range(2)
    )
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
    assert torch.equal(state, torch.random.get_rng_state())
