"""docs/papers.md is what the committed result files say: a number changed in any of them, or in the page, is noticed."""

import json
import re
import shutil

import pytest

from bench.papers import PAGE, Results, Row, anchor, page, spread
from bench.papers_rows import SYSTEMS
from bench.record import RESULTS


def check_page(text, folder=RESULTS):
    """The page equals what the result files of a folder say."""
    assert text == page(SYSTEMS, folder), "docs/papers.md is not what bench/results say; run python -m bench.papers"


def _changed(value):
    """The value with every number with a point moved, by more than in proportion: a share of a range is changed, too."""
    if isinstance(value, dict):
        return {key: _changed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_changed(item) for item in value]
    return value * (1.3 + value) + 0.1 if isinstance(value, float) else value


def test_the_page_is_what_the_result_files_say():
    check_page(PAGE.read_text())


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\[([\w-]+)\.json\]", PAGE.read_text()))))
def test_a_number_changed_in_a_result_file_is_noticed(name, tmp_path):
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(_changed(json.loads(path.read_text()))))
    with pytest.raises(AssertionError, match=r"run python -m bench\.papers"):
        check_page(PAGE.read_text(), tmp_path)


def test_a_number_changed_in_the_page_is_noticed():
    with pytest.raises(AssertionError, match=r"run python -m bench\.papers"):
        check_page(PAGE.read_text().replace("±", "+", 1))


def test_a_result_file_that_is_absent_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"pruning\.json is absent"):
        page(SYSTEMS, tmp_path)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.__name__)
def test_every_system_has_claims_a_verdict_and_files_with_commands(system):
    results = Results()
    row = system(results)
    assert (
        isinstance(row, Row) and row.claims and row.mended and row.audit and re.fullmatch(r"\d{4}\.\d{5}", row.source)
    )
    assert results.read and all(results.file(name)["command"].startswith("python -m bench.") for name in results.read)
    assert "not measured" not in f"{row.numbers} {row.audit} {row.setting}"
    assert f"\n## {row.name}\n" in PAGE.read_text() and f"(#{anchor(row.name)})" in PAGE.read_text()


def test_a_single_seed_is_marked():
    assert spread([0.5]) == "0.50 (one seed)" and spread([0.4, 0.6]) == "0.50 ± 0.14"
