"""Learned gates: they find planted neurons, leave the model alone, and refuse what cannot work."""

from __future__ import annotations

import pytest
import torch

import repedit as rp
from repedit.data.corpus import tokens
from repedit.errors import ArgumentError, OverlapError, SelectionError
from repedit.fit.gates import margin
from tests.tiny import tiny


def corpus(low: int, high: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tokens(
        [{"input_ids": torch.randint(low, high, (4, 16), generator=generator)} for _ in range(6)], f"{low}-{high}"
    )


def fitted(subject, **options):
    options = {"steps": 30, "lr": 0.1, "retain_weight": 1.0, "progress": False} | options
    return rp.fit.gates(subject, corpus(3, 30), corpus(30, 60), **options)


def own_predictions(subject):
    """Text the model itself continues with certainty, so that there is something to forget."""
    start = torch.arange(3, 27)[:, None]
    with torch.no_grad():
        ids = subject.model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
    return tokens([{"input_ids": ids}], "own")


def test_gates_lower_the_forget_set_and_spare_the_other():
    subject = tiny("llama")
    forget, retain = own_predictions(subject), corpus(30, 60)
    edit = rp.fit.gates(subject, forget, retain, steps=40, progress=False)
    before, after = (rp.predictions(subject, forget, edit=e) for e in (None, edit))
    spared = [rp.predictions(subject, retain, edit=e).mean_loss for e in (None, edit)]
    assert after.top1 < 0.7 * before.top1 and after.mean_loss - before.mean_loss > 4 * abs(spared[1] - spared[0])


def test_the_model_is_left_as_it_was():
    subject = tiny("mixtral")
    before = subject.fingerprint()
    fitted(subject)
    assert subject.fingerprint() == before and all(
        p.grad is None and p.requires_grad for p in subject.model.parameters()
    )


def test_the_same_seed_gives_the_same_masks():
    first, second = (fitted(tiny("gpt2")) for _ in range(2))
    assert list(first.maps) == list(second.maps)
    assert all(torch.equal(first.maps[site].scale, second.maps[site].scale) for site in first.maps)


def test_margin_against_its_formula():
    logits, targets = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    rival = torch.stack([max(row[v] for v in range(5) if v != y) for row, y in zip(logits, targets, strict=True)])
    own = logits[torch.arange(7), targets]
    assert torch.allclose(margin(logits, targets), (1 + own - rival).clamp(min=0).mean())


def test_refusals():
    subject = tiny("llama")
    with pytest.raises(OverlapError, match="are the same data"):
        rp.fit.gates(subject, corpus(3, 30), corpus(3, 30))
    with pytest.raises(ArgumentError, match="steps=0"):
        fitted(subject, steps=0)
    with pytest.raises(SelectionError, match="no gate closed in 1 steps"):
        fitted(subject, steps=1, lr=1e-6)
