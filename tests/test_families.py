"""docs/families.md names every type of the installed transformers, once, and says of it what is true."""

from __future__ import annotations

import re

import pytest

from docs import families
from tests.every_causal_type import CAUSAL_TYPES
from tests.every_wrapper_type import WRAPPER_TYPES
from tests.family_laws import tiny_of

PAGE = families.PAGE.read_text(encoding="utf-8")
TYPES = {families.CAUSAL: CAUSAL_TYPES, families.WRAPPERS: WRAPPER_TYPES}


def sections(page: str) -> dict[str, str]:
    """The text under each heading of the second level."""
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def tables(section: str) -> tuple[list[str], list[str]]:
    """The types that the tables of a section list as proved and as refused."""
    proved, refused = section.split("### Refused")
    return tuple(re.findall(r"^\| ([^ |]+) \|", part, flags=re.MULTILINE)[2:] for part in (proved, refused))


def check(page: str) -> None:
    """Every type is in one table of its section or listed as multimodal, no other is, and the counts are those of the rows."""
    assert list(sections(page)) == list(TYPES)
    for title, section in sections(page).items():
        proved, refused = tables(section)
        line = re.search(
            r"^(\d+) proved, (\d+) refused\.(?: (\d+) types are .*: (.*)\.)?$", section, flags=re.MULTILINE
        )
        elsewhere = (line[4] or "").split(", ") if line[3] else []
        assert [len(proved), len(refused), len(elsewhere)] == [int(line[i] or 0) for i in (1, 2, 3)]
        assert sorted([*proved, *refused, *elsewhere]) == sorted(TYPES[title])
        assert set(elsewhere) <= set(WRAPPER_TYPES)


def test_every_type_is_in_the_page():
    check(PAGE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| qwen3_next |", "| qwen3_newer |"),
        ("| bert |", "| llama |"),
        ("| llava |", "| lava |"),
        (" proved, ", "0 proved, "),
        ("emu3, ", ""),
    ],
)
def test_a_page_that_rotted_is_found(old, new):
    with pytest.raises(AssertionError):
        check(PAGE.replace(old, new, 1))


def test_every_row_has_a_cell_for_each_column():
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in PAGE.splitlines() if line.startswith("| ")]
    assert {len(cells) for cells in rows} == {len(families.COLUMNS), len(families.REFUSED_COLUMNS)}
    assert all(cell for cells in rows for cell in cells)


DENSE, EXPERTS, SHARED = "attn, mlp", "attn, mlp (experts)", "attn, mlp (experts and shared)"
NAMED = {
    "llama4_text": f"{DENSE} or {SHARED}",
    "qwen2_moe": SHARED,
    "qwen3_5_text": "mixer, mlp or attn, mlp",
    "qwen3_5_moe_text": f"mixer, mlp (experts and shared) or {SHARED}",
    "qwen3_next": f"mixer, mlp (experts and shared) or {SHARED}",
    "wrapper:gemma3": DENSE,
    "gemma4_text": f"{SHARED}, ple",
    "gpt_oss": EXPERTS,
    "deepseek_v3": f"{DENSE} or {SHARED}",
    "glm4": DENSE,
    "glm4_moe": f"{DENSE} or {SHARED}",
    "granite": DENSE,
    "granitemoehybrid": f"mixer, mlp (experts and shared) or {SHARED}",
    "olmo3": DENSE,
    "ministral3": DENSE,
    "phimoe": EXPERTS,
    "lfm2": "mixer, mlp or attn, mlp",
    "falcon": DENSE,
    "bloom": DENSE,
    "mpt": DENSE,
    "nemotron": DENSE,
    "ernie4_5_moe": f"{DENSE} or {SHARED}",
    "hunyuan_v1_dense": DENSE,
    "hunyuan_v1_moe": SHARED,
    "mamba2": "mixer",
}
"""The branches of models that people use, written by hand."""


@pytest.mark.parametrize("model_type", NAMED)
def test_no_branch_of_a_model_in_use_is_lost(model_type):
    subject = tiny_of(model_type)
    assert families.branches(subject) == NAMED[model_type]
    points = {point for layer in subject.layout.points for point in layer}
    kinds = {kind for kind in ("attn", "mixer", "mlp", "ple") if kind in NAMED[model_type]}
    assert {str(p) for p in points if not p.startswith("resid")} == {
        f"{k}.{end}" for k in kinds for end in ("neurons", "out")
    }


@pytest.mark.slow
def test_the_page_is_what_the_models_give():
    assert families.page() == PAGE, "run make families"
