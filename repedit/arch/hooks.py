"""The hooks that observe or replace the tensor at a site of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from repedit.arch.layout import Branch, ModelLayout
from repedit.arch.offload import values
from repedit.errors import HookError, UnknownSite
from repedit.hooks import Hook
from repedit.kernels.dispatch import full_precision
from repedit.sites import Point, Site

HookFn = Callable[[Tensor, slice, Tensor | None], Tensor | None]
"""(x, neurons, tokens) -> a new x or None. `neurons` are those that x holds; `tokens` the flat token indices of its rows if
x holds some tokens only (experts), else None."""

# Attribute of the output of edited experts: the edits already applied, in order.
_EDITED = "_repedit_edits"


def hooks_at(model: nn.Module, layout: ModelLayout, site: Site, function: HookFn, *, replaces: bool) -> list[Hook]:
    """The hooks that call a function with the tensor at a site; with `replaces` its return value replaces the tensor.

    The neurons of experts have no module: they are recomputed from the inputs of the fused experts, and replacing them
    costs another pass over the experts.

    Raises:
        UnknownSite: if this model has no such site.
    """
    if not 0 <= site.layer < len(layout.layers):
        raise UnknownSite(f"{site}: layers are 0..{len(layout.layers) - 1}")
    if site.point not in layout.architecture.points:
        raise UnknownSite(
            f"{site}: {layout.architecture.model_type} adds attention and MLP in parallel, so resid.mid does not exist"
        )

    def whole(x: Tensor) -> Tensor | None:
        return function(x, slice(None), None)

    block = model.get_submodule(layout.block_paths[site.layer])
    if site.point in (Point.RESID_PRE, Point.RESID_POST):
        return [Hook(block, "input" if site.point is Point.RESID_PRE else "output", whole)]
    if site.point is Point.RESID_MID:
        return _resid_mid_hooks(model, layout, site.layer, block, whole)
    branch = layout.branch(site.layer, site.point)
    if site.point is branch.outer:
        return [Hook(model.get_submodule(branch.joined), "output", whole)]
    writer = model.get_submodule(branch.writer)
    if branch.routed:
        return [Hook(writer, "call", _expert_hook(branch, function, replaces))]
    return [Hook(writer, "input", whole)]


def _resid_mid_hooks(
    model: nn.Module, layout: ModelLayout, layer: int, block: nn.Module, function: Callable[[Tensor], Tensor | None]
) -> list[Hook]:
    """resid.mid = resid.pre + attn.out has no module of its own: store the first, and act on the second."""
    stored: list[Tensor] = []

    def store(x: Tensor) -> None:
        stored[:] = [x]

    def add(out: Tensor) -> Tensor | None:
        if not stored:
            raise HookError(
                f"{layer}.resid.mid: the attention ran outside its block, whose input is half of the sum; does gradient "
                "checkpointing recompute it? Switch that off: model.gradient_checkpointing_disable()"
            )
        stream = stored.pop()
        new = function(stream + out)
        return None if new is None else new - stream

    attention = layout.branch(layer, Point.ATTN_OUT)
    return [Hook(block, "input", store), Hook(model.get_submodule(attention.joined), "output", add)]


def _expert_hook(branch: Branch, function: HookFn, replaces: bool) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        hidden, index, weights = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        # Every hook here starts from the inputs of the module, so it must repeat the edits of the hooks before it.
        earlier: tuple[HookFn, ...] = getattr(output, _EDITED, ())
        # After the module has run, Accelerate may have offloaded its weights again.
        gate_up = values(module, "gate_up_proj").to(hidden.device)
        down = values(module, "down_proj").to(hidden.device) if replaces else None
        total = torch.zeros_like(output)
        for e, part in enumerate(branch.parts):
            tokens, slot = torch.where(index == e)
            if not len(tokens):
                continue
            gate, up = nn.functional.linear(hidden[tokens], gate_up[e]).chunk(2, dim=-1)
            z = module.act_fn(gate) * up  # type: ignore[operator]
            for edit in (*earlier, function):
                with full_precision(z):
                    new = edit(z, slice(part.start, part.stop), tokens)
                z = z if new is None else new
            if down is not None:
                out = nn.functional.linear(z, down[e]) * weights[tokens, slot, None]
                total = total.index_add(0, tokens, out.to(total.dtype))
        if down is None:
            return None
        setattr(total, _EDITED, (*earlier, function))
        return total

    return hook
