"""Every block of code in the documentation is run on a tiny model, or parsed; one that is not is an error."""

from __future__ import annotations

import shutil

import pytest

from repedit.auditing.attack import _RECORDS
from repedit.errors import NotFound
from repedit.models.default_model import cached
from tests.guides import DOCS, PAGES, parse_command, run_page, saved_edit, small_settings

SLOW = ("classifiers",)
"""Guides that train a classifier as it stands there."""
MADE_EARLIER = {"audit": "edited"}
"""Checkpoints that a guide takes from an earlier one."""


@pytest.fixture(autouse=True)
def only_attacks_of_the_package():
    """What a guide registers is gone after it."""
    before = dict(_RECORDS)
    yield
    _RECORDS.clear()
    _RECORDS.update(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("reloaded_here")
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in SLOW), id=str(p.relative_to(DOCS))) for p in PAGES],
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    small_settings(tmp_path, monkeypatch)
    if page.stem in MADE_EARLIER:
        saved_edit(tmp_path / MADE_EARLIER[page.stem])
    run_page(page.read_text(), page.name, tmp_path)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("reloaded_here")
@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem) for p in PAGES if p.parent.name == "guides" and p.stem not in SLOW]
)
def test_the_code_of_a_guide_runs_on_the_default_model(page, tmp_path, monkeypatch):
    """With few facts, tokens, steps and attacks: ten minutes for all guides on two cores."""
    try:
        cached()
    except NotFound as error:
        pytest.skip(str(error))
    small_settings(tmp_path, monkeypatch, "smollm2-135m")
    if page.stem in MADE_EARLIER:
        saved_edit(tmp_path / MADE_EARLIER[page.stem])
    run_page(page.read_text(), page.name, tmp_path)
    shutil.rmtree(tmp_path)  # several checkpoints of 0.5 GB


BROKEN = {
    "a name that does not exist": ("```python\nimport repedit as rp\n\nrp.prunes\n```", AttributeError),
    "an option that does not exist": ("```bash\nrepedit prune m --fractions 0.1\n```", Exception),
    "a verb that does not exist": ("```bash\nrepedit snip m\n```", AssertionError),
    "a language that nothing tests": ("```ruby\nputs 1\n```", AssertionError),
    "a file without a name": ("```toml\nlr = 1\n```", AssertionError),
}


@pytest.mark.parametrize("text", BROKEN, ids=str)
def test_a_block_that_does_not_work_is_caught(text, tmp_path):
    page, error = BROKEN[text]
    with pytest.raises(error):
        run_page(page, "page", tmp_path)


def test_a_command_under_torchrun_is_parsed_too(tmp_path):
    run_page("```bash\ntorchrun --nproc-per-node 2 -m repedit diff a b\n```", "page", tmp_path)
    assert parse_command("repedit diff a 'b c'")["edited"] == "b c"
    with pytest.raises(Exception, match="No such option"):
        run_page("```bash\ntorchrun -m repedit diff a b --nothing\n```", "page", tmp_path)
