"""Rows of a data folder in the native form, whatever they came in: native, LLaVA, ShareGPT, OpenAI; and converting them.

Reads every jsonl file of the folder or, where there is none, every json file, which then holds a list. Rows may be

- native (README): {"id", "conversations": [{"images", "user", "assistant"}]};
- LLaVA or ShareGPT: {"id", "image" or "images": a path or a list, "conversations": [{"from", "value"}]}, where each
  `<image>` in a text stands for the next image;
- OpenAI: {"messages": [{"role", "content"}]}, content a text, or parts of the types text, image_url and image.

Image paths of the last two are relative to the folder or to its images/; system messages are put before the first user
text, an empty line between them. `convert` writes OUT/converted_SPLIT.jsonl and OUT/images/ (hard links where possible);
there a row without an id gets FILE-LINE, and an id that is used again its line.
"""

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from ..errors import InputError
from .conversation import Conversation, from_jsonl
from .reading import resolve_images

MARK = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SPLITS = ("train", "val", "validation", "dev", "test", "eval")


@dataclass
class Fault:
    """What stops training: the file, its line from 1 (None: the whole file), and what was expected and found."""

    file: str
    line: int | None
    message: str

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        return f"{self.file}{line}: {' '.join(self.message.splitlines()):.600}"


@dataclass
class Sample:
    """A row: where it stands, its native form with whole image paths, and its conversation."""

    file: Path
    line: int
    split: str
    native: bool
    row: dict[str, Any]
    conversation: Conversation

    def fault(self, message: str) -> Fault:
        return Fault(str(self.file), self.line, f"sample {self.conversation.id}: {message}")

    @property
    def image_names(self) -> list[str]:
        return [image_name(source) for source in self.conversation.images]


def image_name(source: str | dict[str, Any]) -> str:
    return source["path"] if isinstance(source, dict) else source


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


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line, from 1, and value of each row of a jsonl file or json list; in place of a broken row its InputError.

    Unlike `rows.iterate_jsonl` it goes on after a broken line.
    """
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        if path.suffix == ".jsonl":
            yield from ((number, _parse(line)[0]) for number, line in enumerate(file, 1) if line.strip())
            return
        text = file.read()
    gap, line, start, position = re.compile(r"[\s,]*"), 1, 0, re.match(r"\s*\[?", text).end()
    if text[position - 1 : position] != "[":
        yield 1, InputError(f"expected a list of rows, found {text[position : position + 20]!r}; move other files away")
        return
    while True:
        position = gap.match(text, position).end()
        line, start = line + text.count("\n", start, position), position
        if text[position : position + 1] == "]":
            return
        row, position = _parse(text, position)
        yield line, row
        if isinstance(row, InputError):
            return


def _parse(text: str, start: int | None = None) -> tuple[Any, int]:
    """JSON value of a text, or that which begins at `start`, and where it ends; an InputError in place of a broken one."""
    try:
        if start is not None:
            return json.JSONDecoder().raw_decode(text, start)
        text.encode()
        return json.loads(text), len(text)
    except UnicodeEncodeError as error:
        found = f"expected UTF-8 text, found the byte {ord(text[error.start]) - 0xDC00:#x}"
    except json.JSONDecodeError as error:
        found = f"expected a JSON object, found {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, too deep nesting
        found = f"expected a JSON object, found: {error}"
    return InputError(found), 0


def read_samples(files: list[Path]) -> Iterator[Sample | Fault]:
    """Each row of the files as a sample, or what is wrong with its fields."""
    used = set()
    for path in files:
        line, found = None, "expected at least one row, found none"
        try:
            for line, row in read_rows(path):
                try:
                    yield _to_sample(path, line, row, used)
                except InputError as error:
                    yield Fault(str(path), line, str(error))
        except OSError as error:
            line, found = None, f"expected a file with rows, found: {error.strerror}"
        if line is None:
            yield Fault(str(path), None, found)


def _to_sample(path: Path, line: int, row: Any, used: set[str]) -> Sample:
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, found {type(row).__name__}")
    where, turns = f"sample {row.get('id')}", row.get("conversations")
    if "messages" not in row and "conversations" not in row:
        raise InputError(
            f'{where}: expected the field "conversations" (native, LLaVA, ShareGPT) or "messages" (OpenAI), found '
            f"{', '.join(row) or 'no field'}; rows of one task's own form are checked by its script"
        )
    turn = turns[0] if isinstance(turns, list) and turns else None
    native = "messages" not in row and not (isinstance(turn, dict) and ("from" in turn or "role" in turn))
    split = split_of(path)
    if path.name.startswith("rows"):
        split = row.get("split", None if native else "train")
        if not isinstance(split, str) or not re.fullmatch(r"[\w-]+", split):
            raise InputError(f'{where}: expected "split" with a name such as train or test, found {split!r}')
    elif not native and split not in SPLITS:
        split = "train"
    if native:
        try:
            row = resolve_images(row, path.parent)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    else:
        name = str(row["id"]) if isinstance(row.get("id"), str | int) else f"{path.stem}-{line}"
        name = f"{name}-{line}" if name in used else name
        used.add(name)
        row = to_native({**row, "id": name}, path.parent)
    return Sample(path, line, split, native, row, from_jsonl(row))


def to_native(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Native row, image paths made whole, of a LLaVA, ShareGPT or OpenAI row with an id.

    An image's tag `<|image_N|>` stands where its `<image>`, or its part of a message, stood.

    Raises:
        InputError: with the row's id, if fields, roles, or images and `<image>` do not fit.
    """
    where, sources, turns = f"sample {row['id']}", [], []
    listed = row.get("images", row.get("image")) or []
    waiting = list(listed) if isinstance(listed, list) else [listed]
    count = len(waiting)
    system = [row["system"]] if isinstance(row.get("system"), str) and row["system"] else []
    messages = row.get("messages", row.get("conversations"))

    def tag(source) -> str:
        sources.append(_locate(source, folder))
        return f"<|image_{len(sources)}|>"

    def text_of(content) -> str:
        if isinstance(content, str):
            return re.sub(MARK, lambda mark: tag(waiting.pop(0)) if waiting else mark[0], content)
        texts = []
        for part in content:
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                source = waiting.pop(0) if waiting and part["type"] not in part else part[part["type"]]
                # A line break after the tag, as in the processor's chat template.
                texts.append(tag(source["url"] if isinstance(source, dict) else source) + "\n")
        return "".join(texts)

    for number, message in enumerate(messages if isinstance(messages, list) else [messages], 1):
        place = f"{where}, message {number}"
        placed = len(sources) if turns else 0
        try:
            role = ROLES.get(message["from"] if "from" in message else message["role"])
            text = text_of(message["value"] if "value" in message else message["content"])
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        except (KeyError, TypeError, AttributeError):
            raise InputError(
                f'{place}: expected {{"from", "value"}} or {{"role", "content"}}, content a text or parts of the types text, '
                f"image_url and image, found {message!r:.200}"
            ) from None
        answered = not turns or "assistant" in turns[-1]
        if role == "system" and not turns:
            system.append(text)
        elif role == "user" and answered:
            turns.append({"images": sources[placed:], "user": "\n\n".join([*system, text])})
            system = []
        elif role == "assistant" and not answered:
            turns[-1]["assistant"] = text
        else:
            expected = "user" if answered else "assistant"
            raise InputError(f"{place}: expected one of the {expected}, found {message!r:.200}")
    left = sum(str(text).count(MARK) for turn in turns for text in (turn["user"], turn.get("assistant", "")))
    # Images that stand as parts of messages leave `<image>` a text like any other.
    if waiting or (left and len(sources) == count):
        found = count - len(waiting) + left
        raise InputError(f"{where}: expected {count} placeholder(s) {MARK} for {count} image(s), found {found}")
    return {"id": row["id"], "conversations": turns}


def _locate(source: Any, folder: Path) -> str | dict[str, Any]:
    """Whole path of an image of a foreign row; of a data URI {"bytes", "path"}, the path made of its SHA-256."""
    if not isinstance(source, str) or source.startswith(("http://", "https://")):
        raise InputError(
            f"expected a path, file:// or data: as image, found {source!r:.200}; download what is on the web"
        )
    if source.startswith("data:"):
        match = re.fullmatch(r"data:image/(\w+);base64,(.*)", source, re.DOTALL)
        try:
            content = base64.b64decode(match[2], validate=True)
        except (TypeError, ValueError):
            raise InputError(f"expected data:image/TYPE;base64,..., found {source:.60}") from None
        return {"bytes": content, "path": f"{hashlib.sha256(content).hexdigest()}.{match[1]}"}
    if source.startswith("file://"):
        source = unquote(urlparse(source).path)
    [path] = resolve_images({"images": [source]}, folder)["images"]
    if not os.path.exists(path) and os.path.exists(folder / "images" / source):
        [path] = resolve_images({"images": [f"images/{source}"]}, folder)["images"]
    return path


def convert(folder: Path, out: Path) -> None:
    """Writes the native form of a clean folder, whole or not at all: OUT/converted_SPLIT.jsonl and OUT/images/.

    Raises:
        InputError: if OUT exists or cannot be written.
    """
    part, names, files = out.with_name(f".{out.name}.{os.getpid()}"), {}, {}
    try:
        (part / "images").mkdir(parents=True)
        with ExitStack() as stack:
            for sample in read_samples(find_files(folder)):
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
