"""A mixture of sources: how many rows of each an epoch trains, and which."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch


class Mixture:
    """Which rows each epoch trains, where sources do not give all of their rows once.

    The rows of a source stand in one order, drawn by the seed; each epoch takes on where the one before has stopped, and
    begins again at the end. So a share of 2 gives each row twice, 1.5 each once and half of them once more, 0.5 one half and
    the other half in the next epoch: all rows come equally often, up to one time.

    Args:
        sources (Sequence[str]): for each row the name of its source.
        shares (Mapping[str, float], optional): name of a source -> samples that it gives to an epoch, as a share of its rows;
            1 for one that is not named. None: all sources give equally many, together as many as there are rows.
        seed (int): draws the orders.
    """

    def __init__(self, sources: Sequence[str], shares: Mapping[str, float] | None, seed: int = 0):
        self.names = list(dict.fromkeys(sources))
        codes = {name: code for code, name in enumerate(self.names)}
        of_row = torch.tensor([codes[name] for name in sources], dtype=torch.long)
        self.rows = np.bincount(of_row.numpy(), minlength=len(self.names)).tolist()
        if shares is None:
            shares = {name: len(sources) / len(codes) / rows for name, rows in zip(self.names, self.rows, strict=True)}
        # Rounded up, so that a share of 0.5 takes two epochs, not three, through an odd number of rows.
        self.samples = [
            math.ceil(round(shares.get(name, 1) * rows, 6)) for name, rows in zip(self.names, self.rows, strict=True)
        ]
        self._orders = []
        for code, rows in enumerate(self.rows):
            shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + code))
            self._orders.append(torch.nonzero(of_row == code).flatten()[shuffled])

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self.samples)

    def epoch(self, number: int) -> torch.Tensor:
        """Numbers of the rows of an epoch, from 0, one source after another."""
        parts = []
        for order, samples in zip(self._orders, self.samples, strict=True):
            places = torch.arange(number * samples, (number + 1) * samples) % len(order)
            parts.append(order[places])
        return torch.cat(parts)


class MixtureSampler(torch.utils.data.Sampler):
    """The rows of an epoch of a mixture in an order of their own for each epoch.

    Args:
        mixture (Mixture): the rows.
        seed (int): of the orders.
    """

    def __init__(self, mixture: Mixture, seed: int):
        self.mixture, self.seed, self.epoch = mixture, seed, 0

    def __len__(self) -> int:
        return len(self.mixture)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rows = self.mixture.epoch(self.epoch)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        yield from rows[order].tolist()
