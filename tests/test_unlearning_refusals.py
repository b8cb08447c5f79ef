"""Bad input ends in a typed error that says what was asked, what was found and what to do; stop rules say why."""

from __future__ import annotations

import pytest
import torch

import repedit as rp
from repedit.data import Row, Rows
from repedit.errors import (
    ArgumentError,
    DataError,
    MissingDependency,
    OffloadedTensors,
    OverlapError,
    QuantizedModel,
    SelectionError,
    ShapeError,
    TrainingError,
    UnknownName,
)
from repedit.unlearning import schedule
from repedit.unlearning.losses import nll
from repedit.unlearning.parameters import Lora, Mask, Parameters, TrainableCopy, parse_layers
from repedit.unlearning.recipe import OptimizerConfig, Term
from repedit.unlearning.sampling import Phase, alternate, chunked, in_turn, paired, round_robin
from tests.teachable_models import blank
from tests.unlearning_cases import rows, sides, subject

QUICK = {"steps": 2, "batch_size": 6, "lr": 1e-3, "progress": False}


def run(recipe, lm=None, **options):
    """A short run."""
    return rp.unlearn(lm or subject(dtype=torch.float32), recipe=recipe, **(QUICK | options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"forget": ()}, DataError, "the forget set holds 0 rows; give at least one"),
        ({"forget": None}, DataError, "needs a forget set and none was given"),
        ({"retain": None}, DataError, r"term 'nll retain' .* and no retain set was given; pass retain="),
        ({"retain": rows(5, 8)}, OverlapError, "share 1 rows, the first is"),
        ({"update": rows(0, 2)}, DataError, "an update set was given and recipe 'grad_diff' does not use one"),
        ({"length": 8}, DataError, r"row 'Abo' has \d+ tokens, length=8; raise length"),
        ({"parameters": Parameters("7")}, SelectionError, r"layers='7' does not name layers of this model; they are 0 to 1"),
        ({"parameters": Parameters(modules=("mlp.down",))}, SelectionError, "did you mean 'mlp.down_proj'"),
        ({"parameters": Parameters(pattern="q_prog")}, SelectionError, "pattern='q_prog' matches none of"),
        ({"parameters": Parameters(mask=Mask({"lm_heat.weight": torch.ones(1).bool()}))}, SelectionError, "did you mean 'lm_head.weight'"),
        ({"parameters": Parameters(mask=Mask({"lm_head.weight": torch.ones(3, 1).bool()}))}, ShapeError, r"has shape \(3, 1\), the tensor \(260, 48\)"),
        ({"parameters": Parameters(mask=Mask({"lm_head.weight": torch.zeros(260, 1).bool()}))}, SelectionError, "the mask trains nothing"),
        ({"checkpoint_every": 3}, ArgumentError, "checkpoint_every=3, resume=None: give a folder in resume"),
        ({"lr": -1.0}, ArgumentError, r"lr=-1\.0 out of range"),
        ({"steps": 0}, ArgumentError, "steps=0 out of range"),
    ],
)  # fmt: skip
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        run(rp.recipes.grad_diff(), **(sides() | options))


def test_overlap_may_be_allowed():
    run(rp.recipes.grad_diff(), forget=rows(0, 6), retain=rows(5, 8), allow_overlap=True)


def test_surgery_needs_an_update_set():
    with pytest.raises(DataError, match=r"'surgery' has the term 'nll update' .* no update set was given"):
        run(rp.recipes.surgery(), **sides())


def test_dpo_needs_alternatives():
    with pytest.raises(DataError, match=r"row 'Abo' has no alternative answer, .* use npo, or add alternatives"):
        run(rp.recipes.dpo(), **(sides() | {"forget": rows(alternative=False)}))


def test_a_row_without_a_label():
    with pytest.raises(DataError, match=r"forget row 0 \('only'\).*every label is masked"):
        run(rp.recipes.ga(), forget=Rows((Row("", "x", "only"), *rows(0, 2))))


def test_a_row_longer_than_the_model():
    with pytest.raises(DataError, match="has 139 tokens, the model reads 128"):
        run(rp.recipes.ga(), forget=[Row("a " * 68, "tea", "long"), *rows(0, 2)], length=200)


def test_a_reference_of_another_vocabulary():
    with pytest.raises(ShapeError, match="a vocabulary of 300 tokens, the subject one of 260"):
        run(rp.recipes.npo_gdr(), **sides(), reference=rp.wrap(blank("llama").model.__class__(_bigger()), None))


def _bigger():
    config = blank("llama").model.config
    config.vocab_size = 300
    return config


def test_another_reference_is_used():
    other = subject(dtype=torch.float32)
    with torch.no_grad():
        other.model.lm_head.weight.mul_(3)
    own, foreign = (run(rp.recipes.ga_kl(), **sides(), reference=reference) for reference in (None, other))
    assert abs(own.log[0]["losses"]["kl retain"]) < 1e-6 < 0.01 < foreign.log[0]["losses"]["kl retain"]


def test_weights_that_cannot_be_trained():
    lm = subject(dtype=torch.float32)
    lm.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(
        QuantizedModel, match=r"quantised .bitsandbytes. and cannot be trained; make a plain copy and use that"
    ):
        run(rp.recipes.ga(), lm, forget=rows())
    lm = subject(dtype=torch.float32)
    lm.model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(OffloadedTensors, match="the weights are on cpu, meta; training needs them on one device"):
        TrainableCopy(lm, Parameters())


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path):
    """The third batch of ascents at a rate far too high overflows; what was trained before it is not lost."""
    lm = subject(dtype=torch.float32)
    recipe = rp.recipes.ga(optimizer=OptimizerConfig("sgd"), stop=())
    with pytest.raises(
        TrainingError,
        match=r"step \d: (loss|norm) of .* is (nan|inf|-inf) at lr 1e\+1\d; the last finite losses were \{",
    ) as caught:
        rp.unlearn(
            lm,
            recipe=recipe,
            forget=rows(),
            steps=9,
            lr=1e18,
            clip=None,
            batch_size=6,
            progress=False,
            resume=tmp_path / "s",
            log=tmp_path / "l",
        )
    delta = caught.value.delta
    assert delta is not None and delta.tensors and delta.provenance["stopped"]["rule"] == "error"
    assert len(delta.log) >= 1 and (tmp_path / "s").exists()


def test_peft_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingDependency, match=r"lora= needs peft: pip install 'repedit\[adapters\]'"):
        run(rp.recipes.ga(), forget=rows(), parameters=Parameters(lora=Lora(2)))


def test_masks_and_adapters_exclude_each_other():
    parameters = Parameters(mask=Mask({"lm_head.weight": torch.ones(260, 1).bool()}), lora=Lora(2))
    with pytest.raises(ArgumentError, match="mask and lora were both given"):
        run(rp.recipes.ga(), forget=rows(), parameters=parameters)
    with pytest.raises(SelectionError, match=r"lora=\('mlp.x',\) selects none of"):
        run(rp.recipes.ga(), forget=rows(), parameters=Parameters(lora=Lora(2, modules=("mlp.x",))))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rp.recipes.by_name("blur_nop"), UnknownName, "no recipe is called 'blur_nop'; did you mean 'blur_npo'"),
        (lambda: rp.recipes.ga(batchsize=3), UnknownName, "ga'? has no option 'batchsize'; did you mean 'batch_size'"),
        (lambda: rp.recipes.ails_ntua("sugt"), UnknownName, "variant='sugt'; did you mean 'sugd'"),
        (lambda: rp.recipes.cyber_for_ai("x"), UnknownName, "variant='x'; valid names: ga, grad_diff"),
        (lambda: rp.recipes.npo(beta=-0.1), ArgumentError, r"beta=-0\.1; give a number above 0"),
        (lambda: rp.recipes.blur_ga(gamma=0.0), ArgumentError, r"gamma=0\.0; give a number above 0"),
        (lambda: rp.recipes.sure(rp.recipes.ga(), percentile=101.0), ArgumentError, r"percentile=101\.0; give a number in \[0, 100\]"),
        (lambda: rp.recipes.sure(rp.recipes.ga(), unit="rows"), UnknownName, "unit='rows'; did you mean 'row'"),
        (lambda: rp.recipes.by_name("sure:zju_merge"), UnknownName, "'zju_merge' consists of several"),
        (lambda: Term(nll(), "forgets"), UnknownName, "role='forgets'; did you mean 'forget'"),
        (lambda: OptimizerConfig("adam"), UnknownName, "optimizer='adam'; did you mean 'adamw'"),
        (lambda: schedule.Schedule("cosin"), UnknownName, "shape='cosin'; did you mean 'cosine'"),
        (lambda: schedule.Schedule(warmup=-1.0), ArgumentError, r"warmup=-1\.0"),
        (lambda: schedule.metric(len), ArgumentError, "above=None, below=None, every=20; give one of the first two"),
        (lambda: Phase("forget", 0.0), ArgumentError, r"epochs must be above 0 and share in \(0, 1\]"),
        (lambda: chunked(0), ArgumentError, "chunk=0; give at least 1"),
        (lambda: Lora(0), ArgumentError, "rank=0; give at least 1"),
    ],
)  # fmt: skip
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_phase_without_rows():
    with pytest.raises(ArgumentError, match="a phase needs 'retain' rows and there are none"):
        alternate(Phase("retain")).order({"forget": ["a"]}, 2, 0)


def test_layer_filters():
    assert parse_layers("0-2,5", 8) == (0, 1, 2, 5)
    assert parse_layers("last 8", 30) == tuple(range(22, 30)) and parse_layers("last 8", 3) == (0, 1, 2)
    assert parse_layers("3 ending at 0.22", 32) == (5, 6, 7)


# Samplers


def drawn(sampler, steps, size=2, **counts):
    """The rows of the first steps."""
    order = sampler.order({role: ["t"] * n for role, n in counts.items()}, size, 0)
    return [dict(order.at(step).rows) for step in range(steps)], order


def test_paired_sees_every_row_once_an_epoch():
    found, order = drawn(paired(2.0), 3, forget=6, retain=5)
    assert sorted(i for d in found for i in d["forget"]) == list(range(6)) and order.steps_per_epoch == 3
    assert [len(d["retain"]) for d in found] == [4, 4, 4]


def test_chunks_interleave_in_order():
    found, order = drawn(chunked(2, 2, 3), 18, 1, forget=3, retain=5)
    flat = [next(iter(d.items())) for d in found]
    assert flat[:6] == [
        ("forget", (0,)),
        ("retain", (0,)),
        ("retain", (1,)),
        ("forget", (1,)),
        ("retain", (2,)),
        ("retain", (3,)),
    ]
    assert flat[6:12] == flat[:6] == flat[12:] and order.steps_per_epoch == 27


def test_phases_of_chunks():
    phases = (Phase("forget", 2.0, 5e-5), Phase("retain", share=0.5), Phase("retain", final=True))
    order = alternate(*phases, chunk=2).order({"forget": ["t"] * 4, "retain": ["t"] * 4}, 2, 0)
    draws = [order.at(step) for step in range(order.steps_per_epoch)]
    assert [next(iter(d.rows)) for d in draws] == ["forget"] * 2 + ["retain"] + ["forget"] * 2 + ["retain"] * 3
    assert set(draws[0].rows["forget"]) == {0, 1} and set(draws[3].rows["forget"]) == {2, 3}
    assert draws[0].lr == 5e-5 and draws[2].lr is None
    assert sorted(i for d in draws[-2:] for i in d.rows["retain"]) == [0, 1, 2, 3]


def test_roles_in_turn():
    found, order = drawn(in_turn("forget", "retain"), 4, forget=4, retain=4)
    assert [next(iter(d)) for d in found] == ["forget", "retain"] * 2 and order.steps_per_epoch == 4


def test_topics_in_turn():
    order = round_robin().order({"forget": ["a", "b", "a", "b"], "retain": ["c", "a"]}, 2, 0)
    assert [set(order.at(step).rows["forget"]) for step in range(2)] == [{0, 2}, {1, 3}]
    assert [set(order.at(step).rows["retain"]) for step in range(2)] == [{1}, {0, 1}]


def test_topics_reach_the_loss():
    topics = {"bio": rows(0, 3), "cyber": rows(3, 6)}
    delta = run(rp.recipes.adaptive_rmu(), forget=topics, retain=rows(6, 12), parameters=Parameters("0"), lr=1e-2)
    assert set(delta.provenance["lengths"]) == {"bio 0", "cyber 0"}


# Time


def test_schedules():
    assert [schedule.Schedule("constant", 2.0).factor(s, 4) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert [schedule.Schedule("linear").factor(s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert schedule.Schedule("cosine", 0.5).factor(3, 4) == pytest.approx(0.5)


def log_of(retain):
    """A log of retain NLLs."""
    return schedule.Progress(len(retain), 1.0, [{"nll": {"retain": x}} for x in retain], lambda: None)  # type: ignore[arg-type]


def test_collapse():
    rule = schedule.collapse()
    assert rule.reason(log_of([0.2] * 5 + [1.1] * 5)) == "" and rule.reason(log_of([1.0] * 5 + [2.9] * 5)) == ""
    assert (
        rule.reason(log_of([1.0] * 5 + [3.5] * 5))
        == "retain NLL rose from 1.000 (first 5 steps) to 3.500 (last 5), above 3.0 times"
    )


@pytest.mark.parametrize(
    ("rule", "step", "reason"),
    [
        (schedule.steps(2), 1, "steps at step 1: 2 steps taken"),
        (schedule.epochs(3.0), 2, "epochs at step 2: 3 epochs seen"),
        (schedule.loss_above("forget", 0.1), 0, "loss_above at step 0: forget NLL"),
        (schedule.metric(lambda s: 2.0, above=1.0, every=3), 2, "metric at step 2: <lambda> is 2 (above 1.0)"),
    ],
)
def test_stop_rules(rule, step, reason):
    delta = run(rp.recipes.grad_diff(), **sides(), steps=8, stop=(rule,))
    assert delta.log[-1]["step"] == step and delta.provenance["stopped"]["reason"].startswith(reason)


def test_collapse_ends_gradient_ascent():
    """Ascent alone, with a retain set to watch."""
    delta = run(rp.recipes.ga(), **sides(), steps=200, lr=3e-3)
    assert delta.provenance["stopped"]["rule"] == "collapse" and len(delta.log) < 200


def test_the_log_as_a_file(tmp_path):
    import json

    delta = run(rp.recipes.blur_ga(), **sides(), log=tmp_path / "log.jsonl")
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(
        row.pop("seconds") >= 0 for row in written
    )  # which the delta leaves out: the same training, the same bytes
    assert written == [dict(record) for record in delta.log]
    assert (
        -1 <= written[0]["cosine"] <= 1
        and written[0]["c"] is not None
        and written[0]["rows"] == {"forget": 6, "retain": 6}
    )


def test_merged_and_scaled_recipes():
    options = {**sides(), "parameters": Parameters("1", lora=Lora(2)), "lr": 1e-2}
    merged = run(rp.recipes.zju_merge(), **options)
    assert merged.provenance["method"] == "zju_merge" and len(merged.provenance["parents"]) == 2
    learned = run(rp.recipes.task_vector(scale=2.0), forget=rows())
    assert learned.log[-1]["nll"]["forget"] < learned.log[0]["nll"]["forget"]
    after = rp.apply(learned, subject(dtype=torch.float32))
    base, now = (_nll(lm) for lm in (subject(dtype=torch.float32), after))
    assert now > base, "going the other way unlearns"


def _nll(lm):
    from repedit.auditing.attacks.tuning import examples, mean_loss

    return mean_loss(lm, examples(lm, rows()))


def test_recipes_say_that_they_mostly_hide():
    for name, recipe in rp.recipes.RECIPES.items():
        assert "rp.audit" in (recipe.__doc__ or ""), name
