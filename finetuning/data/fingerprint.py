"""What a conversation is known by: its texts, answers and pictures, so that a run notices when one of them changes."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import xxhash
from PIL import Image

from ..errors import InputError
from .clips import Frame
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


class Fingerprints(Sequence[Fingerprint]):
    """Fingerprints of many conversations as columns of Arrow: a tenth of the memory of as many objects.

    Args:
        table (pa.Table): columns of `SCHEMA`.
    """

    SCHEMA = pa.schema(
        [
            ("id", pa.string()),
            *((part, pa.binary()) for part in ("prompts", "answers", "pictures")),
            ("text", pa.string()),
        ]
    )

    def __init__(self, table: pa.Table):
        self.table = table

    @classmethod
    def of(cls, known: Iterable[Fingerprint]) -> "Fingerprints":
        """The same as columns."""
        if isinstance(known, Fingerprints):
            return known
        known = list(known)
        columns = {name: [getattr(item, name) for item in known] for name in cls.SCHEMA.names}
        return cls(pa.table(columns, cls.SCHEMA))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        return Fingerprint(*(column[index].as_py() for column in self.table.columns))

    def __iter__(self) -> Iterator[Fingerprint]:
        return (Fingerprint(*values) for values in self.values(*self.SCHEMA.names))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Fingerprint.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def values(self, *names: str) -> Iterator[tuple]:
        """The values of these columns, a row at a time; only some thousand rows are objects at once."""
        for batch in self.table.select(names).to_batches(10_000):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def fingerprint(conversation: Conversation, folder: str | Sequence[str] | None = None) -> Fingerprint:
    """Fingerprint of a conversation; paths of pictures count relative to `folder`, or to one of several, so that it may be moved."""
    prompts = [[turn.user, list(turn.choices)] for turn in conversation.turns]
    answers = [list(turn.answers) for turn in conversation.turns]
    pictures = [[identify_picture(source, folder) for source in turn.images] for turn in conversation.turns]
    text = "\n".join(f"{turn.user} -> {' / '.join(turn.answers)}" for turn in conversation.turns)
    return Fingerprint(conversation.id, digest(prompts), digest(answers), digest(pictures), text)


def digest(value: Any) -> bytes:
    """8 bytes that tell nested lists of texts and numbers apart."""
    return xxhash.xxh3_64_digest(repr(value).encode(errors="surrogatepass"))


def identify_picture(source: Any, folder: str | Sequence[str] | None = None) -> tuple:
    """What tells a picture from others without decoding it; `source` as in `open_image`."""
    if isinstance(source, dict) and source.get("bytes") is not None:
        return source.get("path"), len(source["bytes"]), xxhash.xxh3_64_hexdigest(source["bytes"])
    if isinstance(source, Image.Image):
        # Its content, also of one opened from a file: a script may have drawn on it.
        with suppress(OSError, SyntaxError, ValueError):
            return source.size, source.mode, xxhash.xxh3_64_hexdigest(source.tobytes())
        source = getattr(source, "filename", "")
    frame: tuple = ()
    if isinstance(source, Frame):
        source, frame = source.path, (source.number, source.num_frames)
    path = source["path"] if isinstance(source, dict) else os.fspath(source)
    try:
        status = os.stat(path)
    except OSError as error:
        expected = "a video file" if frame else "an image file"
        raise InputError(f"{printable(path)}: expected {expected}, found: {error.strerror}") from None
    folders = (folder,) if isinstance(folder, str) else tuple(folder or ())
    start = next((start for start in map(_beginning, folders) if path.startswith(start)), "")
    name = os.path.normpath(path[len(start) :]) if start else path
    return name, status.st_size, status.st_mtime_ns, *frame


@lru_cache
def _beginning(place: str) -> str:
    """How the paths of the files in a folder begin, or of those beside a file."""
    place = os.path.normpath(place)
    return os.path.join(os.path.dirname(place) if os.path.isfile(place) else place, "")
