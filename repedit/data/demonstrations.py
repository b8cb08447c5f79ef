"""Facts asked without words: a few others of the domain as a list, and the entity to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from repedit.data.domains import Fact, by_domain, drawn
from repedit.errors import NotEnoughRows


def with_demonstrations(items: Sequence[Fact], *, count: int = 3, seed: int = 0) -> tuple[Fact, ...]:
    """One fact an item whose prompt is "entity: answer" of `count` others of its domain, a line each, then "entity:".

    The relation is shown, never named, so what answers it cannot be the wording. Ids are "capitals/france#shown".

    Raises:
        NotEnoughRows: if a domain has too few facts to show.
    """
    domains = by_domain(items)
    short = next((name for name, part in domains.items() if len(part) <= count), None)
    if short is not None:
        raise NotEnoughRows(
            f"domain {short!r} has {len(domains[short])} facts; {count} to show and one to ask are needed"
        )
    lines = {fact.id: f"{fact.entity or fact.prompt}: {fact.answer}" for fact in items}
    found = []
    for fact in items:
        others = [other.id for other in domains[fact.domain] if other.id != fact.id and other.entity != fact.entity]
        shown = [lines[name] for name in drawn(others, f"{seed}:shown:{fact.id}")[:count]]
        prompt = "\n".join([*shown, f"{fact.entity or fact.prompt}:"])
        found.append(replace(fact, id=f"{fact.id}#shown", prompt=prompt, paraphrases=()))
    return tuple(found)
