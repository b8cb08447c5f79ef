"""Texts to measure on: built-in corpora, your own files, and splits that share no document."""

from repedit.data.corpus import Batch, Batches, Corpus, Document, Tokens
from repedit.data.sources import BUILTIN, code, named, prose, read

__all__ = ["BUILTIN", "Batch", "Batches", "Corpus", "Document", "Tokens", "code", "named", "prose", "read"]
