"""Attacks that change the weights without training: rounding, noise, pruning, shrinking, loud directions taken down, and
embeddings given back by the head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from repedit.activations.forward import batches, inputs_of, loss_of
from repedit.auditing.attack import (
    QUICK,
    Attack,
    AttackRecord,
    AttackResult,
    Scratch,
    Setup,
    Work,
    ask,
    checked_names,
    register,
    skipped,
)
from repedit.data import Fact, Rows, Splits
from repedit.errors import ArgumentError, FingerprintError, FractionError, NotFinite, is_whole
from repedit.hashing import seed_of
from repedit.hooks import evaluating
from repedit.models.subject import Subject
from repedit.quantization import (
    GROUP,
    SCHEMES,
    check_scheme,
    fake_quantize,
    installed_schemes,
    update_cosine,
)

# --- Rounding: the matrices of the blocks are stored in few bits, which undoes updates smaller than a step


log = logging.getLogger("repedit")


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
        check_scheme(scheme)

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        names = projections(subject)
        scratch = Scratch(subject)
        per_row = [
            name for name, transposed in names.items() if subject.specs[name].shape[-2 if transposed else -1] % GROUP
        ]
        if per_row and set(schemes) - {"int8"}:
            log.info(
                "quantize: %d does not divide the width of %d matrices, their rows are the groups: %s",
                GROUP, len(per_row), ", ".join(per_row),
            )  # fmt: skip
        answers = {}
        for scheme in schemes:
            copy = scratch.restore()
            round_matrices(copy, names, scheme)
            answers[scheme] = ask(copy, splits.test)
        return AttackResult(answers, details={"touched": len(names), "per_row": per_row})

    return Attack(QUANTIZE, {"schemes": list(schemes), "group": GROUP}, run, Work(len(schemes)))


def _schemes(setup: Setup) -> tuple[str, ...]:
    if setup.budget == QUICK:
        return "int4", "nf4"  # 8 bits change little
    return ("int8", "int4", "nf4", "fp4", *(() if setup.small else ("int3", *installed_schemes())))


QUANTIZE = register(
    AttackRecord(
        "quantize", cost=80, budget=QUICK, build=lambda setup: [quantize(schemes=_schemes(setup))], level="W",
        draws=False,
    )
)  # fmt: skip


def projections(subject: Subject) -> dict[str, bool]:
    """The matrices inside the blocks by name, tied ones once, and whether they are stored (in, out).

    The experts of a layer are one tensor (expert, out, in).

    Raises:
        QuantizedModel: if the weights are quantised.
    """
    starts = tuple(f"{path}." for path in subject.layout.block_paths)
    named = {n: p for n, p in subject.model.named_parameters() if n.startswith(starts) and p.ndim > 1}
    subject.check_unquantized("changed")
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
            matrix.copy_(fake_quantize(matrix, scheme))


def survival(edited: Subject, original: Subject, scheme: str) -> dict[str, dict[str, float]]:
    """How much of each changed matrix's update would survive rounding; shown, never deciding.

    "cosine" is that of Q(w') - Q(w) with w' - w, 0 where nothing is left of it; "relative" is the root mean square of
    w' - w over the standard deviation of w.

    Raises:
        FingerprintError: if the models do not hold the same tensors.
        UnknownName: if there is no such scheme.
    """
    by_matrix = {}
    inside = projections(edited)
    for name, after, before in paired(edited, original):
        if name not in inside or torch.equal(after, before):
            continue
        new, old = (w.float().mT if inside[name] else w.float() for w in (after, before))
        by_matrix[name] = {
            "cosine": update_cosine(old, new, scheme),
            "relative": float((new - old).square().mean().sqrt() / old.std()),
        }
    return by_matrix


def paired(edited: Subject, original: Subject) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, edited, original) of every parameter, the original's on the device of the edited.

    Raises:
        FingerprintError: if the models do not hold the same tensors.
    """
    originals = dict(original.model.named_parameters())
    parameters = dict(edited.model.named_parameters())
    different = sorted(set(parameters) ^ set(originals)) or [
        n for n in parameters if parameters[n].shape != originals[n].shape
    ]
    if different:
        raise FingerprintError(
            f"the edited and the original model differ in {len(different)} tensors, such as {different[0]!r}; give the model that was edited"
        )
    for name, p in parameters.items():
        yield name, p.detach(), originals[name].detach().to(p.device)


# --- Noise, pruning, shrinking towards fresh weights, and pruning what only T needs


PAIRS = ((0.01, 0.01), (0.01, 0.05), (0.02, 0.02), (0.05, 0.01), (0.05, 0.05), (0.1, 0.1))
FULL_PAIRS = tuple((p / 100, q / 100) for p in (1, 2, 3, 5, 10) for q in (1, 2, 3, 4, 5, 6, 7, 8, 10))
"""Forty-five pairs for the full budget."""
# Facts have no length limit of their own; the longest row sets the width of its batch.
_LONG = 1 << 20

Change = Callable[[Tensor, torch.Generator], Tensor]


def perturb(
    *,
    noise: Sequence[float] = (0.05, 0.1, 0.2),
    prune: Sequence[float] = (0.1, 0.3),
    shrink: Sequence[float] = (0.1, 0.3),
    xavier: float = 0.1,
) -> Attack:
    """Ask after small blind changes of the weights, drawn for each tensor from the seed and its name.

    "noise=s": every matrix w of the blocks becomes w + s std(w) N(0, 1). "prune=p": the share p of its entries that is
    smallest in size becomes 0. "shrink=a": every tensor becomes (1 - a) w, and every matrix, embeddings included,
    (1 - a) w + a * xavier * X with X ~ N(0, 2 / (in + out)). An expert is a matrix of its own.

    Raises:
        ArgumentError: if a noise is not positive, xavier is negative, or nothing is asked for.
        FractionError: if another number is not strictly between 0 and 1.
    """
    if not (*noise, *prune, *shrink):
        raise ArgumentError("noise, prune and shrink are all empty; give at least one number")
    _check_amounts(noise, (*prune, *shrink), xavier)
    changes: dict[str, tuple[Change, bool]] = {f"noise={s:g}": (partial(noisy, size=s), False) for s in noise}
    changes |= {f"prune={p:g}": (partial(_pruned, fraction=p), False) for p in prune}
    changes |= {f"shrink={a:g}": (partial(shrunk, share=a, xavier=xavier), True) for a in shrink}

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        matrices = projections(subject)
        scratch = Scratch(subject)
        answers = {}
        for setting, (change, everywhere) in changes.items():
            copy = scratch.restore()
            _change(copy, None if everywhere else matrices, change, seed)
            answers[setting] = ask(copy, splits.test)
        return AttackResult(answers, details={"touched": len(matrices)})

    numbers = {"noise": list(noise), "prune": list(prune), "shrink": list(shrink), "xavier": xavier}
    return Attack(PERTURB, numbers, run, Work(7.0))


PERTURB = register(AttackRecord("perturb", cost=90, budget="standard", build=lambda setup: [perturb()], level="W"))


def set_difference(*, pairs: Sequence[tuple[float, float]] = PAIRS) -> Attack:
    """Prune what the edited model needs for T and not for the retain facts, and ask V.

    The score of a weight is the mean over facts of |w dL/dw|, L the loss on the answer. In every matrix of the blocks,
    entries among the share p highest on T and not among the share q highest on the retain facts become 0. Settings are
    named "p=0.01 q=0.05".

    Raises:
        ArgumentError: if there are no pairs.
        FractionError: if a share is not strictly between 0 and 1.
        NotFinite: in the call, if a loss is not finite.
    Reference: Wei et al. 2024, arXiv:2402.05162; Lucki et al. 2024, arXiv:2409.18025.
    """
    if not pairs:
        raise ArgumentError("pairs=(); give at least one (p, q)")
    _check_amounts((), [share for pair in pairs for share in pair], 0.0)

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        if not splits.retain:
            return skipped("needs retain facts, to leave alone what they use")
        matrices = projections(subject)
        scratch = Scratch(subject)
        forget_saliency, retain_saliency = (
            saliency(scratch.restore(), facts, matrices) for facts in (splits.train, splits.retain)
        )
        answers, pruned_counts = {}, {}
        for p, q in pairs:
            copy, setting = scratch.restore(), f"p={p:g} q={q:g}"
            pruned_counts[setting] = _cut(copy, forget_saliency, retain_saliency, p, q)
            answers[setting] = ask(copy, splits.test)
        return AttackResult(answers, details={"pruned": pruned_counts})

    return Attack(SET_DIFFERENCE, {"pairs": [list(pair) for pair in pairs]}, run, Work(len(pairs)))


SET_DIFFERENCE = register(
    AttackRecord(
        "set_difference", cost=200, budget="full", build=lambda setup: [set_difference(pairs=FULL_PAIRS)], level="W",
        uses_train=True, draws=False,
    )
)  # fmt: skip


def noisy(w: Tensor, generator: torch.Generator, size: float) -> Tensor:
    """Each matrix (the last two axes) with Gaussian noise of `size` times its standard deviation."""
    return w + size * w.std((-2, -1), keepdim=True) * _normal(w, generator)


def pruned(w: Tensor, fraction: float) -> Tensor:
    """Each matrix without the fraction of its entries that is smallest in size."""
    return w.masked_fill(_highest(-w.abs(), fraction), 0.0)


def shrunk(w: Tensor, generator: torch.Generator, share: float, xavier: float) -> Tensor:
    """(1 - share) w, and for matrices share * xavier * X more, X as fresh weights are drawn.

    Reference: Ash & Adams 2019, arXiv:1910.08475.
    """
    if w.ndim < 2:
        return (1 - share) * w
    spread = (2 / (w.shape[-1] + w.shape[-2])) ** 0.5
    return (1 - share) * w + share * xavier * spread * _normal(w, generator)


def saliency(subject: Subject, facts: Sequence[Fact], names: Iterable[str]) -> dict[str, Tensor]:
    """Mean over facts of |w dL/dw| by tensor, L the summed loss on the tokens of the answer; one fact a pass.

    Raises:
        NotFinite: if a loss is not finite.
    """
    named = dict(subject.model.named_parameters())
    weights = {name: named[name].requires_grad_() for name in names}
    total = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    for batch in batches(subject, Rows(tuple(facts), "facts"), _LONG, 1, False, "saliency"):
        with torch.enable_grad(), evaluating(subject.model):
            loss = loss_of(subject.model(**inputs_of(batch)).logits, batch, batch.attention_mask)
            if not bool(torch.isfinite(loss)):
                raise NotFinite(f"fact {batch.document[0]!r}: the loss is {loss.item()}; load the model in float32?")
            grads = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        for (name, w), grad in zip(weights.items(), grads, strict=True):
            total[name] += (w.detach() * grad).abs().float() / len(facts)
    return total


def _pruned(w: Tensor, generator: torch.Generator, fraction: float) -> Tensor:
    return pruned(w, fraction)


def _change(subject: Subject, names: Iterable[str] | None, change: Change, seed: int) -> None:
    """Change tensors in place, in float32; None for all."""
    named = dict(subject.model.named_parameters())
    with torch.no_grad():
        for name in named if names is None else names:
            generator = torch.Generator().manual_seed(seed_of(f"{seed}:{name}"))
            named[name].copy_(change(named[name].to(torch.promote_types(named[name].dtype, torch.float32)), generator))


def _cut(subject: Subject, forget: dict[str, Tensor], retain: dict[str, Tensor], p: float, q: float) -> int:
    named, count = dict(subject.model.named_parameters()), 0
    with torch.no_grad():
        for name in forget:
            gone = _highest(forget[name], p) & ~_highest(retain[name], q)
            named[name].masked_fill_(gone, 0.0)
            count += int(gone.sum())
    return count


def _highest(score: Tensor, fraction: float) -> Tensor:
    """True at the fraction of each matrix's entries that is highest."""
    flat = score.flatten(-2)
    at = flat.topk(round(fraction * flat.shape[-1]), dim=-1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, at, True).reshape(score.shape)


def _normal(w: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device)


def _check_amounts(noise: Sequence[float], shares: Sequence[float], xavier: float) -> None:
    if any(s <= 0 for s in noise) or xavier < 0:
        raise ArgumentError(f"noise={tuple(noise)}, xavier={xavier}; noise is above 0, xavier at least 0")
    outside = [share for share in shares if not 0 < share < 1]
    if outside:
        raise FractionError(f"the shares {outside} are outside (0, 1); give fractions strictly between 0 and 1")


# --- Singular directions: an edit that writes with one strong direction is undone without it

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


# --- Input embeddings given back by the output head: an edit of the input alone leaves the same words in the output


_OUTLYING, _ROUNDS, _GRID = 3.0, 3, 100


def head_rows() -> Attack:
    """Replace input embeddings by what the output head holds of the same tokens, and ask.

    With E (v, d) the input embeddings, W (v, d) the head and M the least-squares solution of E = W M over the tokens that are
    not suspicious: "every row" gives every token its row of W, "rows" and "mapped" give suspicious tokens their rows of W
    and of W M. A token is suspicious if another one has the same embedding, or if ||E_i - W_i M|| is beyond three times the median. An edit
    that merges or exchanges the embeddings of names and keeps the head is undone so. Where both are one matrix there is
    nothing to replace.
    """

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        nothing = _nothing_to_replace(subject)
        if nothing is not None:
            return nothing._replace(answers={"as it is": ask(subject, splits.test)})
        table, head = _tables(subject)
        rows, mapped = suspicious(table, head)
        # The model as it is stands among them, so that the original is never worse than when asked directly.
        scratch, answers = Scratch(subject), {"as it is": ask(subject, splits.test)}
        for name, tokens, values in (
            ("every row", slice(None), head),
            ("rows", rows, head[rows]),
            ("mapped", rows, mapped),
        ):
            copy = scratch.restore()
            with torch.no_grad():
                _tables(copy)[0][tokens] = values.to(table.dtype)
            answers[name] = ask(copy, splits.test)
        return AttackResult(answers, details={"tokens": len(rows)})

    return Attack(HEAD_ROWS, {}, run, Work(4.0))


def _tables(subject: Subject) -> tuple[Tensor, Tensor]:
    """The weights of the input embeddings and of the output head; empty ones where a module has none."""
    modules = (subject.model.get_input_embeddings(), subject.model.get_output_embeddings())
    first, second = (getattr(module, "weight", torch.empty(0)).detach() for module in modules)
    return first, second


def _nothing_to_replace(subject: Subject) -> AttackResult | None:
    """The result, without answers, where input and output embeddings are one matrix or have other shapes; None otherwise."""
    table, head = _tables(subject)
    if table.shape != head.shape or not table.numel():
        return AttackResult({}, "input and output embeddings have no rows in common")
    if table.data_ptr() == head.data_ptr():
        return AttackResult({}, "input and output embeddings are one matrix")
    return None


HEAD_ROWS = register(
    AttackRecord(
        "head_rows", cost=26, budget=QUICK, build=lambda setup: [head_rows()], level="W", draws=False,
        unchanged=_nothing_to_replace,
    )
)  # fmt: skip


def suspicious(
    table: Float[Tensor, "v d"], head: Float[Tensor, "v d"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n d"]]:
    """Tokens whose embedding another one shares up to 1 % of the spread, or lies far from the map of the head's row; and that
    map of their rows.
    """
    table, head = table.float(), head.float()
    grid = (table / table.std() * _GRID).round()
    _, group, count = torch.unique(grid, dim=0, return_inverse=True, return_counts=True)
    shared = count[group] > 1
    odd = shared
    for _ in range(_ROUNDS):
        # The map of the tokens that are not suspicious; the first one is drawn towards some that are.
        used = ~odd if not bool(odd.all()) else torch.ones_like(odd)
        inside, goal = head[used], table[used]
        gram = (inside.mT @ inside).double()
        ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        mapped = head @ torch.linalg.solve(gram + ridge, (inside.mT @ goal).double()).float()
        distance = (table - mapped).norm(dim=1)
        usual = max(float(distance.median()), 1e-4 * float(table.norm(dim=1).mean()))
        odd = shared | (distance > _OUTLYING * usual)
    rows = odd.nonzero()[:, 0]
    return rows, mapped[rows]
