"""A file of JSON lines that is appended to while a command runs, and read when it is started again."""

import fcntl
from contextlib import suppress
from pathlib import Path

from ..errors import InputError


def open_to_append(path: Path, flag: str):
    """The file, opened to append bytes, and locked until it is closed.

    Args:
        path (Path): its folder is created.
        flag (str): what the user named it by, for messages.

    Raises:
        InputError: if it cannot be written, or another process writes into it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115, the caller closes it
    except OSError as error:
        raise InputError(f"{flag} {path}: expected a file to write to, found: {error.strerror}") from None
    with suppress(OSError):
        # As for output folders; a file system that cannot lock is no reason to stop.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"{flag} {path}: expected no other process writing to it, found one; choose another"
            ) from None
    return file
