"""Where an edit happens: a layer and a point in it.

`str(site)` is "7.mlp.neurons". TransformerLens hook names ("blocks.7.mlp.hook_post") are accepted wherever a site is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from repedit.arguments import check_type, checked
from repedit.errors import UnknownSite, nearest


class Point(StrEnum):
    """A named tensor of a transformer block, in the order of the forward pass."""

    RESID_PRE = "resid.pre"
    ATTN_NEURONS = "attn.neurons"
    ATTN_OUT = "attn.out"
    MIXER_NEURONS = "mixer.neurons"
    MIXER_OUT = "mixer.out"
    RESID_MID = "resid.mid"
    MLP_NEURONS = "mlp.neurons"
    MLP_OUT = "mlp.out"
    PLE_NEURONS = "ple.neurons"
    PLE_OUT = "ple.out"
    RESID_POST = "resid.post"

    @property
    def order(self) -> int:
        """Position in the forward pass of a block; operations on one tensor are applied in this order."""
        return list(Point).index(self)


NEURONS = (Point.ATTN_NEURONS, Point.MIXER_NEURONS, Point.MLP_NEURONS, Point.PLE_NEURONS)
"""The points that are made of neurons: the inputs of the projections that write to the stream."""
OUTPUTS = (Point.ATTN_OUT, Point.MIXER_OUT, Point.MLP_OUT, Point.PLE_OUT)
"""The points of what is added to the stream."""

HOOK_NAMES: Mapping[Point, str] = {
    Point.RESID_PRE: "hook_resid_pre",
    Point.ATTN_NEURONS: "attn.hook_z",
    Point.ATTN_OUT: "hook_attn_out",
    Point.MIXER_NEURONS: "mixer.hook_z",
    Point.MIXER_OUT: "hook_mixer_out",
    Point.RESID_MID: "hook_resid_mid",
    Point.MLP_NEURONS: "mlp.hook_post",
    Point.MLP_OUT: "hook_mlp_out",
    Point.PLE_NEURONS: "ple.hook_post",
    Point.PLE_OUT: "hook_ple_out",
    Point.RESID_POST: "hook_resid_post",
}
_LENS = re.compile(r"blocks\.(\*|\d+(?:-\d+)?)\.(.+)")


@dataclass(frozen=True)
class Site:
    """One point of one layer; layer 0 is the first block."""

    layer: int
    point: Point

    def __post_init__(self) -> None:
        check_type("layer", self.layer, int)
        object.__setattr__(self, "point", _point(str(self.point), str(self.layer)))
        if self.layer < 0:
            raise UnknownSite(f"layer {self.layer} does not exist; layer 0 is the first block")

    def __str__(self) -> str:
        return f"{self.layer}.{self.point}"

    def __lt__(self, other: Site) -> bool:
        return (self.layer, self.point.order) < (other.layer, other.point.order)

    @property
    def hook_name(self) -> str:
        """The TransformerLens name of this site, such as "blocks.7.mlp.hook_post"."""
        return f"blocks.{self.layer}.{HOOK_NAMES[self.point]}"

    @staticmethod
    @checked
    def parse(text: str | Site) -> Site:
        """The site that `text` names: "7.mlp.neurons" or "blocks.7.mlp.hook_post".

        Raises:
            UnknownSite: if the text does not name a point, or names a range of layers.
        """
        if isinstance(text, Site):
            return text
        layers, point = _split(text)
        if not layers.isdigit():
            raise UnknownSite(f"{text!r} names several layers, one site is needed; use select() for a range")
        return Site(int(layers), _point(point, text))


SiteKey = Any
"""The key of a measurement: a `Site` of a language model, or the path of a module, a str, of any other model."""


def site_key(text: str | Site) -> SiteKey:
    """The site that a text names, or the text itself as the path of a module."""
    if isinstance(text, Site):
        return text
    layers, _, point = text.partition(".")
    named = layers.isdigit() and point in {*Point, *HOOK_NAMES.values()}
    return Site.parse(text) if named or _LENS.fullmatch(text) else text


def select(
    selector: str | Site | Iterable[str | Site], layers: int, points: Sequence[Sequence[Point]] | None = None
) -> tuple[Site, ...]:
    """The sites a selector names, in forward order, each once.

    A selector is "7.mlp.neurons", "4-9.mlp.out", "*.mlp.neurons", several of these joined by commas, a Site, or a
    list of any of them. "*" stands for every layer that has the point.

    Args:
        layers: number of blocks of the model.
        points: the points of each layer of this model; None for all.
    Raises:
        UnknownSite: if a layer or point does not exist in this model, or the selector is empty.
    """
    valid = [tuple(Point)] * layers if points is None else points
    parts = [selector] if isinstance(selector, str | Site) else list(selector)
    sites = {site for part in parts for text in str(part).split(",") for site in _expand(text.strip(), valid)}
    if not sites:
        raise UnknownSite(f"selector {selector!r} names no site; try '*.mlp.neurons'")
    return tuple(sorted(sites))


def _expand(text: str, points: Sequence[Sequence[Point]]) -> list[Site]:
    span, name = _split(text)
    point, layers = _point(name, text), len(points)
    having = [layer for layer in range(layers) if point in points[layer]]
    if not having:
        there = ", ".join(p for p in Point if any(p in layer for layer in points))
        raise UnknownSite(f"{text!r}: this family has no {point}; its points are {there}")
    if span == "*":
        return [Site(layer, point) for layer in having]
    first, last = int(span.split("-")[0]), int(span.split("-")[-1])
    if last >= layers or first > last:
        raise UnknownSite(f"{text!r} asks for layers {first}..{last}; layers are 0..{layers - 1}")
    absent = sorted(set(range(first, last + 1)) - set(having))
    if absent:
        raise UnknownSite(f"{text!r}: layers {absent} of this model have no {point}; layers {having} have one")
    return [Site(layer, point) for layer in range(first, last + 1)]


def _split(text: str) -> tuple[str, str]:
    lens = _LENS.fullmatch(text)
    layers, _, point = (lens[1], ".", lens[2]) if lens else text.partition(".")
    if not re.fullmatch(r"\*|\d+(-\d+)?", layers) or not point:
        raise UnknownSite(
            f"{text!r} is not a site; write layer.point such as '7.mlp.neurons', '4-9.mlp.out' or '*.mlp.out'"
        )
    return layers, point


def _point(name: str, text: str) -> Point:
    by_hook = {hook: point for point, hook in HOOK_NAMES.items()}
    if name in by_hook:
        return by_hook[name]
    if name not in list(Point):
        raise UnknownSite(f"{text!r}: no point is called {name!r}; {nearest(name, list(Point), every=True)}")
    return Point(name)
