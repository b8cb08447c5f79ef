"""Find a model and read its files: every step refuses what it cannot trust, with an error of repedit."""

from __future__ import annotations

import copy
import difflib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repedit.arch import (
    Architecture,
    Branch,
    ModelConfig,
    Specs,
    TensorSpec,
    families,
    match_layout,
    resolve,
    text_config,
)
from repedit.arch.layout import ModelLayout
from repedit.arch.offload import parameters_with_values
from repedit.arch.storage import StoredSpecs
from repedit.errors import (
    ArgumentError,
    CheckpointError,
    MissingDependency,
    NotFinite,
    NotFound,
    RepeditError,
    TooLarge,
    UnknownArchitecture,
)
from repedit.io.checkpoint import TOKENIZERS, open_shards
from repedit.io.files import open_regular, user_path
from repedit.io.text import read_json
from repedit.linear_maps import not_finite_at
from repedit.models.default_model import DEFAULT, cached
from repedit.models.dequantization import (
    check_stored,
    check_unquantized,
    dequantizing,
    ordinary,
    partial_blocks,
    quantization_of,
    quantizer_name,
)
from repedit.sites import Point

log = logging.getLogger("repedit")

# --- Layers whose MLPs have different widths
#
# `config.json` cannot express per-layer widths, so repedit.json records them, and `load` replaces the tensors that transformers
# reports as tensors of another shape.


def mlp_widths(layout: ModelLayout) -> dict[int, int]:
    """Neurons of the MLP of each layer that has one; of one expert if it has experts."""
    return {i: branch.parts[0].stop for i, branch in _mlps(layout).items()}


def _mlps(layout: ModelLayout) -> dict[int, Branch]:
    """The MLP of each layer that has one."""
    branches = {i: layout.find(i, Point.MLP_OUT) for i in range(len(layout.layers))}
    return {i: branch for i, branch in branches.items() if branch is not None}


def ragged_widths(layout: ModelLayout) -> dict[int, int]:
    """The same if layers of one kind (dense, experts) differ; otherwise empty."""
    widths = mlp_widths(layout)
    kinds = {(branch.routed, widths[i]) for i, branch in _mlps(layout).items()}
    return widths if len(kinds) > len({routed for routed, _ in kinds}) else {}


def mlp_tensors(layout: ModelLayout) -> frozenset[str]:
    """Every tensor whose shape depends on the number of neurons of an MLP."""
    views = [view for branch in _mlps(layout).values() for part in branch.parts for view in (part.out, *part.readers)]
    return frozenset(view.tensor for view in views)


def set_parameter(model: nn.Module, name: str, value: nn.Parameter) -> None:
    """Replace a parameter of a model, and update the sizes that its module records."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    setattr(module, leaf, value)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif type(module).__name__ == "Conv1D":  # stored (in, out); its forward pass asks for nf
        module.nx, module.nf = value.shape if leaf == "weight" else (module.nx, module.nf)


def recorded_widths(directory: Path) -> dict[int, int]:
    """The width of each layer that repedit.json records; empty if the config describes all widths."""
    path = directory / "repedit.json"
    record = read_json(path, finite=False) if path.is_file() else {}
    if record.get("layout") != "ragged":
        return {}
    try:
        return {int(layer): int(width) for layer, width in record["widths"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has layout 'ragged' and no widths by layer; export again") from error


@contextmanager
def quiet_if_ragged(location: Path | str) -> Iterator[None]:
    """Silence the warnings of transformers about tensors of another shape, if repedit.json records their widths."""
    logger = logging.getLogger("transformers")
    level = logger.level
    if isinstance(location, Path) and recorded_widths(location):
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def set_recorded_widths(
    model: nn.Module, architecture: Architecture, location: Path | str, names: set[str]
) -> set[str]:
    """Give a model the tensors of the recorded widths in place of the config's; returns the names of those not replaced.

    Raises:
        CheckpointError: if a tensor is absent, or a layer comes out with another width than repedit.json records.
    """
    recorded = recorded_widths(location) if names and isinstance(location, Path) else {}
    if not recorded:
        return names
    shards = open_shards(location)
    parameters, files = dict(model.named_parameters(remove_duplicate=False)), StoredSpecs.of(model, shards.specs)
    for name in sorted(names):
        old, value = parameters[name], files.read(name, shards.read)
        if value is None:
            raise CheckpointError(f"{shards.directory} holds no tensor {name!r}")
        set_parameter(model, name, nn.Parameter(value.to(old), requires_grad=old.requires_grad))
    specs = {n: TensorSpec(tuple(p.shape), p.dtype) for n, p in model.named_parameters(remove_duplicate=False)}
    actual = mlp_widths(match_layout(architecture, specs))
    if actual != recorded:
        raise CheckpointError(
            f"{location} holds MLPs of widths {list(actual.values())}, its repedit.json records {list(recorded.values())}; "
            "is it from another export?"
        )
    return set()


# --- Find a model and read its files

# Small files that belong to a model on the hub, whether transformers reads them or not.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
_MOST_LAYERS = 10_000
_HUB_ID = re.compile(r"(?!-)[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_READ_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")


def device_named(name: str | torch.device) -> str:
    """The name of a device; "auto" is cuda if there is one.

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
    return str(name)


def locate(name: str | Path, trust_remote_code: bool) -> tuple[Path | str, dict[str, Any]]:
    """The directory or hub id of a model, and the options to open it with.

    Raises:
        NotFound, CheckpointError: if nothing is there, or it is not a model.
    """
    from transformers import GgufConfig

    path = user_path(name).absolute()
    try:
        path.exists()
    except (ValueError, OSError) as error:
        raise NotFound(f"{str(name)[:80]!r} is neither a valid path nor a hub id: {reason_of(error)}") from error
    if path.is_file() and path.suffix == ".gguf":
        open_regular(path).close()
        return path.parent, {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    if path.is_dir():
        _check_utf8(path)
        if not (path / "config.json").exists():
            raise CheckpointError(f"{path.resolve()} holds no config.json; is it a model directory?")
        if (path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path.resolve()} holds an adapter (adapter_config.json), which transformers loads only if peft is installed; merge "
                "it (merge_and_unload) and save the model, or remove the file"
            )
        for file in sorted(p for p in path.iterdir() if p.suffix in _READ_SUFFIXES and p.is_file()):
            open_regular(file).close()
        open_shards(path)
        return path, {"trust_remote_code": trust_remote_code}
    if str(name) == DEFAULT:
        return cached(), {}
    if path.exists() or not _HUB_ID.fullmatch(str(name)):
        what = "is neither a directory nor a .gguf file" if path.exists() else "does not exist"
        raise NotFound(
            f"{path.absolute()} {what} and {str(name)!r} is neither the built-in name {DEFAULT!r} nor a hub id such as "
            f"'owner/name'{_similar(path)}"
        )
    return str(name), {"trust_remote_code": trust_remote_code}


def _check_utf8(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{os.fsencode(path).decode(errors='replace')} has a path that is not UTF-8, which safetensors does not open; rename "
            "it, or give the path of a link to it"
        ) from error


def _similar(path: Path) -> str:
    """A hint with similar names in the same directory, or the built-in name; empty if there are none."""
    parent = path.absolute().parent
    names = [p.name for p in parent.iterdir() if p.is_dir() or p.suffix == ".gguf"] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, [*names, DEFAULT], n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def file_of(location: Path | str, options: dict[str, Any]) -> Path | str:
    """The GGUF file to read, or the directory or hub id."""
    return location / options["gguf_file"] if isinstance(location, Path) and "gguf_file" in options else location


@contextmanager
def typed_errors(location: Path | str, what: str = "", *, options: bool = False) -> Iterator[None]:
    """Raise the errors of transformers and safetensors as errors of repedit that name the model.

    Args:
        what: the part of the model that is read, such as "the tokenizer of ".
        options: whether the caller gave options that transformers may refuse.
    """
    where = f"{what}{location.absolute() if isinstance(location, Path) else location}"
    try:
        yield
    except RepeditError:
        raise
    except ImportError as error:
        raise MissingDependency(
            f"{where} needs a package that is not installed: {reason_of(error)}; install it, or use the unquantised base"
        ) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise TooLarge(
            f"{where} does not fit into memory: {reason_of(error)}; give dtype='bfloat16' or device_map"
        ) from error
    except OSError as error:
        if isinstance(location, Path):
            raise CheckpointError(f"{where} cannot be loaded: {error}; download it again") from error
        raise NotFound(
            f"{what}the hub id {location!r} could not be loaded, and no directory has that name{_similar(Path(location))}: {error} Give "
            f"the path of a local directory, or get the built-in model {DEFAULT!r} once with: repedit fetch"
        ) from error
    except Exception as error:  # each class of transformers raises its own errors
        if options and isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            raise ArgumentError(f"{where} cannot be loaded with these options: {error}") from error
        raise CheckpointError(
            f"{where} cannot be loaded: {reason_of(error)}; are its files those of this model? Download them again"
        ) from error


def read_config(location: Path | str, **options: object) -> Any:
    """The config of a directory or a hub id, as an object of its family's class.

    Raises:
        UnknownArchitecture: with the reason that the class gives. OSError: if there is no file, or it is not JSON.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(location), **options)
    except OSError:
        raise
    except Exception as error:  # each config class raises its own errors
        raise UnknownArchitecture(f"the config of {location} cannot be used: {reason_of(error)}") from error


def check_config(location: Path | str, options: dict[str, Any]) -> str | None:
    """Refuse a model without a row in the family table, or that its config cannot build, before its weights are read.

    Returns:
        What the weights are quantised with; None for plain ones.
    Raises:
        UnknownArchitecture: with the reason.
        QuantizedModel, CheckpointError: if the files are not stored as the config says.
    """
    config = read_config(location, **options)
    if config.is_encoder_decoder:
        raise UnknownArchitecture(
            f"{location} is an encoder-decoder ({config.model_type}); give a decoder-only causal language model"
        )
    with buildable(location):
        check_layer_count(
            location, config, len(open_shards(location).entries) if isinstance(location, Path) else _MOST_LAYERS
        )
        empty_model(config, trust_remote_code=options.get("trust_remote_code", False))
    quantization = quantization_of(config)
    if isinstance(location, Path) and quantization is None:
        check_unquantized(None, open_shards(location).specs, "read", where=str(location))
    elif isinstance(location, Path):
        check_stored(quantization, open_shards(location).specs, location)
    return quantizer_name(quantization)


def check_layer_count(location: Path | str, config: ModelConfig, most: int) -> None:
    """Refuse more layers than the files have tensors, before a model with that many layers is built.

    Raises:
        CheckpointError: with both numbers.
    """
    if config.model_type in families():
        resolve(config)  # refuses variants that the row does not describe
    layers = text_config(config).num_hidden_layers
    if not 0 < layers <= most:
        raise CheckpointError(
            f"{location} does not hold the model its config describes: the config has {layers} layers, the files "
            f"hold {most} tensors at most; is it the right config.json?"
        )


@contextmanager
def buildable(location: Path | str) -> Iterator[None]:
    """Raise the errors of a family's classes for a config that does not describe a model as an error of repedit.

    Raises:
        UnknownArchitecture: with the reason.
    """
    try:
        yield
    except RepeditError:
        raise
    except ImportError as error:
        raise MissingDependency(f"{location} needs a package that is not installed: {reason_of(error)}") from error
    except Exception as error:  # a wrong number fails wherever a module first uses it
        raise UnknownArchitecture(
            f"the config of {location} does not describe a model that transformers can build: {reason_of(error)}"
        ) from error


def reason_of(error: BaseException) -> str:
    """The type and message of an error, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def empty_model(
    config: ModelConfig, *, trust_remote_code: bool = False, buffers: bool = False, attention: str = "eager"
) -> Any:
    """The model of a config without values, on the meta device.

    Args:
        buffers: give the buffers their values, which are computed from the config.
        attention: attention implementation.
    """
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    on_meta = init_empty_weights(include_buffers=False) if buffers else torch.device("meta")
    options = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
    with torch.random.fork_rng(devices=[]), on_meta:
        return auto_class(config).from_config(config, **options)


def set_fields(config: ModelConfig, fields: Mapping[str, Any]) -> None:
    """Change fields of a config: those of the text decoder, and the tie of its head wherever it is stated."""
    for key, value in fields.items():
        for part in (text_config(config), *([config] if key == "tie_word_embeddings" else ())):
            setattr(part, key, value)


def changed_json(table: dict[str, Any], config: ModelConfig, fields: Mapping[str, Any], dtype: str | None) -> None:
    """The same in the content of a config.json, and another dtype."""
    parts, path = [table], _text_path(config)
    for key in path:
        parts.append(parts[-1].setdefault(key, {}))
    parts[-1].update(fields)
    table |= {key: value for key, value in fields.items() if key == "tie_word_embeddings"}
    for part in parts if dtype else ():
        if part is table or not {"dtype", "torch_dtype"}.isdisjoint(part):
            part["dtype"] = dtype
            part.pop("torch_dtype", None)


def _text_path(config: Any) -> tuple[str, ...]:
    """Where a config holds the config of its text decoder."""
    text = text_config(config)
    if text is config:
        return ()
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    key = next(k for k, part in parts.items() if part is not None and text_config(part) is text)
    return (key, *_text_path(parts[key]))


def auto_class(config: ModelConfig | None) -> Any:
    """The class of transformers that loads a model: AutoModelForCausalLM, or AutoModelForImageTextToText for a wrapper.

    A config that both can load belongs to the one whose class it names in `architectures`.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    causal, wrapper = (
        mapping[type(config)].__name__ if type(config) in mapping else None
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    )
    named = getattr(config, "architectures", None) or []
    wrapped = wrapper is not None and (causal is None or (wrapper in named and causal not in named))
    return AutoModelForImageTextToText if wrapped else AutoModelForCausalLM


@dataclass(frozen=True)
class TensorMatch:
    """How transformers matches stored tensors with the model that a config builds."""

    missing: tuple[str, ...]
    """Parameters of the model that are not stored."""
    reshaped: tuple[str, ...]
    """Parameters that are stored in another shape."""
    later_layers: tuple[str, ...]
    """Stored tensors of layers after the last one of the config."""
    used: StoredSpecs
    """The tensors of the model that are stored."""


def match_tensors(config: ModelConfig, architecture: Architecture, specs: Specs) -> TensorMatch:
    """Match the names and shapes of checkpoint tensors with the model of a config; no weight is read."""
    builder = auto_class(config)._model_mapping[type(config)]
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    with _silent(), torch.random.fork_rng(devices=[]):
        model, report = builder.from_pretrained(
            None, config=copy.deepcopy(config), state_dict=tensors, device_map="meta", output_loading_info=True,
            ignore_mismatched_sizes=True, attn_implementation="eager",
        )  # fmt: skip
    return TensorMatch(
        missing=tuple(sorted(report["missing_keys"])),
        reshaped=tuple(sorted(item[0] for item in report["mismatched_keys"])),
        later_layers=later_layers(report["unexpected_keys"], architecture),
        used=StoredSpecs.of(model, specs),
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Without warnings and progress bars of transformers."""
    from transformers.utils import logging as transformers_logging

    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def later_layers(names: Iterable[str], architecture: Architecture) -> tuple[str, ...]:
    """The tensors of layers after the last one that the config describes."""
    pattern = re.compile(rf"(?:{re.escape(architecture.base)}\.)?{re.escape(architecture.blocks)}\.(\d+)\.")
    numbers = {name: match[1] for name in names if (match := pattern.match(name))}
    return tuple(sorted(name for name, number in numbers.items() if int(number) >= architecture.n_layers))


def check_no_later_layers(location: Path | str, names: Sequence[str], architecture: Architecture) -> None:
    """Refuse tensors of layers that the config does not describe.

    Raises:
        CheckpointError: with their names.
    """
    if names:
        raise CheckpointError(
            f"{location} does not hold the model its config describes: the config has {architecture.n_layers} layers, the files also "
            f"hold {list(names[:3])} ({len(names)} tensors of later layers); is it the right config.json?"
        )


def read_weights(location: Path | str, **options: object) -> Any:
    """The model, if the files hold every weight that its config describes, and no layer that it does not describe.

    Raises:
        CheckpointError: naming what is missing, of another shape or of a later layer.
    """
    config: Any = options.get("config") or (
        None if "gguf_file" in options else read_config(location, **_hub_options(options))
    )
    # transformers fills absent weights with random numbers and only logs it.
    model, report = auto_class(config).from_pretrained(
        str(location), use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    architecture = resolve(model.config) if model.config.model_type in families() else None
    reshaped = {item[0] for item in report["mismatched_keys"]}
    if architecture is not None:
        reshaped = set_recorded_widths(model, architecture, location, reshaped)
    if report["missing_keys"] or reshaped:
        raise CheckpointError(
            f"{location} does not hold the model its config describes: missing {sorted(report['missing_keys'])[:3]} "
            f"({len(report['missing_keys'])} in all), of another shape {sorted(reshaped)[:3]} ({len(reshaped)} in all); "
            "is a shard or the right config.json missing?"
        )
    if architecture is not None:
        check_no_later_layers(location, later_layers(report["unexpected_keys"], architecture), architecture)
    if report["unexpected_keys"]:
        names = sorted(report["unexpected_keys"])
        log.warning(
            "%s holds tensors that its config does not describe, which transformers ignores: %s (%d in all)",
            location, names[:3], len(names),
        )  # fmt: skip
    for tensor in (*model.parameters(), *model.buffers()):
        # transformers memory-maps the files: if one changed, weights would change, or the process would die.
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


def _hub_options(options: Mapping[str, object]) -> dict[str, Any]:
    """The options of loading that say where a model is."""
    return {key: options[key] for key in ("trust_remote_code", "revision") if key in options}


def read_quantized(location: Path | str, *, dequantize: bool, **options: Any) -> Any:
    """The model of a quantised checkpoint; with `dequantize`, its weights are ordinary tensors and its config is plain.

    Raises:
        QuantizedModel: if transformers cannot dequantise the format. CheckpointError: as `read_weights`.
    """
    with partial_blocks():
        if not dequantize:
            return read_weights(location, **options)
        config = dequantizing(read_config(location, **_hub_options(options)), location)
        return ordinary(read_weights(location, config=config, **options), location)


def snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The directory of the hub cache with the files of a model that was loaded, including licence and card.

    None if it holds no safetensors weights, as when transformers read them from another revision.
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
        log.warning(
            "licence, card and other files of %s are not in the cache and could not be downloaded: %s", hub_id, error
        )
    try:
        open_shards(Path(config).parent)
    except (CheckpointError, NotFound):
        return None
    return Path(config).parent


def read_tokenizer(location: Path | str, options: dict[str, Any]) -> Any | None:
    """The tokenizer; None, with a warning, if a directory holds none."""
    from transformers import AutoTokenizer

    plain = isinstance(location, Path) and "gguf_file" not in options
    if plain and not any(path.name.startswith(TOKENIZERS) for path in Path(location).iterdir()):
        log.warning(
            "%s holds no tokenizer files: loaded without one, so functions that read text will not work; "
            "if you need them, save the tokenizer of the original there: tokenizer.save_pretrained(directory)",
            location,
        )
        return None
    with typed_errors(file_of(location, options), "the tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(str(location), **options)
        # Settings of a wrong type and an incomplete vocabulary fail only when the tokenizer is called.
        tokenizer("a")
        return tokenizer


def check_finite_weights(model: nn.Module, dtype: str | torch.dtype = "auto") -> None:
    """Refuse weights that are NaN or infinite, and rotary frequencies that the config makes so.

    Args:
        dtype: the dtype that the weights were cast to when they were loaded; "auto" for none.
    Raises:
        NotFinite: with the first index.
    """
    cause = "" if dtype == "auto" else f" or holds a number that {dtype} cannot hold (load it with dtype='auto')"
    for name, p in parameters_with_values(model):
        index = not_finite_at(p)
        if index is not None:
            raise NotFinite(
                f"weight {name!r} is not finite at {index}; the checkpoint is damaged{cause}, download it again"
            )
    for name, buffer in model.named_buffers():
        index = not_finite_at(buffer) if name.endswith("inv_freq") else None
        if index is not None:
            raise NotFinite(
                f"the rotary frequencies {name!r} are not finite at {index}; correct the rope settings in config.json"
            )
