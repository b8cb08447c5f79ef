"""How the forget gradient of a step is taken: at which weights, without which directions, and in which entries.

Three independent choices that any loss can use:

- An *adversary* chooses the weights at which the gradient is taken: those that a small step towards relearning gives
  (`SharpnessAware`), or a copy that was trained to relearn other forget rows (`Fork`).
- A *filter* removes from the gradient of every matrix the directions that many tokens share (`CommonPart`), or reduces
the
  leading singular directions of the gradient over the forget set (`LeadingDirections`).
- `Agreement` keeps the entries whose sign is that of the retain gradient.

No adversary uses a learning rate, split or loop of the attacks in `rp.audit`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repedit.distributed import ProcessGroup
from repedit.errors import (
    ArgumentError,
    NotEnoughRows,
    RankError,
    SelectionError,
    TrainingError,
    check_positive,
    check_whole,
    given,
)
from repedit.hashing import seed_of
from repedit.unlearning.parameters import TrainableCopy
from repedit.unlearning.sampling import cycled

# --- The choices, as values


@dataclass(frozen=True)
class SharpnessAware:
    """Take the forget gradient at theta + rho g / |g|, where g is the forget gradient at theta.

    A forget loss falls while its rows are forgotten, so the perturbation is a step towards relearning them. |g| is the
    norm over all trained tensors together. The weights are replaced for one pass and then put back, not added to and
    subtracted from, so no rounding remains in them.

    Raises:
        ArgumentError: if rho is not above 0.
    Reference: Fan et al. 2025, arXiv:2502.05374 (SAM over an unlearning loss); rho 0.01 as in its code. Foret et al. 2021,
    arXiv:2010.01412,
        equation 2.
    """

    rho: float = 0.01

    def __post_init__(self) -> None:
        check_positive(rho=self.rho)


@dataclass(frozen=True)
class Fork:
    """Take the forget gradient at a copy of the weights that has relearned other forget rows.

    Every `every` steps a new copy takes `steps` steps of gradient descent on the NLL of a random half of the facts;
    until the next one, forget gradients are those of the other half, at the copy. All wordings of a fact are in the
    same half.

    Args:
        lr: of plain gradient descent; 1e-3 as in the published code.
        held_out: False relearns and unlearns on all facts, as the published code does.
    Raises:
        ArgumentError: if a number is out of range.
    Reference: Sondej et al. 2025, arXiv:2506.12484 (MUDMAN); the halves are from Tamirisa et al. 2024,
    arXiv:2408.00761.
    """

    every: int = 10
    steps: int = 5
    lr: float = 1e-3
    held_out: bool = True

    def __post_init__(self) -> None:
        check_whole(every=self.every, steps=self.steps)
        check_positive(lr=self.lr)


@dataclass(frozen=True)
class CommonPart:
    """Remove from the gradient G of each matrix what the tokens of the forget set have in common.

    G = sum over tokens of g a^T, with a the input and g the gradient at the output of the matrix. Replacing every a by
    P_a a and every g by P_g g gives P_g G P_a, so it is enough to project G. P_a and P_g are the projections orthogonal
    to the mean and the leading principal components of a and g over the tokens that the loss reaches, apart from the
    first of each row. The components come from subspace iteration, which keeps `components` vectors and no covariance.

    Args:
        activations, gradients: numbers of principal components that are removed on each side, besides the mean.
        every: steps after which they are computed again; None for an epoch, as in the published code.
        passes: passes of subspace iteration over the forget set.
    Raises:
        ArgumentError: if a number is out of range.
    Reference: Sondej and Yang 2025, arXiv:2509.11816 (CIR); 24 and 36 directions, mean included, in its code.
    """

    activations: int = 23
    gradients: int = 35
    every: int | None = None
    passes: int = 4

    def __post_init__(self) -> None:
        check_whole(0, activations=self.activations, gradients=self.gradients)
        check_whole(passes=self.passes, **given(every=self.every))


@dataclass(frozen=True)
class LeadingDirections:
    """Reduce the leading singular directions of the forget gradient of each matrix, on both sides.

    With U S V^T the leading part of the gradient over the whole forget set, G becomes
    (I - U (1 - D) U^T) G (I - V (1 - D) V^T), where D = S_k / S ("soft": the smallest singular value is kept as it is),
    (S_k / S)^2 ("quadratic") or 0 ("hard").

    Args:
        components: k, the number of singular directions.
        every: steps after which they are computed again; None for an epoch.
    Raises:
        ArgumentError: if a number or the mode is out of range.
    Reference: Sondej, Yang and Mahdi 2026, arXiv:2606.17168 (RepSelect), soft in the paper's runs.
    """

    components: int = 64
    mode: str = "soft"
    every: int | None = None

    def __post_init__(self) -> None:
        check_whole(components=self.components, **given(every=self.every))
        if self.mode not in ("soft", "quadratic", "hard"):
            raise ArgumentError(f"mode={self.mode!r}; give 'soft', 'quadratic' or 'hard'")


@dataclass(frozen=True)
class Agreement:
    """Keep only the entries of the forget gradient that have the sign of the retain gradient.

    A step along such entries lowers both losses to first order, so it does not disrupt what is retained.

    Args:
        momentum: of the running mean of retain gradients whose sign counts; 0 for that of the step alone.
    Raises:
        ArgumentError: if it is not in [0, 1).
    Reference: Sondej et al. 2025, arXiv:2506.12484 (disruption masking), momentum 0.9 as in its code.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ArgumentError(f"momentum={self.momentum}; give a number in [0, 1)")


Adversary = SharpnessAware | Fork
GradientFilter = CommonPart | LeadingDirections
ADVERSARIES: Mapping[str, Callable[..., Adversary]] = {"sharpness_aware": SharpnessAware, "fork": Fork}
FILTERS: Mapping[str, Callable[..., GradientFilter]] = {
    "common_part": CommonPart,
    "leading_directions": LeadingDirections,
}
"""Values that recipe files can name."""


# --- Taking the gradient


@runtime_checkable
class Backward(Protocol):
    """Forward and backward passes of the forget side, which leave the gradient in `.grad`, summed over all processes."""

    def __call__(
        self, rows: Mapping[str, Sequence[int]], step: int, sums: dict[str, Tensor], *, relearn: bool = False
    ) -> None:
        """Replace the gradients.

        Args:
            rows: role -> numbers of its rows.
            sums: gets the losses.
            relearn: the NLL of the forget rows in place of the recipe's losses.
        """


@dataclass(eq=False)
class ForgetGradient:
    """Takes the forget gradient of each step."""

    trainable: TrainableCopy
    adversary: Adversary | None
    filter: GradientFilter | None
    agreement: Agreement | None
    seed: int
    facts: Sequence[str]
    """The fact of each forget row, the same for all its wordings."""
    batch_size: int
    steps_per_epoch: int
    backward: Backward
    group: ProcessGroup
    state: dict[str, Tensor] = field(default_factory=dict)
    """What later steps need of earlier ones: the fork, the directions that are removed, the mean retain gradient."""

    def __post_init__(self) -> None:
        self.matrices = linear_matrices(self.trainable, "a gradient filter works") if self.filter is not None else {}
        if self.filter is not None:
            _check_ranks(self.filter, self.trainable, self.matrices)
        if isinstance(self.adversary, Fork) and self.adversary.held_out and len(set(self.facts)) < 2:
            raise NotEnoughRows("a fork relearns half of the forget facts and there is 1; give at least 2")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self.trainable.tensors.values())

    def take(self, step: int, rows: Mapping[str, Sequence[int]], sums: dict[str, Tensor]) -> None:
        """Leave the forget gradient of a step in `.grad`; `sums` gets the losses at the weights themselves, or at the fork."""
        with self._at_adversary(step, rows, sums) as (asked, losses):
            if self.filter is not None and step % (self.filter.every or self.steps_per_epoch) == 0:
                self._find_directions(step)
            self.backward(asked, step, losses)
        if self.filter is not None:
            self._remove_directions()

    def agree(self, forget: Sequence[Tensor | None]) -> None:
        """Zero the entries of the forget gradients that the retain gradients in `.grad` disagree with."""
        if self.agreement is None:
            return
        momentum = self.agreement.momentum
        for (name, p), gradient in zip(self.trainable.tensors.items(), forget, strict=True):
            mean = torch.zeros_like(p) if p.grad is None else p.grad.detach()
            if momentum:
                before = self.state.get(f"retain/{name}", torch.zeros_like(mean))
                mean = self.state[f"retain/{name}"] = momentum * before + (1 - momentum) * mean
            if gradient is not None:
                gradient.mul_(gradient.sign() == mean.sign())

    def saved(self) -> dict[str, Tensor]:
        """The state under the names that a saved training gives it."""
        return {f"forget/{name}": value for name, value in self.state.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state from the tensors of a saved training."""
        device = self.trainable.subject.device
        saved = {name: value for name, value in tensors.items() if name.startswith("forget/")}
        self.state = {name.removeprefix("forget/"): value.to(device) for name, value in saved.items()}

    # --- The weights at which it is taken

    @contextmanager
    def _at_adversary(
        self, step: int, rows: Mapping[str, Sequence[int]], sums: dict[str, Tensor]
    ) -> Iterator[tuple[Mapping[str, Sequence[int]], dict[str, Tensor]]]:
        """The rows to unlearn and where their losses go, while the weights are those of the adversary."""
        if isinstance(self.adversary, SharpnessAware):
            self.backward(rows, step, sums)
            with replaced_by(self.parameters, _perturbed(self.parameters, self.adversary.rho)):
                yield rows, {}
        elif isinstance(self.adversary, Fork) and "forget" in rows:
            if step % self.adversary.every == 0:
                self._make_fork(self.adversary, step)
            _, asked = self._halves(self.adversary, step)
            turn = cycled("fork", len(asked), len(rows["forget"]), step, self.seed)
            fork = [self.state[f"fork/{name}"] for name in self.trainable.tensors]
            with replaced_by(self.parameters, fork):
                yield {**rows, "forget": [asked[i] for i in turn]}, sums
        else:
            yield rows, sums

    def _halves(self, fork: Fork, step: int) -> tuple[list[int], list[int]]:
        """The rows that the fork of a step relearns, and those that are unlearned at it."""
        rows = list(range(len(self.facts)))
        if not fork.held_out:
            return rows, rows
        names = sorted(set(self.facts))
        random.Random(f"{self.seed}:fork:{step // fork.every}").shuffle(names)
        relearned = set(names[: len(names) // 2])
        return [i for i in rows if self.facts[i] in relearned], [i for i in rows if self.facts[i] not in relearned]

    def _make_fork(self, fork: Fork, step: int) -> None:
        relearned, _ = self._halves(fork, step)
        copies = [p.detach().clone() for p in self.parameters]
        with replaced_by(self.parameters, copies):
            for turn in range(fork.steps):
                rows = cycled(f"relearn:{step}", len(relearned), self.batch_size, turn, self.seed)
                self.backward({"forget": [relearned[i] for i in rows]}, step, {}, relearn=True)
                with torch.no_grad():
                    for p in self.parameters:
                        if p.grad is not None:
                            p.sub_(p.grad, alpha=fork.lr)
        if not all(bool(copy.isfinite().all()) for copy in copies):
            raise TrainingError(
                f"step {step}: the fork diverged at lr {fork.lr:g}. The model given is unchanged, and error.delta holds the last "
                "good state; lower lr of the fork"
            )
        self.state |= {f"fork/{name}": copy for name, copy in zip(self.trainable.tensors, copies, strict=True)}

    # --- The directions that are removed

    def _find_directions(self, step: int) -> None:
        run = partial(self.backward, {"forget": range(len(self.facts))}, step, {})
        if isinstance(self.filter, LeadingDirections):
            run()
            for name, matrix in self.matrices.items():
                self._keep_leading(name, matrix, self.filter)
        elif isinstance(self.filter, CommonPart):
            counts = {"in": self.filter.activations, "out": self.filter.gradients}
            bases = common_directions(self.matrices, counts, self.filter.passes, self.seed, run, self.group)
            for (name, side), basis in bases.items():
                p = self.trainable.tensors[name]
                self.state[f"{side}/{name}"] = basis.to(p).contiguous()
                self.state[f"kept {side}/{name}"] = p.new_zeros(basis.shape[1])

    def _keep_leading(self, name: str, matrix: Matrix, leading: LeadingDirections) -> None:
        gradient = self.trainable.tensors[name].grad
        assert gradient is not None  # of a matrix in the graph of the loss
        u, s, vh = torch.linalg.svd(matrix.oriented(gradient), full_matrices=False)
        k, power = leading.components, {"soft": 1, "quadratic": 2, "hard": 0}[leading.mode]
        share = (s[k - 1] / s[:k].clamp(min=torch.finfo(s.dtype).tiny)) ** power if power else torch.zeros_like(s[:k])
        for side, basis in (("out", u[:, :k]), ("in", vh[:k].mT)):
            # Contiguous, as it is read from a saved training: products of other strides differ in the last digits.
            copy = basis.clone(memory_format=torch.contiguous_format)
            self.state |= {f"{side}/{name}": copy, f"kept {side}/{name}": share.clone()}

    @torch.no_grad()
    def _remove_directions(self) -> None:
        for name, matrix in self.matrices.items():
            p = self.trainable.tensors[name]
            if p.grad is None:
                continue
            gradient = matrix.oriented(p.grad)
            gradient = without(gradient, self.state[f"in/{name}"], self.state[f"kept in/{name}"])
            gradient = without(gradient.mT, self.state[f"out/{name}"], self.state[f"kept out/{name}"]).mT
            p.grad.copy_(matrix.oriented(gradient))


def without(
    matrix: Float[Tensor, "n d"], basis: Float[Tensor, "d k"], share: Float[Tensor, " k"]
) -> Float[Tensor, "n d"]:
    """The rows with the part in each direction of an orthonormal basis reduced to the share that is kept."""
    return matrix - ((matrix @ basis) * (1 - share)) @ basis.mT


@contextmanager
def replaced_by(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Give parameters other storage for a while; afterwards they have their own again, whatever happened."""
    own = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.data = value


@torch.no_grad()
def _perturbed(parameters: Sequence[nn.Parameter], rho: float) -> list[Tensor]:
    """The parameters plus rho times the unit vector of their gradients; the parameters themselves if that is zero."""
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))
    if not math.isfinite(norm) or norm == 0:
        return [p.data for p in parameters]
    return [p.data if p.grad is None else p.data + (rho / norm) * p.grad for p in parameters]


# --- What the tokens of a matrix have in common


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight with the module that multiplies by it."""

    module: nn.Module
    is_transposed: bool
    """Whether it is stored (in, out)."""

    def oriented(self, weight: Tensor) -> Float[Tensor, "out d"]:
        """The weight as (out, in); the same call restores it."""
        return weight.mT if self.is_transposed else weight


def linear_matrices(trainable: TrainableCopy, what: str) -> dict[str, Matrix]:
    """The trained weights by name.

    Args:
        what: what needs them, for the message.
    Raises:
        SelectionError: if something is trained that is not the weight of a linear module.
    """
    from transformers.pytorch_utils import Conv1D

    matrices = {}
    for name in trainable.tensors:
        path, _, leaf = name.rpartition(".")
        module = trainable.subject.model.get_submodule(path)
        if trainable.adapters is not None or leaf != "weight" or not isinstance(module, nn.Linear | Conv1D):
            raise SelectionError(
                f"{what} on the weights of linear modules, and {name!r} is trained too; select "
                "modules=('mlp.in', 'mlp.out'), without biases, embeddings, fused experts or adapters"
            )
        matrices[name] = Matrix(module, isinstance(module, Conv1D))
    return matrices


def _check_ranks(chosen: GradientFilter, trainable: TrainableCopy, matrices: Mapping[str, Matrix]) -> None:
    for name, matrix in matrices.items():
        rows, columns = matrix.oriented(trainable.tensors[name]).shape
        if isinstance(chosen, LeadingDirections):
            limits = [("components", chosen.components, min(rows, columns))]
        else:
            limits = [("activations", chosen.activations + 1, columns), ("gradients", chosen.gradients + 1, rows)]
        for what, count, limit in limits:
            if count >= limit:
                raise RankError(
                    f"{chosen} removes {count} directions of {name}, whose {what} have {limit}; give a smaller number of {what}"
                )


_SPARE = 8
"""Vectors that subspace iteration carries besides the components, so that the last of them converge."""


@dataclass(eq=False)
class _Sketch:
    """One pass of subspace iteration: the mean of some vectors, and their covariance times a basis."""

    basis: Float[Tensor, "d k"]
    count: int = 0
    total: Any = 0.0
    product: Any = 0.0

    def add(self, x: Float[Tensor, "n d"]) -> None:
        """Include some vectors."""
        x = x.double()
        self.count += len(x)
        self.total = self.total + x.sum(0)
        self.product = self.product + x.mT @ (x @ self.basis)

    def sum_over(self, group: ProcessGroup) -> None:
        """Include what the other processes saw."""
        count = group.sum(torch.tensor(float(self.count), dtype=torch.float64, device=self.basis.device))
        self.count, self.total, self.product = int(count), group.sum(self.total), group.sum(self.product)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean of the vectors."""
        return self.total / self.count

    @property
    def scattered(self) -> Float[Tensor, "d k"]:
        """The covariance, times the number of vectors, times the basis."""
        return self.product - self.count * torch.outer(self.mean, self.mean @ self.basis)

    def components(self, count: int) -> Float[Tensor, "d c"]:
        """The leading principal components within the span of the basis."""
        return self.basis @ torch.linalg.eigh(self.basis.mT @ self.scattered)[1].flip(1)[:, :count]


def common_directions(
    matrices: Mapping[str, Matrix],
    counts: Mapping[str, int],
    passes: int,
    seed: int,
    run: Callable[[], None],
    group: ProcessGroup,
) -> dict[tuple[str, str], Float[Tensor, "d k"]]:
    """Orthonormal bases of the mean and the leading principal components of inputs and output gradients.

    Args:
        counts: principal components by side, "in" and "out".
        run: one pass over all rows, forward and backward.
    Returns:
        (name, side) -> the basis, of one direction more than the components.
    Raises:
        NotEnoughRows: if there are not more tokens than directions.
    """
    sketches: dict[tuple[str, str], _Sketch] = {}
    with _watching(matrices, partial(_add, sketches, counts, seed)):
        for number in range(passes):
            if number:
                for key, sketch in sketches.items():
                    sketches[key] = _Sketch(orthonormal(sketch.scattered))
            run()
            for sketch in sketches.values():
                sketch.sum_over(group)
    return _bases(matrices, sketches, counts)


def _bases(
    matrices: Mapping[str, Matrix], sketches: Mapping[tuple[str, str], _Sketch], counts: Mapping[str, int]
) -> dict[tuple[str, str], Float[Tensor, "d k"]]:
    bases = {}
    for (name, side), sketch in sketches.items():
        if sketch.count <= counts[side] + 1:
            raise NotEnoughRows(
                f"{name}: {sketch.count} tokens of the forget set reach it, and {counts[side] + 1} directions are to be "
                "removed; give more rows, or remove fewer directions"
            )
        directions = torch.cat([sketch.mean[:, None], sketch.components(counts[side])], 1)
        bases[name, side] = orthonormal(directions)
    missing = next((name for name in matrices if (name, "in") not in bases), None)
    if missing is not None:
        raise SelectionError(f"no gradient of the forget loss reaches {missing}; select earlier layers")
    return bases


def orthonormal(directions: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """A basis of the same span. The mean is not orthogonal to the components, and removing them in turn brings it back."""
    return torch.linalg.qr(directions)[0]


def _add(
    sketches: dict[tuple[str, str], _Sketch], counts: Mapping[str, int], seed: int, name: str, side: str, x: Tensor
) -> None:
    if (name, side) not in sketches:
        generator = torch.Generator().manual_seed(seed_of(f"{seed}:{name}:{side}"))
        width = min(x.shape[-1], counts[side] + _SPARE)
        start = torch.randn(x.shape[-1], width, generator=generator, dtype=torch.float64).to(x.device)
        sketches[name, side] = _Sketch(torch.linalg.qr(start)[0])
    sketches[name, side].add(x)


@contextmanager
def _watching(matrices: Mapping[str, Matrix], add: Callable[[str, str, Tensor], None]) -> Iterator[None]:
    """Call add(name, side, vectors) with inputs and output gradients, one vector for each token that a loss reaches."""

    def watch(name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:  # the first forward pass of blocks that are recomputed
            return
        x = inputs[0].detach()

        def visit(gradient: Tensor) -> None:
            reached = gradient.ne(0).any(-1)
            if reached.ndim > 1:
                reached[:, 0] = False  # an attention sink
            add(name, "in", x[reached])
            add(name, "out", gradient[reached])

        output.register_hook(visit)

    handles = [m.module.register_forward_hook(partial(watch, name)) for name, m in matrices.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
