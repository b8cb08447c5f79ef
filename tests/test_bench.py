"""What the benchmarks compare is the same work, and what they say about noise is what the protocol asks."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import repedit as rp
from bench import cpu, peers, removal, removal_names, removal_table
from bench.__main__ import table
from bench.by_hand import load_edit_save
from bench.peers import taken
from bench.peers_figure import draw
from bench.record import record
from bench.relearning import answer_loss
from bench.timing import Ratio, alternated, ratio
from repedit.data import Batch, Fact
from repedit.data.encoding import mention
from repedit.sites import Point
from tests.saved_models import saved
from tests.teachable_models import blank


def _edit(kind, width, d):
    if kind == "neurons":
        return rp.Edit({rp.Site.parse("0.mlp.neurons"): rp.Diagonal.mask(torch.arange(width) % 3 > 0)})
    map_ = rp.LowRank.projection(torch.randn(d, 2, generator=torch.Generator().manual_seed(0)))
    return rp.Edit(dict.fromkeys(map(rp.Site.parse, ("0.attn.out", "1.mlp.out")), map_))


def _weights(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def _is_the_exported_one(kind, tmp_path):
    source = saved(tmp_path / "model")
    layout = rp.load(source).layout
    edit = _edit(kind, layout.width_of(0, Point.MLP_NEURONS), layout.width_of(0, Point.MLP_OUT))
    rp.export(edit, source, tmp_path / "ours")
    load_edit_save(edit, source, tmp_path / "theirs")
    before, ours, theirs = (_weights(tmp_path / name) for name in ("model", "ours", "theirs"))
    assert any(not torch.equal(ours[name], before[name]) for name in ours)
    assert set(theirs) <= set(ours)
    for name, value in theirs.items():
        torch.testing.assert_close(value, ours[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["neurons", "projection"])
def test_an_edit_by_hand_is_the_exported_one(kind, tmp_path):
    _is_the_exported_one(kind, tmp_path)


def test_half_of_an_edit_by_hand_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.by_hand._zero", lambda mlp, pruned: mlp.down_proj.weight[:, pruned].zero_())
    with pytest.raises(AssertionError):
        _is_the_exported_one("neurons", tmp_path)


def _found(median, spread=0.01, noise=0.01):
    return Ratio(median, median - spread, median + spread, 7, (1 - noise, 1 + noise))


def test_a_verdict_needs_both_quantiles_and_a_quieter_control():
    above = lambda value: value >= 1.0  # noqa: E731
    assert _found(1.2).verdict(above) == "pass" and _found(0.8).verdict(above) == "fail"
    assert _found(1.2, spread=0.3).verdict(above) == "not resolved"
    assert _found(1.2, noise=0.3).verdict(above) == "not resolved"


def test_rounds_run_both_and_ours_again():
    calls = []
    rounds = alternated(lambda: calls.append("a") or 2.0, lambda: calls.append("b") or 6.0, pairs=5)
    assert calls.count("a") == 1 + 2 * 5 and calls.count("b") == 1 + 5
    assert ratio(rounds) == Ratio(3.0, 3.0, 3.0, 5, (1.0, 1.0))


def test_a_peer_that_is_absent_is_a_row_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.cpu.PEERS", tmp_path)
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    z, mask = torch.randn(8, 4), torch.ones(8, dtype=torch.bool)
    rows = [
        cpu.against_taker(z, mask),
        *peers.streams(8, "concept-erasure 0.2.4"),
        *cpu.projections(64, 8, 2, modes=()),
    ]
    absent = [row["status"] for row in rows if row["status"].startswith("skipped")]
    assert len(absent) == 3 and all(status.startswith("skipped: pip install ") for status in absent)
    assert "taker==1.2.3" in absent[0] and "concept-erasure==0.2.4" in absent[1]


def test_the_table_names_what_is_missing(tmp_path, monkeypatch):
    skipped = taken("ours", "them", "CPU", {"name": "x", "status": "skipped: pip install them"})
    found = [
        taken("ours", "them", "CPU, |z|", _found(value).row("x", ">= 1.0", lambda r: r >= 1.0)) for value in (0.5, 12.3)
    ]
    lines = table([*found, skipped]).splitlines()
    assert lines[2] == "| ours | them | CPU, \\|z\\| | 0.50 | 0.49 to 0.51 | >= 1 | missed |"
    assert "| 12 | 12 to 12 | >= 1 | pass |" in lines[3]
    assert lines[4] == "| ours | them | CPU |  |  |  | skipped: pip install them |"
    monkeypatch.setattr("bench.record.RESULTS", tmp_path)
    path = record("peers", [*found, skipped], module="", seed=0)
    assert draw(path, tmp_path / "drawn.png").stat().st_size > 5000


def _gradient(subject, loss):
    subject.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().clone() for p in subject.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("shared", [0, 3])
def test_a_shared_beginning_that_is_read_once_gives_the_same_gradients(shared):
    subject, g = blank(), torch.Generator().manual_seed(0)
    subject.model.requires_grad_(True)
    ids = torch.randint(3, 250, (4, 9), generator=g)
    ids[:, :shared] = ids[:1, :shared]
    mask = torch.arange(9) < torch.tensor([[9], [8], [9], [7]])
    answer = mask & (torch.arange(9) >= 6)
    batch = Batch(ids, mask, tuple("abcd"), answer=answer)
    logits = subject.model(ids, attention_mask=mask.long()).logits[:, :-1][answer[:, 1:]]
    wanted = _gradient(subject, torch.nn.functional.cross_entropy(logits, ids[answer]))
    found = _gradient(subject, answer_loss(subject, batch))
    assert float((found - wanted).norm()) < 1e-3 * float(wanted.norm())
    missed = _gradient(
        subject, answer_loss(subject, Batch(ids, mask, tuple("abcd"), answer=answer & (ids != ids[0, 6])))
    )
    assert float((missed - wanted).norm()) > 1e-2 * float(wanted.norm())


def test_invented_names_take_the_place_of_every_mention():
    facts = rp.data.facts("capitals").forget
    new = {removal.entity_of(fact): f"Zork{number}" for number, fact in enumerate(facts)}
    renamed = removal.named_anew(facts, new)
    assert all(fact.entity in text for fact in renamed for text in fact.prompts)
    assert not any(mention(text, old.entity) for old, fact in zip(facts, renamed, strict=True) for text in fact.prompts)
    assert [fact.choices for fact in renamed] == [fact.choices for fact in facts]


def test_the_page_on_removal_shows_what_the_result_files_say():
    text = removal_table.PAGE.read_text(encoding="utf-8")
    assert removal_table.page(text) == text, "run python -m bench.removal --table"
    assert removal_table.page(text.replace("| 0.", "| 0.9", 1)) == text


def test_recovery_is_zero_at_the_floor_and_one_at_the_original():
    assert removal_table.recovery(0.2, 0.8, 0.2, 75)[0] == 0 and removal_table.recovery(0.8, 0.8, 0.2, 75)[0] == 1
    r, bound = removal_table.recovery(0.5, 0.8, 0.2, 75)
    assert r == pytest.approx(0.5) and r < bound < removal_table.recovery(0.5, 0.8, 0.2, 20)[1]


def _names_are_one(target, tokens):
    """Texts that differ in tokens of names get the same logits, and the model itself and the output matrix stay as they were."""
    lm = blank(tie_word_embeddings=True)
    before = lm.model.get_input_embeddings().weight.detach().clone()
    rows = SimpleNamespace(lm=lm, capitals=())
    edited, notes = removal_names.names_replaced(target)(rows, 0)
    texts = [torch.tensor([[1, 40, token, 50]]) for token in tokens]
    first, second = (edited.model(ids).logits for ids in texts)
    assert torch.equal(first, second) and notes["untied"]
    assert torch.equal(edited.model.get_output_embeddings().weight, before)
    assert torch.equal(lm.model.get_input_embeddings().weight, before)


def test_averaged_names_cannot_be_told_apart(monkeypatch):
    monkeypatch.setattr(removal_names, "name_tokens", lambda lm, names: [60, 61, 62])
    _names_are_one("mean", (60, 62))
    for target, tokens in (("exchange", (60, 62)), ("mean", (60, 63))):
        with pytest.raises(AssertionError):
            _names_are_one(target, tokens)


def _one_embedding_a_domain(rare, averaged):
    """The tokens of a domain from the number `rare` on have one embedding; every other row and the output stay as they were."""
    lm = blank(tie_word_embeddings=True)
    before = lm.model.get_input_embeddings().weight.detach().clone()
    facts = [Fact(prompt=f"{name} has", answer="x", entity=name, id=name) for name in ("ab", "cd")]
    edited, tokens = removal_names.averaged_names(SimpleNamespace(lm=lm), {"capitals": facts}, rare)
    weight = edited.model.get_input_embeddings().weight
    assert tokens == {"capitals": averaged}
    assert all(torch.equal(weight[token], before[averaged].mean(0)) for token in averaged)
    rest = [token for token in range(len(weight)) if token not in averaged]
    assert torch.equal(weight[rest], before[rest]) and torch.equal(edited.model.get_output_embeddings().weight, before)


def test_rare_tokens_of_a_domain_get_one_embedding(monkeypatch):
    def name_tokens(lm, names, spelt, rare):
        return [token for token in (10, 20, 30, 40) if token >= rare]

    monkeypatch.setattr(removal_names, "name_tokens", name_tokens)
    _one_embedding_a_domain(20, [20, 30, 40])
    with pytest.raises(AssertionError):
        _one_embedding_a_domain(30, [20, 30, 40])


def _one_language_one_group(names, expected):
    """Names of one language share a group; a lone language, a name without one and a token of two languages are the rest."""
    capitals = [Fact(prompt=f"{name} has", answer="x", entity=name, id=name) for name in names]
    languages = [replace(fact, answer=fact.entity[0]) for fact in capitals if fact.entity != "d"]
    rows = SimpleNamespace(lm=None, capitals=capitals, languages=languages)
    groups = removal_names.language_groups(rows, sorted({token for tokens in names.values() for token in tokens}))
    assert sorted(map(sorted, groups)) == expected


def test_names_are_averaged_by_the_language_of_their_country(monkeypatch):
    names = {"a1": [1], "a2": [2, 4], "b1": [3], "b2": [5, 4], "c1": [6], "d": [7]}
    monkeypatch.setattr(removal_names, "name_tokens", lambda lm, asked: names[asked[0]])
    _one_language_one_group(names, [[1, 2], [3, 5], [4, 6, 7]])
    names["b2"] = [5]  # the token is of one language now
    with pytest.raises(AssertionError):
        _one_language_one_group(names, [[1, 2], [3, 5], [4, 6, 7]])
