"""What MRP training minimises: the answer must lose to the other answers, and retained text must read as before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from repedit.activations.passes import at_least_float32, inputs_of
from repedit.data import Batch
from repedit.data.encoding import shared
from repedit.errors import TrainingError
from repedit.fit.sampling import Sampler
from repedit.models import Subject


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
    return max(0, min(shared(distinct[0], distinct[-1]), len(distinct[0]) - 1)) if len(distinct) > 1 else 0


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
