"""Load a causal language model, or wrap one, as a Subject.

A path is tried first, then the built-in name, then a hub id. No code of a checkpoint runs and no pickle is opened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repedit.arch import Anatomy, Architecture, TensorSpec, anatomy, resolve
from repedit.errors import ArgumentError, CheckpointError, NotAModel, NotFinite, NotFound, UnknownArchitecture, nearest
from repedit.fetching import DEFAULT, cached
from repedit.shards import open_shards
from repedit.sites import Point, Site, select

log = logging.getLogger("repedit")
_VOLATILE = ("_name_or_path", "_model_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
_fingerprints: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under study: the transformers model itself, its tokenizer and its row of the family table."""

    model: Any
    tokenizer: Any | None
    architecture: Architecture
    source: Path | None = None
    """Directory whose files hold exactly these weights; None for an in-memory or edited model."""

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
        parameters = sorted(self.model.named_parameters(remove_duplicate=False), key=lambda item: item[0])
        # In-place edits raise a tensor's version, so an unchanged key means unchanged bytes.
        key = tuple((name, p.data_ptr(), p._version) for name, p in parameters)
        known = _fingerprints.get(self.model)
        if known is None or known[0] != key:
            known = (key, _digest(parameters, self.model.config.to_dict()))
            _fingerprints[self.model] = known
        return known[1]

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
        CheckpointError: if files are missing, corrupt, pickled or leave the directory.
        UnknownArchitecture: if no row of the family table fits.
        NotFinite: if a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, options = _located(name, trust_remote_code)
    options |= {"revision": revision} if revision and not isinstance(place, Path) else {}
    target = "cpu" if device == "auto" and not torch.cuda.is_available() else ("cuda" if device == "auto" else device)
    extra = {"device_map": device_map} if device_map is not None else {}
    extra |= {"attn_implementation": attention} if attention else {}
    model = AutoModelForCausalLM.from_pretrained(str(place), dtype=dtype, use_safetensors=True, **options, **extra)
    as_stored = dtype == "auto"
    if as_stored and target == "cpu" and model.dtype == torch.float16:
        log.info("float16 is slow and inexact on a CPU: loaded in float32; pass dtype='float16' to keep it")
        model, as_stored = model.float(), False
    model = (model if device_map is not None else model.to(target)).eval()
    options.pop("quantization_config", None)
    tokenizer = AutoTokenizer.from_pretrained(str(place), **options)
    source = place if isinstance(place, Path) and "gguf_file" not in options and as_stored else None
    subject = subject_of(model, tokenizer, source=source)
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
    _check_orientation(subject)
    return subject


def _located(name: str | Path, trust_remote_code: bool) -> tuple[Path | str, dict[str, Any]]:
    from transformers import GgufConfig

    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    if path.is_dir():
        if not (path / "config.json").exists():
            raise CheckpointError(f"{path.resolve()} holds no config.json; is it a model directory?")
        open_shards(path)
        return path, {"trust_remote_code": trust_remote_code}
    if str(name) == DEFAULT:
        return cached(), {}
    if str(name)[:1] in "./~" or str(name).count("/") != 1:
        parent = path.absolute().parent
        names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        close = nearest(path.name, [*names, DEFAULT])
        raise NotFound(
            f"{path.absolute()} does not exist and {str(name)!r} is not the built-in name {DEFAULT!r}; {close} "
            "Hub ids are tried only for 'owner/name'"
        )
    return str(name), {"trust_remote_code": trust_remote_code}


def _digest(parameters: list[tuple[str, nn.Parameter]], config: dict[str, Any]) -> str:
    digest = hashlib.sha256(
        json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, sort_keys=True, default=str).encode()
    )
    for name, p in parameters:
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        if p.device.type != "meta":
            digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_finite(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.device.type != "meta" and p.is_floating_point() and not bool(torch.isfinite(p).all()):
            where = tuple(int(i) for i in (~torch.isfinite(p)).nonzero()[0])
            raise NotFinite(
                f"weight {name!r} is not finite at {where} ({p.dtype}); the checkpoint is damaged, download it again"
            )


def _check_orientation(subject: Subject) -> None:
    """The row says how projections are stored; the live modules must agree."""
    row = subject.architecture
    for branch in (b for pair in subject.anatomy.layers for b in pair):
        module = subject.model.get_submodule(branch.writer)
        if branch.routed:
            layout = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True}
            wrong = {k: getattr(module, k, v) for k, v in layout.items() if getattr(module, k, v) != v}
            if wrong:
                raise UnknownArchitecture(f"{branch.writer} stores its experts with {wrong}, the row expects {layout}")
        elif (type(module).__name__ == "Conv1D") != row.transposed or not (
            row.transposed or isinstance(module, nn.Linear)
        ):
            raise UnknownArchitecture(
                f"{branch.writer} is a {type(module).__name__}; the {row.model_type} row says transposed={row.transposed}"
            )
