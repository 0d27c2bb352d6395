"""Rows dealt into parts, so that a model trained without a part can judge it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InputError
from .conversation import Conversation
from .fingerprint import digest, identify_picture


def deal_rows(rows: Sequence, to_conversation: Callable[[Any], Conversation], parts: int) -> list[tuple[str, int]]:
    """The id of each row and its part, from 0; always the same for the same rows. A row that cannot be used is ("", -1).

    Rows with the same first picture are in one part: whoever has learned from a page has seen it. Parts are as equal as that
    allows.

    Args:
        rows (Sequence): rows of a data set.
        to_conversation (Callable): row -> Conversation, the task's own.
        parts (int): at least 2.
    """
    together: dict[bytes, list[int]] = defaultdict(list)
    found = [("", -1)] * len(rows)
    for number in range(len(rows)):
        try:
            conversation = to_conversation(rows[number])
            # Without the path: a folder that was moved is dealt as before.
            shown = identify_picture(conversation.images[0])[1:] if conversation.images else conversation.turns[0].user
        except InputError:  # told where all rows are checked
            continue
        found[number] = conversation.id, -1
        together[digest(shown)].append(number)
    sizes = [0] * parts
    # The largest groups first, those of one size in an order that follows from their pictures.
    for _, numbers in sorted(together.items(), key=lambda item: (-len(item[1]), item[0])):
        part = sizes.index(min(sizes))
        sizes[part] += len(numbers)
        for number in numbers:
            found[number] = found[number][0], part
    return found
