"""The real model: SmolLM2-135M from the cache. Run by `make test-all`; skipped where it has not been fetched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import repedit as rp
from repedit.activations.prediction import drop
from repedit.auditing.attack import deep_copy
from repedit.auditing.verdict import retain_damage
from repedit.errors import NotFound
from repedit.io.checkpoint import open_shards
from repedit.lower import lower
from repedit.models.default_model import cached
from repedit.rewrite.verification import reload_check
from tests.laws import leak

pytestmark = [pytest.mark.model, pytest.mark.slow]
WIKITEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2" / "wiki.test.raw"


@pytest.fixture(scope="module")
def lm() -> rp.Subject:
    try:
        cached()
    except NotFound as error:
        pytest.skip(str(error))
    return rp.load()


def test_it_is_the_model_of_the_chapter(lm):
    assert sum(p.numel() for p in lm.model.parameters()) == 134_515_008
    assert len(lm.model.state_dict()) == 273 and lm.architecture.tied
    ids = lm.tokenizer("The capital of France is", return_tensors="pt")
    assert lm.tokenizer.decode(lm.model(**ids).logits[0, -1].argmax()) == " Paris"


def test_every_tap_is_proved(lm):
    assert rp.check_architecture(lm.model).passed


@pytest.fixture(scope="module")
def pruned(lm) -> rp.Edit:
    (code, _), (prose, _) = rp.data.code().halves(), rp.data.prose().halves()
    f, r = (rp.collect(lm, c, limit_tokens=2000) for c in (code, prose))
    return rp.prune(rp.score(f, r), fraction=0.01)


def test_export_changes_the_planned_tensors_and_no_other_byte(lm, pruned, tmp_path: Path):
    record = rp.export(pruned, lm, tmp_path / "edited")
    base, edited = open_shards(cached()), open_shards(tmp_path / "edited")
    changed = {name for name in base.entries if not torch.equal(base.read(name), edited.read(name))}
    assert changed == set(record.plan) and set(base.entries) == set(edited.entries)


def test_a_process_without_repedit_computes_the_same_logits(lm, pruned, tmp_path: Path):
    rp.export(pruned, lm, tmp_path / "edited")
    assert reload_check(tmp_path / "edited").parameters == 134_515_008
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = rp.apply(pruned, lm).model(input_ids=ids, use_cache=False).logits
        found = rp.load(tmp_path / "edited").model(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 5e-3)])
def test_leak_of_a_projection_after_rounding(lm, dtype, bar):
    basis = torch.randn(576, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edit = rp.Edit({rp.Site.parse("5.mlp.out"): rp.LowRank.projection(basis)})
    plan = lower(edit, lm.architecture, lm.specs)
    (name,) = plan.operations
    weight = dict(lm.model.named_parameters())[name].detach().to(dtype)
    after = plan.apply(name, weight, lambda n: weight)
    basis = edit.maps[rp.Site.parse("5.mlp.out")].v
    assert leak(after.T, basis) / leak(weight.T, basis) <= bar


@pytest.mark.skipif(not WIKITEXT.exists(), reason=f"{WIKITEXT} is absent")
def test_pruning_code_neurons_spares_prose_and_random_ones_spare_both(lm):
    from bench.corpora import chunks, splits

    halves = splits()
    fit, test = ({n: chunks(h[i], count, 0) for n, h in halves.items()} for i, count in ((0, 40), (1, 25)))
    f, r = (rp.collect(lm, fit[name], limit_tokens=5000) for name in ("code", "prose"))
    edit = rp.prune(rp.score(f, r, combine="ratio"), fraction=0.05)
    found = {}
    for label, change in {"pruned": edit, "random": rp.random_like(edit, seed=0)}.items():
        sides = [
            [rp.predictions(lm, test[n], edit=e, limit_tokens=3100) for e in (None, change)] for n in ("code", "prose")
        ]
        found[label] = [drop(*side) for side in sides]
    assert found["pruned"][0] - found["pruned"][1] >= 35 and found["pruned"][1] <= 12
    # One seed of the control; the mean of five is held within 8 by bench/pruning.py.
    assert abs(found["random"][0] - found["random"][1]) <= 16


def test_it_knows_every_domain_of_facts(lm):
    facts = rp.data.facts("capitals")
    for domain, items in rp.data.by_domain((*facts.forget, *facts.retain)).items():
        found = rp.facts_accuracy(lm, items[::4])
        assert found.accuracy >= 0.6, f"{domain}: {found}"


def test_a_short_training_forgets_capitals_in_new_words_and_keeps_symbols(lm):
    facts, symbols = rp.data.facts("capitals"), rp.data.facts("symbols").forget[1::3]
    shown = [replace(fact, paraphrases=fact.paraphrases[:2]) for fact in facts.forget]
    kept = [fact for fact in facts.retain if fact not in symbols]
    edit = rp.mrp(lm, forget=shown, retain=kept, config={"steps": 25}, progress=False)
    edited = rp.apply(edit, lm)
    asked = rp.data.with_paraphrases(facts.forget[::3], only=[4])
    before, after = (rp.facts_accuracy(side, asked).accuracy for side in (lm, edited))
    assert before > 0.6 and after < 0.5 * before
    assert rp.facts_accuracy(edited, symbols).accuracy > 0.7
    assert rp.certificate(edited, edit, lm).form == "folded"


def test_one_changed_weight_is_audited_as_not_forgotten(lm, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))
    edited = deep_copy(lm)
    with torch.no_grad():
        edited.model.model.norm.weight[0] *= 1.0001
    found = rp.audit(edited, original=lm, facts=rp.data.facts("capitals"), attacks=("direct", "strip"), progress=False)
    assert found.verdict.word == "NOT FORGOTTEN" and 0.95 <= found.direct.value <= 1.05
    assert found.context["n_test"] == 151 and retain_damage(found.retain) == ""
