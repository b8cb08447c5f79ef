"""An edit as a LoRA adapter for PEFT, so that the base and the edited model can be served side by side; and back."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repedit.arguments import checked
from repedit.delta import Delta
from repedit.errors import CheckpointError, FingerprintError, NoOpEdit, NotFoldable, is_finite
from repedit.hashing import value_hash
from repedit.io.files import file_hash, open_regular, user_path
from repedit.io.safetensors import read_open_header, read_tensor, write_file
from repedit.io.targets import check_target, install, staging_folder, sync_files
from repedit.io.text import read_json
from repedit.lower import Change
from repedit.models.subject import Subject
from repedit.plan import LoweringOptions, Plan
from repedit.rewrite.apply import check_editable, named_parameters, no_op_message, plan_in_memory

CLOSE = 1e-9
"""Largest norm of what the factors leave of a difference, as a share of the difference."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A difference of one weight (out, in) as B A."""

    a: Float[Tensor, "r i"]
    b: Float[Tensor, "o r"]
    residual: float
    """||D - B A|| / ||D|| in float64, before A and B are stored in float32."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """What was written."""

    ranks: Mapping[str, int]
    """Rank by module."""
    residual: float
    """The largest residual of a module: 0 if neurons are cut, rounding if directions are projected out."""
    parameters: int


@checked
def export_adapter(
    change: Change,
    subject: Subject,
    target: str | Path,
    *,
    max_rank: int | None = None,
    overwrite: bool = False,
    **options: Unpack[LoweringOptions],
) -> Adapter:
    """Write an edit as a LoRA adapter, W' = W + B A and b' = b + c, factored in float64 and stored in float32.

    `PeftModel.from_pretrained(model, target)` gives the edited model, `model.disable_adapter()` the original again. An
    adapter removes nothing: whoever has it and the base has both models.

    Args:
        target: directory for adapter_config.json, adapter_model.safetensors and repedit.json.
        max_rank: largest rank to accept, such as the limit of a server; None to accept what is smaller than the weight.
        options: passed to lowering, as in `repedit.apply`.
    Raises:
        NotFoldable: if the edit changes anything but linear modules, or its rank is too large for an adapter.
        TargetExists: if the target exists. NoOpEdit: if nothing would change.
        QuantizedModel, OffloadedTensors, FingerprintError: as `repedit.apply`.
    """
    out = check_target(target, overwrite=overwrite, source=subject.source)
    plan = plan_in_memory(change, subject, **options)
    weights, biases = _differences(plan, subject)
    if not weights and not biases:
        raise NoOpEdit(no_op_message(list(plan.operations)))
    by_module = {path: factors(value, path, max_rank) for path, value in weights.items()}
    ranks = {path: f.a.shape[0] for path, f in by_module.items()}
    tensors = _peft_tensors(by_module, biases)
    residual = max(f.residual for f in by_module.values())
    record = Adapter(ranks, residual, sum(t.numel() for t in tensors.values()))
    with staging_folder(out, overwrite=overwrite) as staging:
        new = staging / "adapter"
        new.mkdir()
        write_file(new / "adapter_model.safetensors", tensors, {"format": "pt"})
        _write_json(new / "adapter_config.json", _config(subject, ranks, bias=bool(biases)))
        files = {path.name: file_hash(path) for path in sorted(new.iterdir())}
        edit = dict(plan.provenance)
        manifest = {"edit": edit, "ranks": ranks, "residual": residual, "structure": "adapter", "files": files}
        _write_json(new / "repedit.json", manifest)
        sync_files(new)
        install(new, out, overwrite=overwrite)
    return record


@checked
def import_adapter(folder: str | Path, subject: Subject) -> Delta:
    """The difference that a LoRA adapter of PEFT makes to a model, alpha / r B A (alpha / sqrt(r) B A for rsLoRA), as a delta.

    `import_adapter(target, subject)` of what `export_adapter(edit, subject, target)` wrote changes the weights as the edit
    does, up to float32 rounding. Like a trained delta, it belongs to the weights of this subject.

    Args:
        folder: directory with adapter_config.json and adapter_model.safetensors. A pickled adapter_model.bin is not read.
    Raises:
        NotFoldable: if the adapter is not a plain LoRA of linear modules: DoRA, trained biases, modules saved whole, an
            initialization that changes the base (PiSSA, OLoRA), any option that is not known here; if it changes a module
            whose weight is tied to another, where PEFT changes one of both.
        FingerprintError: if it changes a tensor that the model does not have, or one of another shape.
        QuantizedModel, OffloadedTensors: if the weights are not ordinary tensors in memory.
        CheckpointError: if the files cannot be read, lack a matrix, or contradict the config.
    Source: Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    """
    root = user_path(folder)
    config = read_json(root / "adapter_config.json", CheckpointError)
    _check_plain_lora(config, root)
    path = root / "adapter_model.safetensors"
    with open_regular(path) as file:
        entries, _ = read_open_header(file, path)
        tensors = {name: read_tensor(file, path, name, entry) for name, entry in entries.items()}
    check_editable(subject)
    parameters = named_parameters(subject.model)
    differences: dict[str, Tensor] = {}
    for module, sides in _by_module(tensors, path).items():
        scale = _scale(config, module, len(sides["A.weight"]))
        value = scale * sides["B.weight"] @ sides["A.weight"]
        # PEFT too goes by the class of the module, whatever the config says of fan_in_fan_out.
        differences[f"{module}.weight"] = value.T if _is_conv1d(subject.model, module) else value
        if "B.bias" in sides:
            differences[f"{module}.bias"] = scale * sides["B.bias"]
    _check_untied(differences, parameters, path)
    for name, value in differences.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape != tuple(value.shape) and not (shape is None and name.endswith(".bias") and not bool(value.any())):
            held = "no such tensor" if shape is None else f"one of shape {shape}"
            raise FingerprintError(
                f"{path} changes {name} by a difference of shape {tuple(value.shape)}, the model has {held}; was the adapter "
                "trained on another model?"
            )
    tensors = {name: value.float().contiguous() for name, value in differences.items() if name in parameters}
    start = {name: value_hash(parameters[name]) for name in tensors}
    provenance = {"method": "adapter", "adapter": file_hash(path), "model": subject.fingerprint(), "start": start}
    return Delta(tensors, provenance)


_LORA_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>A\.weight|B\.weight|B\.bias)")
_HARMLESS = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "lora_alpha",
    "lora_dropout", "lora_bias", "use_rslora", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "lora_ga_config",
    "corda_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
))  # fmt: skip
"""Options of PEFT that this reads, or that say how an adapter was trained and change nothing of what its files compute."""
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica", "lora_ga"),
}  # fmt: skip
"""What else than nothing the other options may have been set to; every other initialization changes the base on loading."""
_NOTHING: tuple[object, ...] = (None, False, [], {}, "")


def _check_plain_lora(config: Mapping[str, Any], root: Path) -> None:
    """Refuse whatever is not known to leave alpha / r B A as the difference; an option of a later PEFT among it."""
    kind = config.get("peft_type")
    other = next(
        (
            f"{key}={value!r}"
            for key, value in config.items()
            if key not in _HARMLESS and value not in _NOTHING and value not in _PLAIN.get(key, ())
        ),
        None,
    )
    if kind != "LORA" or other:
        raise NotFoldable(
            f"{root} holds an adapter with {other or f'peft_type={kind!r}'}, which is no plain LoRA; merge it with PEFT and use "
            "repedit.diff"
        )
    patterns = [config.get(key) for key in ("rank_pattern", "alpha_pattern")]
    switches = [config.get(key) for key in ("use_rslora", "lora_bias")]
    if not all(p is None or isinstance(p, dict) for p in patterns) or not all(
        s in (None, False, True) for s in switches
    ):
        raise CheckpointError(
            f"{root / 'adapter_config.json'} has rank_pattern, alpha_pattern {patterns!r:.100} and use_rslora, lora_bias "
            f"{switches!r:.100}; two objects and two truth values were expected; download it again"
        )


def _by_module(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """The matrices of each module in float64, by side: A (r, in), B (out, r) and perhaps a bias (out,).

    Raises:
        NotFoldable: if a tensor is no part of a LoRA. CheckpointError: if a matrix is missing, or two do not fit.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        match = _LORA_NAME.fullmatch(name)
        if match is None or not tensors[name].is_floating_point():
            raise NotFoldable(
                f"{path}: {name} is no matrix of a LoRA; merge the adapter with PEFT and use repedit.diff"
            )
        modules.setdefault(match["module"], {})[match["side"]] = tensors[name].double()
    if not modules:
        raise CheckpointError(f"{path} holds no matrix of a LoRA; the file is not whole")
    for module, sides in modules.items():
        absent = next((side for side in ("A.weight", "B.weight") if side not in sides), None)
        if absent:
            raise CheckpointError(
                f"{path}: {module} has {', '.join(f'lora_{side}' for side in sides)} and no lora_{absent} beside it; the file is "
                "not whole"
            )
        a, b, bias = sides["A.weight"], sides["B.weight"], sides.get("B.bias")
        fits = a.ndim == b.ndim == 2 and 0 < len(a) == b.shape[1] and (bias is None or bias.shape == b.shape[:1])
        if not fits:
            shapes = {f"lora_{side}": list(value.shape) for side, value in sides.items()}
            raise CheckpointError(f"{path}: the matrices of {module} do not fit together: {shapes}; download it again")
    return modules


def _is_conv1d(model: nn.Module, module: str) -> bool:
    """Whether a module stores its weight as (in, out); False for one that does not exist, which is refused by its name."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(dict(model.named_modules()).get(module), Conv1D)


def _check_untied(changed: Mapping[str, Tensor], parameters: Mapping[str, Tensor], path: Path) -> None:
    uses = Counter(id(p) for p in parameters.values())
    tied = next((name for name in changed if name in parameters and uses[id(parameters[name])] > 1), None)
    if tied is not None:
        raise NotFoldable(
            f"{path} changes {tied}, which the model ties to another tensor: a delta changes both, PEFT only one of them; "
            "merge the adapter with PEFT and use repedit.diff"
        )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of a module, either of which may be that of a pattern; r is the rank that its matrices have."""
    said = _of_module(config, module, "rank_pattern", "r")
    if said is not None and said != rank:
        raise CheckpointError(
            f"adapter_config.json gives {module} the rank {said!r}, its matrices have rank {rank}; are the two files of one "
            "adapter?"
        )
    alpha = _of_module(config, module, "alpha_pattern", "lora_alpha")
    if not is_finite(alpha):
        raise CheckpointError(f"adapter_config.json gives no number as lora_alpha: {alpha!r}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(config: Mapping[str, Any], module: str, patterns: str, default: str) -> Any:
    """The value that the first pattern which fits a module gives, otherwise that of all modules."""
    try:
        by_pattern = (config.get(patterns) or {}).items()
        return next((v for key, v in by_pattern if re.fullmatch(rf"(.*\.)?({key})", module)), config.get(default))
    except re.error as error:
        raise CheckpointError(
            f"{patterns} of adapter_config.json holds no pattern: {error}; download it again"
        ) from error


def factors(difference: Float[Tensor, "o i"], name: str, max_rank: int | None = None) -> Factors:
    """B and A of the smallest rank with B A equal to a difference.

    If few rows or columns differ, the factors are those and unit vectors, so that B A is bitwise the difference. Otherwise
    a randomised range finder grows the span of B until nothing of the difference remains, and an SVD within that span drops
    the zero directions.

    Raises:
        NotFoldable: if the rank is above the limit, or the two factors would be as large as the weight.
    """
    difference = difference.double()
    o, i = difference.shape
    limit = (o * i - 1) // (o + i)
    columns, rows = (difference != 0).any(0).nonzero()[:, 0], (difference != 0).any(1).nonzero()[:, 0]
    exact = min(len(columns), len(rows))
    if not exact:
        return Factors(difference.new_zeros(1, i), difference.new_zeros(o, 1), 0.0)
    ranks = [*takewhile(lambda n: n < min(exact, limit), (8 << n for n in range(32))), min(exact, limit)]
    candidates = (_low_rank_factors(difference, rank) for rank in ranks if rank < exact)
    result = next((candidate for candidate in candidates if candidate is not None), None)
    if result is None:
        eye = torch.eye(max(o, i), dtype=torch.float64, device=difference.device)
        few_columns = len(columns) <= len(rows)
        a, b = (eye[columns, :i], difference[:, columns]) if few_columns else (difference[rows], eye[:o, rows])
        result = Factors(a, b, 0.0)
    rank = result.a.shape[0]
    if rank > limit or (max_rank is not None and rank > max_rank):
        bound = f"{limit}, beyond which it is larger than the weight"
        if max_rank is not None and max_rank < limit:
            bound = f"max_rank={max_rank}"
        raise NotFoldable(
            f"{name}: the difference has rank {rank}, an adapter here may have {bound}; export the whole checkpoint instead"
        )
    return result


def _low_rank_factors(difference: Float[Tensor, "o i"], max_rank: int) -> Factors | None:
    """Factors of at most this rank, from a seeded random projection; None if they do not equal the difference."""
    draws = torch.randn(difference.shape[1], max_rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis, _ = torch.linalg.qr(difference @ draws.to(difference.device))
    u, s, vt = torch.linalg.svd(basis.T @ difference, full_matrices=False)
    rank = max(1, int((s > CLOSE / 100 * s[0]).sum()))
    b, a = basis @ u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vt[:rank]
    residual = float((difference - b @ a).norm() / difference.norm())
    return Factors(a, b, residual) if residual <= CLOSE else None


def _differences(plan: Plan, subject: Subject) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The change of the weight (out, in) and of the bias (out,) of each linear module, in float64.

    A module of which only the bias changes has a weight difference of zeros.
    """
    from transformers.pytorch_utils import Conv1D

    before = {name: p.detach() for name, p in named_parameters(subject.model).items()}
    if plan.unties:
        head, source = next(iter(plan.unties.items()))
        raise NotFoldable(f"the edit unties {head} from {source}, which no adapter can; export the checkpoint")
    weights, biases = dict[str, Tensor](), dict[str, Tensor]()
    for name in plan.operations:
        old = before[name].double() if name in before else torch.zeros(plan.added[name].shape, dtype=torch.float64)
        value = plan.apply(name, old, lambda other: before[other].double()) - old
        if not bool(value.any()):
            continue
        path, _, leaf = name.rpartition(".")
        module = subject.model.get_submodule(path)
        if leaf not in ("weight", "bias") or not isinstance(module, nn.Linear | Conv1D):
            raise NotFoldable(f"the edit changes {name}, which belongs to no linear module; export the checkpoint")
        differences = weights if leaf == "weight" else biases
        differences[path] = value.T if value.ndim > 1 and isinstance(module, Conv1D) else value
    for path in set(biases) - set(weights):
        weight = before[f"{path}.weight"]
        weights[path] = torch.zeros_like(weight.T if subject.architecture.transposed else weight, dtype=torch.float64)
    return weights, biases


def _peft_tensors(by_module: Mapping[str, Factors], biases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in PEFT, which has biases in all modules or in none."""
    tensors = {}
    for path, f in by_module.items():
        sides = {"A.weight": f.a, "B.weight": f.b}
        sides |= {"B.bias": biases.get(path, f.b.new_zeros(f.b.shape[0]))} if biases else {}
        for side, value in sides.items():
            tensors[f"base_model.model.{path}.lora_{side}"] = value.float().cpu().contiguous()
    return tensors


def _config(subject: Subject, ranks: Mapping[str, int], *, bias: bool) -> dict[str, Any]:
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_model(subject),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
        "target_modules": sorted(ranks),
        "fan_in_fan_out": subject.architecture.transposed,
        "lora_dropout": 0.0,
        "lora_bias": bias,
        "bias": "none",
        "inference_mode": True,
    }


def _base_model(subject: Subject) -> str | None:
    if subject.source is None:
        return None
    hub_id = None if subject.origin is None else subject.origin.hub_id
    return str(subject.source) if hub_id is None else hub_id


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
