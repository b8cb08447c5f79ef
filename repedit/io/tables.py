"""Tables: CSV, Parquet, compressed CSV of numbers, and NumPy archives. No pickle is opened."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repedit.errors import DataError, MissingDependency
from repedit.io.files import open_regular
from repedit.io.text import read_text

# What gzip, zipfile and numpy raise for files that are damaged or of another kind.
_DAMAGED = (
    OSError, EOFError, ValueError, KeyError, RuntimeError, MemoryError, OverflowError, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def csv_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV file that are not blank.

    Raises:
        DataError: if the file cannot be read as UTF-8 or as CSV, with the line.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        return [row for row in rows if row]
    except csv.Error as reason:
        raise DataError(f"{path}, line {rows.line_num}: not CSV: {reason}") from reason


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file, by column.

    Raises:
        DataError: if the file cannot be read as Parquet.
        MissingDependency: without pyarrow.
    """
    try:
        from pyarrow import parquet
    except ImportError as reason:
        raise MissingDependency("reading parquet needs pyarrow: pip install pyarrow==26.0.1") from reason
    with open_regular(path, DataError) as file:
        try:
            rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
        except Exception as reason:  # pyarrow raises errors of many unrelated types for a damaged file
            raise DataError(f"{path} cannot be read as Parquet: {reason}; get it again") from reason
    return rows


def gzipped_numbers(path: Path) -> NDArray[np.float64]:
    """The table of numbers in a gzip-compressed CSV file.

    Raises:
        DataError: if the file is damaged or holds anything but numbers.
    """
    with open_regular(path, DataError) as file:
        try:
            with gzip.open(file, "rt") as lines:
                return np.loadtxt(lines, delimiter=",", dtype=np.float64)
        except _DAMAGED as reason:
            raise DataError(f"{path} is damaged: {reason}; get it again") from reason


def npz_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The named arrays of a NumPy archive.

    Raises:
        DataError: if the file is damaged, lacks an array or holds a pickle in its place.
    """
    with open_regular(path, DataError) as file:
        try:
            with np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in names}
        except _DAMAGED as reason:
            raise DataError(f"{path} is damaged or lacks an array: {reason}; get it again") from reason
        except (TypeError, AttributeError) as reason:  # a single array instead of an archive of them
            raise DataError(
                f"{path} is damaged or lacks an array: it is no archive of arrays; get it again"
            ) from reason
