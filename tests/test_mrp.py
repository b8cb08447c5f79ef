"""Training of projections: exact gradients, frozen weights, nested tasks, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import repedit as rp
from repedit.arch import hooks_at
from repedit.errors import (
    ArgumentError,
    DataError,
    FingerprintError,
    OverlapError,
    QuantizedModel,
    RankError,
    ShapeError,
    TrainingError,
    UnknownName,
)
from repedit.fit.mrp import REFERENCE, HookOnlyWarning, RankWarning, mrp
from repedit.fit.mrp_training import Bases, ForgetLoss, _first_difference, _projected_positions, forget_loss
from repedit.hooks import installed
from repedit.models.subject import subject_of
from repedit.training.sampler import BatchSampler, collate, label_mask, split_by_entity, training_rows
from tests.saved_models import byte_tokenizer
from tests.tiny import tiny
from tests.tolerances import within

SITES = "*.mlp.out"
SHORT = {"steps": 3, "batch_size": 4, "text_rows": 0, "evaluate_every": 1}


def small(family: str = "llama", dtype: torch.dtype = torch.float32):
    model = tiny(family, vocab_size=260, max_position_embeddings=256).model.to(dtype)
    return subject_of(model, byte_tokenizer())


@pytest.fixture(scope="module")
def facts():
    return rp.data.invented(4, 2, 0)


def test_a_trained_edit_holds_orthonormal_bases_and_leaves_the_weights_alone(facts):
    lm = small()
    weights, needs = lm.fingerprint(), [p.requires_grad for p in lm.model.parameters()]
    edit = mrp(lm, forget=facts.forget, retain=facts.retain, sites=SITES, rank=3, config=SHORT, text=None)
    assert lm.fingerprint() == weights
    assert [p.requires_grad for p in lm.model.parameters()] == needs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    for map_ in edit.maps.values():
        assert map_.u.shape == (24, 3)
        assert torch.allclose(map_.u.double().T @ map_.u.double(), torch.eye(3, dtype=torch.float64), atol=1e-6)
    record = edit.provenance
    assert record["steps_run"] == 3 and record["stopped"] == "all 3 steps taken" and 0 < record["overlap"] < 1
    assert set(record["data"]) == {"forget", "retain"} and record["options"]["steps"] == 3


def test_training_lowers_the_probability_of_the_answers(facts):
    lm = small()
    # Every step sees the same whole set, so that nothing but the training moves the loss; it falls by .14 to .22.
    config = {**SHORT, "steps": 12, "batch_size": 99, "kl_weight": 0.0, "forget_at": "everywhere", "shown": 0}
    for seed in range(3):
        edit = mrp(
            lm,
            forget=facts.forget,
            retain=facts.retain,
            sites=SITES,
            rank=6,
            config={**config, "seed": seed},
            text=None,
        )
        losses = edit.provenance["history"]["forget"]
        assert losses[-1] < losses[0] - 0.03


def test_the_same_seed_gives_the_same_edit_and_another_seed_another(facts):
    lm = small()
    found = [
        mrp(lm, forget=facts.forget, retain=facts.retain, rank=2, config={**SHORT, "seed": seed}, text=None).hash
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.numeric
def test_gradients_through_the_qr_equal_finite_differences(facts):
    lm = small("gpt2", torch.float64)  # its LayerNorm computes in float64
    site = rp.Site.parse("1.mlp.out")
    start = rp.LowRank.projection(torch.randn(24, 3, dtype=torch.float64))
    earlier = rp.LowRank.projection(torch.randn(24, 2, dtype=torch.float64))
    bases = Bases(lm, {site: start}, {site: earlier})
    sampler = BatchSampler(lm, training_rows(facts.forget, "forget"), 4, length=200, seed=0)
    loss = forget_loss(sampler, lm, among="vocabulary", cap=math.inf)
    batch = sampler.at(0)

    def value() -> torch.Tensor:
        bases.refresh()
        with installed(lm.model, bases.hooks()):
            return loss(lm.model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits.double(), batch)[0]

    (w,) = bases.weights.values()
    (gradient,) = torch.autograd.grad(value(), [w])
    direction = torch.randn_like(w)
    with torch.no_grad():
        w += 1e-6 * direction
        high = value()
        w -= 2e-6 * direction
        low = value()
    assert float((high - low) / 2e-6) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_tasks_nest_and_stay_jointly_orthonormal(facts):
    lm = small()
    parts = [facts.forget[i::2] for i in range(2)]
    series = rp.ContinualMRP(lm, sites=SITES, rank=2, config=SHORT, text=None)
    edits = [series.add_task(f"task {i}", forget=part, retain=facts.retain) for i, part in enumerate(parts)]
    for early, late in pairwise(edits):
        for site in early.maps:
            p, q = (torch.eye(24, dtype=torch.float64) - m.u.double() @ m.v.double().T for m in (early.maps[site], late.maps[site]))  # fmt: skip
            assert float((q @ p - q).norm()) < 1e-6 and float((p @ q - q).norm()) < 1e-6
            assert late.maps[site].rank_removed == early.maps[site].rank_removed + 2
    assert edits[-1].provenance["tasks"] == ["task 0", "task 1"]


def test_a_series_is_saved_and_gone_on_with(facts, tmp_path):
    lm = small()
    series = rp.ContinualMRP(lm, sites=SITES, rank=2, config=SHORT, text=None)
    series.add_task("one", forget=facts.forget[:2], retain=facts.retain)
    series.save(tmp_path / "series.safetensors")
    again = rp.ContinualMRP.load(tmp_path / "series.safetensors", lm, config=SHORT, text=None)
    assert again.tasks == ("one",) and again.edit.hash == series.edit.hash and again.rank == 2
    again.forgotten = series.forgotten
    both = [s.add_task("two", forget=facts.forget[2:], retain=facts.retain).hash for s in (series, again)]
    assert both[0] == both[1]
    with pytest.raises(ArgumentError, match=r"task 'one' was added before; tasks are \['one', 'two'\]"):
        again.add_task("one", forget=facts.forget[:2], retain=facts.retain)
    rp.Edit({}).save(tmp_path / "plain.safetensors")
    with pytest.raises(ArgumentError, match="is not a series of tasks"):
        rp.ContinualMRP.load(tmp_path / "plain.safetensors", lm)


def _rehearsal_weighs_as_much_as_the_task(facts):
    """To train on one set and rehearse another is to train on the other and rehearse the one."""
    lm, one, other = small(), facts.forget[:2], facts.forget[2:]
    whole = {"batch_size": 99, "optimizer": "sgd", "forget_at": "everywhere", "kl_weight": 0.0, "shown": 0}
    runs = (
        mrp(
            lm,
            forget=task,
            forgotten=sets,
            retain=facts.retain,
            sites=SITES,
            rank=3,
            config={**SHORT, **whole},
            text=None,
        )
        for task, sets in ((one, [other]), (other, [one]), (one, []))
    )
    first, second, alone = ([m.u @ m.u.T for m in edit.maps.values()] for edit in runs)
    for a, b, c in zip(first, second, alone, strict=True):
        within(float((a - b).norm()), "steps of a training, float32")
        assert float((a - c).norm()) > 1e-3, "the rehearsal changes nothing"


@pytest.mark.numeric
def test_earlier_tasks_are_rehearsed(facts):
    _rehearsal_weighs_as_much_as_the_task(facts)


@pytest.mark.parametrize(
    "broken",
    [
        lambda *_: 0.0,
        lambda subject, sets, step: sets.forget_loss(_logits(subject, sets, step), sets.forget.at(step))[0],
    ],
    ids=["none", "of the task itself"],
)
def test_a_rehearsal_that_is_none_is_caught(facts, monkeypatch, broken):
    monkeypatch.setattr("repedit.fit.mrp_training._rehearsal_loss", broken)
    with pytest.raises(AssertionError):
        _rehearsal_weighs_as_much_as_the_task(facts)


def _logits(subject, sets, step):
    batch = sets.forget.at(step)
    return subject.model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits


def test_previous_sites_that_are_not_asked_for_are_carried_along(facts):
    lm = small()
    first = mrp(lm, forget=facts.forget[:2], retain=facts.retain, sites="0.mlp.out", rank=2, config=SHORT, text=None)
    both = mrp(
        lm, forget=facts.forget[2:], retain=facts.retain, sites="1.mlp.out", rank=2, config=SHORT, text=None, previous=first
    )  # fmt: skip
    assert [str(site) for site in both.maps] == ["0.mlp.out", "1.mlp.out"]
    assert both.provenance["carried"] == ["0.mlp.out"]
    assert torch.equal(both.maps[rp.Site.parse("0.mlp.out")].u, first.maps[rp.Site.parse("0.mlp.out")].u)


def test_a_broken_run_goes_on_to_the_same_edit(facts, tmp_path):
    lm = small()
    options = {"forget": facts.forget, "retain": facts.retain, "rank": 2, "text": None}
    whole = mrp(lm, config={**SHORT, "steps": 6}, **options)
    calls = []

    def interrupt(_: rp.Subject) -> bool:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        mrp(lm, config={**SHORT, "steps": 6}, resume=tmp_path / "state", stop=interrupt, **options)
    assert not any(m._forward_hooks for m in lm.model.modules())
    resumed = mrp(lm, config={**SHORT, "steps": 6}, resume=tmp_path / "state", **options)
    assert resumed.provenance["steps_run"] == 6
    for site in whole.maps:
        assert torch.allclose(whole.maps[site].u, resumed.maps[site].u, atol=1e-6)
    with pytest.raises(FingerprintError, match=r"differs in previous: previous was , it is \w+ now\. Remove the file"):
        mrp(lm, config={**SHORT, "steps": 6}, resume=tmp_path / "state", previous=whole, **options)
    with pytest.raises(FingerprintError, match=r"differs in data\.forgotten 0\.hash"):
        mrp(lm, config={**SHORT, "steps": 6}, resume=tmp_path / "state", forgotten=[facts.forget[:2]], **options)
    with pytest.raises(FingerprintError, match=r"differs in config\.steps: config\.steps was 6, it is 7 now"):
        mrp(lm, config={**SHORT, "steps": 7}, resume=tmp_path / "state", **options)


def test_training_stops_by_the_callers_rule_at_chance_and_at_the_budget(facts):
    lm = small()
    options = {"forget": facts.forget, "retain": facts.retain, "rank": 2, "text": None}
    edit = mrp(lm, config={**SHORT, "steps": 9}, stop=lambda _: True, **options)
    assert (edit.provenance["steps_run"], edit.provenance["stopped"]) == (1, "the caller's stop rule")
    edit = mrp(lm, config={**SHORT, "steps": 40, "patience": 2, "among": "vocabulary"}, **options)
    assert edit.provenance["steps_run"] == 2 and "no more often than by chance" in edit.provenance["stopped"]
    edit = mrp(lm, config={**SHORT, "steps": 40, "retain_budget": 0.0}, **options)
    assert edit.provenance["steps_run"] == 20 and "the budget is 0.0" in edit.provenance["stopped"]


def test_the_forget_loss_is_capped_and_counts_first_answer_tokens_among_the_answers():
    batch = rp.data.Batch(
        torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.bool), ("a",),
        answer=torch.tensor([[False, False, True, True]]),
    )  # fmt: skip
    assert label_mask(batch, 0).tolist() == [[False, False, True, False]]
    assert label_mask(batch).tolist() == [[False, False, True, True]]
    logits = torch.zeros(1, 4, 10)
    logits[0, 1, 7], logits[0, 1, 3] = 2.0, 9.0
    among = ForgetLoss(torch.tensor([6, 7]), math.inf, 0.5, 0)
    loss, right = among(logits, batch)
    assert float(loss) == pytest.approx(-math.log(1 + math.exp(-2.0))) and right == 1.0
    everything = ForgetLoss(None, 4.0, 0.1)
    assert float(everything(logits, batch)[0]) == pytest.approx(-(4.0 + math.log(10)) / 2, abs=1e-3)
    blank = replace(batch, answer=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(TrainingError, match="no token to forget"):
        among(logits, blank)


def test_an_answer_that_begins_all_others_still_has_a_token_to_lose():
    assert _first_difference([(3, 5), (3, 6, 7)]) == 1 and _first_difference([(3, 5, 6), (3, 5, 7)]) == 2
    assert _first_difference([(3,), (3, 5)]) == 0 and _first_difference([(3, 5), (3, 5, 6), (3, 5, 7)]) == 1
    assert _first_difference([(3, 5), (3, 5)]) == 0 and _first_difference([(), ()]) == 0


def test_the_projection_acts_where_it_should_while_the_forget_loss_is_taken(facts):
    lm = small()
    site = rp.Site.parse("0.mlp.out")
    bases = Bases(lm, {site: rp.LowRank.projection(torch.randn(24, 3))}, {})
    batch = BatchSampler(lm, training_rows(facts.forget, "forget"), 3, length=200, seed=0).at(0)
    seen: list[torch.Tensor] = []
    watch = hooks_at(lm.model, lm.layout, site, lambda x, *_: seen.append(x.clone()), replaces=False)
    q = bases.current[site].detach()
    for only in (batch.entity, None):
        bases.projected = only
        with installed(lm.model, [*bases.hooks(), *watch]), torch.no_grad():
            lm.model(batch.input_ids, attention_mask=batch.attention_mask.long())
        gone = (seen[-1] @ q).abs().amax(-1) < 1e-5
        assert torch.equal(gone, batch.entity if only is not None else torch.ones_like(gone))
    assert (
        torch.equal(_projected_positions(batch, "entity", 0), batch.entity)
        and _projected_positions(batch, "everywhere", 1) is None
    )
    assert (
        torch.equal(_projected_positions(batch, "both", 1), batch.entity)
        and _projected_positions(batch, "both", 2) is None
    )
    unmarked = replace(batch, entity=torch.zeros_like(batch.entity))
    assert bool(_projected_positions(unmarked, "entity", 0).all())


def test_facts_are_shown_without_words_and_neighbours_are_found(facts):
    rows = training_rows(facts.forget, "forget", demonstrations=1, seed=0)
    lists = [row for row in rows.items if row.id.endswith("#shown")]
    assert len(lists) == len(facts.forget)
    asked = {fact.id: fact for fact in facts.forget}
    for row in lists:
        fact = asked[row.id.removesuffix("#shown")]
        first, last = row.prompt.split("\n")
        assert last == f"{fact.entity}:" and row.answer == fact.answer and fact.entity not in first
        assert any(first == f"{other.entity}: {other.answer}" for other in facts.forget)
    mine, other = facts.forget[0], facts.retain[0]
    near = replace(other, id="near", entity=mine.entity)
    sides = split_by_entity(training_rows([mine], "forget"), training_rows([near, other], "retain"))
    assert [{row.id.split("#")[0] for row in side.items} for side in sides] == [{"near"}, {other.id}]
    assert split_by_entity(training_rows([mine], "forget"), training_rows([other], "retain"))[0] is None


def test_padding_changes_no_training_batch(facts):
    lm = small()
    long = replace(facts.forget[0], prompt="x " * 60 + facts.forget[0].prompt)
    alone, beside = (BatchSampler(lm, training_rows(items, "forget"), 50, length=250, seed=0) for items in (facts.forget[1:3], (long, *facts.forget[1:3])))  # fmt: skip
    loss = ForgetLoss(None, math.inf, 0.1)
    with torch.no_grad():
        values = []
        for sampler in (alone, beside):
            rows = [r for r in sampler.rows if r.document[0] != long.id and not r.document[0].startswith(f"{long.id}#")]
            batch = collate(rows if sampler is alone else sampler.rows)
            kept = [i for i, name in enumerate(batch.document) if name in {r.document[0] for r in rows}]
            logits = lm.model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits.double()
            part = replace(
                batch,
                document=tuple(batch.document[i] for i in kept),
                **{k: getattr(batch, k)[kept] for k in ("input_ids", "attention_mask", "answer", "entity")},
            )
            values.append(float(loss(logits[kept], part)[0]))
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_running_text_beside_answered_rows_loses_no_mask(facts):
    lm = small()
    answered = BatchSampler(lm, training_rows(facts.forget[:2], "facts"), 1, length=200, seed=0).rows
    prose = BatchSampler(lm, training_rows(["The river runs down to the sea."], "prose"), 1, length=200, seed=0).rows
    assert prose[0].answer is None
    for rows in ([*answered, *prose], [*prose, *answered]):
        batch = collate(rows)
        for i, row in enumerate(rows):
            width = row.input_ids.shape[1]
            assert (
                torch.equal(label_mask(batch)[i, :width], label_mask(row)[0]) and not label_mask(batch)[i, width:].any()
            )
        assert torch.equal(
            batch.entity.any(1), torch.tensor([row.entity is not None and bool(row.entity.any()) for row in rows])
        )
    assert collate(prose).answer is None


@pytest.mark.parametrize("method", ["residual_pca", "cpca", "gen_eig", "oblique", "mean_difference", "lda", "random"])
def test_closed_forms_need_no_training(facts, method):
    lm = small()
    options = {"forget": facts.forget, "retain": facts.retain, "sites": SITES, "rank": 1, "text": None}
    edit = mrp(lm, method=method, **options)
    assert [m.rank_removed for m in edit.maps.values()] == [1, 1]
    assert edit.provenance["method"] == method and "history" not in edit.provenance


@pytest.mark.parametrize("method", ["leace", "grad_pca"])
def test_closed_forms_from_labels_and_gradients(facts, method):
    edit = mrp(small(), forget=facts.forget, retain=facts.retain, method=method, rank=2, text=None)
    assert all(m.rank_removed >= 1 for m in edit.maps.values())


def test_the_published_settings_run(facts):
    config = replace(REFERENCE, epochs=1, batch_size=20)
    edit = mrp(small(), forget=facts.forget, retain=facts.retain, sites="0.mlp.out", rank=2, config=config, text=None)
    assert edit.provenance["steps_run"] == math.ceil(len(training_rows(facts.forget, "f").items) / 20)


def test_the_stream_is_trained_as_one_basis(facts):
    lm = small()
    edit = mrp(lm, forget=facts.forget, retain=facts.retain, sites="stream", rank=2, config=SHORT, text=None)
    assert [str(site) for site in edit.maps] == ["0.resid.pre", "0.attn.out", "0.mlp.out", "1.attn.out", "1.mlp.out"]
    assert len({map_.u.data_ptr() for map_ in edit.maps.values()}) <= 5
    first, *rest = edit.maps.values()
    assert all(torch.equal(first.u, map_.u) for map_ in rest)
    more = mrp(lm, forget=facts.forget[:2], retain=facts.retain, sites="stream", rank=1, config=SHORT, text=None, previous=edit)  # fmt: skip
    assert {map_.rank_removed for map_ in more.maps.values()} == {3}


def test_warnings_name_what_cannot_be_folded_and_what_is_too_much(facts):
    lm = small()
    options = {"forget": facts.forget, "retain": facts.retain, "config": SHORT, "text": None}
    with pytest.warns(HookOnlyWarning, match=r"0\.resid\.post .* Foldable alternatives: 0\.mlp\.out"):
        mrp(lm, sites="0.resid.post", rank=2, **options)
    with pytest.warns(RankWarning, match=r"more than a quarter .*0\.mlp\.out: 7"):
        mrp(lm, sites="0.mlp.out", rank=7, **options)


def test_refusals_change_nothing(facts):
    lm = small()
    weights = lm.fingerprint()
    options = {"forget": facts.forget, "retain": facts.retain, "config": SHORT, "text": None}
    cases = [
        ({"method": "mpr"}, UnknownName, "method='mpr' does not exist; did you mean 'mrp'"),
        ({"config": {"step": 3}}, UnknownName, "config has no key 'step'; did you mean 'steps'"),
        ({"config": {"steps": 0}}, ArgumentError, "steps out of range"),
        ({"config": {"steps": 3, "epochs": 2, "among": "words"}}, ArgumentError, "give one of them|among"),
        ({"retain": facts.forget}, OverlapError, r"share \d+ rows, the first is"),
        ({"retain": []}, DataError, "holds nothing"),
        ({"rank": 24}, RankError, r"0\.mlp\.out: rank 24 was asked for, 1 to 23 is possible"),
        ({"rank": 0}, RankError, "rank 0 was asked for"),
        ({"sites": "stream", "previous": rp.Edit({rp.Site.parse("0.mlp.out"): rp.Diagonal(torch.ones(24))})}, ArgumentError, "Diagonal that is not an orthogonal projection"),
        ({"previous": rp.Edit({}, {"model": "0" * 64})}, FingerprintError, "previous was made for model 000000000000"),
        ({"previous": rp.Edit({rp.Site.parse("0.mlp.out"): rp.LowRank.projection(torch.eye(12, 1))})}, ShapeError, "previous has width 12, the site has width 24"),
        ({"previous": rp.Edit({rp.Site.parse("0.mlp.out"): rp.LowRank.oblique(torch.eye(24, 1), torch.ones(24, 1))})}, ArgumentError, "from orthogonal ones only"),
    ]  # fmt: skip
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            mrp(lm, **{**options, **change})
    assert lm.fingerprint() == weights


def test_a_quantised_model_and_a_broken_one_are_refused(facts, monkeypatch):
    lm = small()
    options = {"forget": facts.forget, "retain": facts.retain, "config": {**SHORT, "start": "random"}, "text": None}
    with monkeypatch.context() as patch:
        patch.setattr(type(lm), "quantizer", "bitsandbytes")
        with pytest.raises(QuantizedModel, match="make a plain copy and use that"):
            mrp(lm, **options)
    with torch.no_grad():
        lm.model.lm_head.weight[0] = float("nan")
    with pytest.raises(TrainingError, match=r"step 0: forget loss nan|step 0: .*retain KL nan"):
        mrp(lm, **options)
