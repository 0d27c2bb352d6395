"""Rows of a json file that holds a list, each parsed when it is asked for: of the file only the places of its rows are kept."""

import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import InputError
from .jsonl import parse_object
from .lines import SteadyFile
from .rows import Row
from .shown import printable, shown

BLOCK = 2**22  # bytes that are read at once; a row that is longer is read whole
GAP = re.compile(r"[\s,]*")


class JsonListFile(Sequence[Row]):
    """Rows of a json file that holds a list of objects.

    Args:
        path (path): the file, UTF-8.

    Raises:
        InputError: if it cannot be read, is no list, has no row or a broken one; when a row is asked for, if it is no UTF-8.
    """

    def __init__(self, path: str | os.PathLike):
        self._file, self._name = SteadyFile(path), printable(os.fspath(path))
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
        for start, end, line in _find_objects(self._file, self._name):
            self._starts.append(start)
            self._ends.append(end)
            self._lines.append(line)
        if not len(self._starts):
            raise InputError(f"{self._name}: expected at least one row, found none")
        # In a list that is written on one line only a number tells rows apart.
        self._on_lines = len(self._lines) == 1 or self._lines[-1] > self._lines[0]

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, index: int) -> int:
        """What a row without an id is called by: its number, from 1."""
        return index + 1

    def values(self, index: int, only: Any = None) -> Row:
        """A row; its pictures' paths are as they stand in the file."""
        line = self._lines[index]
        place = f"{self._name}:{line}" if self._on_lines else f"{self._name}, row {index + 1}"
        text = self._file.read(self._starts[index], self._ends[index], line).decode("utf-8", "surrogateescape")
        row = parse_object(text)
        if isinstance(row, InputError):
            raise InputError(f"{place}: {row}")
        return Row(row, place)

    def __getitem__(self, index: Any) -> Any:
        return self.values(index)


def _find_objects(file: SteadyFile, name: str) -> Iterator[tuple[int, int, int]]:
    """Where each object of the list begins and ends, in bytes, and its line from 1.

    A byte is read as a character (Latin-1): what JSON is made of is ASCII.
    """
    text, offset, line = file.read(0, BLOCK).decode("latin-1"), 0, 1
    position = 3 if text.startswith("\xef\xbb\xbf") else 0
    opening = re.compile(r"\s*\[").match(text, position)
    if not opening:
        found = shown(text[position : position + 40].strip())
        raise InputError(f"{name}: expected a list of rows, found {found}; move other files away")
    line, position, decoder = 1 + text.count("\n", 0, opening.end()), opening.end(), json.JSONDecoder()
    while True:
        gap = GAP.match(text, position)
        end = gap.end() if gap else position
        line, position = line + text.count("\n", position, end), end
        whole = offset + len(text) >= file.size
        if text[position : position + 1] == "]":
            return
        try:
            row, end = decoder.raw_decode(text, position)
            # A number at the end of what was read may go on.
            if not isinstance(row, dict) and (whole or end < len(text)):
                raise InputError(f"{name}:{line}: expected a JSON object, found {shown(row)}")
        except (ValueError, RecursionError) as error:
            if whole:
                raise InputError(
                    f"{name}:{line}: expected a JSON object, found {_reason(error, text, position)}"
                ) from None
            row = None
        if not isinstance(row, dict):
            more = file.read(offset + len(text), offset + len(text) + max(BLOCK, len(text) - position))
            text, offset, position = text[position:] + more.decode("latin-1"), offset + position, 0
            continue
        yield offset + position, offset + end, line
        line, position = line + text.count("\n", position, end), end


def _reason(error: Exception, text: str, start: int) -> str:
    if not isinstance(error, json.JSONDecodeError):  # a number of thousands of digits, too deep nesting
        return f": {printable(str(error))}"
    if not text[start:].strip():
        return "the end of the file before that of the list"
    lines = error.doc.count("\n", start, error.pos)
    return f"{error.msg} {f'{lines} line(s) further down' if lines else f'at column {error.colno}'}"
