"""Rows of a csv file: those that a spreadsheet writes, whatever separates its columns, with line breaks inside of texts."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .lines import SteadyFile, find_starts
from .rows import Row
from .shown import printable, shown

SEPARATORS = ",;\t|"
BOM = "\ufeff"
CURE = "save it as UTF-8 (iconv -f latin1 -t utf-8)"
# Characters of a field. One whose closing quote is missing goes on to the end of the file.
LARGEST_FIELD = 10_000_000


class CsvFile(Sequence[Row]):
    """Rows of a csv file with a header, each parsed when it is asked for; of the file only the places of its rows are kept.

    The separator is the one of comma, semicolon, tab and bar that splits the header into the most columns. Every value is
    text; an empty one is null.

    Args:
        path (path): the file, UTF-8 with or without a byte order mark.

    Raises:
        InputError: if it cannot be read, has no row, or a quote is not closed; when a row is asked for, with file and line, if
            it has other columns than the header or is no UTF-8.
    """

    def __init__(self, path: str | os.PathLike):
        self._file, self._name = SteadyFile(path), printable(os.fspath(path))
        starts, _ = find_starts(self._file)
        self._bounds = np.append(starts, self._file.size)
        if self._file.read(0, 2) in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{self._name}: expected UTF-8 text, found UTF-16; save it as UTF-8")
        csv.field_size_limit(LARGEST_FIELD)
        self._separator, self._header = self._read_header()
        # Number, from 0, of the first line of each row, and of the line after the last one.
        self._lines = np.fromiter(self._find_rows(), np.int64)
        if len(self._lines) < 2:
            raise InputError(f"{self._name}: expected at least one row below the header, found none")

    def __len__(self) -> int:
        return len(self._lines) - 1

    def number(self, index: int) -> int:
        """What a row without an id is called by: its line, from 1."""
        return int(self._lines[index]) + 1

    def values(self, index: int, only: Any = None) -> Row:
        """A row; its pictures' paths are as they stand in the file."""
        first, end = int(self._lines[index]), int(self._lines[index + 1])
        place = f"{self._name}:{first + 1}"
        text = self._file.read(int(self._bounds[first]), int(self._bounds[end]), first + 1)
        try:
            lines = io.StringIO(text.decode("utf-8"), newline="")
        except UnicodeDecodeError as error:
            found = f"expected UTF-8 text, found the byte {text[error.start]:#x}"
            raise InputError(f"{place}: {found}; {CURE}") from None
        fields = next(csv.reader(lines, delimiter=self._separator, strict=True))
        if len(fields) != len(self._header):
            cure = f"a text that holds {self._separator!r} or a line break needs quotes around it"
            raise InputError(f"{place}: expected {len(self._header)} columns, found {len(fields)}; {cure}")
        return Row({name: value or None for name, value in zip(self._header, fields, strict=True)}, place)

    def __getitem__(self, index: Any) -> Any:
        return self.values(index)

    def _text(self, line: int) -> str:
        start, end = int(self._bounds[line]), int(self._bounds[line + 1])
        # Row by row it is read as UTF-8; here only quotes, separators and line ends matter.
        return self._file.read(start, end, line + 1).decode("utf-8", "surrogateescape")

    def _read_header(self) -> tuple[str, list[str]]:
        if len(self._bounds) < 2:
            raise InputError(f"{self._name}: expected a header and at least one row, found an empty file")
        line = self._text(0).removeprefix(BOM)
        headers = {separator: next(csv.reader([line], delimiter=separator), []) for separator in SEPARATORS}
        separator = max(SEPARATORS, key=lambda name: len(headers[name]))
        header = [name.strip() for name in headers[separator]]
        twice = next((name for number, name in enumerate(header) if name in header[:number]), None)
        if twice is not None:
            raise InputError(f"{self._name}:1: expected a name of its own for each column, found {shown(twice)} twice")
        return separator, header

    def _find_rows(self) -> Iterator[int]:
        count, line = len(self._bounds) - 1, 0
        reader = csv.reader((self._text(number) for number in range(count)), delimiter=self._separator, strict=True)
        try:
            for fields in reader:
                # Not the header, and no blank lines.
                if line and any(field.strip() for field in fields):
                    yield line
                line = reader.line_num
        except csv.Error as error:
            found = printable(str(error))
            if "unexpected end of data" in found:
                found = "a quote that is not closed"
            raise InputError(f"{self._name}:{line + 1}: expected rows of a csv file, found: {found}") from None
        yield count
