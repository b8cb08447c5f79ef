"""Probes: what a small regression learns to read off the streams on T, asked on V."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.attacks.attack import Attack, Outcome
from repedit.attacks.families.reading import Question, absent, check_streams, named, question, states, stream_sites
from repedit.data import Fact, Splits, by_domain
from repedit.errors import NotEnoughRows, NotFinite, UnknownName, nearest
from repedit.metrics.probability import FactsAccuracy
from repedit.models import Subject

KINDS = ("linear", "mlp")
STREAMS = ("resid.post", "mlp.out", "attn.out")
FOLDS, HIDDEN, STEPS, RATE = 5, 64, 200, 1e-2
# Ridge penalties over the mean squared length of a standardised state; weight decay of the network, in rates.
STRENGTHS = {"linear": (1e-3, 1e-2, 1e-1, 1.0, 10.0), "mlp": (1e-2, 1.0)}


def probe(kind: str = "linear", *, streams: Sequence[str] = STREAMS, layers: Sequence[int] | None = None) -> Attack:
    """Learn on T to tell answers from the state at the last token of the prompt, and ask V.

    "class": where every answer of V stands at least twice in T, the targets are the answers, one-hot (a one-versus-rest
    ridge classifier rather than a logistic one: it has a closed form). "match": otherwise the targets are the mean
    unembedding vectors of the answers' tokens. States are standardised on T. The score of a choice is its entry of the
    prediction, or its cosine with it, T's mean target taken from both; a tie is wrong, and facts without choices choose
    among the answers of their domain. The penalty is the one with the smallest squared error in 5-fold
    cross-validation on T, an entity in one fold. All is done again with the answers of T permuted within their
    domains: the accuracy of that is "permuted" in the details. Graded is the log-softmax of the scores. Settings are
    named "resid.post 3"; "mlp" puts 64 hidden units between, trained by 200 steps of Adam.

    Raises:
        UnknownName: if there is no such kind.
        UnknownSite: if there is no such stream or layer.
        NotEnoughRows: in the call, if T has fewer than two facts.
        NotFinite: in the call, if a state is not finite.
    """
    if kind not in KINDS:
        raise UnknownName(f"kind={kind!r}; {nearest(kind, KINDS)}")
    check_streams(streams)

    def run(subject: Subject, splits: Splits, seed: int) -> Outcome:
        if len(splits.train) < 2:
            raise NotEnoughRows(f"T has {len(splits.train)} facts; a probe needs at least 2 to learn from")
        task = _task(subject, splits, seed)
        sites = stream_sites(subject, streams, layers)
        seen = states(subject, [item.prompt for item in task.asked], sites)
        answers, permuted, strengths = {}, {}, {}
        for site in sites:
            if not bool(torch.isfinite(seen[site]).all()):
                raise NotFinite(f"{site}: a state is not finite; load the model in float32?")
            (answers[named(site)], mixed), strengths[named(site)] = _probed(kind, seen[site], task, seed)
            permuted[named(site)] = mixed.accuracy
        details = {"kind": task.kind, "fit": kind, "permuted": permuted, "strength": strengths}
        return Outcome(answers, details=details | {"absent": absent(subject, streams)})

    settings = {"kind": kind, "streams": list(streams), "layers": None if layers is None else list(layers)}
    return Attack("probe" if kind == "linear" else f"probe-{kind}", "probes", "W", True, settings, run)


class _Choice(NamedTuple):
    """What a fact of V chooses among: scores are prediction @ vectors.T + offset."""

    vectors: Float[Tensor, "c r"]
    offset: Float[Tensor, " c"]
    right: int


class _Task(NamedTuple):
    kind: str
    asked: list[Question]
    """T, then V."""
    targets: tuple[Float[Tensor, "n r"], Float[Tensor, "n r"]]
    """Of T without their mean, in coordinates of their span: as they are, and permuted within domains."""
    fold: Tensor
    """The fold in which each fact of T is left out."""
    ids: tuple[str, ...]
    choices: list[_Choice]


def _task(subject: Subject, splits: Splits, seed: int) -> _Task:
    facts, n = (*splits.train, *splits.test), len(splits.train)
    pools = {domain: sorted({fact.answer for fact in part}) for domain, part in by_domain(facts).items()}
    options = [fact.choices or tuple(pools[fact.domain]) for fact in facts]
    asked = [question(subject, fact, o) for fact, o in zip(facts, options, strict=True)]
    counted = Counter(fact.answer for fact in splits.train)
    kind = "class" if all(counted[fact.answer] > 1 for fact in splits.test) else "match"
    # An answer that T does not hold is a class whose prediction is 0.
    vectors = _one_hot(options) if kind == "class" else [_unembedded(subject, item) for item in asked]
    targets = torch.stack([v[item.right] for v, item in zip(vectors[:n], asked[:n], strict=True)])
    mean = targets.mean(0)
    _, size, span = torch.linalg.svd(targets - mean, full_matrices=False)
    span = span[size > 1e-9 * size[:1].clamp(min=1e-30)]
    reduced = (targets - mean) @ span.T
    choices = []
    for v, item in zip(vectors[n:], asked[n:], strict=True):
        if kind == "class":
            choices.append(_Choice(v @ span.T, v @ mean, item.right))
        else:
            unit = torch.nn.functional.normalize(v - mean, dim=1)
            choices.append(_Choice(unit @ span.T, torch.zeros(len(v), dtype=v.dtype), item.right))
    mixed = reduced[_permutation(splits.train, seed)]
    ids = tuple(fact.id for fact in splits.test)
    return _Task(kind, asked, (reduced, mixed), _folds(splits.train, seed), ids, choices)


def _one_hot(options: Sequence[Sequence[str]]) -> list[Tensor]:
    names = sorted({choice for part in options for choice in part})
    row = torch.eye(len(names), dtype=torch.float64)
    return [row[[names.index(choice) for choice in part]] for part in options]


def _unembedded(subject: Subject, item: Question) -> Tensor:
    """The mean row of the head over the tokens of each choice."""
    head = subject.model.get_output_embeddings().weight
    return torch.stack([head[answer].detach().double().mean(0).cpu() for answer in item.answers])


def _permutation(facts: Sequence[Fact], seed: int) -> list[int]:
    """An order of the facts that stays within domains, so that what a domain's answers look like remains known."""
    order, rng = list(range(len(facts))), random.Random(f"{seed}:permuted")
    for domain in sorted({fact.domain for fact in facts}):
        places = [i for i, fact in enumerate(facts) if fact.domain == domain]
        for place, source in zip(places, rng.sample(places, len(places)), strict=True):
            order[place] = source
    return order


def _folds(facts: Sequence[Fact], seed: int) -> Tensor:
    entities = [fact.entity or fact.id for fact in facts]
    keys = entities if len(set(entities)) > 1 else [fact.id for fact in facts]
    order = sorted(set(keys))
    random.Random(f"{seed}:folds").shuffle(order)
    return torch.tensor([order.index(key) % min(FOLDS, len(order)) for key in keys])


def _probed(
    kind: str, seen: Float[Tensor, "n d"], task: _Task, seed: int
) -> tuple[tuple[FactsAccuracy, FactsAccuracy], float]:
    """(answers, answers of the probe of permuted targets) on V, and the penalty of the first."""
    x, at = _standardised(seen.double(), len(task.fold))
    folds, strengths = task.fold.unique(), STRENGTHS[kind]
    # A row for each fold, false where it is left out, and one that leaves out nothing.
    use = torch.cat([task.fold != folds[:, None], torch.ones(1, len(x), dtype=torch.bool)])
    y = torch.stack(task.targets)
    found = (_ridge if kind == "linear" else _network)(x, y, use, torch.cat([x, at]), strengths, seed)
    best = _best(found[:-1, :, :, : len(x)], y, use[:-1], strengths)
    true, mixed = (_scored(task, found[-1, i, k, len(x) :]) for k, i in enumerate(best))
    return (true, mixed), strengths[best[0]]


def _standardised(seen: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """States of T and of V, by T's mean and spread, in coordinates of T's span: no linear fit loses anything by it."""
    spread = seen[:n].std(0)
    x = (seen - seen[:n].mean(0)) / spread.where(spread > 1e-12, torch.ones_like(spread))
    x = x / x[:n].square().sum(1).mean().sqrt().clamp(min=1e-30)
    if n < x.shape[1]:
        x = x @ torch.linalg.svd(x[:n], full_matrices=False)[2].T
    return x[:n], x[n:]


def _best(
    found: Float[Tensor, "f s k n r"], y: Float[Tensor, "k n r"], use: Bool[Tensor, "f n"], strengths: tuple[float, ...]
) -> list[int]:
    """For each kind of targets, which penalty errs least on left-out rows; the larger of equals."""
    error = ((found - y).square() * ~use[:, None, None, :, None]).sum((0, 3, 4))
    return [max(range(len(strengths)), key=lambda i: (-float(error[i, k]), strengths[i])) for k in range(len(y))]


def _ridge(
    x: Float[Tensor, "n d"], y: Float[Tensor, "k n r"], use: Bool[Tensor, "f n"], at: Float[Tensor, "m d"],
    strengths: tuple[float, ...], seed: int,
) -> Float[Tensor, "f s k m r"]:  # fmt: skip
    """Predictions at some states of a ridge regression on the rows of each fold, for each penalty and kind of targets."""
    found = []
    for kept in use:
        mean = y[:, kept].mean(1, keepdim=True)
        values, vectors = torch.linalg.eigh(x[kept].T @ x[kept])
        left, right = at @ vectors, (x[kept] @ vectors).T @ (y[:, kept] - mean)
        found.append(torch.stack([(left / (values.clamp(min=0) + s)) @ right + mean for s in strengths]))
    return torch.stack(found)


def _network(
    x: Float[Tensor, "n d"], y: Float[Tensor, "k n r"], use: Bool[Tensor, "f n"], at: Float[Tensor, "m d"],
    strengths: tuple[float, ...], seed: int,
) -> Float[Tensor, "f s k m r"]:  # fmt: skip
    """The same with one hidden layer, all networks at once: Adam on the squared error, weights decayed apart from it."""
    generator = torch.Generator().manual_seed(seed)
    share = (use / use.sum(1, keepdim=True))[:, None, None, :, None]
    mean, scale = (y * share).sum(3, keepdim=True), y.std(correction=0).clamp(min=1e-30)
    x, at, goal, share = x.float(), at.float(), ((y - mean) / scale).float(), share.float()
    first = torch.randn(x.shape[1], HIDDEN, generator=generator)
    second = torch.randn(HIDDEN, y.shape[2], generator=generator) / HIDDEN**0.5
    many = (len(use), len(strengths), len(y))
    weights = [w.expand(*many, *w.shape).clone().requires_grad_() for w in (first, torch.zeros(1, HIDDEN), second)]
    kept = 1 - RATE * torch.tensor(strengths)[:, None, None, None]
    with torch.enable_grad():
        optimiser = torch.optim.Adam(weights, lr=RATE)
        for _ in range(STEPS):
            loss = ((_through(x, weights) - goal).square() * share).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for w in weights:
                    w.mul_(kept)
    with torch.no_grad():
        return _through(at, weights).double() * scale + mean


def _through(x: Tensor, weights: list[Tensor]) -> Tensor:
    first, bias, second = weights
    return torch.relu(x @ first + bias) @ second


def _scored(task: _Task, predicted: Float[Tensor, "v r"]) -> FactsAccuracy:
    correct, graded = [], []
    for row, (vectors, offset, right) in zip(predicted, task.choices, strict=True):
        row = row if task.kind == "class" else torch.nn.functional.normalize(row, dim=0)
        scores = vectors @ row + offset
        correct.append(int((scores >= scores[right]).sum()) == 1)
        graded.append(float(scores.log_softmax(0)[right]))
    return FactsAccuracy(np.array(correct, dtype=bool), np.array(graded, dtype=np.float64), task.ids)
