"""Apply an edit to a model in memory, and build a model of other shapes around resized tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, Unpack
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from repedit.arch import match_layout
from repedit.arch.offload import check_in_memory
from repedit.arguments import checked
from repedit.errors import ArgumentError, NoOpEdit, NotSliceable, NotSlimmable, PlanMismatch
from repedit.lower import Change, check_model, lower
from repedit.models.loading import mlp_tensors, ragged_widths, set_fields, set_parameter
from repedit.models.modifications import check_plain_weights
from repedit.models.subject import Subject, shared_clone, subject_of
from repedit.plan import LoweringOptions, Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# --- A plan that changes shapes: a new model of the same class with the resized tensors


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


def patched_config(config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """A copy of a config with the fields that the plan changes, as its own class accepts them.

    Raises:
        NotSlimmable, NotSliceable: with the reason the class gives.
    """
    from huggingface_hub.errors import StrictDataclassError

    patched = copy.deepcopy(config)
    try:
        set_fields(patched, plan.config)
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


# --- An edit in the weights of a model in memory; the original model stays as it is

Module = TypeVar("Module", bound=nn.Module)


@checked
def apply(
    change: Change,
    subject: Subject,
    *,
    inplace: bool = False,
    allow_identity: bool = False,
    **options: Unpack[LoweringOptions],
) -> Subject:
    """The subject with the edit in its weights.

    The result shares every untouched tensor with the original, which is bitwise unchanged. With `inplace=True` the
    given model itself is edited, with every view of it (`to_lens`, `to_nnsight`); only its files can restore it.

    Args:
        change: an edit or a delta, several of them (applied left to right), or a plan made for this model.
        options: passed to lowering: tied="untie" | "both", sides="all" | "output", any_model=False | True.
    Raises:
        NotFoldable: if no weight equals the edit. FingerprintError: if the change was made for other weights, unless `any_model=True`.
        QuantizedModel, OffloadedTensors: if the weights cannot be edited in memory.
        NoOpEdit: if nothing would change, unless `allow_identity=True`.
        NotFinite: if an edited weight is not finite, or would not be in its dtype.
    """
    plan = plan_in_memory(change, subject, **options)
    if plan.store == "disk":
        raise ArgumentError("this plan was made for checkpoint files; make one for the model, or pass the edit itself")
    if plan.structure != "keep":
        raise ArgumentError("this plan changes shapes; use repedit.slimmed or repedit.sliced")
    before = named_parameters(subject.model)
    new = new_tensors(plan, before)
    changed = [name for name, value in new.items() if name not in before or not torch.equal(value, before[name])]
    if not changed and not allow_identity:
        raise NoOpEdit(no_op_message(list(plan.operations)))
    model = subject.model if inplace else shared_clone(subject.model)
    set_fields(model.config, plan.config)
    for name, value in new.items():
        _set_parameter(model, name, value, before)
    for view, wrapper in _synchronized.get(model, {}).items() if inplace else ():
        _synchronize(view, wrapper, model, new)
    _check_touched(model, plan, before)
    tied = bool(plan.config.get("tie_word_embeddings", subject.architecture.tied))
    return Subject(model, subject.tokenizer, replace(subject.architecture, tied=tied), origin=subject.origin)


def plan_in_memory(change: Change, subject: Subject, **options: Unpack[LoweringOptions]) -> Plan:
    """The plan of a change for this model in memory, after the checks that forbid any edit.

    Raises:
        QuantizedModel, OffloadedTensors: if the weights cannot be edited in memory.
    """
    check_editable(subject)
    check_model(change, subject.value, any_model=options.get("any_model", False))
    plan = change if isinstance(change, Plan) else lower(change, subject.architecture, subject.specs, **options)
    plan.check(subject.specs)
    return plan.resolved(subject.value)


def check_editable(subject: Subject) -> None:
    """Refuse weights that cannot be edited in memory.

    Raises:
        QuantizedModel, OffloadedTensors, NotAModel: with what to do instead.
    """
    subject.check_unquantized("edited exactly")
    check_plain_weights(subject.model)
    check_in_memory(subject.model, "use repedit.export(edit, source=directory, target=...), which streams the files")


def no_op_message(names: list[str]) -> str:
    """The message of a NoOpEdit."""
    return (
        f"the edit changes nothing: {len(names)} tensors came out equal ({', '.join(names[:3])}); is it the identity, made for "
        "other neurons, or lost to rounding in this dtype? Pass allow_identity=True to accept that"
    )


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by name, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def new_tensors(plan: Plan, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that the plan writes, adds or unties, by name."""

    def read(name: str) -> Tensor:
        return before[name].detach()

    new: dict[str, Tensor] = {}
    for name, spec in plan.added.items():
        new[name] = torch.zeros(spec.shape, dtype=spec.dtype, device=_weight_of(name, before).device)
    for name in plan.rewritten:
        if name not in plan.unties:
            new[name] = plan.apply(name, new[name] if name in new else read(name), read)
    for head, embedding in plan.unties.items():
        original = read(head if head in before else embedding)
        new[head] = plan.apply(head, original, read) if head in plan.resized else original
    return new


def _weight_of(bias: str, parameters: Mapping[str, Tensor]) -> Tensor:
    return parameters[f"{bias.removesuffix('.bias')}.weight"]


def _set_parameter(model: nn.Module, name: str, value: Tensor, before: Mapping[str, Tensor]) -> None:
    """Give every name of one tensor a new parameter, so that ties survive; an untied head has its own value already."""
    old = before.get(name)
    parameter = nn.Parameter(value, requires_grad=(_weight_of(name, before) if old is None else old).requires_grad)
    aliases = [name]
    if getattr(model.config, "tie_word_embeddings", False):
        parameters = named_parameters(model)
        aliases = [alias for alias, p in parameters.items() if p is parameters.get(name)] or [name]
    for alias in aliases:
        path, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(path), leaf, parameter)


def _check_touched(model: nn.Module, plan: Plan, before: Mapping[str, nn.Parameter]) -> None:
    """Refuse a model in which other tensors were replaced than those planned, or their ties."""
    after = named_parameters(model)
    touched = {name for name, p in after.items() if before.get(name) is not p}
    ties = {name for name in touched if any(after[name] is after[other] for other in plan.touched if other != name)}
    plan.check_touched(touched, ignore=ties)


# --- Views of a model, such as a TransformerLens bridge, that follow edits in place

_synchronized: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, str]] = WeakKeyDictionary()
"""Model -> module tree on its parameters -> what that tree inserts into the paths of the modules it wraps."""


def synchronize(view: nn.Module, model: nn.Module, wrapper: str) -> None:
    """Give a second module tree the new parameters whenever the model that it shares them with is edited in place.

    Args:
        wrapper: what the tree inserts into the path of a module that it wraps.
    """
    _synchronized.setdefault(model, WeakKeyDictionary())[view] = wrapper


def _synchronize(view: nn.Module, wrapper: str, model: nn.Module, new: Mapping[str, Tensor]) -> None:
    parameters = named_parameters(model)
    replaced = {id(parameters[name]) for name in new}
    # Of modules that share a path without the wrapper, the innermost comes last.
    modules = {path.replace(wrapper, ""): module for path, module in view.named_modules()}
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        if id(parameter) in replaced:
            setattr(modules[path], leaf, parameter)
