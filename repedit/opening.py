"""Find a model and read its files: every step refuses what it cannot trust, with an error of repedit."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repedit.arch import resolve
from repedit.arch.offloaded import held
from repedit.errors import (
    ArgumentError,
    CheckpointError,
    NotFinite,
    NotFound,
    RepeditError,
    UnknownArchitecture,
    nearest,
)
from repedit.fetching import DEFAULT, cached
from repedit.io.checkpoint import TOKENIZERS, open_shards
from repedit.ragged import refit

log = logging.getLogger("repedit")
# What is small and belongs to a model on the hub, whether transformers asks for it or not.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")


def device_named(name: str) -> str:
    """A device by its name; "auto" is cuda where there is one.

    Raises:
        ArgumentError: if it cannot be used.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"device={name!r} cannot be used: {reason}; give 'auto', 'cpu' or 'cuda'") from error
    return name


def located(name: str | Path, trust_remote_code: bool) -> tuple[Path | str, dict[str, Any]]:
    """What to open, a path or a hub id, and the options to open it with.

    Raises:
        NotFound, CheckpointError: if nothing is there, or it is no model.
    """
    from transformers import GgufConfig

    path = Path(name).expanduser().absolute()
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
def typed_errors(place: Path | str) -> Iterator[None]:
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


def check_config(place: Path | str, options: dict[str, Any]) -> None:
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


def read_weights(place: Path | str, **options: Any) -> Any:
    """The model, once every weight its config describes is found in the files.

    Raises:
        CheckpointError: naming what is missing or of another shape.
    """
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
    for tensor in (*model.parameters(), *model.buffers()):
        # transformers maps the files into memory: weights would change, or the process die, when a file does.
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


def snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The directory where huggingface_hub keeps the files of a hub id that was loaded, licence and card among them.

    None where it holds no safetensors weights, as when transformers took them from another revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from transformers.utils import cached_file

    config = cached_file(hub_id, "config.json", revision=revision)
    if config is None:
        return None
    try:
        snapshot_download(hub_id, revision=revision, allow_patterns=list(_COMPANIONS))
    except (OSError, ValueError, HfHubHTTPError) as error:
        log.warning("licence, card and other files of %s that are not in the cache could not be had: %s", hub_id, error)
    try:
        open_shards(Path(config).parent)
    except (CheckpointError, NotFound):
        return None
    return Path(config).parent


def read_tokenizer(place: Path | str, options: dict[str, Any]) -> Any | None:
    """The tokenizer; None, with a warning, where a directory holds none."""
    from transformers import AutoTokenizer

    plain = isinstance(place, Path) and "gguf_file" not in options
    if plain and not any(path.name.startswith(TOKENIZERS) for path in Path(place).iterdir()):
        log.warning("%s holds no tokenizer files: loaded without one, so nothing that reads text will work", place)
        return None
    with typed_errors(place):
        return AutoTokenizer.from_pretrained(str(place), **options)


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are NaN or infinite, wherever they are.

    Raises:
        NotFinite: with the first place.
    """
    for name, p in held(model):
        if p.device.type != "meta" and p.is_floating_point() and not bool(torch.isfinite(p).all()):
            where = f"{tuple((~torch.isfinite(p)).nonzero()[0].tolist())} ({p.dtype})"
            raise NotFinite(f"weight {name!r} is not finite at {where}; the checkpoint is damaged, download it again")
