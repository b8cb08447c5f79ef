"""Optimizers that torch does not have, against their formulas."""

from __future__ import annotations

import pytest
import torch

from repedit.errors import NotFinite
from repedit.training.optimizers import OPTIMIZERS, PooledAdam, descend, linear_decay, set_lr


def drift(optimizer: type[torch.optim.Adam]) -> float:
    """How far an entry with a millionth of the others' gradient moves, relative to them."""
    p = torch.nn.Parameter(torch.zeros(4))
    steps = optimizer([p], lr=0.1, eps=1e-12)
    for _ in range(5):
        p.grad = torch.tensor([1.0, 1.0, 1.0, 1e-6])
        steps.step()
    return float(p.detach()[3] / p.detach()[0])


def test_pooled_adam_holds_entries_with_tiny_gradients():
    assert drift(PooledAdam) < 1e-5


def test_adam_would_move_them_at_full_speed():
    assert drift(torch.optim.Adam) == pytest.approx(1.0, rel=1e-3)


def test_a_step_of_pooled_adam_is_its_formula():
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = PooledAdam([{"params": [first]}, {"params": [second]}], lr=0.1, betas=(0.9, 0.99), eps=1e-12)
    for p, grad in ((first, [3.0, 4.0]), (second, [1.0, 0.0])):
        p.grad = torch.tensor(grad)
    set_lr(optimizer, 0.2)
    optimizer.step()
    # After one step the corrected moments are g and g^2; the root mean square of (3, 4) is 12.5^.5, of (1, 0) .5^.5.
    torch.testing.assert_close(first.detach(), -0.2 * torch.tensor([3 / (3 + 12.5**0.5), 4 / (4 + 12.5**0.5)]))
    torch.testing.assert_close(second.detach(), -0.2 * torch.tensor([1 / (1 + 0.5**0.5), 0.0]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name):
    p = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = OPTIMIZERS[name]([p], lr=0.01, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()
    assert float(p.detach().square().sum()) < 9.0


def test_the_rate_falls_linearly_over_its_share():
    assert [linear_decay(step, 10, 0.4) for step in (0, 6, 7, 9)] == pytest.approx([1.0, 1.0, 0.75, 0.25])
    assert linear_decay(9, 10, 0.0) == 1.0


def fit(rate=lambda step: 0.1 / step, gradient=lambda step, p: 2 * p.detach(), **options):
    """Three steps of SGD from 4 on x^2, or with other gradients: (the parameter, what the descent returns)."""
    p = torch.nn.Parameter(torch.tensor([4.0]))

    def gradients(step: int) -> float:
        p.grad = gradient(step, p)
        return float(p.detach().square())

    return p, descend([p], torch.optim.SGD([p], lr=1.0), gradients, 3, lr=rate, **options)


def steps_are_clipped_and_scaled(**changed) -> None:
    """Gradients of norm above 1 are scaled to 1: the steps are .1, .05 and .0333 from 4 on."""
    p, log = fit(**changed)
    assert float(p.detach()) == pytest.approx(4 - 0.1 - 0.05 - 0.1 / 3, rel=1e-5)
    assert log.diverged is None and log.losses == pytest.approx((16.0, 3.9**2, 3.85**2), rel=1e-5)


def test_steps_are_clipped_and_scaled():
    steps_are_clipped_and_scaled()


@pytest.mark.parametrize("twin", [{"clip": 1e9}, {"rate": lambda step: 0.1}])
def test_steps_without_clipping_or_with_one_rate_are_caught(twin):
    with pytest.raises(AssertionError):
        steps_are_clipped_and_scaled(**twin)


def test_what_is_not_finite_ends_a_descent():
    p, log = fit(gradient=lambda step, p: torch.full((1,), float("inf" if step == 2 else "1")))
    assert (
        log.diverged == 2
        and float(p.detach()) == pytest.approx(3.9)
        and log.fault == "step 2: the loss is 15.21 and a gradient is not finite"
    )
    p, log = fit(gradient=lambda step, p: torch.tensor([1.0]), rate=lambda step: float("nan"))
    assert log.diverged == 2 and log.fault == "step 2: the loss is nan"

    def broken(step: int) -> None:
        raise NotFinite("an answer is not finite")

    p, log = fit(after=broken)
    assert log.diverged == 1 and float(p.detach()) == pytest.approx(3.9)
    assert log.fault == "after step 1, whose loss is 16: an answer is not finite"
