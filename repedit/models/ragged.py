"""Models whose layers have MLPs of different widths, and loading their checkpoints.

`config.json` cannot express per-layer widths, so repedit.json records them, and `load` replaces the tensors that transformers
reports as tensors of another shape.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repedit.arch import Architecture, TensorSpec, match_layout
from repedit.arch.layout import ModelLayout
from repedit.errors import CheckpointError
from repedit.io.checkpoint import Shards, open_shards
from repedit.io.text import read_json
from repedit.sites import Point


def mlp_widths(layout: ModelLayout) -> dict[int, int]:
    """Neurons of the MLP of each layer; of one expert if it has experts."""
    return {i: branch.parts[0].stop for i, (_, branch) in enumerate(layout.layers)}


def ragged_widths(layout: ModelLayout) -> dict[int, int]:
    """The same if layers of one kind (dense, experts) differ; otherwise empty."""
    widths = mlp_widths(layout)
    kinds = {(branch.routed, widths[i]) for i, (_, branch) in enumerate(layout.layers)}
    return widths if len(kinds) > len({routed for routed, _ in kinds}) else {}


def mlp_tensors(layout: ModelLayout) -> frozenset[str]:
    """Every tensor whose shape depends on the number of neurons of an MLP."""
    branches = [layout.branch(i, Point.MLP_OUT) for i in range(len(layout.layers))]
    views = [view for branch in branches for part in branch.parts for view in (part.out, *part.readers)]
    return frozenset(view.tensor for view in views)


def set_parameter(model: nn.Module, name: str, value: nn.Parameter) -> None:
    """Replace a parameter of a model, and update the sizes that its module records."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    setattr(module, leaf, value)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif type(module).__name__ == "Conv1D":  # stored (in, out); its forward pass asks for nf
        module.nx, module.nf = value.shape if leaf == "weight" else (module.nx, module.nf)


# --- Loading


def recorded_widths(directory: Path) -> dict[int, int]:
    """The width of each layer that repedit.json records; empty if the config describes all widths."""
    path = directory / "repedit.json"
    record = read_json(path, finite=False) if path.is_file() else {}
    if record.get("layout") != "ragged":
        return {}
    try:
        return {int(layer): int(width) for layer, width in record["widths"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has layout 'ragged' and no widths by layer; export again") from error


@contextmanager
def quiet_if_ragged(place: Path | str) -> Iterator[None]:
    """Silence the warnings of transformers about tensors of another shape, if repedit.json records their widths."""
    logger = logging.getLogger("transformers")
    level = logger.level
    if isinstance(place, Path) and recorded_widths(place):
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def set_recorded_widths(model: nn.Module, architecture: Architecture, place: Path | str, names: set[str]) -> set[str]:
    """Give a model the tensors of the recorded widths in place of the config's; returns the names of those not replaced.

    Raises:
        CheckpointError: if a tensor is absent, or a layer comes out with another width than repedit.json records.
    """
    recorded = recorded_widths(place) if names and isinstance(place, Path) else {}
    if not recorded:
        return names
    shards = open_shards(place)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in sorted(names):
        old = parameters[name]
        set_parameter(
            model, name, nn.Parameter(_read_stored(name, architecture, shards).to(old), requires_grad=old.requires_grad)
        )
    specs = {n: TensorSpec(tuple(p.shape), p.dtype) for n, p in model.named_parameters(remove_duplicate=False)}
    actual = mlp_widths(match_layout(architecture, specs))
    if actual != recorded:
        raise CheckpointError(
            f"{place} holds MLPs of widths {list(actual.values())}, its repedit.json records {list(recorded.values())}; "
            "is it from another export?"
        )
    return set()


def _read_stored(name: str, architecture: Architecture, shards: Shards) -> Tensor:
    """A tensor by its name in memory; experts are stored one by one."""
    for alias in (name, name.removeprefix(f"{architecture.base}.")):
        if alias in shards.entries:
            return shards.read(alias)
        for parts in _expert_names(alias, architecture, shards):
            return torch.stack([torch.cat([shards.read(n) for n in names]) for names in parts])
    raise CheckpointError(f"{shards.directory} holds no tensor {name!r}")


def _expert_names(name: str, architecture: Architecture, shards: Shards) -> Iterator[list[tuple[str, ...]]]:
    """The names on disk, by expert, of the parts of a fused tensor."""
    row = architecture.experts
    if row is None:
        return
    for leaf, paths in (("gate_up_proj", (row.gate, row.up)), ("down_proj", (row.down,))):
        block = name.removesuffix(f"{row.module}.{leaf}")
        parts = [tuple(f"{block}{p.format(e=e)}" for p in paths) for e in range(architecture.n_experts)]
        if block != name and all(n in shards.entries for names in parts for n in names):
            yield parts
