"""What a conversation is known by: its texts, answers and pictures, so that a run notices when one of them changes."""

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import xxhash
from PIL import Image

from ..errors import InputError
from .conversation import Conversation
from .shown import printable


@dataclass(slots=True)
class Fingerprint:
    """Digests of a conversation.

    Args:
        id (str): id of the conversation.
        prompts (bytes): digest of the user texts and choices of all turns.
        answers (bytes): digest of all acceptable answers.
        pictures (bytes): digest of the pictures: of a file name, size and time; of a picture in memory its content.
        text (str): the texts themselves, to show what has changed.
    """

    id: str
    prompts: bytes
    answers: bytes
    pictures: bytes
    text: str


def fingerprint(conversation: Conversation, folder: str | None = None) -> Fingerprint:
    """Fingerprint of a conversation; paths of pictures count relative to `folder`, so that it may be moved."""
    prompts = [[turn.user, list(turn.choices)] for turn in conversation.turns]
    answers = [list(turn.answers) for turn in conversation.turns]
    pictures = [[identify_picture(source, folder) for source in turn.images] for turn in conversation.turns]
    text = "\n".join(f"{turn.user} -> {' / '.join(turn.answers)}" for turn in conversation.turns)
    return Fingerprint(conversation.id, digest(prompts), digest(answers), digest(pictures), text)


def digest(value: Any) -> bytes:
    """8 bytes that tell nested lists of texts and numbers apart."""
    return xxhash.xxh3_64_digest(repr(value).encode(errors="surrogatepass"))


def identify_picture(source: Any, folder: str | None = None) -> tuple:
    """What tells a picture from others without decoding it; `source` as in `open_image`."""
    if isinstance(source, dict) and source.get("bytes") is not None:
        return source.get("path"), len(source["bytes"]), xxhash.xxh3_64_hexdigest(source["bytes"])
    if isinstance(source, Image.Image):
        # Its content, also of one opened from a file: a script may have drawn on it.
        with suppress(OSError, SyntaxError, ValueError):
            return source.size, source.mode, xxhash.xxh3_64_hexdigest(source.tobytes())
        source = getattr(source, "filename", "")
    path = source["path"] if isinstance(source, dict) else os.fspath(source)
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"{printable(path)}: expected an image file, found: {error.strerror}") from None
    folder = folder and os.path.normpath(folder)
    inside = folder and path.startswith(os.path.join(folder, ""))
    return os.path.relpath(path, folder) if inside else path, status.st_size, status.st_mtime_ns
