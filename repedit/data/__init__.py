"""Corpora, facts and benchmarks: built in or read from files, with splits that share no document and no entity."""

from repedit.data.benchmarks import MuseData, TaskRow, Tasks, TofuRow, lume, mmlu, muse, semeval, tofu
from repedit.data.corpus import (
    BUILTIN,
    Batch,
    Batches,
    Corpus,
    Document,
    Row,
    Rows,
    TextSource,
    Tokens,
    as_batches,
    builtin_corpus,
    code,
    prose,
    read,
)
from repedit.data.encoding import Tokenizer
from repedit.data.fact_sets import (
    DOMAINS,
    Fact,
    Facts,
    Splits,
    by_domain,
    entity_of,
    facts,
    with_choices,
    with_paraphrases,
)
from repedit.data.generated import cloze, invented

__all__ = [
    "BUILTIN", "DOMAINS", "Batch", "Batches", "Corpus", "Document", "Fact", "Facts", "MuseData", "Row", "Rows",
    "Splits", "TaskRow", "Tasks", "TextSource", "TofuRow", "Tokenizer", "Tokens", "as_batches", "builtin_corpus",
    "by_domain", "cloze", "code", "entity_of", "facts", "invented", "lume", "mmlu", "muse", "prose", "read",
    "semeval", "tofu", "with_choices", "with_paraphrases",
]  # fmt: skip
