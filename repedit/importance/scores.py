"""Scores: how specific each neuron is to the forget set, by site, with where that comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.io import archive
from repedit.io.text import check_fields
from repedit.sites import Place, Site, place


@dataclass(frozen=True, eq=False)
class Score:
    """How specific each neuron of a site is to the forget set; higher is more specific."""

    site: Place
    values: Float[Tensor, " d"]
    """float64; -inf where a neuron must not be selected."""
    importance: str
    combine: str
    agreement: float
    """Spearman's rank correlation of the two importances."""
    sinks: tuple[int, ...] = ()
    """Neurons whose first-position rms exceeds 100 times the layer's median."""
    protected: bool = False
    """Whether sinks are kept from selection."""
    units: Mapping[str, int] = field(default_factory=dict)
    """Neurons a head and a key-value group hold, for attention sites."""


_PLAIN = {
    "importance": str, "combine": str, "agreement": int | float, "sinks": list[int], "protected": bool, "units": dict[str, int],
}  # fmt: skip
"""Of the fields of a score, those that a file holds as plain values."""


@dataclass(frozen=True, eq=False)
class Scores(Mapping[Place, Score]):
    """One Score a site, with where they come from."""

    by_site: Mapping[Place, Score]
    provenance: Mapping[str, Any]

    def __getitem__(self, site: Place) -> Score:
        return self.by_site[site if site in self.by_site else Site.parse(site)]

    def __iter__(self) -> Iterator[Place]:
        return iter(self.by_site)

    def __len__(self) -> int:
        return len(self.by_site)

    def __repr__(self) -> str:
        total = sum(len(score.values) for score in self.values())
        kinds = sorted({f"{score.combine} of {score.importance}" for score in self.values()})
        return f"Scores({total:,} neurons at {len(self)} sites, {', '.join(kinds)})"

    def largest(self, count: int) -> tuple[tuple[Site, int, float], ...]:
        """The neurons of highest score over all sites, the highest first: (site, neuron, score); protected ones are left out."""
        sites = [(site, neuron) for site, score in self.items() for neuron in range(len(score.values))]
        values = torch.cat([score.values for score in self.values()])
        order = values.argsort(descending=True, stable=True)[:count].tolist()
        return tuple((*sites[i], float(values[i])) for i in order if values[i] > -torch.inf)

    @property
    def agreement(self) -> float:
        """Median Spearman correlation over sites."""
        return float(torch.tensor([s.agreement for s in self.values()], dtype=torch.float64).quantile(0.5))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, a vector a site, with everything else in its header."""
        plain = {
            str(site): {k: v for k, v in vars(s).items() if k not in ("site", "values")} for site, s in self.items()
        }
        values = {str(site): s.values for site, s in self.items()}
        archive.write(path, "scores", values, {"sites": plain, "provenance": dict(self.provenance)})

    @staticmethod
    def load(path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is not saved scores.
        """
        values, header = archive.read(path, "scores")
        with archive.rebuilding(path, "scores"):
            found = {}
            for name, row in header["sites"].items():
                site = place(name)
                check_fields(row, _PLAIN, name)
                found[site] = Score(site, values.pop(name), **(row | {"sinks": tuple(row["sinks"])}))
            wrong = [*values, *(str(site) for site, score in found.items() if score.values.ndim != 1)]
            if wrong:
                raise ValueError(f"the tensor {wrong[0]!r} is not the vector of a site")
            return Scores({site: found[site] for site in sorted(found)}, dict(header["provenance"]))
