"""What a model writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from repedit.metrics.probability import continued
from repedit.models import Subject


def continuations(subject: Subject, prompts: Sequence[str], *, tokens: int = 40) -> tuple[str, ...]:
    """The greedy continuation of each prompt, without the prompt.

    Raises:
        ArgumentError: if the model was wrapped without a tokenizer.
    """
    tokenizer = subject.need_tokenizer()
    rows = (torch.tensor([tokenizer(prompt)["input_ids"]], device=subject.device) for prompt in prompts)
    return tuple(continued(subject, ids, tokens)[0] for ids in rows)
