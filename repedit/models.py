"""Load a causal language model, or wrap one, as a Subject.

A path is tried first, then the built-in name, then a hub id. No code of a checkpoint runs and no pickle is opened.
"""

from __future__ import annotations

import logging
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repedit.arch import Anatomy, Architecture, TensorSpec, anatomy, resolve
from repedit.arch.modules import check_modules
from repedit.errors import (
    ArgumentError,
    CheckpointError,
    NotAModel,
    NotFinite,
    NotFound,
    RepeditError,
    UnknownArchitecture,
    nearest,
)
from repedit.fetching import DEFAULT, cached
from repedit.fingerprints import fingerprint, state
from repedit.ragged import quiet, refit
from repedit.shards import floating, open_shards
from repedit.sites import Point, Site, select

log = logging.getLogger("repedit")
_TOKENIZERS = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges", "tekken")
_as_read: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under study: the transformers model itself, its tokenizer and its row of the family table."""

    model: Any
    tokenizer: Any | None
    architecture: Architecture
    source: Path | None = None
    """Directory the weights were read from; None for an in-memory or edited model."""

    @cached_property
    def anatomy(self) -> Anatomy:
        """The architecture matched against this model's tensors."""
        return anatomy(self.architecture, self.specs)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every parameter, tied ones under each of their names."""
        return {
            name: TensorSpec(tuple(p.shape), p.dtype) for name, p in self.model.named_parameters(remove_duplicate=False)
        }

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embedding."""
        return self.model.get_input_embeddings().weight.device

    @property
    def quantizer(self) -> str | None:
        """Name of the quantiser of the weights, or None where they are plain tensors."""
        config = getattr(self.model.config, "quantization_config", None)
        if config is None:
            return None
        found = config.get("quant_method") if isinstance(config, dict) else config.quant_method
        return str(getattr(found, "value", found))

    def select(self, selector: str | Site | list[str | Site]) -> tuple[Site, ...]:
        """The sites of this model that a selector names, such as "4-9.mlp.out" or "*.mlp.neurons"."""
        return select(selector, len(self.anatomy.layers), self.architecture.points)

    def sites(self) -> list[dict[str, Any]]:
        """One row a site: names in repedit, TransformerLens and transformers, tensor, width and bias."""
        return [self._row(Site(i, p)) for i in range(len(self.anatomy.layers)) for p in self.architecture.points]

    def fingerprint(self) -> str:
        """sha256 over the name, dtype, shape and bytes of every parameter, and the config without volatile keys."""
        return fingerprint(self.model)

    @property
    def files(self) -> Path | None:
        """`source` while its files hold exactly these weights; None once a weight was changed in memory."""
        return self.source if self.source and _as_read.get(self.model) == state(self.model) else None

    def need_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ArgumentError: if the model was wrapped without one.
        """
        if self.tokenizer is None:
            raise ArgumentError(
                "this needs a tokenizer and the model was wrapped without one; use repedit.wrap(model, tokenizer)"
            )
        return self.tokenizer

    def _row(self, site: Site) -> dict[str, Any]:
        plan, point = self.anatomy, site.point
        inside = point in (Point.ATTN_NEURONS, Point.ATTN_OUT, Point.MLP_NEURONS, Point.MLP_OUT)
        branch = plan.branch(site.layer, point) if inside else None
        return {
            "site": str(site),
            "hook": site.hook_name,
            "module": branch.writer if branch else plan.block_paths[site.layer],
            "width": plan.width_of(site.layer, point),
            "tensor": branch.parts[0].out.tensor if branch else "",
            "bias": bool(branch and branch.bias),
            "experts": len(branch.parts) if branch and branch.routed else 0,
        }


def load(
    name: str | Path = DEFAULT,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    device_map: Any = None,
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Load a causal language model from a directory, a GGUF file, the built-in name or a hub id.

    Args:
        dtype: "auto" keeps the checkpoint's dtype (float16 on a CPU becomes float32); or "float32", "bfloat16", ...
        device: "auto" is cuda if present, else cpu.
        attention: attention implementation of transformers, such as "eager"; None keeps its default.
        trust_remote_code: run code that a hub repository ships; off unless you ask.
    Raises:
        NotFound: if nothing of that name exists, or it is not fetched yet.
        CheckpointError: if files are missing, corrupt, pickled or leave the directory, or lack a weight.
        UnknownArchitecture: if no row of the family table fits; no weight is read then.
        NotFinite: if a weight is NaN or infinite.
        ArgumentError: if there is no such dtype or device.
    """
    target, wanted = _device(device), dtype if dtype == "auto" else floating(dtype)
    place, options = _located(name, trust_remote_code)
    options |= {"revision": revision} if revision and not isinstance(place, Path) else {}
    extra = {"device_map": device_map} if device_map is not None else {}
    extra |= {"attn_implementation": attention} if attention else {}
    with _typed_errors(place), quiet(place):
        if "gguf_file" not in options:
            _check_config(place, options)
        model = _weights(place, dtype=wanted, **options, **extra)
    as_stored = dtype == "auto"
    if as_stored and target == "cpu" and model.dtype == torch.float16:
        log.info("float16 is slow and inexact on a CPU: loaded in float32; pass dtype='float16' to keep it")
        model, as_stored = model.float(), False
    model = (model if device_map is not None else model.to(target)).eval()
    options.pop("quantization_config", None)
    source = place if isinstance(place, Path) and "gguf_file" not in options and as_stored else None
    subject = subject_of(model, _tokenizer(place, options), source=source)
    _check_finite(model)
    return subject


def subject_of(model: Any, tokenizer: Any | None = None, *, source: Path | None = None) -> Subject:
    """A Subject around a transformers model in memory; the model is not changed in any way.

    Raises:
        NotAModel: if the object is not a transformers causal model.
        UnknownArchitecture: if no row fits, or the weights contradict the row.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise NotAModel(
            f"{type(model).__name__} is not a transformers model; pass an AutoModelForCausalLM model or a path to repedit.load"
        )
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise UnknownArchitecture(
            f"{type(model).__name__} is not a decoder-only causal language model; load it with AutoModelForCausalLM"
        )
    subject = Subject(model, tokenizer, resolve(model.config), source)
    check_modules(model, subject.anatomy)
    if source is not None:
        _as_read[model] = state(model)
    return subject


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"device={name!r} cannot be used: {reason}; give 'auto', 'cpu' or 'cuda'") from error
    return name


def _located(name: str | Path, trust_remote_code: bool) -> tuple[Path | str, dict[str, Any]]:
    from transformers import GgufConfig

    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    if path.is_dir():
        if not (path / "config.json").exists():
            raise CheckpointError(f"{path.resolve()} holds no config.json; is it a model directory?")
        if (path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path.resolve()} holds an adapter (adapter_config.json), which transformers loads or not, as peft is there or "
                "not; merge it (merge_and_unload) and save the model, or take the file away"
            )
        open_shards(path)
        return path, {"trust_remote_code": trust_remote_code}
    if str(name) == DEFAULT:
        return cached(), {}
    if path.exists() or str(name)[:1] in "./~" or str(name).count("/") != 1:
        parent = path.absolute().parent
        names = [p.name for p in parent.iterdir() if p.is_dir() or p.suffix == ".gguf"] if parent.is_dir() else []
        found = "is neither a directory nor a .gguf file" if path.exists() else "does not exist"
        raise NotFound(
            f"{path.absolute()} {found} and {str(name)!r} is not the built-in name {DEFAULT!r}; "
            f"{nearest(path.name, [*names, DEFAULT])} Hub ids are tried only for 'owner/name'"
        )
    return str(name), {"trust_remote_code": trust_remote_code}


@contextmanager
def _typed_errors(place: Path | str) -> Iterator[None]:
    """What transformers and safetensors raise, as an error of repedit that says where it looked."""
    from safetensors import SafetensorError

    try:
        yield
    except RepeditError:
        raise
    except ValueError as error:
        raise ArgumentError(f"{place} cannot be loaded with these options: {error}") from error
    except (OSError, SafetensorError, struct.error) as error:
        if isinstance(place, Path):
            raise CheckpointError(f"{place.absolute()} cannot be loaded: {error}; download it again") from error
        raise NotFound(
            f"the hub id {place!r} could not be loaded, and no directory has that name: {error} Give the path of a local "
            f"directory, or get the built-in model {DEFAULT!r} once with: repedit fetch"
        ) from error


def _check_config(place: Path | str, options: dict[str, Any]) -> None:
    """Refuse a model that no row fits before its weights are read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(place), **options)
    except ValueError as error:
        raise UnknownArchitecture(f"the config of {place} cannot be used: {error}") from error
    if config.is_encoder_decoder:
        raise UnknownArchitecture(
            f"{place} is an encoder-decoder ({config.model_type}), not a decoder-only causal language model; give one of those"
        )
    resolve(config)


def _weights(place: Path | str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    # transformers fills absent weights with random numbers and only logs it.
    model, report = AutoModelForCausalLM.from_pretrained(
        str(place), use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    reshaped = refit(model, resolve(model.config), place, {item[0] for item in report["mismatched_keys"]})
    if report["missing_keys"] or reshaped:
        raise CheckpointError(
            f"{place} does not hold the model its config describes: missing {sorted(report['missing_keys'])[:3]} "
            f"({len(report['missing_keys'])} in all), of another shape {sorted(reshaped)[:3]} ({len(reshaped)} in all); "
            "is a shard or the right config.json missing?"
        )
    return model


def _tokenizer(place: Path | str, options: dict[str, Any]) -> Any | None:
    from transformers import AutoTokenizer

    plain = isinstance(place, Path) and "gguf_file" not in options
    if plain and not any(path.name.startswith(_TOKENIZERS) for path in Path(place).iterdir()):
        log.warning("%s holds no tokenizer files: loaded without one, so nothing that reads text will work", place)
        return None
    with _typed_errors(place):
        return AutoTokenizer.from_pretrained(str(place), **options)


def _check_finite(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.device.type != "meta" and p.is_floating_point() and not bool(torch.isfinite(p).all()):
            where = f"{tuple((~torch.isfinite(p)).nonzero()[0].tolist())} ({p.dtype})"
            raise NotFinite(f"weight {name!r} is not finite at {where}; the checkpoint is damaged, download it again")
