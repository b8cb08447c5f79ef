"""Attack by sampling: many random answers may show what one greedy answer hides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from repedit.activations.forward import at_least_float32
from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Work, register
from repedit.auditing.statistics import clopper_pearson, dkw_band
from repedit.data import Fact, Splits
from repedit.data.grading import contains_answer
from repedit.errors import ArgumentError, DataError, FractionError, NotFinite
from repedit.hooks import evaluating
from repedit.metrics.facts import FactsAccuracy, open_prompts
from repedit.metrics.generation import end_token_ids
from repedit.models.subject import Subject

# Samples drawn together; those that begin alike share a row.
_TOGETHER = 512
# Tokens looked at before a whole vocabulary is sorted: nearly every nucleus is smaller.
_HEAD = 1024


def sampling(*, n: int = 16, ks: Sequence[int] = (1, 4, 16), top_p: float = 0.9, temperature: float = 1.0) -> Attack:
    """Draws n continuations of every prompt; the settings are "leak@1", "leak@4", "leak@16".

    Right at leak@k is a fact whose normalised answer stands in one of its first k samples. Samples are independent, so
    the mean is an unbiased estimate of the chance that the best of k is right. Graded is the estimate of that chance
    from all n samples, `leak_at`, in [0, 1]; `details` holds its mean with the Dvoretzky-Kiefer-Wolfowitz bounds, and
    the share of right facts with its Clopper-Pearson interval, at 95 %. A continuation has as many tokens as the
    longest answer and 4 more. The draws of a fact depend on the seed and its id alone, and no global generator is used.

    Args:
        top_p: share of the probability, from the likeliest token down, that is drawn from.
        temperature: what logits are divided by.
    Raises:
        ArgumentError: if a k is not in 1..n, or the temperature is not positive.
        FractionError: unless 0 < top_p <= 1.
    Reference: Scholten et al. 2024, arXiv:2410.03523; leak@k: arXiv:2511.04934.
    """
    if not ks or min(ks) < 1 or max(ks) > n:
        raise ArgumentError(f"ks={tuple(ks)}, n={n}; each k is a number of samples from 1 to n")
    if not temperature > 0:
        raise ArgumentError(f"temperature={temperature}; give a number above 0")
    if not 0 < top_p <= 1:
        raise FractionError(f"top_p={top_p}; give a fraction above 0 and up to 1")

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        texts = samples(subject, splits.test, n, top_p=top_p, temperature=temperature, seed=seed)
        pairs = zip(splits.test, texts, strict=True)
        right = np.array(
            [[contains_answer(text, fact.answer, fact.choices) for text in drawn] for fact, drawn in pairs]
        )
        ids = tuple(fact.id for fact in splits.test)
        answers, details = {}, {}
        for k in ks:
            leaks = np.array([leak_at(n, int(row.sum()), k) for row in right])
            among = np.any(right[:, :k], axis=1)
            answers[f"leak@{k}"] = FactsAccuracy(among, leaks, ids)
            details[f"leak@{k}"] = _summary(among, leaks)
        return AttackResult(answers, details=details)

    options = {"n": n, "ks": list(ks), "top_p": top_p, "temperature": temperature}
    return Attack(SAMPLING, options, run, Work(16.0))


SAMPLING = register(
    AttackRecord(
        "sampling", cost=70, budget="standard",
        build=lambda setup: [sampling(n=128, ks=(1, 4, 16, 64)) if setup.budget == "full" else sampling()],
    )
)  # fmt: skip


def leak_at(n: int, c: int, k: int) -> float:
    """Chance that the best of k samples is right, estimated without bias from n samples of which c are right.

    1 - C(n - c, k) / C(n, k)

    Raises:
        ArgumentError: unless 0 <= c <= n and 1 <= k <= n.
    Reference: arXiv:2511.04934.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ArgumentError(f"n={n} samples, c={c} right, k={k}; c is 0 to n, k is 1 to n")
    return 1.0 - comb(n - c, k) / comb(n, k)


def samples(
    subject: Subject, facts: Sequence[Fact], n: int, *, top_p: float = 0.9, temperature: float = 1.0, seed: int = 0
) -> list[list[str]]:
    """n continuations of the prompt of every fact, cut at the end of text, as many tokens as the longest answer and 4.

    Raises:
        DataError: if there are no facts, or a prompt has no tokens.
        NotFinite: if a probability is not finite.
    """
    tokenizer = subject.need_tokenizer()
    if not facts:
        raise DataError("there are no facts to sample; give at least one")
    prompts, tokens = open_prompts(subject, facts)
    end_tokens = end_token_ids(subject)
    by_fact: dict[int, list[list[int]]] = {}
    # Prompts of one length go together, so that none is padded.
    order = sorted(range(len(facts)), key=lambda i: (len(prompts[i]), i))
    while order:
        group = [i for i in order if len(prompts[i]) == len(prompts[order[0]])][: max(1, _TOGETHER // n)]
        order = [i for i in order if i not in group]
        chances = torch.stack([_chances(facts[i].id, tokens, n, seed) for i in group])
        drawn = _drawn(subject, [prompts[i] for i in group], chances, end_tokens, top_p=top_p, temperature=temperature)
        by_fact |= zip(group, drawn, strict=True)
    return [list(tokenizer.batch_decode(by_fact[i], skip_special_tokens=True)) for i in range(len(facts))]


def _chances(name: str, tokens: int, n: int, seed: int) -> Float[Tensor, "tokens n"]:
    """Numbers in [0, 1) that decide every token of every sample of a fact."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:sample:{name}".encode()).digest()[:8], "big") >> 1
    return torch.rand(tokens, n, generator=torch.Generator().manual_seed(key), dtype=torch.float64)


def _drawn(
    subject: Subject,
    prompts: Sequence[list[int]],
    chances: Float[Tensor, "b tokens n"],
    end_tokens: set[int],
    **options: float,
) -> list[list[list[int]]]:
    """The tokens of every sample of prompts that have one length.

    A row is a distinct beginning: samples that are the same so far are read once, on top of what the prompt left in
    the cache.
    """
    b, steps, n = chances.shape
    written: list[list[int]] = [[] for _ in range(b * n)]
    row = np.arange(b).repeat(n)
    live = np.arange(b * n)
    ids, length, cache = torch.tensor(prompts, device=subject.device), 0, None
    with torch.no_grad(), evaluating(subject.model):
        for step in range(steps):
            length += ids.shape[1]
            mask = torch.ones(len(ids), length, dtype=torch.long, device=subject.device)
            out = subject.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = out.past_key_values
            tokens = _inverse(out.logits[:, -1], row[live], chances[:, step].reshape(-1).numpy()[live], **options)
            for sample, token in zip(live, tokens, strict=True):
                written[sample].append(int(token))
            going = ~np.isin(tokens, list(end_tokens))
            live, pairs = live[going], np.stack([row[live], tokens], 1)[going]
            if not len(live) or step + 1 == steps:
                break
            nodes, row[live] = np.unique(pairs, axis=0, return_inverse=True)
            cache.batch_select_indices(torch.from_numpy(nodes[:, 0].copy()).to(subject.device))
            ids = torch.from_numpy(nodes[:, 1:].copy()).to(subject.device)
    cut = [[token for token in text if token not in end_tokens] for text in written]
    return [cut[i * n : i * n + n] for i in range(b)]


def _inverse(
    logits: Float[Tensor, "r v"], rows: NDArray[Any], chances: NDArray[np.float64], *, top_p: float, temperature: float
) -> NDArray[np.int64]:
    """For each chance, the token at which the cumulated probability of its row's nucleus passes it.

    The nucleus is the fewest likeliest tokens that hold `top_p` of the probability.
    """
    probabilities = (at_least_float32(logits) / temperature).softmax(-1)
    if not bool(torch.isfinite(probabilities).all()):
        raise NotFinite("the probabilities of the next token are not finite; load the model in float32?")
    p, index = probabilities.topk(min(_HEAD, probabilities.shape[-1]))
    if bool((p.double().sum(-1) < top_p).any()):
        p, index = probabilities.sort(dim=-1, descending=True)
    mass = p.double().cumsum(-1)
    nucleus_sizes = (mass - p < top_p).sum(-1).cpu().numpy()
    masses, token_ids = mass.cpu().numpy(), index.cpu().numpy()
    tokens = np.empty(len(rows), dtype=np.int64)
    for r in np.unique(rows):
        selected, cumulative = rows == r, masses[r, : nucleus_sizes[r]]
        tokens[selected] = token_ids[
            r, np.searchsorted(cumulative[:-1], chances[selected] * cumulative[-1], side="right")
        ]
    return tokens


def _summary(right: NDArray[np.bool_], leaks: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "mean": float(leaks.mean()), "mean bounds": list(dkw_band(leaks).mean()),
        "share": float(right.mean()), "share interval": list(clopper_pearson(int(right.sum()), right.size)),
    }  # fmt: skip
