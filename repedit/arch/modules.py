"""Compare a matched row with the live modules; needs no forward pass, so every wrapped model is checked."""

from __future__ import annotations

from torch import nn

from repedit.arch.anatomy import Anatomy
from repedit.errors import UnknownArchitecture
from repedit.sites import Point


def check_modules(model: nn.Module, plan: Anatomy) -> None:
    """Compare a row with the live modules: they exist, store weights the way it says, and have as many readers.

    Raises:
        UnknownArchitecture: naming the first module that disagrees.
    """
    row = plan.architecture
    _module(model, row.head, row.model_type)
    for branch in (b for pair in plan.layers for b in pair):
        module = _module(model, branch.writer, row.model_type)
        _module(model, branch.joined, row.model_type)
        kind = type(module).__name__
        if branch.routed:
            layout = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True}
            wrong = {k: getattr(module, k, v) for k, v in layout.items() if getattr(module, k, v) != v}
            if wrong:
                raise UnknownArchitecture(f"{branch.writer} stores its experts with {wrong}, the row expects {layout}")
        elif (kind == "Conv1D") != row.transposed or not (row.transposed or isinstance(module, nn.Linear)):
            raise UnknownArchitecture(
                f"{branch.writer} is a {kind}; the {row.model_type} row says transposed={row.transposed}"
            )
        readers = {(v.tensor.rpartition(".")[0], v.part) for v in branch.parts[0].readers}
        needed = 2 if row.gated and branch.inner is Point.MLP_NEURONS else 1
        if len(readers) != needed:
            raise UnknownArchitecture(
                f"{branch.writer} has {len(readers)} readers; the {row.model_type} row with gated={row.gated} needs {needed} different ones"
            )


def _module(model: nn.Module, path: str, model_type: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnknownArchitecture(f"the {model_type} row names the module {path!r}, which the model lacks") from error
