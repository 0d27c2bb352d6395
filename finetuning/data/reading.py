"""Rows of the jsonl files of a folder."""

import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import InputError


def iterate_jsonl(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and row of each line of a jsonl file, one JSON object a line; empty lines are skipped.

    Raises:
        InputError: with file and line, if the file cannot be read or a line is not a JSON object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    found = f"{error.msg} at column {error.colno}"
                    raise InputError(f"{path}:{number}: expected a JSON object, found {found}") from None
                except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
                    raise InputError(f"{path}:{number}: expected a JSON object, found: {error}") from None
                if not isinstance(row, dict):
                    raise InputError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                yield number, row
    except OSError as error:
        raise InputError(f"{path}: expected a jsonl file, found: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found {error.reason} at byte {error.start}") from None


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a jsonl file, see `iterate_jsonl`, with image paths resolved, see `resolve_images`.

    Raises:
        InputError: with file and line; also if there is no row.
    """
    rows = []
    for number, row in iterate_jsonl(path):
        try:
            rows.append(resolve_images(row, Path(path).parent))
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
    if not rows:
        raise InputError(f"{path}: expected at least one row, found none")
    return rows


def resolve_images(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row with the image paths in its fields image, img, images and conversations made whole.

    Paths are relative to the folder of the jsonl file, in `conversations` (the converted form) to its folder images/.

    Raises:
        InputError: if one is not text or leaves the folder.
    """
    row, folder = dict(row), os.fspath(folder)
    for key in ("image", "img"):
        if key in row:
            row[key] = _inside(folder, row[key])
    if isinstance(row.get("images"), list):
        row["images"] = [_inside(folder, path) for path in row["images"]]
    if isinstance(row.get("conversations"), list):
        row["conversations"] = [
            {**turn, "images": [_inside(os.path.join(folder, "images"), path) for path in turn["images"]]}
            if isinstance(turn, dict) and isinstance(turn.get("images"), list)
            else turn
            for turn in row["conversations"]
        ]
    return row


def _inside(folder: str, path) -> str:
    if not isinstance(path, str) or not path:
        raise InputError(f"expected an image path, found {path!r}")
    whole = os.path.normpath(os.path.join(folder, path))
    try:
        inside = os.path.realpath(whole).startswith(os.path.join(_real(folder), ""))
    except ValueError:  # a null character or half a surrogate pair
        inside = False
    if not inside:
        raise InputError(f"expected an image path inside {folder}, found {path!r}")
    return whole


@lru_cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def read_splits(
    data_dir: str | os.PathLike, train: str = "train", evaluation: str | Sequence[str] = "test"
) -> tuple[list[dict], list[dict]]:
    """Rows of a folder to train on and to answer.

    Args:
        data_dir (path): folder with `rows*.jsonl`, whose rows then have a field `split`, or with `SPLIT.jsonl` or
            `NAME_SPLIT.jsonl` for each split.
        train (str): name of the split to train on.
        evaluation (str | Sequence[str]): name of the split to answer, or several, of which the first that exists is taken.

    Raises:
        InputError: if files or rows of a split are missing.
    """
    folder = Path(data_dir)
    wanted = [evaluation] if isinstance(evaluation, str) else list(evaluation)
    paths = sorted(folder.glob("rows*.jsonl"))
    if paths:
        splits = {}
        for row in (row for path in paths for row in read_jsonl(path)):
            splits.setdefault(str(row.get("split")), []).append(row)
        found = {name: splits[name] for name in (train, *wanted) if name in splits}
        files = ", ".join(path.name for path in paths)
        for names in ([train], wanted):
            if not any(name in found for name in names):
                raise InputError(f'{folder / files}: expected rows with "split": "{" or ".join(names)}", found none')
    else:
        found = {}
        for names in ([train], wanted):
            name, path = next(((name, path) for name in names for path in _split_files(folder, name)), (None, None))
            if path is None:
                raise InputError(
                    f"--data_dir {folder}: expected rows.jsonl with a field split, or {names[0]}.jsonl, found neither"
                    + (f" (nor {', '.join(names[1:])})" if names[1:] else "")
                )
            found[name] = read_jsonl(path)
    return found[train], next(found[name] for name in wanted if name in found)


def _split_files(folder: Path, split: str) -> list[Path]:
    if (folder / f"{split}.jsonl").exists():
        return [folder / f"{split}.jsonl"]
    paths = sorted(folder.glob(f"*_{split}.jsonl"))
    if len(paths) > 1:
        raise InputError(
            f"{folder}: expected one file for the split {split}, found {', '.join(path.name for path in paths)}"
        )
    return paths


def take(rows: Sequence, count: int | None) -> Sequence:
    """The first `count` rows of a list or of a `datasets.Dataset`; all of them without a count."""
    if count is None or count >= len(rows):
        return rows
    return rows[:count] if isinstance(rows, list) else rows.select(range(count))
