"""Training as part of an attack: examples, the masked loss, the loop, and trials that measure accuracy on V between steps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repedit.activations.forward import (
    at_least_float32,
    batches_of,
    inputs_of,
    prefix_tree,
    retry_with_smaller_batch,
    tree_capacity,
    tree_log_probs,
)
from repedit.auditing.attack import FAILED, LONGER, RAN, AttackResult, Scratch, Setting, Work, ask, lengthened
from repedit.data import Batch, Fact, Splits, TextSource, as_batches
from repedit.data.corpus import padded
from repedit.errors import ArgumentError, DataError, check_choice
from repedit.hooks import check_differentiable, evaluating
from repedit.metrics.facts import FactsAccuracy
from repedit.models.subject import Subject
from repedit.training import optimizers
from repedit.training.optimizers import added_in_place, zero_gradients

# --- Texts to learn, batches of them, and the masked loss
#
# Padding weighs nothing, every item weighs the same, and what a step sees depends on the seed and its number alone.


class Example(NamedTuple):
    """The tokens of one text, and which of them are to be learned."""

    ids: list[int]
    learned: list[bool]


_SHORTER = 0.9
"""A tree of more than this share of the rows' tokens is not worth its attention, which is between all its nodes."""
Draw = Callable[[int], Sequence[Example]]
"""The examples of a step, the first being 0."""


def examples(
    subject: Subject, source: TextSource, *, loss: str = "answer", max_tokens: int = 512
) -> tuple[Example, ...]:
    """The texts of facts, rows, a corpus or strings, each without padding; text without answers is learned whole.

    Raises:
        DataError: if a row is longer than `max_tokens`, or has no token that another comes before.
    """
    items = []
    for batch in batches_of(subject, as_batches(source), length=max_tokens, batch_size=64):
        learned_tokens = batch.attention_mask if loss == "sequence" or batch.answer is None else batch.answer
        for name, ids, real, marks in zip(
            batch.document, batch.input_ids, batch.attention_mask, learned_tokens, strict=True
        ):
            learned = [False, *marks[real].tolist()[1:]]
            if not any(learned):
                raise DataError(f"{name!r}: no token is learned, a first one follows nothing; give a longer text")
            items.append(Example(ids[real].tolist(), learned))
    return tuple(items)


def shuffled(items: Sequence[Example], size: int, seed: int) -> Draw:
    """Batches out of one order an epoch, without a break between epochs; never more than there are items.

    Texts of like length come together, so that little is padding.
    """
    count, size = len(items), min(size, len(items))

    @cache
    def order(epoch: int) -> list[int]:
        drawing = random.Random(f"{seed}:{epoch}")
        ranked = sorted(drawing.sample(range(count), count), key=lambda i: len(items[i].ids))
        # The first places complete the batch that the epoch before began, the last ones begin one.
        first = -epoch * count % size
        last = first + (count - first) // size * size
        whole = [ranked[i : i + size] for i in range(first, last, size)]
        drawing.shuffle(whole)
        return [*ranked[:first], *(i for batch in whole for i in batch), *ranked[last:]]

    def draw(step: int) -> Sequence[Example]:
        places = range(step * size, (step + 1) * size)
        return [items[order(place // count)[place % count]] for place in places]

    return draw


def in_turn(first: Draw, second: Draw, switch: int) -> Draw:
    """The first source before the step `switch`, the second from there on."""
    return lambda step: first(step) if step < switch else second(step - switch)


def batch_of(items: Sequence[Example], pad: int, *, left: bool = False) -> Batch:
    """The examples as one batch; `answer` marks what is learned."""
    ids, mask = padded([item.ids for item in items], pad, left=left)
    learned, _ = padded([item.learned for item in items], left=left)
    return Batch(ids, mask, tuple(str(number) for number in range(len(items))), answer=learned.bool())


def stacked(subject: Subject, items: Sequence[Example]) -> Batch:
    """The examples as a batch for a model, padded on the left: answers then end together, and few logits are made."""
    return batch_of(items, padding(subject), left=True)


def masked_loss(subject: Subject, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy of the learned tokens in nats: mean over the tokens of an item, then over the items."""
    assert batch.answer is not None
    ids, mask, answer = (x.to(subject.device) for x in (batch.input_ids, batch.attention_mask, batch.answer))
    # Logits are made from the position before the first learned token on: of answers, few positions of many. What stands
    # at the last learned token or behind predicts nothing and is not read.
    columns = answer.any(0).nonzero()
    first, last = max(1, int(columns[0])), int(columns[-1])
    read = inputs_of(Batch(ids[:, :last], mask[:, :last], batch.document))
    logits = subject.model(**read, logits_to_keep=last - first + 1).logits
    learned = answer[:, first : last + 1]
    picked = at_least_float32(logits[learned])
    each = nn.functional.cross_entropy(picked, ids[:, first : last + 1][learned], reduction="none")
    share = (learned / learned.sum(1, keepdim=True))[learned]
    return (each * share.to(each)).sum() / len(ids)


def items_loss(subject: Subject, items: Sequence[Example]) -> Float[Tensor, ""]:
    """The masked loss of examples: read as one tree where that saves a tenth of the tokens or more, else as rows."""
    read = [item.ids[:-1] for item in items]
    nodes = len(prefix_tree(read).tokens)
    worth = nodes <= _SHORTER * len(items) * max(map(len, read))
    if not (worth and nodes <= tree_capacity(subject)):
        return masked_loss(subject, stacked(subject, items))
    logs = tree_log_probs(subject, [item.ids for item in items], [item.learned for item in items])
    shares = [1 / sum(item.learned) for item in items for on in item.learned if on]
    return -(logs * torch.tensor(shares, device=logs.device)).sum() / len(items)


def mean_loss(subject: Subject, items: Sequence[Example], batch_size: int = 8) -> float:
    """The loss over all the items, without training."""
    parts = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    with torch.no_grad(), evaluating(subject.model):
        sums = [float(items_loss(subject, part)) * len(part) for part in parts]
    return sum(sums) / len(items)


def padding(subject: Subject) -> int:
    """The token that fills rows up; any does, as padding weighs nothing."""
    pad = subject.need_tokenizer().pad_token_id
    return 0 if pad is None else int(pad)


# --- The training loop of the attacks: a few steps on texts, asked in between
#
# Dropout is off.


LOSSES, HOWS, SCHEDULES = ("answer", "sequence"), ("full", "lora"), ("constant", "cosine")
SOME_LAYERS = ("lora", "mlps")
"""The ways to train that can be kept to some layers."""


OPTIMIZERS = {name: optimizers.OPTIMIZERS[name] for name in ("adamw", "lion", "sgd")}


@dataclass(frozen=True)
class Tuning:
    """How a model is trained.

    Raises:
        UnknownName: if there is no such loss, way, optimizer or schedule.
        ArgumentError: if a number is out of range, or layers are given to a full training.
    """

    rate: float
    steps: int = 40
    loss: str = "answer"
    """ "answer": the tokens of the answer, given the prompt. "sequence": every token but the first."""
    how: str = "full"
    """ "full": every parameter. "lora": adapters on every linear module of the blocks; fused experts have none. "mlps": the
    matrices of the MLPs."""
    rank: int = 16
    batch_size: int = 8
    max_tokens: int = 512
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: float = 0.1
    """Below 1 a fraction of the steps, else a number of steps, over which the rate rises linearly."""
    clip: float = 1.0
    layers: tuple[int, ...] | None = None
    """The layers that get adapters, or whose MLPs are trained; None for all."""

    def __post_init__(self) -> None:
        check_choice(LOSSES, loss=self.loss)
        check_choice((*HOWS, "mlps"), how=self.how)
        check_choice(OPTIMIZERS, optimizer=self.optimizer)
        check_choice(SCHEDULES, schedule=self.schedule)
        for name, least in (("steps", 1), ("rank", 1), ("batch_size", 1), ("max_tokens", 2)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}={getattr(self, name)}; give at least {least}")
        if not (self.rate > 0 and self.clip > 0 and self.warmup >= 0 and self.weight_decay >= 0):
            raise ArgumentError(
                f"rate={self.rate}, clip={self.clip}, warmup={self.warmup}, weight_decay={self.weight_decay}; rate and "
                "clip must be above 0, the others at least 0"
            )
        if self.layers is not None and self.how not in SOME_LAYERS:
            raise ArgumentError(
                f"layers={self.layers} with how={self.how!r}; only how='lora' and how='mlps' can be kept to some layers"
            )

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, the first being 1."""
        warm = math.ceil(self.warmup * self.steps) if self.warmup < 1 else round(self.warmup)
        if step <= warm:
            return self.rate * step / warm
        left = (step - warm) / max(1, self.steps - warm)
        return self.rate * (1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * left)))


class TuningLog(NamedTuple):
    """What a training did."""

    losses: tuple[float, ...]
    """Of each step, before its update."""
    tokens: int
    """Without padding."""
    diverged: int | None = None
    """Step at which a loss, gradient or answer was not finite; nothing was trained or measured after it."""


def tune(
    subject: Subject,
    draw: Draw,
    tuning: Tuning,
    *,
    at: Iterable[int],
    measure: Callable[[int], None],
    seed: int = 0,
    trained: Sequence[nn.Parameter] | None = None,
) -> TuningLog:
    """Train a model in place and call `measure(step)` at some steps, 0 being before the first.

    With how="lora" the adapters are there while `measure` runs and are gone afterwards, so the weights never change.

    Args:
        draw: the examples of each step; see `shuffled`.
        at: the steps at which to measure.
        trained: parameters to train in place of those that `tuning.how` names.
    Raises:
        ArgumentError: if the model has no such layer.
        NotFinite: if `measure(0)` finds the model broken before the training; later it ends the training.
    """
    check_differentiable(subject.model)
    at, tokens, size = set(at), 0, tuning.batch_size
    with (
        torch.enable_grad(),
        _trainable(subject, tuning, seed, trained) as parameters,
        added_in_place(subject.model) as in_place,
    ):

        def gradients(step: int) -> float:
            nonlocal tokens, size
            run = partial(_gradients, subject, draw(step - 1), parameters, in_place)
            (loss, read), size = retry_with_smaller_batch(run, size)
            tokens += read
            return loss

        optimizer = OPTIMIZERS[tuning.optimizer](parameters, lr=tuning.rate, weight_decay=tuning.weight_decay)
        if 0 in at:
            measure(0)
        log = optimizers.descend(
            parameters, optimizer, gradients, tuning.steps, lr=tuning.rate_at, clip=tuning.clip,
            after=lambda step: measure(step) if step in at else None,
        )  # fmt: skip
    return TuningLog(log.losses, tokens, log.diverged)


def _gradients(
    subject: Subject,
    items: Sequence[Example],
    parameters: Sequence[nn.Parameter],
    in_place: Sequence[nn.Parameter],
    size: int,
) -> tuple[float, int]:
    """(loss, tokens) of a step, read `size` items at a time; the gradients are those of all of them together."""
    zero_gradients(parameters, in_place)
    total, tokens = 0.0, 0
    for part in (items[i : i + size] for i in range(0, len(items), size)):
        loss = items_loss(subject, part) * (len(part) / len(items))
        loss.backward()
        total += float(loss.detach())
        tokens += sum(len(item.ids) for item in part)
    return total, tokens


@contextmanager
def _trainable(
    subject: Subject, tuning: Tuning, seed: int, trained: Sequence[nn.Parameter] | None
) -> Iterator[list[nn.Parameter]]:
    """The parameters to train; they alone require gradients inside the context, and no parameter does afterwards."""
    own = list(subject.model.parameters())
    undo: list[Callable[[], Any]] = []
    for p in own:
        p.requires_grad_(False)
    try:
        if trained is not None:
            parameters = list(trained)
        elif tuning.how == "full":
            parameters = own
        elif tuning.how == "mlps":
            parameters = _mlp_matrices(subject, tuning)
        else:
            parameters = _adapt(subject, tuning, seed, undo)
        for p in parameters:
            p.requires_grad_(True)
        yield parameters
    finally:
        for step in reversed(undo):
            step()
        for p in (*own, *(trained or ())):
            p.requires_grad_(False)
            p.grad = None


def _layers(subject: Subject, tuning: Tuning, what: str) -> Sequence[int]:
    count = len(subject.layout.block_paths)
    layers = range(count) if tuning.layers is None else tuning.layers
    absent = [layer for layer in layers if not 0 <= layer < count]
    if absent:
        raise ArgumentError(f"{what} asked for in layers {absent}; the model has layers 0 to {count - 1}")
    return layers


def _mlp_matrices(subject: Subject, tuning: Tuning) -> list[nn.Parameter]:
    """Every matrix that reads or writes the neurons of the MLPs in the layers, all experts included."""
    parameters = dict(subject.model.named_parameters())
    branches = [
        branch for layer in _layers(subject, tuning, "MLPs were") for branch in subject.layout.layers[layer]
        if branch.kind == "mlp"
    ]  # fmt: skip
    views = [view for branch in branches for part in branch.parts for view in (part.out, *part.readers)]
    if not views:
        raise ArgumentError(f"MLPs were asked for in layers {tuning.layers}, which have none")
    return [parameters[name] for name in dict.fromkeys(view.tensor for view in views)]


def _adapt(subject: Subject, tuning: Tuning, seed: int, undo: list[Callable[[], Any]]) -> list[nn.Parameter]:
    """Low-rank adapters, y + 2 (x A^T) B^T, on every linear module of the layers; Hu et al. 2021, arXiv:2106.09685."""
    from transformers.pytorch_utils import Conv1D

    paths, layers = subject.layout.block_paths, _layers(subject, tuning, "adapters were")
    generator = torch.Generator().manual_seed(seed)
    adapters: list[nn.Parameter] = []
    for module in (m for layer in layers for m in subject.model.get_submodule(paths[layer]).modules()):
        if isinstance(module, nn.Linear | Conv1D):
            out, width = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
            down = (torch.rand(tuning.rank, width, generator=generator) * 2 - 1) / math.sqrt(width)
            dtype = torch.promote_types(module.weight.dtype, torch.float32)
            pair = [nn.Parameter(x.to(module.weight.device, dtype)) for x in (down, torch.zeros(out, tuning.rank))]
            undo.append(_attach(module, *pair))
            adapters += pair
    return adapters


def _attach(module: nn.Module, down: Tensor, up: Tensor) -> Callable[[], Any]:
    """Put an adapter on a module; what takes it off again."""
    # Under the hooks of the module, not around it: a hooked edit acts on what the adapter reads and adds as well.
    inner, own = module.forward, module.__dict__.get("forward")

    def forward(x: Tensor) -> Tensor:
        return inner(x) + (2 * ((x.to(down.dtype) @ down.T) @ up.T)).to(x.dtype)

    module.forward = forward
    return lambda: module.__dict__.pop("forward") if own is None else setattr(module, "forward", own)


# --- Trials of a training attack: each trains from the same weights, is asked at some steps, and must have learned


LEARNED = 0.9
"""Accuracy on T that the best trial must reach; less is no evidence that anything was removed."""
FALL = 0.1
"""Where no facts are taught: the share by which the loss on what is trained on must fall."""
UNTOUCHED = Setting("step=0", step=0)

Start = Callable[[], tuple[Subject, list[nn.Parameter] | None]]
"""A model with the starting weights, and what to train of it where the tuning does not say."""


class Trial(NamedTuple):
    """One training, and when V is asked."""

    name: str
    """What sets it apart from the others, such as "lr=5e-05"."""
    tuning: Tuning
    draw: Draw
    settings: Mapping[int, Setting]
    """The name of each setting, by the step at which V is asked; step 0 is the same in all trials and asked once."""
    taught: tuple[Fact, ...] = ()
    """Facts it should know afterwards."""
    watched: tuple[Example, ...] = ()
    """Texts whose loss should fall; with them, `taught` is only asked and decides nothing."""


class _TrialResult(NamedTuple):
    answers: Mapping[int, FactsAccuracy]
    log: TuningLog
    accuracy: float | None
    fall: float | None


def scaled_rates(rates: Sequence[float], scale: float) -> tuple[float, ...]:
    """The rates times the scale.

    Raises:
        ArgumentError: if there is no rate, or one of them would not be above 0.
    """
    if not rates or not min(rates) * scale > 0:
        raise ArgumentError(f"rates={tuple(rates)}, scale={scale}; give at least one rate, and both above 0")
    return tuple(rate * scale for rate in rates)


def trial(
    tuning: Tuning,
    draw: Draw,
    measured: Sequence[int],
    extra: str = "",
    *,
    taught: tuple[Fact, ...] = (),
    watched: tuple[Example, ...] = (),
) -> Trial:
    """A training whose settings are named "lr=5e-05 step=40" and `extra`, asked at the steps in reach and the last one.

    Args:
        taught, watched: see `Trial`.
    """
    at = sorted({step for step in measured if 0 <= step <= tuning.steps} | {tuning.steps})
    settings = {step: Setting(f"lr={tuning.rate:g} step={step}{extra}", step=step) for step in at}
    return Trial(f"lr={tuning.rate:g}{extra}", tuning, draw, settings, taught, watched)


def training_work(trials: int, steps: int, measured: Sequence[int], *, checks: int = 1) -> Work:
    """The work of trials that ask V at the measured steps, and T `checks` times each."""
    return Work(trials * (len(measured) + checks), trials * max(steps, *measured, 0))


def on_copy(subject: Subject, *, full: bool) -> Start:
    """Each trial begins with the weights of the model, on a copy of it.

    Args:
        full: whether all weights will be trained; half types are then widened to float32, as they lose small updates.
    Raises:
        QuantizedModel: if the weights are not plain tensors.
    """
    subject.check_unquantized("trained")
    scratch = Scratch(subject)
    if full and any(p.dtype.itemsize < 4 for p in scratch.subject.model.parameters()):
        scratch.subject.model.float()
    return lambda: (scratch.restore(), None)


def carried_out(
    trials: Sequence[Trial], start: Start, test: Sequence[Fact], seed: int, note: str = "", *, longer: bool = True
) -> AttackResult:
    """The answers of all trials on V.

    Where no trial learned what it was taught, the one that came nearest is repeated with `LONGER` times the steps, whose
    later steps are further settings, see `lengthened`. The outcome is "failed to train" where that did not learn it either. A trial
    whose numbers are no longer finite scores what the model answers before any training from there on, and the reason
    says so.

    Args:
        longer: False for trainings that are published with their number of steps.
    details: "losses" of every step and trial; "diverged", by trial the step.
    """
    untouched = cache(lambda: ask(start()[0], test))
    answers: dict[str, FactsAccuracy] = {}
    results: dict[str, _TrialResult] = {}
    if any(0 in trial.settings for trial in trials):
        answers[UNTOUCHED] = untouched()

    def carry_out(trial: Trial) -> None:
        enough = any(t.accuracy == 1.0 for t in results.values())
        results[trial.name] = result = _one(trial, start, test, seed, ask_taught=not enough)
        for step, name in trial.settings.items():
            if step:
                answers[name] = result.answers.get(step) or untouched()

    for trial in trials:
        carry_out(trial)
    if longer and (nearest := _nearest(trials, results)) is not None:
        carry_out(_longer(nearest))
    diverged = {name: result.log.diverged for name, result in results.items() if result.log.diverged}
    details = {
        "losses": {name: [round(loss, 4) for loss in result.log.losses] for name, result in results.items()},
        "diverged": diverged,
    }
    failure, train_accuracy = _failure(list(results.values()), any(trial.watched for trial in trials))
    divergence_note = "; ".join(f"{name} diverged at step {step} and scores step 0" for name, step in diverged.items())
    return AttackResult(
        answers, "; ".join(part for part in (failure, note, divergence_note) if part), train_accuracy,
        sum(result.log.tokens for result in results.values()), details, FAILED if failure else RAN,
    )  # fmt: skip


def running(
    trials: Callable[[Subject, Splits, int], Iterator[Trial]],
    *,
    full: bool,
    note: Callable[[Splits], str] = lambda splits: "",
) -> Callable[[Subject, Splits, int], AttackResult]:
    """The function of an attack that carries out its trials on a copy of the model; `full` as for `on_copy`."""
    return lambda subject, splits, seed: carried_out(
        list(trials(subject, splits, seed)), on_copy(subject, full=full), splits.test, seed, note(splits)
    )


def _one(trial: Trial, start: Start, test: Sequence[Fact], seed: int, *, ask_taught: bool) -> _TrialResult:
    subject, trained = start()
    before = mean_loss(subject, trial.watched) if trial.watched else 0.0
    answers: dict[int, FactsAccuracy] = {}
    accuracies: list[float] = []
    falls: list[float] = []

    def measure(step: int) -> None:
        if step in trial.settings:
            answers[step] = ask(subject, test)
        if step == trial.tuning.steps and trial.taught and ask_taught:
            accuracies.append(ask(subject, trial.taught).accuracy)
        if step == trial.tuning.steps and trial.watched:
            falls.append(1 - mean_loss(subject, trial.watched) / max(before, 1e-12))

    at = {step for step in (*trial.settings, trial.tuning.steps) if step}
    log = tune(subject, trial.draw, trial.tuning, at=at, measure=measure, seed=seed, trained=trained)
    return _TrialResult(answers, log, *(next(iter(values), None) for values in (accuracies, falls)))


def _nearest(trials: Sequence[Trial], results: Mapping[str, _TrialResult]) -> Trial | None:
    """Of the trials with the fewest steps the one that came nearest to learning what it was taught, the later of equal ones.

    None where a trial learned it, or all diverged.
    """
    if not _failure(list(results.values()), any(trial.watched for trial in trials))[0]:
        return None
    finite = [trial for trial in trials if not results[trial.name].log.diverged]
    fewest = min((trial.tuning.steps for trial in finite), default=0)

    def learned(trial: Trial) -> float:
        result = results[trial.name]
        return (result.fall if trial.watched else result.accuracy) or 0.0

    return max((t for t in reversed(finite) if t.tuning.steps == fewest), key=learned, default=None)


def _longer(trial: Trial) -> Trial:
    """The trial with `LONGER` times the steps, asked after the steps that the trial itself did not reach."""
    steps = trial.tuning.steps
    settings = {LONGER * at: lengthened(name) for at, name in trial.settings.items() if LONGER * at > steps}
    return trial._replace(
        name=f"{trial.name} longer", tuning=replace(trial.tuning, steps=LONGER * steps), settings=settings
    )


def _failure(results: Sequence[_TrialResult], by_loss: bool) -> tuple[str, float | None]:
    """(why nothing was learned, or nothing; best accuracy on T)."""
    accuracy = max((result.accuracy for result in results if result.accuracy is not None), default=None)
    fall = max((result.fall for result in results if result.fall is not None), default=None)
    if all(result.log.diverged for result in results):
        return "every training diverged; give lower rates", accuracy
    if by_loss and (fall is None or not fall >= FALL):
        shown = round(fall or 0.0, 3) + 0.0  # without the sign of a zero
        shortfall = f"the training loss fell by {shown:.1%} at best, {FALL:.0%} is needed"
        return f"{shortfall}; give higher rates or more steps", accuracy
    if not by_loss and (accuracy is None or not accuracy >= LEARNED):
        shortfall = f"the best accuracy on T after training is {accuracy or 0:.3f}, {LEARNED} is needed"
        return f"{shortfall}; give other rates or more steps", accuracy
    return "", accuracy
