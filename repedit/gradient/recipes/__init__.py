"""Recipes of gradient unlearning, each an expression over losses, combiners, samplers and filters.

None of them promises removal: the published attacks say that gradient methods mostly hide. Run `rp.audit`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repedit.errors import UnknownName, check_names, nearest
from repedit.gradient import written
from repedit.gradient.recipe import CHANGEABLE, Merged, UnlearnRecipe
from repedit.gradient.recipes.basic import (
    dpo,
    ga,
    ga_kl,
    grad_diff,
    npo,
    npo_gdr,
    npo_klr,
    satimp,
    sim_npo,
    undial,
    wga,
)
from repedit.gradient.recipes.joined import blur, blur_ga, blur_npo, blur_rmu, normalised_difference, primal_dual
from repedit.gradient.recipes.published import (
    ails_ntua,
    cyber_for_ai,
    multiplier,
    small,
    sure,
    surgery,
    task_vector,
    zju_merge,
)
from repedit.gradient.recipes.steering import adaptive_rmu, rmu

RECIPES: dict[str, Callable[..., UnlearnRecipe | Merged]] = {
    f.__name__: f
    for f in (
        ga, grad_diff, ga_kl, npo, npo_gdr, npo_klr, dpo, sim_npo, wga, satimp, undial, rmu, adaptive_rmu, blur_npo, blur_ga,
        blur_rmu, normalised_difference, primal_dual, surgery, cyber_for_ai, ails_ntua, zju_merge, multiplier, task_vector,
    )
}  # fmt: skip
"""Every recipe that needs no other recipe or loss to be built from."""

__all__ = [*RECIPES, "RECIPES", "blur", "named", "read", "small", "sure"]


def named(name: str, **options: Any) -> UnlearnRecipe | Merged:
    """A recipe by name: "blur_npo", "ails_ntua:agad" with a variant, "sure:npo_gdr" and "small:blur_npo" over another.

    Raises:
        UnknownName: if there is no such recipe, with the nearest names.
    """
    head, _, rest = name.partition(":")
    if head in ("sure", "small") and rest:
        inner = named(rest, **options)
        if not isinstance(inner, UnlearnRecipe):
            raise UnknownName(f"{head} goes over one training, {rest!r} merges several; name another recipe")
        return sure(inner) if head == "sure" else small(inner)
    if head not in RECIPES:
        raise UnknownName(f"no recipe is called {head!r}; {nearest(head, RECIPES)}")
    own = [name for name, p in inspect.signature(RECIPES[head]).parameters.items() if p.kind is p.KEYWORD_ONLY]
    check_names(f"recipe {head!r}", options, [*own, *CHANGEABLE])
    return RECIPES[head](rest, **options) if rest else RECIPES[head](**options)


def read(path: str | Path) -> UnlearnRecipe:
    """The recipe in a TOML file, which mirrors the dataclass and may start from a named one; see `repedit.gradient.written`.

    Raises:
        DataError: if the file cannot be read. UnknownName: if a key or name is unknown, with the nearest.
        ArgumentError: if a value is missing or out of range.
    """
    return written.read(path, named)
