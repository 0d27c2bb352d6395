"""Answers over all ranks, in rounds: every rank a batch at a time, side by side, in order."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from ..training.signals import spare_workers

Answer = TypeVar("Answer")


def answer_in_rounds(
    prompts: Dataset,
    collate: Callable[[list], Any],
    todo: Sequence[int],
    batch_size: int,
    workers: int,
    answer: Callable[[list[int], Any], list[Answer]],
) -> Iterator[list[tuple[int, Answer]]]:
    """Answers the prompts `todo`; yields those of each round, with their numbers, on every rank and in the order of `todo`.

    Round k covers the next `ranks x batch_size` prompts; a rank without any in the last round still takes part.

    Args:
        prompts (Dataset): number of a prompt -> what `collate` takes.
        collate (Callable): list of prompts -> inputs of the model; never called without a prompt.
        todo (Sequence[int]): numbers of the prompts to answer.
        batch_size (int): prompts at once on each rank.
        workers (int): processes of each rank that prepare prompts.
        answer (Callable): numbers and inputs of a batch -> its answers.
    """
    state = PartialState()
    ranks, rank = state.num_processes, state.process_index
    starts = range(rank * batch_size, -(-len(todo) // (ranks * batch_size)) * ranks * batch_size, ranks * batch_size)
    batches = [list(todo[start : start + batch_size]) for start in starts]
    loader: DataLoader = DataLoader(
        prompts,
        batch_sampler=batches,
        collate_fn=lambda batch: collate(batch) if batch else None,
        num_workers=workers if todo else 0,
        # Its own: the run's random numbers stay as they are.
        generator=torch.Generator(),
    )
    spare_workers(loader)
    for batch, inputs in zip(batches, loader, strict=True):
        pairs = list(zip(batch, answer(batch, inputs), strict=True)) if batch else []
        yield gather_object(pairs) if ranks > 1 else pairs
