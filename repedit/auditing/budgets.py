"""Which attacks a budget buys, and how each is built for the models at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repedit.auditing.attack import Attack
from repedit.auditing.attacks import directions, finetune, membership, probing, prompts, refill, search, weights
from repedit.auditing.attacks.prompts import reformat
from repedit.auditing.attacks.samples import sampling
from repedit.auditing.attacks.unhook import strip
from repedit.errors import UnknownName, nearest
from repedit.models.subject import Subject
from repedit.quantization import installed_schemes

BUDGETS = ("fast", "standard", "full")
SEEDS = {"fast": (0,), "standard": (0, 1, 2), "full": (0, 1, 2)}
MOST_FRESH = {"fast": 96, "standard": 256, "full": 256}
"""Invented facts asked."""
UNTRIED = {
    "distillation": "the model is not distilled into another one",
    "long training": "hundreds of steps, other optimisers and other data",
}
"""What no budget tries; every report says so."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What building an attack may need to know."""

    budget: str = "fast"
    layers: int = 0
    """Layers of the model."""
    edited_layers: tuple[int, ...] | None = None
    """Where the edit was, if known; else the halves of the model are taken."""
    scale: float = 1.0
    """Multiplies every learning rate: tiny models need larger ones."""
    steps: int = 40
    """Training steps of `rtt`."""
    contrast: Subject | None = None
    """The original, for directions between the two models."""


_SHORT: Mapping[str, dict[str, Any]] = {"fast": {"length": 24, "measured": (40,)}}
"""Harmless training at the fast budget reads shorter texts and asks at its end only."""
_FORMS = ("question", "multiple choice", "yes/no", "odd one out")
Builder = Callable[[Setup], Sequence[Attack]]


def _rtt(setup: Setup) -> Sequence[Attack]:
    n = setup.steps
    if setup.budget == "fast":
        return [finetune.rtt(steps=n, measured=(0, n // 2, n), scale=setup.scale)]
    options: dict[str, Any] = {"loss": ("answer", "sequence"), "how": ("full", "lora"), "sizes": (8, 32, None)}
    return [finetune.rtt(steps=n, measured=(0, n // 8, n // 4, n // 2, n), scale=setup.scale, **options)]


def _measured(setup: Setup) -> tuple[int, ...]:
    return (0, 20, 40) if setup.budget == "fast" else (0, 5, 10, 20, 40)


def _upstream(setup: Setup) -> Sequence[Attack]:
    return [finetune.upstream(min(setup.edited_layers) if setup.edited_layers else None, scale=setup.scale)]


def _downstream(setup: Setup) -> Sequence[Attack]:
    return [finetune.downstream(max(setup.edited_layers) if setup.edited_layers else None, scale=setup.scale)]


_BUILDERS: Mapping[str, tuple[str, Builder]] = {
    "direct": ("fast", lambda _: [prompts.direct()]),
    "strip": ("fast", lambda _: [strip()]),
    "paraphrase": ("fast", lambda _: [prompts.paraphrase()]),
    "format": ("fast", lambda s: [reformat(templates=_FORMS if s.budget == "fast" else None)]),
    "prefix": ("standard", lambda _: [prompts.prefix()]),
    "translate": ("standard", lambda _: [prompts.translate()]),
    "in_context": ("fast", lambda _: [prompts.in_context()]),
    "sampling": ("standard", lambda s: [sampling(n=128, ks=(1, 4, 16, 64)) if s.budget == "full" else sampling()]),
    "quantize": ("fast", lambda s: [weights.quantize(schemes=_schemes(s))]),
    "perturb": ("standard", lambda _: [weights.perturb()]),
    "logit_lens": ("fast", lambda _: [probing.logit_lens()]),
    "probe": ("fast", lambda s: [probing.probe(kind=k) for k in (("linear", "mlp") if s.budget == "full" else ("linear",))]),
    "direction": ("standard", lambda s: [directions.direction(contrast=s.contrast)]),
    "benign": ("fast", lambda s: [finetune.benign(scale=s.scale, **_SHORT.get(s.budget, {}))]),
    "refill": ("fast", lambda s: [refill.refill(scale=s.scale, measured=_measured(s))]),
    "relearn": ("standard", lambda s: [finetune.relearn(scale=s.scale)]),
    "upstream": ("standard", _upstream),
    "downstream": ("standard", _downstream),
    "rtt": ("fast", _rtt),
    "membership": ("standard", lambda _: [membership.membership()]),
    "set_difference": ("full", lambda _: [weights.set_difference(pairs=weights.FULL_PAIRS)]),
    "soft_prompt": ("full", lambda _: [search.soft_prompt()]),
    "gcg": ("full", lambda _: [search.gcg()]),
}  # fmt: skip
NAMES = tuple(_BUILDERS)
"""Every attack, the cheapest first."""


def _schemes(setup: Setup) -> tuple[str, ...]:
    return ("int8", "int4", "nf4", "fp4", *(() if setup.budget == "fast" else ("int3", *installed_schemes())))


def planned(budget: str, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The attacks of a budget, or those named, the cheapest first; "direct" is always among them.

    Raises:
        UnknownName: if there is no such budget or attack.
    """
    if budget not in BUDGETS:
        raise UnknownName(f"budget={budget!r}; {nearest(budget, BUDGETS)}")
    for name in names or ():
        if name not in _BUILDERS:
            raise UnknownName(f"no attack is called {name!r}; {nearest(name, NAMES)}")
    upto = BUDGETS[: BUDGETS.index(budget) + 1]
    return tuple(
        n for n, (least, _) in _BUILDERS.items() if n == "direct" or (least in upto if names is None else n in names)
    )


def built(names: Sequence[str], setup: Setup) -> tuple[Attack, ...]:
    """The attacks of these names, built for a setup."""
    return tuple(attack for name in names for attack in _BUILDERS[name][1](setup))


def describe(budget: str) -> dict[str, Any]:
    """By attack of the budget: what it holds, and whether it uses answers of T."""
    found = built(planned(budget), Setup(budget=budget, layers=2))
    return {attack.name: {"level": attack.level, "uses_train": attack.uses_train} for attack in found}
