"""Wrapping models of transformers, TransformerLens and nnsight, and exporting models to these tools, on the same parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from repedit.arguments import checked
from repedit.data import Tokenizer
from repedit.edit import Edit
from repedit.errors import ArgumentError, MissingDependency, NotAModel, UnknownArchitecture, UnknownSite
from repedit.hooks import evaluating
from repedit.linear_maps import AffineMap
from repedit.models.loading import reason_of
from repedit.models.subject import Subject, shared_clone, subject_of
from repedit.rewrite.apply import synchronize
from repedit.sites import Point

LensHook = Callable[..., Tensor]
_WRAPPER = "._original_component"
_NO_TOKENIZER = "no tokenizer"
_TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest: float32 families differ by 5e-6, bfloat16 rounds."""


@checked
def wrap(model: object, tokenizer: Tokenizer | None = None) -> Subject:
    """A Subject around a transformers model, a TransformerLens `TransformerBridge` or an nnsight `TransformersModel`.

    The model is not changed and no weight is copied; a Subject is returned as it is, and a model from `torch.compile` is
    unwrapped.

    Args:
        tokenizer: used instead of the one of a bridge or an nnsight model, which is copied.
    Raises:
        NotAModel: if the object is something else, or a bridge whose tensors are not those of a transformers model.
        UnknownArchitecture: if no row of the family table fits the model.
    """
    if isinstance(model, Subject):
        return model
    model = getattr(model, "_orig_mod", model)  # the model inside the result of torch.compile
    package = type(model).__module__.partition(".")[0]
    if package in ("transformer_lens", "nnsight"):
        inner = _model_of_bridge(model) if package == "transformer_lens" else getattr(model, "_module", model)
        own = getattr(model, "tokenizer", None)
        own = None if own is None or own.name_or_path == _NO_TOKENIZER else copy.deepcopy(own)
        return subject_of(inner, own if tokenizer is None else tokenizer)
    return subject_of(model, tokenizer)


@checked
def to_lens(subject: Subject) -> Any:
    """The model as a TransformerLens `TransformerBridge` on the same parameters, which follows edits in place.

    The model keeps its modules, its attention implementation and its tokenizer; always pass token ids, because `to_tokens` of
    the bridge may prepend a token. Mixtures of experts are copied, because bridging writes into their weights; the copy does
    not follow later edits, and a warning says so.

    Raises:
        ArgumentError: if transformer_lens is not installed.
        MissingDependency: for a model with other parts than text, if torchvision is not installed.
        UnknownArchitecture: if TransformerLens has no bridge for the model, or the bridge computes other logits.
    """
    with _installed("transformer_lens"):
        from transformer_lens.model_bridge import TransformerBridge
    name = subject.architecture.model_type
    if subject.model.config.sub_configs and find_spec("torchvision") is None:
        raise MissingDependency(
            f"TransformerLens would run pip to install torchvision for the images of {name}; install it yourself first, in a version "
            "that fits torch, or use edit.hooked(subject) or to_nnsight"
        )
    model = copy.deepcopy(subject.model) if subject.architecture.n_experts else shared_clone(subject.model)
    if subject.architecture.n_experts:
        warnings.warn(
            f"{name} has experts: the bridge holds a copy of the weights, which does not follow later "
            "edits of the model",
            stacklevel=2,
        )
    model.config = copy.deepcopy(subject.model.config)
    model.config.architectures = [type(model).__name__]
    try:
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model, tokenizer=_placeholder_tokenizer(), device=str(subject.device),
            dtype=subject.model.dtype,
        )  # fmt: skip
        bridge.tokenizer = copy.deepcopy(subject.tokenizer)
        if not subject.architecture.n_experts:
            synchronize(bridge.original_model, subject.model, _WRAPPER)
        _check_same_logits(bridge, subject)
    except UnknownArchitecture:
        raise
    except Exception as error:  # adapters raise errors of their own
        raise UnknownArchitecture(
            f"TransformerLens cannot bridge {name} ({reason_of(error)[:120]}); use edit.hooked(subject) or to_nnsight"
        ) from error
    return bridge


@checked
def to_nnsight(subject: Subject) -> Any:
    """The model itself inside an nnsight `TransformersModel`, with a copy of its tokenizer, which nnsight changes.

    Raises:
        ArgumentError: if nnsight is not installed.
    """
    with _installed("nnsight"):
        from nnsight import TransformersModel
    return TransformersModel(
        subject.model,
        tokenizer=_placeholder_tokenizer() if subject.tokenizer is None else copy.deepcopy(subject.tokenizer),
    )


@checked
def lens_hooks(edit: Edit, subject: Subject) -> list[tuple[str, LensHook]]:
    """The edit for `bridge.run_with_hooks(ids, fwd_hooks=...)`: pairs of a TransformerLens name and a function.

    Raises:
        UnknownSite: at the neurons of experts, where TransformerLens has the output of the block, or if the model has no
            such site.
        ShapeError: if a map's width is not the site's.
    """
    edit.hooks(subject)  # refuses what `edit.hooked` refuses
    hooks = []
    for site, map_ in edit.maps.items():
        if site.point is Point.RESID_MID:
            raise UnknownSite(
                f"{site}: a change at {site.hook_name} reaches the MLP and not the stream after it; edit {site.layer}.attn.out there, "
                "or use edit.hooked(subject)"
            )
        if subject.layout.routed(site):
            raise UnknownSite(
                f"{site}: TransformerLens has no neurons of experts, and {site.hook_name} is the output of the block; use "
                f"{site.layer}.mlp.out there, or edit.hooked(subject)"
            )
        hooks.append((site.hook_name, _lens_hook(map_)))
    return hooks


def _lens_hook(map_: AffineMap) -> LensHook:
    def hook(value: Tensor, hook: object = None) -> Tensor:
        # hook_z has an axis of heads: (b, t, h, e) instead of (b, t, h e).
        return map_(value.flatten(2)).reshape(value.shape)

    return hook


def _check_same_logits(bridge: nn.Module, subject: Subject) -> None:
    ids = torch.arange(3, 11, device=subject.device)[None]
    with torch.no_grad(), evaluating(subject.model), evaluating(bridge):
        expected, bridged = subject.model(ids).logits, bridge(ids)
    error = float((bridged - expected).abs().max() / expected.abs().max())
    if not error <= _TOLERANCE:
        raise UnknownArchitecture(
            f"the TransformerLens bridge of {subject.architecture.model_type} gives other logits than the model (relative error "
            f"{error:.1e}) and does not represent it; use edit.hooked(subject) or to_nnsight"
        )


def _placeholder_tokenizer() -> Any:
    """A tokenizer of two words; the bridge would reload any other by its name, from the hub if necessary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>", eos_token="</s>",
        name_or_path=_NO_TOKENIZER, add_bos_token=True,
    )  # fmt: skip


def _model_of_bridge(bridge: object) -> Any:
    """A transformers model on the tensors of a bridge."""
    original = getattr(bridge, "original_model", None)
    if original is None:
        raise NotAModel(
            f"{type(bridge).__name__} is not a TransformerBridge of a transformers model; pass one, or the model itself"
        )
    tensors = {name.replace(_WRAPPER, ""): tensor for name, tensor in _parameters_and_buffers(original)}
    with torch.device("meta"):
        model = type(original)(copy.deepcopy(original.config))
    own = _parameters_and_buffers(model)
    absent = sorted({name for name, _ in own} - set(tensors))
    if absent:
        raise NotAModel(
            f"the bridge holds no tensor for {absent[:3]} ({len(absent)} in all); pass the transformers model it was made from"
        )
    for name, t in own:
        path, _, leaf = name.rpartition(".")
        module, kind = model.get_submodule(path), "_parameters" if isinstance(t, torch.nn.Parameter) else "_buffers"
        getattr(module, kind)[leaf] = tensors[name]
    model.tie_weights()
    return model.eval()


def _parameters_and_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


@contextmanager
def _installed(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ArgumentError(f"{package} is not installed ({error}); pip install {package.replace('_', '-')}") from error
