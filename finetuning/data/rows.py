"""Rows, each with the place where it stands and whole paths of its pictures; and rows of several files as one sequence."""

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from ..errors import InputError
from .shown import printable, shown


class Row(dict):
    """A row of a file.

    Args:
        values (Mapping): its fields.
        where (str): file and line, from 1, such as "data/train.jsonl:17".
        source (str): name of the place that it comes from, where there are several, see `Conversation.source`.
    """

    __slots__ = ("source", "where")

    def __init__(self, values: Mapping[str, Any], where: str, source: str = ""):
        super().__init__(values)
        self.where, self.source = where, source

    def __reduce__(self):
        return Row, (dict(self), self.where, self.source)


def where(row: Any, index: int) -> str:
    """Where a row stands, for messages: "train.jsonl:17" where it was read from a file, or else "row 17".

    Args:
        row: a row of any kind.
        index (int): its number in the split, from 0; the message counts from 1, as lines do.
    """
    return getattr(row, "where", None) or f"row {index + 1}"


class Rows(Sequence):
    """Some or all rows of several sources, one after another.

    Args:
        sources (Sequence[Sequence]): files of rows, each of which gives a row by its number.
        numbers (np.ndarray, optional): int, which rows, counted from 0 over all sources together; by default all.
    """

    def __init__(self, sources: Sequence[Sequence], numbers: np.ndarray | None = None):
        self.sources = sources
        self._ends = list(accumulate(map(len, sources)))
        self._numbers = np.arange(sum(map(len, sources))) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        """A row, or the rows of a slice."""
        if isinstance(index, slice):
            return Rows(self.sources, self._numbers[index])
        source, number = self._place(index)
        return source[number]

    def values(self, index: int, only: Sequence[str] | None = None) -> Row:
        """A row whose pictures' paths are as they stand in its file; of some files `only` these columns are read."""
        source, number = self._place(index)
        return source.values(number, only)

    def _place(self, index: int) -> tuple[Any, int]:
        number = int(self._numbers[index])
        source = bisect_right(self._ends, number)
        return self.sources[source], number - (self._ends[source - 1] if source else 0)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def select(self, numbers: Sequence[int] | np.ndarray) -> "Rows":
        """The rows with these numbers, as `datasets.Dataset.select`."""
        return Rows(self.sources, self._numbers[np.asarray(numbers, dtype=np.int64)])


def resolve_images(row: Mapping[str, Any], folder: str | os.PathLike) -> dict[str, Any]:
    """The row with the image paths in its fields image, img, images and conversations made whole.

    Paths are relative to the folder of the jsonl file, in `conversations` (the converted form) to its folder images/. A null
    stays what it is: the row's model refuses it where an image belongs.

    Raises:
        InputError: with the field, if one is no path or leaves the folder.
    """
    row, base = dict(row), os.fspath(folder)
    for key in ("image", "img", "images"):
        if row.get(key) is not None:
            row[key] = _resolve(base, row[key], key)
    turns = row.get("conversations")
    if isinstance(turns, list):
        base, row["conversations"] = os.path.join(base, "images"), list(turns)
        for index, turn in enumerate(turns):
            if isinstance(turn, dict) and turn.get("images") is not None:
                field = f"conversations[{index}].images"
                row["conversations"][index] = {**turn, "images": _resolve(base, turn["images"], field)}
    return row


def _resolve(folder: str, value: Any, field: str) -> Any:
    if isinstance(value, list):
        return [_inside(folder, path, f"{field}[{index}]") for index, path in enumerate(value)]
    return _inside(folder, value, field)


def _inside(folder: str, path: Any, field: str) -> Any:
    if isinstance(path, dict) and isinstance(path.get("bytes"), bytes):  # of a Parquet file: JSON holds no bytes
        return path
    if not isinstance(path, str) or not path:
        raise InputError(f"{field}: expected an image path, found {shown(path)}")
    whole = os.path.normpath(os.path.join(folder, path))
    try:
        inside = _real_file(whole).startswith(_real_beginning(folder))
    except ValueError:  # a null character or half a surrogate pair
        inside = False
    if not inside:
        raise InputError(f"{field}: expected an image path inside {printable(folder)}, found {shown(path)}")
    return whole


def _real_file(path: str) -> str:
    """`os.path.realpath`, for many files of a few folders."""
    try:
        if stat.S_ISLNK(os.lstat(path).st_mode):
            return os.path.realpath(path)
    except OSError:  # not there: another check says so
        pass
    folder, slash, name = path.rpartition("/")
    return _real_beginning(folder + slash) + name


@lru_cache(maxsize=10_000)
def _real_beginning(folder: str) -> str:
    """How the real paths of the files in a folder begin."""
    return os.path.join(os.path.realpath(folder), "")
