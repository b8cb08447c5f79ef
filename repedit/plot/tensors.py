"""Where a tensor stands, read from its name: which layer, and which module of it."""

from __future__ import annotations

import re
from collections.abc import Iterable


def place(name: str) -> tuple[int | None, str]:
    """Layer and module of a tensor: (3, "mlp.down_proj") of "model.layers.3.mlp.down_proj.weight".

    The layer is None outside the blocks. A bias counts to its module.
    """
    module = re.sub(r"\.(weight|bias)$", "", name)
    found = re.search(r"\.(\d+)\.(.+)$", module)
    return (int(found[1]), found[2]) if found else (None, module)


def modules(names: Iterable[str]) -> list[str]:
    """The modules that stand in layers, in the order in which their tensors are named."""
    return list(dict.fromkeys(module for layer, module in map(place, names) if layer is not None))


def short(module: str) -> str:
    """What a reader calls a module: "down_proj" of "mlp.down_proj"; "attn.c_proj" keeps its branch, which tells it apart."""
    head, _, tail = module.rpartition(".")
    return tail if not head or (tail.endswith("_proj") and tail != "c_proj") else f"{head.rpartition('.')[2]}.{tail}"
