"""Attacks that fine-tune: on half of the facts, on what was kept, on nothing related, or in some layers only.

What comes back in V was not taught: T and V share no entity. Rates are those of AdamW on weights of usual size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from repedit.attacks.attack import Attack, Outcome, skipped
from repedit.attacks.families.losses import Draw, Example, examples, in_turn, shuffled
from repedit.attacks.families.published import PRESETS
from repedit.attacks.families.trials import Trial, carried_out, on_copy, scaled, trial
from repedit.attacks.families.tuning import HOWS, LOSSES, Tuning
from repedit.data import Splits
from repedit.errors import ArgumentError, UnknownName, nearest
from repedit.models import Subject

FULL_RATES, LORA_RATES = (1e-5, 5e-5, 2e-4), (1e-4, 5e-4)
_WATCHED = 32
_FIRST = 0.4


def rtt(
    *,
    rates: Sequence[float] | None = None,
    steps: int = 40,
    measured: Sequence[int] = (0, 5, 10, 20, 40),
    loss: str | Sequence[str] = "answer",
    how: str | Sequence[str] = "full",
    rank: int = 16,
    sizes: Sequence[int | None] | None = None,
    optimizer: str = "adamw",
    schedule: str = "constant",
    preset: str | None = None,
    scale: float = 1.0,
    name: str = "rtt",
) -> Attack:
    """Retraining on T: teach half of the facts and see whether the other half comes back.

    Settings are "step=0" and "lr=5e-05 step=40", followed by " how=lora", " loss=sequence" and " n=8" where several
    are tried. It must reach .9 on T.

    Args:
        rates: learning rates; None for 1e-5, 5e-5 and 2e-4, and 1e-4 and 5e-4 for LoRA.
        measured: steps at which V is asked; the last step always is.
        loss: "answer", "sequence" or both.
        how: "full", "lora" or both.
        sizes: numbers of facts of T to train on, drawn by the seed, the smaller inside the larger; None stands for all.
        preset: "deeb-roger": the published setting, see `published`; of the other arguments only `scale` is used.
        scale: multiplies the rates; tiny models need 15 or so.
        name: tells it from another of its kind in one audit.
    Raises:
        UnknownName: if there is no such preset, loss, way, optimizer or schedule.
        ArgumentError: if a number is out of range, or nothing is to be tried.
    Reference: Deeb and Roger 2024, arXiv:2410.08827.
    """
    if preset is not None:
        if preset not in PRESETS:
            raise UnknownName(f"preset={preset!r}; {nearest(preset, PRESETS)}")
        return PRESETS[preset](scale)
    losses, hows, counts = _several(loss), _several(how), (None,) if sizes is None else tuple(sizes)
    base = Tuning(1.0, steps=steps, rank=rank, optimizer=optimizer, schedule=schedule)
    for what, values, valid in (("loss", losses, LOSSES), ("how", hows, HOWS)):
        bad = next((value for value in values if value not in valid), None)
        if bad is not None:
            raise UnknownName(f"{what}={bad!r}; {nearest(bad, valid)}")
    if not (losses and hows and counts) or any(n is not None and n < 1 for n in counts):
        raise ArgumentError(
            f"loss={losses}, how={hows}, sizes={counts}; give one of each or more, sizes above 0 or None"
        )
    grid = [
        (way, replace(base, rate=rate))
        for way in hows
        for rate in scaled((FULL_RATES if way == "full" else LORA_RATES) if rates is None else rates, scale)
    ]

    def trials(subject: Subject, splits: Splits, seed: int) -> Iterator[Trial]:
        widest = max(len(splits.train) if n is None else n for n in counts)
        for kind, count, (way, tuning) in product(losses, counts, grid):
            facts = _some(splits.train, count, seed)
            items = examples(subject, facts, loss=kind, max_tokens=tuning.max_tokens)
            extra = f" how={way}" * (len(hows) > 1) + f" loss={kind}" * (len(losses) > 1)
            extra += f" n={count or 'all'}" * (len(counts) > 1)
            known = facts if count is None or count == widest else ()
            exact = replace(tuning, how=way, loss=kind)
            yield trial(exact, shuffled(items, tuning.batch_size, seed), measured, extra, known=known)

    given = {
        "rates": None if rates is None else list(rates), "steps": steps, "measured": list(measured),
        "loss": list(losses), "how": list(hows), "rank": rank, "sizes": list(counts), "optimizer": optimizer,
        "schedule": schedule, "scale": scale,
    }  # fmt: skip
    return _taught(name, given, trials, partial(_short, counts), full="full" in hows)


def relearn(
    *, rates: Sequence[float] = (2e-4,), measured: Sequence[int] = (15, 30, 48, 60), rank: int = 16, scale: float = 1.0
) -> Attack:
    """Relearning on a small budget: adapters, T mixed with what was kept, or after it.

    Settings are "lr=0.0002 step=60 order=mixed" and "... order=retain-first", which spends the first 0.4 of the steps
    on the retain facts alone and the others on T; without retain facts, "lr=0.0002 step=60".

    Reference: Lynch et al. 2024, arXiv:2402.16835; Hu et al. 2024, arXiv:2406.13356.
    """
    steps = max(measured, default=0)
    base = Tuning(1.0, steps=steps, how="lora", rank=rank, weight_decay=0.01)
    tried = scaled(rates, scale)

    def trials(subject: Subject, splits: Splits, seed: int) -> Iterator[Trial]:
        facts, size = examples(subject, splits.train), base.batch_size
        orders: dict[str, Draw] = {"": shuffled(facts, size, seed)}
        if splits.retain:
            kept = examples(subject, splits.retain)
            first = in_turn(shuffled(kept, size, seed), shuffled(facts, size, seed), round(_FIRST * steps))
            orders = {" order=mixed": shuffled(facts + kept, size, seed), " order=retain-first": first}
        for rate, (order, draw) in product(tried, orders.items()):
            yield trial(replace(base, rate=rate), draw, measured, order, known=splits.train)

    given = {"rates": list(rates), "measured": list(measured), "rank": rank, "scale": scale}
    return _taught(
        "relearn", given, trials, lambda splits: "" if splits.retain else "no retain facts: T alone", full=False
    )


def benign(
    *,
    rates: Sequence[float] = (5e-5, 2e-4),
    steps: int = 40,
    measured: Sequence[int] = (20, 40),
    few: int = 10,
    length: int = 64,
    scale: float = 1.0,
) -> Attack:
    """Fine-tuning on something else: on the retain facts, on unrelated text, and on a few items of that text.

    Settings are "lr=5e-05 step=40 on=retain", "... on=unrelated" and "... on=unrelated n=10". Nothing of T is seen, so
    it must instead lower the loss on its own texts by a tenth.

    Args:
        few: items of the unrelated text in its second use; 0 for none.
        length: tokens of an unrelated item, which are chunks where the text is long.
    Reference: Qi et al. 2023, arXiv:2310.03693; Lucki et al. 2024, arXiv:2409.18025.
    """
    base, tried = Tuning(1.0, steps=steps), scaled(rates, scale)

    def run(subject: Subject, splits: Splits, seed: int) -> Outcome:
        sources: dict[str, tuple[Example, ...]] = {}
        if splits.retain:
            sources["retain"] = examples(subject, splits.retain)
        if splits.unrelated is not None:
            sources["unrelated"] = examples(subject, splits.unrelated, max_tokens=length)
        if splits.unrelated is not None and few:
            sources[f"unrelated n={few}"] = _some(sources["unrelated"], few, seed)
        if not sources:
            return skipped("needs retain facts or unrelated text; neither was given")
        trials = [
            trial(replace(base, rate=rate), shuffled(items, base.batch_size, seed), measured, f" on={name}",
                  watched=_some(items, _WATCHED, seed))
            for (name, items), rate in product(sources.items(), tried)
        ]  # fmt: skip
        missing = {"retain": splits.retain, "unrelated": splits.unrelated is not None}
        note = "; ".join(f"no {name} texts were given" for name, given in missing.items() if not given)
        return carried_out(trials, on_copy(subject, full=True), splits.test, seed, note)

    given = {
        "rates": list(rates), "steps": steps, "measured": list(measured), "few": few, "length": length, "scale": scale,
    }  # fmt: skip
    return Attack("benign", "finetune", "W", False, given, run)


def upstream(first_layer: int | None = None, **options: Any) -> Attack:
    """Retraining on T with adapters only below the first edited layer; None where it is unknown: in the lower half.

    Options and settings are those of `layered`.
    """
    return _layered("upstream", lambda n: range(n // 2 if first_layer is None else first_layer), first_layer, **options)


def downstream(last_layer: int | None = None, **options: Any) -> Attack:
    """Retraining on T with adapters only above the last edited layer; None where it is unknown: in the upper half.

    Options and settings are those of `layered`.
    """

    def above(count: int) -> range:
        return range(count // 2 if last_layer is None else last_layer + 1, count)

    return _layered("downstream", above, last_layer, **options)


def layered(name: str, layers: Sequence[int], **options: Any) -> Attack:
    """Retraining on T with adapters in some layers only; settings are "step=0" and "lr=0.0005 step=40".

    Skipped where there are no layers to train. It must reach .9 on T.

    Args:
        options: `rates` of (1e-4, 5e-4), `steps`, `measured` and `scale` as in `rtt`, and `rank` of the adapters.
    """
    return _layered(name, lambda _: tuple(layers), list(layers), **options)


def _layered(
    name: str,
    layers: Callable[[int], Sequence[int]],
    given: int | list[int] | None,
    *,
    rates: Sequence[float] = LORA_RATES,
    steps: int = 40,
    measured: Sequence[int] = (0, 5, 10, 20, 40),
    rank: int = 16,
    scale: float = 1.0,
) -> Attack:
    base, tried = Tuning(1.0, steps=steps, how="lora", rank=rank), scaled(rates, scale)

    def run(subject: Subject, splits: Splits, seed: int) -> Outcome:
        chosen = tuple(layers(len(subject.anatomy.layers)))
        if not chosen:
            return skipped(f"of {len(subject.anatomy.layers)} layers none is {name} of the edited ones")
        draw = shuffled(examples(subject, splits.train), base.batch_size, seed)
        trials = [trial(replace(base, rate=r, layers=chosen), draw, measured, known=splits.train) for r in tried]
        note = f"the edited layers are not known: layers {chosen[0]} to {chosen[-1]} are trained" * (given is None)
        return carried_out(trials, on_copy(subject, full=False), splits.test, seed, note)

    settings = {"layers": given, "rates": list(rates), "steps": steps, "measured": list(measured), "rank": rank}
    return Attack(name, "finetune", "W", True, {**settings, "scale": scale}, run)


def _taught(
    name: str,
    given: Mapping[str, Any],
    trials: Callable[[Subject, Splits, int], Iterator[Trial]],
    note: Callable[[Splits], str],
    *,
    full: bool,
) -> Attack:
    """An attack that trains on T."""

    def run(subject: Subject, splits: Splits, seed: int) -> Outcome:
        start = on_copy(subject, full=full)
        return carried_out(list(trials(subject, splits, seed)), start, splits.test, seed, note(splits))

    return Attack(name, "finetune", "W", True, given, run)


def _short(counts: Sequence[int | None], splits: Splits) -> str:
    """Which sizes are more than there is."""
    have = len(splits.train)
    return "; ".join(f"T has {have} facts: n={n} trains on all of them" for n in counts if n is not None and n > have)


def _several(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _some(items: Sequence[Any], count: int | None, seed: int) -> tuple[Any, ...]:
    """The first of the items in an order drawn by the seed, so that fewer are among more; None for all as they are."""
    return tuple(items) if count is None else tuple(random.Random(seed).sample(list(items), len(items))[:count])
