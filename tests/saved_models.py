"""A tiny model with a real tokenizer, saved as a user's directory would be."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny

SPECIAL = ("<pad>", "<s>", "</s>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {name: i for i, name in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def merging_tokenizer(*pairs: tuple[str, str]) -> PreTrainedTokenizerFast:
    """One token a byte, but one for each pair, spaces and all: a token may span the end of a prompt."""
    written = [tuple(part.replace(" ", "\u0120") for part in pair) for pair in pairs]
    names = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in written))
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=written))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def saved(folder: Path, family: str = "llama") -> Path:
    """A directory with a tiny model and its tokenizer."""
    subject = tiny(family, vocab_size=260, intermediate_size=128, max_position_embeddings=256)
    subject.model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
