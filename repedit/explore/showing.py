"""A plotly figure with a still picture beside it, so that every front end shows one of them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repedit.errors import MissingDependency, TargetExists
from repedit.io.files import write_text
from repedit.io.text import parse_json


@dataclass(frozen=True, eq=False)
class Explorer:
    """What a notebook shows interactively where it can, and as a picture elsewhere."""

    figure: Any
    """A plotly Figure."""
    still: Any
    """A matplotlib Figure of the same values."""

    def __repr__(self) -> str:
        return "Explorer: this front end shows neither plotly nor pictures; write_html(path) makes a page of it"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        buffer = io.BytesIO()
        self.still.savefig(buffer, format="png", dpi=110)
        return {
            "application/vnd.plotly.v1+json": parse_json(self.figure.to_json(), "the figure", finite=False),
            "image/png": base64.b64encode(buffer.getvalue()).decode(),
            "text/plain": repr(self),
        }

    def write_html(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """One page that holds everything it needs (5 MB, most of it plotly.js) and asks no network.

        Raises:
            TargetExists: if the file exists and overwrite is not set. CheckpointError: if it cannot be written.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise TargetExists(f"{target.absolute()} exists; give another path, or overwrite=True")
        write_text(target, self.figure.to_html(include_plotlyjs=True, full_html=True))
        return target


def plotly() -> Any:
    """plotly.graph_objects.

    Raises:
        MissingDependency: if plotly is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise MissingDependency(
            "rp.explore needs plotly, which is not installed: pip install plotly; rp.plot draws the same values as pictures"
        ) from error
    return plotly.graph_objects


LAYOUT: dict[str, Any] = {
    "template": "none",
    "font": {"family": "sans-serif", "size": 13, "color": "#222"},
    "margin": {"l": 80, "r": 50, "t": 60, "b": 60},
    "paper_bgcolor": "white",
    "plot_bgcolor": "white",
    "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"family": "monospace", "size": 12, "color": "#222"}},
}
"""One look: white paper, whatever the theme of the notebook."""


def axis(title: str, **options: Any) -> dict[str, Any]:
    """The layout of an axis with its title."""
    return {"title": {"text": title, "font": {"size": 13}}, **options}


def slider(label: str, steps: list[dict[str, Any]], active: int) -> dict[str, Any]:
    """The layout of a slider below the figure."""
    return {
        "active": active,
        "currentvalue": {"prefix": label},
        "pad": {"t": 50},
        "steps": steps,
    }
