"""Rows that are held back where data have no test split: a share of them, so that no picture is on both sides."""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from ..errors import InputError
from .clips import Frame
from .fingerprint import digest
from .known_forms import known_conversation
from .rows import Row

# Of a picture's file at its begin, middle and end, in bytes: a whole folder need not be read.
SAMPLED_BYTES = 16384


def draw_rows(rows: Sequence[Row], share: float, ranks: tuple[int, int] = (0, 1)) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to train on and to answer; the same rows give the same draw, whatever their order.

    Rows that show a picture in common are together on one side, and rows without pictures that ask the same. Groups of such
    rows are drawn by a hash of their pictures' content, those larger than the share are trained.

    Args:
        rows (Sequence): as `OwnRows` gives them; one that cannot be read stands for itself.
        share (float): of the rows, 0 to below 1.
        ranks (tuple): this rank and how many there are that call this together: each opens the pictures of a share.

    Raises:
        InputError: if all rows belong together.
    """
    numbers = np.arange(len(rows))
    if not share:
        return numbers, numbers[:0]
    mine = range(len(rows) * ranks[0] // ranks[1], len(rows) * (ranks[0] + 1) // ranks[1])
    pairs = np.array([(number, key) for number in mine for key in _keys(rows, number)], np.uint64).reshape(-1, 2)
    pairs = np.concatenate(gather_object([pairs]) if ranks[1] > 1 else [pairs])
    group, values = _groups(pairs[:, 0].astype(np.int64), pairs[:, 1], len(rows))
    sizes = np.bincount(group)
    if len(sizes) < 2:
        raise InputError(
            f"expected rows that can be held back, found that all {len(rows)} belong together: they show the same pictures, or ask "
            "the same without one; add a test file, or --eval_share 0 answers none"
        )
    drawn = (values < share) & (sizes <= max(1, share * len(rows)))
    if not drawn.any():
        smallest = np.flatnonzero(sizes == sizes.min())
        drawn[smallest[values[smallest].argmin()]] = True
    if drawn.all():
        drawn[values.argmax()] = False
    return numbers[~drawn[group]], numbers[drawn[group]]


def _groups(row: np.ndarray, key: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The group of each row, and of each group a value from 0 to below 1, evenly spread, that follows from its keys.

    Args:
        row, key (np.ndarray): int64 and uint64, number of a row and something that it shows, once for each.
        count (int): rows.
    """
    keys, place = np.unique(key, return_inverse=True)
    size = count + len(keys)
    _, label = connected_components(
        coo_array((np.ones(len(row), bool), (row, count + place)), shape=(size, size)), False
    )
    least = np.full(label.max() + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, label[count:], keys)
    # The least of many keys is small: without another hash, large groups would be drawn first.
    values = np.array([xxh3_64_intdigest(value.tobytes()) / 2**64 for value in least])
    return label[:count], values


def _keys(rows: Sequence[Row], number: int) -> Iterator[int]:
    """What a row shows: the content of its pictures, without any its questions."""
    try:
        conversation = known_conversation(rows[number])
    except InputError:  # told when all rows are checked
        yield xxh3_64_intdigest(f"row {number}".encode())
        return
    for source in conversation.images:
        source = source.path if isinstance(source, Frame) else source
        yield _content(source) if isinstance(source, str) else _content_of_bytes(source)
    if not conversation.images:
        yield int.from_bytes(digest([turn.user for turn in conversation.turns]))


def _content_of_bytes(source: Any) -> int:
    return xxh3_64_intdigest(source["bytes"])


@lru_cache(maxsize=100_000)
def _content(path: str) -> int:
    """A hash of a file's size and of samples of its content; of its name where it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found: list[int | str] = [size]
            for start in (0, size // 2, max(0, size - SAMPLED_BYTES)):
                file.seek(start)
                found.append(xxh3_64_intdigest(file.read(SAMPLED_BYTES)))
    except OSError:
        found = [path]
    return int.from_bytes(xxh3_64_digest(repr(found).encode()))
