"""Clips in rows: their frames stand for pictures, are decoded once, and kept from run to run in a cache of bounded size."""

import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from huggingface_hub.constants import HF_ASSETS_CACHE

from ..errors import InputError
from .files import check_regular_file
from .shown import printable, shown

# Most crops of a frame, as the official advice is for several images; a picture takes --num_crops.
CLIP_CROPS = 4
# Of the JPEGs, that of convert_ucf101.py: a clip gives the same pixels either way.
QUALITY = 92
# Of the cache, in as many folders as spare a write to look through all of it.
MOST_BYTES, FOLDERS = 20e9, 64
# Clips whose frames a process holds: those of one sample are read one after another.
HELD = 4


@dataclass(frozen=True)
class Frame:
    """One of the evenly spread frames of a clip, as a picture.

    Args:
        path (str): the clip.
        number (int): which of the frames, from 0.
        num_frames (int): how many of them there are; a shorter clip shows some several times.
    """

    path: str
    number: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.path}, frame {self.number + 1} of {self.num_frames}"


@dataclass(frozen=True)
class Clip:
    """A clip in a row.

    Args:
        path (str): its file.
        num_frames (int): how many frames are shown.
    """

    path: str
    num_frames: int

    @property
    def frames(self) -> list[Frame]:
        """Its frames, which stand for pictures in `Turn.images`; nothing is opened."""
        return clip_frames(self.path, self.num_frames)


def clip_frames(path: str | os.PathLike, num_frames: int) -> list[Frame]:
    """The frames of a clip, which stand for pictures in `Turn.images`; nothing is opened."""
    return [Frame(os.fspath(path), number, num_frames) for number in range(num_frames)]


def check_clip(value: Any) -> Clip:
    """The value, if it is a clip.

    Raises:
        ValueError: for anything else, with what was expected and found.
    """
    if isinstance(value, Clip):
        return value
    if isinstance(value, str) and value.strip():
        raise ValueError("expected pictures, found a clip, which finetune_hf_trainer_own_data.py reads")
    raise ValueError(f"expected the path of a clip, found {shown(value)}")


def most_crops(sources: Sequence, num_crops: int) -> list[int]:
    """Most crops of each of some pictures, where a picture that is no frame of a clip may take `num_crops`."""
    return [min(CLIP_CROPS, num_crops) if isinstance(source, Frame) else num_crops for source in sources]


def frame_size(frame: Frame) -> tuple[int, int]:
    """Width and height in pixels of a frame, upright, by the first frame of its clip: the others are not decoded.

    Raises:
        InputError: if the clip is no file, or nothing of it decodes.
    """
    return _size(_look_at(frame.path))


def frame_jpeg(frame: Frame) -> bytes:
    """A frame as a JPEG, upright: from the cache, or decoded and put there.

    Raises:
        InputError: if the clip is no file, or nothing of it decodes.
    """
    return _jpegs(_look_at(frame.path), frame.num_frames)[frame.number]


def cache_folder() -> Path:
    """Where frames are kept: in the folder that huggingface_hub keeps for other libraries ($HF_ASSETS_CACHE)."""
    return Path(os.environ.get("HF_ASSETS_CACHE") or HF_ASSETS_CACHE).expanduser() / "phi3v-finetuning" / "clips"


class _File(NamedTuple):
    """A clip as it is now: path, bytes, time of change in ns. What is remembered of it is forgotten once it changes."""

    path: str
    size: int
    time: int


def _look_at(path: str) -> _File:
    check_regular_file(path, "a video file")
    status = os.stat(path)
    return _File(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=HELD)
def _size(clip: _File) -> tuple[int, int]:
    # Not above: PyAV takes 0.1 s, and most runs have no clip.
    from .frames import describe_failure, upright_size

    try:
        return upright_size(clip.path)
    except Exception as error:  # decoders fail in many ways
        raise _refusal(clip.path, describe_failure(error)) from None


@lru_cache(maxsize=HELD)
def _jpegs(clip: _File, num_frames: int) -> list[bytes]:
    entry = _entry(_digest(clip), num_frames)
    kept = _read(entry, num_frames)
    if kept is not None:
        return kept
    from .frames import describe_failure, read_frames

    try:
        made, _ = read_frames(clip.path, num_frames, QUALITY)
    except Exception as error:  # decoders fail in many ways
        raise _refusal(clip.path, describe_failure(error)) from None
    try:
        _write(entry, made)
    except OSError as error:
        _say_once(
            f"warning: {entry.parent}: frames of clips cannot be kept there ({error.strerror}): decoded each time"
        )
    return made


def _refusal(path: str, reason: str) -> InputError:
    return InputError(f"{printable(path)}: expected a video of which frames decode, found: {printable(reason)}")


@lru_cache(maxsize=100_000)
def _digest(clip: _File) -> str:
    """What the content of a clip is known by; each process reads a clip to its end once, as long as it does not change."""
    found = xxhash.xxh3_128()
    with open(clip.path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _entry(digest: str, num_frames: int) -> Path:
    return cache_folder() / f"{int(digest[:8], 16) % FOLDERS:02d}" / f"{digest}-{num_frames}-{QUALITY}.zip"


def _read(entry: Path, num_frames: int) -> list[bytes] | None:
    """The JPEGs of an entry; None where it is not there or is damaged: each has a checksum."""
    try:
        with zipfile.ZipFile(entry) as archive:
            jpegs = [archive.read(f"{number}.jpg") for number in range(num_frames)]
        os.utime(entry)  # what was used last is removed last
        return jpegs
    except Exception:  # whatever a damaged file leads to: the entry is made again
        return None


def _write(entry: Path, jpegs: list[bytes]) -> None:
    """Writes an entry whole or not at all, another process may do the same; removes what was not used for longest.

    Raises:
        OSError: if it cannot be written.
    """
    bound = MOST_BYTES / FOLDERS
    if sum(map(len, jpegs)) > bound:
        return
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=entry.parent, prefix=".", delete=False) as aside:
        try:
            with zipfile.ZipFile(aside, "w") as archive:
                for number, jpeg in enumerate(jpegs):
                    archive.writestr(f"{number}.jpg", jpeg)
            aside.close()
            os.replace(aside.name, entry)
        except BaseException:
            Path(aside.name).unlink(missing_ok=True)
            raise
    # What a process that was killed has left counts too.
    found = []
    for file in os.scandir(entry.parent):
        try:
            found.append((file.stat().st_mtime_ns, file.stat().st_size, file.path))
        except FileNotFoundError:  # another process has removed it
            continue
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= bound:
            break
        Path(path).unlink(missing_ok=True)
        total -= size


@lru_cache
def _say_once(text: str) -> None:
    print(text, flush=True)
