"""TOFU: the published values to the digit, and the variants that miss them."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

import repedit as rp
from repedit.errors import ArgumentError, DataError, MetricError, NotFound, UnknownName
from repedit.metrics import tofu
from repedit.metrics import tofu as definitions
from repedit.metrics.answers import answer_nll
from repedit.metrics.collapse import Signs
from repedit.metrics.generation import generate
from tests.published_data import published
from tests.test_attack_weights import small

# Of the leaderboard's own file.
LEADERBOARD = {"llama2-7b/full": 0.6226773637427153, "llama2-7b/retain90": 0.613744995233942}
QUALITY = {
    ("llama2-7b", "retain90"): (0.39666666666666667, 1.834066410994743e-21),
    ("llama2-7b", "retain95"): (0.38, 6.504458846554448e-16),
    ("llama2-7b", "retain99"): (0.42833333333333334, 2.3451772527550457e-06),
    ("phi", "retain90"): (0.3466666666666667, 2.1942743021891237e-16),
}
MODELS = [
    f"{family}/{split}" for family in ("llama2-7b", "phi") for split in ("full", "retain90", "retain95", "retain99")
]
TERMS = {"probability": "prob", "rougeL_recall": "rougeL_recall", "truth_ratio": "truth_ratio"}


@cache
def table(name: str):
    return json.loads(published("tofu_eval_logs_kat", name).read_text())


def parts(model: str):
    return tofu.read_log(table("tofu_logs.json")["logs"][model])


def check_utility(model: str) -> None:
    found = tofu.model_utility(parts(model))
    assert found == pytest.approx(table("expected_geometric.json")[model]["model_utility"], abs=1e-12)
    assert found == pytest.approx(LEADERBOARD.get(model, found), abs=1e-8)


def check_quality(family: str, reference: str) -> None:
    unlearned, never = (parts(f"{family}/{name}")["forget"].truth_ratio for name in ("full", reference))
    statistic, p = QUALITY[family, reference]
    assert tofu.forget_quality(unlearned, never) == pytest.approx(
        p, rel=1e-12, abs=0
    )  # else 1e-12 is allowed, and any such p passes
    assert tofu.distance(unlearned.ratios, never.ratios).statistic == pytest.approx(statistic, abs=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_model_utility_is_the_published_one(model):
    check_utility(model)


@pytest.mark.parametrize("model", MODELS)
def test_every_part_is_the_published_one(model):
    for name, file in tofu.FILES.items():
        expected = table("expected_geometric.json")[model]["parts"][file]
        assert parts(model)[name].means == pytest.approx({t: expected[e] for t, e in TERMS.items()}, abs=1e-12)


@pytest.mark.parametrize("pair", QUALITY, ids="/".join)
def test_forget_quality_is_the_published_one(pair):
    check_quality(*pair)


def test_a_model_is_not_told_from_itself():
    same = parts("llama2-7b/retain90")["forget"].truth_ratio
    assert tofu.forget_quality(same, same) == 1


def arithmetic(perturbed):
    """Log of the mean probability: what the published code came to compute."""
    return np.log(np.exp(-perturbed).mean(1))


def test_the_arithmetic_mean_gives_the_published_wrong_values(monkeypatch):
    monkeypatch.setattr(definitions, "log_wrong", arithmetic)
    for model in MODELS:
        expected = table("tofu_logs.json")["expected"][model]["model_utility"]
        assert tofu.model_utility(parts(model)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_the_arithmetic_mean_misses_the_utility(model, monkeypatch):
    monkeypatch.setattr(definitions, "log_wrong", arithmetic)
    with pytest.raises(AssertionError):
        check_utility(model)


@pytest.mark.parametrize("family", ["llama2-7b", "phi"])
def test_the_arithmetic_mean_misses_the_quality(family, monkeypatch):
    monkeypatch.setattr(definitions, "log_wrong", arithmetic)
    with pytest.raises(AssertionError):
        check_quality(family, "retain90")


def test_the_asymptotic_test_misses_the_quality(monkeypatch):
    monkeypatch.setattr("scipy.stats.ks_2samp", lambda a, b, method: ks_2samp(a, b, method="asymp"))
    with pytest.raises(AssertionError):
        check_quality("llama2-7b", "retain90")


def test_truth_ratios_by_hand():
    # p_para .5; p_wrong is sqrt(.1 x .4) = .2 and sqrt(.9 x .9) = .9: t .4 and 1.8.
    right, wrong = -np.log([0.5, 0.5]), -np.log([[0.1, 0.4], [0.9, 0.9]])
    near, better = (tofu.truth_ratio(right, wrong, aggregate=a) for a in ("closer_to_one", "true_better"))
    assert near.ratios == pytest.approx([0.4, 1.8]) and near.items == pytest.approx([0.4, 1 / 1.8])
    assert better.items == pytest.approx([0.6, 0]) and better.mean == pytest.approx(0.3)


def test_a_model_without_any_probability_is_still_scored():
    found = tofu.truth_ratio([900.0, 0.0], [[0.0], [900.0]])
    assert found.items == pytest.approx([0, 0]) and np.isinf(found.ratios[0])
    part = tofu.Part("x", np.array([2000.0]), np.ones(1), np.ones(1), np.array([[2000.0, 2001.0]]), options=True)
    assert part.probability == pytest.approx([1 / (1 + 1 + np.exp(-1))])


TERM = {"probability": 0.5, "rougeL_recall": 0.5, "truth_ratio": 0.5}
THREE = {name: dict(TERM) for name in tofu.SETS}


def test_the_utility_is_a_harmonic_mean_and_zero_with_one_zero():
    assert tofu.model_utility(THREE) == pytest.approx(0.5)
    assert tofu.model_utility(THREE | {"retain": TERM | {"probability": 1.0}}) == pytest.approx(9 / (8 / 0.5 + 1))
    assert tofu.model_utility(THREE | {"retain": TERM | {"probability": 0.0}}) == 0


def test_a_log_is_read_as_it_was_written(tmp_path):
    some = parts("phi/full")
    tofu.write_log(some, tmp_path / "log.json")
    again = tofu.read_log(tmp_path / "log.json")
    assert {n: p.means for n, p in again.items()} == {n: p.means for n, p in some.items()}


def bad_log(**changes):
    log = {q: {"0": 1.0} for q in ("avg_gt_loss", "rougeL_recall", "avg_paraphrased_loss")}
    log |= {"average_perturb_loss": {"0": [1.0, 2.0]}} | changes
    return {"eval_log.json": {name: value for name, value in log.items() if value is not None}}


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: tofu.forget_quality(np.ones(9), np.ones(300)), MetricError, "9 and 300 truth ratios; give two lists of 10"),
    (lambda: tofu.forget_quality(np.ones(10), np.full(10, np.nan)), MetricError, "a truth ratio is NaN; load the model"),
    (lambda: tofu.forget_quality(*(tofu.truth_ratio(np.ones(10), np.ones((10, 5)), split=s) for s in ("forget05", "forget10"))),
     MetricError, "'forget05' and 'forget10': these compare different questions"),
    (lambda: tofu.forget_quality(*(tofu.truth_ratio(np.ones(n), np.ones((n, 5)), split="forget05") for n in (10, 11))),
     MetricError, "10 and 11 truth ratios of 'forget05': these compare different questions"),
    (lambda: tofu.truth_ratio([1.0], [[1.0]], aggregate="closer"), UnknownName, "aggregate='closer'; did you mean 'closer_to_one'"),
    (lambda: tofu.truth_ratio([1.0, 2.0], [[1.0]]), MetricError, r"shapes \(2,\) and \(1, 1\); give \(n,\) and \(n, k\)"),
    (lambda: tofu.truth_ratio([np.nan], [[1.0]]), MetricError, "a loss is nan; load the model in float32"),
    (lambda: tofu.model_utility({}), MetricError, r"the part 'retain' is missing; there are \[\]"),
    (lambda: tofu.model_utility(THREE | {"retain": {"probability": 0.5}}), MetricError, "the term 'retain/rougeL_recall' is None"),
    (lambda: tofu.model_utility(THREE | {"retain": TERM | {"truth_ratio": 62.3}}), MetricError,
     "the term 'retain/truth_ratio' is 62.3; give a fraction in .0, 1., not a percentage"),
    (lambda: tofu.read_log("nowhere.json"), NotFound, "nowhere.json is not a file; give the log of a model that never saw"),
    (lambda: tofu.read_log({"a": 1}), MetricError, r"a log holds eval_log_forget.json, .*; this one has \['a'\]"),
    (lambda: tofu.read_log(bad_log(rougeL_recall=None)), MetricError, "the log of 'retain' lacks rougeL_recall; it has"),
    (lambda: tofu.read_log(bad_log(rougeL_recall={"0": 1.0, "1": 1.0})), MetricError, "give one of each for every question"),
    (lambda: tofu.read_log(bad_log(avg_gt_loss={"0": "one"})), MetricError, "avg_gt_loss is not a table of numbers"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[]", "holds a JSON list, an object was expected; give a log")],
)
def test_a_file_that_is_no_log_is_refused(text, message, tmp_path):
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(MetricError, match=message):
        tofu.read_log(tmp_path / "log.json")


WORDS = ("red", "blue", "green", "white", "black")


def written_set(folder, name: str, count: int = 10, wrong: int = 2) -> None:
    rows = [
        {"question": f"{name} {i}?", "answer": WORDS[i % 5], "perturbed_answer": [WORDS[(i + k + 1) % 5] for k in range(wrong)]}
        for i in range(count)
    ]  # fmt: skip
    (folder / f"{name}_perturbed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tofu")
    for name in ("forget10", *tofu.SETS):
        written_set(place, name)
    return place


def evaluated(subject, folder, *log, **options):
    plain = rp.data.read(["some plain text to read"])
    return tofu.evaluate(subject, folder, *log, plain=plain, max_new_tokens=9, **options)


def test_a_model_is_evaluated_question_by_question(folder, tmp_path):
    subject = small("gpt2")
    found = evaluated(subject, folder)
    row = rp.data.tofu(folder, "retain_perturbed").items[7]
    other = rp.data.Row(row.prompt, row.perturbed[1], id="other")
    nll = answer_nll(subject, [row, other]).mean
    assert [found.parts["retain"].answer[7], found.parts["retain"].perturbed[7, 1]] == pytest.approx(nll, rel=1e-5)
    assert found.parts["retain"].outputs[7] == generate(subject, [row.prompt], max_new_tokens=9)[0]
    assert found.parts["world_facts"].options and not found.parts["forget"].options
    assert (found.forget_quality, found.verdict) == (None, "INCONCLUSIVE") and "not measured, no reference" in str(
        found
    )
    tofu.write_log(found.parts, tmp_path / "log.json")
    again = evaluated(subject, folder, tmp_path / "log.json", original=found)
    assert again.forget_quality == 1 and again.model_utility == found.model_utility
    with pytest.raises(MetricError, match="9 questions, 10 in the reference log: these compare different questions"):
        evaluated(subject, folder, tmp_path / "log.json", limit=9)


def test_a_collapsed_model_is_called_so_beside_its_utility(folder):
    subject = small("gpt2")
    with torch.no_grad():
        subject.model.transformer.ln_f.weight.zero_(), subject.model.transformer.ln_f.bias.mul_(60)
    healthy = Signs(retain=0.9, forget=0.9, distinct=0.9, repeated=0.1, perplexity=12.0)
    found = evaluated(subject, folder, original=replace(evaluated(small("gpt2"), folder), signs=healthy))
    assert found.verdict == "DESTROYED" and len(found.judgement.reasons) == 3
    assert str(found).splitlines()[-1].startswith("verdict DESTROYED: retain 0.000 < 0.25 x the original's 0.900")


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"limit": 0}, ArgumentError, "limit=0; give at least 1 question a set, or none for all"),
    ({"forget": "forget05"}, UnknownName, "no split 'forget05_perturbed'; did you mean 'forget10_perturbed'"),
])  # fmt: skip
def test_a_wrong_request_is_refused(options, error, message, folder):
    with pytest.raises(error, match=message):
        evaluated(small("gpt2"), folder, **options)


def test_questions_need_as_many_wrong_answers_each(tmp_path):
    written_set(tmp_path, "forget10")
    lines = (tmp_path / "forget10_perturbed.jsonl").read_text().splitlines()
    (tmp_path / "forget10_perturbed.jsonl").write_text("\n".join((*lines[:2], lines[2].replace('"white", ', ""))))
    with pytest.raises(
        DataError, match="row 'forget10_perturbed/2': every question of 'forget10_perturbed' needs wrong answers"
    ):
        evaluated(small("gpt2"), tmp_path)


def test_a_reference_without_a_forget_set_is_refused(folder):
    with pytest.raises(MetricError, match="the reference log holds no forget set"):
        evaluated(small("gpt2"), folder, bad_log())
