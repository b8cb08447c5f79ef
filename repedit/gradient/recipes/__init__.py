"""Recipes of gradient unlearning, each an expression over losses, combiners, samplers and filters.

None of them promises removal: the published attacks say that gradient methods mostly hide. Run `rp.audit`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repedit.errors import ArgumentError, UnknownName, check_finite, check_names, nearest
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

SURE = ("percentile", "unit")
"""The options of `sure` in the name of a recipe, besides those of the recipe it goes over."""

__all__ = [*RECIPES, "RECIPES", "blur", "named", "read", "small", "sure"]


def named(name: str, /, **options: Any) -> UnlearnRecipe | Merged:
    """A recipe by name: "blur_npo", "ails_ntua:agad" with a variant, "sure:npo_gdr" and "small:blur_npo" over another.

    An option wins over the settings of `small`, these over the defaults of the recipe.

    Raises:
        UnknownName: if there is no such recipe, variant or option, with the nearest names.
        ArgumentError: if an option is out of range.
    """
    head, _, rest = name.partition(":")
    if head in ("sure", "small") and rest:
        mine = {name: options[name] for name in SURE if head == "sure" and name in options}
        inner = named(rest, **{name: value for name, value in options.items() if name not in mine})
        if not isinstance(inner, UnlearnRecipe):
            raise UnknownName(f"{head} goes over one training, {rest!r} merges several; name another recipe")
        changes = {name: value for name, value in options.items() if name in CHANGEABLE}
        return sure(inner, **mine) if head == "sure" else small(inner, **changes)
    if head not in RECIPES:
        raise UnknownName(f"no recipe is called {head!r}; {nearest(head, RECIPES)}")
    parameters = inspect.signature(RECIPES[head]).parameters
    own = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    check_names(f"recipe {name!r}", options, [*own, *CHANGEABLE])
    for option in (option for option in own if option in options):
        if str(parameters[option].annotation).startswith(("float", "int")):
            check_finite(**{option: options[option]})
        if options[option] is None and parameters[option].default is not None:
            raise ArgumentError(f"{option}=None; give a value, or leave it out for {parameters[option].default!r}")
    if rest and "variant" not in parameters:
        raise UnknownName(f"recipe {head!r} has no variants, and {rest!r} was asked for; name {head!r} alone")
    return RECIPES[head](rest, **options) if rest else RECIPES[head](**options)


def read(path: str | Path) -> UnlearnRecipe:
    """The recipe in a TOML file, which mirrors the dataclass and may start from a named one; see `repedit.gradient.written`.

    Raises:
        DataError: if the file cannot be read. UnknownName: if a key or name is unknown, with the nearest.
        ArgumentError: if a value is missing or out of range.
    """
    return written.read(path, named)
