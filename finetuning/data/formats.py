"""Rows of a data folder in the native form, whatever they came in, for `validate`; and converting them.

Reads the files that `own_rows.data_files` finds, in the forms of `known_forms.py`; or rows of one task's own form, where its
script's `to_conversation` is given. `convert` writes OUT/converted_SPLIT.jsonl and OUT/images/ (hard links where possible); there
a row without an id gets FILE-LINE, and an id that is used again its line.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..own_data_arguments import NUM_FRAMES
from .clips import Frame, frame_jpeg
from .conversation import Conversation, check_conversation
from .jsonl import iterate_rows
from .known_forms import VIDEO_FIELDS, is_question, known_conversation, locate_pictures
from .own_rows import LOOKED_AT, check_pictures, data_files, missing_columns, name_columns, open_file
from .reading import check_split
from .rows import Row, resolve_images
from .schemas import ConvertedRow, chat_format, parse_row, row_id, sample_name
from .shown import printable, shown

SPLITS = ("train", "val", "validation", "dev", "test", "eval")


@dataclass
class Fault:
    """What stops training: the file, its line from 1 (None: the whole file), and what was expected and found."""

    file: str
    line: int | None
    message: str

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        return f"{printable(self.file)}{line}: {printable(self.message, 1000)}"


@dataclass
class Sample:
    """A row: where it stands, its fields with whole image paths (native, but for a task's own), and its conversation."""

    file: Path
    line: int
    split: str
    native: bool
    row: dict[str, Any]
    conversation: Conversation

    def fault(self, message: str) -> Fault:
        return Fault(str(self.file), self.line, f"sample {printable(self.conversation.id)}: {message}")

    @property
    def images(self) -> dict[str, str | dict[str, Any]]:
        """Its images by name, see `image_name`."""
        return {image_name(source): source for source in self.conversation.images}

    @property
    def image_names(self) -> list[str]:
        return [image_name(source) for source in self.conversation.images]


def image_name(source: Any) -> str:
    """Path of an image; of one that came as bytes what tells it from others, by content."""
    if not isinstance(source, dict):
        return str(source)
    path = Path(str(source.get("path") or ""))
    if not source.get("bytes") or re.fullmatch(r"[0-9a-f]{64}", path.stem):
        return str(source["path"])
    return f"{hashlib.sha256(source['bytes']).hexdigest()}{path.suffix or '.png'}"


def split_of(path: Path) -> str:
    """The last word of a file's name; of the parts of a split, as the hub names them, the split."""
    return re.split(r"[_.]|-(?=\D)", re.sub(r"-\d+-of-\d+$", "", path.stem))[-1]


def find_files(path: Path) -> list[Path]:
    """The files with rows: the file that is given; of a folder its jsonl files, or else those of the one kind that is there.

    Raises:
        InputError: if there is none, or of several kinds.
    """
    return sorted(path.glob("*.jsonl")) if path.is_dir() and any(path.glob("*.jsonl")) else data_files(path)


def read_samples(
    files: Sequence[Path],
    to_conversation: Callable[[Any], Any] | None = None,
    splits: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    num_frames: int = NUM_FRAMES,
) -> Iterator[Sample | Fault]:
    """Each row of the files as a sample, or what is wrong with its fields.

    Args:
        files (Sequence[Path]): see `find_files`.
        to_conversation (Callable, optional): a script's own, for rows of its task; without it rows are of a known form.
        splits (Sequence[str], optional): names of the splits to read; by default all.
        columns (Mapping[str, str], optional): see `OwnRows`.
        num_frames (int): frames of a clip.
    """
    used: set[str] = set()
    for path in files:
        in_rows, split = path.name.startswith("rows"), split_of(path)
        unnamed = split not in SPLITS and "train" in (splits or ())
        if splits is not None and not in_rows and not unnamed and split not in splits:
            continue
        line, found = None, "expected at least one row, found none"
        try:
            for line, row in _numbered_rows(path, columns or {}, to_conversation is None, num_frames):
                try:
                    if isinstance(row, InputError):
                        raise row
                    if splits is not None and in_rows and row.get("split") not in splits:
                        continue
                    sample = _to_sample(path, line, row, used, to_conversation, num_frames)
                    if splits is None or sample.split in splits:
                        yield sample
                except InputError as error:
                    yield Fault(str(path), line, str(error))
        except InputError as error:
            # The file is named beside the message.
            line, found = None, str(error).removeprefix(f"{printable(str(path))}: ")
        if line is None:
            yield Fault(str(path), None, found)


def _numbered_rows(
    path: Path, columns: Mapping[str, str], known: bool, num_frames: int
) -> Iterator[tuple[int, Row | InputError]]:
    """Line, or in Parquet number, and row of each row of a file; in place of one that cannot be read its error."""
    if path.suffix in (".jsonl", ".json"):
        found = iterate_rows(path)
        head = list(islice(found, LOOKED_AT))
        if known:
            first = [Row(row, f"{path}:{line}") for line, row in head if not isinstance(row, InputError)]
            check_pictures(first, columns)
            _refuse(missing_columns(first, columns))
        for line, row in chain(head, found):
            yield line, row if isinstance(row, InputError) else Row(name_columns(row, columns), f"{path}:{line}")
        return
    rows = open_file(path, columns, num_frames)
    _refuse(rows.missing)
    for index in range(len(rows)):
        line = rows.number(index)
        try:
            yield line, rows.values(index)
        except InputError as error:
            place = (f"{printable(str(path))}:{line}: ", f"{printable(str(path))}, row {line}: ")
            yield line, InputError(str(error).removeprefix(place[0]).removeprefix(place[1]))


def _refuse(missing: dict[str, str]) -> None:
    for message in missing.values():
        raise InputError(message)


def _to_sample(
    path: Path, line: int, row: Row, used: set[str], to_conversation: Callable[[Any], Any] | None, num_frames: int
) -> Sample:
    foreign = to_conversation is None and (chat_format(row) is not None or is_question(row))
    split = split_of(path)
    if foreign and "split" not in row:
        split = split if split in SPLITS and not path.name.startswith("rows") else "train"
    elif foreign or path.name.startswith("rows"):
        split = _split_name(row)
    if foreign:
        name = row_id(row) or f"{path.stem}-{line}"
        name = f"{name}-{line}" if name in used else name
        used.add(name)
        native = to_native({**row, "id": name}, path.parent, num_frames)
        return Sample(path, line, split, False, native, parse_row(native, ConvertedRow).to_conversation())
    if to_conversation is None and "conversations" not in row:
        try:
            known_conversation(row)
        except InputError as error:
            raise InputError(f"{error}; --task reads rows of a task's own form") from None
    try:
        known = to_conversation is None
        located = locate_pictures(row, path.parent, num_frames) if known else resolve_images(row, path.parent)
        row = Row(located, row.where)
    except InputError as error:
        raise InputError(f"{sample_name(row)}{error}") from None
    if to_conversation is None:
        return Sample(path, line, split, True, row, known_conversation(row))
    conversation = to_conversation(row)
    # A script's own function may return anything, and the sample goes by its id.
    check_conversation(conversation, ())
    return Sample(path, line, split, True, row, conversation)


def _split_name(row: Row) -> str:
    try:
        split = check_split(row)
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{row.where}: ")) from None
    if not re.fullmatch(r"[\w-]+", split):
        raise InputError(
            f"{sample_name(row)}split: expected the name of a split, such as train or test, found {shown(split)}"
        )
    return split


def to_native(row: dict[str, Any], folder: Path, num_frames: int = NUM_FRAMES) -> dict[str, Any]:
    """Native row, image paths made whole, of a row with an id of any of the known forms.

    An image's tag `<|image_N|>` stands where its `<image>`, or its part of a message, stood.

    Raises:
        InputError: with the row's id and the field, if fields, roles, or images and `<image>` do not fit.
    """
    try:
        row = locate_pictures(row, folder, num_frames)
    except InputError as error:
        raise InputError(f"{sample_name(row)}{error}") from None
    turns = known_conversation(row).turns
    return {
        "id": row["id"],
        "conversations": [
            {
                "images": turn.images,
                "user": turn.user,
                "assistant": turn.answers[0] if len(turn.answers) == 1 else turn.answers,
            }
            for turn in turns
        ],
    }


def convert(folder: Path, out: Path, columns: Mapping[str, str] | None = None, num_frames: int = NUM_FRAMES) -> None:
    """Writes the native form of a clean folder, whole or not at all: OUT/converted_SPLIT.jsonl and OUT/images/.

    Of a clip its frames are written.

    Raises:
        InputError: if OUT exists or cannot be written.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}")
    names: dict[str, str] = {}
    files: dict[str, Any] = {}
    try:
        (part / "images").mkdir(parents=True)
        with ExitStack() as stack:
            for sample in read_samples(find_files(folder), columns=columns, num_frames=num_frames):
                if isinstance(sample, Fault):
                    raise InputError(f"{sample}; the folder has changed since it was checked")
                for turn, asked in zip(sample.row["conversations"], sample.conversation.turns, strict=True):
                    for field in VIDEO_FIELDS:
                        turn.pop(field, None)
                    turn["images"] = [
                        _place(source, folder if folder.is_dir() else folder.parent, part / "images", names)
                        for source in asked.images
                    ]
                # Paths that no longer hold, and what is now in the file's name.
                row = {
                    key: value for key, value in sample.row.items() if key not in ("image", "img", "images", "split")
                }
                if sample.split not in files:
                    path = part / f"converted_{sample.split}.jsonl"
                    files[sample.split] = stack.enter_context(open(path, "w", encoding="utf-8"))
                files[sample.split].write(json.dumps(row, ensure_ascii=False) + "\n")
        refuse_existing(out)
        part.rename(out)
    except OSError as error:
        raise InputError(f"--convert {out}: expected a folder to write to, found: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _place(source: str | dict[str, Any] | Frame, folder: Path, images: Path, names: dict[str, str]) -> str:
    """Links, copies or writes an image into `images` once, and returns its path there; `names` remembers it."""
    name = image_name(source)
    if name not in names:
        path = Path(name)
        if isinstance(source, Frame):
            path = Path(
                f"{os.path.relpath(os.path.realpath(source.path), os.path.realpath(folder))}.{source.number}.jpg"
            )
        elif isinstance(source, str):
            path = Path(os.path.relpath(os.path.realpath(name), os.path.realpath(folder)))
        path = path.relative_to("images") if path.parts[0] == "images" else path
        if (images / path).exists():  # there is images/a.jpg and a.jpg
            path = path.with_stem(f"{path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}")
        (images / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, dict | Frame):
            (images / path).write_bytes(source["bytes"] if isinstance(source, dict) else frame_jpeg(source))
        else:
            try:
                os.link(os.path.realpath(name), images / path)
            except OSError:  # another file system, or one without links
                shutil.copy2(name, images / path)
        names[name] = path.as_posix()
    return names[name]


def refuse_existing(out: Path) -> None:
    """Raises an InputError if there is anything under this name."""
    if os.path.lexists(out):
        raise InputError(f"--convert {out}: expected a folder that does not exist yet, found it; nothing was written")
