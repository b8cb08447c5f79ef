"""Which tokens of a batch a statistic counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from repedit.data import Batch

Count = Callable[[Batch], Bool[Tensor, "b t"]]


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

    def plain(self) -> dict[str, bool]:
        """The rule as plain values, for provenance."""
        return {
            "first_position": self.first_position,
            "special_tokens": self.special_tokens,
            "custom": self.custom is not None,
        }

    def describe(self) -> str:
        """What the rule leaves out, for an error message."""
        out = (
            ["padding"]
            + ([] if self.first_position else ["first positions"])
            + ([] if self.special_tokens else ["special tokens"])
        )
        return "your count rule removed the rest" if self.custom else f"{', '.join(out)} do not count"
