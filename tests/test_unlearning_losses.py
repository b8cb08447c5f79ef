"""Every loss against a computation by hand, its limits, and what it does not depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from repedit.data import Batch
from repedit.errors import ArgumentError, UnknownName
from repedit.training.sampler import collate
from repedit.unlearning import losses
from repedit.unlearning.losses import (
    ControlVectors,
    ForwardPass,
    Reference,
    steering_layer,
    token_positions,
    unit_count,
)
from repedit.unlearning.recipe import Term, UnlearnRecipe
from tests.unlearning_cases import rows, subject, training

pytestmark = pytest.mark.numeric


LN2 = math.log(2)
TERMS = {
    "nll": losses.nll(), "negative_nll": losses.negative_nll(), "kl": losses.kl(), "kl back": losses.kl("model_first"),
    "ce": losses.cross_entropy_to_reference(), "npo": losses.npo(), "sim_npo": losses.sim_npo(), "wga": losses.wga(),
    "satimp": losses.satimp(), "undial": losses.undial(), "signed": losses.signed_nll(-1.0), "margin": losses.logit_margin(),
}  # fmt: skip


class World:
    """A tiny model beside a moved copy of it, and six rows."""

    def __init__(self, moved=0.02):
        self.lm, self.model = subject(), subject()
        with torch.no_grad():
            for p in self.model.model.parameters():
                p.add_(moved * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
        run = training(UnlearnRecipe("rows", (Term(losses.nll(), "forget"),)), self.lm, forget=rows())
        self.rows = run.data.rows["forget"]
        self.reference = Reference(self.lm, {"forget": self.rows})

    def seen(self, indices=range(6), batch=None, model=None):
        """What a loss sees of some rows."""
        batch = collate([self.rows[i] for i in indices]) if batch is None else batch
        from repedit.activations.forward import inputs_of

        logits = (model or self.model).model(**inputs_of(batch)).logits
        return ForwardPass(batch, logits, self.reference, list(indices), "forget")

    def mean(self, loss, indices=range(6), **options):
        """A loss divided by its units."""
        seen = self.seen(indices, **options)
        return loss.sum(seen) / unit_count(loss.unit, seen.batch)

    def gradient(self, value):
        """Of a value, over all weights of the moved copy."""
        parameters = list(self.model.model.parameters())
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


@pytest.fixture(scope="module")
def world():
    return World()


@torch.no_grad()
def by_hand(world, model=None):
    """(log-probabilities (n, v), targets, row of each) of the answers, in a loop."""
    found = []
    for number, row in enumerate(world.rows):
        logits = (model or world.model).model(input_ids=row.input_ids).logits[0].log_softmax(-1)
        for t in range(1, row.input_ids.shape[1]):
            if row.answer[0, t]:
                found.append((logits[t - 1], int(row.input_ids[0, t]), number))
    return found


def expected(world, name):
    """The value of a loss, each written out in its own words."""
    now, start = by_hand(world), by_hand(world, world.lm)
    tokens = [-float(lp[y]) for lp, y, _ in now]
    p = [math.exp(-x) for x in tokens]
    own, ref, n = ([0.0] * 6 for _ in range(3))
    for (lp, y, i), (lp0, _, _) in zip(now, start, strict=True):
        own[i], ref[i], n[i] = own[i] - float(lp[y]), ref[i] - float(lp0[y]), n[i] + 1

    def log_sigma(x):
        return -math.log1p(math.exp(-x))

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    if name == "undial":
        total = 0.0
        for (lp, y, _), (lp0, _, _) in zip(now, start, strict=True):
            z = lp0.clone()
            z[y] -= 10.0
            total -= float((z.softmax(-1) * lp).sum())
        return total / len(now)
    if name == "margin":
        return mean(float(lp.max() - lp.mean()) ** 2 for lp, _, _ in now)
    return {
        "nll": lambda: mean(tokens),
        "negative_nll": lambda: -mean(tokens),
        "kl": lambda: mean(float((b.exp() * (b - a)).sum()) for (a, _, _), (b, _, _) in zip(now, start, strict=True)),
        "kl back": lambda: mean(
            float((a.exp() * (a - b)).sum()) for (a, _, _), (b, _, _) in zip(now, start, strict=True)
        ),
        "ce": lambda: mean(-float((b.exp() * a).sum()) for (a, _, _), (b, _, _) in zip(now, start, strict=True)),
        "npo": lambda: -20 * mean(log_sigma(0.1 * (x - r)) for x, r in zip(own, ref, strict=True)),
        "sim_npo": lambda: -(2 / 4.5) * mean(log_sigma(4.5 * x / k) for x, k in zip(own, n, strict=True)),
        "wga": lambda: -mean(q * x for q, x in zip(p, tokens, strict=True)),
        "satimp": lambda: -mean(q**5 * (1 - q) * x for q, x in zip(p, tokens, strict=True)),
        "signed": lambda: -mean(x / k for x, k in zip(own, n, strict=True)),
    }[name]()


@pytest.mark.parametrize("name", TERMS)
def test_a_loss_is_its_formula(world, name):
    assert world.mean(TERMS[name]).item() == pytest.approx(expected(world, name), rel=1e-9)


def splits_do_not_matter(world, loss):
    """Two batches of three, each divided by the units of all six rows, are the batch of six."""
    whole = world.seen()
    units = unit_count(loss.unit, whole.batch)
    parts = [loss.sum(world.seen(part)) for part in ((0, 1, 2), (3, 4, 5))]
    torch.testing.assert_close(sum(parts) / units, loss.sum(whole) / units, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_splits_do_not_matter(world, name):
    splits_do_not_matter(world, TERMS[name])


def test_log_sigma_of_a_batch_mean_is_caught(world):
    """A published fault: the NLL of the batch is averaged before log sigma, so that the batch size changes the loss."""

    def total(seen):
        gap = (seen.row_nll - seen.reference_row_nll).mean()
        return -20 * torch.nn.functional.logsigmoid(0.1 * gap) * len(seen.row_nll)

    with pytest.raises(AssertionError, match="close"):
        splits_do_not_matter(world, losses.Loss("npo", total, "rows"))


def padding_does_not_matter(world, loss, wide=5, side="left"):
    """More padding, on either side, changes no loss."""
    plain = collate(world.rows)
    blank = {
        name: torch.zeros(6, wide, dtype=getattr(plain, name).dtype)
        for name in ("input_ids", "attention_mask", "answer", "entity")
        if getattr(plain, name) is not None
    }
    order = (lambda a, b: [b, a]) if side == "left" else (lambda a, b: [a, b])
    padded = {name: torch.cat(order(getattr(plain, name), zero), 1) for name, zero in blank.items()}
    if side == "left":
        # Rows are flush right then, as they are for generation.
        shift = (~plain.attention_mask).sum(1)
        padded = {
            name: torch.stack([row.roll(int(k)) for row, k in zip(x, shift, strict=True)]) for name, x in padded.items()
        }
    torch.testing.assert_close(
        world.mean(loss, batch=replace(plain, **padded)), world.mean(loss), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TERMS)
def test_padding_does_not_matter(world, name, side):
    padding_does_not_matter(world, TERMS[name], side=side)


def test_a_mean_over_all_positions_is_caught(world):
    """A published fault: padding and prompt are counted."""

    def total(seen):
        return -seen.logits.log_softmax(-1).mean() * unit_count("tokens", seen.batch)

    with pytest.raises(AssertionError, match="close"):
        padding_does_not_matter(world, losses.Loss("raw", total, "tokens"))


def test_npo_at_the_reference():
    world = World(moved=0.0)
    assert float(world.mean(losses.npo(0.3))) == pytest.approx(2 / 0.3 * LN2, rel=1e-12)


def test_npo_with_a_small_beta_is_gradient_ascent(world):
    small = world.gradient(world.mean(losses.npo(1e-6)))
    ascent = world.gradient(-world.seen().row_nll.sum())
    assert float(torch.cosine_similarity(small, ascent, dim=0)) >= 1 - 1e-6


def test_kl_at_the_reference_is_zero_with_zero_gradient():
    world = World(moved=0.0)
    value = world.mean(losses.kl())
    assert abs(float(value)) <= 1e-12 and float(world.gradient(value).norm()) <= 1e-12


def test_cross_entropy_is_kl_and_the_entropy(world):
    p = world.seen().reference_logits.softmax(-1)
    entropy = float(-(p * p.log()).sum(-1).mean())
    gap = world.mean(losses.cross_entropy_to_reference()) - world.mean(losses.kl())
    assert float(gap) == pytest.approx(entropy, rel=1e-12)
    a, b = (world.gradient(world.mean(loss)) for loss in (losses.cross_entropy_to_reference(), losses.kl()))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [losses.wga(0.0), losses.satimp(0.0, 0.0)], ids=str)
def test_weights_of_one_are_gradient_ascent(world, loss):
    torch.testing.assert_close(world.mean(loss), world.mean(losses.negative_nll()), rtol=1e-12, atol=0)


def test_a_coarse_kl_is_never_larger(world):
    full = float(world.mean(losses.kl()))
    found = [float(world.mean(losses.kl(cache=k))) for k in (1, 5, 50, 260)]
    assert found[0] <= found[1] <= found[2] <= full + 1e-12 and found[3] == pytest.approx(full, rel=1e-12)
    assert found[0] > 0
    some = [4, 1]
    part, whole = (float(world.mean(losses.kl(cache=k), some)) for k in (259, None))
    assert part == pytest.approx(whole, rel=1e-6)


def test_a_coarse_kl_reads_the_reference_once():
    world = World()
    for indices in ((0, 1), (3, 5), (0, 2)):
        world.mean(losses.kl(cache=8), indices)
    assert world.reference.passes == 1
    for indices in ((0, 1), (3, 5)):
        world.mean(losses.kl(), indices)
    assert world.reference.passes == 3


def test_a_coarse_kl_of_other_rows_is_caught(monkeypatch):
    true = Reference.top_log_probs
    monkeypatch.setattr(Reference, "top_log_probs", lambda self, role, indices, k: true(self, role, sorted(indices), k))
    with pytest.raises(AssertionError):
        test_a_coarse_kl_is_never_larger(World())


def test_capped_rows_have_no_gradient(world):
    mean = float((world.seen().row_nll / world.seen().row_count).median())
    rows_above = (world.seen().row_nll / world.seen().row_count > mean).nonzero()[:, 0].tolist()
    assert 0 < len(rows_above) < 6
    capped = world.mean(losses.negative_nll(cap=mean))
    assert float(capped) == pytest.approx(float(world.mean(losses.negative_nll())), rel=1e-12)
    low = [i for i in range(6) if i not in rows_above]
    part = losses.negative_nll().sum(world.seen(low)) / unit_count("tokens", world.seen().batch)
    # The norms of the model are float32 inside, so another batch is another rounding.
    a, b = world.gradient(capped), world.gradient(part)
    assert float((a - b).norm() / b.norm()) <= 1e-6


def test_dpo():
    """By hand, and without its first difference it is NPO."""
    recipe = UnlearnRecipe("dpo", (Term(losses.dpo(0.2), "forget"),), batch_size=6, steps=2, lr=1e-3)
    run = training(recipe, forget=rows())
    run.run(after_step=lambda: None, progress=False)
    seen = run._forward("forget", range(6), recipe.terms)
    margin = [
        float(
            seen.row_nll[i]
            - seen.reference_row_nll[i]
            + seen.alternative.reference_row_nll[i]
            - seen.alternative.row_nll[i]
        )
        for i in range(6)
    ]
    by_hand = sum(10 * math.log1p(math.exp(-0.2 * x)) for x in margin)
    assert float(losses.dpo(0.2).sum(seen)) == pytest.approx(by_hand, rel=1e-9)
    without = losses.dpo(0.2, alternative=False)
    assert "alternative" not in without.needs
    assert float(without.sum(seen)) == pytest.approx(float(losses.npo(0.2).sum(seen)), rel=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_steering(adaptive):
    """RMU by hand: every real token but the first, one control vector, the reference's own states for what is retained."""
    terms = (Term(losses.rmu_forget(1, 3.0, adaptive), "forget"), Term(losses.rmu_retain(1), "retain"))
    recipe = UnlearnRecipe("rmu", terms, batch_size=6, steps=3, lr=1e-3)
    run = training(recipe, forget=rows(0, 6), retain=rows(6, 12))
    run.run(after_step=lambda: None, progress=False)
    start, now = run.reference.subject.model, run.trainable.subject.model

    def states(model, role, i):
        return _block_output(model, run.data.rows[role][i])[1:]

    u = ControlVectors(0).direction("", 48)
    assert float(u.norm()) == pytest.approx(1.0) and bool((u >= 0).all())
    first = run.order.at(0).rows["forget"]
    norms = torch.cat([states(start, "forget", i).norm(dim=-1) for i in first])
    c = 3.0 * (float(norms.mean()) if adaptive else 1.0)
    hidden = torch.cat([states(now, "forget", i) for i in range(6)])
    seen = run._forward("forget", range(6), terms[:1])
    assert float(terms[0].loss.sum(seen)) == pytest.approx(float((hidden - c * u).square().sum() / 48), rel=1e-9)
    pairs = [(states(now, "retain", i), states(start, "retain", i)) for i in range(6)]
    kept = run._forward("retain", range(6), terms[1:])
    by_hand = sum(float((a - b).square().sum() / 48) for a, b in pairs)
    assert float(terms[1].loss.sum(kept)) == pytest.approx(by_hand, rel=1e-9) and by_hand > 0


def _block_output(model, row: Batch):
    seen = []
    handle = model.model.layers[1].register_forward_hook(
        lambda m, a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.no_grad():
        model(input_ids=row.input_ids)
    handle.remove()
    return seen[0][0]


def test_one_control_vector_a_topic():
    steering = ControlVectors(3)
    assert torch.equal(steering.direction("bio", 8), ControlVectors(3).direction("bio", 8))
    assert not torch.equal(steering.direction("bio", 8), steering.direction("cyber", 8))


def test_units(world):
    batch = collate(world.rows)
    assert unit_count("rows", batch) == 6
    assert unit_count("tokens", batch) == int(batch.answer.sum())
    assert unit_count("positions", batch) == int(batch.attention_mask.sum()) - 6 == int(token_positions(batch).sum())


def test_the_default_layer():
    assert [steering_layer(None, depth) for depth in (2, 30, 32)] == [0, 7, 7] and steering_layer(5, 32) == 5


def test_bad_options():
    with pytest.raises(ArgumentError, match=r"beta=0\.0; give a number above 0"):
        losses.npo(0.0)
    with pytest.raises(ArgumentError, match=r"cap=-1\.0; give a number of nats"):
        losses.negative_nll(-1.0)
    with pytest.raises(ArgumentError, match="cache=0"):
        losses.kl(cache=0)
    with pytest.raises(UnknownName, match="direction='model'; did you mean 'model_first'"):
        losses.kl("model")
    with pytest.raises(UnknownName, match="loss='nlp'; did you mean 'npo'"):
        losses.by_name("nlp")
