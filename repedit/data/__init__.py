"""Texts and facts to measure on: built-in ones, your own files, and splits that share no document and no entity."""

from repedit.data.benchmarks import TaskRow, Tasks, TofuRow, lume, mmlu, semeval, tofu
from repedit.data.corpus import BUILTIN, Batch, Batches, Corpus, Document, Tokens, code, named, prose, read
from repedit.data.fact_sets import DOMAINS, Fact, Facts, Splits, by_domain, facts, with_choices, with_paraphrases
from repedit.data.generated import cloze, invented
from repedit.data.rows import Row, Rows, as_batches

__all__ = [
    "BUILTIN",
    "DOMAINS",
    "Batch",
    "Batches",
    "Corpus",
    "Document",
    "Fact",
    "Facts",
    "Row",
    "Rows",
    "Splits",
    "TaskRow",
    "Tasks",
    "TofuRow",
    "Tokens",
    "as_batches",
    "by_domain",
    "cloze",
    "code",
    "facts",
    "invented",
    "lume",
    "mmlu",
    "named",
    "prose",
    "read",
    "semeval",
    "tofu",
    "with_choices",
    "with_paraphrases",
]
