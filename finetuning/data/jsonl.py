"""Rows of a jsonl file, or of a json file that holds a list."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import check_regular_file
from .lines import Lines
from .rows import Row, resolve_images
from .schemas import sample_name
from .shown import printable, shown


class JsonlFile(Sequence[Row]):
    """Rows of a jsonl file, each parsed when it is asked for; of the file only the places of its lines are kept.

    Args:
        path (path): the file.

    Raises:
        InputError: if it cannot be read or has no row; when a row is asked for, with file, line and field.
    """

    def __init__(self, path: str | os.PathLike):
        self._lines, self._name, self._folder = Lines(path), printable(os.fspath(path)), os.path.dirname(path)
        if not len(self._lines):
            raise InputError(f"{self._name}: expected at least one row, found none")

    def __len__(self) -> int:
        return len(self._lines)

    def number(self, index: int) -> int:
        """What a row without an id is called by: its line, from 1."""
        return self._lines[index][0]

    def values(self, index: int, only: Any = None) -> Row:
        """A row whose pictures' paths are as they stand in the file."""
        return Row(*self._read(index))

    def __getitem__(self, index: Any) -> Any:
        row, place = self._read(index)
        try:
            return Row(resolve_images(row, self._folder), place)
        except InputError as error:
            raise InputError(f"{place}: {sample_name(row)}{error}") from None

    def _read(self, index: int) -> tuple[dict[str, Any], str]:
        number, line = self._lines[index]
        row, place = parse_object(line), f"{self._name}:{number}"
        if isinstance(row, InputError):
            raise InputError(f"{place}: {row}")
        return row, place


def read_jsonl(path: str | os.PathLike) -> list[Row]:
    """All rows of a jsonl file, see `JsonlFile`."""
    return list(JsonlFile(path))


def iterate_rows(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Line, from 1, and row of each line of a jsonl file, or of each object of the list that a json file holds.

    In place of a row that cannot be read stands its InputError, so that a checker can go on; empty lines are skipped. In a
    json list nothing can be read after a broken row.

    Args:
        path (path): the file; a name that ends with .json stands for a list.

    Raises:
        InputError: with the file, if it cannot be read.
    """
    if Path(path).suffix != ".json":
        yield from ((number, parse_object(line)) for number, line in Lines(path))
        return
    check_regular_file(path, "a file with rows")
    try:
        yield from _parse_list(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError as error:
        raise InputError(f"{printable(os.fspath(path))}: expected a file with rows, found: {error.strerror}") from None


def parse_object(line: str) -> dict[str, Any] | InputError:
    """The object that a text holds, or what is wrong with it; bytes that are no UTF-8 stand in it as surrogates."""
    try:
        if not line.isascii():
            line.encode()
    except UnicodeEncodeError as error:
        return InputError(f"expected UTF-8 text, found the byte {ord(line[error.start]) - 0xDC00:#x}")
    return _parse(line, None)[0]


def _parse_list(text: str) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    gap, line, start = re.compile(r"[\s,]*"), 1, 0
    opening = re.match(r"\s*\[", text)
    if not opening:
        yield 1, InputError(f"expected a list of rows, found {shown(text[:40].strip())}; move other files away")
        return
    position = opening.end()
    while True:
        position = _end_of(gap, text, position)
        line, start = line + text.count("\n", start, position), position
        if text[position : position + 1] == "]":
            return
        row, end = _parse(text, position)
        yield line, row
        if end is None:
            return
        position = end


def _end_of(pattern: re.Pattern, text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _parse(text: str, start: int | None) -> tuple[dict[str, Any] | InputError, int | None]:
    """The object that is the whole text or begins at `start`, and where it ends, which broken JSON does not tell."""
    end = len(text)
    try:
        if start is None:
            row = json.loads(text)
        else:
            row, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        return InputError(f"expected a JSON object, found {error.msg} at column {error.colno}"), None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, too deep nesting
        return InputError(f"expected a JSON object, found: {printable(str(error))}"), None
    if not isinstance(row, dict):
        return InputError(f"expected a JSON object, found {shown(row)}"), end
    return row, end
