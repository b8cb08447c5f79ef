"""An edit as a LoRA adapter that PEFT loads: the base stays on disk and in memory, both models are served side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repedit.errors import NoOpEdit, NotFoldable
from repedit.io.files import file_hash
from repedit.io.safetensors import write_file
from repedit.io.targets import check_target, install, sync, workplace
from repedit.lower import EditOrDelta
from repedit.models.subject import Subject
from repedit.plan import Plan
from repedit.rewrite.apply import noop_message, planned

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
    """By module."""
    residual: float
    """The largest of the modules: 0 where neurons are cut, rounding where directions are projected out."""
    parameters: int


def export_adapter(
    change: EditOrDelta | Plan | Sequence[EditOrDelta],
    subject: Subject,
    target: str | Path,
    *,
    max_rank: int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Adapter:
    """Write an edit as a LoRA adapter, W' = W + B A and b' = b + c, factored in float64 and stored in float32.

    `PeftModel.from_pretrained(model, target)` makes the edited model, `model.disable_adapter()` the original again. An
    adapter is no removal: whoever holds it and the base holds both.

    Args:
        target: directory for adapter_config.json, adapter_model.safetensors and repedit.json.
        max_rank: largest rank that is accepted, such as the limit of a server; None for what is smaller than the weight.
        options: passed to lowering, as in `repedit.apply`.
    Raises:
        NotFoldable: if the edit changes anything but linear modules, or its rank does not allow an adapter.
        TargetExists: if the target exists. NoOpEdit: if nothing would change.
        QuantizedModel, OffloadedTensors, FingerprintError: as `repedit.apply`.
    """
    out = check_target(target, overwrite=overwrite, source=subject.source)
    plan = planned(change, subject, **options)
    weights, biases = _differences(plan, subject)
    if not weights and not biases:
        raise NoOpEdit(noop_message(list(plan.operations)))
    found = {path: factors(value, path, max_rank) for path, value in weights.items()}
    ranks = {path: f.a.shape[0] for path, f in found.items()}
    tensors = _tensors(found, biases)
    record = Adapter(ranks, max(f.residual for f in found.values()), sum(t.numel() for t in tensors.values()))
    with workplace(out, overwrite=overwrite) as place:
        new = place / "adapter"
        new.mkdir()
        write_file(new / "adapter_model.safetensors", tensors, {"format": "pt"})
        _json(new / "adapter_config.json", _config(subject, ranks, bias=bool(biases)))
        files = {path.name: file_hash(path) for path in sorted(new.iterdir())}
        said = {
            "edit": dict(plan.provenance), "ranks": ranks, "residual": record.residual, "structure": "adapter", "files": files,
        }  # fmt: skip
        _json(new / "repedit.json", said)
        sync(new)
        install(new, out, overwrite=overwrite)
    return record


def factors(difference: Float[Tensor, "o i"], name: str, max_rank: int | None = None) -> Factors:
    """B and A of the smallest rank with B A equal to a difference.

    Where few rows or columns differ, the factors are those and unit vectors, so that B A is bitwise the difference. Else
    A spans the rows that a growing number of seeded random combinations finds, until nothing is left, and an SVD within
    that span drops what is zero.

    Raises:
        NotFoldable: if the rank is above the limit, or two factors would be as large as the weight.
    """
    size = difference.double()
    o, i = size.shape
    limit = (o * i - 1) // (o + i)
    columns, rows = (size != 0).any(0).nonzero()[:, 0], (size != 0).any(1).nonzero()[:, 0]
    exact = min(len(columns), len(rows))
    if not exact:
        return Factors(size.new_zeros(1, i), size.new_zeros(o, 1), 0.0)
    sizes = [*takewhile(lambda n: n < min(exact, limit), (8 << n for n in range(32))), min(exact, limit)]
    found = next(filter(None, (_spanned(size, wanted) for wanted in sizes if wanted < exact)), None)
    if found is None:
        eye = torch.eye(max(o, i), dtype=torch.float64, device=size.device)
        few = len(columns) <= len(rows)
        a, b = (eye[columns, :i], size[:, columns]) if few else (size[rows], eye[:o, rows])
        found = Factors(a, b, 0.0)
    rank = found.a.shape[0]
    if rank > limit or (max_rank is not None and rank > max_rank):
        bound = (
            f"max_rank={max_rank}"
            if max_rank is not None and max_rank < limit
            else f"{limit}, beyond which it is larger than the weight"
        )
        raise NotFoldable(
            f"{name}: the difference has rank {rank}, an adapter here may have {bound}; export the whole checkpoint instead"
        )
    return found


def _spanned(size: Float[Tensor, "o i"], wanted: int) -> Factors | None:
    """Factors of at most this rank; None if they leave anything."""
    draws = torch.randn(size.shape[1], wanted, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis, _ = torch.linalg.qr(size @ draws.to(size.device))
    u, s, vt = torch.linalg.svd(basis.T @ size, full_matrices=False)
    rank = max(1, int((s > CLOSE / 100 * s[0]).sum()))
    b, a = basis @ u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vt[:rank]
    residual = float((size - b @ a).norm() / size.norm())
    return Factors(a, b, residual) if residual <= CLOSE else None


def _differences(plan: Plan, subject: Subject) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the plan adds to the weight (out, in) and to the bias (out,) of each linear module, in float64.

    A module whose bias alone changes has a weight difference of zeros.
    """
    from transformers.pytorch_utils import Conv1D

    before = {n: p.detach() for n, p in subject.model.named_parameters(remove_duplicate=False)}
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
        (weights if leaf == "weight" else biases)[path] = (
            value.T if value.ndim > 1 and isinstance(module, Conv1D) else value
        )
    for path in set(biases) - set(weights):
        weight = before[f"{path}.weight"]
        weights[path] = torch.zeros_like(weight.T if subject.architecture.transposed else weight, dtype=torch.float64)
    return weights, biases


def _tensors(found: Mapping[str, Factors], biases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names PEFT reads; it has biases in all modules or in none."""
    named = {}
    for path, f in found.items():
        sides = {"A.weight": f.a, "B.weight": f.b}
        sides |= {"B.bias": biases.get(path, f.b.new_zeros(f.b.shape[0]))} if biases else {}
        for side, value in sides.items():
            named[f"base_model.model.{path}.lora_{side}"] = value.float().cpu().contiguous()
    return named


def _config(subject: Subject, ranks: Mapping[str, int], *, bias: bool) -> dict[str, Any]:
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base(subject),
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


def _base(subject: Subject) -> str | None:
    if subject.source is None:
        return None
    hub_id = None if subject.origin is None else subject.origin.hub_id
    return str(subject.source) if hub_id is None else hub_id


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
