"""Optimizers by name, those that torch does not have, and learning rates that change from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum; Chen et al. 2023, arXiv:2302.06675, algorithm 2, betas 0.9 and 0.99."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * momentum.lerp(p.grad, 0.1).sign_())
                momentum.lerp_(p.grad, 0.01)


class PooledAdam(torch.optim.Adam):
    """Adam whose epsilon is the root mean square of the second moments of its parameter group.

    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, and with the bias-corrected m', v'
    theta <- theta - lr m' / (sqrt(v') + sqrt(mean of v' over the group) + eps).
    Entries whose gradients are tiny compared with the rest of the group therefore do not drift at full speed.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients; every parameter must have one."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            second = [self.state[p]["exp_avg_sq"] / (1 - beta2 ** self.state[p]["step"]) for p in group["params"]]
            pooled = torch.cat([v.cpu() for v in second]).mean().sqrt()
            for p, v in zip(group["params"], second, strict=True):
                first = self.state[p]["exp_avg"] / (1 - beta1 ** self.state[p]["step"])
                p.sub_(group["lr"] * (first / (v.sqrt() + pooled.to(v.device) + group["eps"])))


OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adafactor": torch.optim.Adafactor,
    "lion": Lion,
    "sgd": torch.optim.SGD,
}
"""Constructors by name; all of them take (parameters, lr=, weight_decay=)."""


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def linear_decay(step: int, total: int, share: float) -> float:
    """A factor of the learning rate: 1, falling linearly towards 0 over the last `share` of the steps."""
    return min(1.0, (total - step) / (share * total)) if share else 1.0
