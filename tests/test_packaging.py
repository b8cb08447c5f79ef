"""The wheel and the source archive hold what the package needs, and the wheel works outside this folder."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "repedit").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def missing(names: set[str]) -> set[str]:
    """Files of the package that an archive lacks."""
    return NEEDED - names


def test_an_archive_that_lacks_a_template_is_noticed():
    template = "repedit/report/templates/base.html.jinja2"
    assert missing(NEEDED - {template}) == {template}


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """A folder with the wheel and the source archive, built by the build backend itself."""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    return folder


@pytest.mark.slow
def test_both_archives_hold_every_file(archives):
    (wheel,), (source,) = archives.glob("*.whl"), archives.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert missing(names) == set() and not [name for name in names if name.startswith(("tests/", "bench/"))]
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert missing(held) == set() and {"pyproject.toml", "README.md", "LICENSE"} <= held


@pytest.mark.slow
def test_the_installed_wheel_works_without_this_folder(archives, tmp_path):
    (wheel,) = archives.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import repedit as rp; from repedit.report import schema; "
        f"assert rp.__file__.startswith({str(tmp_path)!r}), rp.__file__; schema(); rp.data.facts('capitals'); rp.data.prose(); "
        "from repedit.report.pages import ENVIRONMENT; ENVIRONMENT.get_template('audit.html.jinja2'); "
        "from repedit.cli import app; from typer.testing import CliRunner; print(CliRunner().invoke(app, ['--help']).exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("0"), done.stderr
