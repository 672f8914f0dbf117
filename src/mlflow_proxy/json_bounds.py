"""What a caller's JSON would cost to parse, judged before it is: a parser holds the interpreter, in a thread too.

Only what takes more than its size: many small values, each an object of the interpreter, and numbers of many digits,
whose conversion takes the square of their length.
"""

from __future__ import annotations

from typing import Literal

# Larger bodies are hashed and parsed in a thread, lest all other requests wait for it.
LARGEST_ON_LOOP = 64 * 1024
# Values in JSON; 25,000 of the most expensive ones take about 6 MB and some milliseconds.
MOST_ELEMENTS = 25_000
_MOST_DIGITS = 256
_LONG_NUMBER = b"0" * (_MOST_DIGITS + 1)
_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)

Excess = Literal["too-many-elements", "too-large"]


def elements(text: bytes | str) -> int:
    """How many values JSON has at the most, in any encoding: what stands in its texts counts, too."""
    if isinstance(text, str):
        return text.count(",") + text.count("[") + text.count("{")
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def excess(text: bytes | str, room: int = MOST_ELEMENTS) -> Excess | None:
    """What JSON has too much of: more than `room` values, or a number of more than 256 digits; None if neither.

    Short texts are not looked at, since they cannot have many of either.
    """
    if len(text) <= room:
        return None
    if elements(text) > room:
        return "too-many-elements"
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    # UTF-16 and UTF-32 have NUL between the digits.
    return "too-large" if _LONG_NUMBER in data.translate(_DIGITS_AS_ZEROS, b"\0") else None
