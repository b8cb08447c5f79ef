"""Grading: whether a text contains an answer, in any script, and the normalized form in which answers are compared.

In scripts with spaces an answer must match whole words. Case, accents, full-width forms and punctuation are ignored,
but not symbols that make another answer: "C" is not in "C++", and "5" is not in "-5", "5.5" or "50%". Korean particles
and Arabic and Hebrew prefixes may be attached. In scripts without spaces an answer matches anywhere, unless a
neighbouring character completes its first or last one; a word in katakana ends where katakana ends.

Without a dictionary some cases stay undecided: inflected forms do not match, and a longer name that contains the answer
does ("Guinea" in "Guinea-Bissau"), unless that name is among the other choices.
"""

# Letters of many scripts are the subject of this file.
# ruff: noqa: RUF001

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

SPACELESS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1980-\u19ff\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff"
    "\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9ff\uaa60-\uaa7f\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Thai, Lao, Tibetan, Burmese, Khmer, Tai, Balinese, Chinese, Japanese, Yi and Javanese, as ranges of a regular expression."""
_SCRIPTS = (
    ("m", re.compile("[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u309b\u309c]")),
    ("k", re.compile("[\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff]")), ("j", re.compile(f"[{SPACELESS}]")),
    ("h", re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7ff]")),
    ("r", re.compile("[\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff]")), ("b", re.compile("[\u0590-\u05ff]")),
)  # fmt: skip
_WORD = "ahrb0_m"
"""Kinds of character that words of scripts with spaces are made of: letters, Hangul, Arabic, Hebrew, digits, marks."""
_SAME = str.maketrans(
    dict.fromkeys("‘’ʻʼʹ´`＇׳", "'") | dict.fromkeys("‐‑‒–—―−־﹣", "-")
    | {"ک": "ك", "ی": "ي", "ـ": None, "\u200c": " ", "\u0f0c": "\u0f0b", "٪": "%", "٫": ".", "٬": ","}
)  # fmt: skip
_UNACCENTED = str.maketrans({"ı": "i", "ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe"})
# Decompositions that mean another thing: x² is not x2, 3½ not 31/2; of an ion, Ca²⁺, they are the ordinary form.
_MEANINGFUL = ("<super>", "<fraction>", "<circle>", "<square>")
_CHARGE = re.compile("[⁰¹²³⁴-⁹]*[⁺⁻](?![⁰¹²³⁴-⁹])")
# An emoji of several characters: a flag, or what a zero-width joiner joins.
_EMOJI = re.compile("[\U0001f1e6-\U0001f1ff]{2}|[^\\w\\s](?:\u200d[^\\w\\s])+")
_SHORT = re.compile(r"(?<![\w*])[^\W\d]{1,2}$")
_LEADING_VOWELS = "เแโใไເແໂໃໄ"
_PARTICLES = re.compile(
    "(은|는|이|가|을|를|의|에|에서|에게|께|한테|으로|로|와|과|도|만|까지|부터|보다|처럼|이나|나|이란|란|이라|라|이라고|라고|이라는|라는|마다|조차|"
    "인|이다|다|이며|며|이고|고|입니다|이에요|예요|에요|이었다|였다|이었습니다|였습니다|이지만|지만|이라고요|라고요|하고|밖에|뿐|"
    "시|시는|시가|특별시|광역시){0,3}"
)
_ARABIC = re.compile("[وف]?[بكلس]?(ال|ل)?")
_HEBREW = re.compile("ו?(ש|כש|מש)?[בלמכ]?ה?")
_ELISION = re.compile("(l|d|j|n|s|c|m|t|qu|jusqu|lorsqu|puisqu|dell|all|nell|sull|dall|un|quell|bell)")
# A space parts thousands where it does not break a line, or before zeros, with which no number begins.
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?:[\u00a0\u2009\u202f]\d{3})+|(?: 000)+)(?![\d,])")
_CURRENCY = "$¢£¤¥\u20a0-\u20cf"
_OPERATOR = r"=<>+\-/%&|^~"
# Another name begins before it and shares its first character.
_NEIGHBOURS = {"京都": ("東京",)}


def contains_answer(text: str, answer: str, others: Iterable[str] = ()) -> bool:
    """Whether a text contains an answer.

    Args:
        others: the wrong choices; the answer does not count as part of one of them. If one of them differs from the
            answer only in case and accents, these are compared; if only in punctuation, every character is compared.
    """
    others = [other for other in others if other != answer]
    exact = any(normalized(other) == normalized(answer) for other in others)
    whole, own = canonical(text, exact=exact), canonical(answer, exact=exact).strip("\u0f0b ")
    wrong = {canonical(other, exact=exact) for other in (*others, *_NEIGHBOURS.get(own, ()))}
    if not own or own in wrong:
        return _contains_symbols(text, answer)
    taken = [span for other in wrong if other for span in _spans(whole, other)]
    return any(
        not any(first < start < last or (first == start and last > end) for first, last in taken)
        for start, end in _spans(whole, own)
    )


def mentions(text: str, name: str) -> list[tuple[int, int]]:
    """Where a text holds a name as separate words: (start, end) of every mention, in characters and from left to right.

    Case, white space, the composition of accents and the forms of apostrophes and hyphens do not matter. In scripts without
    spaces a name matches anywhere; Korean particles and Arabic and Hebrew prefixes may be attached, see `contains_answer`.
    """
    pattern = _name_pattern(name)
    spans = [match.span() for match in pattern.finditer(text)] if pattern is not None else []
    return [(start, end) for start, end in spans if _apart_before(text, start) and _apart_after(text, end)]


def normalized(text: str) -> str:
    """The form in which answers and entities are compared: lower case, with one space between words and symbols."""
    return " ".join(canonical(text).replace("'", " ").split())


def spelled(text: str) -> str:
    """A text without invisible differences: width, composition and white space."""
    if text.isascii():  # ASCII has no such differences
        return " ".join(text.split())
    return " ".join(unicodedata.normalize("NFC", "".join(map(_ordinary_form, text))).split())


@lru_cache(maxsize=4096)
def canonical(text: str, *, exact: bool = False) -> str:
    """A text without meaningless differences: width, composition, vocalization, punctuation, thousands separators.

    Args:
        exact: keep case and accents, which are otherwise removed.
    """
    text = _without_forms(text, exact)
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = " ".join(text.split())
    kinds = "".join(map(_kind, text))
    whole = text
    text = re.sub(r"[^\w ]|_", lambda match: _kept_character(whole, kinds, match.start()), whole)
    text = re.sub(rf"(?<=\d) (?=[%‰°{_CURRENCY}](?! ?\d))|(?<=[{_CURRENCY}]) (?=\d)", "", text)
    return " ".join(text.split())


def _without_forms(text: str, exact: bool) -> str:
    """A text without differences of width, composition and vocalization, and, unless `exact`, of case and accents."""
    if text.isascii():  # ASCII has no such differences; this is four times as fast
        plain = text.replace("`", "'")
        return plain if exact else plain.casefold()
    text = _CHARGE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = "".join(map(_ordinary_form, text)).translate(_SAME)
    if not exact:
        text = text.casefold().replace("i\u0307", "i").translate(_UNACCENTED)
    text = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFC", "".join(c for i, c in enumerate(text) if not _is_meaningless(text, i, exact)))


def _ordinary_form(c: str) -> str:
    """A character in its ordinary form: full-width, half-width, positional and mathematical forms are letters.

    Digits of all scripts are those of ASCII.
    """
    if c in "№\u00a0\u2009\u202f":
        return c
    tag = unicodedata.decomposition(c).partition(" ")[0]
    plain = unicodedata.normalize("NFKC", c) if tag.startswith("<") and tag not in _MEANINGFUL else c
    return str(unicodedata.decimal(plain, plain)) if len(plain) == 1 else plain


def _is_meaningless(text: str, i: int, exact: bool) -> bool:
    """Whether a character carries no meaning: accents in Latin and Greek, stress in Cyrillic, vocalization, formatting."""
    c = text[i]
    if "\u0300" <= c <= "\u036f":
        base = next((b for b in reversed(text[:i]) if not unicodedata.combining(b)), "")
        if "\u0400" <= base <= "\u052f":
            # A breve makes another letter of и (й), a diaeresis of і (ї).
            return c in "\u0300\u0301" or (c == "\u0308" and base == "е")
        return not exact
    if c == "\u200d":
        # It joins emoji: another picture.
        return not 0 < i < len(text) - 1 or not _picture(text[:i].rstrip("\ufe0f")[-1:]) or not _picture(text[i + 1])
    if "\ufe00" <= c <= "\ufe0f":
        return True
    vowels = "\u0591" <= c <= "\u05c7" or "\u064b" <= c <= "\u065f" or c == "\u0670" or "\u06d6" <= c <= "\u06ed"
    return (vowels and unicodedata.category(c) == "Mn") or unicodedata.category(c) == "Cf"


def _picture(c: str) -> bool:
    return unicodedata.category(c) in ("So", "Sk", "Sm") if c else False


@lru_cache(maxsize=4096)
def _kind(c: str) -> str:
    """a letter, 0 digit, m mark, h Hangul, r Arabic, b Hebrew, k katakana, j other scripts without spaces; else itself."""
    if c.isascii() and not c.isalnum():
        return c
    if unicodedata.category(c)[0] == "M":
        return "m"
    if c.isdigit() or (c.isnumeric() and unicodedata.category(c) != "Lo"):
        return "0"
    for kind, script in _SCRIPTS:
        if script.match(c) and (c.isalnum() or c in "ー\u0f0b" or kind == "m"):
            return kind
    return "a" if c.isalnum() else c


def _kept_character(text: str, kinds: str, i: int) -> str:
    """The character at i, or a space if it is punctuation that does not make another answer."""
    c, kind = text[i], kinds[i]
    if kind in _WORD + "jk" and c != "_":
        return c
    left, right = kinds[i - 1] if i else " ", kinds[i + 1] if i + 1 < len(text) else " "
    inside = left in _WORD and right in _WORD
    match c:
        case "'" | "&" | "_" | "^":
            return c if inside else " "
        case "-":
            # A sign, a range of numbers, or the end of a short symbol: A-, Rh-.
            if right == "0" or (unicodedata.category(right) in ("Sc", "Sm") and right not in "=<>|~+"):
                month = left == "j" and kinds[i - 2 : i - 1] == "0"
                return c if left not in _WORD.replace("0", "") + "k" and not month else " "
            return c if right not in _WORD + "jk" and _SHORT.search(text[:i]) else " "
        case "\u200d":
            return c
        case "*":
            # The end of a short symbol: A*; *A* and **A** are marked up.
            return c if right not in _WORD + "jk*" and _SHORT.search(text[:i]) else " "
        case "." if right == "a":
            # The name .NET begins with its dot; the end of a sentence is followed by a space.
            return c if left in " ([\"'" else " "
        case "." | "," | ":" | "/":
            return c if left == right == "0" else " "
        case "+" | "#":
            return c if left in _WORD + "+#" or right == left == " " else " "
        case "%" | "‰":
            return c if left == "0" or text[max(i - 2, 0) : i].strip()[-1:].isdigit() else " "
        case "・":
            return "" if left == right == "k" else " "
        case "=" | "<" | ">" | "|" | "~":
            return " "
    return c if unicodedata.category(c) in ("Sc", "Sm", "So") else " "


def _spans(text: str, answer: str) -> list[tuple[int, int]]:
    """The (start, end) of every occurrence of the answer as separate words of a canonical text."""
    kinds, size = "".join(map(_kind, text)), len(answer)
    # The Arabic article loses its first letter after the preposition that is written with it.
    forms = "|".join(map(re.escape, (answer, f"لل{answer[2:]}") if answer.startswith("ال") else (answer,)))
    inside = {i for match in _EMOJI.finditer(text) for i in range(match.start() + 1, match.end())}
    spans = ((match.start(), match.start() + size) for match in re.finditer(f"(?={forms})", text))
    return [
        (i, end) for i, end in spans if not inside & {i, end} and _begins(text, kinds, i) and _ends(text, kinds, i, end)
    ]


@lru_cache(maxsize=4096)
def _name_pattern(name: str) -> re.Pattern[str] | None:
    """A regular expression for a name in any case, composition and spacing; None for a blank name."""
    words = ["".join(map(_spellings, unicodedata.normalize("NFC", word))) for word in name.split()]
    return re.compile(r"\s+".join(words), re.IGNORECASE) if words else None


def _spellings(c: str) -> str:
    """A regular expression for a character: itself, its decomposition, and the other forms of an apostrophe or a hyphen."""
    plain = _SAME.get(ord(c)) or c
    forms = [chr(code) for code, same in _SAME.items() if same == plain] if plain in "'-" else []
    return f"(?:{'|'.join(map(re.escape, dict.fromkeys((c, unicodedata.normalize('NFD', c), plain, *forms))))})"


def _apart_before(text: str, i: int) -> bool:
    """Whether a name that begins at i is a word of its own: the characters before it belong to another one."""
    first, kind = _kind(text[i]), _kind(text[i - 1]) if i else " "
    if first == "j":
        return not i or text[i - 1] not in _LEADING_VOWELS
    if first == "k" or kind not in _WORD:
        return kind != first or kind != "k"
    if first in "rb" and kind == first:
        prefix = re.split(r"\W", text[:i])[-1]
        return bool((_ARABIC if first == "r" else _HEBREW).fullmatch(prefix))
    return False


def _apart_after(text: str, i: int) -> bool:
    """Whether a name that ends before i is a word of its own: the characters from there on belong to another one."""
    last, kind = _kind(text[i - 1]), _kind(text[i]) if i < len(text) else " "
    if kind == "m":
        return False
    if last == "j":
        return text[i + 1 : i + 2] != "\u103a"
    if last == "k" or kind not in _WORD:
        return kind != last or kind != "k"
    if kind == "h" and last != "h":
        return True
    run = re.match(r"\w+", text[i:])
    return kind == "h" and bool(run and _PARTICLES.fullmatch(run[0]))


def _contains_symbols(text: str, answer: str) -> bool:
    """Whether a text contains an answer that is only punctuation, or that differs from a choice only in punctuation.

    The answer must not be part of a longer operator or word: == is not in ===, < is not in <=.
    """
    answer = spelled(answer)
    symbols = "".join({re.escape(c) for c in answer if not c.isalnum() and c not in " '\"()"})
    before = r"(?<!\w)" if answer[0].isalnum() else rf"(?<![{symbols}{_OPERATOR}!])"
    after = r"(?!\w)" if answer[-1].isalnum() else rf"(?![{symbols}{_OPERATOR}])"
    return re.search(before + re.escape(answer) + after, spelled(text)) is not None


def _begins(text: str, kinds: str, i: int) -> bool:
    """Whether a word begins at i: the text before does not belong to it."""
    if not i:
        return True
    first, kind, before, c = kinds[i], kinds[i - 1], kinds[i - 2] if i > 1 else " ", text[i - 1]
    if first == "j":
        return c not in _LEADING_VOWELS
    if first == "k":
        return kind != "k"
    if first not in _WORD:
        same = c == text[i] and unicodedata.category(c) != "So"
        return not same and not (first in "-." and kind in _WORD) and (c != "-" or before == "0")
    if kind in "rb" and first == kind:
        run = re.search(f"{kind}+$", kinds[:i])
        prefix = text[run.start() if run else i : i]
        outside = kinds[i - len(prefix) - 1 : i - len(prefix)]
        return outside not in tuple(_WORD) and bool((_ARABIC if kind == "r" else _HEBREW).fullmatch(prefix))
    if kind in _WORD or c == "&":
        return False
    if c == "'":
        return bool(_ELISION.fullmatch(re.split(r"[^\w]", text[: i - 1])[-1]))
    if first == "0":
        return c not in ".,:/√±^" and (c != "-" or before == "0")
    return c != "."


def _ends(text: str, kinds: str, start: int, i: int) -> bool:
    """Whether a word ends before i: the text from there on does not belong to it."""
    if i == len(text):
        return True
    last, kind, c, after = kinds[i - 1], kinds[i], text[i], kinds[i + 1 : i + 2] or " "
    if kind == "m":
        return False
    if last == "j":
        # A consonant with asat closes the syllable before it.
        return text[i + 1 : i + 2] != "\u103a"
    if last == "k":
        return kind != "k"
    if last not in _WORD:
        return c != text[i - 1] or unicodedata.category(c) == "So"
    if kind == "h":
        run = re.match("h+", kinds[i:])
        return last != "h" or bool(_PARTICLES.fullmatch(text[i : i + (run.end() if run else 0)]))
    if kind in _WORD or c == "&":
        return False
    if last == "0":
        return c not in ".,:/%‰^⁺⁻"
    if c == "'":
        single = i - start == 1 or kinds[i - 2] not in _WORD
        return re.match(r"'t\b", text[i:]) is None and (not single or re.match(r"'s\b", text[i:]) is not None)
    return not (c in "#-*" or (c == "+" and after not in _WORD))
