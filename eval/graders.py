"""Graders: from a generated answer to right, wrong, or no answer."""

import re
from decimal import Decimal, InvalidOperation

_FINAL = re.compile(r"####([^\n]*)")
_NUMBER = re.compile(r"-?\$?\s*-?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def gsm8k_answer(text: str) -> Decimal | None:
    """The number after the first ``####``, or None where there is no answer.

    Thousands separators, a sign, decimals, a currency sign and units are understood, so that
    ``1,600`` is 1600, ``-10`` is -10 and ``$2.50 each`` is 2.5.
    """
    final = _FINAL.search(text)
    number = _NUMBER.search(final.group(1)) if final else None
    if number is None:
        return None
    try:
        return Decimal(re.sub(r"[,$\s]", "", number.group()))
    except InvalidOperation:
        return None
