"""Rows of a Parquet file, by the `datasets` library, which keeps a copy as Arrow that is mapped into memory."""

import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .files import check_regular_file
from .hub import quietly
from .rows import Row, resolve_images
from .schemas import sample_name
from .shown import printable

if TYPE_CHECKING:
    from datasets import Dataset


class ArrowRows(Sequence[Row]):
    """Rows of a `datasets.Dataset` as plain values, whatever features it declares: an image is not decoded here.

    Args:
        dataset (Dataset): the rows.
        name (str): what messages call it, before ", row 17".
    """

    def __init__(self, dataset: "Dataset", name: str):
        self._name, self._table = name, dataset.with_format("arrow")
        self._narrow: dict[tuple[str, ...], Dataset] = {}

    def __len__(self) -> int:
        return len(self._table)

    def number(self, index: int) -> int:
        """What a row without an id is called by: its number, from 1."""
        return index + 1

    def values(self, index: int, only: Sequence[str] | None = None) -> Row:
        """A row whose pictures' paths are as they stand in the file.

        Args:
            index (int): its number, from 0.
            only (Sequence[str], optional): columns that are enough; the bytes of pictures need not be read then.
        """
        table = self._table
        if only is not None:
            kept = tuple(name for name in table.column_names if name in only)
            table = self._narrow.get(kept) or self._narrow.setdefault(kept, table.select_columns(list(kept)))
        [row] = table[index : index + 1].to_pylist() or [{}]
        return Row(_plain(row), f"{self._name}, row {index + 1}")

    def __getitem__(self, index: Any) -> Any:
        return self.values(index)


class ParquetFile(ArrowRows):
    """Rows of a Parquet file; pictures are paths relative to its folder, or {"bytes", "path"} as the hub stores them.

    The copy lies in the library's cache ($HF_DATASETS_CACHE), made once for a file of this name, size and time, by one process
    while the others wait.

    Args:
        path (Path): the file.

    Raises:
        InputError: if it cannot be read; when a row is, with file, row from 1 and field, if a path leaves the folder.
    """

    def __init__(self, path: Path):
        check_regular_file(path, "a Parquet file")
        super().__init__(_load(path), printable(os.fspath(path)))
        self._folder = path.parent
        if not len(self._table):
            raise InputError(f"{self._name}: expected at least one row, found none")

    def __getitem__(self, index: Any) -> Any:
        row = self.values(index)
        try:
            return Row(resolve_images(row, self._folder), row.where)
        except InputError as error:
            raise InputError(f"{row.where}: {sample_name(row)}{error}") from None


def _plain(value: Any) -> Any:
    """The value with a path in place of a picture that has no bytes, and without the images that a turn does not have."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"bytes", "path"} and value["bytes"] is None:
        return value["path"]
    return {
        key: _plain(item) for key, item in value.items() if not (key == "images" and item is None and "user" in value)
    }


def _load(path: Path) -> "Dataset":
    # Not above: it takes seconds, and most folders hold no Parquet.
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    def load(cache_dir: str | None) -> Any:
        return quietly(load_dataset, "parquet", data_files=[str(path)], split="train", cache_dir=cache_dir)

    try:
        try:
            return load(None)
        except OSError as error:
            found = f"the cache of data sets cannot be written ({error.strerror or error}): {path.name} is copied for this run alone"
            print(f"warning: {found}", flush=True)
            return load(_own_cache().name)
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{printable(str(path))}: expected a Parquet file, found: {printable(reason[0])}") from None


@cache
def _own_cache() -> tempfile.TemporaryDirectory:
    """A folder that is gone when the process ends."""
    return tempfile.TemporaryDirectory(prefix="phi3v-parquet-")
