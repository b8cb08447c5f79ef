"""The dispatch table of the low-rank kernel: which tiling, and how large a tile, for each width, rank and card.

resident    A: a block of rows stays in registers between its two products; x is read once.
two_sweeps  B: a program reads its rows twice; the second read usually hits the L2 cache.
split       C: two kernels, t = x V and y = x - t U^T; x is read twice; any width and rank.

A is chosen while its rows fit the registers without a spill (bench/results/kernels-compiled.json) and while reading U
and V once in each program is less traffic than reading x. The choice follows from counted bytes: no row of the table has
been timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

TILINGS = ("resident", "two_sweeps", "split")
MAX_RANK = 256
# The reference finishes fewer elements than this before a kernel has started.
MIN_ELEMENTS = 2**16


@dataclass(frozen=True)
class Tile:
    """A tiling and its sizes: rows and columns of a tile, padded rank, warps a program, pipeline stages of its loops."""

    tiling: str
    rows: int
    columns: int
    rank: int
    warps: int
    stages: int = 3


@dataclass(frozen=True)
class Fit:
    """A tile that fits rows up to `width` at padded ranks up to `rank` on cards of these major compute capabilities."""

    width: int
    rank: int
    rows: int
    columns: int
    warps: int
    majors: tuple[int, ...] = (8, 9, 10, 12)


ANY = 2**31
# By bytes an element; the first row that fits is taken. Where capabilities differ, the larger tile spills on the others.
RESIDENT = {
    2: (
        Fit(576, 16, 64, 64, 4, (8, 9, 10)),
        Fit(576, 16, 32, 64, 4, (12,)),
        Fit(576, 64, 64, 64, 8, (9, 10)),
        Fit(576, 64, 32, 64, 8, (8, 12)),
        Fit(1024, 16, 64, 128, 8, (8, 9, 10)),
        Fit(1024, 16, 32, 128, 8, (12,)),
        Fit(1024, 64, 64, 128, 8, (8, 9)),
        Fit(1024, 64, 32, 128, 8, (10, 12)),
        Fit(2048, 16, 32, 128, 8, (8, 9)),
        Fit(2048, 16, 16, 128, 8, (10, 12)),
        Fit(4096, 16, 16, 256, 8, (8, 9)),
    ),
    4: (Fit(576, 16, 32, 64, 8), Fit(1024, 16, 16, 64, 8)),
}
# For both other tilings.
STREAMED = {
    2: (
        Fit(ANY, 16, 64, 64, 4, (10,)),
        Fit(ANY, 64, 64, 128, 4, (8, 9, 10)),
        Fit(ANY, 64, 64, 64, 4, (12,)),
        Fit(ANY, 256, 64, 64, 8, (9, 10)),
        Fit(ANY, 256, 32, 64, 8, (8, 12)),
    ),
    4: (
        Fit(ANY, 16, 64, 64, 4),
        Fit(ANY, 64, 64, 32, 8),
        Fit(ANY, 256, 64, 32, 8, (9, 10, 12)),
        Fit(ANY, 256, 32, 32, 8, (8,)),
    ),
}


def padded(rank: int) -> int:
    """The rank as the kernels see it: a power of two, at least the 16 that a tensor instruction multiplies."""
    return max(16, 1 << (rank - 1).bit_length())


def tile(width: int, rank: int, itemsize: int, want: str = "auto", *, major: int = 9) -> Tile | None:
    """The tile for rows of `width` elements, or None where tiling `want` does not exist for them.

    Args:
        major: major compute capability of the device; one that is not in the table uses the nearest older one.
    """
    size, capability = padded(rank), [8, *(m for m in (9, 10, 12) if m <= major)][-1]
    tilings = ("resident", "split") if want == "auto" else (want,)
    for tiling in tilings:
        for fit in (RESIDENT if tiling == "resident" else STREAMED).get(itemsize, ()):
            if width <= fit.width and size <= fit.rank and capability in fit.majors:
                stages = 1 if tiling == "resident" else 3
                return Tile(tiling, fit.rows, fit.columns, size, fit.warps, stages)
    return None
