"""The training loop of MRP: bases move, weights do not, and every step can be taken again after a break."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from repedit.activations.passes import inputs_of
from repedit.data import Batch
from repedit.errors import ArgumentError, CheckpointError, TrainingError, check_seed, is_finite, is_whole
from repedit.fit.bases import Bases
from repedit.fit.objective import Forgetting, retained, teaching
from repedit.fit.sampling import Sampler
from repedit.hooks import evaluating, installed
from repedit.io import archive
from repedit.models import Subject


@dataclass(frozen=True)
class MRPConfig:
    """How `rp.mrp` trains.

    Raises:
        ArgumentError: if a value is out of range.
    """

    steps: int | None = 150
    epochs: int | None = None
    """Passes over the forget rows, in place of `steps`."""
    lr: float = 0.01
    batch_size: int = 8
    """Rows a step, of the forget and of the retain set each."""
    text_rows: int = 2
    """Chunks of running text a step."""
    length: int = 128
    """Largest number of tokens of a row."""
    text_length: int = 48
    """Tokens of such a chunk."""
    retain_weight: float = 0.0
    """Of the cross-entropy on the retain rows."""
    kl_weight: float = 1.6
    """Of KL(original || edited) on the retain rows and on the text, in nats a token."""
    shown: int = 3
    """Also ask each fact after this many others of its domain, in a list without words; 0 for not."""
    forget_at: str = "both"
    """Where the projection acts while the forget loss is taken: at the "entity" alone (its last token, where rows mark one),
    so that what the model knows of it goes at the source and not in the wording; "everywhere"; or "both" in turn."""
    among: str = "answers"
    """What the right answer must lose to: the other "answers" of the forget set, or the whole "vocabulary"."""
    cap: float | None = None
    """Largest surprise a forget token can earn, in nats; None for 1.2 ln(candidates)."""
    clip: float = 1.0
    optimizer: str = "adam"
    start: str = "random"
    """The closed form training begins with, which needs a pass over both sets; "random" needs none."""
    anneal: float = 0.4
    """The learning rate falls linearly to 0 over this share of the steps, the last ones."""
    patience: int | None = None
    """Stop once the answers have won no more often than by chance for this many steps; None to take every step."""
    retain_budget: float | None = None
    """Stop once the retain KL, averaged over 20 steps, exceeds this many nats a token."""
    evaluate_every: int = 20
    """Steps between calls of `stop`, and between saved states."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ArgumentError(f"steps={self.steps}, epochs={self.epochs}: give one of them, and None for the other")
        low = {"batch_size": 1, "shown": 0, "text_rows": 0, "text_length": 2, "length": 2, "evaluate_every": 1, "clip": 0, "retain_weight": 0, "kl_weight": 0}  # fmt: skip
        optional = ("steps", "epochs", "patience", "cap", "retain_budget")
        numbers = {n: v for n in (*low, *optional) if (v := getattr(self, n)) is not None}
        # An infinite cap or clip is none; NaN is below everything.
        wrong = [name for name, value in numbers.items() if not value >= low.get(name, -math.inf)]
        wrong += [n for n in ("steps", "epochs", "patience") if n in numbers and not is_whole(numbers[n])]
        wrong += [
            n
            for n in ("batch_size", "shown", "text_rows", "length", "text_length", "evaluate_every")
            if not is_whole(getattr(self, n), 0)
        ]
        wrong += [] if is_finite(self.lr) and self.lr > 0 and 0 <= self.anneal <= 1 else ["lr or anneal"]
        wrong += [] if self.among in ("answers", "vocabulary") else ["among"]
        wrong += [] if self.forget_at in ("entity", "everywhere", "both") else ["forget_at"]
        wrong += [] if self.optimizer in ("adam", "sgd") else ["optimizer"]
        if wrong:
            raise ArgumentError(f"{', '.join(dict.fromkeys(wrong))} out of range in {self}")
        check_seed(seed=self.seed)


@dataclass(eq=False)
class History:
    """What happened, one entry a step."""

    forget: list[float] = field(default_factory=list)
    """Forget loss: minus the mean capped surprise, nats."""
    right: list[float] = field(default_factory=list)
    """Share of forget tokens that still win among the candidates."""
    divergence: list[float] = field(default_factory=list)
    """KL(original || edited) on what is retained, nats a token."""
    reason: str = ""
    """Why training stopped."""


@dataclass(frozen=True, eq=False)
class Sources:
    """What a step draws from."""

    forget: Sampler
    retain: tuple[Sampler, ...]
    loss: Forgetting
    earlier: tuple[tuple[Sampler, Forgetting], ...] = ()
    """Sets forgotten before; one of them a step, in turn, must stay lost."""


def train(
    bases: Bases,
    sources: Sources,
    config: MRPConfig,
    *,
    stop: Callable[[Subject], bool] | None = None,
    state: Path | None = None,
    key: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> History:
    """Move the bases by gradient steps on -min(CE_f, cap) + retain_weight CE_r + kl_weight KL; the weights are frozen.

    Args:
        state: a file that the run is saved to every `evaluate_every` steps, and goes on from if it exists.
        key: what must be equal for a saved run to be gone on with.
    Raises:
        TrainingError: if a loss is not finite, naming the step and the last finite loss.
        CheckpointError: if `state` holds a run of other settings.
    """
    total = config.steps or sources.forget.steps_of(config.epochs or 1)
    history, parameters = History(), list(bases.weights.values())
    optimizer = (torch.optim.Adam if config.optimizer == "adam" else torch.optim.SGD)(parameters, lr=config.lr)
    key = {**(key or {}), "config": asdict(config)}
    begin = _resumed(state, bases, optimizer, history, key)
    bar = tqdm(range(begin, total), initial=begin, total=total, desc="mrp", leave=False,
               disable=None if progress is None else not progress)  # fmt: skip
    with frozen(bases.subject):
        for step in bar:
            optimizer.param_groups[0]["lr"] = config.lr * _share(step, total, config.anneal)
            _step(bases, sources, config, optimizer, history, step)
            bar.set_postfix_str(f"answers right {history.right[-1]:.2f}, retain KL {history.divergence[-1]:.3f}")
            pause = (step + 1) % config.evaluate_every == 0
            history.reason = _reason(history, config, sources.loss.chance) or (
                "the caller's stop rule" if pause and stop and _stopped(bases, stop) else ""
            )
            if history.reason:
                break
            if state and pause:
                _save(state, bases, optimizer, history, key)
    history.reason = history.reason or f"all {total} steps taken"
    bases.refresh()
    return history


@contextmanager
def frozen(subject: Subject) -> Iterator[None]:
    """In eval mode no weight of the model gets a gradient; mode and what required a gradient come back afterwards."""
    parameters = [(p, p.requires_grad) for p in subject.model.parameters()]
    with evaluating(subject.model):
        try:
            for p, _ in parameters:
                p.requires_grad_(False)
            yield
        finally:
            for p, needed in parameters:
                p.requires_grad_(needed)


def _step(
    bases: Bases, sources: Sources, config: MRPConfig, optimizer: torch.optim.Optimizer, history: History, step: int
) -> None:
    subject, batch = bases.subject, sources.forget.at(step)
    kept = [sampler.at(step) for sampler in sources.retain]
    teachers = [teaching(subject, rows) for rows in kept]
    optimizer.zero_grad()
    bases.refresh()
    with installed(subject.model, bases.hooks()), torch.enable_grad():
        bases.only = _positions(batch, config.forget_at, step)
        forget, right = sources.loss(subject.model(**inputs_of(batch)).logits, batch)
        bases.only = None
        loss, divergence = forget + _staying(subject, sources, step), 0.0
        for rows, teacher in zip(kept, teachers, strict=True):
            kl, ce = retained(subject, rows, teacher)
            loss = loss + config.kl_weight * kl + (config.retain_weight * ce if rows.answer is not None else 0.0)
            divergence += float(kl.detach()) / len(kept)
    if not math.isfinite(float(loss.detach())):
        last = history.forget[-1] if history.forget else None
        raise TrainingError(
            f"step {step}: forget loss {float(forget.detach())}, retain KL {divergence}; the last finite forget loss was {last}. "
            f"The first row of the batch is {batch.document[0]!r}; lower lr, or load the model in float32"
        )
    loss.backward()
    if config.clip:
        torch.nn.utils.clip_grad_norm_(list(bases.weights.values()), config.clip)
    optimizer.step()
    history.forget.append(float(forget.detach()))
    history.right.append(right)
    history.divergence.append(divergence)


def _staying(subject: Subject, sources: Sources, step: int) -> Tensor | float:
    """The forget loss of one earlier task, with the whole projection."""
    if not sources.earlier:
        return 0.0
    sampler, loss = sources.earlier[step % len(sources.earlier)]
    batch = sampler.at(step // len(sources.earlier))
    return loss(subject.model(**inputs_of(batch)).logits, batch)[0]


def _positions(batch: Batch, where: str, step: int) -> Tensor | None:
    """The entity's last token, and every position of a row that marks none; None for everywhere."""
    if where == "everywhere" or batch.entity is None or (where == "both" and step % 2 == 0):
        return None
    return batch.entity | ~batch.entity.any(1, keepdim=True)


def _share(step: int, total: int, anneal: float) -> float:
    return min(1.0, (total - step) / (anneal * total)) if anneal else 1.0


def _reason(history: History, config: MRPConfig, chance: float) -> str:
    window = history.right[-config.patience :] if config.patience else []
    if config.patience and len(window) == config.patience and sum(window) / len(window) <= chance + 0.02:
        return f"the answers won no more often than by chance ({chance:.3f} + 0.02) over {config.patience} steps"
    recent = history.divergence[-20:]
    if config.retain_budget is not None and len(recent) == 20 and sum(recent) / 20 > config.retain_budget:
        return f"the retain KL reached {sum(recent) / 20:.3f} nats a token, the budget is {config.retain_budget}"
    return ""


def _stopped(bases: Bases, stop: Callable[[Subject], bool]) -> bool:
    bases.refresh()
    with installed(bases.subject.model, bases.hooks()), torch.no_grad():
        return stop(bases.subject)


def _save(path: Path, bases: Bases, optimizer: torch.optim.Optimizer, history: History, key: Mapping[str, Any]) -> None:
    tensors = {f"w/{site}": w.detach() for site, w in bases.weights.items()}
    tensors |= {f"start/{site}": w for site, w in bases.start.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": v for name, v in values.items() if isinstance(v, Tensor)}
    archive.write(path, "training", tensors, {"history": asdict(history), "key": dict(key)})


def _resumed(
    path: Path | None, bases: Bases, optimizer: torch.optim.Optimizer, history: History, key: Mapping[str, Any]
) -> int:
    if path is None or not path.exists():
        return 0
    tensors, header = archive.read(path, "training")
    with archive.rebuilding(path, "training"):
        different = sorted(k for k in {*header["key"], *key} if header["key"].get(k) != key.get(k))
    if different:
        raise CheckpointError(
            f"{path} holds a run with other settings ({', '.join(different)}); remove it, or name another file"
        )
    with archive.rebuilding(path, "training"):
        return _restored(tensors, header, bases, optimizer, history)


def _restored(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    bases: Bases,
    optimizer: torch.optim.Optimizer,
    history: History,
) -> int:
    for site, w in bases.weights.items():
        w.data.copy_(archive.tensor_like(tensors, f"w/{site}", w))
        bases.start[site] = archive.tensor_like(tensors, f"start/{site}", w).to(w)
    fresh = optimizer.state_dict()
    groups: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, number, part = name.split("/")
            groups.setdefault(int(number), {})[part] = value
    optimizer.load_state_dict({**fresh, "state": groups})
    for name in ("forget", "right", "divergence"):
        getattr(history, name).extend(header["history"][name])
    return len(history.forget)
