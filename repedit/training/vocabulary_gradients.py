"""Gradients of the embedding and the head, added to `weight.grad` directly instead of through temporary copies.

Autograd computes the gradient of tied embeddings twice, once for the inputs and once for the outputs. Each time it
allocates a tensor as large as the matrix, however few tokens were read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


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
