"""The laws of edits for any model that `repedit.wrap` accepts, at every branch that is unlike those before it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

import repedit as rp
from repedit.arch import Branch, MatrixView, check, hooks_at
from repedit.edit import Edit
from repedit.hooks import evaluating, installed
from repedit.models.loading import auto_class
from repedit.models.subject import Subject
from repedit.sites import Site
from tests import laws
from tests.edits import mask, projection
from tests.every_causal_type import tiny_causal
from tests.every_wrapper_type import tiny_wrapper
from tests.plain_reload import reloaded_logits
from tests.tiny import ids, logits
from tests.tolerances import short, within


def tiny_of(model_type: str, dtype: torch.dtype = torch.float32) -> Subject:
    """A fresh tiny model of a type, wrapped; "wrapper:qwen3_5" is the wrapper of a text decoder."""
    wrapper, _, name = model_type.rpartition(":")
    return rp.wrap((tiny_wrapper if wrapper else tiny_causal)(name, dtype))


# --- The sites and edits of one model


def distinct_branches(subject: Subject) -> dict[Site, Branch]:
    """The branches of a model by the site of their output; of those with the same structure the last one."""
    found: dict[object, tuple[Site, Branch]] = {}
    for layer, branches in enumerate(subject.layout.layers):
        module = type(subject.model.get_submodule(subject.layout.block_paths[layer]))
        for branch in branches:
            found[module, tuple(b.kind for b in branches), structure(branch)] = Site(layer, branch.outer), branch
    return dict(sorted(found.values(), key=lambda item: item[0]))


def structure(branch: Branch) -> object:
    """What a hook or a plan depends on: widths, heads, experts, norms, biases and the scale, but no layer."""
    parts = [
        (p.stop - p.start, p.expert is not None, len(p.readers), p.bias is None, p.gain is None) for p in branch.parts
    ]
    own = (branch.kind, branch.scale, branch.head_width, branch.group, branch.gain is None, len(branch.outputs))
    return own, tuple(parts)


def edits_at(subject: Subject, site: Site, branch: Branch) -> Iterator[Edit]:
    """The edits of a branch that are exact: of its neurons, and of its output if no norm follows."""
    neurons = Site(site.layer, branch.inner)
    yield mask(subject, str(neurons))
    yield scale(subject, neurons)
    if len(branch.parts) == 1:
        yield projection(subject, str(neurons), rank=min(3, branch.width - 1))
    if not branch.gains:
        yield mask(subject, str(site))
        yield projection(subject, str(site))


def scale(subject: Subject, site: Site) -> Edit:
    """Multiply every channel of a site by another number."""
    width = subject.layout.width_of(site.layer, site.point)
    factors = torch.rand(width, generator=torch.Generator().manual_seed(1)) + 0.5
    return Edit({site: rp.Diagonal(factors)}, {"method": "test"})


def everywhere(subject: Subject) -> Edit:
    """A mask at the neurons and a projection at the output of every branch of every layer."""
    maps: dict[Site, Any] = {}
    for layer, branches in enumerate(subject.layout.layers):
        for branch in branches:
            maps |= mask(subject, f"{layer}.{branch.inner}", share=0.3, seed=layer).maps
            maps |= projection(subject, f"{layer}.{branch.outer}", seed=layer).maps
    return Edit(maps, {"method": "test"})


# --- The laws


def hooked_equals_applied(subject: Subject, apply: Callable[..., Subject] = rp.apply) -> None:
    """In the whole model, every edit of every distinct branch gives the same logits as a hook and as weights, and moves them."""
    for site, branch in distinct_branches(subject).items():
        for edit in edits_at(subject, site, branch):
            with named(edit):
                laws.hooked_equals_rewritten(subject, edit, apply)


def branches_agree(subject: Subject, apply: Callable[..., Subject] = rp.apply) -> None:
    """The same for what the branch alone adds on the inputs that its block receives, so that no later rounding matters.

    A rounding in a later block may send a token to another expert; within the branch nothing depends on what it adds.
    """
    calls = block_calls(subject)
    for site, branch in distinct_branches(subject).items():
        base = added(subject, site, calls)
        for edit in edits_at(subject, site, branch):
            with edit.hooked(subject):
                hooked = added(subject, site, calls)
            assert not torch.equal(hooked, base), f"{edit} does not move {site}"
            with named(edit):
                error = laws.apart(added(apply(edit, subject), site, calls), hooked)
                within(error, f"branch, {short(base.dtype)}")


def subspaces_are_gone(subject: Subject, apply: Callable[..., Subject] = rp.apply) -> None:
    """After a projection at the output of a branch that ends with a norm, it adds nothing in the subspace."""
    for site, branch in distinct_branches(subject).items():
        if branch.gains:
            laws.subspace_is_gone(subject, projection(subject, str(site)), apply)


@contextmanager
def named(edit: Edit) -> Iterator[None]:
    """Name the edit that breaks a law."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{edit.describe()}: {error}") from error


def exported_equals_applied(subject: Subject, folder: Path, export: Callable[..., object] = rp.export) -> None:
    """Files of an edit of all branches, read by the class of transformers, hold every tensor of the edited model."""
    edit = everywhere(subject)
    export(edit, subject, folder / "edited")
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = loader(folder / "edited").from_pretrained(folder / "edited", dtype="auto", **eager)
    found, expected = tensors(loaded), tensors(rp.apply(edit, subject).model)
    assert type(loaded) is type(subject.model) and set(found) == set(expected)
    # CTRL casts a buffer that files do not hold whenever it runs.
    found |= {name: found[name].to(expected[name]) for name in found.keys() - loaded.state_dict().keys()}
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"exported tensors differ from those of the edited model: {different}"


def loader(directory: Path) -> Any:
    """The class of transformers that loads a checkpoint."""
    return auto_class(AutoConfig.from_pretrained(directory))


def reload_without_repedit(
    model_types: Iterable[str], dtype: torch.dtype, folder: Path, export: Callable[..., object] = rp.export
) -> None:
    """In a process where importing repedit fails, the files of an edit of all branches give the logits of the edited model."""
    checkpoints, expected = {}, {}
    for number, model_type in enumerate(model_types):
        subject, target = tiny_of(model_type, dtype), folder / str(number)
        edit = everywhere(subject)
        export(edit, subject, target)
        checkpoints[model_type] = (target, loader(target).__name__)
        expected[model_type] = logits(rp.apply(edit, subject))
    found = reloaded_logits(checkpoints, ids(), folder)
    different = {}
    for model_type, edited in expected.items():
        own = found[model_type]
        try:
            assert isinstance(own, Tensor), own
            laws.assert_close(own.to(edited.dtype), edited, dtype)
        except AssertionError as error:
            different[model_type] = str(error)
    assert not different, f"reloaded logits differ from those of the edited model: {different}"


def tensors(model: Any) -> dict[str, Tensor]:
    """Every parameter under each of its names, and every buffer."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


@torch.no_grad()
def every_writer_is_proved(subject: Subject) -> None:
    """The proof of a branch fails if any one tensor that it writes with is not folded, each expert and each bias included."""
    layout = subject.layout
    with evaluating(subject.model):
        forward = check._ForwardCheck(subject.model, layout, check.TOLERANCE)
        for site, branch in distinct_branches(subject).items():
            assert all(proof.passed for proof in forward.branch(site.layer, branch)), site
            for view in writers(branch):
                proofs = forward.branch(site.layer, without(branch, view))
                assert not all(proof.passed for proof in proofs), f"{view} is not noticed"
        for name in layout.embeddings if layout.architecture.embedding_exact else ():
            forward.layout = replace(layout, embeddings=tuple(n for n in layout.embeddings if n != name))
            assert not forward.embeddings().passed, f"{name} is not noticed"


def writers(branch: Branch) -> list[MatrixView]:
    """Every matrix and every bias that a branch writes with."""
    return [view for part in branch.parts for view in (part.out, part.bias) if view is not None]


class LeftOut(MatrixView):
    """A matrix that no edit changes, as if a row did not name it."""

    def change(self, stored: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """Nothing."""


def without(branch: Branch, view: MatrixView) -> Branch:
    """A branch in which one matrix or bias is left out."""

    def seen(own: MatrixView | None) -> Any:
        return LeftOut(**vars(view)) if own == view else own

    return replace(branch, parts=tuple(replace(p, out=seen(p.out), bias=seen(p.bias)) for p in branch.parts))


Call = tuple[tuple[Any, ...], dict[str, Any]]


def block_calls(subject: Subject) -> dict[int, Call]:
    """The arguments of every block in one forward pass."""
    calls: dict[int, Call] = {}

    def keep(layer: int) -> Any:
        return lambda _module, args, kwargs: calls.__setitem__(layer, copy.deepcopy((args, kwargs)))

    blocks = [subject.model.get_submodule(path) for path in subject.layout.block_paths]
    handles = [b.register_forward_pre_hook(keep(i), with_kwargs=True) for i, b in enumerate(blocks)]
    logits(subject)
    for handle in handles:
        handle.remove()
    return calls


@torch.no_grad()
def added(subject: Subject, site: Site, calls: dict[int, Call]) -> Tensor:
    """What a branch adds to the stream when its block runs on recorded arguments."""
    seen: list[Tensor] = []
    observe = hooks_at(subject.model, subject.layout, site, lambda x, *_: seen.append(x.clone()), replaces=False)
    args, kwargs = copy.deepcopy(calls[site.layer])
    with installed(subject.model, observe):
        subject.model.get_submodule(subject.layout.block_paths[site.layer])(*args, **kwargs)
    return seen[-1]
