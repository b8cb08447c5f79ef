"""Which attacks a budget includes: the registered records in order of cost, and how many seeds and facts they get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from repedit.auditing import attacks
from repedit.auditing.attack import _RECORDS, BUDGETS, Attack, AttackRecord, Setup
from repedit.errors import UnknownName, nearest

SEEDS = {"fast": (0,), "standard": (0, 1, 2), "full": (0, 1, 2)}
INVENTED_FACTS = {"fast": 96, "standard": 256, "full": 256}
"""Invented facts asked at most."""
RETAIN_FACTS = {"fast": 160, "standard": None, "full": None}
"""Retain facts asked at most."""
UNTRIED = {
    "distillation": "the model is not distilled into another one",
    "long training": "hundreds of steps, other optimisers and other data",
}
"""What no budget includes; every report says so."""


def records() -> Mapping[str, AttackRecord]:
    """Every registered attack by name, the cheapest first."""
    _import_attacks()
    return {record.name: record for record in sorted(_RECORDS.values(), key=lambda record: (record.cost, record.name))}


@cache
def _import_attacks() -> None:
    for module in iter_modules(attacks.__path__, f"{attacks.__name__}."):
        import_module(module.name)


def record_of(attack: str) -> AttackRecord | None:
    """The record of an attack by the name of its findings, such as "probe-mlp" or "rtt, LoRA"; None of an unknown one."""
    known = records()
    return known.get(attack) or known.get(attack.partition("-")[0].partition(",")[0])


def planned(budget: str, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The attacks of a budget, or those named, the cheapest first; "direct" is always among them.

    Raises:
        UnknownName: if there is no such budget or attack.
    """
    if budget not in BUDGETS:
        raise UnknownName(f"budget={budget!r}; {nearest(budget, BUDGETS)}")
    known = records()
    for name in names or ():
        if name not in known:
            raise UnknownName(f"no attack is called {name!r}; {nearest(name, known)}")
    included = BUDGETS[: BUDGETS.index(budget) + 1]
    return tuple(
        name
        for name, record in known.items()
        if name == "direct" or (record.budget in included if names is None else name in names)
    )


def built(names: Sequence[str], setup: Setup) -> tuple[Attack, ...]:
    """The attacks of these names, built for a setup."""
    known = records()
    return tuple(attack for name in names for attack in known[name].build(setup))
