"""Combiners: what BLUR keeps, what the published variants are, and what happens where a gradient is missing."""

from __future__ import annotations

import math

import pytest
import torch

from repedit.errors import ArgumentError, TrainingError, UnknownName
from repedit.unlearning import combiners
from repedit.unlearning.combiners import (
    InnerProducts,
    StepContext,
    blur,
    combine,
    conflict_only,
    norm_diff,
    primal_dual,
    weighted_sum,
)
from tests.unlearning_cases import gradient, subject, training

pytestmark = pytest.mark.numeric


SHAPES = ((7, 5), (11,), (3, 4, 2))


def pair(seed=0, dtype=torch.float64, opposed=0.5):
    """Two gradients of a few tensors that oppose each other."""
    generator = torch.Generator().manual_seed(seed)
    f, noise = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES] for _ in range(2))
    return [x.to(dtype) for x in f], [(n - opposed * x).to(dtype) for x, n in zip(f, noise, strict=True)]


def joined(combiner, forget, retain, state=None):
    """(G, what became of it), both gradients left as they were."""
    parameters = [torch.zeros_like(g, requires_grad=True) for g in retain]
    for p, g in zip(parameters, retain, strict=True):
        p.grad = g.clone()
    found = combine(
        combiner, [g.clone() for g in forget], parameters, StepContext(2.0, 6.0, {} if state is None else state)
    )
    return [p.grad for p in parameters], found


def dot(a, b):
    """Inner product over all tensors, in float64."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def blur_is_orthogonal(dtype=torch.float64, gamma=0.7, alpha=3.0):
    """G - gamma g_f has no part along g_f, so <G, g_f> = gamma |g_f|^2."""
    forget, retain = pair(dtype=dtype)
    g, _ = joined(blur(gamma, alpha), forget, retain)
    rest = [x - gamma * f for x, f in zip(g, forget, strict=True)]
    limit = 1e-12 if dtype is torch.float64 else 1e-5
    assert abs(dot(rest, forget)) <= limit * math.sqrt(dot(g, g) * dot(forget, forget)), "not orthogonal"
    assert dot(g, forget) == pytest.approx(gamma * dot(forget, forget), rel=1e-10 if dtype is torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_blur_is_orthogonal(dtype):
    blur_is_orthogonal(dtype)


def test_a_sum_in_place_of_blur_is_caught(monkeypatch):
    monkeypatch.setattr("tests.test_unlearning_combiners.blur", weighted_sum)
    with pytest.raises(AssertionError, match="not orthogonal"):
        blur_is_orthogonal()


def test_blur_equals_the_sum_when_orthogonal():
    forget, retain = pair()
    c = dot(forget, retain) / dot(forget, forget)
    retain = [r - c * f for f, r in zip(forget, retain, strict=True)]
    for x, y in zip(joined(blur(), forget, retain)[0], joined(weighted_sum(), forget, retain)[0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_blur_with_alpha_is_the_wmdp_form():
    forget, retain = pair()
    c = dot(forget, retain) / dot(forget, forget)
    for x, f, r in zip(joined(blur(1.0, 800.0), forget, retain)[0], forget, retain, strict=True):
        torch.testing.assert_close(x, f + 800 * (r - c * f), rtol=1e-10, atol=1e-10)


def test_scope_tensor_differs_and_is_orthogonal_in_each():
    forget, retain = pair()
    g, _ = joined(blur(scope="tensor"), forget, retain)
    assert not torch.allclose(g[0], joined(blur(), forget, retain)[0][0])
    for x, f in zip(g, forget, strict=True):
        assert dot([x], [f]) == pytest.approx(dot([f], [f]), rel=1e-10)


def test_roles_swapped():
    forget, retain = pair()
    g, _ = joined(blur(0.7, 3.0, role_first="retain"), forget, retain)
    assert dot(g, retain) == pytest.approx(3.0 * dot(retain, retain), rel=1e-10)


@pytest.mark.parametrize("opposed", [0.5, -0.5])
def test_conflict_only(opposed):
    forget, retain = pair(opposed=opposed)
    other = blur() if opposed > 0 else weighted_sum()
    for x, y in zip(joined(conflict_only(), forget, retain)[0], joined(other, forget, retain)[0], strict=True):
        assert torch.equal(x, y)


NOTHING = [0.0, 1e-12]


@pytest.mark.parametrize("size", NOTHING)
def test_no_forget_gradient_leaves_the_other_with_its_own_weight(size):
    forget, retain = pair()
    norm = math.sqrt(dot(retain, retain))
    weights = {weighted_sum(1.0, 2.0): 2.0, norm_diff(): 1 / norm}
    weights |= {
        blur(1.0, 2.0, **o): 2.0 for o in ({}, {"when": "conflict"}, {"scope": "tensor"}, {"role_first": "retain"})
    }
    for combiner, weight in weights.items():
        g, found = joined(combiner, [size * f for f in forget], retain)
        assert found.fallback and found.retain_weight == pytest.approx(weight)
        for x, r in zip(g, retain, strict=True):
            torch.testing.assert_close(x, weight * r)


def test_no_forget_gradient_moves_the_multiplier_all_the_same():
    state: dict[str, float] = {}
    forget, retain = pair()
    steps = [[f * scale for f in forget] for scale in (1.0, 0.0, 1.0)]
    weights = [joined(primal_dual(0.5, 0.1), step, retain, state)[1].retain_weight for step in steps]
    assert weights == pytest.approx([1.15, 1.3, 1.45])


@pytest.mark.parametrize("size", NOTHING)
def test_no_retain_gradient_leaves_the_other(size):
    forget, retain = pair()
    norm = math.sqrt(dot(forget, forget))
    combiners = {weighted_sum(3.0): 3.0, blur(3.0): 3.0, blur(3.0, role_first="retain"): 3.0, norm_diff(): 1 / norm}
    for combiner, weight in combiners.items():
        g, found = joined(combiner, forget, [size * r for r in retain])
        assert not found.fallback and all(bool(torch.isfinite(x).all()) for x in g)
        for x, f in zip(g, forget, strict=True):
            torch.testing.assert_close(x, weight * f, rtol=1e-9, atol=1e-9)


def test_neither_gradient_is_no_step():
    zero = [torch.zeros_like(x) for x in pair()[0]]
    for combiner in (weighted_sum(), blur(), blur(role_first="retain"), norm_diff(), primal_dual(0.5)):
        assert all(not x.any() for x in joined(combiner, zero, zero)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_gradient_that_is_not_finite_is_refused(side, value):
    sides = dict(zip(("forget", "retain"), pair(), strict=True))
    sides[side][1].view(-1)[0] = value
    for combiner in (weighted_sum(), blur(), norm_diff(), primal_dual(0.5)):
        with pytest.raises(TrainingError, match=f"the {side} gradient of trained tensor 1 is not finite"):
            joined(combiner, sides["forget"], sides["retain"])


def test_normalised_difference():
    forget, retain = pair()
    g, _ = joined(norm_diff(), forget, retain)
    a, b = math.sqrt(dot(forget, forget)), math.sqrt(dot(retain, retain))
    for x, f, r in zip(g, forget, retain, strict=True):
        torch.testing.assert_close(x, f / a + r / b)


def test_primal_dual_raises_its_multiplier():
    state: dict[str, float] = {}
    forget, retain = pair()
    weights = [joined(primal_dual(0.5, 0.1), forget, retain, state)[1].retain_weight for _ in range(3)]
    assert weights == pytest.approx([1.15, 1.3, 1.45])
    assert primal_dual(0.5).weights(InnerProducts(1, 1, 0, 3), StepContext(0.2, 1.0, {})) == (1.0, 1.0)  # warm-up
    assert primal_dual(5.0).weights(InnerProducts(1, 1, 0, 3), StepContext(0.2, 9.0, {})) == (1.0, 0.0)


def test_a_parameter_without_part_in_a_loss():
    forget, retain = pair()
    parameters = [torch.zeros_like(g, requires_grad=True) for g in retain]
    parameters[0].grad = retain[0].clone()
    combine(weighted_sum(2.0, 3.0), [None, forget[1].clone(), None], parameters, StepContext(0.0, 0.0, {}))
    assert torch.equal(parameters[0].grad, 3 * retain[0]) and torch.equal(parameters[1].grad, 2 * forget[1])
    assert parameters[2].grad is None


def test_chunks_do_not_matter(monkeypatch):
    forget, retain = pair()
    whole = joined(blur(), forget, retain)[1].products
    monkeypatch.setattr(combiners, "CHUNK", 4)
    assert joined(blur(), forget, retain)[1].products == pytest.approx(whole, rel=1e-12)


def lowers_as_promised(name="blur_step"):
    """A step of SGD of size eta changes L_f by -eta gamma |g_f|^2, within 1 %, however the retain gradient lies."""
    from repedit.unlearning.losses import negative_nll, nll
    from repedit.unlearning.recipe import OptimizerConfig, Term, UnlearnRecipe

    gamma, eta = 0.5, 1e-5
    # The same rows on both sides: the gradients oppose each other exactly.
    from tests.unlearning_cases import rows

    sets = {"forget": rows(0, 3), "retain": rows(0, 4), "allow_overlap": True}
    combiner = blur(gamma) if name == "blur_step" else weighted_sum(gamma)
    recipe = UnlearnRecipe(
        "law", (Term(negative_nll(), "forget"), Term(nll(), "retain")), combiner, optimizer=OptimizerConfig("sgd"), lr=eta,
        steps=2, batch_size=6,
    )  # fmt: skip
    run = training(recipe, subject(), clip=None, **sets)
    run.run(after_step=lambda: None, progress=False)
    fall = run.log[0]["losses"]["negative_nll forget"] - run.log[1]["losses"]["negative_nll forget"]
    assert fall == pytest.approx(eta * gamma * run.log[0]["forget_norm"] ** 2, rel=0.01), "the step does not do that"


def test_a_blur_step_lowers_the_forget_loss_as_promised():
    lowers_as_promised()


def test_a_weighted_sum_does_not():
    with pytest.raises(AssertionError, match="does not do that"):
        lowers_as_promised("sum")


def test_blur_in_the_loop_is_orthogonal():
    from repedit.unlearning.losses import negative_nll, nll
    from repedit.unlearning.recipe import Term, UnlearnRecipe

    forget = (Term(negative_nll(), "forget"),)
    both = (*forget, Term(nll(), "retain"))
    g = gradient(UnlearnRecipe("a", both, blur(), batch_size=6))
    f = gradient(UnlearnRecipe("b", forget, batch_size=6))
    assert float(g @ f) == pytest.approx(float(f @ f), rel=1e-10)


def test_bad_options():
    with pytest.raises(ArgumentError, match=r"gamma=0\.0; give a number above 0"):
        blur(0.0)
    with pytest.raises(UnknownName, match="when='conflicts'; did you mean 'conflict'"):
        blur(when="conflicts")
