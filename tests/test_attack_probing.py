"""Attacks that read inside: the lens ends in the model's own answers, probes read what was planted, directions go."""

import random
import string
from dataclasses import replace

import numpy as np
import pytest
import torch

from repedit.auditing.attack import RAN, SKIPPED, ask
from repedit.auditing.attacks import directions as ablating
from repedit.auditing.attacks import probing
from repedit.auditing.attacks.directions import direction, first_component, mean_direction, without
from repedit.auditing.attacks.probing import lens, logit_lens, probe, question, states
from repedit.data import Fact, Splits
from repedit.errors import (
    ArgumentError,
    DataError,
    FingerprintError,
    NotEnoughRows,
    NotFinite,
    UnknownName,
    UnknownSite,
)
from repedit.models.subject import Subject
from repedit.sites import Point, Site
from tests.saved_models import merging_tokenizer
from tests.tiny import FAMILIES, tiny
from tests.tolerances import close

LETTERS = string.ascii_letters
# A space and a letter are one token, so that answers differ in their first token.
TOKENIZER = merging_tokenizer(*((" ", letter) for letter in LETTERS))
VOCABULARY = 320


def small(family: str, **changes) -> Subject:
    return replace(tiny(family, vocab_size=VOCABULARY, **changes), tokenizer=TOKENIZER)


def asked(number: int, end: str, answer: str, choices=(), **changes) -> Fact:
    """A fact whose prompt ends with a letter of choice."""
    rng = random.Random(number)
    start = "".join(rng.choices(string.digits, k=rng.randint(2, 4)))
    return Fact(id=f"f{number}", prompt=f"{start}{end}", answer=answer, choices=tuple(choices), **changes)


FACTS = tuple(asked(i, LETTERS[i % 5], LETTERS[i % 4], LETTERS[:4]) for i in range(24))
SPLITS = Splits(FACTS[:14], FACTS[14:], tuple(asked(i, LETTERS[30 + i % 5], "a", "abcd") for i in range(30, 40)))


def embedding(subject: Subject) -> torch.Tensor:
    return subject.model.get_input_embeddings().weight.data


def token(text: str) -> int:
    return TOKENIZER(text)["input_ids"][0]


def ends(subject: Subject, facts) -> torch.Tensor:
    """The model's own logits after each prompt, read alone."""
    with torch.no_grad():
        rows = [subject.model(input_ids=torch.tensor([TOKENIZER(f.prompt)["input_ids"]])).logits[0, -1] for f in facts]
    return torch.stack(rows)


def check_lens(subject: Subject) -> None:
    """The law: at the last block's output the lens is the model itself, fact by fact."""
    layer = len(subject.layout.layers) - 1
    found = logit_lens()(subject, SPLITS)
    row = found.settings.index(f"resid.post {layer}")
    truth = ask(subject, SPLITS.test)
    assert found.correct[row].astype(bool).tolist() == truth.correct.tolist()
    close(found.graded[row], truth.graded, "model, float32")
    site = Site(layer, Point.RESID_POST)
    seen = states(subject, [TOKENIZER(f.prompt)["input_ids"] for f in SPLITS.test], [site])[site]
    own = ends(subject, SPLITS.test)
    close(lens(subject, seen), own, "model, float32")
    names = [token(f" {c}") for c in "abcd"]
    assert torch.equal(lens(subject, seen)[:, names].argsort(-1), own[:, names].argsort(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_ends_in_the_models_own_answers(family):
    check_lens(small(family))


BROKEN = {
    "the first token instead of the last": ("captured", lambda plain: lambda s, p, sites, keep: plain(s, p, sites, lambda x: x[:, 0])),
    "the head without the final norm": ("lens", lambda plain: lambda s, seen: seen @ s.model.get_output_embeddings().weight.T.detach()),
    "the layer before": ("lens", lambda plain: lambda s, seen: plain(s, seen.roll(1, 0))),
    "the wrong answer as the right one": ("question", lambda plain: lambda *a: plain(*a)._replace(right=0)),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_lens_is_caught(name, monkeypatch):
    part, broken = BROKEN[name]
    monkeypatch.setattr(probing, part, broken(getattr(probing, part)))
    with pytest.raises(AssertionError):
        check_lens(small("llama"))


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "mixtral", "gptj"])
def test_streams_add_up(family):
    subject = small(family)
    names = [
        p for p in ("resid.pre", "attn.out", "resid.mid", "mlp.out", "resid.post") if p in subject.layout.points_at(0)
    ]
    sites = subject.select([f"*.{p}" for p in names])
    seen = states(subject, [TOKENIZER(f.prompt)["input_ids"] for f in FACTS], sites)
    with torch.no_grad():
        hidden = [subject.model(input_ids=torch.tensor([TOKENIZER(f.prompt)["input_ids"]]), output_hidden_states=True).hidden_states[1][0, -1] for f in FACTS]  # fmt: skip
    close(seen[Site(0, Point.RESID_POST)], torch.stack(hidden), "model, float32")
    for layer in range(2):
        at = {p: seen[Site(layer, Point(p))] for p in names}
        close(at["resid.pre"] + at["attn.out"] + at["mlp.out"], at["resid.post"], "model, float32")
        if "resid.mid" in at:
            close(at["resid.mid"] + at["mlp.out"], at["resid.post"], "model, float32")


def test_settings_name_stream_and_layer():
    found = logit_lens(streams=("mlp.out", "resid.mid"), layers=(1,))(small("llama"), SPLITS)
    assert found.settings == ("mlp.out 1", "resid.mid 1") and found.details["absent"] == []
    parallel = logit_lens()(small("gptj"), SPLITS)
    assert parallel.details["absent"] == ["resid.mid"] and len(parallel.settings) == 6


def test_answers_that_begin_alike_are_wrong_and_counted():
    subject = small("llama")
    embedding(subject)[token(" a")] = 100 * ends_direction(subject)
    items = (asked(0, "k", "a", ("a", "b")), asked(1, "k", "ax", ("ax", "ay", "b")))
    found = logit_lens(streams=("resid.post",))(subject, replace(SPLITS, test=items))
    assert found.correct[1].tolist() == [1, 0] and found.details["same_first_token"] == 1


def ends_direction(subject: Subject) -> torch.Tensor:
    """A direction that the final states of all prompts share the sign of."""
    site = Site(1, Point.RESID_POST)
    prompts = [TOKENIZER(asked(i, "k", "a").prompt)["input_ids"] for i in range(2)]
    normed = subject.model.model.norm(states(subject, prompts, [site])[site]).detach()
    return torch.nn.functional.normalize(normed, dim=-1).mean(0)


def test_an_answer_without_choices_must_be_the_likeliest_token():
    subject = small("llama")
    best = ends(subject, FACTS[:1])[0].argmax()
    word = TOKENIZER.decode([int(best)])
    items = [replace(FACTS[0], choices=()), replace(FACTS[0], id="g", choices=(), answer="z")]
    found = logit_lens(streams=("resid.post",))(subject, replace(SPLITS, test=tuple(items)))
    assert found.correct[1].tolist() == [int(word == " a"), int(word == " z")]
    embedding(subject)[token(" z")] = 100 * ends_direction(subject)
    found = logit_lens(streams=("resid.post",))(subject, replace(SPLITS, test=tuple(items)))
    assert found.correct[1].tolist() == [0, 1]


def quiet(family: str = "llama") -> Subject:
    """A model whose blocks write nothing: every state is the embedding of the last token."""
    subject = small(family, tie_word_embeddings=False)
    for branch in (b for pair in subject.layout.layers for b in pair):
        for name in (branch.parts[0].out.tensor, branch.bias):
            if name is not None:
                dict(subject.model.named_parameters())[name].data.zero_()
    return subject


def classed(count: int = 120) -> Splits:
    """Facts whose last letter says the answer, five letters an answer; every answer comes up often."""
    items = tuple(asked(i, LETTERS[10 + i % 20], "abcd"[i % 4], "abcd") for i in range(count))
    return Splits(items[: count // 2], items[count // 2 :])


def matched(subject: Subject) -> Splits:
    """Facts with an answer each, whose last letter's embedding is a turned unembedding of the answer."""
    head = subject.model.get_output_embeddings().weight.data
    turn = torch.linalg.qr(torch.randn(head.shape[1], head.shape[1], generator=torch.Generator().manual_seed(0)))[0]
    items = []
    for i, letter in enumerate(LETTERS):
        embedding(subject)[token(letter)] = head[token(f" {letter}")] @ turn
        others = random.Random(i).sample([c for c in LETTERS if c != letter], 3)
        items.append(asked(i, letter, letter, sorted([letter, *others])))
    return Splits(tuple(items[:40]), tuple(items[40:]))


@pytest.mark.parametrize(("kind", "family"), [("linear", "gpt2"), ("linear", "llama"), ("mlp", "llama")])
def test_a_probe_reads_classes_until_they_are_gone(kind, family):
    subject, splits = quiet(family), classed()
    attack = probe(kind, streams=("resid.post",), layers=(0,))
    found = attack(subject, splits)
    assert found.details["kind"] == "class" and found.accuracy["resid.post 0"] == 1.0
    assert found.details["permuted"]["resid.post 0"] < 0.6
    embedding(subject)[[token(c) for c in LETTERS]] = embedding(subject)[token("a")].clone()
    gone = attack(subject, splits)
    assert gone.accuracy["resid.post 0"] < 0.5


def test_a_probe_matches_answers_it_never_saw_until_they_are_gone():
    subject = quiet()
    splits, attack = matched(subject), probe()
    found = attack(subject, splits)
    assert found.details["kind"] == "match" and min(found.accuracy[f"resid.post {i}"] for i in (0, 1)) == 1.0
    assert found.details["permuted"]["resid.post 0"] < 0.7
    # Nothing is written by the branches, so nothing can be read there.
    assert found.accuracy["mlp.out 0"] < 0.6 and found.accuracy["attn.out 1"] < 0.6
    embedding(subject)[[token(c) for c in LETTERS]] = torch.randn(52, 24, generator=torch.Generator().manual_seed(1))
    assert attack(subject, splits).accuracy["resid.post 0"] < 0.7


BLIND = {
    "labels that are not permuted": ("_permutation", lambda plain: lambda facts, seed: list(range(len(facts)))),
    "states of other facts": ("states", lambda plain: lambda *a: {s: x.roll(1, 0) for s, x in plain(*a).items()}),
    "a fit of nothing": ("_ridge", lambda plain: lambda x, y, use, at, s, seed: torch.zeros(len(use), len(s), 2, len(at), y.shape[2]).double()),
}  # fmt: skip


@pytest.mark.parametrize("name", BLIND)
def test_a_broken_probe_is_caught(name, monkeypatch):
    part, broken = BLIND[name]
    monkeypatch.setattr(probing, part, broken(getattr(probing, part)))
    with pytest.raises(AssertionError):
        test_a_probe_matches_answers_it_never_saw_until_they_are_gone()


def test_without_choices_a_probe_chooses_among_the_answers_of_the_domain():
    subject = quiet()
    splits = matched(subject)
    bare = Splits(
        *(tuple(replace(f, choices=(), domain=f.id[-1]) for f in part) for part in (splits.train, splits.test))
    )
    found = probe(streams=("resid.post",), layers=(0,))(subject, bare)
    task = probing._task(subject, bare, 0)
    assert found.details["kind"] == "match" and found.accuracy["resid.post 0"] == 1.0
    sizes = [sum(f.domain == fact.domain for f in (*bare.train, *bare.test)) for fact in bare.test]
    assert [len(choice.vectors) for choice in task.choices] == sizes
    # A cosine: no answer is favoured for the length of its unembedding.
    lengths = torch.cat([choice.vectors.norm(dim=1) for choice in task.choices])
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(20, 50), (60, 12)])
def test_ridge_is_the_closed_form_and_losing_coordinates_costs_nothing(n, d):
    from sklearn.linear_model import Ridge

    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(n + 7, d, generator=generator).double() * 3 + 1
    y = torch.randn(n, 4, generator=generator).double()
    x, at = probing._standardized(seen, n)
    use = torch.ones(2, n, dtype=torch.bool)
    use[1, 15:] = False
    found = probing._ridge(x, torch.stack([y, -y]), use, at, (0.1, 2.0), 0)
    whole = (seen - seen[:n].mean(0)) / seen[:n].std(0)
    whole = whole / whole[:n].square().sum(1).mean().sqrt()
    for row, strength in zip(found[0], (0.1, 2.0), strict=True):
        plain = Ridge(alpha=strength).fit(whole[:n].numpy(), y.numpy()).predict(whole[n:].numpy())
        assert np.allclose(row[0], plain, atol=1e-6) and np.allclose(row[1], -plain, atol=1e-6)
    # A part of the rows is not centred any more; the mean of the targets is taken out all the same.
    plain = Ridge(alpha=0.1, fit_intercept=False).fit(whole[:15].numpy(), (y[:15] - y[:15].mean(0)).numpy())
    assert np.allclose(found[1, 0, 0] - y[:15].mean(0), plain.predict(whole[n:].numpy()), atol=1e-6)


def test_a_network_learns_what_no_line_fits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator).double() / 2
    y, use = (x[:, :1] * x[:, 1:2]).sign()[None], torch.arange(400)[None] < 300
    line, net = (fit(x, y, use, x[300:], (0.01,), 0)[0, 0, 0] for fit in (probing._ridge, probing._network))
    share = [float((found.sign() == y[0, 300:]).double().mean()) for found in (line, net)]
    assert share[0] < 0.65 < 0.85 < share[1]


def test_networks_side_by_side_are_those_trained_alone():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=generator).double() / 2, torch.randn(2, 20, 3, generator=generator).double()
    y[1] = y[0].flip(0)
    use = torch.rand(3, 20, generator=generator) < 0.7
    both = probing._network(x, y, use, x, (0.01, 1.0), 0)
    alone = probing._network(x, y[1:], use[2:], x, (1.0,), 0)
    assert torch.allclose(both[2, 1, 1], alone[0, 0, 0], atol=1e-2)
    assert not torch.allclose(both[2, 0, 1], alone[0, 0, 0], atol=0.1)


def test_the_penalty_is_chosen_by_error_on_left_out_folds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 10, generator=generator).double()
    x = x / x.square().sum(1).mean().sqrt()
    clean, noise = (
        x @ torch.randn(10, 3, generator=generator).double(),
        torch.randn(50, 3, generator=generator).double(),
    )
    y, use, strengths = (
        torch.stack([clean, noise]),
        torch.arange(50) % 5 != torch.arange(5)[:, None],
        (1e-3, 1.0, 100.0),
    )
    assert probing._best(probing._ridge(x, y, use, x, strengths, 0), y, use, strengths) == [0, 2]
    # Errors on the rows that were learned from would always speak for the smallest penalty.
    assert probing._best(probing._ridge(x, y, use, x, strengths, 0), y, ~use, strengths) == [0, 0]


def test_folds_keep_entities_together_and_permutations_keep_domains():
    facts = [asked(i, "k", "a", ("a", "b"), entity=f"e{i // 3}", domain=f"d{i % 2}") for i in range(30)]
    fold, order = probing._folds(facts, 0), probing._permutation(facts, 0)
    assert (
        all(len({int(fold[i]) for i in range(e, e + 3)}) == 1 for e in range(0, 30, 3)) and len(set(fold.tolist())) == 5
    )
    assert (
        sorted(order) == list(range(30))
        and order != list(range(30))
        and all(i % 2 == o % 2 for i, o in enumerate(order))
    )
    lone = [replace(fact, entity="one") for fact in facts]
    assert len(set(probing._folds(lone, 0).tolist())) == 5


def shifted(size: float = 30.0) -> tuple[Subject, Subject, torch.Tensor]:
    """(edited, original, direction): one bias of the edited model pushes every token along a direction after layer 0."""
    edited, original = small("gpt2"), small("gpt2")
    u = torch.nn.functional.normalize(torch.randn(24, generator=torch.Generator().manual_seed(3)), dim=0)
    edited.model.transformer.h[0].mlp.c_proj.bias.data.add_(size * u)
    return edited, original, u


def test_a_direction_that_hides_is_found_and_taken_out():
    edited, original, u = shifted()
    found = direction(contrast=original)(edited, SPLITS)
    assert found.settings[:3] == (
        "edited - original, all layers",
        "edited - original, layer 0",
        "edited - original, layer 1",
    )
    assert found.settings[4] == "first PC, layer 0" and found.details["layers"] == [0, 1]
    with without(original, {0: u}):
        expected = ask(original, SPLITS.test).graded
    assert np.abs(ask(edited, SPLITS.test).graded - expected).max() > 0.1
    for setting in ("edited - original, layer 0", "first PC, layer 0"):
        assert found.graded[found.settings.index(setting)] == pytest.approx(expected, abs=1e-3), setting


def test_all_layers_lose_each_its_own_direction():
    edited, original, _ = shifted()
    taken = ablating._directions(edited, original, SPLITS, 64, 0)["edited - original"]
    with without(edited, taken):
        sites = edited.select("*.resid.post")
        seen = states(edited, [TOKENIZER(f.prompt)["input_ids"] for f in SPLITS.test], sites)
        expected = ask(edited, SPLITS.test).graded
    # The end of the last block is seen before its hook at lens level, so only the states themselves are compared.
    assert all(float((seen[s] @ taken[s.layer]).abs().max()) < 1e-4 for s in sites) and set(taken) == {0, 1}
    assert direction(contrast=original)(edited, SPLITS).graded[0] == pytest.approx(expected, abs=1e-6)


def test_a_model_is_nowhere_apart_from_itself():
    subject = small("llama")
    found = direction(contrast=small("llama"))(subject, SPLITS)
    assert found.details["without"] == {"edited - original": [0, 1], "first PC": [0, 1]}
    assert (found.graded == ask(subject, SPLITS.test).graded).all() and len(found.settings) == 6


def test_without_a_contrast_forget_is_compared_with_retain():
    subject = small("llama")
    found = direction()(subject, SPLITS)
    assert found.settings[0] == "forget - retain, all layers" and found.settings[3] == "first PC, all layers"
    with torch.no_grad():
        means = []
        for facts in (SPLITS.train, SPLITS.retain):
            ids = [torch.tensor([TOKENIZER(f.prompt)["input_ids"]]) for f in facts]
            hidden = [subject.model(input_ids=i, output_hidden_states=True).hidden_states[1][0, 1:] for i in ids]
            means.append(torch.cat(hidden))
    d = ablating._directions(subject, None, SPLITS, 64, 0)["forget - retain"][0]
    expected = mean_direction(*means)
    assert torch.allclose(d, expected / expected.norm(), atol=1e-4)


def test_outliers_do_not_turn_a_direction():
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(200, 6, generator=generator) * 0.1
    mine = other + torch.tensor([1.0, 0, 0, 0, 0, 0])
    mine[7] = torch.tensor([500.0, 900.0, 0, 0, 0, 0])
    plain = mine.mean(0) - other.mean(0)
    assert float(plain[1]) > 1
    assert torch.allclose(mean_direction(mine, other), torch.eye(6)[0], atol=0.02)


@pytest.mark.parametrize(("n", "d"), [(40, 8), (8, 40)])
def test_the_first_component_is_the_first_singular_vector(n, d):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 0.3
    expected = torch.linalg.svd(rows)[2][0]
    assert abs(float(first_component(rows) @ expected)) == pytest.approx(1, abs=1e-4)
    assert float(first_component(rows).norm()) == pytest.approx(1, abs=1e-5)


def test_deep_models_are_tried_at_every_fourth_layer():
    found = direction(items=2)(small("llama", num_hidden_layers=12), replace(SPLITS, test=SPLITS.test[:1]))
    assert found.details["layers"] == [3, 7, 11] and len(found.settings) == 8


def test_without_anything_to_compare_with_it_is_skipped():
    found = direction()(small("llama"), replace(SPLITS, retain=()))
    assert found.status == SKIPPED and found.reason == "needs the original to compare with, or retain facts"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "attack",
    [logit_lens(), probe(), probe("mlp", layers=(0,), streams=("mlp.out",)), direction()],
    ids=lambda a: a.name,
)
def test_the_model_is_left_as_it_was(attack, family):
    subject = small(family)
    before, logits = subject.fingerprint(), ends(subject, FACTS[:3])
    found, again = attack(subject, SPLITS), attack(subject, SPLITS)
    assert found.status == RAN and (found.correct == again.correct).all() and (found.graded == again.graded).all()
    assert subject.fingerprint() == before and torch.equal(ends(subject, FACTS[:3]), logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


@pytest.mark.parametrize(("attack", "module", "part"), [
    (logit_lens(), probing, "_read"), (probe(), probing, "_scored"), (direction(), ablating, "ask"),
])  # fmt: skip
def test_no_hook_stays_after_an_exception(attack, module, part, monkeypatch):
    subject = small("llama")
    before = subject.fingerprint()

    def fails(*_):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(module, part, fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        attack(subject, SPLITS)
    assert subject.fingerprint() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: logit_lens(streams=()), ArgumentError, r"streams=\(\); give at least one of"),
    (lambda: logit_lens(streams=("mlp.neurons",)), UnknownSite, "stream 'mlp.neurons'; there are resid.post, mlp.out"),
    (lambda: logit_lens(layers=(2,))(small("llama"), SPLITS), UnknownSite, r"attack 'logit_lens': layers \[2\] do not exist; layers are 0..1"),
    (lambda: probe("linaer"), UnknownName, "kind='linaer'; did you mean 'linear'"),
    (lambda: probe(streams=("logits",)), UnknownSite, "stream 'logits'"),
    (lambda: probe()(small("llama"), replace(SPLITS, train=FACTS[:1])), NotEnoughRows, "attack 'probe': T has 1 facts; a probe needs at least 2"),
    (lambda: direction(contrast=small("llama", hidden_size=32))(small("llama"), SPLITS), FingerprintError, "attack 'direction': the contrast has 2 layers of width 32, the model 2 of 24"),
    (lambda: direction()(small("llama"), replace(SPLITS, train=(replace(FACTS[0], prompt="k"),))), NotEnoughRows, "no prompt has a second token"),
    (lambda: question(replace(small("gpt2"), tokenizer=merging_tokenizer(("q", " "))), replace(FACTS[0], prompt="q")), DataError, "fact 'f0': no token stands before the answer"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("attack", "message"), [
    (logit_lens(), "attack 'logit_lens': the logits of a stream are not finite; load the model in float32?"),
    (probe(), "attack 'probe': 0.resid.post: a state is not finite; load the model in float32?"),
    (direction(), "attack 'direction': 0.resid.post: a state is not finite; load the model in float32?"),
])  # fmt: skip
def test_states_that_are_not_finite_are_refused(attack, message):
    subject = small("llama")
    subject.model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(NotFinite, match=message):
        attack(subject, SPLITS)
