"""The same 24 pages with their questions in seven forms, as people have them; and bad rows of these forms."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hub
import pyarrow as pa
import pyarrow.parquet as pq
import recipe

PAGES = 24
HUB_NAME = "me/pages"
QUESTION = "Which page is it?\nSay it."


def answer(number: int) -> str:
    return f"page {number % 3}"


def picture(number: int) -> bytes:
    """A PNG file of its own for each page, one colour for each answer."""
    return hub.png(number, (40 - number % 3 * 8, 30))


def write_pictures(folder: Path, name: str = "scans") -> list[str]:
    """Files of the pages in a folder; their paths relative to it."""
    (folder / name).mkdir(parents=True)
    paths = [f"{name}/{number}.png" for number in range(PAGES)]
    for number, path in enumerate(paths):
        (folder / path).write_bytes(picture(number))
    return paths


def llava_row(path: str, number: int) -> dict:
    """As LLaVA has them, where several rows have the same id."""
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer(number)}]
    return {"id": f"{number // 2:012}", "image": path, "conversations": turns}


def sharegpt_row(path: str, number: int) -> dict:
    turns = [{"from": "human", "value": f"{QUESTION}<image>"}, {"from": "gpt", "value": answer(number)}]
    return {"images": [path], "conversations": turns}


def message_row(path: str, number: int) -> dict:
    """As TRL has them: a part without a path takes the next of `images`."""
    asked = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": answer(number)}]},
    ]
    return {"images": [path], "messages": messages}


def native(folder: Path) -> list[str]:
    """A converted folder, with a test file."""
    paths = write_pictures(folder, "images")
    rows = [
        {
            "id": f"p{n}",
            "conversations": [{"images": [path.removeprefix("images/")], "user": QUESTION, "assistant": answer(n)}],
        }
        for n, path in enumerate(paths)
    ]
    recipe.write_jsonl(folder / "pages_train.jsonl", rows[:18])
    recipe.write_jsonl(folder / "pages_test.jsonl", rows[18:])
    return ["--data_dir", str(folder)]


def llava_json(folder: Path) -> list[str]:
    rows = [llava_row(path, number) for number, path in enumerate(write_pictures(folder))]
    (folder / "llava_pages.json").write_text(json.dumps(rows, indent=1))
    return ["--data_dir", str(folder / "llava_pages.json"), "--eval_share", "0.25"]


def sharegpt_jsonl(folder: Path) -> list[str]:
    rows = [sharegpt_row(path, number) for number, path in enumerate(write_pictures(folder))]
    recipe.write_jsonl(folder / "train.jsonl", rows[:18])
    recipe.write_jsonl(folder / "val.jsonl", rows[18:])
    return ["--data_dir", str(folder)]


def messages_jsonl(folder: Path) -> list[str]:
    rows = [message_row(path, number) for number, path in enumerate(write_pictures(folder))]
    split = [{**row, "split": "test" if number >= 18 else "train"} for number, row in enumerate(rows)]
    recipe.write_jsonl(folder / "rows.jsonl", split)
    return ["--data_dir", str(folder)]


def parquet_bytes(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    rows = [
        {"image": {"bytes": picture(n), "path": f"{n}.png"}, "question": QUESTION, "answer": answer(n)}
        for n in range(PAGES)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:18]), folder / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows[18:]), folder / "test-00000-of-00001.parquet")
    return ["--data_dir", str(folder)]


def csv_file(folder: Path) -> list[str]:
    """As a German spreadsheet writes it: a byte order mark, semicolons, a line break inside of a text."""
    paths = write_pictures(folder)
    with open(folder / "pages.csv", "w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["path", "frage", "antwort"])
        rows.writerows([path, QUESTION, answer(number)] for number, path in enumerate(paths))
    columns = ["--columns", "image=path", "question=frage", "answer=antwort"]
    return ["--data_dir", str(folder / "pages.csv"), *columns, "--eval_share", "0.25"]


def hub_files() -> dict[str, bytes]:
    """A data set of the hub: messages as TRL has them, the pictures in a column of images."""
    from datasets import Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"images": List(Image()), "messages": [{"role": Value("string"), "content": [part]}]})
    rows = []
    for number in range(PAGES):
        row = message_row("", number)
        for message in row["messages"]:
            message["content"] = [{"type": part["type"], "text": part.get("text")} for part in message["content"]]
        rows.append({**row, "images": [{"bytes": picture(number), "path": None}]})
    return {
        "README.md": hub.card([{"name": "default", "files": {"train": "data/train-*", "test": "data/test-*"}}]),
        "data/train-00000-of-00001.parquet": hub.parquet(rows[:18], features),
        "data/test-00000-of-00001.parquet": hub.parquet(rows[18:], features),
    }


INPUTS: dict[str, Callable[[Path], list[str]]] = {
    "native": native,
    "LLaVA json": llava_json,
    "ShareGPT jsonl": sharegpt_jsonl,
    "messages jsonl": messages_jsonl,
    "Parquet with bytes": parquet_bytes,
    "csv": csv_file,
}


class BadInput(NamedTuple):
    """A fault; `write(folder)` makes the data and gives the flags that name it, the line it gets holds `expected`."""

    name: str
    write: Callable[[Path], list[str]]
    expected: str


def _jsonl(row_of: Callable[[str, int], dict], change: Callable[[dict], Any]) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        rows = [row_of(path, number) for number, path in enumerate(write_pictures(folder)[:6])]
        changed = change(rows[2])
        rows[2] = rows[2] if changed is None else changed
        recipe.write_jsonl(folder / "train.jsonl", rows)
        recipe.write_jsonl(folder / "test.jsonl", rows[:1])
        return ["--data_dir", str(folder)]

    return write


def _table(text: str | bytes, *flags: str, name: str = "pages.csv") -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        write_pictures(folder)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--data_dir", str(folder / name), *flags]

    return write


def _parquet(rows: list[dict]) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        write_pictures(folder)
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
        return ["--data_dir", str(folder)]

    return write


def _empty(folder: Path) -> list[str]:
    folder.mkdir()
    return ["--data_dir", str(folder)]


def _two_kinds(folder: Path) -> list[str]:
    _table("image,question,answer\nscans/0.png,q,a\n")(folder)
    recipe.write_jsonl(folder / "rows.jsonl", [{"question": "q", "answer": "a"}])
    return ["--data_dir", str(folder)]


def question_row(path: str, number: int) -> dict:
    return {"image": path, "question": QUESTION, "answer": answer(number)}


def put(name: str, value: Any) -> Callable[[dict], None]:
    return lambda row: row.update({name: value})


def drop(name: str) -> Callable[[dict], None]:
    return lambda row: row.pop(name) and None


HEAD = "image,question,answer\nscans/0.png,q,a\n"
SCAN = {"bytes": picture(0), "path": None}
BAD_INPUTS = [
    # LLaVA and ShareGPT
    BadInput("LLaVA: two <image> for one picture", _jsonl(llava_row, lambda row: row["conversations"][0].update(value="<image><image>?")), "train.jsonl:3: sample 000000000001: expected 1 placeholder(s) <image> for 1 image(s), found 2"),
    BadInput("LLaVA: no <image> for a picture", _jsonl(llava_row, lambda row: row["conversations"][0].update(value="?")), "expected 1 placeholder(s) <image> for 1 image(s), found 0"),
    BadInput("LLaVA: two questions in a row", _jsonl(llava_row, lambda row: row["conversations"][1].update({"from": "human"})), "conversations[1]: expected a message of the assistant, found one of human"),
    BadInput("LLaVA: no answer at the end", _jsonl(llava_row, lambda row: row["conversations"].pop()and None), "conversations: expected an answer to the last message of the user, found none"),
    BadInput("LLaVA: a role of its own", _jsonl(llava_row, lambda row: row["conversations"][1].update({"from": "bing"})), "conversations[1].from: expected 'system', 'human', 'user', 'gpt' or 'assistant', found 'bing'"),
    BadInput("LLaVA: a text null", _jsonl(llava_row, lambda row: row["conversations"][1].update(value=None)), "train.jsonl:3: sample 000000000001: conversations[1].value: expected"),
    BadInput("LLaVA: a picture that is not there", _jsonl(llava_row, put("image", "scans/gone.png")), "train.jsonl:3: sample 000000000001, turn 1: images[0]: "),
    BadInput("LLaVA: a picture outside of the folder", _jsonl(llava_row, put("image", "../../secret.png")), "train.jsonl:3: sample 000000000001: image: expected an image path inside"),
    BadInput("LLaVA: a picture on the web", _jsonl(llava_row, put("image", "https://example.org/a.png")), "image: expected a path, file:// or data: as image, found 'https://example.org/a.png'; download what is on the web"),
    BadInput("ShareGPT: images a number", _jsonl(sharegpt_row, put("images", [7])), "images[0]: expected a picture"),
    BadInput("ShareGPT: an empty conversation", _jsonl(sharegpt_row, put("conversations", [{"from": "human"}])), "conversations[0].value: expected this field, found from"),
    BadInput("json: no list", _table('{"a": 1}', name="chats.json"), "chats.json: expected a list of rows, found '{\"a\": 1}'; move other files away"),
    BadInput("json: cut short", _table('[{"question": "q", "answer": "a"},\n{"question": "q"', name="chats.json"), "chats.json:2: expected a JSON object, found"),
    BadInput("json: a list of lists", _table("[[1, 2]]", name="chats.json"), "chats.json:1: expected a JSON object, found a list [1, 2]"),
    # messages
    BadInput("messages: a part without a picture", _jsonl(message_row, put("images", [])), "messages[0]: expected a path, file:// or data: in the part of type image, found none"),
    BadInput("messages: a picture without a part", _jsonl(message_row, lambda row: row["images"].append("scans/1.png")), "expected 2 placeholder(s) <image> for 2 image(s), found 1"),
    BadInput("messages: a part of sound", _jsonl(message_row, lambda row: row["messages"][0]["content"].append({"type": "audio"})), "content[2].type: expected 'text', 'image_url', 'image' or 'video', found 'audio'"),
    BadInput("messages: a broken data URI", _jsonl(message_row, lambda row: row["messages"][0]["content"][0].update(image="data:image/png;base64,?")), "messages[0]: content[0].image: expected data:image/TYPE;base64,..., found 'data:image/png;base64,?'"),
    BadInput("messages: a tool's answer", _jsonl(message_row, lambda row: row["messages"].append({"role": "tool", "content": "x"})), "messages[2].role: expected 'system', 'human', 'user', 'gpt' or 'assistant', found 'tool'"),
    # columns
    BadInput("jsonl: no answer", _jsonl(question_row, drop("answer")), "train.jsonl:3: sample train-3: answer: expected this field, found image, question, id; --columns question=NAME"),
    BadInput("jsonl: an answer a number", _jsonl(question_row, put("answer", 7)), "answer: expected text or a list with at least one text, found 7"),
    BadInput("jsonl: a form that is not known", _jsonl(question_row, lambda _: {"prompt": "q", "reply": "a"}), 'expected the field "conversations" (native, LLaVA, ShareGPT), "messages"'),
    BadInput("csv: too few columns in a line", _table(HEAD + "scans/1.png,q\n"), "pages.csv:3: expected 3 columns, found 2"),
    BadInput("csv: a comma in a text without quotes", _table(HEAD + "scans/1.png,q, and more,a\n"), "pages.csv:3: expected 3 columns, found 4; a text that holds ',' or a line break needs quotes around it"),
    BadInput("csv: a quote that is not closed", _table(HEAD + 'scans/1.png,"q,a\nscans/2.png,q,a\n'), "pages.csv:3: expected rows of a csv file, found: a quote that is not closed"),
    BadInput("csv: Latin-1", _table(HEAD.encode() + "scans/1.png,Für wen?,a\n".encode("latin-1")), "pages.csv:3: expected UTF-8 text, found the byte 0xfc; save it as UTF-8"),
    BadInput("csv: UTF-16", _table(HEAD.encode("utf-16")), "pages.csv: expected UTF-8 text, found UTF-16; save it as UTF-8"),
    BadInput("csv: a header alone", _table("image,question,answer\n"), "pages.csv: expected at least one row below the header, found none"),
    BadInput("csv: an empty file", _table(""), "pages.csv: expected a header and at least one row, found an empty file"),
    BadInput("csv: no answer in a line", _table(HEAD + "scans/1.png,q,\n"), "pages.csv:3: sample pages-3: answer: expected text or a list with at least one text, found null"),
    BadInput("csv: a column twice", _table("image,question,question,answer\na,b,c,d\n"), "pages.csv:1: expected a name of its own for each column, found 'question' twice"),
    BadInput("csv: pictures in a column of another name", _table("scan,question,answer\nscans/0.png,q,a\n"), "pages.csv:2: expected pictures in a column image or images, found them in 'scan'; --columns image=scan says so"),
    BadInput("csv: --columns names none that is there", _table(HEAD, "--columns", "question=frage"), "--columns question=frage: expected a column of that name, found image, question, answer"),
    BadInput("csv: --columns of a field that there is not", _table(HEAD, "--columns", "picture=image"), "--columns picture=image: expected FIELD=COLUMN with one of the fields id, image"),
    BadInput("csv: one picture in all rows", _table(HEAD + "scans/0.png,q2,a\n"), "pages.csv: no test split: expected rows that can be held back, found that all 2 belong together"),
    BadInput("Parquet: an answer null", _parquet([{"image": SCAN, "question": "q", "answer": None}, {"image": SCAN, "question": "q", "answer": "a"}]), "train.parquet, row 1: sample train-1: answer: expected text"),
    BadInput("Parquet: bytes of no picture", _parquet([{"image": {"bytes": b"no picture", "path": None}, "question": "q", "answer": "a"}, {"image": SCAN, "question": "q", "answer": "a"}]), "expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found another format"),
    BadInput("Parquet: no Parquet", _table("PAR1", name="train.parquet"), "train.parquet: expected a Parquet file, found: "),
    # folders and flags
    BadInput("an empty folder", _empty, "expected files with rows (.jsonl, .parquet, .csv, .tsv, .json) in this folder, found none"),
    BadInput("two kinds of files", _two_kinds, "expected files of one kind, found rows.jsonl and pages.csv; name the file that holds your rows instead of the folder"),
    BadInput("no such path", lambda folder: ["--data_dir", str(folder / "none.csv")], "none.csv: expected a folder or a file with rows, found no such path"),
    BadInput("neither --data_dir nor --dataset", lambda _: [], "--data_dir PATH ... or --dataset OWNER/NAME: expected one of them, found none"),
    BadInput("a metric that there is not", _table(HEAD, "--metric", "bleu"), "argument --metric: invalid choice: 'bleu'"),
    BadInput("a share of all", _table(HEAD, "--eval_share", "1"), "--eval_share 1.0: expected a number from 0 to below 1"),
    BadInput("a split that there is not", _table(HEAD + "scans/1.png,q,a\n", "--eval_split", "holdout"), "--eval_split holdout: expected rows of this split in"),
]  # fmt: skip
