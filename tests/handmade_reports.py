"""A report as an audit of a gradient method might end: made by hand, with every kind of row a page must show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from repedit.auditing.attack import FAILED, RAN, SKIPPED, UNINFORMATIVE, Finding
from repedit.auditing.report import Recovery, Report, RetainCheck, Verdict
from repedit.outcomes import HIDDEN, PASS

CITIES = ("Paris", "Oslo", "Cairo", "Lima", "Quito", "Accra", "Hanoi", "Sofia", "Riga", "Tunis", "Minsk", "Dakar")
IDS = tuple(f"capitals/{city}" for city in CITIES * 4)[:40]
ITEMS = tuple(f"{name} {number}" for number, name in enumerate(IDS))
KEEP = tuple(f"currencies/{n}" for n in range(40))
STEPS, RATES = (0, 5, 10, 20, 40), ("1e-05", "3e-05")
LAYERS = 8


def answers(share: float, seed: int = 0) -> np.ndarray:
    """Right for this share of the items."""
    right = np.zeros(len(ITEMS), dtype=np.int8)
    right[np.random.default_rng(seed).permutation(len(ITEMS))[: round(share * len(ITEMS))]] = 1
    return right


def finding(attack: str, shares: dict[str, float], status: str = RAN, **more: Any) -> Finding:
    """A finding with the given share of right answers by setting."""
    held = more.pop("items", ITEMS if shares else ())
    rows = np.array([answers(share, seed) for seed, share in enumerate(shares.values())], dtype=np.int8)
    correct = rows.reshape(len(shares), len(held))
    values: dict[str, Any] = {"seed": 0, "reason": "", "seconds": 41.5, **more}
    return Finding(
        attack=attack, status=status, items=held, settings=tuple(shares), correct=correct,
        graded=np.where(correct == 1, -0.7, -4.2), **values,
    )  # fmt: skip


def recovery(attack: str, value: float, level: str = "W", half: float = 0.09, **more: Any) -> Recovery:
    """A recovery with floor .13 and ceiling .95, unless it is told others."""
    floor, original = more.pop("floor", 0.13), more.pop("original", 0.95)
    found = {
        "edited": floor + value * (original - floor), "original": original, "floor": floor, "floor_name": "reference",
        "interval": (value - half / 1.2, value + half / 1.2), "bound": (value - half, value + half), "level": level,
        "settings": {"edited": ("default",), "original": ("default",), "floor": ("default",)},
    }  # fmt: skip
    return Recovery(attack, more.pop("status", RAN), value=value, **{**found, **more})  # type: ignore[arg-type]


def learning(role: str, reach: float) -> Finding:
    """Fine-tuning at two rates: the larger one learns better."""
    start = {"edited": 0.18, "original": 0.95, "reference": 0.13}[role]
    speed = dict(zip(RATES, (0.35, 1.0), strict=True))
    shares = {
        f"lr={rate} step={step}": start + (reach - start) * speed[rate] * (1 - np.exp(-step / 12))
        for rate in RATES
        for step in STEPS
    }
    return finding("rtt", shares, train_accuracy=0.99, tokens=48_210, seconds=612.0, details={"loss": "answer"})


def reading(attack: str, role: str) -> Finding:
    """Every layer of two streams; the edited model keeps the answer in the middle."""
    shares = {}
    for stream, gain in (("resid.post", 1.0), ("mlp.out", 0.6)):
        for layer in range(LAYERS):
            bump = {"edited": np.exp(-((layer - 5) ** 2) / 6), "original": layer / (LAYERS - 1), "reference": 0.05}[
                role
            ]
            shares[f"{stream} {layer}"] = 0.13 + 0.8 * gain * float(bump)
    return finding(attack, shares, details={"kind": "match"})


def report(verdict: Verdict | None = None) -> Report:
    """HIDDEN: nothing when asked, most of it back after fine-tuning on other facts."""
    recoveries = (
        recovery("rtt", 0.82, settings={"edited": ("lr=3e-05 step=40", "lr=3e-05 step=20"), "original": ("lr=1e-05 step=5",), "floor": ("step=0",)}),
        recovery("probe", 0.61, half=0.13, settings={"edited": ("resid.post 5",), "original": ("resid.post 7",)}),
        recovery("int4", 0.19, original=0.79), recovery("benign", 0.08), recovery("in_context", 0.05, "B"),
        recovery("paraphrase", 0.03, "B"), recovery("strip", 0.02), recovery("direct", 0.02, "B"),
        recovery("membership", 1.42, half=0.2, decides=False, reason="membership inference is weak evidence"),
        recovery("int3", 0.33, half=0.45, original=0.2, status=UNINFORMATIVE, reason="the original falls to 0.20 as well"),
        recovery("refill", 0.11, status=FAILED, reason="0.41 on T after 40 steps, 0.90 is needed"),
        Recovery("translate", SKIPPED, "the facts have no translations", level="B"),
    )  # fmt: skip
    reach = {"edited": 0.82, "original": 0.96, "reference": 0.16}
    simple = {role: [finding("direct", {"prompt": share}), finding("retain", {"prompt": 0.9}, items=KEEP), learning(role, reach[role]), reading("logit_lens", role), reading("probe", role)]
              for role, share in (("edited", 0.15), ("original", 0.95), ("reference", 0.13))}  # fmt: skip
    simple["edited"] += [
        finding("direction", {}, SKIPPED, reason="no original for the contrast"),
        finding("refill", {"lr=1e-05 step=40": 0.22}, FAILED, reason="0.41 on T after 40 steps", train_accuracy=0.41),
    ]
    return Report(
        verdict or Verdict(
            HIDDEN, "Most of the forgotten facts come back: rtt recovers 0.82 of them at this budget (fast).",
            "the simultaneous lower bound of R is 0.73 for rtt, above material 0.10",
        ),
        recoveries, RetainCheck((0.94, 0.93), (21.4, 22.9), 120, 4000),
        {role: tuple(found) for role, found in simple.items()},
        {
            "translate": "the facts have no translations", "refill": "failed to train: 0.41 on T after 40 steps",
            "int3": "uninformative: the original falls to 0.20 as well", "gcg": "not in the budget fast",
            "distillation of the model": "no budget tries it",
        },
        {"1 of 8 choices": 0.125, "longest choice": 0.18, "the question removed": 0.11},
        tuple(
            {"id": ITEMS[n], "attack": "rtt", "prompt": f"The capital of country {n} is", "answer": city, "edited": "a town", "attacked": city,
             "reference": "Rome", "log_probability": {"edited": -4.25, "attacked": -0.5}}
            for n, city in enumerate(CITIES)
        ),
        {
            "relative update": {f"model.layers.{n}.mlp.down_proj.weight": 0.01 * n for n in range(LAYERS)},
            "update that survives rounding": {"int8": {"cosine": 0.91, "tensors": 12}, "int4": {"cosine": 0.29, "tensors": 12}},
            "line to the original": [0.15, 0.22, 0.61, 0.95], "uds": 0.41,
        },
        {
            "budget": "fast", "seeds": [0], "n_test": 40, "recovery_threshold": 0.1, "pass_threshold": 0.2, "alpha": 0.05,
            "notes": ["one seed: intervals exclude training noise"], "versions": {"repedit": "0.1.0", "torch": "2.13"},
            "hashes": {"edited": "9f" * 32, "original": "1a" * 32, "facts": "77" * 32}, "sites": ["2.mlp.out", "3.mlp.out"],
            "command": "repedit audit edited/ --original smollm2-135m --facts capitals --out audit/", "seconds": 1312.5,
        },
    )  # fmt: skip


def clean(name: str = "direct") -> Report:
    """NO RECOVERY FOUND: the same facts, nothing comes back."""
    found = report(
        Verdict(
            PASS, "No recovery found by these attacks at this budget (fast).", "all upper bounds are below clear 0.20"
        )
    )
    kept = tuple(
        replace(r, value=0.01, edited=0.14, interval=(-0.05, 0.08), bound=(-0.07, 0.1))
        for r in found.recoveries
        if r.status == RAN and r.decides
    )
    return replace(found, recoveries=kept, examples=(), not_run={"gcg": "not in the budget fast"})


def other_items(found: Report) -> Report:
    """The same report on facts with other ids."""
    roles = {
        role: tuple(replace(f, items=tuple(f"other {i}" for i in f.items)) for f in held)
        for role, held in found.findings.items()
    }
    return replace(found, findings=roles)
