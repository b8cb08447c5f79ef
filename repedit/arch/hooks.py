"""The hooks that observe or replace the tensor at a site of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repedit.arch.layout import Branch, ModelLayout, Neurons
from repedit.arch.offload import values
from repedit.arch.spec import Experts
from repedit.arguments import checked
from repedit.errors import HookError, UnknownSite
from repedit.hooks import Hook
from repedit.kernels.dispatch import full_precision
from repedit.sites import Point, Site

HookFn = Callable[[Tensor, slice, Tensor | None], Tensor | None]
"""(x, neurons, tokens) -> a new x or None. `neurons` are those that x holds; `tokens` the flat token indices of its rows if
x holds some tokens only (experts), else None."""

# Attribute of the output of edited experts: the edits already applied, in order.
_EDITED = "_repedit_edits"


@checked
def hooks_at(model: nn.Module, layout: ModelLayout, site: Site, function: HookFn, *, replaces: bool) -> list[Hook]:
    """The hooks that call a function with the tensor at a site; with `replaces` its return value replaces the tensor.

    A site that several projections share (experts and a shared expert) calls the function for each with its neurons. The
    neurons of experts have no module: they are recomputed from the inputs of the fused experts, and replacing them costs
    another pass over the experts.

    Raises:
        UnknownSite: if this model has no such site.
    """
    if not 0 <= site.layer < len(layout.layers):
        raise UnknownSite(f"{site}: layers are 0..{len(layout.layers) - 1}")
    if site.point is Point.RESID_MID and Point.RESID_MID not in layout.points_at(site.layer):
        raise UnknownSite(_no_middle(layout, site))

    def whole(x: Tensor) -> Tensor | None:
        return function(x, slice(None), None)

    block = model.get_submodule(layout.block_paths[site.layer])
    if site.point in (Point.RESID_PRE, Point.RESID_POST):
        return [Hook(block, "input" if site.point is Point.RESID_PRE else "output", whole)]
    if site.point is Point.RESID_MID:
        return _sum_hooks(model, layout.layers[site.layer][0], whole, site, block)
    branch = layout.branch(site.layer, site.point)
    if site.point is branch.outer:
        return _sum_hooks(model, branch, whole, site)
    return _neuron_hooks(model, branch, function, replaces)


def _no_middle(layout: ModelLayout, site: Site) -> str:
    if layout.architecture.parallel:
        reason = "adds attention and MLP in parallel"
    else:
        reason = f"has other branches ({', '.join(b.kind for b in layout.layers[site.layer])}) in this layer"
    return f"{site}: {layout.architecture.model_type} {reason}, so resid.mid does not exist"


def _sum_hooks(
    model: nn.Module,
    branch: Branch,
    function: Callable[[Tensor], Tensor | None],
    site: Site,
    block: nn.Module | None = None,
) -> list[Hook]:
    """Hooks on a sum that has no module of its own: store the first terms, and act on the last.

    The terms are the outputs of a branch; with a block also its input, for resid.mid = resid.pre + scale * attn.out.
    """
    *first, last = [model.get_submodule(path) for path in branch.outputs]
    if not first and block is None:
        return [Hook(last, "output", function)]
    stream: list[Tensor] = []
    stored: list[Tensor] = []
    scale = 1.0 if block is None else branch.scale

    def add(out: Tensor) -> Tensor | None:
        if len(stored) != len(first) or len(stream) != (block is not None):
            raise HookError(
                f"{site}: the {branch.kind} branch ran outside its block, whose other tensors are part of the sum; does gradient "
                "checkpointing recompute it? Switch that off: model.gradient_checkpointing_disable()"
            )
        earlier = sum(x.reshape(out.shape) for x in stored) if stored else 0.0
        before = stream[0].reshape(out.shape) if stream else 0.0
        stored.clear()
        stream.clear()
        new = function(before + scale * (earlier + out))
        return None if new is None else (new - before) / scale - earlier

    hooks = [] if block is None else [Hook(block, "input", lambda x: stream.__setitem__(slice(None), [x]))]
    hooks += [Hook(module, "output", lambda x: stored.append(x.clone())) for module in first]
    return [*hooks, Hook(last, "output", add)]


# --- The neurons of a branch: one hook for each module whose input holds some


def _neuron_hooks(model: nn.Module, branch: Branch, function: HookFn, replaces: bool) -> list[Hook]:
    hooks = []
    for path, parts in branch.by_writer.items():
        module = model.get_submodule(path)
        if parts[0].fused is not None:
            hooks.append(Hook(module, "call", _expert_hook(parts, parts[0].fused, function, replaces)))
        else:
            neurons = slice(None) if len(branch.parts) == 1 else slice(parts[0].start, parts[0].stop)
            hooks.append(Hook(module, "input", lambda x, neurons=neurons: function(x, neurons, None)))
    return hooks


class _Weights:
    """The tensors of fused experts, brought to a device: after the module has run, Accelerate may have offloaded them."""

    def __init__(self, module: nn.Module, row: Experts, device: torch.device) -> None:
        self.module, self.row = module, row
        names = ("gate_up_proj" if row.gated else "up_proj", "down_proj")
        self.inputs, self.outputs = (
            [values(module, n).to(device) for n in (name, f"{name}_bias") if n in module._parameters] for name in names
        )

    def neurons(self, e: int, hidden: Tensor) -> Tensor:
        """The neurons (n, f) of an expert on the inputs (n, d) of some tokens."""
        z = self._linear(hidden, self.inputs, e)
        if self.row.gated and not self.row.sorted_tokens:
            return self.module._apply_gate(z)  # type: ignore[operator]
        if not self.row.gated:
            return self.module.act_fn(z)  # type: ignore[operator]
        gate, up = z.chunk(2, dim=-1)
        return self.module.act_fn(gate) * up  # type: ignore[operator]

    def output(self, e: int, z: Tensor) -> Tensor:
        """What an expert computes from its neurons."""
        out, inner = self._linear(z, self.outputs, e), f"{self.row.module}."
        # A norm of the module itself comes before the routing weights, any other after the sum.
        norm = self.row.norm.removeprefix(inner) if self.row.norm.startswith(inner) else None
        return out if norm is None else self.module.get_submodule(norm)(out)

    def _linear(self, x: Tensor, tensors: list[Tensor], e: int) -> Tensor:
        weight, *bias = (tensor[e] for tensor in tensors)
        return nn.functional.linear(x, weight.T if self.row.transposed else weight, *bias)


def _expert_hook(
    parts: Sequence[Neurons], row: Experts, function: HookFn, replaces: bool
) -> Callable[..., Tensor | None]:
    """Recompute the neurons of the tokens that each expert receives."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).args
        hidden, index, routing, count = _routed(row, len(parts), arguments)
        # Every hook here starts from the inputs of the module, so it must repeat the edits of the hooks before it.
        functions = (*getattr(output, _EDITED, ()), function)
        weights, total = _Weights(module, row, hidden.device), torch.zeros_like(output)
        for e, part in enumerate(parts):
            rows, choice = torch.where(index == e)
            if not len(rows):
                continue
            z = weights.neurons(e, hidden[rows])
            for edit in functions:
                with full_precision(z):
                    new = edit(z, slice(part.start, part.stop), rows % count)
                z = z if new is None else new
            if replaces:
                out = weights.output(e, z) * routing[rows, choice, None]
                total = total.index_add(0, rows, out.to(total.dtype))
        if not replaces:
            return None
        setattr(total, _EDITED, functions)
        return total

    return hook


def _routed(row: Experts, experts: int, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, int]:
    """The inputs (n, d) of fused experts, the experts (n, k) that each goes to, what multiplies these, and how many tokens.

    A module of sorted tokens has a row for each expert and token, already multiplied; those of tokens not routed are zero.
    """
    if not row.sorted_tokens:
        hidden, index, routing = arguments[:3]
        return hidden, index, routing, len(hidden)
    (hidden,), count = arguments, len(arguments[0]) // experts
    index = torch.arange(experts, device=hidden.device).repeat_interleave(count).where(hidden.any(-1), -1)[:, None]
    return hidden, index, torch.ones_like(index), count


@contextmanager
def routed_to(model: nn.Module, parts: Sequence[Neurons]) -> Iterator[None]:
    """Send one token to each of some experts of a module, in place of its first choice; at most as many as there are tokens."""
    module, row = model.get_submodule(parts[0].writer), parts[0].fused
    experts = torch.tensor([part.expert for part in parts])

    def reroute(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        hidden, *index = list(call.arguments)[:2]
        if row is not None and row.sorted_tokens:
            rows = call.arguments[hidden].unflatten(0, (len(module.get_parameter("down_proj")), -1)).clone()
            rows[experts.to(rows.device)] = rows.sum(0)
            call.arguments[hidden] = rows.flatten(0, 1)
        else:
            call.arguments[index[0]] = call.arguments[index[0]].clone()
            call.arguments[index[0]][: len(experts), 0] = experts.to(call.arguments[index[0]])
        return call.args, call.kwargs

    handle = module.register_forward_pre_hook(reroute, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
