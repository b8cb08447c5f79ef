"""Build the documentation site: `python -m docs.build [folder]`; build/site by default, which git ignores.

A broken link, a page outside the navigation, or a name that the reference cannot find is an error.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from mkdocs.commands.build import build as build_site
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]


def build(folder: Path = ROOT / "build" / "site", *, docs: Path = ROOT / "docs") -> Path:
    """Write every page into a folder that is made anew.

    Raises:
        mkdocs.exceptions.Abort: if a page links to something that is not there.
    """
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), docs_dir=str(docs), strict=True)
    build_site(config)
    return folder


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"))
