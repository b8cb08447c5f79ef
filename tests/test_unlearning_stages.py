"""Laws of recipes of several trainings: blocks alone, noise in its span, folds that grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import repedit as rp
from repedit.delta import Delta
from repedit.errors import ArgumentError, DataError, NotEnoughRows, SelectionError, TrainingError, UnknownName
from repedit.unlearning import api, noise
from repedit.unlearning.noise import Noise
from repedit.unlearning.parameters import Parameters, TrainableCopy
from repedit.unlearning.recipe import Stage, StagedRecipe
from repedit.unlearning.schedule import metric
from tests.teachable_models import facts as likes
from tests.unlearning_cases import subject, training

SETS = {"forget": likes(0, 6), "retain": likes(6, 14)}
QUICK = {"batch_size": 3, "lr": 1e-3}


def blocks(**options) -> StagedRecipe:
    """Blocks of one layer, two rounds of two steps."""
    return rp.recipes.block_by_block(**({"size": 1, "rounds": 2, "repair_steps": 2, "steps": 2} | QUICK | options))


def undone(**options) -> StagedRecipe:
    """Unlearning, then noise in layer 0."""
    found = rp.recipes.undo(layers="0", **(QUICK | {"steps": 2} | options))
    return found.changed(lambda part: replace(part, steps=2, batch_size=3))


def layers_of(delta: Delta) -> set[str]:
    return {name.split(".")[2] for name in delta.tensors}


def trainings(recipe: StagedRecipe, monkeypatch, **options):
    """(the delta, [(start, reference, recipe, delta of the training, forget, retain) of each training])."""
    seen = []
    honest = api._unlearn

    def train(start, part, data, settings, *files):
        delta = honest(start, part, data, settings, *files)
        seen.append((start, settings["reference"], part, delta, data["forget"], data["retain"]))
        return delta

    monkeypatch.setattr(api, "_unlearn", train)
    lm = options.pop("model", None) or subject()
    return rp.unlearn(lm, recipe=recipe, progress=False, **(SETS | options)), seen, lm


# --- Blocks


def blocks_stand_in_the_original(monkeypatch, recipe=None):
    """In a training of a block, everything else is the original, and only the block moves."""
    whole, seen, lm = trainings(recipe or blocks(repair_steps=0), monkeypatch)
    assert len(seen) == 4
    for number, (start, _, _, delta, _, _) in enumerate(seen):
        block = str(number % 2)
        assert layers_of(delta) == {block}, "another block moved"
        others = [n for n, _ in lm.model.named_parameters() if f"layers.{block}." not in n]
        assert all(torch.equal(start.value(n), lm.value(n)) for n in others), "the rest is not the original"
    ends = {name: seen[i][0].value(name) + v for i in (2, 3) for name, v in seen[i][3].tensors.items()}
    edited = rp.apply(whole, lm)
    assert set(whole.tensors) == set(ends)
    for name, value in ends.items():
        torch.testing.assert_close(edited.value(name), value, rtol=0, atol=1e-14)


def test_a_block_is_trained_inside_the_original(monkeypatch):
    blocks_stand_in_the_original(monkeypatch)


def test_blocks_one_on_top_of_the_other_are_caught(monkeypatch):
    honest = blocks(repair_steps=0)
    stacked = lambda depth: tuple(replace(s, after=tuple(range(i))) for i, s in enumerate(honest.stages(depth)))  # noqa: E731
    with pytest.raises(AssertionError, match="not the original"):
        blocks_stand_in_the_original(monkeypatch, replace(honest, stages=stacked))


def test_a_training_of_everything_is_caught(monkeypatch):
    everything = blocks(repair_steps=0).changed(lambda part: replace(part, parameters=Parameters()))
    with pytest.raises((AssertionError, IndexError)):
        blocks_stand_in_the_original(monkeypatch, everything)


def test_the_repair_starts_from_all_blocks_and_compares_with_the_original(monkeypatch):
    whole, seen, lm = trainings(blocks(), monkeypatch)
    start, reference, part, delta, _, _ = seen[-1]
    assert reference is lm and part.roles == ("retain",) and part.steps == 2
    assert layers_of(delta) == {"0", "1"} and delta.log[0]["losses"]["kl retain"] > 0
    name = "model.layers.1.mlp.up_proj.weight"
    moved = [seen[i][3].tensors[name] for i in (1, 3)]
    torch.testing.assert_close(start.value(name) - lm.value(name), sum(moved), rtol=0, atol=1e-14)
    assert [record["method"] for record in whole.provenance["stages"]] == ["block_by_block"] * 4 + ["repair"]


def test_a_block_stops_once_it_forgets(monkeypatch):
    _, seen, _ = trainings(blocks(until=0.1, repair_steps=0), monkeypatch)
    assert [delta.provenance["stopped"]["rule"] for *_, delta, _, _ in seen] == ["loss_above"] * 4
    assert all(len(delta.log) == 1 for *_, delta, _, _ in seen)


def test_blocks_cover_the_layers():
    found = rp.recipes.block_by_block(layers="1-7", size=3, rounds=2).stages(8)
    assert [s.recipe.parameters.layers for s in found] == [*["1,2,3", "4,5,6", "7"] * 2, "1,2,3,4,5,6,7"]
    assert [s.after for s in found] == [(), (), (), (0,), (1,), (2,), (0, 1, 2, 3, 4, 5)]


# --- Noise


LOUD = Noise(0.5, 1.0)


def noise_stays_in_its_span(chosen=LOUD):
    """Inputs orthogonal to the span see the old weights; in the span they are shrunk and noised."""
    lm = subject()
    recipe = rp.recipes.grad_diff(parameters=Parameters("0-1", ("mlp.out",)))
    data = training(recipe, lm, **SETS).data
    trainable = TrainableCopy(lm, recipe.parameters)
    bases = noise.add_noise(trainable, chosen, data.rows["forget"], data.rows["retain"], 0)
    assert set(bases) == set(trainable.tensors)
    for name, basis in bases.items():
        change, old = trainable.differences()[name], lm.value(name)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(6).to(basis), rtol=0, atol=1e-10)
        outside = change - change @ basis @ basis.mT
        assert float(outside.norm()) <= 1e-10 * float(change.norm()), "noise leaves its span"
        added = (change @ basis + chosen.shrink * old @ basis) / (chosen.shrink * chosen.scale)
        assert float(added.square().mean().sqrt() / old.square().mean().sqrt()) == pytest.approx(1.0, rel=0.2)
    return bases


def test_noise_stays_in_its_span():
    noise_stays_in_its_span()


def test_noise_everywhere_is_caught(monkeypatch):
    def everywhere(weight, basis, chosen, generator):
        return chosen.scale * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)

    monkeypatch.setattr(noise, "_damage", everywhere)
    with pytest.raises(AssertionError, match="leaves its span"):
        noise_stays_in_its_span()


def test_the_span_is_that_of_the_keys():
    """C^-1 K by hand, with the neurons at the last token of each name."""
    basis = noise_stays_in_its_span(Noise(ridge=0.1))["model.layers.0.mlp.down_proj.weight"]
    lm = subject()
    rows = training(rp.recipes.grad_diff(), lm, **SETS).data.rows
    seen = []
    handle = lm.model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda m, x: seen.append(x[0].detach()[0])
    )
    for row in (*rows["forget"], *rows["retain"]):
        lm.model(row.input_ids)
    handle.remove()
    keys = torch.stack([x[row.entity[0]][0] for x, row in zip(seen, rows["forget"], strict=False)]).mT
    x = torch.cat([x[1:] for x in seen[len(rows["forget"]) :]])
    moment = x.mT @ x / len(x)
    expected = torch.linalg.qr(torch.linalg.solve(moment + 0.1 * moment.diagonal().mean() * torch.eye(96).to(x), keys))[
        0
    ]
    torch.testing.assert_close(basis @ basis.mT, expected @ expected.mT, rtol=1e-8, atol=1e-8)


def test_distillation_is_from_the_edited_model(monkeypatch):
    whole, seen, _ = trainings(undone(), monkeypatch)
    (_, _, _, first, *_), (start, reference, part, second, *_) = seen
    assert reference is None and part.noise == Noise(0.5, 0.1), "the reference is the start of the stage"
    assert set(second.tensors) == {"model.layers.0.mlp.down_proj.weight"} and second.log[0]["losses"]["kl retain"] > 0
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(whole.tensors[name], first.tensors[name]) and start.fingerprint() != subject().fingerprint()


# --- Folds


def folds_grow(monkeypatch):
    """Stage i forgets the first i folds and retains the others, all wordings of a fact together."""
    facts = [replace(f, paraphrases=(f"{f.prompt} always",)) for f in likes(0, 6)]
    recipe = rp.recipes.layered(folds=3, **QUICK, steps=1)
    _, seen, _ = trainings(recipe, monkeypatch, forget=facts)
    sizes, before = [], set()
    for *_, forget, retain in seen:
        (forgotten,), later = forget.values(), retain.get(" later")
        ids = {row.id for row in forgotten.items}
        others = set() if later is None else {row.id for row in later.items}
        assert before < ids and not ids & others and len(ids | others) == 12, "not the folds"
        assert {i.partition("#")[0] for i in ids}.isdisjoint(i.partition("#")[0] for i in others), "a fact is divided"
        assert retain[""] is SETS["retain"]
        sizes.append(len(ids))
        before = ids
    assert sizes == [4, 8, 12]


def test_folds_grow(monkeypatch):
    folds_grow(monkeypatch)


def test_folds_of_wordings_are_caught(monkeypatch):
    monkeypatch.setattr(api, "fact_of", lambda name: name)
    with pytest.raises(AssertionError, match="a fact is divided"):
        folds_grow(monkeypatch)


# --- Together with the rest


RECIPES = {
    "block_by_block": blocks,
    "undo": undone,
    "layered": lambda: rp.recipes.layered(folds=2, **QUICK, steps=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_delta_is_that_of_the_last_model(dtype, monkeypatch):
    """Rounding between the stages is not lost: the last weights come out, and they are rounded once."""
    lm = subject(dtype=dtype)
    whole, seen, _ = trainings(blocks(lr=1e-2), monkeypatch, model=lm)
    start = seen[-1][0]
    for name, change in seen[-1][3].tensors.items():
        last = (start.value(name).float() + change).to(dtype)
        # Sums of float32 differences may differ in the last digit; those of bfloat16 weights are exact.
        within = 1e-7 if dtype == torch.float32 else 0
        torch.testing.assert_close(rp.apply(whole, lm).value(name), last, rtol=within, atol=within)


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    """Broken in the last stage; finished stages are read from their files."""
    options = {**SETS, "progress": False, "checkpoint_every": 1, "log": tmp_path / "log"}
    lm, calls = subject(), []

    def ask(_subject):
        calls.append(1)
        if len(calls) == broken:
            raise KeyboardInterrupt
        return 0.0

    rule, broken = metric(ask, above=1.0, every=1), 0
    whole = rp.unlearn(lm, recipe=RECIPES[name](), stop=(rule,), resume=tmp_path / "a", **options)
    broken = len(calls) - 1
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        rp.unlearn(lm, recipe=RECIPES[name](), stop=(rule,), resume=tmp_path / "b", **options)
    broken = 0
    rest = rp.unlearn(lm, recipe=RECIPES[name](), stop=(rule,), resume=tmp_path / "b", **options)
    for delta, path in ((whole, "one"), (rest, "two")):
        delta.save(tmp_path / path)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert [row["step"] for row in rest.log] == list(range(len(rest.log))) and rest.log[-1]["stage"] > 0
    assert rest.provenance["method"] == name and set(rest.provenance["start"]) == set(rest.tensors)
    other = rp.unlearn(lm, recipe=RECIPES[name](), seed=1, **SETS, progress=False)
    assert not all(torch.equal(v, other.tensors[n]) for n, v in rest.tensors.items() if n in other.tensors)


def test_an_error_in_a_later_stage_keeps_what_was_trained(monkeypatch):
    honest = api._unlearn
    calls = []

    def train(*args):
        calls.append(honest(*args))
        if len(calls) == 2:
            error = TrainingError("as it happens")
            error.delta = calls[-1]
            raise error
        return calls[-1]

    monkeypatch.setattr(api, "_unlearn", train)
    with pytest.raises(TrainingError, match="as it happens") as caught:
        rp.unlearn(subject(), recipe=blocks(), progress=False, **SETS)
    assert layers_of(caught.value.delta) == {"0", "1"} and len(caught.value.delta.provenance["stages"]) == 2


def test_recipe_files_name_them(tmp_path):
    def read(text):
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return rp.recipes.read(path)

    found = read('base = "block_by_block"\nlr = 1\n[options]\nsize = 4\nrounds = 1\n[optimizer]\nname = "sgd"')
    assert isinstance(found, StagedRecipe) and found.name == "mine" and len(found.example) == 9
    assert found.parts[0].lr == 1.0 and found.parts[0].optimizer.name == "sgd" and found.plain()["size"] == 4
    assert read('base = "undo"\n[options]\ninner = "small:rmu"').parts[0].name == "rmu"
    assert read('base = "npo_gdr"\n[noise]\nshrink = 1').noise == Noise(1.0)
    with pytest.raises(UnknownName, match="which has several trainings, has no key 'terms'"):
        read('base = "layered"\n[[terms]]\nloss = "nll"\nrole = "retain"')


MATRICES = Parameters("0", ("mlp.out",))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: rp.recipes.block_by_block(size=0), ArgumentError, "size=0"),
        (lambda: rp.recipes.block_by_block(repair_steps=-1), ArgumentError, "repair_steps=-1"),
        (lambda: rp.recipes.layered(folds=1), ArgumentError, "folds=1"),
        (lambda: rp.recipes.layered(inner="npo"), ArgumentError, "recipe 'npo' retains nothing"),
        (lambda: rp.recipes.layered(inner="zju_merge"), UnknownName, "'zju_merge' has several"),
        (lambda: rp.recipes.undo(inner="layered"), UnknownName, "'layered' has several"),
        (
            lambda: rp.recipes.by_name("small:undo"),
            UnknownName,
            "modifies a single training, 'undo' consists of several",
        ),
        (lambda: Noise(shrink=0.0), ArgumentError, "shrink=0.0"),
        (lambda: rp.recipes.ga(noise=Noise()), ArgumentError, "noise spares what retain rows use"),
        (
            lambda: rp.unlearn(subject(), recipe=blocks(), forget=None),
            DataError,
            "recipe 'block_by_block' needs a forget set and none was given",
        ),
        (
            lambda: rp.unlearn(subject(), recipe=blocks(), parameters=Parameters(), **SETS),
            ArgumentError,
            "parameters was given and recipe 'block_by_block' chooses them for each of its trainings",
        ),
        (
            lambda: rp.unlearn(subject(), recipe=rp.recipes.layered(folds=7), progress=False, **SETS),
            NotEnoughRows,
            "6 facts cannot be divided into 7 folds",
        ),
        (
            lambda: rp.unlearn(
                subject(), recipe=rp.recipes.layered(), forget=["some text", "other text"], retain=likes(6)
            ),
            DataError,
            "is running text; folds need rows",
        ),
        (
            lambda: rp.unlearn(subject(), recipe=rp.recipes.grad_diff(noise=Noise(), parameters=Parameters()), **SETS),
            SelectionError,
            "noise works on the weights of linear modules",
        ),
        (
            lambda: rp.unlearn(
                subject(),
                recipe=rp.recipes.grad_diff(noise=Noise(), parameters=MATRICES),
                forget=[replace(f, entity="") for f in likes(0, 6)],
                retain=likes(6),
            ),
            DataError,
            "noise needs the last token of an entity",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_stage_can_be_written_by_hand():
    recipe = StagedRecipe("mine", lambda depth: (Stage(rp.recipes.grad_diff(steps=1, **QUICK)),))
    delta = rp.unlearn(subject(), recipe=recipe, progress=False, **SETS)
    assert delta.provenance["method"] == "mine" and len(delta.log) == 1
