"""Optimizers that torch does not have, against their formulas."""

from __future__ import annotations

import pytest
import torch

from repedit.training.optimizers import OPTIMIZERS, PooledAdam, linear_decay, set_lr


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
