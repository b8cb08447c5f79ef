"""A tokenizer for tests: one token a character, ids 3..60, with or without a beginning-of-sequence token."""

from __future__ import annotations

from tests.tiny import VOCABULARY


class CharTokenizer:
    """Enough of the tokenizer interface for a corpus to be cut into batches."""

    all_special_ids = (0, 1, 2)

    def __init__(self, *, bos: bool = True, pad: int | None = 0) -> None:
        self.prefix = [1] if bos else []
        self.pad_token_id = pad

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [3 + ord(character) % (VOCABULARY - 3) for character in text]
        return {"input_ids": (self.prefix if add_special_tokens else []) + ids}
