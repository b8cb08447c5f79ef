"""Attacks that round or shake the weights: each touches what it says, as it says, and only in its own copy."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from repedit.auditing.attack import RAN, SKIPPED, ask
from repedit.auditing.attacks import weights as rounding
from repedit.auditing.attacks import weights as shaking
from repedit.auditing.attacks.weights import (
    perturb,
    projections,
    pruned,
    quantize,
    saliency,
    set_difference,
    survival,
)
from repedit.data import Fact, Facts, Splits
from repedit.data.encoding import encoded
from repedit.errors import ArgumentError, FingerprintError, FractionError, NotFinite, QuantizedModel, UnknownName
from repedit.models.subject import Subject
from repedit.quantization import BITS, LEVELS, fake_quantize
from tests.saved_models import byte_tokenizer
from tests.tiny import tiny

ANSWERS = ("ab", "ba", "cd")


def short(number: int) -> Fact:
    return Fact(id=f"f{number}", prompt=f"{'xyz'[number % 3]} {number} is", answer=ANSWERS[number % 3], choices=ANSWERS)


FACTS = Facts(tuple(map(short, range(10))), tuple(map(short, range(10, 13))))
SPLITS = Splits(FACTS.forget[:3], FACTS.forget[3:7], FACTS.retain)
FAMILIES = ("gpt2", "llama", "mixtral")


def small(family: str, **changes) -> Subject:
    """A tiny random model that reads bytes."""
    room = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
    return replace(tiny(family, vocab_size=260, **room, **changes), tokenizer=byte_tokenizer())


def weights(subject: Subject) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in subject.model.named_parameters()}


def asked_with(monkeypatch, module) -> list[dict[str, torch.Tensor]]:
    """The weights of every model that the attacks of a module ask from here on."""
    seen, plain = [], module.ask
    monkeypatch.setattr(module, "ask", lambda subject, facts: seen.append(weights(subject)) or plain(subject, facts))
    return seen


def in_blocks(subject: Subject, name: str) -> bool:
    return any(f".{i}." in name for i in range(len(subject.layout.layers)))


OWN = (*BITS, *LEVELS)


def ratio(x: float, y: float) -> float:
    return float(np.float32(x) / np.float32(y))


def one_by_one(row: list[float], scheme: str) -> list[float]:
    """A group of weights rounded number by number."""
    top = max(abs(x) for x in row)
    if top == 0:
        return row
    if scheme in BITS:
        step = ratio(top, 2 ** (BITS[scheme] - 1) - 1)
        return [round(ratio(x, step)) * step for x in row]
    return [min(LEVELS[scheme], key=lambda level: abs(level - x / top)) * top for x in row]


@pytest.mark.parametrize("scheme", OWN)
@pytest.mark.parametrize("width", [128, 130, 64, 30])
def test_rounding_equals_a_loop_over_numbers(scheme, width):
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    size = width if scheme == "int8" or width % 64 else 64
    expected = [
        [y for start in range(0, width, size) for y in one_by_one(row[start : start + size], scheme)]
        for row in weight.tolist()
    ]
    assert torch.allclose(fake_quantize(weight, scheme), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", OWN)
def test_rounding_twice_is_rounding_once(scheme, dtype):
    once = fake_quantize(torch.randn(7, 192, generator=torch.Generator().manual_seed(0)).to(dtype), scheme)
    assert once.dtype == dtype and torch.equal(fake_quantize(once, scheme), once)


@pytest.mark.parametrize("scheme", BITS)
def test_an_error_is_at_most_half_a_step(scheme):
    weight = torch.randn(9, 128, generator=torch.Generator().manual_seed(1))
    groups = weight.unflatten(-1, (-1, 128 if scheme == "int8" else 64))
    step = groups.abs().amax(-1, keepdim=True) / (2 ** (BITS[scheme] - 1) - 1)
    error = (fake_quantize(weight, scheme) - weight).abs().unflatten(-1, groups.shape[1:])
    assert bool((error <= step / 2 * (1 + 1e-5)).all()) and float((error / step).max()) > 0.45


@pytest.mark.parametrize("scheme", OWN)
def test_a_group_of_zeros_stays_zero_and_disturbs_no_other(scheme):
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(2))
    half = weight.clone()
    half[:, :64] = 0
    assert torch.equal(fake_quantize(half, scheme)[:, :64], torch.zeros(3, 64))
    if scheme != "int8":
        assert torch.equal(fake_quantize(half, scheme)[:, 64:], fake_quantize(weight, scheme)[:, 64:])


def test_the_float_levels_are_those_published():
    assert [len(LEVELS[s]) for s in ("nf4", "fp4")] == [16, 15]
    assert all(list(levels) == sorted(levels) and {-1.0, 0.0, 1.0} <= set(levels) for levels in LEVELS.values())


def check_quantized(subject: Subject, seen: list[dict[str, torch.Tensor]], schemes) -> None:
    """The law: every matrix of the blocks is rounded along its inputs, and nothing else is changed."""
    before = weights(subject)
    for scheme, after in zip(schemes, seen, strict=True):
        for name, w in before.items():
            flipped = subject.architecture.transposed and w.ndim == 2
            if w.ndim < 2 or not in_blocks(subject, name):
                expected = w
            else:
                expected = fake_quantize(w.T, scheme).T if flipped else fake_quantize(w, scheme)
                assert not torch.equal(expected, w)
            assert torch.equal(after[name], expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_the_blocks_is_rounded_and_nothing_else(family, monkeypatch):
    subject, seen = small(family), asked_with(monkeypatch, rounding)
    before = subject.fingerprint()
    found = quantize(schemes=OWN)(subject, SPLITS)
    check_quantized(subject, seen, OWN)
    assert found.settings == OWN and found.status == RAN
    inside = [n for n, p in subject.model.named_parameters() if p.ndim > 1 and in_blocks(subject, n)]
    assert found.details["touched"] == len(inside) >= 8 and found.items == tuple(f.id for f in SPLITS.test)
    assert subject.fingerprint() == before


LAZY = {
    "a layer is skipped": lambda s: {n: t for n, t in projections(s).items() if ".1." not in n},
    "a matrix is rounded along its outputs": lambda s: {n: not t for n, t in projections(s).items()},
    "the head is rounded too": lambda s: projections(s) | {"lm_head.weight": False},
}


@pytest.mark.parametrize("name", LAZY)
def test_a_lazy_quantiser_is_caught(name, monkeypatch):
    subject, seen = small("llama", tie_word_embeddings=False), asked_with(monkeypatch, rounding)
    monkeypatch.setattr(rounding, "projections", LAZY[name])
    quantize(schemes=("int4",))(subject, SPLITS)
    with pytest.raises(AssertionError):
        check_quantized(subject, seen, ("int4",))


def test_groups_run_along_the_inputs_of_a_conv1d(monkeypatch):
    subject, seen = small("gpt2", n_embd=128), asked_with(monkeypatch, rounding)
    found = quantize(schemes=("int4",))(subject, SPLITS)
    stored = dict(subject.model.named_parameters())["transformer.h.0.mlp.c_fc.weight"].detach()
    columns = torch.cat([fake_quantize(half.T, "int4", 64).T for half in stored.split(64)])
    assert torch.equal(seen[0]["transformer.h.0.mlp.c_fc.weight"], columns) and not found.details["per_row"]


def test_matrices_that_no_group_divides_are_named(caplog):
    subject = small("llama", hidden_size=64, intermediate_size=40)
    with caplog.at_level(logging.INFO, logger="repedit"):
        found = quantize(schemes=("int8", "int4"))(subject, SPLITS)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert found.details["per_row"] == names
    assert f"64 does not divide the width of 2 matrices, their rows are the groups: {', '.join(names)}" in caplog.text


def test_an_update_below_half_a_step_vanishes():
    original, edited = small("llama", hidden_size=64), small("llama", hidden_size=64)
    with torch.no_grad():
        for name in projections(original):
            mine, other = (dict(s.model.named_parameters())[name] for s in (original, edited))
            mine.copy_(fake_quantize(mine, "int4"))
            groups = mine.unflatten(-1, (-1, 64 if mine.shape[-1] % 64 == 0 else mine.shape[-1]))
            top = groups.abs().amax(-1, keepdim=True)
            push = 0.45 * top / 7 * torch.randn_like(groups).sign() * (groups.abs() < top)
            other.copy_((groups + push).flatten(-2))
    truth = quantize(schemes=("int4",))(original, SPLITS)
    found = quantize(schemes=("int4",))(edited, SPLITS)
    assert np.abs(ask(original, SPLITS.test).graded - ask(edited, SPLITS.test).graded).max() > 0.01
    assert np.allclose(found.graded, truth.graded, atol=1e-4)
    kept = survival(edited, original, "int4")
    assert set(kept) == set(projections(original)) and all(abs(v["cosine"]) < 1e-3 for v in kept.values())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_survival_grows_with_the_update(family):
    size = {"n_embd": 128} if family == "gpt2" else {"hidden_size": 128}
    original, found = small(family, **size), []
    for share in (0.0025, 0.025, 0.5):
        edited = small(family, **size)
        with torch.no_grad():
            name = next(iter(projections(edited)))
            w = dict(edited.model.named_parameters())[name]
            w.add_(share * w.std() * torch.randn(w.shape, generator=torch.Generator().manual_seed(0)))
        kept = survival(edited, original, "int4")
        assert list(kept) == [name] and kept[name]["relative"] == pytest.approx(share, rel=0.02)
        found.append(kept[name]["cosine"])
    # Measured on 576 x 1536: .09, .29 and .96.
    assert found == pytest.approx([0.09, 0.29, 0.96], abs=0.06)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: quantize(schemes=("int5",)), UnknownName, "scheme 'int5'; did you mean 'int"),
    (lambda: quantize(schemes=()), ArgumentError, r"schemes=\(\); give at least one of"),
    (lambda: fake_quantize(torch.ones(2, 4), "q4"), UnknownName, "scheme 'q4'"),
    (lambda: fake_quantize(torch.ones(2, 4), "int4", 0), ArgumentError, "group=0; give the number of inputs that share a step"),
    (lambda: perturb(noise=(0.0,)), ArgumentError, r"noise=\(0.0,\), xavier=0.1; noise is above 0"),
    (lambda: perturb(prune=(1.0,)), FractionError, r"the shares \[1.0\] are outside \(0, 1\)"),
    (lambda: perturb(noise=(), prune=(), shrink=()), ArgumentError, "noise, prune and shrink are all empty"),
    (lambda: set_difference(pairs=()), ArgumentError, r"pairs=\(\); give at least one \(p, q\)"),
    (lambda: set_difference(pairs=((0.1, 0.0),)), FractionError, r"the shares \[0.0\] are outside"),
    (lambda: survival(small("llama"), small("gpt2"), "int4"), FingerprintError, "differ in .* tensors, such as"),
    (lambda: survival(small("llama"), small("llama", hidden_size=32), "int4"), FingerprintError, "give the model that was edited"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("attack", [quantize(), perturb(), set_difference()], ids=lambda a: a.name)
def test_a_quantised_model_is_refused(attack):
    subject = small("llama")
    subject.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(
        QuantizedModel,
        match=rf"attack '{attack.name}': the weights are quantised \(gptq\) and cannot be changed; use the un",
    ):
        attack(subject, SPLITS)


def test_perturbed_weights_are_what_their_settings_say(monkeypatch):
    subject, seen = small("mixtral"), asked_with(monkeypatch, shaking)
    subject.model.model.layers[0].mlp.experts.down_proj.data[0] *= 5
    found = perturb(noise=(0.1,), prune=(0.25,), shrink=(0.3,))(subject, SPLITS)
    assert found.settings == ("noise=0.1", "prune=0.25", "shrink=0.3")
    before, (noise, prune, shrink) = weights(subject), seen
    for name, w in before.items():
        inside = w.ndim > 1 and in_blocks(subject, name)
        assert torch.equal(noise[name], w) != inside and torch.equal(prune[name], w) != inside
        # An expert is a matrix of its own.
        for i in range(len(w) if w.ndim == 3 else 1):
            old, n, p, s = (x[name][i] if w.ndim == 3 else x[name] for x in (before, noise, prune, shrink))
            if inside:
                assert float((n - old).std() / old.std()) == pytest.approx(0.1, rel=0.2)
                gone = p == 0
                assert int(gone.sum()) == round(0.25 * old.numel()) and torch.equal(p[~gone], old[~gone])
                assert float(old[gone].abs().max()) <= float(old[~gone].abs().min())
            rest = s - 0.7 * old
            spread = 0.3 * 0.1 * math.sqrt(2 / sum(old.shape)) if old.ndim > 1 else 0.0
            assert float(rest.std()) == pytest.approx(spread, rel=0.2, abs=1e-6), name


def test_noise_depends_on_the_seed_and_the_tensor_alone(monkeypatch):
    subject, seen = small("gpt2"), asked_with(monkeypatch, shaking)
    attack = perturb(noise=(0.1, 0.2), prune=(), shrink=())
    for one in (attack, attack.at(1), perturb(noise=(0.1,), prune=(), shrink=())):
        one(subject, SPLITS)
    name = "transformer.h.1.mlp.c_fc.weight"
    first, _, other, _, again = (w[name] for w in seen)
    assert torch.equal(first, again) and not torch.equal(first, other)
    drawn = [(seen[0][f"transformer.h.{i}.mlp.c_fc.weight"] - weights(subject)[f"transformer.h.{i}.mlp.c_fc.weight"]) for i in (0, 1)]  # fmt: skip
    assert abs(float(torch.corrcoef(torch.stack([d.flatten() for d in drawn]))[0, 1])) < 0.2


def test_pruning_counts_ties_once():
    w = torch.zeros(4, 5)
    w[0] = 1.0
    assert int((pruned(w, 0.8) != 0).sum()) == 4


def test_saliency_is_the_mean_size_of_weight_times_gradient():
    subject, name = small("gpt2"), "transformer.h.0.mlp.c_fc.weight"
    expected = torch.zeros(())
    w = dict(subject.model.named_parameters())[name].requires_grad_()
    for fact in FACTS.forget[:3]:
        ids, start = encoded(subject.tokenizer, fact.prompt, fact.answer)
        logs = subject.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        loss = -sum(logs[i - 1, ids[i]] for i in range(start, len(ids)))
        expected = expected + (w * torch.autograd.grad(loss, w)[0]).abs().detach() / 3
    assert torch.allclose(saliency(subject, FACTS.forget[:3], [name])[name], expected, rtol=1e-3, atol=1e-6)


def test_set_difference_prunes_what_t_needs_and_retain_does_not(monkeypatch):
    subject, seen = small("gpt2"), asked_with(monkeypatch, shaking)
    found = set_difference(pairs=((0.1, 0.05), (0.1, 0.3)))(subject, SPLITS)
    assert found.settings == ("p=0.1 q=0.05", "p=0.1 q=0.3")
    copies = [small("gpt2") for _ in range(2)]
    scores = [
        saliency(s, facts, projections(s)) for s, facts in zip(copies, (SPLITS.train, SPLITS.retain), strict=True)
    ]
    for after, q, setting in zip(seen, (0.05, 0.3), found.settings, strict=True):
        count = 0
        for name, w in weights(subject).items():
            gone = torch.zeros_like(w, dtype=torch.bool)
            if name in scores[0]:
                wanted, needed = (s[name].flatten().argsort(descending=True) for s in scores)
                flat = gone.view(-1)
                flat[wanted[: round(0.1 * w.numel())]] = True
                flat[needed[: round(q * w.numel())]] = False
                assert bool(gone.any())
            count += int(gone.sum())
            assert torch.equal(after[name], w.masked_fill(gone, 0.0)), name
        assert found.details["pruned"][setting] == count


def test_set_difference_needs_retain_facts():
    found = set_difference()(small("llama"), replace(SPLITS, retain=()))
    assert found.status == SKIPPED and found.reason == "needs retain facts, to leave alone what they use"


def test_a_loss_that_is_not_finite_is_refused():
    subject = small("llama")
    with torch.no_grad():
        subject.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(NotFinite, match="attack 'set_difference': fact 'f0': the loss is nan; load the model in"):
        set_difference()(subject, SPLITS)


ATTACKS = (quantize(), perturb(), set_difference(pairs=((0.1, 0.1),)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_left_as_it_was(attack, family, breaks, monkeypatch):
    subject = small(family)
    before, flags = subject.fingerprint(), [p.requires_grad for p in subject.model.parameters()]

    def fails(*_):
        raise RuntimeError("in the middle")

    if breaks:
        monkeypatch.setattr(rounding, "ask", fails)
        monkeypatch.setattr(shaking, "ask", fails)
        with pytest.raises(RuntimeError, match="in the middle"):
            attack(subject, SPLITS)
    else:
        found = attack(subject, SPLITS)
        assert (found.correct == attack(subject, SPLITS).correct).all() and not np.isnan(found.graded).any()
    assert subject.fingerprint() == before and [p.requires_grad for p in subject.model.parameters()] == flags
    assert all(p.grad is None for p in subject.model.parameters())
