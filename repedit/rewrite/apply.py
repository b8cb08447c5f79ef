"""Carry an edit out on a model in memory; the original stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from repedit.arch.check import check_bare
from repedit.arch.offload import check_in_memory
from repedit.errors import ArgumentError, NoOpEdit, PlanMismatch
from repedit.lower import EditOrDelta, check_model, lower
from repedit.models.subject import Subject
from repedit.plan import Plan
from repedit.quantization import check_unquantized


def apply(
    change: EditOrDelta | Plan | Sequence[EditOrDelta],
    subject: Subject,
    *,
    inplace: bool = False,
    allow_identity: bool = False,
    **options: Any,
) -> Subject:
    """The subject with the edit in its weights.

    The result shares every untouched tensor with the original, which is bitwise unchanged. With `inplace=True` the
    given model itself is edited, with every view of it (`to_lens`, `to_nnsight`), and nothing but its files can bring it back.

    Args:
        change: an edit or a delta, several of them (carried out left to right), or a plan made for this model.
        options: passed to lowering: tied="untie" | "both", sides="all" | "output", any_model=False | True.
    Raises:
        NotFoldable: if no weight equals the edit. FingerprintError: if the change was made for other weights, unless `any_model=True`.
        QuantizedModel, OffloadedTensors: if the weights cannot be edited in memory.
        NoOpEdit: if nothing would change, unless `allow_identity=True`.
        NotFinite: if an edited weight is not finite, or would not be in its dtype.
    """
    plan = planned(change, subject, **options)
    if plan.store == "disk":
        raise ArgumentError("this plan was made for checkpoint files; make one for the model, or pass the edit itself")
    if plan.structure != "keep":
        raise ArgumentError("this plan changes shapes; use repedit.slimmed or repedit.sliced")
    before = dict(subject.model.named_parameters(remove_duplicate=False))
    new = new_tensors(plan, before)
    changed = [name for name, value in new.items() if name not in before or not torch.equal(value, before[name])]
    if not changed and not allow_identity:
        raise NoOpEdit(noop_message(list(plan.operations)))
    model = subject.model if inplace else shared_clone(subject.model)
    for key, value in plan.config.items():
        setattr(model.config, key, value)
    for name, value in new.items():
        _set(model, name, value, before)
    for view in _VIEWS.get(model, ()) if inplace else ():
        _follow(view, model, new)
    _verify(model, plan, before)
    return Subject(model, subject.tokenizer, _architecture(subject, plan), origin=subject.origin)


def planned(change: EditOrDelta | Plan | Sequence[EditOrDelta], subject: Subject, **options: Any) -> Plan:
    """The plan of a change for this model in memory, after the checks that forbid any edit.

    Raises:
        QuantizedModel, OffloadedTensors: if the weights cannot be edited in memory.
    """
    check_editable(subject)
    check_model(change, subject.value, any_model=bool(options.get("any_model")))
    plan = change if isinstance(change, Plan) else lower(change, subject.architecture, subject.specs, **options)
    plan.check(subject.specs)
    return plan.resolved(subject.value)


def check_editable(subject: Subject) -> None:
    """Refuse weights that no edit can be carried out on in memory.

    Raises:
        QuantizedModel, OffloadedTensors, NotAModel: with what to do instead.
    """
    check_unquantized(subject.quantizer, subject.specs, "edited exactly")
    check_bare(subject.model)
    check_in_memory(subject.model, "use repedit.export(edit, source=directory, target=...), which streams the files")


def noop_message(names: list[str]) -> str:
    """What to tell a user whose edit changes nothing."""
    return (
        f"the edit changes nothing: {len(names)} tensors came out equal ({', '.join(names[:3])}); is it the identity, made for "
        "other neurons, or swallowed by rounding in this dtype? Pass allow_identity=True to go on"
    )


def new_tensors(plan: Plan, before: dict[str, nn.Parameter]) -> dict[str, Tensor]:
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
        kept = read(head if head in before else embedding)
        new[head] = plan.apply(head, kept, read) if head in plan.resized else kept
    return new


def _weight_of(bias: str, before: dict[str, nn.Parameter]) -> nn.Parameter:
    return before[f"{bias.removesuffix('.bias')}.weight"]


def shared_clone(model: Any) -> Any:
    """A model with its own modules and config that shares every tensor."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(t): t for t in tensors})


def _set(model: nn.Module, name: str, value: Tensor, before: dict[str, nn.Parameter]) -> None:
    """Give every name of one tensor a new parameter, so that ties survive; an untied head was given its own value."""
    old = before.get(name)
    parameter = nn.Parameter(value, requires_grad=(_weight_of(name, before) if old is None else old).requires_grad)
    current = dict(model.named_parameters(remove_duplicate=False)).get(name)
    aliases = (
        [name] if current is None else [n for n, p in model.named_parameters(remove_duplicate=False) if p is current]
    )
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    for alias in aliases if tied else [name]:
        path, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(path), leaf, parameter)


def follows(view: nn.Module, model: nn.Module, inner: str) -> None:
    """Have a second module tree on a model's parameters get the new ones when the model is edited in place.

    Args:
        inner: what the tree inserts into the path of a module that it wraps.
    """
    _VIEWS.setdefault(model, WeakSet()).add(view)
    _INNER[view] = inner


_VIEWS: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
_INNER: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _follow(view: nn.Module, model: nn.Module, new: Mapping[str, Tensor]) -> None:
    held = dict(model.named_parameters(remove_duplicate=False))
    touched = {id(held[name]) for name in new}
    places = {
        path.replace(_INNER[view], ""): module for path, module in view.named_modules()
    }  # the innermost comes last
    for name, parameter in held.items():
        path, _, leaf = name.rpartition(".")
        if id(parameter) in touched:
            setattr(places[path], leaf, parameter)


def _verify(model: nn.Module, plan: Plan, before: dict[str, nn.Parameter]) -> None:
    after = dict(model.named_parameters(remove_duplicate=False))
    touched = {name for name, p in after.items() if before.get(name) is not p}
    aliases = {name for name in touched if any(after[name] is after[other] for other in plan.touched if other != name)}
    if touched - aliases != plan.touched - aliases:
        missed, extra = sorted(plan.touched - touched), sorted(touched - plan.touched)
        raise PlanMismatch(f"planned but untouched: {missed[:5]}; touched but not planned: {extra[:5]}")


def _architecture(subject: Subject, plan: Plan) -> Any:
    from dataclasses import replace

    tied = plan.config.get("tie_word_embeddings", subject.architecture.tied)
    return replace(subject.architecture, tied=bool(tied))
