"""Rows of the files of a folder, each with the place where it stands."""

import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .files import check_regular_file
from .schemas import chat_format, conversion_advice, sample_name
from .shown import printable, shown

if TYPE_CHECKING:
    from ..arguments import RecipeArguments


class Row(dict):
    """A row of a file.

    Args:
        values (Mapping): its fields.
        where (str): file and line, from 1, such as "data/train.jsonl:17".
    """

    __slots__ = ("where",)

    def __init__(self, values: Mapping[str, Any], where: str):
        super().__init__(values)
        self.where = where

    def __reduce__(self):
        return Row, (dict(self), self.where)


def where(row: Any, index: int) -> str:
    """Where a row stands, for messages: "train.jsonl:17" where it was read from a file, or else "row 17".

    Args:
        row: a row of any kind.
        index (int): its number in the split, from 0; the message counts from 1, as lines do.
    """
    return getattr(row, "where", None) or f"row {index + 1}"


def iterate_rows(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Line, from 1, and row of each line of a jsonl file, or of each object of the list that a json file holds.

    In place of a row that cannot be read stands its InputError, so that a checker can go on; empty lines are skipped. In a
    json list nothing can be read after a broken row.

    Args:
        path (path): the file; a name that ends with .json stands for a list.

    Raises:
        InputError: with the file, if it cannot be read.
    """
    check_regular_file(path, "a file with rows")
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            if Path(path).suffix == ".json":
                yield from _parse_list(file.read())
            else:
                yield from ((number, _parse_line(line)) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise InputError(f"{printable(os.fspath(path))}: expected a file with rows, found: {error.strerror}") from None


def _parse_line(line: str) -> dict[str, Any] | InputError:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        return InputError(f"expected UTF-8 text, found the byte {ord(line[error.start]) - 0xDC00:#x}")
    return _parse(line, None)[0]


def _parse_list(text: str) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    gap, line, start = re.compile(r"[\s,]*"), 1, 0
    opening = re.match(r"\s*\[", text)
    if not opening:
        yield 1, InputError(f"expected a list of rows, found {shown(text[:40].strip())}; move other files away")
        return
    position = opening.end()
    while True:
        position = _end_of(gap, text, position)
        line, start = line + text.count("\n", start, position), position
        if text[position : position + 1] == "]":
            return
        row, end = _parse(text, position)
        yield line, row
        if end is None:
            return
        position = end


def _end_of(pattern: re.Pattern, text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _parse(text: str, start: int | None) -> tuple[dict[str, Any] | InputError, int | None]:
    """The object that is the whole text or begins at `start`, and where it ends, which broken JSON does not tell."""
    end = len(text)
    try:
        if start is None:
            row = json.loads(text)
        else:
            row, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        return InputError(f"expected a JSON object, found {error.msg} at column {error.colno}"), None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, too deep nesting
        return InputError(f"expected a JSON object, found: {printable(str(error))}"), None
    if not isinstance(row, dict):
        return InputError(f"expected a JSON object, found {shown(row)}"), end
    return row, end


def read_jsonl(path: str | os.PathLike) -> list[Row]:
    """Rows of a jsonl file, see `iterate_rows`, with image paths resolved, see `resolve_images`.

    Raises:
        InputError: with file, line and field; also if there is no row.
    """
    name, rows = printable(os.fspath(path)), []
    for number, row in iterate_rows(path):
        place = f"{name}:{number}"
        if isinstance(row, InputError):
            raise InputError(f"{place}: {row}")
        try:
            rows.append(Row(resolve_images(row, Path(path).parent), place))
        except InputError as error:
            raise InputError(f"{place}: {sample_name(row)}{error}") from None
    if not rows:
        raise InputError(f"{name}: expected at least one row, found none")
    return rows


def resolve_images(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The row with the image paths in its fields image, img, images and conversations made whole.

    Paths are relative to the folder of the jsonl file, in `conversations` (the converted form) to its folder images/. A null
    stays what it is: the row's model refuses it where an image belongs.

    Raises:
        InputError: with the field, if one is no path or leaves the folder.
    """
    row, base = dict(row), os.fspath(folder)
    for key in ("image", "img", "images"):
        if row.get(key) is not None:
            row[key] = _resolve(base, row[key], key)
    turns = row.get("conversations")
    if isinstance(turns, list):
        base, row["conversations"] = os.path.join(base, "images"), list(turns)
        for index, turn in enumerate(turns):
            if isinstance(turn, dict) and turn.get("images") is not None:
                field = f"conversations[{index}].images"
                row["conversations"][index] = {**turn, "images": _resolve(base, turn["images"], field)}
    return row


def _resolve(folder: str, value: Any, field: str) -> str | list[str]:
    if isinstance(value, list):
        return [_inside(folder, path, f"{field}[{index}]") for index, path in enumerate(value)]
    return _inside(folder, value, field)


def _inside(folder: str, path: Any, field: str) -> str:
    if not isinstance(path, str) or not path:
        raise InputError(f"{field}: expected an image path, found {shown(path)}")
    whole = os.path.normpath(os.path.join(folder, path))
    try:
        inside = os.path.realpath(whole).startswith(os.path.join(_real(folder), ""))
    except ValueError:  # a null character or half a surrogate pair
        inside = False
    if not inside:
        raise InputError(f"{field}: expected an image path inside {printable(folder)}, found {shown(path)}")
    return whole


@lru_cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def load_folder(args: "RecipeArguments", evaluation: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """Rows of --data_dir to train on, none where nothing is trained, and to answer, see `read_splits`.

    Args:
        args (RecipeArguments): data_dir, eval_split, do_train.
        evaluation (Sequence[str]): the task's usual names of the split to answer, the best first.
    """
    assert args.data_dir is not None, "the scripts ask"
    return read_splits(args.data_dir, "train" if args.do_train else None, args.eval_split or evaluation)


def read_splits(
    data_dir: str | os.PathLike, train: str | None = "train", evaluation: str | Sequence[str] = "test"
) -> tuple[list[Row], list[Row]]:
    """Rows of a folder to train on and to answer.

    Args:
        data_dir (path): folder with `rows*.jsonl`, whose rows then have a field `split`, or with `SPLIT.jsonl` or
            `NAME_SPLIT.jsonl` for each split.
        train (str, optional): name of the split to train on; None for no rows.
        evaluation (str | Sequence[str]): name of the split to answer, or several, of which the first that exists is taken.

    Raises:
        InputError: if files or rows of a split are missing, or a row cannot be read; with the command that converts the folder
            where it holds a known chat format.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise InputError(f"--data_dir {printable(str(folder))}: expected a folder, found no such folder")
    wanted = [evaluation] if isinstance(evaluation, str) else list(evaluation)
    asked = [wanted] if train is None else [[train], wanted]
    paths = sorted(folder.glob("rows*.jsonl"))
    found: dict[str, list[Row]] = {}
    if paths:
        splits: dict[str, list[Row]] = {}
        for row in (row for path in paths for row in read_jsonl(path)):
            splits.setdefault(check_split(row), []).append(row)
        found = {name: splits[name] for names in asked for name in names if name in splits}
        files = ", ".join(path.name for path in paths)
        for names in asked:
            if not any(name in found for name in names):
                expected = f'expected rows with "split": "{" or ".join(names)}"'
                there = ", ".join(printable(name, 40) for name in list(splits)[:5])
                raise InputError(f"{printable(str(folder / files))}: {expected}, found none (only {there})")
    else:
        for names in asked:
            candidates = ((name, path) for name in names for path in _split_files(folder, name))
            name, path = next(candidates, (names[0], None))
            if path is None:
                others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
                missing = f"expected rows.jsonl with a field split, or {names[0]}.jsonl, found neither{others}"
                raise InputError(f"--data_dir {printable(str(folder))}: {missing}{_advice(folder)}")
            found[name] = read_jsonl(path)
    return found[train] if train else [], next(found[name] for name in wanted if name in found)


def check_split(row: Row) -> str:
    """The name in the field `split` of a row.

    Raises:
        InputError: with file and line, if it is missing or no name.
    """
    split = row.get("split")
    if not isinstance(split, str) or not split.strip():
        expected = "split: expected the name of a split, such as train or test"
        raise InputError(f"{row.where}: {sample_name(row)}{expected}, found {shown(split)}")
    return split


def _advice(folder: Path) -> str:
    """What a folder holds instead of splits, if its first row is of a known chat format."""
    for path in sorted(folder.glob("*.jsonl")) or sorted(folder.glob("*.json")):
        try:
            _, row = next(iterate_rows(path), (0, None))
        except InputError:
            continue
        if name := chat_format(row):
            return f"; {conversion_advice(f'{name} in {printable(path.name)}')}"
    return ""


def _split_files(folder: Path, split: str) -> list[Path]:
    if (folder / f"{split}.jsonl").exists():
        return [folder / f"{split}.jsonl"]
    paths = sorted(folder.glob(f"*_{split}.jsonl"))
    if len(paths) > 1:
        names = printable(", ".join(path.name for path in paths))
        raise InputError(f"{printable(str(folder))}: expected one file for the split {split}, found {names}")
    return paths


def spread(count: int, size: int) -> list[int]:
    """Numbers of `count` of `size` rows, evenly spread, so that a file sorted by class gives of every class; always the same."""
    rng = random.Random(0)
    return [rng.randrange(part * size // count, (part + 1) * size // count) for part in range(count)]


def sample_rows(rows: Sequence, count: int | None) -> Sequence:
    """`count` rows of a list or of a `datasets.Dataset`, see `spread`; all of them without a count."""
    if count is None or count >= len(rows):
        return rows
    return select(rows, spread(count, len(rows)))


def select(rows: Sequence, numbers: Sequence[int]) -> Sequence:
    """The rows with these numbers."""
    return rows.select(numbers) if hasattr(rows, "select") else [rows[number] for number in numbers]
