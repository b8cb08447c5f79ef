"""Figures to explore in a notebook, without a server; where the front end cannot show them, a still picture stands in."""

from repedit.explore.depth import neurons
from repedit.explore.showing import Explorer
from repedit.explore.sliding import trajectory

__all__ = ["Explorer", "neurons", "trajectory"]
