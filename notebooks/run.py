"""Execute notebooks from top to bottom and keep their outputs: `make notebooks`, or `python notebooks/run.py 3_is_it_really_gone.ipynb`.

Each runs in a fresh kernel and in a directory of its own, so what it writes is gone afterwards. An error stops at its cell and
leaves the file as it was.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> float:
    """Run one notebook and write it back with its outputs; seconds it took.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails, with its traceback.
    """
    notebook, start = nbformat.read(path, as_version=4), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _progress(output)]
    nbformat.write(notebook, path)
    return time.monotonic() - start


def _progress(output: nbformat.NotebookNode) -> bool:
    """Bars of progress, and the remark that this front end has no widgets for them."""
    text = str(output.get("text", "")) if output.get("name") == "stderr" else ""
    return "it/s]" in text or "s/it]" in text or "IProgress not found" in text


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    for found in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        print(f"{found.name}: {execute(found):.0f} s", flush=True)
