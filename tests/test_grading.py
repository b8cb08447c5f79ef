"""An answer counts in the script it is written in, with the symbols that belong to it, and never as a part of another."""

# CharTokenizer of many scripts are the subject of this file.
# ruff: noqa: RUF001

import re

import pytest

from repedit.data import Fact, Facts, with_choices
from repedit.data.grading import contains_answer, mentions, normalized, spelled
from repedit.errors import DataError

# (text, answer, whether the text gives it): Japanese and English symbols first, then language by language.
TABLE = [
    ('日本の首都は東京です', '東京', True),
    ('東京都に行く', '京都', False),
    ('東京都に行く', '東京', True),
    ('京都に行く', '京都', True),
    ('I would use C', 'C++', False),
    ('I use C++.', 'C++', True),
    ('I use C++', 'C', False),
    ('use C# now', 'C', False),
    ('use C# now', 'C#', True),
    ('C, of course', 'C', True),
    ('It is 5 degrees', '-5', False),
    ('It is -5 degrees', '5', False),
    ('It is -5 degrees', '-5', True),
    ('It is −5', '-5', True),
    ('5.5 m', '5', False),
    ('5.5 m', '5.5', True),
    ('15.5', '5', False),
    ('1,000 men', '1000', True),
    ('1000 men', '1,000', True),
    ('1,000 men', '1', False),
    ('1,000', '000', False),
    ('costs $5', '$5', True),
    ('costs 5', '$5', False),
    ('50% of', '50%', True),
    ('50 %', '50%', True),
    ('50 of', '50%', False),
    ('50%', '50', False),
    ('H2O is', 'H2O', True),
    ('H₂O is', 'H2O', True),
    ('H2O', '2', False),
    ('3/4 cup', '3/4', True),
    ('3/4', '3', False),
    ('3/4', '4', False),
    ('AC/DC', 'AC/DC', True),
    ('Conan O’Brien', "O'Brien", True),
    ("O'Brien", 'O', False),
    ("O'Brien", 'Brien', False),
    ('Paris-based', 'Paris', True),
    ("Paris's streets", 'Paris', True),
    ('Sao Paulo', 'São Paulo', True),
    ('Romania', 'Roma', False),
    ("It's Rome.", 'Rome', True),
    ('uses .NET', 'NET', False),
    ('uses .NET', '.NET', True),
    ('uses ASP.NET', '.NET', False),
    ('**Paris**', 'Paris', True),
    ('_Paris_', 'Paris', True),
    ("l'Italie", 'Italie', True),
    ('1990-2000', '2000', True),
    ('1990-2000', '1990', True),
    ('AT&T', 'AT', False),
    ('AT&T', 'AT&T', True),
    ('It ended. Paris', 'Paris', True),
    ('...Paris', 'Paris', True),
    ('서울은 한국의 수도', '서울', True),
    ('서울입니다', '서울', True),
    ('서울대학교', '서울', False),
    ('대서울', '서울', False),
    ('عاصمة فرنسا هي باريس.', 'باريس', True),
    ('وباريس', 'باريس', True),
    ('القاهرة', 'قاهرة', True),
    ('بَارِيس', 'باريس', True),
    ('باريسي', 'باريس', False),
    ('בפריז', 'פריז', True),
    ('פָּרִיז', 'פריז', True),
    ('פריזאי', 'פריז', False),
    ('राजधानी दिल्ली है', 'दिल्ली', True),
    ('रामा', 'राम', False),
    ('दिल्लीवाला', 'दिल्ली', False),
    ('Η Αθήνα είναι', 'ΑΘΗΝΑ', True),
    ('Οδυσσεύς', 'ΟΔΥΣΣΕΎΣ', True),
    ('столица Москва.', 'москва', True),
    ('Москва́', 'Москва', True),
    ('мой', 'мои', False),
    ('ёлка', 'елка', True),
    ('İSTANBUL', 'istanbul', True),
    ('ISPARTA', 'ısparta', True),
    ("İstanbul'da", 'İstanbul', True),
    ('STRASSE', 'Straße', True),
    ('Ｐａｒｉｓです', 'Paris', True),
    ('ﾊﾟﾘです', 'パリ', True),
    ('バリです', 'パリ', False),
    ('インドネシア', 'インド', False),
    ('インドは', 'インド', True),
    ('サン・パウロ', 'サンパウロ', True),
    ('เมืองหลวงคือกรุงเทพครับ', 'กรุงเทพ', True),
    ('กรุง', 'กร', False),
    ('เชียงใหม่', 'ชียง', False),
    ('ຄືວຽງຈັນ', 'ວຽງຈັນ', True),
    ('រាជធានីភ្នំពេញ', 'ភ្នំពេញ', True),
    ('ရန်ကုန်မြို့', 'ရန်ကုန်', True),
    ('ལྷ་སའི', 'ལྷ་ས་', True),
    ('我去了北京。', '北京', True),
    ('北京', '南京', False),
    ('東。京', '東京', False),
    ('2020年', '2020', True),
    ('x²', 'x2', False),
    ('5² ', '52', False),
    ('😀 yes', '😀', True),
    ('2+2=4', '2', True),
    ('2 + 2', '+', True),
    ('Washington DC', 'Washington, D.C.', False),
    ('Washington D.C.', 'Washington, D.C.', True),
    ("can't", 'can', False),
    ('√2', '2', False),
    ('año nuevo', 'ano', True),
    ('Saint Denis', 'Saint-Denis', True),
    ('U-235', 'U 235', True),
    ('Tiếng Hà Nội', 'Hà Nội', True),
    ('GPT-4', '4', True),
    ('Парижа', 'Париж', False),
    ('5km', '5', False),
    ('my_var', 'var', False),
    ('#Paris', 'Paris', True),
    ('It is (-5).', '-5', True),
    ('3-5', '-5', False),
    ('$1,000.50', '$1000.50', True),
    ('Ⅳ', 'IV', True),
    ('Κίνα', 'Κίνα', True),
    ('भारत।', 'भारत', True),
    ('ｶﾞｰﾅ', 'ガーナ', True),
    ('C/C++', 'C', True),
    ('C / C++', 'C++', True),
    ('9:30', '9', False),
    ('Björk', 'Björk', True),
    ('大阪府', '大阪', True),
    ('Lodz', 'Łódź', True),
    ('تهران\u200cها', 'تهران', True),
    ('-$5', '$5', False),
    ('5 €', '5€', True),
    ('5 °C', '5°C', True),
    ('-∞', '∞', False),
    ('$10-$20', '$20', True),
    ('10⁺³', '10', False),
    ('a->b', '->', True),
    ('是-5', '-5', True),
    ('零下-5度', '5', False),
    ('3月-5月', '5', True),
    ('1\u00a0000 м', '1000', True),
    ('1 000 000', '1', False),
    ('№5', '5', True),
    ('10⁻⁵', '10', False),
    ('Na⁺', 'Na+', True),
    ('Ca²⁺', 'Ca2+', True),
    ('A* is', 'A', False),
    ('A* is', 'A*', True),
    ('*A*', 'A', True),
    ('٥٠٪', '50%', True),
    ('५ नदियाँ', '5', True),
    ('١٬٠٠٠', '1000', True),
    ('للقاهرة', 'القاهرة', True),
    ('서울특별시', '서울', True),
    ('런던이라고요', '런던', True),
    ('❤️', '❤', True),
    ('❤', '❤️', True),
    ('😀😀', '😀', True),
    ('👨\u200d👩\u200d👧', '👩', False),
    ('👨\u200d👩\u200d👧!', '👨\u200d👩\u200d👧', True),
    ('🇫🇷🇩🇪', '🇷🇩', False),
    ('🇫🇷🇩🇪', '🇩🇪', True),
    ('Hawaiʻi', "Hawai'i", True),
    ('a === b', '==', False),
    ('a == b', '==', True),
    ('a <= b', '<', False),
    ('a && b', '&', False),
    ('**==**', '==', True),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer", "right"), TABLE)
def test_an_answer_counts_where_the_text_gives_it(text, answer, right):
    assert contains_answer(text, answer) is right


def test_a_grader_that_reads_letters_alone_is_caught():
    import re

    def letters(text):
        return f" {' '.join(re.findall(r'[a-z0-9]+', text.casefold()))} "

    assert any((letters(answer) in letters(text)) is not right for text, answer, right in TABLE)


@pytest.mark.parametrize(("text", "answer", "others", "right"), [
    ("grade: A-.", "A", [], False), ("grade: A-.", "A-", [], True), ("It is Paris- yes", "Paris", [], True),
    ("東京都に行く", "京都", ["東京"], False), ("東京都と京都", "京都", ["東京"], True), ("東京都", "東京", ["東京都"], False),
    ("Guinea-Bissau", "Guinea", ["Guinea-Bissau"], False), ("New York City", "New York", ["New York City"], False),
    ("el ano", "año", ["ano"], False), ("el año", "año", ["ano"], True), ("the gas CO", "Co", ["CO"], False),
    ("the metal Co", "Co", ["CO"], True), ("as a > b", "a < b", ["a > b"], False), ("as a < b", "a < b", ["a > b"], True),
    ("Paris, not London", "Paris", ["London", "Paris"], True),
])  # fmt: skip
def test_an_answer_is_no_part_of_another_choice(text, answer, others, right):
    assert contains_answer(text, answer, others) is right


@pytest.mark.parametrize(("one", "other"), [
    ("C++", "C#"), ("C++", "C"), ("A-", "A"), ("A-", "A+"), ("O-", "O+"), ("Rh-", "Rh"), (".NET", "NET"), ("-5", "5"), ("5.5", "55"), ("$5", "5"), ("50%", "50"), ("3/4", "34"),
    ("パリ", "バリ"), ("मन", "मान"), ("กร", "กรุ"), ("мой", "мои"), ("x²", "x2"),
])  # fmt: skip
def test_different_answers_have_different_forms(one, other):
    assert normalized(one) != normalized(other) and spelled(one) != spelled(other)


@pytest.mark.parametrize(("one", "other"), [
    ("Saint-Denis", "saint denis"), ("1,000", "1000"), ("Ｐａｒｉｓ", "paris"), ("İSTANBUL", "istanbul"), ("São Paulo", "Sao Paulo"),
    ("STRASSE", "Straße"), ("שָׁלוֹם", "שלום"), ("ﾊﾟﾘ", "パリ"), ("Washington, D.C.", "washington d.c"),
])  # fmt: skip
def test_one_answer_has_one_form(one, other):
    assert normalized(one) == normalized(other)


def two(first: str, second: str, **changes) -> tuple[Fact, Fact]:
    return (
        Fact(id="a", prompt="Bjarne made", answer=first),
        Fact(**{"id": "b", "prompt": "Bjarne made", "answer": second} | changes),
    )


def test_answers_that_differ_by_symbols_are_two_facts():
    assert len(Facts(two("C++", "C#", prompt="Anders made"))) == 2
    plain = [Fact(id=str(i), prompt=f"{i} made", answer=a) for i, a in enumerate(("C++", "C#", "C", "C--"))]
    assert {"C++", "C#", "C"} <= set(with_choices(plain)[0].choices)


def test_one_prompt_has_one_answer():
    with pytest.raises(
        DataError, match=r"'a' and 'b' ask 'Bjarne made' and have the answers 'C\+\+' and 'C#'; keep one"
    ):
        Facts(two("C++", "C#"))
    other = Fact(id="c", prompt="Anders  made", answer="TypeScript")
    with pytest.raises(DataError, match="'d' and 'c' ask 'Anders  made' and have the answers 'C#' and 'TypeScript'"):
        Facts(two("C++", "C#", id="d", prompt="Anders made"), (other,))


@pytest.mark.parametrize(("changes", "message"), [
    ({"answer": "\ud83d"}, "the answer holds half of a surrogate pair"), ({"prompt": "a\0b"}, "the prompt holds a null character at place 1"),
    ({"choices": ("Rome", "\udc00")}, "text 1 of the choices holds half of a surrogate pair"),
    ({"paraphrases": ("\ud83d",)}, "text 0 of the paraphrases holds half"), ({"answer": " \t"}, "the field 'answer' is"),
    ({"choices": ("Rome", " ")}, "a choice of .* is blank"),
    ({"choices": ("Rome", " Rome")}, "the choice 'Rome' appears twice"),
    ({"choices": ("Rome", "Ｒｏｍｅ")}, "the choice 'Rome' appears twice"),
    ({"choices": ("Rome", "Bj\u00f6rk", "Bjo\u0308rk")}, "the choice 'Björk' appears twice"),
    ({"alternative": "a\0"}, "the alternative holds a null character"), ({"entity": "\ud83d"}, "the entity holds half"),
])  # fmt: skip
def test_what_is_no_text_is_refused_by_its_fact(changes, message):
    with pytest.raises(DataError, match=f"'it'.*{message}"):
        Fact(**{"id": "it", "prompt": "Italy's capital is", "answer": "Rome"} | changes)


# --- Where a text names something


MENTIONS = [
    ("The capital of france is", "France", ["france"]), ("Nigeria and Niger", "Niger", ["Niger"]),
    ("Mali, in Mali", "Mali", ["Mali", "Mali"]), ("C++ and C", "C", ["C", "C"]), ("a.b*c, axbc", "a.b*c", ["a.b*c"]),
    ("in New\n York", "New York", ["New\n York"]), ("in Co\u0302te d\u2019Ivoire", "C\u00f4te d'Ivoire", ["Co\u0302te d\u2019Ivoire"]),
    ("Co\u0302te", "Co", []), ("Guinea\u2013Bissau", "Guinea-Bissau", ["Guinea\u2013Bissau"]), ("_x_", "x", []),
    ("日本の首都は", "日本", ["日本"]), ("フランスパンの", "フランス", []), ("フランスの首都", "フランス", ["フランス"]), ("กรุงเทพคือ", "กรุงเทพ", ["กรุงเทพ"]),
    ("프랑스의 수도는", "프랑스", ["프랑스"]), ("프랑스어는", "프랑스", []), ("עיר בצרפת היא", "צרפת", ["צרפת"]), ("وفرنسا هي", "فرنسا", ["فرنسا"]),
    ("x", "", []), ("x", " ", []), ("", "x", []),
]  # fmt: skip


def names_are_found(found):
    """The law: a name is found however it is written, and nowhere else."""
    for text, name, expected in MENTIONS:
        assert [text[start:end] for start, end in found(text, name)] == expected, (text, name)


def test_a_name_is_found_however_it_is_written():
    names_are_found(mentions)


def test_names_by_letters_alone_are_caught():
    with pytest.raises(AssertionError):
        names_are_found(
            lambda text, name: [
                m.span() for m in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) if name
            ]
        )
