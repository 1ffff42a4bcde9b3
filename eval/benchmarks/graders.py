"""Graders of numeric answers: from a text to a number, or to no answer.

``paper`` is the rule of the published GSM8K program, defects and all, to compare with published figures.
``normalised`` reads a stated answer as a person would; its figure is the headline. ``last_number``
takes the last number of an answer that states none.
"""

import re
import unicodedata
from fractions import Fraction

# The longest number that anybody means; a model that repeats a digit writes longer ones.
_MOST_DIGITS = 60

_PAPER = re.compile(r"####\s*(\d+)")
# The model has gone on to a question of its own: what follows answers that one.
_NEXT_QUESTION = re.compile(r"\n\s*(?:Q|Question)\s*:")
_FINAL = re.compile(r"####\s*([^\n]*)")
_BOXED = re.compile(r"\\f?boxed\s*\{([^{}]*)\}")
# Up to the end of the sentence; "Rs. 5" does not end one.
_ANSWER_IS = re.compile(
    r"\banswer\s*(?:is\b|:|=)[\s:]*(.*?)(?=\n|[.!?](?:\s+[^\s\d]|\s*$)|$)", re.IGNORECASE | re.DOTALL
)

_PLAIN = re.compile(r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)?(?:\.\d+)?")
_CURRENCY = r"(?:(?:(?<![A-Za-z])(?:US|CA|AU))?[$€£¥₹]|(?<![A-Za-z])(?:USD|EUR|GBP|Rs\.?))\s*"
_NUMBER = re.compile(
    rf"""
    (?:(?P<first>^\s*-\s*) | (?P<sign>(?<![\w)\]])-) | \b(?P<word>minus|negative)\s+)?
    (?:(?:{_CURRENCY}){{1,3}}(?P<inner>-\s*)? | (?<![A-Za-z_\d.]))
    (?P<body>\.?\d+(?:(?:[.,:]|\s*/\s*)\d+)*)
    (?:\s+(?:and\s+)?(?P<part>\d+\s*/\s*\d+)(?![\d/]|[.,]\d))?
    (?: [eE](?P<e>[+-]?\d{{1,2}})(?!\w|\.\d)
      | \s*[x×*]\s*10\s*\^\s*(?P<ten>-?\d{{1,2}})(?!\d)
      | \s*\^\s*(?P<power>-?\d{{1,2}})(?!\d) )?
    (?:\s*-?(?P<scale>hundred|thousand|million|billion|trillion)\b | (?P<k>k)(?![A-Za-z\d]))?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# What follows a number that is a piece of an expression, a range or an unread power.
_GOES_ON = re.compile(rf"\s*(?:\^|(?:[-+×÷*]|\*\*)\s*(?:{_CURRENCY})?\d|x\s+\d)")
# What follows the first number of an equation; prose that comes to an equation later is none.
_LEFT_SIDE = re.compile(
    r"\s*%?\s+of\s+[$]?\d[\d.,/]*\s*=|[A-Za-z]{0,2}(?:\s+[A-Za-z]+){0,2}\s*(?:[-+×÷*/^=]|x\s+\d)"
)

# Typography and LaTeX to plain text, in this order.
_TIDY: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        ("[−‐‑‒–]", "-"),
        (r"\\!", ""),
        (r"(?<=\d)(?:\{,\}|\\,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ","),
        (r"\\[,;: ()\[\]]|[\u00a0\u2009\u202f~]", " "),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1"),
        (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2 "),
        (r"\\left|\\right|(?<!\d)\*\*|\*\*(?!\d)|__|`", ""),
        (r"\\(?:times|cdot)", "×"),
        (r"\\([$%])", r"\1"),
        (r"\^\{\s*(-?\d+)\s*\}", r"^\1"),
    )
)
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_RAISED = re.compile("⁻?[⁰¹²³⁴-⁹]+")


def paper_number(text: str) -> int:
    """The digits right after the first ``####``, and 0 where there are none.

    So ``1,600`` is 1, ``-10`` and a missing answer are 0. It is applied to the reference too.

    Source: the GSM8K program released with LoRA-GA.
    """
    found = _PAPER.search(text)
    try:
        return int(found.group(1)) if found else 0
    except ValueError:  # more digits than int() takes
        return 0


def normalised_number(text: str) -> Fraction | None:
    r"""The number that a text states as its answer, exactly; None where it states none.

    Read up to where the model asks itself another question: the first line after ``####`` that begins
    with a number; else the last ``\boxed{}``; else the last "answer is" or "answer:". Understood are
    thousands separators, signs, decimals, fractions, mixed numbers, powers of ten, "2 million", currency
    and LaTeX. Units are ignored, and the percent sign is one. A list or a range, a clock time, ``10,00``
    or an expression without its result is no answer.
    """
    answer = _tidy(_NEXT_QUESTION.split(text, maxsplit=1)[0])
    for final in _FINAL.finditer(answer):
        number = _stated(final.group(1), must_begin=True)
        if number is not None:
            return number
    for pattern in (_BOXED, _ANSWER_IS):
        stated = pattern.findall(answer)
        if stated:
            return _stated(stated[-1])
    return None


def last_number(text: str) -> Fraction | None:
    """The last number of an answer, whether it is stated as its result or not; None where there is none."""
    answer = _tidy(_NEXT_QUESTION.split(text, maxsplit=1)[0])
    for match in reversed(list(_NUMBER.finditer(answer))):
        number = _value(match)
        if number is not None:
            return number
    return None


def _tidy(text: str) -> str:
    for pattern, plain in _TIDY:
        text = pattern.sub(plain, text)
    text = _VULGAR.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0]).replace('⁄', '/')} ", text)
    return _RAISED.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]).replace("−", "-"), text)


def _stated(statement: str, must_begin: bool = False) -> Fraction | None:
    """The first number of a statement; of an equation, of its last side that is a number.

    ``must_begin``: only signs may stand before it, so that a heading (``#### Step 1``) is no answer.
    """
    statement = re.sub(r"\([^()]*=[^()]*\)", " ", statement)  # an aside
    match = _NUMBER.search(statement)
    if match is None:
        return None
    before = statement[: match.start()].rpartition("=")[2]
    if must_begin and re.search(r"[^\W\d_]", before):
        return None
    is_equation = "=" in statement and _LEFT_SIDE.match(statement, match.end())
    for side in reversed(statement.split("=")) if is_equation else [statement]:
        match = _NUMBER.search(side)
        if match is not None and not _GOES_ON.match(side, match.end()):
            return _value(match)
    return None


def _value(match: re.Match[str]) -> Fraction | None:
    number = _quotient(match["body"])
    if number is None:
        return None
    if match["part"]:
        part = _quotient(match["part"])
        if part is None or number.denominator != 1 or "/" in match["body"]:
            return None
        number += part
    if match["power"]:
        number = None if number == 0 else number ** int(match["power"])
    if number is None:
        return None
    number *= Fraction(10) ** int(match["e"] or match["ten"] or 0)
    number *= _SCALES[match["scale"].lower()] if match["scale"] else 1000 if match["k"] else 1
    if max(abs(number.numerator), number.denominator) > 10**_MOST_DIGITS:
        return None
    is_negative = any(match[name] for name in ("first", "sign", "word", "inner"))
    return -number if is_negative else number


def _quotient(body: str) -> Fraction | None:
    """A number or a fraction of two; None for a clock time, a list, a date or odd separators."""
    sides = [side.strip() for side in body.split("/")]
    if len(sides) > 2 or any(len(side) > _MOST_DIGITS or not _PLAIN.fullmatch(side) for side in sides):
        return None
    numbers = [Fraction(side.replace(",", "")) for side in sides]
    if len(numbers) == 1:
        return numbers[0]
    return numbers[0] / numbers[1] if numbers[1] else None
