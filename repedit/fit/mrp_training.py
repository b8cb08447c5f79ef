"""The training of MRP: its settings, the loop, the losses, and the bases that are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from repedit.activations.forward import at_least_float32, inputs_of
from repedit.arch import HookFn, hooks_at
from repedit.arguments import checked
from repedit.data import Batch
from repedit.data.encoding import common_prefix
from repedit.errors import ArgumentError, TrainingError, check_seed, is_finite, is_whole
from repedit.fit.linalg import union
from repedit.hooks import Hook, check_differentiable, evaluating, installed
from repedit.io import archive
from repedit.linear_maps import LowRank
from repedit.models.subject import Subject
from repedit.sites import Site
from repedit.training import resume
from repedit.training.optimizers import OPTIMIZERS, linear_decay, set_lr
from repedit.training.sampler import BatchSampler, answer_ids, label_logits, label_mask, logits_for


@dataclass(frozen=True)
@checked
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
    """Rows in a step, of the forget and of the retain set each."""
    text_rows: int = 2
    """Chunks of running text in a step."""
    length: int = 128
    """Largest number of tokens of a row."""
    text_length: int = 48
    """Tokens of a chunk of running text."""
    retain_weight: float = 0.0
    """Of the cross-entropy on the retain rows."""
    kl_weight: float = 1.6
    """Of KL(original || edited) on the retain rows and on the text, in nats per token."""
    shown: int = 3
    """Also ask each fact after this many others of its domain, in a list without words; 0 for not."""
    forget_at: str = "both"
    """Where the projection acts while the forget loss is computed: at the last token of the "entity" alone (where rows
    mark one), so that what the model knows of the entity is removed rather than the wording; "everywhere"; or "both" in
    turn."""
    among: str = "answers"
    """What the right answer must lose to: the other "answers" of the forget set, or the whole "vocabulary"."""
    cap: float | None = None
    """Largest loss that a forget token can contribute, in nats; None for 1.2 ln(candidates)."""
    clip: float = 1.0
    optimizer: str = "adam"
    """"adam" or "sgd"."""
    start: str = "random"
    """The closed form that training starts from, which needs a pass over both sets; "random" needs none."""
    anneal: float = 0.4
    """The learning rate falls linearly to 0 over this share of the steps, the last ones."""
    patience: int | None = None
    """Stop once the answers have won no more often than by chance for this many steps; None to take every step."""
    retain_budget: float | None = None
    """Stop once the retain KL, averaged over 20 steps, exceeds this many nats per token."""
    evaluate_every: int = 20
    """Steps between calls of `stop`, and between saved states."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ArgumentError(f"steps={self.steps}, epochs={self.epochs}: give one of them, and None for the other")
        whole = {"batch_size": 1, "shown": 0, "text_rows": 0, "text_length": 2, "length": 2, "evaluate_every": 1}
        minima: dict[str, float] = {
            **whole,
            "clip": 0,
            "retain_weight": 0,
            "kl_weight": 0,
            "steps": 1,
            "epochs": 1,
            "patience": 1,
        }
        # An infinite cap or clip means none; NaN fails every comparison.
        minima |= {"cap": -math.inf, "retain_budget": -math.inf}
        values = {name: getattr(self, name) for name in minima if getattr(self, name) is not None}
        wrong = [
            name for name, value in values.items() if not isinstance(value, int | float) or not value >= minima[name]
        ]
        wrong += [n for n in (*whole, "steps", "epochs", "patience") if n in values and not is_whole(values[n], 0)]
        wrong += [name for name in ("retain_weight", "kl_weight") if not is_finite(getattr(self, name))]
        wrong += [] if is_finite(self.lr) and self.lr > 0 and 0 <= self.anneal <= 1 else ["lr or anneal"]
        wrong += [] if self.among in ("answers", "vocabulary") else ["among"]
        wrong += [] if self.forget_at in ("entity", "everywhere", "both") else ["forget_at"]
        wrong += [] if self.optimizer in ("adam", "sgd") else ["optimizer"]
        if wrong:
            raise ArgumentError(f"{', '.join(dict.fromkeys(wrong))} out of range in {self}")
        check_seed(seed=self.seed)


# --- The loop: the bases move, the weights do not


@dataclass(frozen=True, eq=False)
class TrainingSets:
    """What a step draws from."""

    forget: BatchSampler
    forget_loss: ForgetLoss
    retain: tuple[BatchSampler, ...]
    rehearsed: tuple[tuple[BatchSampler, ForgetLoss], ...] = ()
    """The forget sets of earlier tasks; each step trains on one of them as well, in turn."""


@dataclass(eq=False)
class History:
    """What happened, one entry for each step."""

    forget: list[float] = field(default_factory=list)
    """Forget loss: minus the mean capped NLL, nats."""
    right: list[float] = field(default_factory=list)
    """Share of forget tokens that are still the most likely candidate."""
    divergence: list[float] = field(default_factory=list)
    """KL(original || edited) on what is retained, nats per token."""
    reason: str = ""
    """Why training stopped."""


@torch.enable_grad()
def train(
    bases: Bases,
    sets: TrainingSets,
    config: MRPConfig,
    *,
    stop: Callable[[Subject], bool] | None = None,
    state: Path | None = None,
    key: Mapping[str, object] | None = None,
    progress: bool | None = None,
) -> History:
    """Minimise -min(CE_f, cap) + retain_weight CE_r + kl_weight KL over the bases; the weights are frozen.

    Args:
        state: a file in which the training is saved every `evaluate_every` steps, and from which it continues.
        key: what must be equal for a saved training to be continued.
    Raises:
        TrainingError: if a loss is not finite, naming the step and the last finite loss.
        FingerprintError: if `state` holds a training with other settings.
    """
    check_differentiable(bases.subject.model)
    total = config.steps or sets.forget.steps_for(config.epochs or 1)
    history, weights = History(), {str(site): w for site, w in bases.weights.items()}
    optimizer = OPTIMIZERS[config.optimizer](list(weights.values()), lr=config.lr)
    key = {**(key or {}), "config": asdict(config)}
    if state is not None and state.exists():
        _restore(state, bases, weights, optimizer, history, key)
    begin = len(history.forget)
    bar = tqdm(range(begin, total), initial=begin, total=total, desc="mrp", leave=False,
               disable=None if progress is None else not progress)  # fmt: skip
    with frozen_weights(bases.subject):
        for step in bar:
            set_lr(optimizer, config.lr * linear_decay(step, total, config.anneal))
            _step(bases, sets, config, optimizer, history, step)
            bar.set_postfix_str(f"answers right {history.right[-1]:.2f}, retain KL {history.divergence[-1]:.3f}")
            history.reason = _stop_reason(history, config, sets.forget_loss.chance)
            if not history.reason and (step + 1) % config.evaluate_every == 0:
                if stop is not None and _evaluate(bases, stop):
                    history.reason = "the caller's stop rule"
                elif state is not None:
                    start = {f"start/{site}": w for site, w in bases.start.items()}
                    resume.save(state, weights, optimizer, {"history": asdict(history)}, key=key, other=start)
            if history.reason:
                break
    history.reason = history.reason or f"all {total} steps taken"
    bases.refresh()
    return history


@contextmanager
def frozen_weights(subject: Subject) -> Iterator[None]:
    """Eval mode in which no weight of the model gets a gradient; mode and `requires_grad` are restored afterwards."""
    required = [(p, p.requires_grad) for p in subject.model.parameters()]
    with evaluating(subject.model):
        try:
            for p, _ in required:
                p.requires_grad_(False)
            yield
        finally:
            for p, requires_grad in required:
                p.requires_grad_(requires_grad)


def _restore(
    state: Path,
    bases: Bases,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    history: History,
    key: Mapping[str, object],
) -> None:
    header, tensors = resume.restore(state, weights, optimizer, key=key)
    with archive.rebuilding(state, "training"):
        for site, w in bases.weights.items():
            bases.start[site] = archive.tensor_like(tensors, f"start/{site}", w).to(w)
        for name in ("forget", "right", "divergence"):
            getattr(history, name).extend(header["history"][name])


def _step(
    bases: Bases, sets: TrainingSets, config: MRPConfig, optimizer: torch.optim.Optimizer, history: History, step: int
) -> None:
    subject, batch = bases.subject, sets.forget.at(step)
    retain = [sampler.at(step) for sampler in sets.retain]
    references = [reference_log_probs(subject, rows) for rows in retain]
    optimizer.zero_grad()
    bases.refresh()
    with installed(subject.model, bases.hooks()), torch.enable_grad():
        bases.projected = _projected_positions(batch, config.forget_at, step)
        forget, right = sets.forget_loss(_forget_logits(subject, batch, sets.forget_loss), batch)
        bases.projected = None
        loss, divergence = forget + _rehearsal_loss(subject, sets, step), 0.0
        for rows, reference in zip(retain, references, strict=True):
            kl, ce = retain_losses(subject, rows, reference)
            loss = loss + config.kl_weight * kl + (config.retain_weight * ce if rows.answer is not None else 0.0)
            divergence += float(kl.detach()) / len(retain)
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


def _rehearsal_loss(subject: Subject, sets: TrainingSets, step: int) -> Tensor | float:
    """The forget loss of one earlier task, with the whole projection."""
    if not sets.rehearsed:
        return 0.0
    sampler, forget_loss = sets.rehearsed[step % len(sets.rehearsed)]
    batch = sampler.at(step // len(sets.rehearsed))
    return forget_loss(_forget_logits(subject, batch, forget_loss), batch)[0]


def _forget_logits(subject: Subject, batch: Batch, loss: ForgetLoss) -> Float[Tensor, "b s v"]:
    # Whole rows: projected positions are those of the whole batch.
    return logits_for(subject, batch, label_mask(batch, loss.place), whole=True)


def _projected_positions(batch: Batch, where: str, step: int) -> Bool[Tensor, "b t"] | None:
    """The last token of the entity, and every position of a row that marks none; None for everywhere."""
    if where == "everywhere" or batch.entity is None or (where == "both" and step % 2 == 0):
        return None
    return batch.entity | ~batch.entity.any(1, keepdim=True)


def _stop_reason(history: History, config: MRPConfig, chance: float) -> str:
    window = history.right[-config.patience :] if config.patience else []
    if config.patience and len(window) == config.patience and sum(window) / len(window) <= chance + 0.02:
        return f"the answers won no more often than by chance ({chance:.3f} + 0.02) over {config.patience} steps"
    recent = history.divergence[-20:]
    if config.retain_budget is not None and len(recent) == 20 and sum(recent) / 20 > config.retain_budget:
        return f"the retain KL reached {sum(recent) / 20:.3f} nats a token, the budget is {config.retain_budget}"
    return ""


def _evaluate(bases: Bases, stop: Callable[[Subject], bool]) -> bool:
    bases.refresh()
    with installed(bases.subject.model, bases.hooks()), torch.no_grad():
        return stop(bases.subject)


# --- The losses: the answer must lose to the other answers, and retained text must be predicted as before


@dataclass(frozen=True, eq=False)
class ForgetLoss:
    """-mean min(-log p, cap), p the probability of the right token among the candidates.

    With rows that mark their answers (among="answers") only the first token counts in which the answers of the set differ,
    and the candidates are that token of every answer, so the model may still know what kind of answer is expected.
    Otherwise every token counts, among the whole vocabulary. An unbounded -CE has no minimum; the cap is
    1.2 ln(candidates).
    """

    candidates: Int[Tensor, " c"] | None
    """Token ids, or None for the whole vocabulary."""
    cap: float
    chance: float
    """1 / number of candidates."""
    place: int | None = None
    """Index, within the answer, of the token that counts; None for all of them."""

    def __call__(self, logits: Float[Tensor, "b s v"], batch: Batch) -> tuple[Float[Tensor, ""], float]:
        """(loss, share of the tokens that are still the most likely candidate)."""
        labels = label_mask(batch, self.place)
        scores, targets = label_logits(logits, labels), batch.input_ids[labels]
        if not len(targets):
            raise TrainingError("a batch has no token to forget: every answer is masked")
        own = scores.gather(1, targets[:, None])[:, 0]
        if self.candidates is not None:
            scores = scores[:, self.candidates.to(scores.device)]
        nll = scores.logsumexp(1) - own
        return -nll.clamp(max=self.cap).mean(), float((own >= scores.amax(1)).double().mean())


def forget_loss(sampler: BatchSampler, subject: Subject, *, among: str, cap: float | None) -> ForgetLoss:
    """The forget loss of a set of rows; `cap` replaces 1.2 ln(candidates)."""
    answers = [answer for row in sampler.rows for answer in answer_ids(row)]
    place = _first_difference(answers)
    first_tokens = sorted({answer[place] for answer in answers if len(answer) > place})
    use_answers = among == "answers" and len(first_tokens) > 1
    count = len(first_tokens) if use_answers else subject.model.get_input_embeddings().weight.shape[0]
    return ForgetLoss(
        candidates=torch.tensor(first_tokens, device=subject.device) if use_answers else None,
        cap=1.2 * math.log(count) if cap is None else cap, chance=1 / count, place=place if use_answers else None,
    )  # fmt: skip


def _first_difference(answers: Sequence[tuple[int, ...]]) -> int:
    """Length of the prefix that all answers share, such as a separate space, leaving at least one token of each."""
    distinct = sorted(set(answers))
    if len(distinct) < 2:
        return 0
    return max(0, min(common_prefix(distinct[0], distinct[-1]), len(distinct[0]) - 1))


def retain_losses(
    subject: Subject, batch: Batch, reference: Float[Tensor, "n v"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(KL(original || edited) in nats per token, mean cross-entropy of the answers) on a batch to retain."""
    logits = subject.model(**inputs_of(batch)).logits
    log_probs = at_least_float32(logits[batch.attention_mask]).log_softmax(-1)
    divergence = (reference.exp() * (reference - log_probs)).sum(-1).mean()
    labels = label_mask(batch)
    return divergence, cross_entropy(label_logits(logits, labels), batch.input_ids[labels])


def reference_log_probs(subject: Subject, batch: Batch) -> Float[Tensor, "n v"]:
    """Log-probabilities of the original model at the real tokens of a batch; call it without the hooks."""
    with torch.no_grad():
        return at_least_float32(subject.model(**inputs_of(batch)).logits[batch.attention_mask]).log_softmax(-1)


# --- The trained parameters: a basis for each site, or one for the whole stream


class Bases:
    """W, (d, k) at each site; the edit removes span(W) and what earlier tasks removed, jointly orthonormal.

    Q = qr((I - B B^T) W) with B the basis of the earlier tasks, in float32 (float64 for W in float64). Only span(W)
    matters, so neither scale nor choice of basis does; gradients pass through the QR.
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
        distinct = list(starts.items())[:1] if shared else starts.items()
        self.weights = {site: map_.u.to(subject.device, copy=True).requires_grad_() for site, map_ in distinct}
        self.earlier = {site: previous[site].u.to(subject.device) for site in self.weights if site in previous}
        self.start = {site: w.detach().clone() for site, w in self.weights.items()}
        self.current: dict[Site, Tensor] = {}
        """The orthonormal bases of the parameters."""
        self.projected: Bool[Tensor, "b t"] | None = None
        """Positions that the hooks project at; None for all."""
        self.refresh()

    def refresh(self) -> None:
        """Recompute the orthonormal bases from the parameters; once in a step, before the forward passes."""
        self.current = {site: self._orthonormal(site, w) for site, w in self.weights.items()}

    def hooks(self) -> list[Hook]:
        """Hooks that project with the current bases, through which gradients reach the parameters."""
        model, layout = self.subject.model, self.subject.layout
        return [hook for s in self.sites for hook in hooks_at(model, layout, s, self._visit(s), replaces=True)]

    def maps(self) -> dict[Site, LowRank]:
        """What is removed at each site: the union of the span of the earlier tasks and the trained one."""
        self.refresh()
        maps = {}
        for site in self.sites:
            new = self.current[self._key(site)].detach().double().cpu()
            parts = [LowRank(new, new)] if site not in self.previous else [self.previous[site], LowRank(new, new)]
            u = union(*parts).u.float().contiguous()
            maps[site] = LowRank(u, u)
        return maps

    def overlap(self) -> float:
        """||U_0^T U||^2 / k, averaged over the bases: 1 where training stayed in the span it started from."""
        overlaps = []
        for site, start in self.start.items():
            product = torch.linalg.qr(start.double())[0].T @ self.current[site].detach().double()
            overlaps.append(float(product.square().sum() / max(start.shape[1], 1)))
        return sum(overlaps) / len(overlaps)

    def _orthonormal(self, site: Site, w: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        basis = self.earlier.get(site)
        return torch.linalg.qr(w if basis is None else w - basis @ (basis.T @ w))[0]

    def _key(self, site: Site) -> Site:
        return self.sites[0] if self.shared else site

    def _visit(self, site: Site) -> HookFn:
        key = self._key(site)

        def visit(x: Tensor, _channels: slice, _tokens: Tensor | None) -> Tensor:
            work = x.to(torch.promote_types(x.dtype, torch.float32))
            q = self.current[key].to(work)
            if key in self.earlier:
                q = torch.cat([self.earlier[key].to(work), q], 1)
            new = (work - (work @ q) @ q.T).to(x.dtype)
            return new if self.projected is None else torch.where(self.projected.reshape(*x.shape[:-1], 1), new, x)

        return visit
