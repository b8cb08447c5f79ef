"""What a model writes, and how far that agrees with a reference text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from repedit.errors import ArgumentError, DataError, MissingDependency, is_whole
from repedit.hooks import evaluating
from repedit.metrics.streaming import check_logits, ends, prompt_tokens
from repedit.models import Subject


def generate(
    subject: Subject,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    chat: bool = False,
    progress: bool | None = None,
) -> tuple[str, ...]:
    """The greedy continuation of each prompt, without the prompt and without special tokens.

    Prompts of like length are read together, padded on the left; a padded prompt is continued as it is alone.

    Args:
        chat: put each prompt in the tokenizer's chat template, as a message of the user. This moves scores: say so
            beside them.
    Raises:
        ArgumentError: without a tokenizer, or one with a chat template where it is asked for, or with a number below 1.
        DataError: if a prompt is no text, has no token, is over, or leaves the model no room to go on.
        NotFinite: if logits are not finite.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not is_whole(value):
            raise ArgumentError(f"{name}={value}; give at least 1")
    if isinstance(prompts, str):
        raise ArgumentError(f"prompts={prompts[:40]!r} is one text; give a list of prompts")
    tokens = [_tokens(subject, prompt, max_new_tokens, chat) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(tokens[i]))
    found: dict[int, str] = {}
    quiet = None if progress is None else not progress
    for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=quiet, leave=False):
        part = order[start : start + batch_size]
        names = [_named(prompts[i]) for i in part]
        found |= zip(part, written(subject, [tokens[i] for i in part], max_new_tokens, names), strict=True)
    return tuple(found[i] for i in range(len(prompts)))


def written(subject: Subject, prompts: Sequence[Sequence[int]], tokens: int, names: Sequence[str]) -> list[str]:
    """The greedy continuation of each prompt: the most likely token, until one ends the text or there are so many.

    Prompts of several lengths are padded on the left. `model.generate` is not used: it follows the checkpoint's settings
    for generation, which can penalise, forbid or force tokens also where do_sample is False.

    Args:
        names: what each prompt is called in an error message.
    Raises:
        NotFinite: if logits are not finite.
    """
    tokenizer, last = subject.need_tokenizer(), ends(subject)
    fresh, mask = _padded(subject, prompts)
    padded = not bool(mask.all()) and "position_ids" in inspect.signature(subject.model.forward).parameters
    texts: list[list[int]] = [[] for _ in prompts]
    live, cache = list(range(len(prompts))), None
    with torch.no_grad(), evaluating(subject.model):
        while live and len(texts[live[0]]) < tokens:
            places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]} if padded else {}
            out = subject.model(
                input_ids=fresh, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **places
            )
            logits, cache = out.logits[:, -1].float(), out.past_key_values
            for row in live:
                check_logits(logits[row : row + 1], f"{names[row]} and {len(texts[row])} tokens more")
            chosen = logits.argmax(-1)
            for row, token in zip(live, chosen[live].tolist(), strict=True):
                texts[row].append(token)
            live = [row for row in live if texts[row][-1] not in last]
            fresh, mask = chosen[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    cut = [text[:-1] if text and text[-1] in last else text for text in texts]
    return list(tokenizer.batch_decode(cut, skip_special_tokens=True))


def continuations(subject: Subject, prompts: Sequence[str], *, tokens: int = 40) -> tuple[str, ...]:
    """The greedy continuation of each prompt, without the prompt, each read alone.

    Raises:
        ArgumentError, DataError: as `generate` does.
    """
    return generate(subject, prompts, max_new_tokens=tokens, batch_size=1, progress=False)


@dataclass(frozen=True, eq=False)
class Rouge:
    """Overlap of words of each output with its reference, in [0, 1]."""

    rouge1_recall: NDArray[np.float64]
    """Share of the reference's words that the output has."""
    rougeL_recall: NDArray[np.float64]
    """Share of the reference's words that the output has in the same order."""
    rougeL_f1: NDArray[np.float64]
    """Harmonic mean of that and the same share of the output's words."""

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {values.mean():.4f}" for name, values in vars(self).items())
        return f"Rouge({means}; {len(self.rougeL_f1)} texts)"


def rouge(references: Sequence[str], outputs: Sequence[str], *, stemmer: bool = True) -> Rouge:
    """ROUGE-1 recall, ROUGE-L recall and ROUGE-L F1 of each output; 0 where a side has no word.

    Args:
        stemmer: compare stems of words, as TOFU and SemEval do; MUSE compares words.
    Raises:
        MissingDependency: without the package rouge-score.
        DataError: if the two lists differ in length, or are empty.
    Reference: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
    """
    _check_pairs(references, outputs)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependency("ROUGE needs rouge-score: pip install rouge-score==0.1.2") from error
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmer)
    found = [scorer.score(reference, output) for reference, output in zip(references, outputs, strict=True)]
    values = [[s["rouge1"].recall, s["rougeL"].recall, s["rougeL"].fmeasure] for s in found]
    return Rouge(*np.array(values, dtype=np.float64).T)


def exact_match(references: Sequence[str], outputs: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each whole output is its reference, white space around them and case apart.

    Raises:
        DataError: if the two lists differ in length, or are empty.
    """
    _check_pairs(references, outputs)
    pairs = zip(references, outputs, strict=True)
    return np.array([reference.strip().lower() == output.strip().lower() for reference, output in pairs])


def _check_pairs(references: Sequence[str], outputs: Sequence[str]) -> None:
    if len(references) != len(outputs) or not references:
        raise DataError(f"{len(references)} references and {len(outputs)} outputs; give one output a reference")


def _tokens(subject: Subject, prompt: str, room: int, chat: bool) -> list[int]:
    if chat and not subject.need_tokenizer().chat_template:
        raise ArgumentError("chat=True and the tokenizer has no chat template; leave chat out")
    asked = [{"role": "user", "content": prompt}] if chat else prompt
    return prompt_tokens(subject, asked, room=room, called=_named(prompt))


def _named(prompt: Any) -> str:
    return f"the prompt {str(prompt)[:40]!r}"


def _padded(subject: Subject, tokens: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Ids padded on the left, and their mask."""
    width = max(map(len, tokens))
    ids = [[0] * (width - len(row)) + list(row) for row in tokens]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in tokens]
    return torch.tensor(ids, device=subject.device), torch.tensor(mask, device=subject.device)
