"""Apply a plan that changes shapes: a new model of the same class with the resized tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from repedit.arch import match_layout
from repedit.errors import NotSliceable, NotSlimmable, PlanMismatch
from repedit.models.ragged import mlp_tensors, ragged_widths, set_parameter
from repedit.models.subject import Subject, subject_of
from repedit.plan import Plan
from repedit.rewrite.apply import check_editable, named_parameters, new_tensors


def rebuilt(plan: Plan, subject: Subject) -> Subject:
    """A smaller model with the plan in its weights; it shares every untouched tensor with the original.

    Raises:
        QuantizedModel, OffloadedTensors: if the weights cannot be edited in memory.
        NotSlimmable, NotSliceable: if the family's config refuses the new widths.
        PlanMismatch: if the tensors do not fit the model that the config describes.
    """
    check_editable(subject)
    plan.check(subject.specs)
    before = named_parameters(subject.model)
    new = {
        name: nn.Parameter(value, requires_grad=before[name].requires_grad if name in before else True)
        for name, value in new_tensors(plan, before).items()
    }
    model = _empty(subject.model, plan)
    shapes = {name: p.shape for name, p in named_parameters(model).items()}
    values = before | new
    different = sorted((set(shapes) - set(values)) | (set(new) - set(shapes)))
    if different:
        raise PlanMismatch(f"the smaller model and the plan disagree on the tensors {different[:5]}")
    for name in shapes:
        set_parameter(model, name, values[name])
    smaller = subject_of(model, subject.tokenizer, origin=subject.origin)
    _check_shapes(smaller, shapes)
    return smaller


def patched_config(config: Any, plan: Plan) -> Any:
    """A copy of a config with the fields that the plan changes, as its own class accepts them.

    Raises:
        NotSlimmable, NotSliceable: with the reason the class gives.
    """
    from huggingface_hub.errors import StrictDataclassError

    patched = copy.deepcopy(config)
    try:
        for key, value in plan.config.items():
            setattr(patched, key, value)
        type(config)(**patched.to_dict())
    except (ValueError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise (NotSliceable if plan.structure == "slice" else NotSlimmable)(
            f"the config of {config.model_type} refuses {', '.join(f'{k}={v}' for k, v in plan.config.items())}: {reason}"
        ) from error
    return patched


def _empty(model: Any, plan: Plan) -> Any:
    """A model of the new shape without values; its buffers have values, because they are computed from the config."""
    from accelerate import init_empty_weights

    config = patched_config(model.config, plan)
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        empty = type(model)(config)
    old = dict(model.named_buffers())
    for name, buffer in list(empty.named_buffers()):
        if name in old:
            path, _, leaf = name.rpartition(".")
            setattr(empty.get_submodule(path), leaf, buffer.to(old[name]))
    empty.generation_config = copy.deepcopy(model.generation_config)
    return empty.train(model.training)


def _check_shapes(subject: Subject, shapes: dict[str, torch.Size]) -> None:
    wrong = {n for n, p in named_parameters(subject.model).items() if p.shape != shapes[n]}
    layout = match_layout(subject.architecture, subject.specs)
    if wrong - (mlp_tensors(layout) if ragged_widths(layout) else frozenset()):
        name = min(wrong)
        raise PlanMismatch(
            f"{len(wrong)} tensors have other shapes than the config gives them, such as {name}: "
            f"{tuple(subject.specs[name].shape)} and {tuple(shapes[name])}"
        )
