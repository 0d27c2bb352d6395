"""Checked rows as TRL's trainers want them: a `datasets.Dataset`, whose rows are made when they are asked for."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset


class LazyDataset(Dataset):
    """A data set that holds no row: TRL takes nothing but a `datasets.Dataset`, and pictures are decoded when their turn comes.

    Not `Dataset.with_transform`, which would pickle all that the rows are made of to give them a fingerprint.

    Args:
        count (int): its length, in rows.
        make_row (Callable): number of a row, from 0 -> the row.
        seed (int, optional): shuffles the rows, otherwise in each epoch; by default they stay in order. GRPO's own order of a
            later epoch is lost where a run goes on from a checkpoint.
    """

    def __init__(self, count: int, make_row: Callable[[int], dict[str, Any]], seed: int | None = None):
        super().__init__(Dataset.from_dict({"number": list(range(count))}).data)
        self.make_row, self.seed = make_row, seed
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Puts the rows into the order of an epoch; `StartEpoch` calls it."""
        numbers = np.arange(len(self))
        self.order = numbers if self.seed is None else np.random.default_rng([self.seed, epoch]).permutation(numbers)

    def __getitem__(self, key):
        """The row at a place, from 0."""
        return self.make_row(int(self.order[key]))

    def __getitems__(self, keys: list) -> list:
        return [self[key] for key in keys]

    def __iter__(self) -> Iterator:
        return (self[key] for key in range(len(self)))
