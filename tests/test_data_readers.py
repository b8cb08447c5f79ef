"""Published data sets are read whole, as their authors count them, and a damaged file is named with its row."""

import json
from collections import Counter

import pytest

import repedit as rp
from repedit.data import Row, TofuRow
from repedit.errors import ArgumentError, DataError, NotFound, UnknownName
from tests.published_data import MEMBERS, PUBLISHED, published, stand_in

# (sc, qa) rows of the three tasks, by split.
SEMEVAL = {
    ("train", "forget"): [(83, 83), (107, 535), (152, 152)], ("train", "retain"): [(103, 103), (102, 510), (159, 159)],
    ("validation", "forget"): [(24, 24), (23, 115), (34, 34)], ("validation", "retain"): [(27, 27), (25, 125), (37, 37)],
}  # fmt: skip


def counted(rows) -> list[tuple[int, int]]:
    count = Counter((row.task, row.kind) for row in rows.items)
    return [(count[task, "sc"], count[task, "qa"]) for task in ("Task1", "Task2", "Task3")]


@pytest.mark.parametrize(("split", "side"), SEMEVAL, ids=lambda value: value)
def test_semeval_is_read_whole(split, side):
    assert counted(getattr(rp.data.semeval(published("semeval_lume"), split), side)) == SEMEVAL[split, side]


@pytest.mark.parametrize(("split", "texts"), [("train", 150), ("validation", 34)])
def test_semeval_is_published_with_texts_for_a_membership_test(split, texts):
    tasks = rp.data.semeval(published("semeval_lume"), split)
    assert len(tasks.members) == len(tasks.holdout) == texts
    assert not {d.text for d in tasks.members.documents} & {d.text for d in tasks.holdout.documents}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_of_semeval_are_counted_by_task_and_kind(split):
    tasks = rp.data.semeval(stand_in() / "semeval_lume", split)
    assert counted(tasks.forget) == counted(tasks.retain) == [(3, 3)] * 3
    assert len(tasks.members) == len(tasks.holdout) == MEMBERS
    assert {d.text.split()[1] for d in tasks.members.documents} == {"member"}
    assert all(split in row.prompt for row in (*tasks.forget.items, *tasks.retain.items))


def test_lume_is_read_whole_and_holds_what_semeval_forgets():
    tasks = rp.data.lume(published("lume"))
    assert (len(tasks.forget), len(tasks.retain), tasks.members) == (2732, 2734, None)
    check_lume_holds_semeval(PUBLISHED)


def check_lume_holds_semeval(place) -> None:
    inputs = {row.prompt for row in rp.data.lume(place / "lume").forget.items}
    for split in ("train", "validation"):
        assert {row.prompt for row in rp.data.semeval(place / "semeval_lume", split).forget.items} <= inputs


def test_lume_and_semeval_of_one_form_are_read_alike():
    check_lume_holds_semeval(stand_in())


TOFU = {
    "full": 4000,
    "retain90": 3600,
    "retain95": 3800,
    "retain99": 3960,
    "forget10": 400,
    "forget05": 200,
    "forget01": 40,
}
PERTURBED = {"forget10": (400, 5), "retain": (400, 5), "real_authors": (100, 3), "world_facts": (117, 3)}


@pytest.mark.parametrize("split", TOFU)
def test_tofu_is_read_whole(split):
    rows = rp.data.tofu(published("tofu"), split)
    assert len(rows) == TOFU[split] and type(rows.items[0]) is Row and rows.name == split


@pytest.mark.parametrize("place", [stand_in, published])
def test_what_tofu_forgets_it_does_not_retain(place):
    sides = [
        {row.text for row in rp.data.tofu(place() / "tofu", split).items} for split in ("forget10", "retain90", "full")
    ]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == sides[2]


@pytest.mark.parametrize(("split", "rows"), [("full", 40), ("retain90", 36), ("forget10", 4)])
def test_every_row_of_a_split_is_read(split, rows):
    assert len(rp.data.tofu(stand_in() / "tofu", split)) == rows


@pytest.mark.parametrize("name", PERTURBED)
def test_wrong_answers_are_read(name):
    rows = rp.data.tofu(published("tofu"), f"{name}_perturbed").items
    assert (len(rows), {len(row.perturbed) for row in rows}) == (PERTURBED[name][0], {PERTURBED[name][1]})
    check_paraphrases(name, rows)


def check_paraphrases(name, rows) -> None:
    assert all((row.paraphrased == row.answer) == (name in ("real_authors", "world_facts")) for row in rows)


@pytest.mark.parametrize("name", PERTURBED)
def test_an_answer_without_a_paraphrase_stands_for_itself(name):
    rows = rp.data.tofu(stand_in() / "tofu", f"{name}_perturbed").items
    assert len(rows) == 4 and {len(row.perturbed) for row in rows} == {PERTURBED[name][1]}
    check_paraphrases(name, rows)


@pytest.mark.parametrize(("place", "split", "refusals"), [(stand_in, "full", 8), (published, "forget01", 21)])
def test_questions_are_put_in_a_template_and_get_refusals(place, split, refusals):
    plain, asked = (
        rp.data.tofu(place() / "tofu", split, **options).items
        for options in ({}, {"template": "Question: {}\nAnswer:", "refusals": True})
    )
    assert asked[3].prompt == f"Question: {plain[3].prompt}\nAnswer:" and asked[3].answer == plain[3].answer
    assert plain[3].alternative is None and len({row.alternative for row in asked}) >= refusals


def test_mmlu_is_read_whole():
    facts = rp.data.mmlu(published("mmlu"))
    assert len({fact.domain for fact in facts}) == 57 and len(facts) == 14042
    assert {fact.choices for fact in facts} == {("A", "B", "C", "D")}


def test_mmlu_of_one_form_is_read_whole():
    facts = rp.data.mmlu(stand_in() / "mmlu")
    assert {fact.domain for fact in facts} == {"anatomy", "early_music"}
    assert [fact.answer for fact in facts] == ["A", "B", "C", "D"] * 4


def test_shots_come_from_dev_and_are_answered():
    bare, shown = (rp.data.mmlu(stand_in() / "mmlu", subjects=["early_music"], shots=n, limit=3) for n in (0, 2))
    assert [f.answer for f in bare] == [f.answer for f in shown] == ["A", "B", "C"]
    assert bare[0].prompt.startswith(
        "The following are multiple choice questions (with answers) about early music.\n\nQuestion 0 of test?"
    )
    assert (
        shown[2].prompt.count("of dev?") == 2
        and "Answer: A\n\n" in shown[2].prompt
        and "Answer: B\n\n" in shown[2].prompt
    )
    assert shown[2].prompt.endswith("Question 2 of test?\nA. first\nB. second\nC. third\nD. fourth\nAnswer:")


def test_mmlu_answers_its_shots():
    bare, shown = (rp.data.mmlu(published("mmlu"), subjects=["anatomy"], shots=n, limit=3) for n in (0, 2))
    assert [f.answer for f in bare] == [f.answer for f in shown] == ["A", "B", "A"]
    assert bare[0].prompt.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\nA lesion"
    )
    assert shown[0].prompt.count("\nAnswer: D\n\n") == 2 and shown[0].prompt.endswith("\nAnswer:")


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path.parent


ROW = {"id": "a1sc1", "input": "a", "output": "b", "task": "Task1"}


def test_rows_of_tofu_by_hand(tmp_path):
    row = {"question": "q?", "answer": "yes", "perturbed_answer": ["no", "maybe"]}
    rows = rp.data.tofu(
        lines(tmp_path / "mine_perturbed.jsonl", row, row | {"paraphrased_answer": "sure"}), "mine_perturbed"
    )
    assert [type(r) for r in rows.items] == [TofuRow, TofuRow] and rows.items[0].text == "q? yes"
    assert [(r.id, r.paraphrased, r.perturbed) for r in rows.items] == [
        ("mine_perturbed/0", "yes", ("no", "maybe")), ("mine_perturbed/1", "sure", ("no", "maybe")),
    ]  # fmt: skip


def test_folders_of_semeval_may_be_kept(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for side in ("forget", "retain"):
        parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / f"{side}_train-0.parquet")
    for side in ("member", "nonmember"):
        lines(tmp_path / "mia_data" / f"{side}.jsonl", {"id": 1, "document": side})
    found = rp.data.semeval(tmp_path, "train")
    assert found.members.documents[0].text == "member" and found.forget.items[0].kind == "sc"
    with pytest.raises(NotFound, match=r"holds no \*forget_validation\*.parquet; it has \["):
        rp.data.semeval(tmp_path, "validation")
    (tmp_path / "mia_data" / "member.jsonl").unlink()
    with pytest.raises(NotFound, match=r"holds none of mia_data/member.jsonl, mia_data_member.jsonl; it has"):
        rp.data.semeval(tmp_path, "train")


def written(tmp_path, name="forget.jsonl", *rows):
    return lines(tmp_path / name, *(rows or (ROW,)))


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda p: rp.data.tofu(p, "full"), NotFound, r"holds no \.jsonl file; give the directory of TOFU, with forget10\.jsonl"),
    (lambda p: rp.data.tofu(p / "nowhere", "full"), NotFound, "nowhere is not a directory; give the one that holds TOFU"),
    (lambda p: rp.data.tofu(written(p, "forget10.jsonl"), "forget01"), UnknownName, "no split 'forget01'; did you mean 'forget10'"),
    (lambda p: rp.data.tofu(p, "full", template="Q:"), ArgumentError, r"template='Q:'; it needs one \{\}, where the question"),
    (lambda p: rp.data.tofu(written(p, "full.jsonl", {"question": "a"}), "full"), DataError,
     r"full.jsonl, row 1: no answer; the row has \['question'\]"),
    (lambda p: rp.data.tofu(written(p, "full.jsonl", "\n"), "full"), DataError, "full.jsonl holds no rows; download it again"),
    (lambda p: rp.data.tofu(written(p, "full.jsonl", {"question": "a", "answer": "b"}), "full", refusals=True), NotFound,
     "idontknow.jsonl is not a file; it must hold the refusals"),
    (lambda p: rp.data.muse(p), NotFound, "verbmem/forget.json is not a file; download"),
    (lambda p: rp.data.muse(p, limit=0), ArgumentError, "limit=0; give at least 1 row"),
    (lambda p: rp.data.lume(written(p)), NotFound, r"holds no retain.jsonl; it has \['forget.jsonl'\]"),
    (lambda p: rp.data.lume(written(p, "forget.jsonl", "{")), DataError, "forget.jsonl, row 1: not JSON"),
    (lambda p: rp.data.lume(written(p, "forget.jsonl", "[1]")), DataError, "row 1: found a list; one object a line"),
    (lambda p: rp.data.lume(written(p, "forget.jsonl", ROW, ROW | {"id": "b"})), DataError, "row 2: id 'b', task 'Task1'; an id"),
    (lambda p: rp.data.semeval(p, "test"), UnknownName, "split='test'; "),
    (lambda p: rp.data.mmlu(p), NotFound, r"holds no test/\*_test.csv; it has"),
    (lambda p: rp.data.mmlu(p, shots=6), ArgumentError, "shots=6, limit=None; give 0 to 5 shots"),
    (lambda p: rp.data.mmlu(written(p, "test/law_test.csv", "q,1,2,3,4,A\n").parent, subjects=["lew"]), UnknownName,
     "no subject is called 'lew'; did you mean 'law'"),
    (lambda p: rp.data.mmlu(written(p, "test/law_test.csv", "q,1,2,3,4,A\n").parent, shots=1), NotFound,
     "law_dev.csv is not a file; it must hold the shots"),
    (lambda p: rp.data.mmlu(written(p, "test/law_test.csv", "q,1,2,3,4,E\n").parent), DataError,
     "law_test.csv, question 1: 6 fields, the last 'E'; give"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "forget.json holds a list of no rows; a list of rows was expected"),
        ('{"prompt": "a"}', "forget.json holds a dict of no rows"),
        ('[{"prompt": "a"}]', "forget.json, row 1: .*; give the texts prompt, gt"),
    ],
)
def test_a_malformed_file_of_muse_is_named(content, message, tmp_path):
    (tmp_path / "verbmem").mkdir()
    (tmp_path / "verbmem" / "forget.json").write_text(content)
    with pytest.raises(DataError, match=message):
        rp.data.muse(tmp_path)
