"""Rows of a task as the features of a training data set."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback

from phi3v import Phi3VProcessor

from ..errors import InputError
from .conversation import Conversation, check_conversation, control_tokens
from .encoding import check_length, count_tokens, encode_conversation


class ConversationDataset(torch.utils.data.Dataset):
    """Rows of a task as features for training.

    Args:
        rows (Sequence): rows of the data set.
        to_conversation (Callable): row -> Conversation, the task's own.
        processor (Phi3VProcessor): its image processor's num_crops counts.
        max_length (int, optional): longest sample allowed, in tokens.
        seed (int): chooses among several answers, with the row's id and the epoch.
        batch_size (int): effective batch. The last optimizer step of an epoch is filled up with rows of the same epoch, others
            in each, so that every step sees exactly this many samples however they are split into ranks and micro-batches.
    """

    def __init__(
        self,
        rows: Sequence,
        to_conversation: Callable[[Any], Conversation],
        processor: Phi3VProcessor,
        max_length: int | None = None,
        seed: int = 0,
        batch_size: int = 1,
    ):
        self.rows, self.to_conversation, self.processor = rows, to_conversation, processor
        self.max_length, self.seed, self.batch_size = max_length, seed, batch_size
        # Of the rows, in tokens, with their longest answers; `check` counts them.
        self.lengths: list[int] | None = None
        # In shared memory, so that workers that live on from epoch to epoch see it too.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def start_epoch(self, epoch: int) -> None:
        """Makes the next epoch choose its own answers; `StartEpoch` calls it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size) * self.batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        conversation = self.to_conversation(self.rows[self._row(index)])
        try:
            return encode_conversation(conversation, self.processor, self.max_length, int(self._epoch), self.seed)
        except InputError:
            raise
        except Exception as error:
            # A worker's traceback alone does not say which row it was.
            raise RuntimeError(f"sample {conversation.id} cannot be encoded: {error!r}") from error

    def length(self, index: int) -> int:
        """Length in tokens, with its longest answers, of the row that `index` stands for in this epoch, see `check`."""
        return self.lengths[self._row(index)]

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if index < len(self.rows):
            return index
        return (index + int(self._epoch) * (len(self) - len(self.rows))) % len(self.rows)

    def check(self) -> None:
        """Checks all rows before a model is loaded, each rank its share: texts, tags, image headers, lengths, which are kept.

        Raises:
            InputError: for the first row that cannot be used, on every rank.
        """
        state, found, lengths = PartialState(), [], []
        for index in range(state.process_index, len(self.rows), state.num_processes):
            try:
                lengths.append(self._check_row(index))
            except InputError as error:
                found.append((index, str(error)))
                break
        found = gather_object(found)
        if found:
            raise InputError(min(found)[1])
        shares = gather_object([lengths])
        self.lengths = [0] * len(self.rows)
        for rank, share in enumerate(shares):
            self.lengths[rank :: len(shares)] = share

    def _check_row(self, index: int) -> int:
        """Returns the row's length in tokens, with its longest answers."""
        row = self.rows[index]
        try:
            conversation = self.to_conversation(row)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            name = f"sample {row['id']}" if "id" in row else f"row {index + 1}"
            raise InputError(
                f"{name}: expected the fields that this script's docstring names, found {', '.join(row)} ({error!r})"
            ) from None
        check_conversation(conversation, control_tokens(self.processor.tokenizer))
        try:
            length = count_tokens(conversation, self.processor)
        except InputError as error:
            raise InputError(f"sample {conversation.id}: {error}") from None
        check_length(length, self.max_length, f"sample {conversation.id}")
        return length


class StartEpoch(TrainerCallback):
    """Tells the training data set which epoch begins. accelerate's data loader tells a data set only in some set-ups."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        """A resumed run begins in the middle of an epoch: `state.epoch` is then a fraction."""
        train_dataloader.dataset.start_epoch(int(state.epoch or 0))
