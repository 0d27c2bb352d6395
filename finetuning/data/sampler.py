"""The order of the samples: what forms an optimizer step, and how a step is dealt to ranks and micro-batches."""

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count, islice

import torch


class BalancedSampler(torch.utils.data.Sampler):
    """The order of another sampler, its samples arranged by length within each optimizer step.

    The ranks wait for each other, so micro-batches that are run at the same time should cost the same. Padded, samples of like
    length share a micro-batch, so that little is padded. Padding-free, micro-batches get like sums of lengths, which bounds
    the memory too. The loss is normalised over the step: another arrangement of its samples changes nothing but rounding.

    Args:
        sampler (Sampler): settles which samples form a step.
        length (Callable): index of a sample -> its length in tokens, in the epoch that runs.
        batch_size (int): samples of an optimizer step, ranks x micro-batch x accumulation.
        micro_batch (int): samples at once on each rank.
        ranks (int): processes to which the micro-batches are dealt in turns.
        padding_free (bool): a micro-batch costs the sum of its lengths, not its longest length for each sample.
    """

    def __init__(
        self, sampler, length: Callable[[int], int], batch_size: int, micro_batch: int, ranks: int, padding_free: bool
    ):
        self.sampler, self.length, self.batch_size = sampler, length, batch_size
        self.micro_batch, self.ranks, self.padding_free = micro_batch, ranks, padding_free

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        order = iter(self.sampler)
        for step in count():
            samples = list(islice(order, self.batch_size))
            if len(samples) < self.batch_size:
                yield from samples
                return
            samples.sort(key=self.length, reverse=True)
            groups = self._balance(samples) if self.padding_free else cut(samples, self.micro_batch)
            for number, dealt in enumerate(cut(groups, self.ranks)):
                # Turned from step to step: else the workers of one rank would prepare the longest samples of every step. Every
                # other time from behind, so that the ranks' sums are alike too: without DeepSpeed they wait once a step.
                dealt = dealt[:: -1 if number % 2 else 1]
                turn = step % self.ranks
                for group in dealt[turn:] + dealt[:turn]:
                    yield from group

    def _balance(self, samples: list[int]) -> list[list[int]]:
        """Micro-batches of like sums, the largest first: each sample, longest first, joins the smallest that is not full."""
        smallest, full = [(0, number, []) for number in range(len(samples) // self.micro_batch)], []
        for sample in samples:
            total, number, group = heappop(smallest)
            group.append(sample)
            grown = (total + self.length(sample), number, group)
            if len(group) < self.micro_batch:
                heappush(smallest, grown)
            else:
                full.append(grown)
        return [group for _, _, group in sorted(full, reverse=True)]


def cut(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]
