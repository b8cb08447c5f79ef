"""Which page every public name is on: by task, then the rooms; a name that no task lists yet is under "More"."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import repedit as rp

TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "load": ("Load a model", ("load", "wrap", "fetch", "Subject", "Site", "Point", "check_architecture", "register", "resolve")),
    "look": (
        "Look at what is inside",
        ("collect", "max_activating", "peaks", "predictions", "compare", "facts_accuracy", "Activity", "Moments", "CrossMoments"),
    ),
    "score": ("Score neurons", ("score", "agreement", "Score", "Scores", "CollinearWarning")),
    "prune": ("Prune neurons", ("prune", "top", "random_like", "trajectory", "Trajectory", "Step")),
    "project": (
        "Project hidden states",
        ("mrp", "MRPConfig", "ContinualMRP", "erase_stream", "AffineMap", "LowRank", "Diagonal", "Chain", "certificate", "Certificate"),
    ),
    "unlearn": ("Unlearn by gradient", ("unlearn", "Delta")),
    "export": (
        "Rewrite weights and export",
        ("Edit", "apply", "export", "export_adapter", "slimmed", "sliced", "Plan", "diff", "reload_check", "gguf_check", "push"),
    ),
    "audit": ("Audit what is left", ("audit", "Report")),
    "bridges": ("Bridges to other toolkits", ("to_lens", "to_nnsight", "lens_hooks")),
    "vision": ("Image classifiers", ("audit_classifier", "ImageSplits")),
}  # fmt: skip
"""Page -> its title, and its names in the order of reading. Those of "vision" are shown where they are there."""


@dataclass(frozen=True)
class Page:
    """One page of names."""

    slug: str
    title: str
    prefix: str
    """What stands before the names: "rp" or "rp.data"."""
    names: tuple[str, ...]
    home: Any
    """What has the names as attributes."""
    room: bool = False

    @property
    def module(self) -> ModuleType | None:
        """The module whose docstring opens the page, for a room."""
        return self.home if self.room else None


def pages() -> list[Page]:
    """Every page of names, tasks first."""
    rooms = [name for name in rp.__all__ if isinstance(getattr(rp, name), ModuleType)]
    left = set(rp.__all__) - set(rooms) - {"__version__"}
    found = []
    for slug, (title, names) in TASKS.items():
        here = tuple(name for name in names if name in left)
        left -= set(here)
        if here:
            found.append(Page(slug, title, "rp", here, rp))
    if left:
        found.append(Page("more", "More", "rp", tuple(sorted(left)), rp))
    for name in rooms:
        found += _room(f"rp.{name}", getattr(rp, name))
    return found


def _room(dotted: str, module: ModuleType) -> list[Page]:
    """The page of a room, and those of the rooms inside it."""
    names = public(module)
    inner = [name for name in names if isinstance(getattr(module, name), ModuleType)]
    own = Page(dotted, dotted, dotted, tuple(name for name in names if name not in inner), module, room=True)
    return [own, *(page for name in inner for page in _room(f"{dotted}.{name}", getattr(module, name)))]


def public(module: ModuleType) -> list[str]:
    """The names a module gives: those it lists, or the classes and functions that are written in it."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = vars(module).items()
    return [name for name, value in own if not name.startswith("_") and _written_in(value, module)]


def _written_in(value: Any, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
