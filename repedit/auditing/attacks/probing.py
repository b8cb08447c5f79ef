"""Read answers from the hidden states of a model: the logit lens, and probes trained on T and tested on V."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.activations.forward import at_least_float32, captured, check_ids
from repedit.arch import hooks_at
from repedit.arch.infer import output_embeddings
from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Setting, Work, register
from repedit.data import Fact, Splits, by_domain
from repedit.errors import ArgumentError, NotEnoughRows, NotFinite, UnknownSite, check_choice
from repedit.hooks import evaluating, installed
from repedit.metrics.facts import FactsAccuracy, choice_tokens
from repedit.models.subject import Subject
from repedit.sites import Point, Site

# --- Logit lens: hidden states at the last token of a prompt, read with the model's own final norm and head


STREAMS = ("resid.post", "mlp.out", "attn.out", "resid.mid")
# Prompts of equal length per forward pass, and states per pass through the head.
_ROWS, _STATES = 32, 256


class Question(NamedTuple):
    """The tokens that all choices of a fact share at their beginning, and the remaining tokens of each choice."""

    prompt: list[int]
    answers: list[list[int]]
    right: int
    """Index of the right answer."""
    free: bool
    """Whether the fact has no choices; `answers` then holds its answer alone."""


def logit_lens(*, streams: Sequence[str] = STREAMS, layers: Sequence[int] | None = None) -> Attack:
    """Apply the model's final norm and head to every stream at the last token of the prompt.

    A fact is right if the first token of its answer is strictly more likely than the first tokens of all other choices;
    without choices, if it is the most likely of all tokens. A fact whose answer shares its first token with another
    choice is wrong, and the details count such facts. Settings are named "resid.post 3". The grade is the
    log-probability of the first token.

    Args:
        streams: points of a block; the details list those that the family lacks, which are left out.
        layers: None for all layers.
    Raises:
        UnknownSite: if there is no such point or layer.
        NotFinite: during the attack, if a logit is not finite.
    Reference: Patil et al. 2023, arXiv:2309.17410.
    """
    check_streams(streams)

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        sites = stream_sites(subject, streams, layers)
        questions = [question(subject, fact) for fact in splits.test]
        states_by_site = states(subject, [item.prompt for item in questions], sites)
        ids = tuple(fact.id for fact in splits.test)
        answers: dict[str, FactsAccuracy] = {
            Setting.at(site): FactsAccuracy(*_read(subject, states_by_site[site], questions), ids) for site in sites
        }
        firsts = [([answer[0] for answer in item.answers], item.right) for item in questions]
        ambiguous = sum(tokens.count(tokens[right]) > 1 for tokens, right in firsts)
        return AttackResult(answers, details={"same_first_token": ambiguous, "absent": absent(subject, streams)})

    options = {"streams": list(streams), "layers": None if layers is None else list(layers)}
    return Attack(LOGIT_LENS, options, run, Work(1.5))


LOGIT_LENS = register(
    AttackRecord("logit_lens", cost=100, budget="fast", build=lambda setup: [logit_lens()], level="W", draws=False)
)


def question(subject: Subject, fact: Fact, choices: Sequence[str] | None = None) -> Question:
    """The tokens of a fact.

    Args:
        choices: None for the fact's own choices, or its answer if it has none.
    Raises:
        DataError: if no token precedes the answers, a choice has no token of its own, or a token is not in the model's
            vocabulary.
    """
    options = list(choices or fact.choices or (fact.answer,))
    prompt, answers = choice_tokens(subject.need_tokenizer(), fact, options)
    for answer in answers:
        check_ids(subject, prompt + answer, f"fact {fact.id!r}")
    return Question(prompt, answers, options.index(fact.answer), not (choices or fact.choices))


def states(subject: Subject, prompts: Sequence[list[int]], sites: Sequence[Site]) -> dict[Site, Float[Tensor, "n d"]]:
    """The activations of each site at the last token of each prompt, on the CPU, in at least float32."""
    rows_by_site: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(prompts) for site in sites}
    for part, captured_states in captured(subject, prompts, sites, lambda x: x[:, -1]):
        for site, x in captured_states.items():
            for row, state in zip(part, x, strict=True):
                rows_by_site[site][row] = state
    return {site: torch.stack(rows) for site, rows in rows_by_site.items()}


def lens(subject: Subject, seen: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
    """The logits that the model computes from states of its residual stream.

    The states replace the output of the last block, so the model itself applies all that follows: the final norm, the
    head, and a cap on the logits if it has one.
    """
    last = Site(len(subject.layout.layers) - 1, Point.RESID_POST)

    def put(x: Tensor, _at: slice, _tokens: Tensor | None) -> Tensor:
        return seen.to(x)[None]

    one = torch.zeros(1, 1, dtype=torch.long, device=subject.device)
    hooks = hooks_at(subject.model, subject.layout, last, put, replaces=True)
    with torch.no_grad(), evaluating(subject.model), installed(subject.model, hooks):
        logits = subject.model(input_ids=one, use_cache=False).logits
    return at_least_float32(logits.reshape(len(seen), -1))


def stream_sites(subject: Subject, streams: Sequence[str], layers: Sequence[int] | None) -> tuple[Site, ...]:
    """The sites of streams at layers (None for all), stream by stream; points that the family lacks are left out."""
    count = len(subject.layout.layers)
    unknown = [layer for layer in layers or () if not 0 <= layer < count]
    if unknown:
        raise UnknownSite(f"layers {unknown} do not exist; layers are 0..{count - 1}")
    points, chosen = subject.layout.points, range(count) if layers is None else layers
    return tuple(Site(i, Point(stream)) for stream in streams for i in chosen if Point(stream) in points[i])


def absent(subject: Subject, streams: Sequence[str]) -> list[str]:
    """The streams that this family does not have."""
    return [stream for stream in streams if not any(Point(stream) in points for points in subject.layout.points)]


def _read(
    subject: Subject, seen: Float[Tensor, "n d"], asked: Sequence[Question]
) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], np.ndarray[Any, np.dtype[np.float64]]]:
    correct, graded = [], []
    for start in range(0, len(asked), _STATES):
        logits = lens(subject, seen[start : start + _STATES])
        total = logits.logsumexp(-1)
        if not bool(torch.isfinite(total).all()):
            raise NotFinite("the logits of a stream are not finite; load the model in float32?")
        for row, end, item in zip(logits, total, asked[start : start + _STATES], strict=True):
            own = row[item.answers[item.right][0]]
            rivals = row if item.free else row[[answer[0] for answer in item.answers]]
            correct.append(int((rivals >= own).sum()) == 1)
            graded.append(float(own - end))
    return np.array(correct, dtype=bool), np.array(graded, dtype=np.float64)


def check_streams(streams: Sequence[str]) -> None:
    if not streams:
        raise ArgumentError(f"streams={streams!r}; give at least one of {STREAMS}")
    for stream in streams:
        if stream not in STREAMS:
            raise UnknownSite(f"stream {stream!r}; there are {', '.join(STREAMS)}")


# --- Probes: a small regression from hidden states to answers, trained on T and tested on V


KINDS = ("linear", "mlp")
PROBED_STREAMS = ("resid.post", "mlp.out", "attn.out")
FOLDS, HIDDEN, STEPS, RATE = 5, 64, 200, 1e-2
# Ridge penalties relative to the mean squared norm of a standardized state; weight decay relative to the learning rate.
STRENGTHS = {"linear": (1e-3, 1e-2, 1e-1, 1.0, 10.0), "mlp": (1e-2, 1.0)}


def probe(
    kind: str = "linear", *, streams: Sequence[str] = PROBED_STREAMS, layers: Sequence[int] | None = None
) -> Attack:
    """Train a regression on T that predicts the answer from the state at the last prompt token, and test it on V.

    If every answer of V occurs at least twice in T, the task is "class": the targets are one-hot answers (a
    one-versus-rest ridge classifier, which has a closed form, unlike a logistic one). Otherwise it is "match": the
    targets are the mean unembedding vectors of the tokens of the answers. States are standardized on T. The score of a
    choice is its entry of the prediction ("class"), or the cosine of its vector and the prediction after subtracting
    the mean target of T from both ("match"). A tie is wrong. Facts without choices choose among the answers of their
    domain. The penalty is the one with the smallest squared error in 5-fold cross-validation on T, with each entity in
    one fold. The same is repeated with the answers of T permuted within their domains; the details list its accuracy
    as "permuted". The grade is the log-softmax of the scores. Settings are named "resid.post 3".

    Args:
        kind: "linear", or "mlp" with one layer of 64 hidden units, trained by 200 steps of Adam.
        streams: points of a block.
        layers: None for all layers.

    Raises:
        UnknownName: if there is no such kind.
        UnknownSite: if there is no such stream or layer.
        NotEnoughRows: during the attack, if T has fewer than two facts.
        NotFinite: during the attack, if a state is not finite.
    """
    check_choice(KINDS, kind=kind)
    check_streams(streams)

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        if len(splits.train) < 2:
            raise NotEnoughRows(f"T has {len(splits.train)} facts; a probe needs at least 2 to learn from")
        task = _task(subject, splits, seed)
        sites = stream_sites(subject, streams, layers)
        states_by_site = states(subject, [item.prompt for item in task.asked], sites)
        answers: dict[str, FactsAccuracy] = {}
        permuted, strengths = {}, {}
        for site in sites:
            if not bool(torch.isfinite(states_by_site[site]).all()):
                raise NotFinite(f"{site}: a state is not finite; load the model in float32?")
            setting = Setting.at(site)
            (answers[setting], permuted_answers), strengths[setting] = _probed(kind, states_by_site[site], task, seed)
            permuted[setting] = permuted_answers.accuracy
        details = {"kind": task.kind, "fit": kind, "permuted": permuted, "strength": strengths}
        return AttackResult(answers, details=details | {"absent": absent(subject, streams)})

    options = {"kind": kind, "streams": list(streams), "layers": None if layers is None else list(layers)}
    return Attack(PROBE, options, run, Work(2.5), label="" if kind == "linear" else f"probe-{kind}")


PROBE = register(
    AttackRecord(
        "probe", cost=110, budget="fast", level="W", uses_train=True,
        build=lambda setup: [probe(kind) for kind in (KINDS if setup.budget == "full" else KINDS[:1])],
    )
)  # fmt: skip


class _Choice(NamedTuple):
    """The choices of a fact of V; their scores are prediction @ vectors.T + offset."""

    vectors: Float[Tensor, "c r"]
    offset: Float[Tensor, " c"]
    right: int


class _Task(NamedTuple):
    kind: str
    asked: list[Question]
    """T, then V."""
    targets: tuple[Float[Tensor, "n r"], Float[Tensor, "n r"]]
    """The centered targets of T in coordinates of their span: unchanged, and permuted within domains."""
    fold: Tensor
    """The cross-validation fold that leaves out each fact of T."""
    ids: tuple[str, ...]
    choices: list[_Choice]


def _task(subject: Subject, splits: Splits, seed: int) -> _Task:
    facts, n = (*splits.train, *splits.test), len(splits.train)
    pools = {domain: sorted({fact.answer for fact in part}) for domain, part in by_domain(facts).items()}
    options = [fact.choices or tuple(pools[fact.domain]) for fact in facts]
    asked = [question(subject, fact, o) for fact, o in zip(facts, options, strict=True)]
    counted = Counter(fact.answer for fact in splits.train)
    kind = "class" if all(counted[fact.answer] > 1 for fact in splits.test) else "match"
    # The prediction for an answer that does not occur in T is 0.
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
    head = output_embeddings(subject.model).weight
    return torch.stack([head[answer].detach().double().mean(0).cpu() for answer in item.answers])


def _permutation(facts: Sequence[Fact], seed: int) -> list[int]:
    """A permutation of the facts within their domains, so that the probe can still learn which answers a domain has."""
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
    kind: str, states_read: Float[Tensor, "n d"], task: _Task, seed: int
) -> tuple[tuple[FactsAccuracy, FactsAccuracy], float]:
    """(answers, answers of the probe with permuted targets) on V, and the penalty of the first."""
    x, at = _standardized(states_read.double(), len(task.fold))
    folds, strengths = task.fold.unique(), STRENGTHS[kind]
    # One row for each fold, False for the facts that it leaves out, and a last row that leaves out none.
    use = torch.cat([task.fold != folds[:, None], torch.ones(1, len(x), dtype=torch.bool)])
    y = torch.stack(task.targets)
    predictions = (_ridge if kind == "linear" else _network)(x, y, use, torch.cat([x, at]), strengths, seed)
    best = _best(predictions[:-1, :, :, : len(x)], y, use[:-1], strengths)
    true, permuted = (_scored(task, predictions[-1, i, k, len(x) :]) for k, i in enumerate(best))
    return (true, permuted), strengths[best[0]]


def _standardized(seen: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """States of T and V, standardized by the mean and spread of T, in coordinates of the span of T."""
    spread = seen[:n].std(0)
    x = (seen - seen[:n].mean(0)) / spread.where(spread > 1e-12, torch.ones_like(spread))
    x = x / x[:n].square().sum(1).mean().sqrt().clamp(min=1e-30)
    if n < x.shape[1]:
        x = x @ torch.linalg.svd(x[:n], full_matrices=False)[2].T
    return x[:n], x[n:]


def _best(
    predictions: Float[Tensor, "f s k n r"],
    y: Float[Tensor, "k n r"],
    use: Bool[Tensor, "f n"],
    strengths: tuple[float, ...],
) -> list[int]:
    """For each kind of targets the index of the penalty with the smallest error on left-out rows; of equals the larger."""
    error = ((predictions - y).square() * ~use[:, None, None, :, None]).sum((0, 3, 4))
    return [max(range(len(strengths)), key=lambda i: (-float(error[i, k]), strengths[i])) for k in range(len(y))]


def _ridge(
    x: Float[Tensor, "n d"], y: Float[Tensor, "k n r"], use: Bool[Tensor, "f n"], at: Float[Tensor, "m d"],
    strengths: tuple[float, ...], seed: int,
) -> Float[Tensor, "f s k m r"]:  # fmt: skip
    """Ridge regression on the rows of each fold, for each penalty and kind of targets: predictions for the states `at`."""
    predictions = []
    for rows in use:
        mean = y[:, rows].mean(1, keepdim=True)
        values, vectors = torch.linalg.eigh(x[rows].T @ x[rows])
        left, right = at @ vectors, (x[rows] @ vectors).T @ (y[:, rows] - mean)
        predictions.append(torch.stack([(left / (values.clamp(min=0) + s)) @ right + mean for s in strengths]))
    return torch.stack(predictions)


def _network(
    x: Float[Tensor, "n d"], y: Float[Tensor, "k n r"], use: Bool[Tensor, "f n"], at: Float[Tensor, "m d"],
    strengths: tuple[float, ...], seed: int,
) -> Float[Tensor, "f s k m r"]:  # fmt: skip
    """As `_ridge`, with one hidden layer: all networks at once, Adam on the squared error, decoupled weight decay."""
    generator = torch.Generator().manual_seed(seed)
    share = (use / use.sum(1, keepdim=True))[:, None, None, :, None]
    mean, scale = (y * share).sum(3, keepdim=True), y.std(correction=0).clamp(min=1e-30)
    x, at, targets, share = x.float(), at.float(), ((y - mean) / scale).float(), share.float()
    first = torch.randn(x.shape[1], HIDDEN, generator=generator)
    second = torch.randn(HIDDEN, y.shape[2], generator=generator) / HIDDEN**0.5
    shape = (len(use), len(strengths), len(y))
    weights = [w.expand(*shape, *w.shape).clone().requires_grad_() for w in (first, torch.zeros(1, HIDDEN), second)]
    decay = 1 - RATE * torch.tensor(strengths)[:, None, None, None]
    with torch.enable_grad():
        optimizer = torch.optim.Adam(weights, lr=RATE)
        for _ in range(STEPS):
            loss = ((_through(x, weights) - targets).square() * share).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for w in weights:
                    w.mul_(decay)
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
