"""Layers of different widths: which they are, and tensors of another shape in modules that were built for one width."""

from __future__ import annotations

from typing import Any

from torch import nn

from repedit.arch.anatomy import Anatomy
from repedit.sites import Point


def mlp_widths(plan: Anatomy) -> dict[int, int]:
    """Neurons of the MLP of each layer; of one expert where it has experts."""
    return {i: branch.parts[0].stop for i, (_, branch) in enumerate(plan.layers)}


def ragged_widths(plan: Anatomy) -> dict[int, int]:
    """The same where layers of one kind differ, which no config can say; empty where they agree."""
    widths = mlp_widths(plan)
    kinds = {(branch.routed, widths[i]) for i, (_, branch) in enumerate(plan.layers)}
    return widths if len(kinds) > len({routed for routed, _ in kinds}) else {}


def mlp_tensors(plan: Anatomy) -> frozenset[str]:
    """Every tensor whose shape depends on the number of neurons of an MLP."""
    branches = [plan.branch(i, Point.MLP_OUT) for i in range(len(plan.layers))]
    views = [view for branch in branches for part in branch.parts for view in (part.out, *part.readers)]
    return frozenset(view.tensor for view in views)


def fit(model: nn.Module, name: str, value: nn.Parameter) -> None:
    """Put a parameter in its place, and tell its module the shape."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    setattr(module, leaf, value)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif type(module).__name__ == "Conv1D":  # stored (in, out); its forward pass asks for nf
        module.nx, module.nf = value.shape if leaf == "weight" else (module.nx, module.nf)
