"""Which tokens of a batch a statistic counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from repedit.data import Batch
from repedit.errors import DataError, UnknownName, nearest

Count = Callable[[Batch], Bool[Tensor, "b t"]]


def positions(kind: str) -> Count | None:
    """A counting rule by name, for batches that mark their answers and entities (facts).

    "answer": the tokens of the answer; "before_answer": the positions that predict them; "entity": the last token of
    the entity the question is about; "content": what counts by default (None).

    Raises:
        UnknownName: if there is no such rule.
    """
    if kind == "content":
        return None
    if kind not in _MARKS:
        raise UnknownName(f"positions({kind!r}) does not exist; {nearest(kind, (*_MARKS, 'content'))}")
    return marked(kind)


def marked(kind: str) -> Count:
    """The rule of a mark: "answer", "before_answer" or "entity"."""
    return _Marked(kind)


@dataclass(frozen=True)
class _Marked:
    """Counts the positions that a mark of the batch gives."""

    kind: str

    def __call__(self, batch: Batch) -> Bool[Tensor, "b t"]:
        field, place = _MARKS[self.kind]
        mark = getattr(batch, field)
        if mark is None:
            raise DataError(f"positions({self.kind!r}) needs batches that mark their {field}; this corpus marks none")
        return place(mark.to(batch.attention_mask) & batch.attention_mask)


def _before(mark: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    return torch.cat([mark[:, 1:], torch.zeros_like(mark[:, :1])], 1)


def _last(mark: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    return mark & (mark.flip(1).cumsum(1).flip(1) == 1)


# Rule -> (field of the batch, what to make of its mark).
_MARKS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "answer": ("answer", lambda mark: mark),
    "before_answer": ("answer", _before),
    "entity": ("entity", _last),
}


class CountingRule:
    """Not padding, not the first position of a chunk (an attention sink), not a special token; or a rule of your own."""

    def __init__(self, tokenizer: Any, first_position: bool, special_tokens: bool, custom: Count | None) -> None:
        self.first_position, self.special_tokens, self.custom = first_position, special_tokens, custom
        ids = [] if special_tokens or tokenizer is None else sorted(set(tokenizer.all_special_ids))
        self.special = torch.tensor(ids, dtype=torch.long)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(counted, first): masks (b, t); padding is in neither."""
        first = batch.attention_mask & (batch.attention_mask.cumsum(1) == 1)
        if self.custom is not None:
            return batch.attention_mask & self.custom(batch).to(batch.attention_mask), first
        mask = batch.attention_mask if self.first_position else batch.attention_mask & ~first
        return mask & ~torch.isin(batch.input_ids, self.special.to(batch.input_ids.device)), first

    def plain(self) -> dict[str, bool | str]:
        """The rule as plain values, for provenance."""
        return {
            "first_position": self.first_position,
            "special_tokens": self.special_tokens,
            "custom": self.custom.kind if isinstance(self.custom, _Marked) else self.custom is not None,
        }

    def describe(self) -> str:
        """What the rule leaves out, for an error message."""
        out = (
            ["padding"]
            + ([] if self.first_position else ["first positions"])
            + ([] if self.special_tokens else ["special tokens"])
        )
        return "your count rule removed the rest" if self.custom else f"{', '.join(out)} do not count"
