"""Published benchmarks on two models side by side."""

from dataclasses import replace

import pytest

import repedit as rp
from repedit.errors import NotFound, UnknownName
from repedit.metrics import benchmarks, muse, semeval, tofu
from repedit.metrics.generation import generate
from tests.published_data import stand_in
from tests.saved_models import byte_tokenizer
from tests.tiny import tiny


def model(seed=0):
    return replace(tiny("gpt2", vocab_size=260, n_positions=4096, seed=seed), tokenizer=byte_tokenizer())


def test_the_parts_are_those_of_each_benchmark(monkeypatch):
    for room in (semeval, tofu):
        monkeypatch.setattr(
            room, "generate", lambda *given, max_new_tokens, **more: generate(*given, max_new_tokens=4, **more)
        )
    one, other = model(), model(1)
    found = benchmarks.compare_benchmarks(one, other, ["tofu", "semeval"], stand_in(), limit=1)
    before = tofu.evaluate(one, stand_in() / "tofu", limit=1)
    after = tofu.evaluate(other, stand_in() / "tofu", limit=1, original=before)
    assert found["tofu"].values["model utility"] == (before.model_utility, after.model_utility)
    assert found["tofu"].values["forget probability"] == tuple(
        s.parts["forget"].means["probability"] for s in (before, after)
    )
    assert found["tofu"].verdict == str(after.judgement)
    values = found["semeval"].values
    assert set(semeval.PARTS) < set(values) and len(values) == len(semeval.PARTS) + 4
    for i in (0, 1):
        assert values["final"][i] == semeval.final(
            *(values[name][i] for name in ("task aggregate", "membership", "mmlu"))
        )


def test_muse_is_evaluated_on_its_published_files(monkeypatch):
    monkeypatch.setattr(
        muse, "generate", lambda *given, max_new_tokens, **more: generate(*given, max_new_tokens=4, **more)
    )
    one, other = model(), model(1)
    comparison = benchmarks.compare_benchmarks(one, other, ["muse"], stand_in())["muse"]
    data = rp.data.muse(stand_in() / "muse")
    assert data.forget_examples[0].answer == "Lea" and data.retain_examples == () and len(data.texts) == 2
    after = muse.evaluate_data(other, data, original=muse.evaluate_data(one, data))
    assert comparison.verdict == str(after.judgement)
    assert comparison.values["PrivLeak"][1] == after.privleak and len(comparison.values) == 5


def test_members_are_told_from_others_by_the_whole_text():
    found = benchmarks.compare_benchmarks(model(), model(), ["membership"], stand_in())["membership"].values
    assert found["AUC"][0] == found["AUC"][1] and 0 < found["AUC"][0] < 1


@pytest.mark.parametrize(
    ("names", "folder", "error", "match"),
    [
        (["tofoo"], ".", UnknownName, "metrics='tofoo'.*tofu"),
        (["tofu"], "absent", NotFound, "absent is not a directory"),
        (["tofu"], ".", NotFound, "holds no .jsonl file; give the directory of TOFU, with forget10"),
        (["semeval"], ".", NotFound, "dev|test|subject|mmlu"),
    ],
)
def test_what_is_missing_is_named(tmp_path, names, folder, error, match):
    with pytest.raises(error, match=match):
        benchmarks.compare_benchmarks(model(), model(), names, tmp_path / folder)
