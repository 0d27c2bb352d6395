"""Files of one's own data: which there are, the split of each, and their rows with an id, named columns and whole paths."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .csv_file import CsvFile
from .json_list import JsonListFile
from .jsonl import JsonlFile
from .known_forms import is_question, locate_pictures
from .parquet import ParquetFile
from .rows import Row
from .schemas import row_id, sample_name
from .shown import printable, shown

KINDS = {".jsonl": JsonlFile, ".parquet": ParquetFile, ".csv": CsvFile, ".tsv": CsvFile, ".json": JsonListFile}
TRAIN = "train"
# The best first.
EVALUATION = ("test", "val", "validation", "dev", "eval")
PICTURE_NAME = re.compile(r".+\.(jpe?g|png|webp|bmp|gif|tiff?|ppm)", re.IGNORECASE)
CLIP_NAME = re.compile(r".+\.(avi|mp4|mkv|webm|mov|m4v|mpe?g|wmv|flv|3gp|ogv)", re.IGNORECASE)
READ = ("id", "question", "answer", "answers", "split")
LOOKED_AT = 100  # first rows of a file, in which a column that --columns names must occur


class OwnRows(Sequence[Row]):
    """Rows of a file in any of the known forms; each is read when it is asked for.

    Args:
        file (Sequence): gives rows by number, as they stand there.
        name (str): stem of the file; a row without an id of its own is called NAME-LINE.
        folder (path): what paths of pictures are relative to.
        columns (Mapping[str, str]): field of a known form -> name of the column that holds it.
        num_frames (int): frames of a clip.

    Raises:
        InputError: if a column that is not read holds pictures.
    """

    def __init__(self, file: Any, name: str, folder: str | os.PathLike, columns: Mapping[str, str], num_frames: int):
        self._file, self._folder, self._columns, self._num_frames = file, folder, columns, num_frames
        self._name = name
        self._text_only = isinstance(file, CsvFile)
        # Numbers of rows whose id another row has; the name of the source, where there are several, stands before the id of each.
        self.renamed: set[int] = set()
        self.source = ""
        self._check()

    def __len__(self) -> int:
        return len(self._file)

    def number(self, index: int) -> int:
        """What a row without an id is called by, from 1: its line, or its number where the file has no lines."""
        return self._file.number(index)

    def values(self, index: int, only: Sequence[str] | None = None) -> Row:
        """A row with its columns called as the forms call them, and an id; its paths are as they stand in the file."""
        if only is not None:
            only = tuple(self._columns.get(name, name) for name in only)
        raw = self._file.values(index, only)
        row = name_columns(raw, self._columns)
        if self._text_only:
            row = {name: _listed(value, name, raw.where) for name, value in row.items()}
        if row.get("id") is None or index in self.renamed:
            row["id"] = f"{self._name}-{self.number(index)}"
        if self.source and (name := row_id(row)):
            row["id"] = f"{self.source}/{name}"
        return Row(row, raw.where, self.source)

    def __getitem__(self, index: Any) -> Any:
        row = self.values(index)
        try:
            return Row(locate_pictures(row, self._folder, self._num_frames), row.where, row.source)
        except InputError as error:
            raise InputError(f"{row.where}: {sample_name(row)}{error}") from None

    def _check(self) -> None:
        rows = []
        for index in range(min(LOOKED_AT, len(self))):
            try:
                rows.append(self._file.values(index))
            except InputError:  # told when all rows are checked
                continue
        check_pictures(rows, self._columns)
        # A column need not be in every file.
        self.missing = missing_columns(rows, self._columns)


def name_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with its columns called as the forms call them; `columns` as of `OwnRows`."""
    if not columns:
        return dict(row)
    named = {name: value for name, value in row.items() if name not in columns.values()}
    return named | {field: row[column] for field, column in columns.items() if column in row}


def missing_columns(rows: Sequence[Row], columns: Mapping[str, str]) -> dict[str, str]:
    """Field -> message, of each column of `columns` that occurs in none of the first rows of a file."""
    if not rows:
        return {}
    found = f"found {printable(', '.join(map(str, rows[0])), 120)} ({rows[0].where})"
    return {
        field: f"--columns {field}={column}: expected a column of that name, {found}"
        for field, column in columns.items()
        if not any(column in row for row in rows)
    }


def check_pictures(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Checks the first rows of a file as they stand there: no column that is not read seems to hold their pictures.

    Raises:
        InputError: with the row's place; training would go on with the texts alone.
    """
    for raw in rows:
        row = name_columns(raw, columns)
        if not is_question(row):
            continue
        for kind, field, is_one in (("pictures", "image", _is_picture), ("clips", "video", _is_clip)):
            if not {field, f"{field}s"}.isdisjoint(row):
                continue
            column = next((name for name, value in row.items() if name not in READ and is_one(value)), None)
            if column is not None:
                raise InputError(
                    f"{raw.where}: expected {kind} in a column {field} or {field}s, found them in {shown(column)}; --columns "
                    f"{field}={column} says so"
                )


def _is_picture(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, str) and PICTURE_NAME.fullmatch(value) is not None


def _is_clip(value: Any) -> bool:
    return isinstance(value, str) and CLIP_NAME.fullmatch(value) is not None


def _listed(value: Any, name: str, where: str) -> Any:
    """What a csv file holds in the columns images, videos and answers: a text, or several as a JSON list."""
    if name not in ("images", "videos", "answers") or not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f'{where}: {name}: expected a JSON list such as ["a", "b"], found {shown(value)}: {error}'
        ) from None


def data_files(path: Path) -> list[Path]:
    """The files with rows: the file itself, or those of a folder, which are all of one kind; a json file beside others is none.

    Raises:
        InputError: if there is none, or of several kinds.
    """
    if path.is_file():
        if path.suffix not in KINDS:
            raise InputError(f"{printable(str(path))}: expected a file of {', '.join(KINDS)}, found another")
        return [path]
    folders = [path, path / "data"]
    found: dict[str, list[Path]] = {}
    for folder in folders:
        found = {kind: files for kind in KINDS if (files := sorted(folder.glob(f"*{kind}")))}
        if found:
            break
    if not found:
        raise InputError(
            f"{printable(str(path))}: expected files with rows ({', '.join(KINDS)}) in this folder, found none"
        )
    if len(found) > 1:
        found.pop(".json", None)
    if len(found) > 1:
        names = printable(" and ".join(files[0].name for files in found.values()))
        raise InputError(
            f"{printable(str(path))}: expected files of one kind, found {names}; name the file that holds your rows instead of the folder"
        )
    return next(iter(found.values()))


def split_of(path: Path, names: Sequence[str] = EVALUATION) -> str:
    """The one of `names` with which a file's name ends: test of test.csv, my-test.jsonl and test-00000-of-00002.parquet; else train."""
    stem = re.sub(r"-\d+-of-\d+$", "", path.stem)
    last = re.split(r"[_.\-]", stem)[-1].lower()
    return last if last in names else TRAIN


def open_file(path: Path, columns: Mapping[str, str], num_frames: int) -> OwnRows:
    """The rows of a file."""
    kind: Any = KINDS[path.suffix]
    return OwnRows(kind(path), path.stem, path.parent, columns, num_frames)
