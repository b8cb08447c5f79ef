"""Texts and facts to measure on: built-in ones, your own files, and splits that share no document and no entity."""

from repedit.data.authors import TofuRow, tofu
from repedit.data.catalogue import DOMAINS, facts
from repedit.data.cloze import cloze
from repedit.data.corpus import Batch, Batches, Corpus, Document, Tokens
from repedit.data.domains import Fact, Facts, by_domain, with_choices, with_paraphrases
from repedit.data.inventing import invented
from repedit.data.rows import Row, Rows, as_batches
from repedit.data.sources import BUILTIN, code, named, prose, read
from repedit.data.splits import Splits
from repedit.data.subjects import mmlu
from repedit.data.tasks import TaskRow, Tasks, lume, semeval

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
