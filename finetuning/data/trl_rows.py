"""Checked rows as TRL's trainers want them: a `datasets.Dataset`, whose rows are made when they are asked for."""

from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset


class LazyDataset(Dataset):
    """A data set that holds no row: TRL takes nothing but a `datasets.Dataset`, and pictures are decoded when their turn comes.

    Not `Dataset.with_transform`, which would pickle all that the rows are made of to give them a fingerprint.

    Args:
        count (int): its length, in rows.
        make_row (Callable): number of a row, from 0 -> the row.
    """

    def __init__(self, count: int, make_row: Callable[[int], dict[str, Any]]):
        super().__init__(Dataset.from_dict({"number": list(range(count))}).data)
        self.make_row = make_row

    def __getitem__(self, key):
        """The row of a number."""
        return self.make_row(key)

    def __getitems__(self, keys: list) -> list:
        return [self.make_row(key) for key in keys]

    def __iter__(self) -> Iterator:
        return (self.make_row(number) for number in range(len(self)))
