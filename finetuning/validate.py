"""Checks a folder of data before anyone pays for a GPU, and turns other formats into the native one.

    python -m finetuning.validate DATA_DIR --num_crops 4 --max_length 4096
    python -m finetuning.validate LLAVA_DIR --convert OUT

Reads every jsonl file of the folder or, where there is none, every json file, which then holds a list. Rows may be

- native (README): {"id", "conversations": [{"images", "user", "assistant"}]};
- LLaVA or ShareGPT: {"id", "image" or "images": a path or a list, "conversations": [{"from", "value"}]}, where each
  `<image>` in a text stands for the next image;
- OpenAI: {"messages": [{"role", "content"}]}, content a text, or parts of the types text, image_url and image.

Image paths of the last two are relative to the folder or to its images/; system messages are put before the first user
text, an empty line between them. `--convert` writes OUT/converted_SPLIT.jsonl and OUT/images/ (hard links where possible);
there a row without an id gets FILE-LINE, and an id that is used again its line.

Exit status: 0, or 2 for a fault: the first one, or all with --all, as `FILE:LINE: sample ID: expected ..., found ...`.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
from huggingface_hub import HfApi
from tqdm import tqdm
from transformers import AutoProcessor
from transformers.utils import logging

from phi3v import Phi3VImageProcessor, Phi3VProcessor
from phi3v.image_processing_phi3_v import MAX_NUM_CROPS, hd_size, padded_size
from phi3v.processing_phi3_v import IMAGE_TAG, find_tags

from .conversation import (
    Conversation,
    Turn,
    _orientation,
    check_conversation,
    from_jsonl,
    load_images,
    open_image,
    to_messages,
)
from .errors import InputError
from .rows import resolve_images

BATCH = 1000  # samples checked together: images by all cores, texts by one call of the tokenizer
MARK = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
PERCENTILES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
SPLITS = ("train", "val", "validation", "dev", "test", "eval")
# Control tokens of the official tokenizer, for where it cannot be loaded.
CONTROL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|image|>",
)


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
        return [_name(source) for source in self.conversation.images]


@dataclass(slots=True)
class Picture:
    """An image file: its size in bytes, its crops and image tokens (None: not opened), and what is wrong with it."""

    bytes: int | None = None
    crops: int = 0
    tokens: int = 0
    fault: str | None = None


@dataclass
class Figures:
    """What is counted in a split; the lists hold a number for each sample."""

    files: set[Path] = field(default_factory=set)
    turns: int = 0
    images: list[int] = field(default_factory=list)
    crops: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def _name(source: str | dict[str, Any]) -> str:
    return source["path"] if isinstance(source, dict) else source


def _split_of(path: Path) -> str:
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
    split = _split_of(path)
    if path.name.startswith("rows"):
        split = row.get("split", None if native else "train")
        if not isinstance(split, str) or not re.fullmatch(r"[\w-]+", split):
            raise InputError(f'{where}: expected "split" with a name such as train or test, found {split!r}')
    elif not native and split not in SPLITS:
        split = "train"
    if native:
        try:
            row = resolve_images(row, path.parent)
        except (InputError, ValueError) as error:  # a ValueError for a path with a NUL
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
        except (InputError, ValueError) as error:
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
    name = _name(source)
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


def load_processor(name: str, num_crops: int) -> tuple[Any, list[str]]:
    """Processor of a model; where there is none, its image processor with a tokenizer of None, and a remark on it."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        try:
            processor = AutoProcessor.from_pretrained(name, local_files_only=True)
        except OSError:
            # Where the hub is out of reach, from_pretrained tries for two minutes; this asks once.
            if os.path.isdir(name) or not HfApi().file_exists(name, "tokenizer.json"):
                raise
            processor = AutoProcessor.from_pretrained(name)
        if not isinstance(processor, Phi3VProcessor):
            raise ValueError(f"expected the processor of a Phi-3-vision model, found {type(processor).__name__}")
        remarks = []
    except Exception as error:  # the hub client raises a dozen kinds
        processor = SimpleNamespace(image_processor=Phi3VImageProcessor(), tokenizer=None)
        reason = str(error).strip().splitlines()[0].rstrip(".")
        remarks = [
            f"--model_name_or_path {name}: expected a tokenizer, found none; text tokens are not counted ({reason})"
        ]
    finally:
        logging.set_verbosity(level)
    processor.image_processor.num_crops = num_crops
    return processor, remarks


def check_folder(
    folder: Path, processor: Any, images: str = "decode", max_length: int | None = None, everything: bool = True
) -> tuple[list[Fault], list[str], dict[str, Figures]]:
    """Checks all files of a folder, a batch of samples at a time.

    Args:
        folder (Path): with jsonl files or json lists.
        processor: as `load_processor` gives it; its image processor's num_crops counts.
        images (str): "decode" reads every image to its end, "headers" its size alone, "paths" looks whether it is there.
        max_length (int, optional): longest sample allowed, in tokens.
        everything (bool): goes on after the first batch with a fault.

    Returns:
        tuple: faults in the order of files and lines, remarks, and the figures of each split over its good samples.

    Raises:
        InputError: if the folder holds no file with rows.
    """
    files = find_files(folder)
    added = processor.tokenizer.get_added_vocab() if processor.tokenizer else CONTROL_TOKENS
    # All that check_conversation asks of a processor; the tokenizer itself collects its vocabulary anew each time.
    vocabulary = SimpleNamespace(tokenizer=SimpleNamespace(get_added_vocab=lambda: added))
    faults, remarks, splits, ids, pictures, uses, native = [], [], {}, {}, {}, [], False
    items = iter(tqdm(read_samples(files), unit=" samples", leave=False, disable=None))
    with ThreadPool(len(os.sched_getaffinity(0))) as pool:
        while batch := list(islice(items, BATCH)):
            for fault in (item for item in batch if isinstance(item, Fault)):
                faults.append(fault)
                if (split := _split_of(Path(fault.file))) in SPLITS:  # a split with faults alone is there as well
                    splits.setdefault(split, Figures())
            batch, good = [item for item in batch if isinstance(item, Sample)], []
            new = {_name(source): source for sample in batch for source in sample.conversation.images}
            new = {name: source for name, source in new.items() if name not in pictures}
            found = pool.map(lambda source: inspect_image(source, images, processor.image_processor), new.values())
            pictures.update(zip(new, found, strict=True))
            for sample in batch:
                found, here = check_sample(sample, vocabulary, pictures), f"{sample.file.name}:{sample.line}"
                first = ids.setdefault((sample.split, sample.conversation.id), here)
                if first != here:
                    found.append(sample.fault(f"expected an id of its own, found that of {first}"))
                faults += found
                good += [] if found else [sample]
                splits.setdefault(sample.split, Figures()).files.add(sample.file)
                # A tuple of texts alone, as millions of them may stay.
                uses.append((sample.split, str(sample.file), sample.line, sample.conversation.id, *sample.image_names))
                native = native or sample.native
            faults += count_batch(good, splits, processor, pictures, max_length)
            if faults and not everything:
                break
        else:
            faults += find_leaks(uses, pictures, pool)
            found = check_splits(folder, files, splits)
            faults, remarks = (faults + found, []) if native else (faults, [str(fault) for fault in found])
    order = {str(path): number for number, path in enumerate(files)}
    return sorted(faults, key=lambda fault: (order.get(fault.file, -1), fault.line or 0)), remarks, splits


def inspect_image(source: str | dict[str, Any], images: str, image_processor: Phi3VImageProcessor) -> Picture:
    """Size, crops and tokens of an image, or what is wrong with it; `images` as in `check_folder`."""
    try:
        size = len(source["bytes"]) if isinstance(source, dict) else None
        if isinstance(source, str) and os.path.isfile(source):
            size = os.path.getsize(source)
        if images == "paths" and size is not None:
            return Picture()
        if images == "decode":
            [image] = load_images(Conversation("", [Turn("", [""], [source])]))
            width, height = image.size
        else:
            with open_image(source) as image:
                # Asked for an orientation that it does not have, a PNG decodes its pixels first.
                lying = (image.format != "PNG" or "exif" in image.info) and _orientation(image) >= 5
                width, height = image.size[::-1] if lying else image.size
    except (InputError, OSError, SyntaxError, ValueError) as error:
        return Picture(fault=str(error).removeprefix("sample : "))
    crop = image_processor.crop_size
    width_padded, height_padded = padded_size(*hd_size(width, height, image_processor.num_crops, crop), crop)
    tokens = image_processor.calc_num_image_tokens_from_image_size(width, height)
    return Picture(size, 1 + width_padded * height_padded // crop**2, tokens)


def check_sample(sample: Sample, vocabulary: Any, pictures: dict[str, Picture]) -> list[Fault]:
    """Faults of one sample: its texts and tags, and each of its images."""
    faults = [sample.fault(pictures[name].fault) for name in dict.fromkeys(sample.image_names) if pictures[name].fault]
    try:
        check_conversation(sample.conversation, vocabulary)
        "".join(text for turn in sample.conversation.turns for text in (turn.user, *turn.answers)).encode()
    except UnicodeEncodeError as error:
        faults.append(sample.fault(f"expected text, found half a character, {error.object[error.start]!r}"))
    except InputError as error:
        faults.append(Fault(str(sample.file), sample.line, str(error)))
    return faults


def count_batch(
    samples: list[Sample],
    splits: dict[str, Figures],
    processor: Any,
    pictures: dict[str, Picture],
    max_length: int | None,
) -> list[Fault]:
    """Adds samples to the figures of their splits; returns a fault for each one over `max_length` tokens.

    Lengths are those of `conversation.count_tokens`, but of all texts at once, and each image is opened once.
    """
    faults, lengths = [], [0] * len(samples)
    answers = [turn.answers for sample in samples for turn in sample.conversation.turns]
    several = [answer for choice in answers if len(choice) > 1 for answer in choice]
    answer_lengths = dict(zip(several, _count_tokens(several, processor.tokenizer), strict=True))
    messages = []
    for sample in samples:
        longest = [
            max(turn.answers, key=lambda text: answer_lengths.get(text, 0)) for turn in sample.conversation.turns
        ]
        messages.append(to_messages(sample.conversation, longest))
    if processor.tokenizer and samples:
        chunks = [IMAGE_TAG.split(text)[::2] for text in processor.apply_chat_template(messages)]
        counts = iter(_count_tokens([text for row in chunks for text in row], processor.tokenizer))
        lengths = [sum(next(counts) for _ in row) + 1 for row in chunks]  # and <|endoftext|>
    for sample, turns, length in zip(samples, messages, lengths, strict=True):
        names, figures = sample.image_names, splits[sample.split]
        tags = find_tags("\n".join(message["content"] for message in turns), len(names))
        shown = [pictures[names[number - 1]] for number in tags]
        figures.turns += len(sample.conversation.turns)
        figures.images.append(len(names))
        figures.crops.append(sum(picture.crops for picture in shown))
        figures.image_tokens.append(sum(picture.tokens for picture in shown))
        figures.tokens.append(length + figures.image_tokens[-1])
        if max_length is not None and figures.tokens[-1] > max_length:
            cure = "lower --num_crops, raise --max_length or leave the sample out"
            faults.append(sample.fault(f"expected at most {max_length} tokens, found {figures.tokens[-1]}; {cure}"))
    return faults


def _count_tokens(texts: list[str], tokenizer: Any) -> list[int]:
    """Tokens of each text, BOS included; without a tokenizer their characters."""
    if tokenizer is None:
        return [len(text) for text in texts]
    # Three times as fast as tokenizer(), which makes masks and copies of all ids; prompts and classes come again and again.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    unique = list(dict.fromkeys(texts))
    lengths = dict(zip(unique, map(len, tokenizer.backend_tokenizer.encode_batch_fast(unique)), strict=True))
    return [lengths[text] for text in texts]


def find_leaks(uses: list[tuple], pictures: dict[str, Picture], pool: ThreadPool) -> list[Fault]:
    """Faults of the samples outside train with an image of train: the same path or the same bytes.

    Args:
        uses (list[tuple]): split, file, line, id and names of the images of each sample.
        pictures (dict[str, Picture]): those of unknown size in bytes are compared by path alone.
        pool (ThreadPool): reads files.
    """
    train = {
        name: f"{Path(file).name}:{line}"
        for split, file, line, _, *names in reversed(uses)
        for name in names
        if split == "train"
    }
    others = {name for split, _, _, _, *names in uses for name in names if split != "train"}
    # Only files of equal size can be equal.
    sizes = {pictures[name].bytes for name in train} & {pictures[name].bytes for name in others} - {None}
    candidates = [name for name in {*train, *others} if pictures[name].bytes in sizes]
    content = dict(zip(candidates, pool.map(_digest, candidates), strict=True))
    origin = {content.get(name, name): name for name in train}
    faults = []
    for split, file, line, sample, *names in uses:
        leaked = [name for name in names if split != "train" and content.get(name, name) in origin]
        if leaked:
            twin = origin[content.get(leaked[0], leaked[0])]
            same = "" if twin == leaked[0] else f" as {twin}"
            message = f"sample {sample}: expected images that train does not hold, found {leaked[0]}, in train{same}, "
            faults.append(Fault(file, line, f"{message}{train[twin]} ({len(leaked)} of {len(names)} images)"))
    return faults


def _digest(name: str) -> str:
    """SHA-256 of a file; the name of a data URI's image begins with it."""
    if not os.path.dirname(name):
        return name.partition(".")[0]
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_splits(folder: Path, files: list[Path], splits: dict[str, Figures]) -> list[Fault]:
    """What `rows.read_splits` would refuse, or leave unread without a word."""
    faults = []
    rows = [path.name for path in files if path.name.startswith("rows")]
    if rows and len(rows) < len(files):
        others = ", ".join(path.name for path in files if path.name not in rows)
        faults.append(
            f"expected rows*.jsonl or a file for each split, found {rows[0]} and {others}; move one kind away"
        )
    for split, figures in splits.items():
        if not rows and len(figures.files) > 1:
            names = ", ".join(sorted(path.name for path in figures.files))
            faults.append(f"expected one file for the split {split}, found {names}; join them")
    missing = [] if "train" in splits else ["train"]
    missing += [] if splits.keys() - {"train"} else ["test"]
    for split in missing:
        found = ", ".join(splits) or "none"
        faults.append(f"expected a split {split}, found {found}; name a file {split}.jsonl or NAME_{split}.jsonl")
    return [Fault(str(folder), None, fault) for fault in faults]


def summarise(figures: Figures, max_length: int | None, texts: bool, images: bool) -> dict[str, Any]:
    """Figures of a split by name; None for what was not counted, which `texts` and `images` say."""
    over = None if max_length is None else sum(length > max_length for length in figures.tokens)
    return {
        "samples": len(figures.tokens),
        "turns": figures.turns,
        "images": sum(figures.images),
        "images_per_sample": _spread(figures.images, ("mean", "max")),
        "crops_per_sample": _spread(figures.crops, ("mean", "max")) if images else None,
        "tokens_per_sample": _spread(figures.tokens, ("mean", *PERCENTILES)) if texts or images else None,
        "over_max_length": over if texts or images else None,
        "tokens_per_epoch": sum(figures.tokens) if texts or images else None,
        "image_tokens_per_epoch": sum(figures.image_tokens) if images else None,
    }


def _spread(values: list[int], names: tuple[str, ...]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(names)
    found = {"mean": round(sum(values) / len(values), 1)}
    found |= {name: int(np.percentile(values, share, method="higher")) for name, share in PERCENTILES.items()}
    return {name: found[name] for name in names}


def format_table(summaries: dict[str, dict[str, Any]]) -> str:
    """The figures as a table with a column for each split, without what was not counted."""
    columns = []
    for summary in summaries.values():
        columns.append({})
        for key, value in summary.items():
            for part, figure in value.items() if isinstance(value, dict) else [("", value)]:
                columns[-1][f"{key.replace('_', ' ')}{', ' * bool(part)}{part}"] = figure
    rows = [["", *summaries]]
    for title in columns[0]:
        if any(column[title] is not None for column in columns):
            rows.append([title, *("-" if column[title] is None else f"{column[title]:,}" for column in columns)])
    first, width = (max(len(row[0]) for row in rows), max(10, *(len(cell) for row in rows for cell in row[1:])))
    return "\n".join(row[0].ljust(first) + "".join(f"  {cell:>{width}}" for cell in row[1:]) for row in rows)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists all flags)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags of `python -m finetuning.validate`."""
    parser = _Parser(prog="python -m finetuning.validate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data_dir", type=Path, help="folder with jsonl files, or with json files that hold a list")
    crops = {"type": int, "choices": range(1, MAX_NUM_CROPS + 1), "metavar": "N"}
    add("--num_crops", default=16, **crops, help="most crops of an image, as in training: 16, the default; 4 for video")
    add("--max_length", type=int, help="longest sample allowed, in tokens (default: what the model can take)")
    add("--model_name_or_path", default="microsoft/Phi-3.5-vision-instruct", help="model whose tokenizer counts")
    modes = "read every image to its end (default), its size alone, or only look whether the file is there"
    add("--images", default="decode", choices=("decode", "headers", "paths"), help=modes)
    add("--all", action="store_true", help="list all faults, not only the first")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--convert", type=Path, metavar="OUT", help="write a clean folder in the native form to the new folder OUT")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Checks what the command line says; exit status 0 for a clean folder, 2 for a fault or a bad call."""
    try:
        args = parse_args(argv)
        if not args.data_dir.is_dir():
            raise InputError(f"{args.data_dir}: expected a folder, found no such folder")
        if args.max_length is not None and args.max_length < 1:
            raise InputError(f"--max_length {args.max_length}: expected at least 1 token")
        if args.convert:
            refuse_existing(args.convert)
        processor, remarks = load_processor(args.model_name_or_path, args.num_crops)
        max_length = args.max_length or getattr(processor.tokenizer, "model_max_length", None)
        faults, more, splits = check_folder(args.data_dir, processor, args.images, max_length, args.all)
        remarks += more
        if args.images == "paths":
            remarks.append("--images paths: no image was opened; crops and image tokens are not counted")
        if args.convert and not faults:
            convert(args.data_dir, args.convert)
        if args.convert:
            remarks.append(
                f"--convert {args.convert}: " + ("nothing written: expected no fault" if faults else "written")
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    complete = args.all or not faults
    faults = faults if args.all else faults[:1]
    counted = (processor.tokenizer is not None, args.images != "paths")
    names = sorted(splits, key=lambda split: split != "train") if complete else []
    summaries = {name: summarise(splits[name], max_length, *counted) for name in names}
    if args.json:
        report = {"data_dir": str(args.data_dir), "num_crops": args.num_crops, "max_length": max_length}
        report |= {"complete": complete, "faults": [asdict(fault) for fault in faults], "remarks": remarks}
        print(json.dumps({**report, "splits": summaries}, ensure_ascii=False))
        return 2 if faults else 0
    print(*faults, *(f"remark: {remark}" for remark in remarks), sep="\n", end="\n" if faults or remarks else "")
    if summaries:
        print(format_table(summaries))
    limit = (
        f"num_crops {args.num_crops}, max length {max_length:,} tokens" if max_length else f"num_crops {args.num_crops}"
    )
    found = f"{len(faults)} fault(s)" if complete else "stopped at the first fault, --all lists all"
    print(f"{args.data_dir}: {found if faults else 'clean'} ({limit})")
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
