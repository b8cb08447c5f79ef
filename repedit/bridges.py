"""From the objects people already hold to a Subject, and back to the tools they already use, on the same parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from repedit.edit import Edit
from repedit.errors import ArgumentError, NotAModel, UnknownArchitecture, UnknownSite
from repedit.hooks import evaluating
from repedit.linear_maps import AffineMap
from repedit.models.subject import Subject, subject_of
from repedit.rewrite.apply import shared_clone, synchronize
from repedit.sites import Point

LensHook = Callable[..., Tensor]
_WRAPPED = "._original_component"
_NONE = "no tokenizer"
_CLOSE = 1e-3
"""Largest difference of logits, relative to the largest: float32 families differ by 5e-6, bfloat16 rounds."""


def wrap(thing: Any, tokenizer: Any | None = None) -> Subject:
    """A Subject around a transformers model, a TransformerLens `TransformerBridge` or an nnsight `TransformersModel`.

    Nothing is changed and no weight is copied; a Subject is returned as it is, and of what `torch.compile` returned the
    model in it is taken.

    Args:
        tokenizer: in place of the one that a bridge or an nnsight model carries, of which a copy is taken.
    Raises:
        NotAModel: if the object is something else, or a bridge whose tensors are not those of a transformers model.
        UnknownArchitecture: if no row of the family table fits the model.
    """
    if isinstance(thing, Subject):
        return thing
    thing = getattr(thing, "_orig_mod", thing)  # what torch.compile returns has the model in it
    package = type(thing).__module__.partition(".")[0]
    if package in ("transformer_lens", "nnsight"):
        model = _unbridged(thing) if package == "transformer_lens" else getattr(thing, "_module", thing)
        own = getattr(thing, "tokenizer", None)
        own = None if own is None or own.name_or_path == _NONE else copy.deepcopy(own)
        return subject_of(model, own if tokenizer is None else tokenizer)
    return subject_of(thing, tokenizer)


def to_lens(subject: Subject) -> Any:
    """The model as a TransformerLens `TransformerBridge` on the same parameters: edits in place are seen there.

    The model keeps its modules, its attention implementation and its tokenizer; always pass token ids, as the bridge's own
    `to_tokens` may prepend a token. Mixtures of experts are copied, because bridging them writes into their weights: an edit
    made afterwards is not seen there, as a warning says.

    Raises:
        ArgumentError: if transformer_lens is not installed.
        UnknownArchitecture: if the bridge computes other logits than the model.
    """
    with _present("transformer_lens"):
        from transformer_lens.model_bridge import TransformerBridge
    model = _clone(subject.model, shared=not subject.architecture.n_experts)
    if subject.architecture.n_experts:
        warnings.warn(
            f"{subject.architecture.model_type} has experts: the bridge holds a copy of the weights, and edits of the model "
            "made from here on are not seen there",
            stacklevel=2,
        )
    model.config = copy.deepcopy(subject.model.config)
    model.config.architectures = [type(model).__name__]
    bridge = TransformerBridge.boot_transformers(
        subject.architecture.model_type, hf_model=model, tokenizer=_stand_in(),
        device=str(subject.device), dtype=subject.model.dtype,
    )  # fmt: skip
    bridge.tokenizer = copy.deepcopy(subject.tokenizer)
    if not subject.architecture.n_experts:
        synchronize(bridge.original_model, subject.model, _WRAPPED)
    _check_same(bridge, subject)
    return bridge


def to_nnsight(subject: Subject) -> Any:
    """The very model inside an nnsight `TransformersModel`, with a copy of its tokenizer, which nnsight changes.

    Raises:
        ArgumentError: if nnsight is not installed.
    """
    with _present("nnsight"):
        from nnsight import TransformersModel
    return TransformersModel(
        subject.model, tokenizer=_stand_in() if subject.tokenizer is None else copy.deepcopy(subject.tokenizer)
    )


def lens_hooks(edit: Edit, subject: Subject) -> list[tuple[str, LensHook]]:
    """The edit for `bridge.run_with_hooks(ids, fwd_hooks=...)`: pairs of a TransformerLens name and a function.

    Raises:
        UnknownSite: at the neurons of experts, where TransformerLens has the output of the block, or where the model has no
            such site.
        ShapeError: if a map's width is not the site's.
    """
    edit.hooks(subject)  # the same refusals as everywhere
    found = []
    for site, map_ in edit.maps.items():
        if site.point is Point.RESID_MID:
            raise UnknownSite(
                f"{site}: what is changed at {site.hook_name} reaches the MLP and not the stream behind it; edit "
                f"{site.layer}.attn.out there, or use edit.hooked(subject)"
            )
        if subject.layout.routed(site):
            raise UnknownSite(
                f"{site}: TransformerLens has no neurons of experts, {site.hook_name} is what the block gives out; use "
                f"{site.layer}.mlp.out there, or edit.hooked(subject)"
            )
        found.append((site.hook_name, _on_value(map_)))
    return found


def _on_value(map_: AffineMap) -> LensHook:
    def hook(value: Tensor, hook: Any = None) -> Tensor:
        # hook_z keeps heads apart: (b, t, h, e) for our (b, t, h e).
        return map_(value.flatten(2)).reshape(value.shape)

    return hook


def _check_same(bridge: Any, subject: Subject) -> None:
    ids = torch.arange(3, 11, device=subject.device)[None]
    with torch.no_grad(), evaluating(subject.model), evaluating(bridge):
        expected, found = subject.model(ids).logits, bridge(ids)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= _CLOSE:
        raise UnknownArchitecture(
            f"the TransformerLens bridge of {subject.architecture.model_type} gives other logits than the model (relative error "
            f"{error:.1e}): what is seen there is not this model; use edit.hooked(subject) or to_nnsight"
        )


def _clone(model: Any, *, shared: bool) -> Any:
    """A copy of the modules; of the parameters and buffers too, unless they are shared."""
    return shared_clone(model) if shared else copy.deepcopy(model)


def _stand_in() -> Any:
    """A tokenizer of two words; any other the bridge would read again by its name, from the hub where it must."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="</s>",
        name_or_path=_NONE,
        add_bos_token=True,
    )


def _unbridged(bridge: Any) -> Any:
    """A plain transformers model on the tensors of a bridge."""
    held = getattr(bridge, "original_model", None)
    if held is None:
        raise NotAModel(
            f"{type(bridge).__name__} is no TransformerBridge of a transformers model; pass one, or the model itself"
        )
    tensors = {
        name.replace(_WRAPPED, ""): t
        for name, t in [*held.named_parameters(remove_duplicate=False), *held.named_buffers(remove_duplicate=False)]
    }
    with torch.device("meta"):
        model = type(held)(copy.deepcopy(held.config))
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
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


@contextmanager
def _present(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ArgumentError(f"{package} is not installed ({error}); pip install {package.replace('_', '-')}") from error
