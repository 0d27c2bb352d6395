"""Values and texts as error messages show them: on one line, short, and harmless to a terminal."""

import math
import reprlib
from typing import Any


def printable(text: str, limit: int = 200) -> str:
    """A text on one line: characters that a terminal would act on are escaped, a long text loses its middle.

    Args:
        text (str): an id, a path, a message of a library: anything that others have written.
        limit (int): longest text that stays whole, in characters.
    """
    return _shorten(escape(_shorten(text, limit)), limit)


def escape(text: str) -> str:
    """A text whole, with the characters escaped that a terminal would act on, line breaks too."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def shown(value: Any, limit: int = 80) -> str:
    """A value as it is named after "found": JSON's words for null, true and NaN, its kind before a list or an object.

    Args:
        value (Any): anything that a row or a user's own function may give.
        limit (int): longest text or representation that stays whole, in characters.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, str):
        return _shorten(repr(_shorten(value, limit)), 2 * limit)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value)} bytes"
    if isinstance(value, list | dict) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    kind = "a list " if isinstance(value, list) else "an object " if isinstance(value, dict) else ""
    try:
        # Bounded in depth and width: the representation of a whole row can be megabytes.
        return kind + printable(reprlib.repr(value), limit)
    except ValueError:  # a whole number of thousands of digits
        return f"{kind}{type(value).__name__}"


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    # The end of a path says more than its middle.
    return f"{text[: limit // 2]}...{text[-(limit // 2 - 3) :]}"
