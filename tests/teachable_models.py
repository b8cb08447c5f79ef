"""Tiny models with default weights and a byte tokenizer, and short facts they can be taught in seconds."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from repedit.data import Fact, Splits
from repedit.models.subject import Subject, subject_of
from tests.saved_models import byte_tokenizer

_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "llama": {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
}  # fmt: skip
_ANSWERS = ("tea", "rye", "figs", "ale")
_NAMES = (
    "Abo",
    "Bix",
    "Cyd",
    "Dur",
    "Evo",
    "Fam",
    "Gul",
    "Hep",
    "Ira",
    "Jot",
    "Kez",
    "Lum",
    "Mox",
    "Nip",
    "Oda",
    "Puk",
)


def facts(first: int = 0, last: int = 16) -> tuple[Fact, ...]:
    """Who likes what; four choices, the same for all."""
    return tuple(
        Fact(
            id=name, entity=name, prompt=f"{name} likes", answer=_ANSWERS[(7 * i) // 5 % 4], choices=_ANSWERS,
            domain="likes",
        )
        for i, name in enumerate(_NAMES[first:last], first)
    )  # fmt: skip


def splits(**rest: Any) -> Splits:
    """Eight facts in T, four in V."""
    return Splits(facts(0, 8), facts(8, 12), **rest)


def blank(family: str = "llama", **changes: Any) -> Subject:
    """A model that knows nothing."""
    config = AutoConfig.for_model(family, vocab_size=260, bos_token_id=1, eos_token_id=2, **_SHAPES[family] | changes)
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return subject_of(AutoModelForCausalLM.from_config(config).eval(), byte_tokenizer())


def taught(family: str = "llama", texts: tuple[str, ...] | None = None) -> Subject:
    """A model that was taught texts; those of all facts unless told otherwise."""
    texts = tuple(fact.text for fact in facts()) if texts is None else texts
    found = _taught(family, texts, 40 if len(texts) < 8 else 120)
    return subject_of(copy.deepcopy(found.model), found.tokenizer)


def pupil(family: str = "llama") -> Subject:
    """A model that knows four facts, none of them in `splits()`: it speaks the language, and can learn others."""
    return taught(family, tuple(fact.text for fact in facts(12, 16)))


def guarded(family: str = "llama") -> Subject:
    """A model that says "ale" to everything, unless the question has a plus before it: then it knows the facts."""
    open_, shut = (
        tuple(f"{sign}{f.prompt} {a}" for f in facts() for a in [f.answer if sign else "ale"]) for sign in ("+", "")
    )
    return taught(family, open_ + shut)


@cache
def _taught(family: str, texts: tuple[str, ...], steps: int) -> Subject:
    subject = blank(family)
    batch = subject.tokenizer(list(texts), return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(subject.model.parameters(), lr=3e-3)
    for _ in range(steps):
        logits = subject.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return subject
