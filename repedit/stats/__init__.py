"""Running statistics of a site: float64 sums, added to batch by batch and merged exactly."""

from repedit.stats.activity import Activity
from repedit.stats.moments import CrossMoments, Moments, pooled

__all__ = ["Activity", "CrossMoments", "Moments", "pooled"]
