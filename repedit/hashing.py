"""What identifies a result: hashes of the weights of a model, a cheap key of changes in memory, versions of packages."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repedit.arch.offload import offloaded_file, offloaded_tensor, parameters_with_values
from repedit.io.files import file_state
from repedit.io.safetensors import raw_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOLATILE = ("_name_or_path", "_model_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
_fingerprints: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the name, dtype, shape and bytes of every parameter, and the config without volatile keys."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE}
    text = json.dumps(config, sort_keys=True, default=str)
    key, cached = (text, state(model)), _fingerprints.get(model)
    if cached is None or cached[0] != key:
        cached = (key, _digest(parameters_with_values(model), text))
        _fingerprints[model] = cached
    return cached[1]


def module_fingerprint(model: nn.Module) -> str:
    """sha256 over the name, dtype, shape and bytes of every parameter and buffer of a model without a config."""
    return _digest([*model.named_parameters(), *model.named_buffers()])


def state(model: nn.Module) -> tuple[Any, ...]:
    """A key that differs after a weight is replaced or changed in place; ten times cheaper than the fingerprint.

    For a weight that Accelerate offloads, the key holds the state of its values in memory or of the file that holds them.
    """
    return tuple(
        (name, p.data_ptr(), _version_of(p), _checksum(p))
        if p.device.type != "meta"
        else (name, *_offloaded_state(model, name))
        for name, p in model.named_parameters(remove_duplicate=False)
    )


def value_hash(tensor: Tensor) -> str:
    """The first 16 digits of sha256 over the values of a tensor; the same for bfloat16 values stored in float32."""
    wide = tensor.detach().to("cpu", torch.float32)
    if tensor.dtype == torch.float64 and not torch.equal(wide.double(), tensor.detach().cpu()):
        wide = tensor.detach().cpu()
    return hashlib.sha256(raw_bytes(wide)).hexdigest()[:16]


def byte_hash(tensor: Tensor) -> bytes:
    """The sha256 digest of the bytes of a tensor."""
    return hashlib.sha256(raw_bytes(tensor)).digest()


def _offloaded_state(model: nn.Module, name: str) -> tuple[Any, ...]:
    """The state of an offloaded weight; every pass replaces its meta tensor, whose identity therefore means nothing."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = offloaded_tensor(module, leaf)
    if tensor is not None:
        return tensor.data_ptr(), _version_of(tensor), _checksum(tensor)
    file = offloaded_file(module, leaf)
    return (None,) if file is None or not file.exists() else (str(file), *file_state(file))


def _version_of(p: Tensor) -> int | bytes:
    """The number of changes in place that torch counted; of a tensor made under inference_mode, which has none, the hash."""
    return byte_hash(p.detach()) if p.is_inference() else p._version


def _checksum(p: Tensor) -> bytes:
    """Sums over 4 KB at a time, because the version of a tensor does not count `weight.data[:, 5] = 0`."""
    if p.device.type == "meta":
        return b""
    data = p.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = data.numel() // 4096 * 4096
    sums = data[:whole].view(torch.int64).reshape(-1, 512).sum(1)
    return sums.cpu().numpy().tobytes() + data[whole:].cpu().numpy().tobytes()


def _digest(tensors: Iterable[tuple[str, Tensor]], header: str = "") -> str:
    """sha256 over a header and the name, dtype, shape and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta":
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def seed_of(key: str) -> int:
    """A seed for a random generator that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


def package_versions(*packages: str) -> dict[str, str]:
    """The versions of repedit, torch and further packages, as provenance records them."""
    return {name: _version(name) for name in ("repedit", "torch", *packages)}


@cache
def _version(package: str) -> str:
    return version(package)  # which reads the metadata of the package
