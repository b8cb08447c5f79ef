"""Load a causal language model, or wrap one, as a Subject.

A path is tried first, then the built-in name, then a hub id. No code of a checkpoint is run and no pickle is opened.
"""

from __future__ import annotations

import copy
import logging
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from repedit.arch import Architecture, ModelLayout, TensorSpec, families, match_layout
from repedit.arch.check import check_modules, check_unshared, prove
from repedit.arch.infer import output_embeddings, row_of
from repedit.arch.offload import check_in_memory, execution_device, values
from repedit.arguments import checked
from repedit.errors import (
    ArgumentError,
    CheckpointError,
    NotAModel,
    NotFinite,
    OffloadedTensors,
    QuantizedModel,
    UnknownArchitecture,
)
from repedit.hashing import fingerprint, state, value_hash
from repedit.hooks import claimed
from repedit.io.checkpoint import FileStates, check_unchanged, file_states
from repedit.io.files import user_path
from repedit.io.safetensors import floating_dtype
from repedit.linear_maps import not_finite_at
from repedit.models.default_model import DEFAULT
from repedit.models.dequantization import check_unquantized, plain_copy, quantization_of, quantizer_name
from repedit.models.loading import (
    check_config,
    check_finite_weights,
    device_named,
    file_of,
    locate,
    quiet_if_ragged,
    read_quantized,
    read_tokenizer,
    read_weights,
    snapshot,
    typed_errors,
)
from repedit.models.modifications import check_no_adapter, check_plain_weights, check_unmodified, other_modules
from repedit.sites import Point, Site, select

log = logging.getLogger("repedit")
_loaded_state: weakref.WeakKeyDictionary[nn.Module, tuple[Any, FileStates]] = weakref.WeakKeyDictionary()
"""The state of the weights and of the files when a model was read."""
CHANGED_FILES = (
    "since the model was loaded",
    "load the model again to use the new files, or use the weights in memory: repedit.wrap(model.model, model.tokenizer)",
)
"""What an error says of files that changed: since when, and what to do."""


@dataclass(frozen=True)
class Origin:
    """Where a model came from."""

    path: Path
    """A directory (for a hub id, its snapshot in the cache), or a GGUF file."""
    hub_id: str | None = None
    quantizer: str | None = None
    """What the files are quantised with; None if they are plain."""
    dequantized: bool = False
    """Whether the quantised weights were made ordinary tensors, as `load(dequantize=True)` does."""

    @property
    def place(self) -> str:
        """What `load` takes to load the model again: the hub id, or the path."""
        return str(self.path) if self.hub_id is None else self.hub_id

    @property
    def name(self) -> str:
        """The hub id, or the name of the directory or file."""
        if self.hub_id is not None:
            return self.hub_id
        repository = self.path.parent.parent.name if self.path.parent.name == "snapshots" else ""
        if repository.startswith("models--"):
            return "/".join(repository.split("--")[1:])
        name = self.path.stem if self.path.suffix == ".gguf" else self.path.absolute().name
        return os.fsencode(name).decode(errors="replace")


@dataclass(frozen=True, eq=False)
@checked
class Subject:
    """A model under study: the transformers model itself, its tokenizer and its row of the family table."""

    model: Any
    tokenizer: Any | None
    architecture: Architecture
    source: Path | None = None
    """Directory the weights were read from; None for a model in memory or an edited model."""
    origin: Origin | None = None
    """Where the model came from before any edit; an export copies its licence, card and tokenizer files."""

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        size = f"{len(self.layout.layers)} layers, width {self.layout.width}, {count:,} parameters"
        return f"Subject({self.architecture.model_type}, {size}, {'in memory' if self.source is None else f'from {self.source.name}'})"

    @cached_property
    def layout(self) -> ModelLayout:
        """The architecture matched against this model's tensors."""
        return match_layout(self.architecture, self.specs)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every parameter, tied ones under each of their names."""
        return {
            name: TensorSpec(tuple(p.shape), p.dtype) for name, p in self.model.named_parameters(remove_duplicate=False)
        }

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embedding."""
        embedding = self.model.get_input_embeddings()
        device: torch.device = embedding.weight.device
        return device if device.type != "meta" else execution_device(embedding)

    @checked
    def value(self, name: str) -> torch.Tensor:
        """The values of a parameter, also where Accelerate has offloaded them to memory or disk.

        Raises:
            OffloadedTensors: if it has no values anywhere.
        """
        path, _, leaf = name.rpartition(".")
        value = values(self.model.get_submodule(path), leaf).detach()
        if value.device.type == "meta":
            raise OffloadedTensors(
                f"{name} has a shape and no values: the model is on the meta device; load its weights"
            )
        return value

    @checked
    def device_at(self, layer: int) -> torch.device:
        """Where a layer computes; layers may lie on several devices."""
        return execution_device(self.model.get_submodule(self.layout.block_paths[layer]))

    @property
    def quantizer(self) -> str | None:
        """Name of the quantiser of the weights; None for ordinary tensors, and for those that `dequantize=True` made ordinary."""
        named = quantizer_name(quantization_of(self.model.config))
        if named is not None or self.origin is None or self.origin.dequantized:
            return named
        return self.origin.quantizer  # transformers dequantises on its own where it has no kernel

    @checked
    def check_unquantized(self, operation: str) -> None:
        """Refuse quantised weights.

        Args:
            operation: what is refused, such as "edited exactly".
        Raises:
            QuantizedModel: with how to make a plain copy, or that there is no way.
        """
        check_unquantized(self.quantizer, self.specs, operation, where="" if self.origin is None else self.origin.place)

    @checked
    def select(self, selector: str | Site | list[str | Site]) -> tuple[Site, ...]:
        """The sites of this model that a selector names, such as "4-9.mlp.out" or "*.mlp.neurons"."""
        return select(selector, len(self.layout.layers), self.layout.points)

    def sites(self) -> list[dict[str, Any]]:
        """One row per site: names in repedit, TransformerLens and transformers, tensor, width and bias."""
        return [self._row(Site(i, p)) for i in range(len(self.layout.layers)) for p in self.layout.points_at(i)]

    def fingerprint(self) -> str:
        """sha256 over the name, dtype, shape and bytes of every parameter, and the config without volatile keys."""
        return fingerprint(self.model)

    @overload
    def generate(self, prompts: str, *, max_new_tokens: int = 256, chat: bool = False) -> str: ...

    @overload
    def generate(
        self, prompts: list[str] | tuple[str, ...], *, max_new_tokens: int = 256, chat: bool = False
    ) -> tuple[str, ...]: ...

    @checked
    def generate(
        self, prompts: str | Sequence[str], *, max_new_tokens: int = 256, chat: bool = False
    ) -> str | tuple[str, ...]:
        """The greedy continuation of a prompt, without the prompt; for a list of prompts, a tuple of continuations.

        Args:
            chat: put each prompt in the tokenizer's chat template, as a message of the user.
        Raises:
            ArgumentError, DataError, NotFinite: as `repedit.metrics.generation.generate`, which this calls.
        """
        import repedit

        texts = [prompts] if isinstance(prompts, str) else prompts
        written = repedit.metrics.generation.generate(self, texts, max_new_tokens=max_new_tokens, chat=chat)
        return written[0] if isinstance(prompts, str) else written

    @checked
    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Subject:
        """Move the model to a device, or cast it to a dtype, in place as `torch.nn.Module.to` does; returns this subject.

        A model that is only moved still belongs to the files it was read from; one that is cast is exported as it is in memory.

        Raises:
            ArgumentError: if there is no such device or dtype.
            QuantizedModel, OffloadedTensors: if the weights are not ordinary tensors in memory.
            NotFinite: if the dtype cannot represent a weight; the model is unchanged then.
        """
        self.check_unquantized("moved or cast")
        check_in_memory(self.model, "load the model again with another device_map")
        new_device = None if device is None else device_named(str(device))
        new_dtype = None if dtype is None else floating_dtype(dtype)
        for name, parameter in self.model.named_parameters() if new_dtype else ():
            index = not_finite_at(parameter.detach().to(new_dtype))
            if index is not None:
                raise NotFinite(f"{new_dtype} cannot represent weight {name!r} at {index}; choose a wider dtype")
        weights, files = _loaded_state.get(self.model, (None, {}))
        linked = weights is not None and weights == state(self.model) and new_dtype in (None, self.model.dtype)
        with claimed(self.model):
            self.model.to(device=new_device, dtype=new_dtype)
        if linked:
            _loaded_state[self.model] = (state(self.model), files)
        else:
            _loaded_state.pop(self.model, None)
        return self

    @checked
    def save(self, target: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model and its tokenizer to a directory that AutoModelForCausalLM loads; returns the directory.

        It is an export without an edit (`repedit.export`), with the same manifest and the same guarantees: weights that are
        unchanged since they were loaded are streamed from their files.

        Raises:
            TargetExists: if the target exists, unless `overwrite=True` and it is an earlier export.
            CheckpointError, NotFinite, QuantizedModel: as `repedit.export`.
        """
        import repedit

        repedit.export(repedit.Edit({}), self, target, overwrite=overwrite, allow_identity=True)
        return user_path(target)

    @checked
    def made_for(self, sites: Iterable[Site]) -> dict[str, Any]:
        """What an edit records about the model it was made for: {"model": fingerprint, "weights": {tensor: hash}}.

        The tensors are those that write at the sites; for a residual stream those of the layer's MLP, or the token embedding
        before layer 0. A hash is the same for all dtypes that hold the values.
        """
        names = dict.fromkeys(name for site in sites for name in self._writers(site))
        return {"model": self.fingerprint(), "weights": {name: value_hash(self.value(name)) for name in names}}

    def _writers(self, site: Site) -> list[str]:
        if site.point is Point.RESID_PRE and site.layer == 0:
            return [self.layout.embeddings[0]]
        residual = site.point in (Point.RESID_PRE, Point.RESID_MID, Point.RESID_POST)
        branch = self.layout.layers[site.layer][-1] if residual else self.layout.branch(site.layer, site.point)
        return list(dict.fromkeys(part.out.tensor for part in branch.parts))

    @property
    def files(self) -> Path | None:
        """`source` while its files hold these weights, in their dtype; None once a weight or a file has changed."""
        try:
            return self.unchanged_files()
        except CheckpointError:
            return None

    def unchanged_files(self) -> Path | None:
        """`source` while the weights in memory are those that were read from its files; None once one has changed.

        Whether `touched_files` hold other values is not looked at.

        Raises:
            CheckpointError: if the weights are unchanged and the files are not.
        """
        weights, files = _loaded_state.get(self.model, (None, {}))
        if self.source is None or weights != state(self.model):
            return None
        check_unchanged(self.source, files, *CHANGED_FILES, touched=self.touched_files())
        return self.source

    def touched_files(self) -> frozenset[str]:
        """Files of weights of which nothing but the time of change differs since the model was loaded.

        Their permissions or links changed, or they were written and their time of modification was set back.
        """
        _, files = _loaded_state.get(self.model, (None, {}))
        now = file_states(self.source) if self.source is not None and self.source.is_dir() else {}
        same = {name: (files[name], now[name]) for name in files if name in now and name.endswith(".safetensors")}
        return frozenset(name for name, (old, new) in same.items() if old != new and old[:-1] == new[:-1])

    def need_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ArgumentError: if the model was wrapped without one.
        """
        if self.tokenizer is None:
            raise ArgumentError(
                "this needs a tokenizer and the model was wrapped without one; use repedit.wrap(model, tokenizer), or save "
                "the tokenizer beside the checkpoint: tokenizer.save_pretrained(directory)"
            )
        return self.tokenizer

    def _row(self, site: Site) -> dict[str, Any]:
        layout, point = self.layout, site.point
        residual = point in (Point.RESID_PRE, Point.RESID_MID, Point.RESID_POST)
        branch = None if residual else layout.branch(site.layer, point)
        return {
            "site": str(site), "hook": site.hook_name,
            "module": branch.writer if branch else layout.block_paths[site.layer],
            "width": layout.width_of(site.layer, point), "tensor": branch.parts[0].out.tensor if branch else "",
            "bias": bool(branch and any(part.bias for part in branch.parts)),
            "experts": sum(part.expert is not None for part in branch.parts) if branch else 0,
        }  # fmt: skip


@checked
def load(
    name: str | Path = DEFAULT,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: str | Mapping[str, int | str | torch.device] | None = None,
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
) -> Subject:
    """Load a causal language model from a directory, a GGUF file, the built-in name or a hub id.

    Args:
        dtype: "auto" keeps the dtype of the checkpoint (float16 on a CPU becomes float32); or "float32", "bfloat16", ...
        device: "auto" is cuda if there is one, else cpu.
        attention: attention implementation of transformers, such as "eager"; None keeps its default.
        trust_remote_code: run code from a hub repository.
        dequantize: turn quantised weights into ordinary tensors of `dtype`, which can be edited; an export is then plain and
            says so. A model that is not quantised is loaded as always.
    Raises:
        QuantizedModel: if dequantize=True and transformers cannot dequantise the format.
        NotFound: if nothing of that name exists, or it has not been fetched yet.
        CheckpointError: if files are missing, corrupt, pickled or outside the directory, or lack a weight.
        UnknownArchitecture: if no row of the family table fits; no weight is read then.
        NotFinite: if a weight is NaN or infinite.
        ArgumentError: if there is no such dtype or device.
    """
    target, load_dtype = device_named(device), dtype if dtype == "auto" else floating_dtype(dtype)
    location, options = locate(name, trust_remote_code)
    options |= {"revision": revision} if revision and not isinstance(location, Path) else {}
    extra: dict[str, Any] = {"device_map": device_map} if device_map is not None else {}
    extra |= {"attn_implementation": attention} if attention else {}
    with typed_errors(file_of(location, options), options=bool(extra)), quiet_if_ragged(location):
        quantizer = None if "gguf_file" in options else check_config(location, options)
        files = file_states(location) if isinstance(location, Path) and "gguf_file" not in options else None
        extra |= {"dtype": load_dtype, **options}
        model = (
            read_weights(location, **extra)
            if quantizer is None
            else read_quantized(location, dequantize=dequantize, **extra)
        )
    _log_quantization(name, quantizer, model, dequantize)
    if dtype == "auto" and target == "cpu" and model.dtype == torch.float16:
        log.info("float16 is slow and inexact on a CPU: loaded in float32; pass dtype='float16' to keep it")
        model = model.float()
    if device_map is None:
        model = model.to(target)
    model = model.eval()
    options.pop("quantization_config", None)
    tokenizer = read_tokenizer(location, options)
    source, origin = None, None
    if isinstance(location, Path) and files is not None:
        check_unchanged(location, files, "while the model was read", "load it again when nothing is writing there")
        source, origin = location, Origin(location)
    elif isinstance(location, Path):
        origin = Origin(Path(file_of(location, options)))
    else:
        source = snapshot(location, getattr(model.config, "_commit_hash", None) or revision)
        origin = Origin(Path(location) if source is None else source, location)
        if quantizer is not None and source is not None:
            check_config(source, options)  # its files are here only now
    if quantizer is not None:
        origin = replace(origin, quantizer=quantizer, dequantized=dequantize)
        source, files = (None, None) if dequantize else (source, files)
    subject = subject_of(model, tokenizer, source=source, files=files, origin=origin)
    check_finite_weights(model, dtype)
    return subject


def _log_quantization(name: str | Path, quantizer: str | None, model: Any, dequantize: bool) -> None:
    """Log what `dequantize` did where a user might expect something else."""
    if dequantize and quantizer is None:
        log.info(
            "dequantize=True changes nothing: %s is not quantised, or a GGUF file, which is always dequantised", name
        )
    elif not dequantize and quantizer is not None and quantization_of(model.config) is None:
        log.info(
            "transformers dequantised the %s weights of %s, for which it has no kernel here; to edit them, pass dequantize=True",
            quantizer, name,
        )  # fmt: skip


def subject_of(
    model: object,
    tokenizer: object | None = None,
    *,
    source: Path | None = None,
    files: FileStates | None = None,
    origin: Origin | None = None,
) -> Subject:
    """A Subject around a transformers model in memory; the model is not changed.

    Args:
        source: directory that the weights were just read from.
        files: state of its files before they were read; None for their state now.
        origin: where the model came from; None for `source`.
    Raises:
        NotAModel: if the object is not a transformers causal model, or an adapter or a parametrization hides its weights.
        UnknownArchitecture: if no row of the family table fits, or the weights contradict the row.
        QuantizedModel: if the weights are quantised and have other names or shapes than ordinary ones.
    """
    from transformers import PreTrainedModel

    check_no_adapter(model)
    if not isinstance(model, PreTrainedModel):
        raise NotAModel(
            f"{type(model).__name__} is not a transformers model; pass an AutoModelForCausalLM model or a path to repedit.load"
        )
    if model.config.is_encoder_decoder or output_embeddings(model) is None:
        raise UnknownArchitecture(
            f"{type(model).__name__} is not a decoder-only causal language model; load it with AutoModelForCausalLM"
        )
    for name in ("return_dict", "output_hidden_states", "output_attentions"):
        value = getattr(model.config, name)
        if type(value) is not bool or (name == "return_dict" and not value):
            raise UnknownArchitecture(
                f"the config has {name}={value!r}, with which the model does not return what repedit reads; set "
                f"model.config.{name} = {name == 'return_dict'}, or correct config.json"
            )
    compiled = [name for name, module in model.named_modules() if hasattr(module, "_orig_mod")]
    if compiled:
        raise UnknownArchitecture(
            f"{compiled[0]} was returned by torch.compile(module), which renames the parameters in it; compile with "
            "module.compile(), or wrap the model before compiling it"
        )
    origin = Origin(source) if origin is None and source is not None else origin
    subject = Subject(model, tokenizer, row_of(model), source, origin)
    try:
        check_modules(model, subject.layout)
    except UnknownArchitecture as error:
        if subject.quantizer is not None:
            remedy = plain_copy(subject.quantizer, "" if origin is None else origin.place)
            raise QuantizedModel(
                f"{error}: the weights are quantised ({subject.quantizer}) in a format that repedit does not read; {remedy}"
            ) from error
        check_plain_weights(model)
        raise
    check_unshared(model, subject.layout)
    check_unmodified(model)
    if model.config.model_type in families() and subject.quantizer is None:
        _prove_other_modules(subject)
    if source is not None:
        _loaded_state[model] = (state(model), file_states(source) if files is None else files)
    return subject


_proved: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models whose modules are not all those of their config, and whose row was proved on them."""


def _prove_other_modules(subject: Subject) -> None:
    """Prove the row of a model of which some modules are not those that transformers builds for its config.

    The model type in a config says nothing about what such modules compute.
    """
    others = other_modules(subject.model)
    if others and subject.model not in _proved:
        log.info(
            "%d modules are not those that transformers builds for the config, such as %s: the row is proved on the model",
            len(others), others[-1] or type(subject.model).__name__,
        )  # fmt: skip
        prove(subject.model, subject.architecture)
        _proved.add(subject.model)


_Module = TypeVar("_Module", bound=nn.Module)


def shared_clone(model: _Module, new: Mapping[int, torch.Tensor] = {}) -> _Module:
    """A copy of a model's modules and config that shares every tensor, but those for whose `id` another is given."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, memo={id(t): new.get(id(t), t) for t in tensors})
