"""Deletion requests one after another: each is trained with the earlier ones in place, and none of them comes back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repedit.edit import Edit
from repedit.errors import ArgumentError
from repedit.fit.mrp import mrp
from repedit.models import Subject
from repedit.sites import Site


class ContinualMRP:
    """A growing edit: task t is fitted and trained in the complement of what tasks < t removed.

    The removed span only grows, U_t being orthogonal to U_1 .. U_{t-1}: P_{t+1} P_t = P_t P_{t+1} = P_{t+1}. The model is
    never changed; `edit` is what there is to hook, apply or export. The forget sets of earlier tasks are rehearsed while a
    new one is trained, as long as they are in memory: a series that was loaded has none.
    """

    def __init__(
        self, subject: Subject, *, sites: str | Site | list[str | Site] | None = None, rank: int = 8, **options: Any
    ) -> None:
        """Rank is that of each task; `options` are those of `rp.mrp` (config, method, text, progress)."""
        self.subject, self.sites, self.rank, self.options = subject, sites, rank, options
        self.edit = Edit({})
        self.tasks: tuple[str, ...] = ()
        self.forgotten: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"ContinualMRP(tasks={list(self.tasks)}, sites={self.sites!r}, rank={self.rank} a task)"

    def add_task(self, name: str, *, forget: Any, retain: Any, rank: int | None = None, **options: Any) -> Edit:
        """Unlearn one more set; returns the edit of all tasks so far. If it fails, nothing has changed.

        Raises:
            ArgumentError: if a task of that name exists. What `rp.mrp` raises.
        """
        if name in self.tasks:
            raise ArgumentError(f"task {name!r} was added before; tasks are {list(self.tasks)}")
        found = mrp(
            self.subject, forget=forget, retain=retain, sites=self.sites, rank=rank or self.rank,
            previous=self.edit if self.tasks else None, forgotten=self.forgotten, **{**self.options, **options},
        )  # fmt: skip
        names = (*self.tasks, name)
        self.forgotten = (*self.forgotten, forget)
        self.edit, self.tasks = Edit(found.maps, {**found.provenance, "tasks": list(names)}), names
        return self.edit

    def save(self, path: str | Path) -> None:
        """Write the edit, with the names of its tasks in the header."""
        self.edit.save(path)

    @staticmethod
    def load(path: str | Path, subject: Subject, **options: Any) -> ContinualMRP:
        """Go on from a saved edit.

        Raises:
            ArgumentError: if the file is not the edit of a series of tasks.
        """
        edit = Edit.load(path)
        names: Mapping[str, Any] = edit.provenance
        if not names.get("tasks"):
            raise ArgumentError(f"{path} is no series of tasks; pass it to rp.mrp(previous=Edit.load(path)) instead")
        known = {"sites": names["sites"], "rank": names["rank"]}
        found = ContinualMRP(subject, **{**known, **options})
        found.edit, found.tasks = edit, tuple(names["tasks"])
        return found
