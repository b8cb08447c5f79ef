"""What an export writes beside the weights: the manifest repedit.json, the model card, and copies of the tokenizer and the licence.

Exports are published, so no file outside the checkpoint is copied through a link.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite, prod
from pathlib import Path, PurePosixPath
from typing import Any

from repedit.arch import ModelLayout
from repedit.errors import CheckpointError
from repedit.escaping import for_markdown, for_yaml
from repedit.hashing import package_versions
from repedit.io.checkpoint import INDEX, Shards, open_shards
from repedit.io.files import file_hash, read_bytes
from repedit.io.known_hashes import known_hash
from repedit.io.targets import CARD, HASH, MANIFEST, folder_entries
from repedit.io.text import parse_yaml
from repedit.models.loading import mlp_widths, ragged_widths
from repedit.models.subject import Origin
from repedit.plan import Plan
from repedit.rewrite.certificate import TensorCertificate, check_leaks, combined, sliced_certificate, uncertified

_CARD_FIELDS = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")
"""Fields of the card of a base model that hold for the edited model too."""
PACKAGES = ("transformers", "safetensors")


@dataclass(frozen=True)
class TensorChange:
    """The change of one touched tensor."""

    relative: float
    """||after - before|| / ||before||, infinite for a tensor that is new or has another shape."""
    before: str | None
    """sha256 of the bytes; None for a new tensor."""
    after: str
    certificate: TensorCertificate | None = None
    """What remains of the directions that a projection removed."""


@dataclass(frozen=True)
class Weights:
    """What was written of the weights of a new checkpoint."""

    changes: Mapping[str, TensorChange]
    """By tensor."""
    files: Mapping[str, str]
    """sha256 by file."""
    sources: Mapping[str, str]
    """sha256 of the files of the source."""
    hard_links: tuple[str, ...] = ()
    """Files that are files of the source under another name."""


@dataclass(frozen=True)
class Base:
    """The model that was edited."""

    directory: Path
    name: str
    files: Mapping[str, Path]
    """Files by their path in the directory."""
    left_out: Mapping[str, str]
    """Files that are not part of the export, each with the reason."""
    in_memory: bool
    """Whether the weights are those of a model in memory rather than of its files."""
    dequantized_from: str | None
    """The format that the weights were dequantised from when they were loaded; None if they were plain."""

    def plain(self) -> dict[str, Any]:
        """What the manifest says of it beside its files."""
        rows = {"name": self.name, "in_memory": self.in_memory}
        return rows if self.dequantized_from is None else rows | {"dequantized_from": self.dequantized_from}


def base_of(shards: Shards, origin: Origin | None, others: Companions, in_memory: bool) -> Base:
    """The model that is edited: the weights of a checkpoint and the files beside them."""
    folder = shards.directory
    own = [name for name in ("config.json", CARD, MANIFEST) if (folder / name).is_file()]
    own += [name for name in others.left_out if stat.S_ISREG(_mode(folder / name))]
    files = {name: folder / name for name in (*used_files(shards), *own)} | dict(others.files)
    name = "in-memory model" if origin is None else origin.name
    dequantized_from = origin.quantizer if origin is not None and origin.dequantized else None
    return Base(folder, name, files, others.left_out, in_memory, dequantized_from)


def base_card(folder: Path) -> str:
    """The model card in a directory; empty if it has none."""
    path = folder / CARD
    return read_bytes(path).decode(errors="replace") if path.is_file() else ""


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


@dataclass(frozen=True)
class Manifest:
    """The content of repedit.json: sorted keys, no clock, no path."""

    base: Mapping[str, Any]
    edit: Mapping[str, Any]
    sites: Mapping[str, Mapping[str, str]]
    plan: Mapping[str, Mapping[str, Any]]
    unties: Mapping[str, str]
    added: tuple[str, ...]
    config: Mapping[str, Any]
    files: Mapping[str, str]
    dtype: str | None
    versions: Mapping[str, str]
    certificate: Mapping[str, Any] | None = None
    """Rank, leak before and after the cast, and exactness by tensor; None if nothing was projected."""
    loaders: tuple[str, ...] = ("transformers.AutoModelForCausalLM", "repedit.load")
    structure: str = "keep"
    layout: str | None = None
    """"uniform" or "ragged" if neurons were cut out; also "ragged" if the source was."""
    widths: Mapping[str, int] | None = None
    """MLP neurons by layer (of one expert if there are experts) if there is a layout; read by repedit.load."""
    parameters: Mapping[str, int] | None = None
    """Numbers in the files before and after, if shapes changed."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Files of the source that are not part of the export, each with the reason."""
    hard_links: tuple[str, ...] = ()
    """Files that are files of the source under another name, because nobody may write them."""
    hash: str = HASH
    """The algorithm of every hash here; manifests of earlier versions, which do not name it, have sha256."""
    card: str | None = None
    """sha256 of the card as written; `files` does not list it, because people may edit it."""
    format: int = 1

    def __repr__(self) -> str:
        return f"Manifest({self.edit.get('method', 'edit')}: {len(self.plan)} tensors edited, {len(self.files)} files)"

    @property
    def relative_change(self) -> float:
        """The largest relative change of a tensor that existed before."""
        return max((row["relative_change"] or 0.0 for row in self.plan.values()), default=0.0)

    def to_json(self) -> str:
        """The text of repedit.json."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


def manifest(
    plan: Plan,
    weights: Weights,
    base: Base,
    new: Path,
    dtype: str | None,
    layout: ModelLayout,
    loader: str,
) -> Manifest:
    """Hash every other file of the new checkpoint and of its source, and record what was done.

    Args:
        weights: of the new checkpoint, which were hashed when they were written.
        layout: of the new checkpoint, from its own config and headers.
        loader: the class of transformers that loads it.
    """
    ragged, changes = bool(ragged_widths(layout)), weights.changes
    files = {name: weights.files.get(name) or file_hash(new / name) for name in folder_entries(new)}
    sources = {
        name: weights.sources.get(name) or known_hash(path) or file_hash(path)
        for name, path in sorted(base.files.items())
    }
    sized = ragged or plan.structure == "slim"
    return Manifest(
        base=base.plain() | {"files": sources},
        edit=dict(plan.provenance),
        sites={str(site): {"map": plan.maps.get(site, ""), "exactness": kind} for site, kind in plan.exactness.items()},
        plan={name: _entry(plan, name, change) for name, change in sorted(changes.items())},
        unties=dict(plan.unties),
        added=tuple(sorted(plan.added)),
        config=dict(plan.config),
        files=files,
        dtype=dtype,
        versions=package_versions(*PACKAGES),
        certificate=_certificate(plan, changes),
        loaders=("repedit.load",) if ragged else (f"transformers.{loader}", "repedit.load"),
        structure=plan.structure,
        layout=("ragged" if ragged else "uniform") if sized else None,
        widths={str(layer): width for layer, width in mlp_widths(layout).items()} if sized else None,
        parameters={"before": _numbers(base.directory), "after": _numbers(new)} if plan.structure != "keep" else None,
        left_out=dict(base.left_out),
        hard_links=weights.hard_links,
    )


def card(plan: Plan, record: Manifest, base: str) -> str:
    """The model card: what the checkpoint is, what was changed, and what that does not show.

    Args:
        base: text of the card of the base; empty if it has none.
    """
    name = for_markdown(record.base["name"])
    fields, body = _front_matter(base)
    front = fields | {
        "base_model": record.base["name"],
        "base_model_relation": "finetune",
        "tags": ["repedit", "model-editing"],
    }
    sites = [
        f"| {site} | {for_markdown(row['map'])} | {for_markdown(row['exactness'])} |"
        for site, row in record.sites.items()
    ]
    weights, others = ("in memory of", "those in memory") if record.base["in_memory"] else ("of", "the base")
    return "\n".join(
        [
            f"---\n{for_yaml(front)}---",
            f"# {name}, edited",
            "",
            f"Weights {weights} {name}, edited with repedit {record.versions['repedit']}: {len(record.plan)} tensors changed, all "
            f"others are byte-identical to {others}. {_dequantized(record)}{_loading(record)}",
            *_size_lines(record),
            "",
            "| site | edit | exactness |",
            "|---|---|---|",
            *sites,
            "",
            f"Method: {for_markdown(plan.provenance.get('method', 'unknown'))}. Full provenance, with the hash of every file, is in `repedit.json`.",
            "",
            "**What this does not show.** A capability that a benchmark no longer sees may come back after a little "
            "fine-tuning or under other prompts. Nothing here says that knowledge is gone until it has been attacked.",
            "",
            *(["## Card of the base", "", body] if body else []),
        ]
    )


def _certificate(plan: Plan, changes: Mapping[str, TensorChange]) -> dict[str, Any] | None:
    if plan.structure == "slice":
        return sliced_certificate(plan).plain()
    rows = {name: change.certificate for name, change in sorted(changes.items()) if change.certificate is not None}
    if not rows and not uncertified(plan):
        return None
    check_leaks(rows)
    return combined(plan, rows, "folded").plain()


def _dequantized(record: Manifest) -> str:
    """Where the weights came from, if the source is quantised."""
    if "dequantized_from" not in record.base:
        return ""
    name, form = for_markdown(record.base["name"]), for_markdown(record.base["dequantized_from"])
    return f"The weights were dequantised from {form} of {name} when they were loaded. "


def _loading(record: Manifest) -> str:
    if record.layout == "ragged":
        return "Its layers have MLPs of different widths, which `config.json` cannot say: only `repedit.load` reads this directory."
    return f"Plain `{record.loaders[0].removeprefix('transformers.')}.from_pretrained` loads this directory."


def _size_lines(record: Manifest) -> list[str]:
    """What changed in size, and what that does not imply."""
    if record.parameters is None:
        return []
    before, after = record.parameters["before"], record.parameters["after"]
    sizes = f"Its files hold {after:,} parameters, those of the base {before:,}."
    if record.structure == "slim":
        return ["", f"Pruned neurons and heads are cut out of the tensors ({record.layout} widths). {sizes}"]
    assert record.certificate is not None
    old, new = record.certificate["widths"]
    return [
        "",
        f"The residual stream has {new} coordinates where the base has {old}. {sizes} The place of the removed directions is "
        "gone: there is no hook to take off and no null space to fill again. The model can still hold the information in the "
        "coordinates that stay, or learn it there again.",
    ]


def _numbers(folder: Path) -> int:
    return sum(prod(spec.shape) for spec in open_shards(folder).specs.values())


def _front_matter(text: str) -> tuple[dict[str, Any], str]:
    """(fields that hold for an edited model too, body) of a card; front matter that is not YAML stays in the body."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    match = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, text.strip()
    body = text[match.end() :].strip()
    table = parse_yaml(match[1])
    if not isinstance(table, dict):
        return {}, "\n".join([*(f"    {line}" for line in match[1].splitlines()), "", body])
    return {key: table[key] for key in _CARD_FIELDS if _is_text(table.get(key))}, body


def _is_text(value: object) -> bool:
    """Whether a field of a card is a text or a list of texts."""
    return bool(value) if isinstance(value, str) else isinstance(value, list) and all(isinstance(s, str) for s in value)


def _entry(plan: Plan, name: str, change: TensorChange) -> dict[str, Any]:
    return {
        "operations": plan.describe(name),
        "relative_change": change.relative if isfinite(change.relative) else None,
        "sha256_before": change.before,
        "sha256_after": change.after,
    }


# --- The files that an export copies with the weights, and those it leaves out, with the reason


_LEFT_OUT = {
    "weights that the export does not use": (
        ".safetensors", ".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot", ".mlmodel", ".pb",
    ),
    "a pickle or a training state, which can run code when opened": (
        ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill",
    ),
    "code, which the exported model does not need": (
        ".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bash", ".bat", ".ps1", ".ipynb", ".js", ".cu", ".whl", ".jar",
    ),
    "a lock": (".lock",),
}  # fmt: skip
_QUANTIZER_CONFIGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files with which ModelOpt, GPTQ and AWQ describe quantised weights beside config.json; other programs read them."""
_REPLACED = ("config.json", CARD, MANIFEST)
_TRAINING = re.compile(r"checkpoint-\d+|__pycache__|runs|wandb")


@dataclass(frozen=True)
class Companions:
    """Files of a checkpoint beside its weights, its config and its card, by their path in it."""

    files: Mapping[str, Path] = field(default_factory=dict)
    """Files to copy, each with the regular file to read, links resolved."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Files left out, each with the reason. Hidden files and folders are ignored."""


def companions(directory: Path, used: frozenset[str], *, trusted: bool = False) -> Companions:
    """The files to copy with the weights of a checkpoint.

    Args:
        used: files of weights that are read, which are not companions.
        trusted: follow every link, because the directory is in the hub's cache and the links were made by its client.
    Raises:
        CheckpointError: if a file to copy, the config or the card is a link to a file outside the checkpoint.
    """
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    outside: list[str] = []
    for name, path in _walk(directory, left_out):
        real = Path(os.path.realpath(path))
        reason = _reason(name, used) or _special_file(real)
        if reason is None and path.is_symlink() and not trusted:
            inside = _path_inside(real, directory)
            if inside is None:
                outside.append(f"{name} -> {real}")
                continue
            hidden = any(part.startswith(".") for part in PurePosixPath(inside).parts)
            reason = "a link to a hidden file" if hidden else _reason(inside, used)
        if reason is None and name not in used and name not in _REPLACED:
            files[name] = real
        elif reason is not None:
            left_out[name] = reason
    if outside:
        raise CheckpointError(
            f"{directory} holds links to files outside it: {', '.join(outside[:5])}; those would be published with the export. "
            "Replace the links with the files (cp -L), or remove them"
        )
    return Companions(files, left_out)


def used_files(shards: Shards) -> frozenset[str]:
    """The files that hold the weights of a checkpoint."""
    return frozenset((*shards.files, *([INDEX] if shards.indexed else [])))


def copy_companions(others: Companions, folder: Path) -> None:
    """Copy the files into a folder; files that exist there are kept."""
    for name, path in others.files.items():
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _walk(folder: Path, left_out: dict[str, str], prefix: str = "") -> list[tuple[str, Path]]:
    """Every file below a folder that is not hidden, by its path; adds folders that are left out to `left_out`."""
    entries: list[tuple[str, Path]] = []
    for path in sorted(folder.iterdir()):
        name = f"{prefix}{path.name}"
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            entries.append((name, path))
        elif path.is_symlink():
            left_out[f"{name}/"] = "a link to a directory"
        elif _TRAINING.fullmatch(path.name):
            left_out[f"{name}/"] = "of a training, not of the model"
        else:
            entries += _walk(path, left_out, f"{name}/")
    return entries


def _reason(name: str, used: frozenset[str]) -> str | None:
    """Why a file is left out, by its name; None if it is not."""
    if name in used:
        return None
    path = PurePosixPath(name.lower())
    if path.name.endswith(".index.json"):
        return "an index of weights that the export does not use"
    if path.name == "adapter_config.json":
        return "the config of an adapter"
    if path.name in _QUANTIZER_CONFIGS:
        return "the config of a quantiser, and the exported weights are plain"
    return next((reason for reason, suffixes in _LEFT_OUT.items() if path.suffix in suffixes), None)


def _special_file(real: Path) -> str | None:
    try:
        regular = stat.S_ISREG(real.stat().st_mode)
    except OSError:
        return "a link that leads nowhere"
    return None if regular else "no regular file"


def _path_inside(real: Path, directory: Path) -> str | None:
    """The path of a file inside a checkpoint or among the blobs of the hub's cache; None for a file anywhere else."""
    root = Path(os.path.realpath(directory))
    if real.is_relative_to(root):
        return real.relative_to(root).as_posix()
    cache = root.parent.parent
    blobs = cache / "blobs"
    snapshot = root.parent.name == "snapshots" and cache.name.startswith("models--")
    return real.name if snapshot and real.parent == blobs else None
