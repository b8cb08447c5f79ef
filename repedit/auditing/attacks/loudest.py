"""Attack by dropping the largest singular directions of every matrix, which undoes edits that write with one strong direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Scratch, Work, ask, checked_names, register
from repedit.auditing.attacks.weights import projections
from repedit.data import Splits
from repedit.errors import ArgumentError, is_whole
from repedit.models.subject import Subject

WAYS = ("cut", "level")
"""What is done with the loudest directions: removed, or made as loud as the loudest one that is left."""
WHERE = ("write", "all")
"""The matrices that write into the stream, or every matrix of the blocks."""


def loudest(*, tops: Sequence[int] = (1, 2, 4), ways: Sequence[str] = WAYS, where: Sequence[str] = WHERE) -> Attack:
    """Take the largest singular values of every matrix down and ask; embeddings, head and norms stay as they are.

    W = U S V^T with singular values s1 >= s2 >= ...; of the first k, "cut" makes 0 and "level" makes s_{k+1}. Settings are
    "top=1 cut write", with "write" for the outputs of attention and MLPs and "all" for every matrix of the blocks. A matrix
    with at most k singular values stays.

    Raises:
        ArgumentError: if a number is not a whole one of at least 1, or nothing is given.
        UnknownName: if a way or a place is not known.
        QuantizedModel: in the call, if the weights are quantised.
    Reference: 2025, arXiv:2505.20819.
    """
    if not tops or not all(is_whole(top, 1) for top in tops):
        raise ArgumentError(f"tops={tuple(tops)}; give whole numbers of at least 1")
    chosen_ways, chosen_places = checked_names("way", ways, WAYS), checked_names("place", where, WHERE)

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        every = projections(subject)
        writing = {part.out.tensor for part in subject.layout.parts}
        places = {"write": {n: t for n, t in every.items() if n in writing}, "all": every}
        scratch, answers = Scratch(subject), {}
        for place, way, top in product(chosen_places, chosen_ways, tops):
            copy = scratch.restore()
            quieten(copy, places[place], top, way)
            answers[f"top={top} {way} {place}"] = ask(copy, splits.test)
        return AttackResult(answers, details={"touched": {place: len(names) for place, names in places.items()}})

    options = {"tops": list(tops), "ways": list(ways), "where": list(where)}
    return Attack(LOUDEST, options, run, Work(float(len(tops) * len(ways) * len(where))))


LOUDEST = register(
    AttackRecord("loudest", cost=95, budget="standard", build=lambda setup: [loudest()], level="W", draws=False)
)


def quieten(subject: Subject, names: Mapping[str, bool], top: int, way: str) -> None:
    """Take down the loudest directions of matrices of a model in place; `names` as `projections` gives them."""
    parameters = dict(subject.model.named_parameters())
    with torch.no_grad():
        for name in names:
            # A transposed matrix has the same singular values, and experts are matrices of a batch.
            parameters[name].copy_(quiet(parameters[name], top, way))


def quiet(weight: Float[Tensor, "*e o i"], top: int, way: str) -> Float[Tensor, "*e o i"]:
    """A matrix whose `top` largest singular values are 0 ("cut") or as large as the next one ("level")."""
    if min(weight.shape[-2:]) <= top:
        return weight
    matrix = weight.double()
    wide = matrix.shape[-1] > matrix.shape[-2]
    tall = matrix.mT if wide else matrix
    # The Gram matrix of the smaller side: an exact eigendecomposition that costs less than all singular vectors.
    values, vectors = torch.linalg.eigh(tall.mT @ tall)
    loud, sizes = vectors[..., -top:], values[..., -top - 1 :].clamp(min=0).sqrt()
    share = sizes[..., :1] / sizes[..., 1:].clamp(min=1e-300) if way == "level" else torch.zeros_like(sizes[..., 1:])
    rest = tall - ((tall @ loud) * (1 - share)[..., None, :]) @ loud.mT
    return (rest.mT if wide else rest).to(weight.dtype)
