"""The training loop of MRP: its loss, the bases that move, and steps that can be taken again after a break."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from repedit.activations.forward import at_least_float32, inputs_of
from repedit.arch import hooks_at
from repedit.data import Batch
from repedit.data.encoding import common_prefix
from repedit.errors import ArgumentError, CheckpointError, TrainingError, check_seed, is_finite, is_whole
from repedit.fit.linalg import union
from repedit.hooks import Hook, evaluating, installed
from repedit.io import archive
from repedit.linear_maps import LowRank
from repedit.models.subject import Subject
from repedit.sites import Site
from repedit.training.sampler import Sampler

# --- Orthonormal bases as trainable parameters: what MRP moves, one a site or one for the whole stream


class Bases:
    """W, (d, k) a site; the edit removes span(W) and what earlier tasks removed, jointly orthonormal.

    Q = qr((I - B B^T) W) with B the basis of the earlier tasks, in float32 (float64 for W in float64). Only span(W)
    matters, so the parametrisation is free of scale and of the choice of basis; gradients pass through the QR.
    """

    def __init__(
        self,
        subject: Subject,
        starts: Mapping[Site, LowRank],
        previous: Mapping[Site, LowRank],
        *,
        shared: bool = False,
    ) -> None:
        self.subject, self.sites, self.previous, self.shared = subject, tuple(starts), previous, shared
        chosen = list(starts.items())[:1] if shared else starts.items()
        device = subject.device
        self.weights = {site: map_.u.to(device, copy=True).requires_grad_() for site, map_ in chosen}
        self.earlier = {site: previous[site].u.to(device) for site in self.weights if site in previous}
        self.start = {site: w.detach().clone() for site, w in self.weights.items()}
        self.now: dict[Site, Tensor] = {}
        self.only: Tensor | None = None
        """Positions (b, t) that the hooks project at; None for all."""
        self.refresh()

    def refresh(self) -> None:
        """Recompute the orthonormal bases from the parameters; once a step, before the forward passes."""
        self.now = {site: self._orthonormal(site, w) for site, w in self.weights.items()}

    def hooks(self) -> list[Hook]:
        """Hooks that project with the current bases, and gradients flow to the parameters."""
        model, plan = self.subject.model, self.subject.layout
        return [h for s in self.sites for h in hooks_at(model, plan, s, self._visit(s), replaces=True)]

    def maps(self) -> dict[Site, LowRank]:
        """What is removed at each site: the union of the earlier tasks' span and the trained one."""
        self.refresh()
        found = {}
        for site in self.sites:
            new = self.now[self._key(site)].detach().double().cpu()
            parts = [LowRank(new, new)] if site not in self.previous else [self.previous[site], LowRank(new, new)]
            u = union(*parts).u.float().contiguous()
            found[site] = LowRank(u, u)
        return found

    def overlap(self) -> float:
        """||U_0^T U||^2 / k, mean over the bases: 1 where training stayed in the span it began with."""
        shares = [
            float(
                (torch.linalg.qr(w0.double())[0].T @ self.now[site].detach().double()).square().sum()
                / max(w0.shape[1], 1)
            )
            for site, w0 in self.start.items()
        ]
        return sum(shares) / len(shares)

    def _orthonormal(self, site: Site, w: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        basis = self.earlier.get(site)
        return torch.linalg.qr(w if basis is None else w - basis @ (basis.T @ w))[0]

    def _key(self, site: Site) -> Site:
        return self.sites[0] if self.shared else site

    def _visit(self, site: Site) -> Any:
        key = self._key(site)

        def visit(x: Tensor, _at: slice, _tokens: Tensor | None) -> Tensor:
            work = x.to(torch.promote_types(x.dtype, torch.float32))
            q = self.now[key].to(work)
            if key in self.earlier:
                q = torch.cat([self.earlier[key].to(work), q], 1)
            new = (work - (work @ q) @ q.T).to(x.dtype)
            return new if self.only is None else torch.where(self.only.reshape(*x.shape[:-1], 1), new, x)

        return visit


# --- What MRP training minimises: the answer must lose to the other answers, and retained text must read as before


@dataclass(frozen=True, eq=False)
class Forgetting:
    """-mean min(-log p, cap), p the probability of the right token among the candidates; and how often it still wins.

    With rows that mark their answers (among="answers") it is the first token in which the answers of the set differ, and
    the candidates are that token of every answer, so the model may go on knowing what kind of answer is due. Else every
    token counts, among the whole vocabulary. An unbounded -CE has no minimum; the cap is 1.2 ln(candidates).
    """

    candidates: Int[Tensor, " c"] | None
    """Token ids, or None for the whole vocabulary."""
    cap: float
    chance: float
    """1 / number of candidates."""
    place: int | None = None
    """Index, within the answer, of the token that counts; None for all of them."""

    def __call__(self, logits: Float[Tensor, "b t v"], batch: Batch) -> tuple[Float[Tensor, ""], float]:
        """(loss, share of the tokens that are still the likeliest candidate)."""
        use = targets_of(batch, self.place)
        scores, right = at_least_float32(logits[:, :-1][use[:, 1:]]), batch.input_ids[use]
        if not len(right):
            raise TrainingError("a batch has no token to forget: every answer is masked")
        own = scores.gather(1, right[:, None])[:, 0]
        if self.candidates is not None:
            scores = scores[:, self.candidates.to(scores.device)]
        surprise = scores.logsumexp(1) - own
        return -surprise.clamp(max=self.cap).mean(), float((own >= scores.amax(1)).double().mean())


def forgetting(sampler: Sampler, subject: Subject, *, among: str, cap: float | None) -> Forgetting:
    """The forget loss of a set of rows; `cap` replaces 1.2 ln(candidates)."""
    answers = [answer for row in sampler.rows for answer in answers_of(row)]
    place = _common(answers)
    firsts = sorted({answer[place] for answer in answers if len(answer) > place})
    use = among == "answers" and len(firsts) > 1
    count = len(firsts) if use else subject.model.get_input_embeddings().weight.shape[0]
    return Forgetting(
        candidates=torch.tensor(firsts, device=subject.device) if use else None,
        cap=1.2 * math.log(count) if cap is None else cap,
        chance=1 / count,
        place=place if use else None,
    )


def answers_of(batch: Batch) -> list[tuple[int, ...]]:
    """The token ids of the answer of each row; empty where none are marked."""
    if batch.answer is None:
        return [()] * len(batch.document)
    return [tuple(ids[mask].tolist()) for ids, mask in zip(batch.input_ids, batch.answer, strict=True)]


def targets_of(batch: Batch, place: int | None = None) -> Bool[Tensor, "b t"]:
    """The tokens a loss is about: the answers, or one token of each; all but the first token where none are marked."""
    mask = batch.attention_mask if batch.answer is None else batch.answer & batch.attention_mask
    if place is not None and batch.answer is not None:
        mask = mask & (mask.cumsum(1) == place + 1)
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:] & batch.attention_mask[:, :-1]], 1)


def _common(answers: Sequence[tuple[int, ...]]) -> int:
    """Length of the beginning that all answers share, such as a space of its own; at least a token of each is left to lose."""
    distinct = sorted(set(answers))
    return max(0, min(common_prefix(distinct[0], distinct[-1]), len(distinct[0]) - 1)) if len(distinct) > 1 else 0


def retained(
    subject: Subject, batch: Batch, teacher: Float[Tensor, "n v"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(KL(original || edited) a token in nats, mean cross-entropy of the answers) on a batch to keep."""
    logits = subject.model(**inputs_of(batch)).logits
    student = real(logits, batch).log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
    use = targets_of(batch)
    picked = at_least_float32(logits[:, :-1][use[:, 1:]])
    return divergence, torch.nn.functional.cross_entropy(picked, batch.input_ids[use])


def teaching(subject: Subject, batch: Batch) -> Float[Tensor, "n v"]:
    """Log-probabilities of the original model at the real tokens of a batch; call it without the hooks."""
    with torch.no_grad():
        return real(subject.model(**inputs_of(batch)).logits, batch).log_softmax(-1)


def real(logits: Float[Tensor, "b t v"], batch: Batch) -> Float[Tensor, "n v"]:
    """The rows of the logits that are not padding."""
    return at_least_float32(logits[batch.attention_mask])


# --- The training loop of MRP: bases move, weights do not, and every step can be taken again after a break


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
