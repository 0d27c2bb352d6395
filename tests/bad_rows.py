"""Folders with one bad row each: what training and `validate` must refuse in one line that names file, line and field.

`BAD_ROWS` holds (name, function that writes the data folder, task, part of the line). The folder is good but for the fault.
"""

import functools
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tiny
from recipe import write_jsonl

Change = Callable[[dict], Any]


class BadRow(NamedTuple):
    """A fault; `write(folder)` makes the data folder, and the line it gets begins with a file in it and holds `expected`."""

    name: str
    write: Callable[[Path], None]
    task: str
    expected: str


IMAGES = {"docvqa": "images", "hateful_memes": "img", "nlvr2": "images", "ucf101": "images"}
TRAIN_FILES = {
    "docvqa": "rows.jsonl",
    "hateful_memes": "train.jsonl",
    "nlvr2": "rows.jsonl",
    "ucf101": "clips_train.jsonl",
}


def good_row(task: str, number: int) -> dict:
    """A row of a task that can be trained on."""
    if task == "docvqa":
        image = f"images/{number % 2}.png"
        return {"id": f"page-{number}", "image": image, "query": {"en": "Which page?"}, "answers": ["one", "1"]}
    if task == "hateful_memes":
        return {"id": number, "img": f"img/{number % 2}.png", "label": number % 2, "text": "so funny"}
    if task == "nlvr2":
        texts = [{"user": "Are both the same?\nAnswer yes or no.", "assistant": "Yes."}]
        return {"id": f"pair-{number}", "images": ["images/0.png", "images/1.png"], "texts": texts}
    turn = {"images": ["0.png", "1.png"], "user": "Which class?", "assistant": "Archery"}
    return {"id": f"clip-{number}", "conversations": [turn]}


def write_folder(folder: Path, task: str, lines: list[Any]) -> None:
    """A folder of a task with these lines, rows or raw bytes, to train on, and two good rows to answer."""
    (folder / IMAGES[task]).mkdir(parents=True, exist_ok=True)
    for number in range(2):
        tiny.picture(40, 30, seed=number).save(folder / IMAGES[task] / f"{number}.png")
    test = [good_row(task, number) for number in (100, 101)]
    rows = TRAIN_FILES[task] == "rows.jsonl"
    if rows:
        lines = [{"split": "train", **line} if isinstance(line, dict) else line for line in lines]
        lines += [{**row, "split": "test"} for row in test]
    elif task == "hateful_memes":
        write_jsonl(folder / "dev.jsonl", test)
    else:
        write_jsonl(folder / "clips_val.jsonl", test)
    with open(folder / TRAIN_FILES[task], "wb") as file:
        for line in lines:
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")


def _with_change(folder: Path, task: str, change: Change) -> None:
    rows: list[Any] = [good_row(task, number) for number in range(4)]
    changed = change(rows[2])
    rows[2] = rows[2] if changed is None else changed
    write_folder(folder, task, rows)


def _with_image(folder: Path, task: str, name: str, make: Callable[[Path], Any]) -> None:
    def change(row: dict) -> None:
        if task == "ucf101":
            row["conversations"][0]["images"][1] = name
        elif task == "nlvr2":
            row["images"][1] = f"images/{name}"
        else:
            row["image" if task == "docvqa" else "img"] = f"{IMAGES[task]}/{name}"

    _with_change(folder, task, change)
    make(folder / IMAGES[task] / name)


def line(name: str, task: str, expected: str, change: Change) -> BadRow:
    """The third line is changed: in place, or by the row or the bytes that `change` returns."""
    return BadRow(name, functools.partial(_with_change, task=task, change=change), task, expected)


def image(name: str, task: str, expected: str, file: str, make: Callable[[Path], Any]) -> BadRow:
    """An image of the third line is the file that `make` writes."""
    return BadRow(name, functools.partial(_with_image, task=task, name=file, make=make), task, expected)


def put(*keys: Any) -> Change:
    """A change that sets what the keys but the last lead to: put("query", "en", None)."""

    def change(row: Any) -> None:
        *path, key, value = keys
        for part in path:
            row = row[part]
        row[key] = value

    return change


def drop(*keys: Any) -> Change:
    """A change that removes a field."""

    def change(row: Any) -> None:
        *path, key = keys
        for part in path:
            row = row[part]
        del row[key]

    return change


def write_bytes(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def png_header(width: int, height: int) -> bytes:
    """A small PNG file that says it is of this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def picture_bytes(kind: str) -> bytes:
    buffer = io.BytesIO()
    tiny.picture(40, 30).save(buffer, kind)
    return buffer.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"
AVIF = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + b"\0" * 40
DDS = b"DDS " + struct.pack("<I", 124) + b"\x07\x10\x02\0" + b"\xff" * 116
BLP = b"BLP2" + struct.pack("<I", 1) + b"\xff" * 200
LLAVA = {"id": "l1", "image": "images/0.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}]}  # fmt: skip
OPENAI = {"id": "o1", "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat"}]}
CONVERT = "python -m finetuning.validate DIR --convert OUT"
TURN = ("conversations", 0)


def twice(row: dict) -> None:
    row["id"] = good_row("docvqa", 0)["id"]


BAD_ROWS = [
    # DocVQA: text where text belongs
    line("docvqa: question null", "docvqa", "rows.jsonl:3: sample page-2: query.en: expected text, found null", put("query", "en", None)),
    line("docvqa: question NaN", "docvqa", "rows.jsonl:3: sample page-2: query.en: expected text, found NaN", put("query", "en", float("nan"))),
    line("docvqa: question a number", "docvqa", "query.en: expected text, found 42", put("query", "en", 42)),
    line("docvqa: question a list", "docvqa", "query.en: expected text, found a list ['Which', 'page?']", put("query", "en", ["Which", "page?"])),
    line("docvqa: question an object", "docvqa", "query.en: expected text, found an object {'text': 'Which?'}", put("query", "en", {"text": "Which?"})),
    line("docvqa: question blank", "docvqa", "query.en: expected text, found ' '", put("query", "en", " ")),
    line("docvqa: question in German only", "docvqa", "query.en: expected this field, found de", put("query", {"de": "Welche?"})),
    line("docvqa: query null", "docvqa", "query: expected an object, found null", put("query", None)),
    line("docvqa: query a list", "docvqa", "query: expected an object, found a list", put("query", [{"en": "Which?"}])),
    line("docvqa: no query", "docvqa", "query: expected this field, found split, id, image, answers", drop("query")),
    line("docvqa: answers null", "docvqa", "answers: expected a list, found null", put("answers", None)),
    line("docvqa: an answer null", "docvqa", "answers[1]: expected text, found null", put("answers", ["one", None])),
    line("docvqa: an answer NaN", "docvqa", "answers[0]: expected text, found NaN", put("answers", [float("nan")])),
    line("docvqa: an answer a list", "docvqa", "answers[0]: expected text, found a list ['one']", put("answers", [["one"]])),
    line("docvqa: an answer true", "docvqa", "answers[0]: expected text, found true", put("answers", [True])),
    line("docvqa: an answer blank", "docvqa", "answers[1]: expected text, found '\\n'", put("answers", ["one", "\n"])),
    line("docvqa: answers an object", "docvqa", "answers: expected a list, found an object {'a': 1}", put("answers", {"a": 1})),
    line("docvqa: control characters in an answer of no kind", "docvqa", r"answers: expected a list, found '\x1b[2J\nerror: all is well'", put("answers", "\x1b[2J\nerror: all is well")),
    line("docvqa: a text of a megabyte where a list belongs", "docvqa", "answers: expected a list, found 'xxxxx", put("answers", "x" * 1_000_000)),
    # ids
    line("docvqa: id null", "docvqa", "rows.jsonl:3: id: expected text or a whole number, found null", put("id", None)),
    line("docvqa: id true", "docvqa", "rows.jsonl:3: id: expected text or a whole number, found true", put("id", True)),
    line("docvqa: id a fraction", "docvqa", "rows.jsonl:3: id: expected text or a whole number, found 1.5", put("id", 1.5)),
    line("docvqa: id a list", "docvqa", "rows.jsonl:3: id: expected text or a whole number, found a list [1]", put("id", [1])),
    line("docvqa: id blank", "docvqa", "rows.jsonl:3: id: expected text or a whole number, found ''", put("id", "")),
    line("docvqa: no id", "docvqa", "rows.jsonl:3: id: expected this field, found split, image, query, answers", drop("id")),
    line("docvqa: an id of control characters", "docvqa", r"rows.jsonl:3: sample \x1b[31m\x07\n: answers: expected a list", lambda row: row.update(id="\x1b[31m\x07\n", answers=None)),
    line("docvqa: an id used twice", "docvqa", "rows.jsonl:3: sample page-0: id: expected an id of its own, found that of ", twice),
    # images by name
    line("docvqa: image null", "docvqa", "rows.jsonl:3: sample page-2: image: expected a picture", put("image", None)),
    line("docvqa: image a number", "docvqa", "image: expected an image path, found 3", put("image", 3)),
    line("docvqa: image an object with a path outside", "docvqa", "image: expected an image path, found an object {'path': '/etc/passwd'}", put("image", {"path": "/etc/passwd"})),
    line("docvqa: image a list", "docvqa", "image: expected a picture", put("image", ["images/0.png"])),
    line("docvqa: image outside the folder", "docvqa", "image: expected an image path inside ", put("image", "../../secret.png")),
    line("docvqa: image path of control characters", "docvqa", r"found '../\x1b[2J\n.png'", put("image", "../\x1b[2J\n.png")),
    line("docvqa: image path blank", "docvqa", "image: expected an image path, found ''", put("image", "")),
    # the_cauldron's form
    line("docvqa: texts null", "docvqa", "texts: expected a list, found null", lambda _: {"id": 3, "images": ["images/0.png"], "texts": None}),
    line("docvqa: texts empty", "docvqa", "texts: expected a list with at least 1 item(s), found 0", lambda _: {"id": 3, "images": ["images/0.png"], "texts": []}),
    line("docvqa: a user text null", "docvqa", "texts[0].user: expected text, found null", lambda _: {"id": 3, "images": ["images/0.png"], "texts": [{"user": None, "assistant": "a"}]}),
    line("docvqa: an answer of a full stop alone", "docvqa", "rows.jsonl:3: sample 3, turn 1: answers[0]: expected text, found ''", lambda _: {"id": 3, "images": ["images/0.png"], "texts": [{"user": "q", "assistant": "."}]}),
    # lines
    line("docvqa: a line of null", "docvqa", "rows.jsonl:3: expected a JSON object, found null", lambda _: b"null"),
    line("docvqa: a line of NaN", "docvqa", "rows.jsonl:3: expected a JSON object, found NaN", lambda _: b"NaN"),
    line("docvqa: a line of a list of rows", "docvqa", "rows.jsonl:3: expected a JSON object, found a list", lambda row: json.dumps([row]).encode()),
    line("docvqa: a raw control character", "docvqa", "rows.jsonl:3: expected a JSON object, found Invalid control character", lambda _: b'{"id": "\x1b"}'),
    line("docvqa: Latin-1", "docvqa", "rows.jsonl:3: expected UTF-8 text, found the byte 0xe9", lambda _: '{"id": "é"}'.encode("latin-1")),
    line("docvqa: an empty object", "docvqa", "rows.jsonl:3: split: expected the name of a split", lambda _: b"{}"),
    line("docvqa: split null", "docvqa", "rows.jsonl:3: sample page-2: split: expected the name of a split, such as train or test, found null", put("split", None)),
    line("docvqa: split a list", "docvqa", "split: expected the name of a split, such as train or test, found a list ['train']", put("split", ["train"])),
    line("docvqa: half a surrogate pair in the question", "docvqa", "rows.jsonl:3: sample page-2, turn 1: user: expected Unicode text", put("query", "en", "Which\ud800?")),
    line("docvqa: a control token in an answer", "docvqa", "rows.jsonl:3: sample page-2, turn 1: answers[1]: expected plain text, found the control token <|end|>", put("answers", ["one", "1<|end|>"])),
    # rows of other formats
    line("docvqa: a LLaVA row", "docvqa", f"found LLaVA / ShareGPT, which finetune_hf_trainer_own_data.py reads as it is, and this command converts: {CONVERT}", lambda _: LLAVA),
    line("docvqa: an OpenAI row", "docvqa", f"found OpenAI messages, which finetune_hf_trainer_own_data.py reads as it is, and this command converts: {CONVERT}", lambda _: OPENAI),
    line("docvqa: a meme", "docvqa", "rows.jsonl:3: sample 1: expected the fields conversations; or images, texts; or image, query, answers, found", lambda _: good_row("hateful_memes", 1)),
    # Hateful Memes
    line("memes: label -1", "hateful_memes", "train.jsonl:3: sample 2: label: expected at least 0, found -1", put("label", -1)),
    line("memes: label 2", "hateful_memes", "label: expected at most 1, found 2", put("label", 2)),
    line("memes: label true", "hateful_memes", "label: expected a whole number, found true", put("label", True)),
    line("memes: label a text", "hateful_memes", "label: expected a whole number, found '1'", put("label", "1")),
    line("memes: label a fraction", "hateful_memes", "label: expected a whole number, found 1.0", put("label", 1.0)),
    line("memes: label null", "hateful_memes", "label: expected a whole number, found null", put("label", None)),
    line("memes: no label", "hateful_memes", "label: expected this field, found id, img, text", drop("label")),
    line("memes: text null", "hateful_memes", "text: expected text, found null", put("text", None)),
    line("memes: text a list", "hateful_memes", "text: expected text, found a list ['so', 'funny']", put("text", ["so", "funny"])),
    line("memes: text blank", "hateful_memes", "text: expected text, found ''", put("text", "")),
    line("memes: img null", "hateful_memes", "img: expected a picture", put("img", None)),
    line("memes: img an object", "hateful_memes", "img: expected an image path, found an object", put("img", {"bytes": None, "path": "img/0.png"})),
    # NLVR2
    line("nlvr2: no pictures", "nlvr2", "rows.jsonl:3: sample pair-2: images: expected a list with at least 2 item(s), found 0", put("images", [])),
    line("nlvr2: one picture", "nlvr2", "images: expected a list with at least 2 item(s), found 1", put("images", ["images/0.png"])),
    line("nlvr2: three pictures", "nlvr2", "images: expected a list with at most 2 item(s), found 3", put("images", ["images/0.png"] * 3)),
    line("nlvr2: images null", "nlvr2", "images: expected a list, found null", put("images", None)),
    line("nlvr2: images an object", "nlvr2", "images: expected an image path, found an object {'/etc/passwd': 1}", put("images", {"/etc/passwd": 1})),
    line("nlvr2: images a text", "nlvr2", "images: expected a list, found", put("images", "images/0.png")),
    line("nlvr2: a picture null", "nlvr2", "images[1]: expected an image path, found null", put("images", ["images/0.png", None])),
    line("nlvr2: a statement null", "nlvr2", "texts[0]: expected an object, found null", put("texts", [None])),
    line("nlvr2: an answer a number", "nlvr2", "texts[0].assistant: expected text, found 1", put("texts", 0, "assistant", 1)),
    line("nlvr2: no answer", "nlvr2", "texts[0].assistant: expected this field, found user", drop("texts", 0, "assistant")),
    line("nlvr2: a tag of an image that is not there", "nlvr2", "rows.jsonl:3: sample pair-2: image tags <|image_3|> for 2 image(s)", put("texts", 0, "user", "<|image_3|>?")),
    # the converted form
    line("ucf101: no frames", "ucf101", "clips_train.jsonl:3: sample clip-2: conversations: expected the frames of a clip", put(*TURN, "images", [])),
    line("ucf101: images null", "ucf101", "conversations[0].images: expected a list, found null", put(*TURN, "images", None)),
    line("ucf101: images an object", "ucf101", "conversations[0].images: expected an image path, found an object {'0.png': 1}", put(*TURN, "images", {"0.png": 1})),
    line("ucf101: a frame outside", "ucf101", "conversations[0].images[0]: expected an image path inside", put(*TURN, "images", ["../clips_train.jsonl/../../x.png"])),
    line("ucf101: a frame by an absolute path", "ucf101", "conversations[0].images[0]: expected an image path inside", put(*TURN, "images", ["/etc/passwd"])),
    line("ucf101: class null", "ucf101", "conversations[0].assistant: expected text or a list with at least one text, found null", put(*TURN, "assistant", None)),
    line("ucf101: no class", "ucf101", "conversations[0].assistant: expected this field, found images, user", drop(*TURN, "assistant")),
    line("ucf101: a class of several null", "ucf101", "conversations[0].assistant[1]: expected text, found null", put(*TURN, "assistant", ["Archery", None])),
    line("ucf101: question a number", "ucf101", "conversations[0].user: expected text, found 7", put(*TURN, "user", 7)),
    line("ucf101: conversations an object", "ucf101", "conversations: expected a list, found an object", put("conversations", {"user": "q", "assistant": "a"})),
    line("ucf101: conversations null", "ucf101", "conversations: expected a list, found null", put("conversations", None)),
    line("ucf101: a turn a text", "ucf101", "conversations[0]: expected an object, found 'Archery'", put("conversations", ["Archery"])),
    line("ucf101: ShareGPT", "ucf101", f"found LLaVA / ShareGPT, which finetune_hf_trainer_own_data.py reads as it is, and this command converts: {CONVERT}", put("conversations", [{"from": "human", "value": "hi"}])),
    # what is behind an image's name
    image("a FIFO as image", "docvqa", "rows.jsonl:3: sample page-2, turn 1: images[0]: ", "pipe.png", os.mkfifo),
    image("a folder as image", "hateful_memes", "train.jsonl:3: sample 2, turn 1: images[0]: ", "folder.png", os.mkdir),
    image("a link to a device as image", "nlvr2", "images[1]: expected an image path inside", "zero.png", lambda path: path.symlink_to("/dev/zero")),
    image("a link to nothing", "ucf101", "expected an image file, found no such file", "gone.png", lambda path: path.symlink_to("none.png")),
    image("no such image", "ucf101", "clips_train.jsonl:3: sample clip-2, turn 1: images[1]: ", "gone.png", lambda _: None),
    image("a link to itself", "docvqa", "expected an image file, found: Too many levels of symbolic links", "loop.png", lambda path: path.symlink_to("loop.png")),
    image("EPS", "docvqa", "page.eps: expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found another format", "page.eps", write_bytes(EPS)),
    image("EPS by the name of a PNG", "docvqa", "page.png: expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found another format", "page.png", write_bytes(EPS)),
    image("damaged AVIF", "docvqa", "a.avif: expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found another format", "a.avif", write_bytes(AVIF)),
    image("damaged DDS", "hateful_memes", "a.dds: expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found another format", "a.dds", write_bytes(DDS)),
    image("damaged BLP", "nlvr2", "a.blp: expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found another format", "a.blp", write_bytes(BLP)),
    image("an ICO file", "docvqa", "a.ico: expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found another format", "a.ico", lambda path: tiny.picture(32, 32).save(path)),
    image("an empty file as image", "docvqa", "expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found another format", "empty.png", write_bytes(b"")),
    image("a PNG of 190 megapixels", "docvqa", "expected at most 180000000 pixels (--max_image_pixels), found 19000 x 10000", "big.png", write_bytes(png_header(19_000, 10_000))),
    image("a PNG of 4 gigapixels", "docvqa", "expected at most 180000000 pixels (--max_image_pixels), found", "bomb.png", write_bytes(png_header(65_000, 65_000))),
    image("a PNG header that is cut", "ucf101", "cut.png: expected a whole image, found: ", "cut.png", write_bytes(picture_bytes("PNG")[:20])),
    image("a TIFF header of noise", "docvqa", "noise.tiff: expected a", "noise.tiff", write_bytes(b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 200)),
    image("a name of control characters", "docvqa", r"\x1b[2J\n.png: expected an image file, found no such file", "\x1b[2J\n.png", lambda _: None),
]  # fmt: skip


def _fifo_rows(folder: Path) -> None:
    write_folder(folder, "docvqa", [good_row("docvqa", 0)])
    (folder / "rows.jsonl").unlink()
    os.mkfifo(folder / "rows.jsonl")


def _device_rows(folder: Path) -> None:
    write_folder(folder, "hateful_memes", [good_row("hateful_memes", 0)])
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").symlink_to("/dev/zero")


def _directory_rows(folder: Path) -> None:
    write_folder(folder, "ucf101", [good_row("ucf101", 0)])
    (folder / "clips_train.jsonl").unlink()
    (folder / "clips_train.jsonl").mkdir()


def _llava_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "llava_v1.json").write_text(json.dumps([LLAVA]))


def _openai_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "chats.jsonl", [OPENAI])


# Faults of a whole file or folder: there is no line to name.
BAD_FOLDERS = [
    BadRow("a FIFO as rows", _fifo_rows, "docvqa", "rows.jsonl: expected a file with rows, found a FIFO"),
    BadRow("a device as rows", _device_rows, "hateful_memes", "train.jsonl: expected a file with rows, found a device"),
    BadRow("a folder as rows", _directory_rows, "ucf101", "clips_train.jsonl: expected a file with rows, found a directory"),
    BadRow("a LLaVA folder", _llava_folder, "docvqa", f"found LLaVA / ShareGPT in llava_v1.json, which finetune_hf_trainer_own_data.py reads as it is, and this command converts: {CONVERT}"),
    BadRow("an OpenAI folder", _openai_folder, "nlvr2", f"found OpenAI messages in chats.jsonl, which finetune_hf_trainer_own_data.py reads as it is, and this command converts: {CONVERT}"),
]  # fmt: skip
