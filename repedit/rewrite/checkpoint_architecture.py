"""Checkpoints on disk: their family, the tensors their model reads, and whether a planned checkpoint is the planned model."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from repedit.arch import Architecture, Specs, TensorSpec, families, match_layout, resolve, resolved
from repedit.arch.infer import output_embeddings
from repedit.arch.storage import StoredSpecs
from repedit.errors import CheckpointError, NotFound, PlanMismatch
from repedit.io.archive import kind_of
from repedit.io.checkpoint import Shards
from repedit.io.files import is_file, is_folder, user_path
from repedit.models.default_model import DEFAULT, cached
from repedit.models.dequantization import check_unquantized, quantization_of, quantizer_name
from repedit.models.loading import (
    TensorMatch,
    buildable,
    check_layer_count,
    check_no_later_layers,
    empty_model,
    match_tensors,
    mlp_tensors,
    ragged_widths,
    read_config,
    typed_errors,
)
from repedit.models.modifications import attention_of, computes_as, other_modules
from repedit.models.subject import Subject, load
from repedit.plan import Plan
from repedit.rewrite.apply import patched_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PLACES = ("_name_or_path", "name_or_path")


def checkpoint_directory(source: str | Path) -> Path:
    """The absolute path of a checkpoint directory, or of the built-in model by its name.

    Raises:
        NotFound: if there is no such directory.
    """
    path = user_path(source)
    if is_folder(path):
        return path.absolute()
    if str(source) == DEFAULT:
        return cached()
    kind = kind_of(path) if is_file(path) else None
    if kind in ("edit", "delta"):
        raise NotFound(
            f"{path.absolute()} is a saved {kind} and no model; make a directory with it first: repedit apply {path} MODEL --out DIRECTORY"
        )
    raise NotFound(
        f"{path.absolute()} is not a directory; save a model of the hub or of a GGUF file as one first: "
        f"repedit.load({str(source)!r}).save(directory)"
    )


def architecture_of(directory: Path, row: Architecture | None = None) -> Architecture:
    """The family row of a checkpoint directory.

    Args:
        row: as in `used_specs`.
    Raises:
        QuantizedModel, UnknownArchitecture: if it cannot be edited.
    """
    return _described(directory, row)[1]


class Matches:
    """`match_tensors` whose results are kept: an export asks the same of its source, of its plan and of what it wrote."""

    def __init__(self) -> None:
        self._results: list[tuple[object, TensorMatch]] = []

    def __call__(self, config: PretrainedConfig, architecture: Architecture, specs: Specs) -> TensorMatch:
        """The result for equal arguments, or a new one; the names of places in the config do not count."""
        fields = {key: value for key, value in config.to_dict().items() if key not in _PLACES}
        asked = (type(config), fields, architecture, list(specs.items()))
        for earlier, result in self._results:
            if earlier == asked:
                return result
        result = match_tensors(config, architecture, specs)
        self._results.append((asked, result))
        return result


def used_specs(shards: Shards, row: Architecture | None = None, matches: Matches | None = None) -> StoredSpecs:
    """The tensors that the model of a checkpoint's config reads, and where the files hold them.

    Args:
        row: of the model, if it is known; a family that the table lacks is inferred otherwise, which reads the weights.
        matches: what was found before.
    Raises:
        QuantizedModel, UnknownArchitecture: if it cannot be edited.
        CheckpointError: if the files hold layers that the config does not describe, or lack tensors that it does.
    """
    config, architecture = _described(shards.directory, row)
    with buildable(shards.directory):
        check_layer_count(shards.directory, config, len(shards.entries))
        match = (matches or Matches())(config, architecture, shards.specs)
    check_no_later_layers(shards.directory, match.later_layers, architecture)
    check_unquantized(None, match.used.files, "edited exactly", where=str(shards.directory))
    if match.missing:
        raise CheckpointError(
            f"{shards.directory} lacks {match.missing[0]} ({len(match.missing)} tensors in all), which its config.json describes and "
            f"none of its {len(shards.files)} files of weights holds; download the checkpoint again, or save the model again"
        )
    return match.used


def check_planned(
    plan: Plan, shards: Shards, used: StoredSpecs, row: Architecture, matches: Matches | None = None
) -> None:
    """Refuse a plan whose checkpoint transformers would read as another model.

    Raises:
        CheckpointError: naming tensors that the plan needs and the files hold, but the model of the config does not read.
        PlanMismatch: naming tensors that the planned config does not describe, or that would be missing or of another shape.
    """
    config, architecture = _described(shards.directory, row)
    planned = {name: plan.spec(name, spec) for name, spec in used.files.items()} | dict(plan.added)
    planned |= {head: planned[embedding] for head, embedding in plan.unties.items() if head not in planned}
    unused = {name: spec for name, spec in shards.specs.items() if name not in used.files}
    # In the order of the files, which numbers the experts.
    specs = {name: planned.get(name, spec) for name, spec in shards.specs.items()} | planned
    with buildable(shards.directory):
        config = patched_config(config, plan)
        match = (matches or Matches())(config, architecture, specs)
    revived = sorted(set(unused) & set(match.used.files))
    if revived:
        raise CheckpointError(
            f"the edit needs {revived[0]} ({len(revived)} tensors in all), which {shards.directory} holds although its config "
            "says that there is none: transformers ignores those values, and the edit would bring them back. Correct config.json, "
            "or save the model again without them: rp.load(...).model.save_pretrained(...)"
        )
    extra, reshaped = sorted(set(planned) - set(match.used.files)), match.reshaped
    row = resolved(architecture, config)
    if reshaped and ragged_widths(match_layout(row, match.used)):
        reshaped = tuple(sorted(set(reshaped) - mlp_tensors(match_layout(row, _shapes(empty_model(config))))))
    if extra or match.missing or reshaped:
        raise PlanMismatch(
            f"the planned config builds another model than the planned tensors: not described {extra[:3]}, absent "
            f"{list(match.missing[:3])}, of another shape {list(reshaped[:3])}; give the edit itself in place of a plan"
        )


def check_described(subject: Subject) -> None:
    """Refuse a model in memory that its own config does not describe: transformers would read its files as another model.

    Raises:
        CheckpointError: naming the tensors that differ from what the config builds, or modules of other classes that compute
            something else.
    """
    built = _shapes(_built(subject.model))
    own, layout = _shapes(subject.model), subject.layout
    ragged = mlp_tensors(layout) if ragged_widths(layout) else frozenset()
    extra, absent = sorted(set(own) - set(built)), sorted(set(built) - set(own))
    reshaped = sorted(n for n in set(own) & set(built) if own[n].shape != built[n].shape and n not in ragged)
    if extra or absent or reshaped:
        flags = sorted({slot.flag for slot in subject.architecture.bias_flags.values()})
        raise CheckpointError(
            f"the model in memory is not the one that its config describes, so its files would load as another: the config lacks "
            f"{extra[:3]} ({len(extra)} in all), the model lacks {absent[:3]} ({len(absent)} in all), of another shape are "
            f"{reshaped[:3]} ({len(reshaped)} in all). Fold or remove them, or set the config"
            + (f" ({', '.join(flags)} add biases to every layer)" if flags else "")
        )
    _check_tie(subject.model)
    others = other_modules(subject.model)
    if others and not computes_as(subject.model, _built(subject.model)):
        raise CheckpointError(
            f"the model in memory computes something else than its files would: {others[-1] or 'the model'} "
            f"({type(subject.model.get_submodule(others[-1])).__name__}, {len(others)} modules in all) is not what transformers builds "
            "for the config. Put the modules of transformers back"
        )


def check_computed(subject: Subject) -> None:
    """Refuse a model in memory whose files would compute something else than it does, on a few tokens.

    Hooks, replaced methods, buffers that files do not hold, and settings that were changed in a module or in the config
    after the model was built are neither weights nor modules.

    Raises:
        CheckpointError: with what may be the reason.
    """
    devices = {parameter.device for parameter in subject.model.parameters()}
    if len(devices) == 1 and not computes_as(subject.model, _built(subject.model)):
        raise CheckpointError(
            "the model in memory computes something else than its files would: with its tensors, the model that transformers builds "
            "for its config gives other logits. Was a hook added, a method replaced, or a buffer, a setting of a module or the "
            "config changed after the model was built? Undo that, or load the model again"
        )


def _check_tie(model: Any) -> None:
    """Refuse an output head that shares its tensor with the embeddings although the config says that it has one of its own."""
    head, embeddings = output_embeddings(model), model.get_input_embeddings()
    configs = (model.config, model.config.get_text_config(decoder=True))
    if head.weight is embeddings.weight and not any(config.tie_word_embeddings for config in configs):
        raise CheckpointError(
            "the output head and the embeddings are one tensor, which files hold once, and the config says that they are two: "
            "transformers would load a head of random numbers. Set model.config.tie_word_embeddings = True, or give the head a "
            "tensor of its own"
        )


def _built(model: Any) -> Any:
    """The model that transformers builds for a config, without weights, with the attention of the model if it can be had."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # as its files will say
    with suppress(ValueError, ImportError):  # of a part that has this attention in a model that has not
        return empty_model(config, buffers=True, attention=attention_of(model) or "eager")
    with buildable("the model in memory"):
        return empty_model(config, buffers=True)


def _shapes(model: nn.Module) -> dict[str, TensorSpec]:
    """Shape and dtype of every parameter and buffer of a model by name."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}


def _described(directory: Path, row: Architecture | None = None) -> tuple[Any, Architecture]:
    """The config and the family row of a directory.

    Raises:
        QuantizedModel, UnknownArchitecture: if it cannot be edited.
    """
    with typed_errors(directory):
        config = read_config(directory, trust_remote_code=False)
    check_unquantized(quantizer_name(quantization_of(config)), {}, "edited exactly", where=str(directory))
    with buildable(directory):
        if config.model_type in families():
            return config, resolve(config)
        if row is not None:
            return config, replace(resolved(row, config), tied=row.tied)
    return config, _inferred(directory, config.to_json_string(use_diff=False))


@lru_cache(maxsize=8)
def _inferred(directory: Path, _config: str) -> Architecture:
    """The row of a family that the table lacks: the model is read once, to infer the row and prove it."""
    return load(directory).architecture
