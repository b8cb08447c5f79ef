"""From the objects people already hold to a Subject."""

from __future__ import annotations

from typing import Any

from repedit.models import Subject, subject_of


def wrap(thing: Any, tokenizer: Any | None = None) -> Subject:
    """A Subject around a transformers model in memory (or a Subject, returned as it is); nothing is changed.

    Raises:
        NotAModel: if the object is something else.
        UnknownArchitecture: if no row of the family table fits the model.
    """
    return thing if isinstance(thing, Subject) else subject_of(thing, tokenizer)
