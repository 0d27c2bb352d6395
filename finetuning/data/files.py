"""Which files are opened at all."""

import os
import stat

from ..errors import InputError
from .shown import printable

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular_file(path: str | os.PathLike, expected: str) -> None:
    """Refuses what is no regular file, links followed: opening a FIFO waits for ever, a device may never end.

    Args:
        path (path): the file.
        expected (str): what it should be, such as "an image file".

    Raises:
        InputError: for a directory, a FIFO, a device or a socket, and for what is not there.
    """
    name = printable(os.fspath(path))
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(f"{name}: expected {expected}, found no such file") from None
    except ValueError:  # a null character or half a surrogate pair
        raise InputError(f"{name}: expected {expected}, found a path that no file can have") from None
    except OSError as error:
        raise InputError(f"{name}: expected {expected}, found: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{name}: expected {expected}, found {KINDS.get(stat.S_IFMT(mode), 'no regular file')}")
