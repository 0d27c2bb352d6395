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
AHEAD = 2**16  # bytes read at once while one part after another is asked for
NEWLINE, RETURN, BRACE = b"\n"[0], b"\r"[0], b"{"[0]


class SteadyFile:
    """A file that is read in parts and must stay what it was.

    It stays open: one that is replaced under its name stays what it was. It is read, not mapped into memory, so that
    what was read counts as nobody's memory, and a file that is cut short is an error instead of a dead process.

    Args:
        path (path): a regular file.

    Raises:
        InputError: if it cannot be opened; when a part is read, if the file has changed since.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._file: io.FileIO | None = self._open()
        self._state = _state_of(self._file)
        # Where the part ended that was asked for last; what was read for it: where that begins, and its bytes.
        self._next, self._block = -1, (0, b"")

    @property
    def size(self) -> int:
        """Bytes."""
        return self._state[0]

    def read(self, start: int, end: int, line: int | None = None) -> bytes:
        """The bytes from `start` to before `end`; `line`, from 1, is for the message."""
        begin, block = self._block
        if not begin <= start <= end <= begin + len(block):
            # Rows are checked in their order, trained in another one.
            count = max(end - start, AHEAD) if start == self._next else end - start
            begin, block = self._block = start, self._read(start, count, line)
        self._next = end
        return block[start - begin : end - begin]

    def _read(self, start: int, count: int, line: int | None) -> bytes:
        if self._file is None:
            self._file = self._open()
        if _state_of(self._file) != self._state:
            place = f":{line}" if line else ""
            raise InputError(
                f"{printable(self.path)}{place}: expected the file as it was at the start, found it changed; the same command "
                "goes on with the file as it was"
            )
        return os.pread(self._file.fileno(), count, start)

    def __getstate__(self) -> dict[str, Any]:
        # A process that does not share this one's open files opens the file itself.
        return {**vars(self), "_file": None, "_next": -1, "_block": (0, b"")}

    def _open(self) -> io.FileIO:
        check_regular_file(self.path, "a file with rows")
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as error:
            found = f"expected a file with rows, found: {error.strerror}"
            raise InputError(f"{printable(self.path)}: {found}") from None


class Lines(Sequence[tuple[int, str]]):
    """(Number from 1, text) of each line of a file that is not blank; bytes that are no UTF-8 become surrogates.

    Args:
        path (path): see `SteadyFile`.
    """

    def __init__(self, path: str | os.PathLike):
        self._file = SteadyFile(path)
        starts, first = find_starts(self._file)
        # Where each line begins, and the end of the file.
        self._bounds = np.append(starts, self._file.size)
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

    def _text(self, line: int) -> str:
        start, end = int(self._bounds[line]), int(self._bounds[line + 1])
        return self._file.read(start, end, line + 1).decode("utf-8", "surrogateescape")


def _state_of(file: io.FileIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def find_starts(file: SteadyFile) -> tuple[np.ndarray, np.ndarray]:
    """Where each line begins and its first byte; lines end as in Python's text files, with "\\n", "\\r\\n" or "\\r"."""
    starts, first = [np.zeros(0, np.int64)], [np.zeros(0, np.uint8)]
    position, ended = 0, True
    while block := file.read(position, position + BLOCK):
        while block.endswith(b"\r") and (more := file.read(position + len(block), position + len(block) + 1)):
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
