"""Hooks of the documentation site: generated pages, links out of docs/, and drawings inside the page."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from docs import notebooks, reference  # noqa: E402

COPIES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site -> files of the repository that they show."""
TITLES = {"README.md": "index.md"}
"""Files of the repository that the site has another page for."""
GENERATED = ("reference/", "notebooks/")
"""Folders of pages whose links are those of the site already."""
OPTIONAL = ("removal.md", "papers.md")
"""Pages of the navigation that may be absent."""
SHOWN_AS_TEXT = (".py", ".toml", "")
"""Kinds of files that a browser would not show, and that are copied as text."""
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]*)(#[^)\s]*)?(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, with the pages that exist and the pages of the reference."""
    config.nav = _existing(config.nav, Path(config.docs_dir))
    return config


def _existing(nav: Any, docs: Path) -> Any:
    if isinstance(nav, list):
        return [entry for entry in (_existing(entry, docs) for entry in nav) if entry is not None]
    if isinstance(nav, dict):
        for title, module in (("Reference", reference), ("Notebooks", notebooks)):
            if title in nav:
                return {title: module.navigation()}
        found = {title: _existing(entry, docs) for title, entry in nav.items()}
        return None if None in found.values() else found
    return None if nav in OPTIONAL and not (docs / nav).exists() else nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Generated pages, copies of files outside docs/, and every file outside docs/ that a page links to."""
    for name, content in {**reference.pages(), **notebooks.files()}.items():
        files.append(File.generated(config, name, content=content))
    for name, source in COPIES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    for file in [file for file in files.documentation_pages() if not file.src_uri.startswith(GENERATED)]:
        for path in _outside(file.src_uri, file.content_string):
            goal = ROOT / path
            if not goal.exists():
                raise PluginError(f"{file.src_uri} links to {path}, which does not exist")
            if goal.is_file() and files.get_file_from_path(_copied(path)) is None:
                files.append(File.generated(config, _copied(path), content=goal.read_bytes()))
    return files


def _origin(name: str) -> str:
    """The path of a page in the repository."""
    if name.startswith("notebooks/"):
        return str(Path(name).with_suffix(".ipynb"))
    return COPIES.get(name, f"docs/{name}")


def _in_site(path: str) -> str | None:
    """The page of the site for a file of the repository, if it has one."""
    if path.endswith(".ipynb"):
        return str(Path(path).with_suffix(".md"))
    pages = {source: name for name, source in COPIES.items()} | TITLES
    return pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)


def _copied(path: str) -> str:
    """Where a file outside docs/ lies in the site."""
    return f"{path}.txt" if Path(path).suffix in SHOWN_AS_TEXT else path


def _outside(name: str, text: str) -> list[str]:
    """Files of the repository outside the site that a page links to."""
    folder = posixpath.dirname(_origin(name))
    paths = [posixpath.normpath(posixpath.join(folder, match[2])) for match in _LINK.finditer(text) if match[2]]
    return [path for path in paths if _in_site(path) is None]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository become links to their place in the site; a folder is only named."""
    name = page.file.src_uri
    if name.startswith(GENERATED):
        return markdown
    folder = posixpath.dirname(_origin(name))

    def relinked(match: re.Match[str]) -> str:
        if not match[2]:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        goal = _in_site(path) or _copied(path)
        return f"{match[1]}{posixpath.relpath(goal, posixpath.dirname(name) or '.')}{match[3] or ''}{match[4]}"

    def named(match: re.Match[str]) -> str:
        return match[1] if (ROOT / posixpath.normpath(posixpath.join(folder, match[2]))).is_dir() else match[0]

    markdown = re.sub(r"\[([^\]]+)\]\((?!\w+:|#)([^)\s#]+)\)", named, reference.with_links(markdown))
    return _LINK.sub(relinked, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Drawings stand in the page itself, so that they have its colours; their description is read aloud."""

    def drawn(match: re.Match[str]) -> str:
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', match[0]))
        path = Path(config.docs_dir) / posixpath.normpath(
            posixpath.join(posixpath.dirname(page.file.src_uri), attributes["src"])
        )
        svg = re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.S)
        return svg.replace('role="img"', f'role="img" aria-label="{attributes["alt"]}" data-search-exclude', 1)

    return re.sub(r"<img [^>]*drawings/[^>]*\.svg[^>]*>", drawn, html)
