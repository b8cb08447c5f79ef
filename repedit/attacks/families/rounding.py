"""Attack by rounding: store the matrices of the blocks in few bits, which swallows updates smaller than a step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.attacks.asking import ask
from repedit.attacks.attack import Attack, Outcome
from repedit.attacks.families.shipped import SHIPPED, stored
from repedit.attacks.scratch import Scratch
from repedit.data import Splits
from repedit.errors import ArgumentError, FingerprintError, QuantizedModel, UnknownName, nearest
from repedit.models import Subject

log = logging.getLogger("repedit")
GROUP = 64
BITS = {"int8": 8, "int4": 4, "int3": 3}
_FP4 = (0.0, 0.00520833, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0)
LEVELS = {
    "nf4": (-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
            0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0),
    "fp4": (*(-level for level in _FP4[:0:-1]), *_FP4),
}  # fmt: skip
SCHEMES = (*BITS, *LEVELS, *SHIPPED)


def quantize(*, schemes: Sequence[str] = ("int8", "int4", "nf4", "fp4")) -> Attack:
    """Round every matrix of the blocks to few bits and ask; embeddings, head, norms and biases stay as they are.

    Settings are named by scheme. Where the group does not divide the width of a matrix, its rows are the groups; the
    names of such matrices are logged and stand in the details.

    Raises:
        UnknownName: if there is no such scheme.
        ArgumentError: if there are no schemes.
        QuantizedModel: in the call, if the model is quantised already.
    Reference: Zhang et al. 2024, arXiv:2410.16454.
    """
    if not schemes:
        raise ArgumentError(f"schemes={schemes!r}; give at least one of {SCHEMES}")
    for scheme in schemes:
        _check_scheme(scheme)

    def run(subject: Subject, splits: Splits, seed: int) -> Outcome:
        names = projections(subject)
        scratch = Scratch(subject)
        per_row = [name for name, size in _widths(subject, names).items() if size % GROUP]
        if per_row and set(schemes) - {"int8"}:
            log.info(
                "quantize: %d does not divide the width of %d matrices, their rows are the groups: %s",
                GROUP, len(per_row), ", ".join(per_row),
            )  # fmt: skip
        found = {}
        for scheme in schemes:
            copy = scratch.restore()
            round_matrices(copy, names, scheme)
            found[scheme] = ask(copy, splits.test)
        return Outcome(found, details={"touched": len(names), "per_row": per_row})

    return Attack("quantize", "rounding", "W", False, {"schemes": list(schemes), "group": GROUP}, run, draws=False)


def rounded(weight: Float[Tensor, "*rows i"], scheme: str, group: int = GROUP) -> Float[Tensor, "*rows i"]:
    """A weight (out, in) as it is after being stored in few bits and read again, computed in float32.

    int8: D = max|w| / 127 of each row, round(w / D) D. int4, int3: the same with 7 and 3 in groups along the inputs.
    nf4, fp4: the level nearest to w / max|w| of its group, times max|w|. A group of zeros stays zero; where `group`
    does not divide the width, each row is a group. torchao-int8, torchao-int4, hqq-int4: as those packages store it.

    Raises:
        UnknownName: if there is no such scheme.
        ArgumentError: if the group is below 1.
        MissingDependency: if the scheme is that of a package that is not installed.
    """
    _check_scheme(scheme)
    if group < 1:
        raise ArgumentError(f"group={group}; give the number of inputs that share a step, at least 1")
    if scheme in SHIPPED:
        return stored(weight, scheme, group)
    width = weight.shape[-1]
    size = width if scheme == "int8" or width % group else group
    blocks = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(-1, (-1, size))
    top = blocks.abs().amax(-1, keepdim=True)
    if scheme in BITS:
        most = 2 ** (BITS[scheme] - 1) - 1
        step = top / most
        # A share of the maximum, not a number of steps: the maximum stays as it is, so rounding twice changes nothing.
        share = (blocks / step.where(step > 0, 1)).round() / most
    else:
        levels = torch.tensor(LEVELS[scheme], dtype=blocks.dtype, device=blocks.device)
        share = levels[torch.bucketize((blocks / top.where(top > 0, 1)).contiguous(), (levels[1:] + levels[:-1]) / 2)]
    return (share * top).flatten(-2).to(weight.dtype)


def projections(subject: Subject) -> dict[str, bool]:
    """The matrices inside the blocks by name, tied ones once, and whether they are stored (in, out).

    The experts of a layer are one tensor (expert, out, in).

    Raises:
        QuantizedModel: if the weights are quantised.
    """
    starts = tuple(f"{path}." for path in subject.anatomy.block_paths)
    named = {n: p for n, p in subject.model.named_parameters() if n.startswith(starts) and p.ndim > 1}
    odd = next((f"{n} is {p.dtype}" for n, p in named.items() if not p.is_floating_point()), None)
    if subject.quantizer or odd:
        raise QuantizedModel(
            f"the weights are quantised ({subject.quantizer or odd}); attack the unquantised model, or load it with "
            "dequantisation"
        )
    return {name: subject.architecture.transposed and p.ndim == 2 for name, p in named.items()}


def round_matrices(subject: Subject, names: Mapping[str, bool], scheme: str) -> None:
    """Round the matrices of a model in place; `names` as `projections` gives them.

    Raises:
        UnknownName: if there is no such scheme.
    """
    named = dict(subject.model.named_parameters())
    with torch.no_grad():
        for name, transposed in names.items():
            matrix = named[name].mT if transposed else named[name]
            matrix.copy_(rounded(matrix, scheme))


def survival(edited: Subject, original: Subject, scheme: str) -> dict[str, dict[str, float]]:
    """How much of each changed matrix's update would survive rounding; shown, never deciding.

    "cosine" is that of Q(w') - Q(w) with w' - w, 0 where nothing is left of it; "relative" is the root mean square of
    w' - w over the standard deviation of w.

    Raises:
        FingerprintError: if the models do not hold the same tensors.
        UnknownName: if there is no such scheme.
    """
    found = {}
    inside = projections(edited)
    for name, after, before in paired(edited, original):
        if name not in inside or torch.equal(after, before):
            continue
        mine, old = (w.float().mT if inside[name] else w.float() for w in (after, before))
        true, kept = mine - old, rounded(mine, scheme) - rounded(old, scheme)
        size = float(true.double().norm() * kept.double().norm())
        found[name] = {
            "cosine": float((true.double() * kept.double()).sum()) / size if size else 0.0,
            "relative": float(true.square().mean().sqrt() / old.std()),
        }
    return found


def paired(edited: Subject, original: Subject) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, edited, original) of every parameter, the original's on the device of the edited.

    Raises:
        FingerprintError: if the models do not hold the same tensors.
    """
    others = dict(original.model.named_parameters())
    mine = dict(edited.model.named_parameters())
    odd = sorted(set(mine) ^ set(others)) or [n for n in mine if mine[n].shape != others[n].shape]
    if odd:
        raise FingerprintError(
            f"the edited and the original model differ in {len(odd)} tensors, such as {odd[0]!r}; give the model that was edited"
        )
    for name, p in mine.items():
        yield name, p.detach(), others[name].detach().to(p.device)


def _widths(subject: Subject, names: dict[str, bool]) -> dict[str, int]:
    return {name: subject.specs[name].shape[-2 if transposed else -1] for name, transposed in names.items()}


def _check_scheme(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise UnknownName(f"scheme {scheme!r}; {nearest(scheme, SCHEMES)}")
