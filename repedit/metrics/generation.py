"""Generation: greedy or sampled, for one model or several side by side, and agreement with a reference text (ROUGE)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from repedit.activations.forward import check_ids
from repedit.arguments import checked
from repedit.data.corpus import padded
from repedit.data.encoding import chat_ids, check_not_ended, prompt_ids
from repedit.errors import ArgumentError, DataError, MissingDependency, NotFinite, check_seed, is_finite, is_whole
from repedit.hooks import evaluating
from repedit.io.text import check_text
from repedit.models.subject import Subject

# --- Token by token, for several models side by side

Message = Mapping[str, str]
"""A turn of a conversation: "role" (user, assistant or system) and "content"."""
Cache = Any
"""The key-value cache of a transformers model."""


@dataclass(frozen=True)
@checked
class Writing:
    """The text that a model has generated so far."""

    tokens: tuple[int, ...] = ()
    """Includes the token that ended the text, if one did."""
    text: str = ""
    """Without special tokens, and without a last character whose bytes are incomplete."""
    ended: str = ""
    """"" while generation continues, "stop" after an end token, "length" after max_new_tokens."""


@checked
def side_by_side(
    subjects: Sequence[Subject],
    prompts: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[Writing, ...]]:
    """The texts of all models after each step, in which every model generates one token.

    At temperature 0 the most likely token is taken; otherwise one is sampled from softmax(logits / temperature), with a
    separate random generator for each model. Of the generation settings of a checkpoint only the end tokens are used:
    penalties, suppressed tokens and beams are not.

    Args:
        prompts: one for each model: a text to continue, or the messages of a conversation for the chat template.
    Raises:
        ArgumentError: if a number is out of range, or a tokenizer or chat template is missing.
        DataError: if a prompt has no token, ends in an end token or is too long, or the chat template refuses it.
        NotFinite: during generation, if logits are not finite.
    """
    if len(subjects) != len(prompts):
        raise ArgumentError(f"{len(subjects)} models and {len(prompts)} prompts; give one prompt for each model")
    tokens = [
        prompt_tokens(s, prompt, max_new_tokens=max_new_tokens) for s, prompt in zip(subjects, prompts, strict=True)
    ]
    writers = [
        stream(subject, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        for subject, ids in zip(subjects, tokens, strict=True)
    ]
    return _stepwise(writers)


@checked
def stream(
    subject: Subject, ids: Sequence[int], *, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
) -> Iterator[Writing]:
    """The text of one model after each further token; see `side_by_side`.

    Raises:
        ArgumentError: if a number is out of range.
        DataError: if there is no token, one has no embedding, or there are more tokens than the model has positions.
        NotFinite: during generation, if logits are not finite.
    """
    check_seed(seed=seed)
    if not is_whole(max_new_tokens) or not is_finite(temperature) or temperature < 0:
        raise ArgumentError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}; give at least 1, and a number of at least 0"
        )
    if not ids:
        raise DataError("there is no token to continue from; give at least one")
    # The last generated token is not read.
    check_ids(subject, ids, "the prompt", size=len(ids) + max_new_tokens - 1)
    return _written(subject, list(ids), max_new_tokens, temperature, seed)


@checked
def prompt_tokens(
    subject: Subject, prompt: str | Sequence[Message], *, max_new_tokens: int, name: str = "the prompt"
) -> list[int]:
    """The tokens of a text, or of a conversation in the tokenizer's chat template, to be continued by the model.

    Raises:
        ArgumentError: without a tokenizer, or for a conversation without a chat template.
        DataError: if there is no token, the last one is an end token, one is out of the model's range, or there is no
            room for `max_new_tokens` more.
    """
    tokenizer = subject.need_tokenizer()
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        ids = chat_ids(tokenizer, prompt)
    else:
        check_text(prompt, name)
        ids = prompt_ids(tokenizer, prompt)
        check_not_ended(tokenizer, ids, name)
    limit = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    if not ids:
        raise DataError(f"the prompt {prompt!r} has no token; give a text")
    check_ids(subject, ids, name)
    if limit is not None and len(ids) + max_new_tokens - 1 > limit:
        raise DataError(
            f"{name} has {len(ids)} tokens, the model reads {limit}: no room for max_new_tokens={max_new_tokens}; shorten either"
        )
    return ids


@checked
def end_token_ids(subject: Subject) -> set[int]:
    """The end tokens of a model, from its generation settings and its tokenizer."""
    config = getattr(subject.model, "generation_config", None)
    sources = [getattr(config, "eos_token_id", None), getattr(subject.need_tokenizer(), "eos_token_id", None)]
    return {int(i) for ids in sources if ids is not None for i in (ids if isinstance(ids, list | tuple) else [ids])}


@checked
def check_logits(logits: Float[Tensor, "b v"], where: str) -> None:
    """Refuse logits that give no distribution: NaN, infinite, or all minus infinity.

    Raises:
        NotFinite: with what they follow.
    """
    if not bool(torch.isfinite(logits.logsumexp(-1)).all()):
        raise NotFinite(f"the logits after {where} are not finite; load the model in float32?")


def _stepwise(writers: Sequence[Iterator[Writing]]) -> Iterator[tuple[Writing, ...]]:
    """One step of every unfinished writer at a time, until all are finished."""
    states = [Writing() for _ in writers]
    while not all(state.ended for state in states):
        states = [state if state.ended else next(writer) for state, writer in zip(states, writers, strict=True)]
        yield tuple(states)


def _written(subject: Subject, ids: list[int], max_new_tokens: int, temperature: float, seed: int) -> Iterator[Writing]:
    tokenizer, end_tokens = subject.need_tokenizer(), end_token_ids(subject)
    random = torch.Generator().manual_seed(seed)
    all_ids = torch.tensor([ids], device=subject.device)
    new_ids, cache = all_ids, None
    while True:
        logits, cache = _step(subject, all_ids, new_ids, cache)
        check_logits(logits, f"the prompt and {all_ids.shape[1] - len(ids)} further tokens")
        token = _next_token(logits, temperature, random)
        new_ids = torch.tensor([[token]], device=subject.device)
        all_ids = torch.cat([all_ids, new_ids], dim=1)
        tokens = all_ids[0, len(ids) :].tolist()
        ended = "stop" if token in end_tokens else "length" if len(tokens) == max_new_tokens else ""
        text = tokenizer.decode(tokens[:-1] if ended == "stop" else tokens, skip_special_tokens=True)
        yield Writing(tuple(tokens), text if ended else text.rstrip("\ufffd"), ended)
        if ended:
            return


def _step(
    subject: Subject, all_ids: Int[Tensor, "1 t"], new_ids: Int[Tensor, "1 n"], cache: Cache | None
) -> tuple[Tensor, Cache]:
    """(logits of the next token, cache) after reading the tokens that are not in the cache yet."""
    # Not around the loop: a suspended generator would leave its caller without gradients and the model in eval mode.
    with torch.no_grad(), evaluating(subject.model):
        out = subject.model(
            input_ids=new_ids, attention_mask=torch.ones_like(all_ids), past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
    # float32, as in transformers.
    return out.logits[:, -1].float(), out.past_key_values


def _next_token(logits: Float[Tensor, "1 v"], temperature: float, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits[0].double().cpu() / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=random))


# --- Greedy continuations in batches


@checked
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

    Prompts of similar length are read together, padded on the left; padding does not change the continuation.

    Args:
        chat: put each prompt in the tokenizer's chat template as a user message. This changes scores: report it with
            them.
    Raises:
        ArgumentError: without a tokenizer, for chat without a chat template, or for a number below 1.
        DataError: if a prompt is not a text, has no token, ends in an end token, or is too long.
        NotFinite: if logits are not finite.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not is_whole(value):
            raise ArgumentError(f"{name}={value}; give at least 1")
    if isinstance(prompts, str):
        raise ArgumentError(f"prompts={prompts[:40]!r} is one text; give a list of prompts")
    tokens = [_tokens(subject, prompt, max_new_tokens, chat) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(tokens[i]))
    outputs: dict[int, str] = {}
    quiet = None if progress is None else not progress
    for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=quiet, leave=False):
        part = order[start : start + batch_size]
        names = [_prompt_name(prompts[i]) for i in part]
        outputs |= zip(
            part, greedy_continuations(subject, [tokens[i] for i in part], max_new_tokens, names), strict=True
        )
    return tuple(outputs[i] for i in range(len(prompts)))


@checked
def greedy_continuations(
    subject: Subject, prompts: Sequence[Sequence[int]], tokens: int, names: Sequence[str]
) -> list[str]:
    """The greedy continuation of each prompt: the most likely token each time, up to an end token or `tokens` tokens.

    Prompts of different lengths are padded on the left. `model.generate` is not used: it follows the generation
    settings of the checkpoint, which can penalize, forbid or force tokens even if do_sample is False.

    Args:
        names: names of the prompts in error messages.
    Raises:
        NotFinite: if logits are not finite.
    """
    tokenizer, end_tokens = subject.need_tokenizer(), end_token_ids(subject)
    new_ids, mask = (x.long().to(subject.device) for x in padded(prompts, left=True))
    shifted = not bool(mask.all()) and "position_ids" in inspect.signature(subject.model.forward).parameters
    texts: list[list[int]] = [[] for _ in prompts]
    live, cache = list(range(len(prompts))), None
    with torch.no_grad(), evaluating(subject.model):
        while live and len(texts[live[0]]) < tokens:
            positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -new_ids.shape[1] :]} if shifted else {}
            out = subject.model(
                input_ids=new_ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1,
                **positions,
            )  # fmt: skip
            logits, cache = out.logits[:, -1].float(), out.past_key_values
            for row in live:
                check_logits(logits[row : row + 1], f"{names[row]} and {len(texts[row])} further tokens")
            best = logits.argmax(-1)
            for row, token in zip(live, best[live].tolist(), strict=True):
                texts[row].append(token)
            live = [row for row in live if texts[row][-1] not in end_tokens]
            new_ids, mask = best[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    cut = [text[:-1] if text and text[-1] in end_tokens else text for text in texts]
    return list(tokenizer.batch_decode(cut, skip_special_tokens=True))


@checked
def continuations(subject: Subject, prompts: Sequence[str], *, tokens: int = 40) -> tuple[str, ...]:
    """The greedy continuation of each prompt without the prompt, one prompt at a time.

    Raises:
        ArgumentError, DataError: as `generate` does.
    """
    return generate(subject, prompts, max_new_tokens=tokens, batch_size=1, progress=False)


# --- Agreement with a reference text


@dataclass(frozen=True, eq=False)
@checked
class Rouge:
    """Word overlap of each output with its reference, in [0, 1]."""

    rouge1_recall: NDArray[np.float64]
    """Share of the words of the reference that are in the output."""
    rougeL_recall: NDArray[np.float64]
    """Share of the words of the reference that are in the output in the same order."""
    rougeL_f1: NDArray[np.float64]
    """Harmonic mean of this recall and the corresponding precision."""

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {values.mean():.4f}" for name, values in vars(self).items())
        return f"Rouge({means}; {len(self.rougeL_f1)} texts)"


@checked
def rouge(references: Sequence[str], outputs: Sequence[str], *, stemmer: bool = True) -> Rouge:
    """ROUGE-1 recall, ROUGE-L recall and ROUGE-L F1 of each output; 0 if either text has no word.

    Args:
        stemmer: compare word stems, as in TOFU and SemEval; MUSE compares words.
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
    scores = [scorer.score(reference, output) for reference, output in zip(references, outputs, strict=True)]
    values = [[s["rouge1"].recall, s["rougeL"].recall, s["rougeL"].fmeasure] for s in scores]
    return Rouge(*np.array(values, dtype=np.float64).T)


@checked
def exact_match(references: Sequence[str], outputs: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each output equals its reference, ignoring case and surrounding white space.

    Raises:
        DataError: if the two lists differ in length, or are empty.
    """
    _check_pairs(references, outputs)
    pairs = zip(references, outputs, strict=True)
    return np.array([reference.strip().lower() == output.strip().lower() for reference, output in pairs])


def _check_pairs(references: Sequence[str], outputs: Sequence[str]) -> None:
    if len(references) != len(outputs) or not references:
        raise DataError(f"{len(references)} references and {len(outputs)} outputs; give one output for each reference")


def _tokens(subject: Subject, prompt: str, max_new_tokens: int, chat: bool) -> list[int]:
    if chat and not subject.need_tokenizer().chat_template:
        raise ArgumentError("chat=True and the tokenizer has no chat template; leave chat out")
    messages = [{"role": "user", "content": prompt}] if chat else prompt
    return prompt_tokens(subject, messages, max_new_tokens=max_new_tokens, name=_prompt_name(prompt))


def _prompt_name(prompt: object) -> str:
    return f"the prompt {str(prompt)[:40]!r}"
