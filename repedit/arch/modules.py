"""Compare a matched row with the live modules; needs no forward pass, so every wrapped model is checked."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from repedit.arch.anatomy import Anatomy
from repedit.errors import NotAModel, UnknownArchitecture
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


def check_bare(model: nn.Module) -> None:
    """Refuse a model whose weights are computed from others, by an adapter, a parametrization or a pruning mask.

    Raises:
        NotAModel: naming the first module, with what makes a plain weight of it.
    """
    for name, module in model.named_modules():
        hooks = (type(hook).__module__ for hook in module._forward_pre_hooks.values())
        if type(module).__module__.startswith("peft."):
            raise NotAModel(f"{name or type(module).__name__} {_ADAPTER}")
        if parametrize.is_parametrized(module):
            raise NotAModel(
                f"{name} is parametrized: its weight is computed from other tensors. Make it plain first: "
                "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
            )
        if any(where.startswith("torch.nn.utils.") for where in hooks):
            raise NotAModel(
                f"the weight of {name} is computed by torch.nn.utils from other tensors. Make it plain first: prune.remove, "
                "remove_weight_norm or remove_spectral_norm"
            )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise NotAModel(f"{type(model).__name__} {_ADAPTER}")


def check_merged(thing: object) -> None:
    """Refuse a model of peft around a model.

    Raises:
        NotAModel: with what to do.
    """
    if type(thing).__module__.startswith("peft."):
        raise NotAModel(f"{type(thing).__name__} {_ADAPTER}")


_ADAPTER = (
    "holds an adapter of peft, which is no part of the weights. Merge it first: PeftModel.from_pretrained(model, "
    "adapter).merge_and_unload(), or use the model without it; learned prompts and prefixes cannot be merged"
)


def _module(model: nn.Module, path: str, model_type: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnknownArchitecture(f"the {model_type} row names the module {path!r}, which the model lacks") from error
