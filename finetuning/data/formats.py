"""Rows of a data folder in the native form, whatever they came in: native, LLaVA, ShareGPT, OpenAI; and converting them.

Reads every jsonl file of the folder or, where there is none, every json file, which then holds a list. Rows may be

- native (README): {"id", "conversations": [{"images", "user", "assistant"}]};
- LLaVA or ShareGPT: {"id", "image" or "images": a path or a list, "conversations": [{"from", "value"}]}, where each
  `<image>` in a text stands for the next image;
- OpenAI: {"messages": [{"role", "content"}]}, content a text, or parts of the types text, image_url and image;
- of one task's own form, where its script's `to_conversation` is given.

Image paths of chat formats are relative to the folder or to its images/; system messages are put before the first user
text, an empty line between them. `convert` writes OUT/converted_SPLIT.jsonl and OUT/images/ (hard links where possible);
there a row without an id gets FILE-LINE, and an id that is used again its line.
"""

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from pydantic import ValidationError

from ..errors import InputError
from .conversation import Conversation, check_conversation
from .jsonl import iterate_rows
from .reading import check_split
from .rows import Row, resolve_images
from .schemas import (
    ChatMessage,
    ChatPart,
    ChatRow,
    ConvertedRow,
    chat_format,
    describe_fault,
    parse_row,
    row_id,
    sample_name,
)
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
    """Path of an image, or what stands for the path of one that came as bytes."""
    return str(source["path"] if isinstance(source, dict) else source)


def split_of(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def find_files(folder: Path) -> list[Path]:
    """The files with rows.

    Raises:
        InputError: if there is none.
    """
    files = sorted(folder.glob("*.jsonl")) or sorted(folder.glob("*.json"))
    if not files:
        raise InputError(
            f"{folder}: expected a folder with jsonl files, or with json files that hold a list, found none"
        )
    return files


def read_samples(
    files: Sequence[Path],
    to_conversation: Callable[[Any], Any] | None = None,
    splits: Sequence[str] | None = None,
) -> Iterator[Sample | Fault]:
    """Each row of the files as a sample, or what is wrong with its fields.

    Args:
        files (Sequence[Path]): see `find_files`.
        to_conversation (Callable, optional): a script's own, for rows of its task; without it rows are native or of a chat
            format.
        splits (Sequence[str], optional): names of the splits to read; by default all.
    """
    used: set[str] = set()
    for path in files:
        in_rows = path.name.startswith("rows")
        if splits is not None and not in_rows and split_of(path) not in splits:
            continue
        line, found = None, "expected at least one row, found none"
        try:
            for line, row in iterate_rows(path):
                try:
                    if isinstance(row, InputError):
                        raise row
                    row = Row(row, f"{path}:{line}")
                    if splits is None or not in_rows or row.get("split") in splits:
                        yield _to_sample(path, line, row, used, to_conversation)
                except InputError as error:
                    yield Fault(str(path), line, str(error))
        except InputError as error:
            # The file is named beside the message.
            line, found = None, str(error).removeprefix(f"{printable(str(path))}: ")
        if line is None:
            yield Fault(str(path), None, found)


def _to_sample(path: Path, line: int, row: Row, used: set[str], to_conversation: Callable[[Any], Any] | None) -> Sample:
    chat = to_conversation is None and chat_format(row) is not None
    split = split_of(path)
    if path.name.startswith("rows"):
        split = "train" if chat and "split" not in row else _split_name(row)
    elif chat and split not in SPLITS:
        split = "train"
    if to_conversation is None and not chat and "conversations" not in row:
        raise InputError(
            f'{sample_name(row)}expected the field "conversations" (native, LLaVA, ShareGPT) or "messages" (OpenAI), found '
            f"{printable(', '.join(row)) or 'no field'}; --task reads rows of a task's own form"
        )
    if chat:
        name = row_id(row) or f"{path.stem}-{line}"
        name = f"{name}-{line}" if name in used else name
        used.add(name)
        native = to_native({**row, "id": name}, path.parent)
        return Sample(path, line, split, False, native, parse_row(native, ConvertedRow).to_conversation())
    try:
        row = Row(resolve_images(row, path.parent), row.where)
    except InputError as error:
        raise InputError(f"{sample_name(row)}{error}") from None
    if to_conversation is None:
        return Sample(path, line, split, True, row, parse_row(row, ConvertedRow).to_conversation())
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


def to_native(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Native row, image paths made whole, of a row with an id of any of the known forms.

    An image's tag `<|image_N|>` stands where its `<image>`, or its part of a message, stood.

    Raises:
        InputError: with the row's id and the field, if fields, roles, or images and `<image>` do not fit.
    """
    try:
        row = locate_pictures(row, folder)
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


def convert(folder: Path, out: Path) -> None:
    """Writes the native form of a clean folder, whole or not at all: OUT/converted_SPLIT.jsonl and OUT/images/.

    Raises:
        InputError: if OUT exists or cannot be written.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}")
    names: dict[str, str] = {}
    files: dict[str, Any] = {}
    try:
        (part / "images").mkdir(parents=True)
        with ExitStack() as stack:
            for sample in read_samples(find_files(folder)):
                if isinstance(sample, Fault):
                    raise InputError(f"{sample}; the folder has changed since it was checked")
                for turn in sample.row["conversations"]:
                    turn["images"] = [
                        _place(source, folder, part / "images", names) for source in turn.get("images", [])
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


def _place(source: str | dict[str, Any], folder: Path, images: Path, names: dict[str, str]) -> str:
    """Links, copies or writes an image into `images` once, and returns its path there; `names` remembers it."""
    name = image_name(source)
    if name not in names:
        path = Path(name)
        if isinstance(source, str):
            path = Path(os.path.relpath(os.path.realpath(name), os.path.realpath(folder)))
        path = path.relative_to("images") if path.parts[0] == "images" else path
        if (images / path).exists():  # there is images/a.jpg and a.jpg
            path = path.with_stem(f"{path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}")
        (images / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, dict):
            (images / path).write_bytes(source["bytes"])
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
