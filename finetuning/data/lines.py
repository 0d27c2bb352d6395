"""Lines of a text file, each read when it is asked for: what is kept of a file is where its lines begin, 8 bytes a line."""

import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .files import check_regular_file
from .shown import printable

BLOCK = 2**22  # bytes read at once while lines are counted
AHEAD = 2**16  # bytes read at once while one line after another is asked for
NEWLINE, RETURN, BRACE = b"\n"[0], b"\r"[0], b"{"[0]


class Lines(Sequence[tuple[int, str]]):
    """(Number from 1, text) of each line of a file that is not blank; bytes that are no UTF-8 become surrogates.

    The file stays open: one that is replaced under its name stays what it was. It is read, not mapped into memory, so that
    what was read counts as nobody's memory, and a file that is cut short is an error instead of a dead process.

    Args:
        path (path): a regular file.

    Raises:
        InputError: if it cannot be opened; when a line is read, if the file has changed since.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._file: io.FileIO | None = self._open()
        # The line that was asked for last, and what was read for it: where that begins, and its bytes.
        self._last, self._block = -1, (0, b"")
        self._state = _state_of(self._file)
        starts, first = _find_starts(self._file)
        # Where each line begins, and the end of the file.
        self._bounds = np.append(starts, self._state[0])
        # Few lines begin with anything but a brace; each of those is looked at.
        blank = [line for line in np.flatnonzero(first != BRACE).tolist() if not self._text(line).strip()]
        self._kept = np.delete(np.arange(len(starts)), blank) if blank else None

    def __len__(self) -> int:
        return len(self._bounds) - 1 if self._kept is None else len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        line = index if self._kept is None else int(self._kept[index])
        return line + 1, self._text(line)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        # A process that does not share this one's open files opens the file itself.
        return {**vars(self), "_file": None, "_last": -1, "_block": (0, b"")}

    def _text(self, line: int) -> str:
        start, end = int(self._bounds[line]), int(self._bounds[line + 1])
        begin, block = self._block
        if not begin <= start <= end <= begin + len(block):
            # Rows are checked in their order, trained in another one.
            ahead = AHEAD if line == self._last + 1 else 0
            begin, block = self._block = start, self._bytes(line, start, max(end - start, ahead))
        self._last = line
        return block[start - begin : end - begin].decode("utf-8", "surrogateescape")

    def _bytes(self, line: int, start: int, count: int) -> bytes:
        if self._file is None:
            self._file = self._open()
        if _state_of(self._file) != self._state:
            raise InputError(
                f"{printable(self.path)}:{line + 1}: expected the file as it was at the start, found it changed; the same command "
                "goes on with the file as it was"
            )
        return os.pread(self._file.fileno(), count, start)

    def _open(self) -> io.FileIO:
        check_regular_file(self.path, "a file with rows")
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as error:
            found = f"expected a file with rows, found: {error.strerror}"
            raise InputError(f"{printable(self.path)}: {found}") from None


def _state_of(file: io.FileIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _find_starts(file: io.FileIO) -> tuple[np.ndarray, np.ndarray]:
    """Where each line begins and its first byte; lines end as in Python's text files, with "\\n", "\\r\\n" or "\\r"."""
    starts, first = [np.zeros(0, np.int64)], [np.zeros(0, np.uint8)]
    position, ended = 0, True
    while block := os.pread(file.fileno(), BLOCK, position):
        while block.endswith(b"\r") and (more := os.pread(file.fileno(), 1, position + len(block))):
            block += more
        codes = np.frombuffer(block, np.uint8)
        ends = codes == NEWLINE
        if b"\r" in block:
            returns = codes == RETURN
            returns[:-1] &= ~ends[1:]
            ends |= returns
        begins = np.flatnonzero(np.concatenate(([ended], ends[:-1])))
        starts.append(begins + position)
        first.append(codes[begins])
        position, ended = position + len(block), bool(ends[-1])
    return np.concatenate(starts), np.concatenate(first)
