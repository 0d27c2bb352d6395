"""Files that somebody has put into the page: which ones are taken, and what a model is shown of them."""

import os
from collections.abc import Sequence
from typing import Any

from ..data.clips import Frame, clip_frames
from ..data.images import image_size, load_image
from ..data.shown import printable
from ..errors import InputError
from .unlabelled import ENDINGS

CLIP_ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
# By their first bytes: a decoder that guesses also takes playlists, which name other files and servers.
CONTAINERS = ((0, b"\x1a\x45\xdf\xa3"), (4, b"ftyp"), (8, b"AVI "))
NUM_FRAMES = 8  # of a clip, as the UCF-101 recipe takes them
MOST_FILES = 16  # of a question


def shown_pictures(files: Sequence[str]) -> list[Any]:
    """What a model is shown of uploaded files: pictures as they are, of a clip evenly spread frames.

    Args:
        files (Sequence[str]): paths; messages name a file by its last part alone.

    Raises:
        InputError: for too many files, or one that cannot be read to its end.
    """
    if len(files) > MOST_FILES:
        raise InputError(f"expected at most {MOST_FILES} files with a question, found {len(files)}")
    found: list[Any] = []
    for path in files:
        try:
            if path.lower().endswith(CLIP_ENDINGS):
                found += _frames(path)
            else:
                load_image(path)
                found.append(path)
        except InputError as error:
            raise InputError(without_folders(str(error), files)) from None
    return found


def first_pictures(pictures: Sequence[Any]) -> list[Any]:
    """One for each file, to show beside the question: of a clip the first frame."""
    return [picture for picture in pictures if not isinstance(picture, Frame) or picture.number == 0]


def without_folders(text: str, files: Sequence[str]) -> str:
    """A message that names uploaded files as the user knows them."""
    for path in files:
        text = text.replace(printable(path), printable(os.path.basename(path)))
    return text


def _frames(path: str) -> list[Frame]:
    with open(path, "rb") as file:
        head = file.read(16)
    if not any(head[start:].startswith(magic) for start, magic in CONTAINERS):
        raise InputError(f"{printable(path)}: expected an MP4, MOV, WebM, MKV or AVI video, found another format")
    frames = clip_frames(path, NUM_FRAMES)
    # Its size before its frames: the limit of pixels holds for them too.
    image_size(frames[0])
    load_image(frames[0])
    return frames


TAKEN = (*ENDINGS, *CLIP_ENDINGS)
