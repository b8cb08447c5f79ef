"""Optimizers by name, learning rates that change from step to step, the steps of a training, and gradients added in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repedit.errors import NotFinite


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


# --- The steps of a training


class Descent(NamedTuple):
    """What a descent did."""

    losses: tuple[float, ...]
    """Of each step, before its update."""
    diverged: int | None
    """The first step at which a loss, a gradient or what was measured was not finite; there is none after it."""
    fault: str = ""
    """What was not finite, in words."""


@torch.enable_grad()
def descend(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    gradients: Callable[[int], float],
    steps: int,
    *,
    lr: Callable[[int], float],
    clip: float = 1.0,
    after: Callable[[int], None] = lambda step: None,
) -> Descent:
    """Steps of an optimizer along gradients that are clipped to a norm, until something is not finite.

    Args:
        gradients: the loss of a step, the first being 1; it leaves the gradients of the parameters in `grad`.
        lr: the learning rate of a step.
        after: called after the update of each step.

    A loss or a gradient that is not finite ends it without an update, a NotFinite of `after` with the update.
    """
    losses: list[float] = []
    for step in range(1, steps + 1):
        losses.append(gradients(step))
        loss = losses[-1]
        if not math.isfinite(loss):
            return Descent(tuple(losses), step, f"step {step}: the loss is {loss}")
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            return Descent(tuple(losses), step, f"step {step}: the loss is {loss:.4g} and a gradient is not finite")
        if norm > clip:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        set_lr(optimizer, lr(step))
        optimizer.step()
        try:
            after(step)
        except NotFinite as error:
            return Descent(tuple(losses), step, f"after step {step}, whose loss is {loss:.4g}: {error}")
    return Descent(tuple(losses), None)


# --- Gradients of the embedding and the head, added to `weight.grad` in place. Autograd computes that of tied embeddings twice, once
# for the inputs and once for the outputs, and each time allocates a tensor as large as the matrix, however few tokens were read


class _Lookup(torch.autograd.Function):
    """Rows of a matrix; the gradients of the rows are added to `weight.grad`."""

    @staticmethod
    def forward(ctx: Any, ids: Int[Tensor, "*n"], weight: Float[Tensor, "v d"], padding: int | None) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding = padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ids, weight = ctx.saved_tensors
        rows, grad = ids.flatten(), grads[0].flatten(0, -2)
        if ctx.padding is not None:
            grad = grad * (rows != ctx.padding)[:, None]
        _gradient(weight).index_add_(0, rows, grad)
        return None, None, None


class _Product(torch.autograd.Function):
    """x W^T; the gradient of W is added to `weight.grad`."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "... d"], weight: Float[Tensor, "v d"]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors
        _gradient(weight).addmm_(grads[0].flatten(0, -2).T, x.flatten(0, -2))
        return grads[0] @ weight, None


def _gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


@contextmanager
def added_in_place(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Add the gradients of the embeddings and of the output matrix in place during the context; which parameters those are.

    Only ordinary float32 modules on a CPU are changed, and only those that are trained; of any other, autograd makes the
    gradient as always. `zero_gradients` keeps the memory from step to step.
    """
    undo, in_place = list[Callable[[], Any]](), dict[int, nn.Parameter]()
    try:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
            forward = _forward_of(module)
            if forward is not None:
                module.forward = forward
                undo.append(partial(vars(module).pop, "forward"))
                in_place[id(module.weight)] = module.weight
        yield list(in_place.values())
    finally:
        for step in undo:
            step()


def zero_gradients(parameters: Sequence[nn.Parameter], in_place: Sequence[nn.Parameter] = ()) -> None:
    """Forget all gradients; those of parameters that are added to in place become zeros."""
    own = {id(p) for p in in_place}
    for p in parameters:
        if id(p) not in own:
            p.grad = None
        elif p.grad is not None:
            p.grad.zero_()


def _forward_of(module: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """The forward pass of an embedding or a linear module with the gradient in place; None where it may not be replaced."""
    # Subclasses scale, parametrizations make the weight anew: their gradient is another one.
    if isinstance(module, nn.Linear) and type(module) is nn.Linear:
        able = module.bias is None
        forward: Callable[[Tensor], Tensor] = lambda x: _Product.apply(x, module.weight)  # noqa: E731
    elif isinstance(module, nn.Embedding) and type(module) is nn.Embedding:
        able = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        forward = lambda ids: _Lookup.apply(ids, module.weight, module.padding_idx)  # noqa: E731
    else:
        return None
    weight = module.weight
    plain = weight.is_leaf and weight.dtype == torch.float32 and weight.device.type == "cpu"
    return forward if able and plain and weight.requires_grad and "forward" not in vars(module) else None
