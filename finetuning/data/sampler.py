"""The order of the samples: which of them form an optimizer step, and how a step is dealt to ranks and micro-batches."""

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count, islice

import torch


class StepSampler(torch.utils.data.Sampler):
    """The order of another sampler, cut into optimizer steps, each dealt to the micro-batches of all ranks.

    Every sample comes once an epoch: the last step of an epoch holds what is left, in as few rounds as that needs. A place
    in a micro-batch that no sample fills is None; `DataCollatorForPhi3V` leaves it out, or masks it where a rank has no
    sample at all, since each rank must take part in each round.

    Within a step the samples are arranged by length. The ranks wait for each other, so micro-batches that are run at the same
    time should cost the same. Padded, samples of like length share a micro-batch, so that little is padded. Padding-free,
    micro-batches get like sums of lengths, which bounds the memory too. The loss is normalised over the step: another
    arrangement of its samples changes nothing but rounding.

    Args:
        order (Sampler): the samples of an epoch, whose order settles which of them form a step.
        length (Callable): index of a sample -> its length in tokens.
        batch_size (int): samples of an optimizer step.
        micro_batch (int): most samples at once on each rank.
        ranks (int): processes to which the micro-batches are dealt in turns.
        padding_free (bool): a micro-batch costs the sum of its lengths, not its longest length for each sample.
        drop_last (bool): leave out the last step of an epoch if it is not full.
    """

    def __init__(
        self,
        order,
        length: Callable[[int], int],
        batch_size: int,
        micro_batch: int,
        ranks: int,
        padding_free: bool = False,
        drop_last: bool = False,
    ):
        self.order, self.length, self.batch_size = order, length, batch_size
        self.micro_batch, self.ranks, self.padding_free, self.drop_last = micro_batch, ranks, padding_free, drop_last

    def __len__(self) -> int:
        """Places in the micro-batches of an epoch, those that stay empty included."""
        steps, left = divmod(len(self.order), self.batch_size)
        rounds = steps * self._rounds(self.batch_size) + (0 if self.drop_last else self._rounds(left))
        return rounds * self.ranks * self.micro_batch

    def _rounds(self, samples: int) -> int:
        return -(-samples // (self.ranks * self.micro_batch))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int | None]:
        order = iter(self.order)
        for step in count():
            samples = list(islice(order, self.batch_size))
            if not samples or (self.drop_last and len(samples) < self.batch_size):
                return
            groups = self._deal(samples, self._rounds(len(samples)) * self.ranks)
            for number in range(0, len(groups), self.ranks):
                dealt = groups[number : number + self.ranks]
                # Rotated from step to step: else the workers of one rank would prepare the longest samples of every step.
                # Every other round reversed, so that the ranks' sums are alike too: without DeepSpeed they wait once a step.
                dealt = dealt[:: -1 if number // self.ranks % 2 else 1]
                turn = step % self.ranks
                for group in dealt[turn:] + dealt[:turn]:
                    yield from group
                    yield from [None] * (self.micro_batch - len(group))

    def _deal(self, samples: list[int], groups: int) -> list[list[int]]:
        samples = sorted(samples, key=self.length, reverse=True)
        if self.padding_free:
            return self._balance(samples, groups)
        # The longest ones in the smaller micro-batches, where the sizes differ.
        small, larger = divmod(len(samples), groups)
        rest = iter(samples)
        return [list(islice(rest, small + (number >= groups - larger))) for number in range(groups)]

    def _balance(self, samples: list[int], groups: int) -> list[list[int]]:
        """Micro-batches of like sums, the largest first: each sample, longest first, joins the smallest that is not full."""
        smallest: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(groups)]
        full: list[tuple[int, int, list[int]]] = []
        for sample in samples:
            total, number, group = heappop(smallest)
            group.append(sample)
            grown = (total + self.length(sample), number, group)
            if len(group) < self.micro_batch:
                heappush(smallest, grown)
            else:
                full.append(grown)
        return [group for _, _, group in sorted(full + smallest, reverse=True)]
