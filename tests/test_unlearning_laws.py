"""Laws of the loop: batches may be split, masks hold, the subject is never touched, a run can be resumed."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

import repedit as rp
from repedit.data import Row
from repedit.errors import CheckpointError, FingerprintError, NoOpEdit, TrainingError
from repedit.io import archive
from repedit.unlearning import losses, schedule, trainer
from repedit.unlearning.combiners import weighted_sum
from repedit.unlearning.forget_gradient import CommonPart, LeadingDirections
from repedit.unlearning.masks import neuron_mask, saliency
from repedit.unlearning.parameters import Lora, Mask, Parameters, TrainableCopy
from repedit.unlearning.recipe import OptimizerConfig, Term, UnlearnRecipe
from repedit.unlearning.recipes import RECIPES, sure
from repedit.unlearning.sampling import Exchange
from tests.unlearning_cases import gradient, rows, sides, subject, training, values

ALL = Parameters()
UPDATE = tuple(Row(row.prompt, "figs", f"new {row.id}") for row in rows(0, 3))


def sets_of(recipe):
    """The sets a recipe needs, small."""
    return {"forget": rows(0, 6), "retain": rows(6, 12)} | ({"update": UPDATE} if "update" in recipe.roles else {})


def flat(name):
    """A recipe by name with settings of a test; of a merged one its first part."""
    found = RECIPES[name]()
    found = found if isinstance(found, UnlearnRecipe) else found.parts[0]
    settings = {"batch_size": 6, "lr": 1e-3, "length": 64, "epochs": 1.0}
    if found.gradient_filter is None:  # these rows name no entity
        return replace(found, parameters=ALL, exchange=Exchange(reverse=False), **settings)
    small = CommonPart(2, 2) if isinstance(found.gradient_filter, CommonPart) else LeadingDirections(3)
    return replace(found, gradient_filter=small, **settings)


@pytest.mark.parametrize("name", RECIPES)
def test_micro_batches_add_up(name):
    micro_batches_add_up(name)


def micro_batches_add_up(name):
    """The gradient of a step does not depend on how many rows a forward pass takes."""
    recipe = flat(name)
    whole, parts = (gradient(recipe, micro_batch=size, **sets_of(recipe)) for size in (6, 2))
    assert float((whole - parts).norm() / whole.norm()) <= 1e-6, "the split shows"
    assert float(whole.norm()) > 0


@pytest.mark.parametrize("name", ["grad_diff", "blur_npo", "surgery"])
def test_keeping_the_last_micro_batch_alone_is_caught(name, monkeypatch):
    """A published fault: of four micro-batches only the last enters the gradient."""
    honest = trainer.Training._forward

    def forgetful(self, *args):
        for p in self.parameters:
            p.grad = None
        return honest(self, *args)

    monkeypatch.setattr(trainer.Training, "_forward", forgetful)
    with pytest.raises(AssertionError, match="the split shows"):
        micro_batches_add_up(name)


def test_a_division_by_the_micro_batch_is_caught(monkeypatch):
    honest = trainer._weighted_loss

    def own(seen, active, units, *rest):
        return honest(seen, active, {unit: max(1, n // 3) for unit, n in units.items()}, *rest)

    monkeypatch.setattr(trainer, "_weighted_loss", own)
    # The rows have unlike lengths, so means of means differ from the mean.
    with pytest.raises(AssertionError, match="not the gradient"):
        surgery_is_a_hand_sum()


def surgery_is_a_hand_sum():
    """.1, .1, 2 and .5 times the four losses, over the rows of each role."""
    recipe = replace(flat("surgery"), optimizer=OptimizerConfig("sgd"))
    whole = gradient(recipe, **sets_of(recipe))
    lm = subject()
    total = None
    for role, loss, weight in (
        ("forget", losses.negative_nll(), 0.1), ("outdated", losses.negative_nll(), 0.1), ("update", losses.nll(), 2.0),
        ("retain", losses.cross_entropy_to_reference(), 0.5),
    ):  # fmt: skip
        run = training(recipe, lm, **sets_of(recipe))
        held = run.data.rows[role]
        seen = run._forward(role, range(len(held)), [Term(loss, role)])
        (weight * loss.sum(seen) / int(seen.labels.sum())).backward()
        part = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in run.parameters]
        )
        total = part if total is None else total + part
    assert float((whole - total).norm() / total.norm()) <= 1e-6, "not the gradient"


def test_surgery_is_a_hand_sum():
    surgery_is_a_hand_sum()


def test_surgery_splits_the_forget_set():
    run = training(flat("surgery"), **sets_of(flat("surgery")))
    assert {role: len(held) for role, held in run.data.rows.items()} == {
        "forget": 3,
        "outdated": 3,
        "retain": 6,
        "update": 3,
    }


def forwards_of(**weights):
    """Forward passes of a step of surgery."""
    recipe = replace(RECIPES["surgery"](**weights), batch_size=6, steps=1, stop=(), lr=1e-3)
    run = training(recipe, **sets_of(recipe))
    run.run(after_step=lambda: None, progress=False)
    return run.forwards


def test_a_weight_of_zero_skips_the_forward():
    assert forwards_of() == 4
    assert forwards_of(retain=0.0) == 3 and forwards_of(outdated=0.0, update=0.0) == 2


@pytest.mark.parametrize(
    ("name", "passes"), [("grad_diff", 0), ("wga", 0), ("sim_npo", 0), ("npo_gdr", 1), ("ga_kl", 3), ("dpo", 2)]
)
def test_references_are_read_only_where_needed(name, passes):
    run = training(replace(flat(name), steps=3, stop=()), **sets_of(flat(name)))
    run.run(after_step=lambda: None, progress=False)
    assert run.reference.passes == passes


def test_the_reference_is_a_deep_copy_without_the_copy():
    """After steps that moved the weights, the reference still gives what the start gave."""
    import copy

    lm = subject()
    twin = copy.deepcopy(lm.model)
    run = training(replace(flat("ga_kl"), steps=3), lm, **sides())
    run.run(after_step=lambda: None, progress=False)
    batch = run.data.rows["forget"][0]
    expected = twin(input_ids=batch.input_ids).logits.detach()
    assert float((run.reference.logits(batch) - expected).abs().max()) <= 1e-12
    assert run.reference.subject.model.lm_head.weight is lm.model.lm_head.weight
    assert not torch.equal(run.trainable.subject.model(input_ids=batch.input_ids).logits, expected)


# What moves and what does not


def masked_rows_stay():
    """20 steps of AdamW with weight decay .1: all that the mask forbids is bit-identical."""
    lm = subject(dtype=torch.float32)
    names = Parameters(modules=("mlp.down_proj",)).select(lm)
    half = torch.arange(48)[:, None] % 2 == 0
    parameters = Parameters(modules=("mlp.down_proj",), mask=Mask({names[0]: half}))
    recipe = replace(flat("grad_diff"), parameters=parameters, optimizer=OptimizerConfig(weight_decay=0.1), steps=20)
    run = training(recipe, lm, **sides())
    run.run(after_step=lambda: None, progress=False)
    found = run.trainable.differences()
    assert set(found) == {names[0]}, "a tensor moved that the mask does not hold"
    assert not found[names[0]][1::2].any(), "masked rows moved"
    assert bool(found[names[0]][::2].any())


def test_masked_rows_stay():
    masked_rows_stay()


def test_masking_the_gradient_alone_is_caught(monkeypatch):
    monkeypatch.setattr(TrainableCopy, "restore_masked", lambda self: None)
    with pytest.raises(AssertionError, match="moved"):
        masked_rows_stay()


@pytest.mark.parametrize("layers", ["1", "last 1", "0-1"])
def test_unselected_tensors_stay(layers):
    lm = subject(dtype=torch.float32)
    parameters = Parameters(layers, ("mlp.down_proj", "attn.out"))
    delta = rp.unlearn(lm, recipe=rp.recipes.grad_diff(optimizer=OptimizerConfig(weight_decay=0.1)), **sides(), parameters=parameters,
                       steps=20, batch_size=6, lr=1e-3, progress=False)  # fmt: skip
    chosen = (0, 1) if layers == "0-1" else (1,)
    assert set(delta.tensors) == {
        f"model.layers.{i}.{m}.weight" for i in chosen for m in ("mlp.down_proj", "self_attn.o_proj")
    }
    after = dict(rp.apply(delta, lm).model.named_parameters())
    for name, p in lm.model.named_parameters():
        assert (after[name] is p) == (name not in delta.tensors)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saliency_selects_a_tenth_of_the_units(family):
    parameters = Parameters(modules=("mlp.out", "attn.out"))
    mask = saliency(subject(family), rows(), parameters=parameters)
    chosen, total = mask.provenance["chosen"], mask.provenance["units"]
    # Two matrices a layer; GPT-2 has a bias to each, every entry of which is a unit.
    assert total == 2 * 2 * 48 and abs(chosen / total - 0.1) <= 1 / total + 1e-9
    assert sum(int(m.sum()) for m in mask.tensors.values()) == chosen


def test_saliency_by_hand():
    """Norms of the gradient of the mean NLL over the whole set, by output row."""
    lm = subject()
    mask = saliency(lm, rows(), percentile=75.0, parameters=Parameters("1", ("mlp.down_proj",)), batch_size=2)
    recipe = UnlearnRecipe(
        "nll", (Term(losses.nll(), "forget"),), parameters=Parameters("1", ("mlp.down_proj",)), batch_size=6
    )
    by_hand = gradient(recipe, forget=rows()).reshape(48, 96).norm(dim=1)
    assert set(by_hand.topk(12).indices.tolist()) == set(
        mask.tensors["model.layers.1.mlp.down_proj.weight"].nonzero()[:, 0].tolist()
    )


def test_saliency_of_modules():
    mask = saliency(subject("gpt2"), rows(), unit="module", percentile=50.0, parameters=Parameters("0-1"))
    held = mask.tensors
    for name in held:
        if name.endswith(".bias"):
            assert bool(held[name]) == bool(held[name.removesuffix("bias") + "weight"])
    assert mask.provenance["units"] == 12 and mask.provenance["chosen"] == 6


def test_sure_trains_only_what_it_picked():
    recipe = sure(rp.recipes.npo_gdr(), percentile=90.0)
    delta = rp.unlearn(subject(dtype=torch.float32), recipe=recipe, **sides(), steps=3, batch_size=6, lr=1e-3, progress=False,
                       parameters=Parameters("0-1", ("mlp.down_proj",)))  # fmt: skip
    moved = sum(int(v.any(1).sum()) for v in delta.tensors.values())
    picked = delta.provenance["options"]["parameters"]["mask"]
    assert moved == picked["chosen"] <= 0.1 * picked["units"] + 1


def test_neurons_train_their_own_weights_alone():
    lm = subject(dtype=torch.float32)
    keep = {rp.Site.parse("1.mlp.neurons"): torch.arange(96) != 7}
    recipe = replace(flat("grad_diff"), steps=4, parameters=Parameters(mask=neuron_mask(keep, lm)))
    run = training(recipe, lm, **sides())
    run.run(after_step=lambda: None, progress=False)
    found = run.trainable.differences()
    assert set(found) == {f"model.layers.1.mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")}
    assert found["model.layers.1.mlp.down_proj.weight"].any(0).nonzero()[:, 0].tolist() == [7]
    assert found["model.layers.1.mlp.up_proj.weight"].any(1).nonzero()[:, 0].tolist() == [7]


def test_tied_embeddings_are_one_tensor():
    from tests.teachable_models import blank

    lm = blank("llama", tie_word_embeddings=True)
    delta = rp.unlearn(lm, recipe=rp.recipes.grad_diff(), **sides(), steps=2, batch_size=6, lr=1e-3, progress=False)
    assert "model.embed_tokens.weight" in delta.tensors and "lm_head.weight" not in delta.tensors
    after = rp.apply(delta, lm).model
    assert after.lm_head.weight is after.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_give_a_dense_delta(family):
    lm = subject(family, torch.float32)
    before = values(lm)
    options = {
        "steps": 4,
        "batch_size": 6,
        "lr": 1e-2,
        "progress": False,
        "parameters": Parameters("1", lora=Lora(2, 4, ("mlp.c_proj", "mlp.down_proj"))),
    }
    delta = rp.unlearn(lm, recipe=rp.recipes.grad_diff(), **sides(), **options)
    ((name, value),) = delta.tensors.items()
    assert name.startswith(("model.layers.1.mlp", "transformer.h.1.mlp")) and int(torch.linalg.matrix_rank(value)) == 2
    assert all(torch.equal(p, before[n]) for n, p in values(lm).items())
    run = training(
        replace(rp.recipes.grad_diff(batch_size=6, lr=1e-2), steps=4, parameters=options["parameters"]),
        lm,
        clip=1.0,
        **sides(),
    )
    run.run(after_step=lambda: None, progress=False)
    ids = run.data.rows["forget"][0].input_ids
    torch.testing.assert_close(
        rp.apply(delta, lm).model(input_ids=ids).logits,
        run.trainable.subject.model(input_ids=ids).logits,
        rtol=1e-4,
        atol=1e-4,
    )


# The subject


def untouched(action):
    """Whatever happens, the subject keeps its bytes, its flags and no hooks."""
    lm = subject(dtype=torch.float32)
    lm.model.train()
    before, flags = lm.fingerprint(), [p.requires_grad for p in lm.model.parameters()]
    with contextlib.suppress(TrainingError, KeyboardInterrupt):
        action(lm)
    assert lm.fingerprint() == before and lm.model.training, "the subject changed"
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    assert all(p.grad is None for p in lm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules()), "hooks are left"


def run_it(lm, fail=None):
    """Three steps of RMU, which reads hidden states; interrupted in the second if asked to."""
    from repedit.unlearning.schedule import metric

    def interrupt(_subject):
        raise fail

    stop = (metric(interrupt, above=1.0, every=2),) if fail else ()
    recipe = replace(flat("rmu"), steps=3)
    return rp.unlearn(lm, recipe=recipe, **sides(), stop=stop, progress=False)


@pytest.mark.parametrize("fail", [None, KeyboardInterrupt(), TrainingError("as it happens")], ids=repr)
def test_the_subject_is_untouched(fail):
    untouched(lambda lm: run_it(lm, fail))


def test_a_trainee_that_shares_its_weights_is_caught(monkeypatch):
    honest = torch.Tensor.to

    def shared(self, *args, copy=False, **kwargs):
        return honest(self, *args, **kwargs)

    def action(lm):
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "to", shared)
            rp.unlearn(lm, recipe=replace(flat("ga"), steps=2), forget=rows(), progress=False)

    with pytest.raises((AssertionError, NoOpEdit), match=r"the subject changed|changes nothing"):
        untouched(action)


def test_the_same_seed_is_bitwise_the_same():
    first, again, other = (
        rp.unlearn(
            subject(dtype=torch.float32),
            recipe=rp.recipes.blur_npo(),
            **sides(),
            steps=4,
            batch_size=2,
            lr=1e-3,
            seed=seed,
            progress=False,
        )
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(v, again.tensors[n]) for n, v in first.tensors.items())
    assert dict(first.provenance) == dict(again.provenance)
    assert not all(torch.equal(v, other.tensors[n]) for n, v in first.tensors.items())


class Halt(Exception):
    """A break in the middle."""


@pytest.mark.parametrize("name", ["blur_npo", "primal_dual", "adaptive_rmu"])
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    from repedit.unlearning.schedule import metric

    recipe = replace(flat(name), batch_size=2, steps=6)
    options = {**sides(), "lr": 1e-3, "progress": False}
    whole = rp.unlearn(subject(), recipe=recipe, **options)
    files = {"resume": tmp_path / "state", "checkpoint_every": 3}
    broken = True

    def ask(_subject):
        if broken:
            raise Halt
        return 0.0

    rule = metric(ask, above=1.0, every=4)
    with pytest.raises(Halt):
        rp.unlearn(subject(), recipe=recipe, stop=(rule,), **files, **options)
    broken = False
    rest = rp.unlearn(subject(), recipe=recipe, stop=(rule,), **files, **options)
    assert [r["step"] for r in rest.log] == list(range(6))
    assert all(torch.equal(v, rest.tensors[n]) for n, v in whole.tensors.items())


def test_a_state_of_an_earlier_version_is_resumed(tmp_path):
    """Its optimizer state has another spelling, and was a file of any name before it was in a folder."""
    options = {**sides(), "recipe": replace(flat("blur_npo"), batch_size=2), "lr": 1e-3, "progress": False}
    whole = rp.unlearn(subject(), steps=6, **options)
    recipe = replace(options.pop("recipe"), steps=6, stop=(schedule.steps(3),))
    rp.unlearn(subject(), recipe=recipe, resume=tmp_path, **options)
    path = tmp_path / "training.safetensors"
    tensors, header = archive.read(path, "training")
    old = {name.replace("optimizer/", "optimiser/"): value for name, value in tensors.items()}
    header["key"]["options"]["stop"] = []
    rest = {name: value for name, value in header.items() if name not in ("kind", "format")}
    archive.write(path, "training", old, rest | {"parts": sorted(old)})
    resumed = rp.unlearn(subject(), recipe=replace(recipe, stop=()), resume=tmp_path, **options)
    assert len(resumed.log) == 6 and set(old) != set(tensors)
    assert all(torch.equal(value, resumed.tensors[name]) for name, value in whole.tensors.items())


def test_resume_refuses_another_seed(tmp_path):
    options = {
        **sides(),
        "recipe": replace(flat("ga"), steps=2),
        "resume": tmp_path / "state",
        "progress": False,
    }
    rp.unlearn(subject(), **options)
    with pytest.raises(FingerprintError, match="differs in seed: seed was 0, it is 1 now"):
        rp.unlearn(subject(), seed=1, **options)


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


DAMAGED = {
    "no weight": lambda t: without(t, next(n for n in t if n.startswith("w/"))),
    "a weight of another shape": lambda t: t | {n: v[:1] for n, v in t.items() if n.startswith("w/") and v.ndim},
    "no state of a parameter": lambda t: {n: v for n, v in t.items() if not n.startswith("optimizer/0/")},
    "no moment": lambda t: without(t, next(n for n in t if n.endswith("exp_avg"))),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_training_state_is_refused(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    from repedit.io.safetensors import read_header

    path = tmp_path / "state" / "training.safetensors"
    options = {**sides(), "recipe": replace(flat("ga"), steps=1), "resume": path.parent, "progress": False}
    rp.unlearn(subject(), **options)
    save_file(DAMAGED[damage](load_file(path)), path, metadata=read_header(path)[1])
    with pytest.raises(CheckpointError, match="is damaged and cannot be read as a saved training state"):
        rp.unlearn(subject(), **options)


# Clipping and precision


def clipped(limit=0.01):
    """Norm of what the optimizer sees."""
    recipe = replace(flat("grad_diff"), combiner=weighted_sum(1.0, 1.0))
    return float(gradient(recipe, clip=limit, **sides()).norm())


def test_the_combined_gradient_is_clipped():
    assert clipped() == pytest.approx(0.01, rel=1e-3) and clipped(None) > 0.1


def test_clipping_before_combining_is_another_thing(monkeypatch):
    honest = trainer.combine
    right = gradient(replace(flat("blur_npo")), clip=0.01, **sides())

    def early(combiner, forget, parameters, now):
        torch.nn.utils.clip_grad_norm_(parameters, 0.01)
        return honest(combiner, forget, parameters, now)

    monkeypatch.setattr(trainer, "combine", early)
    wrong = gradient(replace(flat("blur_npo")), clip=0.01, **sides())
    assert float(torch.cosine_similarity(right, wrong, dim=0)) < 1 - 1e-6


def test_a_half_precision_model_trains_float32_copies():
    lm = subject(dtype=torch.bfloat16)
    run = training(replace(flat("grad_diff"), steps=2), lm, **sides())
    run.run(after_step=lambda: None, progress=False)
    assert {p.dtype for p in run.trainable.tensors.values()} == {torch.float32}
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}


def test_what_rounding_swallows_is_an_error():
    with pytest.raises(NoOpEdit, match="0 % of the entries differ after rounding to bfloat16"):
        rp.unlearn(
            subject(dtype=torch.bfloat16), recipe=rp.recipes.ga(), forget=rows(), steps=1, lr=1e-9, progress=False
        )
