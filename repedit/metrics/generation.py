"""What a model writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from repedit.models import Subject


def continuations(subject: Subject, prompts: Sequence[str], *, tokens: int = 40) -> tuple[str, ...]:
    """The greedy continuation of each prompt, without the prompt.

    Raises:
        ArgumentError: if the model was wrapped without a tokenizer.
    """
    tokenizer = subject.need_tokenizer()
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(subject.device)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with torch.no_grad():
            out = subject.model.generate(
                **{k: v for k, v in ids.items() if k != "token_type_ids"},
                max_new_tokens=tokens, do_sample=False, pad_token_id=pad, temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
        found.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return tuple(found)
