"""Rows of a task, checked before a model is loaded, as the features of a training data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback

from phi3v import Phi3VProcessor

from ..errors import InputError, ScriptError, describe_script_error
from .conversation import Conversation, check_conversation, check_unique_ids, control_tokens
from .encoding import check_length, count_tokens, encode_conversation
from .fingerprint import Fingerprint, fingerprint
from .images import load_images
from .reading import sample_rows, select, spread, where
from .schemas import row_id
from .shown import printable

# Rows whose texts are kept to show what has changed; of all others the digests are.
ROWS_WITH_TEXT = 10_000
MAX_BAD_ROWS = 0.01  # share of the rows


class DataArguments(Protocol):
    """The flags that `build_dataset` reads: do_train, max_length in tokens, eval_size in rows, and so on (see --help)."""

    do_train: bool
    data_dir: str | None
    max_length: int | None
    seed: int
    eval_size: int | None
    on_bad_row: str
    max_bad_rows: int | None


@dataclass
class BadRow:
    """A row that cannot be used: its split, its number from 0, where it stands, and what is wrong with it."""

    split: str
    index: int
    where: str
    message: str


@dataclass
class _Checked:
    """What one rank has found of its share of the rows, each with the row's number."""

    lengths: list[tuple[int, int]] = field(default_factory=list)
    fingerprints: list[tuple[int, Fingerprint]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    fault: tuple[int, str] | None = None  # of the script's own code


class ConversationDataset(torch.utils.data.Dataset):
    """Checked rows of a task as features for training; `build_dataset` makes one.

    Args:
        rows (Sequence): rows of the data set.
        to_conversation (Callable): row -> Conversation, the task's own.
        processor (Phi3VProcessor): its image processor's num_crops counts.
        lengths (Sequence[int]): length in tokens of each row, with its longest answers.
        max_length (int, optional): longest sample allowed, in tokens.
        seed (int): chooses among several answers, with the row's id and the epoch.
        fingerprints (list[Fingerprint]): of each row, on the first rank; empty on the others.
        bad_rows (list[BadRow]): rows that were left out.
        skip_bad (bool): a row that turns out to be damaged when it is read gives no sample, and a line; else an error.
    """

    def __init__(
        self,
        rows: Sequence,
        to_conversation: Callable[[Any], Conversation],
        processor: Phi3VProcessor,
        lengths: Sequence[int],
        max_length: int | None = None,
        seed: int = 0,
        fingerprints: Sequence[Fingerprint] = (),
        bad_rows: Sequence[BadRow] = (),
        skip_bad: bool = False,
    ):
        self.rows, self.to_conversation, self.processor = rows, to_conversation, processor
        self.lengths, self.max_length, self.seed = lengths, max_length, seed
        self.fingerprints, self.bad_rows, self.skip_bad = list(fingerprints), list(bad_rows), skip_bad
        # In shared memory, so that workers that live on from epoch to epoch see it too.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def start_epoch(self, epoch: int) -> None:
        """Makes the next epoch choose its own answers; `StartEpoch` calls it."""
        self._epoch.fill_(epoch)

    def sample(self, count: int) -> "ConversationDataset":
        """At most `count` of its rows, evenly spread."""
        if count >= len(self):
            return self
        numbers = spread(count, len(self))
        return ConversationDataset(
            select(self.rows, numbers),
            self.to_conversation,
            self.processor,
            [self.lengths[number] for number in numbers],
            self.max_length,
            self.seed,
            skip_bad=self.skip_bad,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | None) -> dict[str, Any] | None:
        """Features of a row, see `encode_conversation`; None for None, a place without a sample (see `StepSampler`)."""
        if index is None:
            return None
        conversation = self.to_conversation(self.rows[index])
        try:
            return encode_conversation(conversation, self.processor, self.max_length, int(self._epoch), self.seed)
        except InputError as error:
            if not self.skip_bad:
                raise
            print(f"skipped: {error}", flush=True)
            return None
        except Exception as error:
            # A worker's traceback alone does not say which row it was.
            raise RuntimeError(f"sample {conversation.id} cannot be encoded: {error!r}") from error


def build_dataset(
    rows: Sequence,
    to_conversation: Callable[[Any], Conversation],
    processor: Phi3VProcessor,
    args: DataArguments,
    split: str,
) -> ConversationDataset:
    """Checks all rows, each rank its share (texts, tags, image headers, lengths), and makes a data set of them.

    Args:
        rows (Sequence): rows of the data set, a list or a `datasets.Dataset`.
        to_conversation (Callable): row -> Conversation, the task's own; the same row must always give the same.
        processor (Phi3VProcessor): as for training.
        args (DataArguments): such as RecipeArguments.
        split (str): "train" or "eval".

    Raises:
        InputError: on every rank, for the first row that cannot be used, or with --on_bad_row skip for too many of them.
        ScriptError: on every rank, if `to_conversation` itself fails.
    """
    purpose = {"train": "to train on", "eval": "to answer"}[split]
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__") or isinstance(rows, (str, dict)):
        raise InputError(
            f"load_splits: expected a list or datasets.Dataset of rows {purpose}, found {type(rows).__name__}; list(...) makes one"
        )
    if split == "eval":
        rows = sample_rows(rows, args.eval_size)
    if split == "train" and args.do_train and not len(rows):
        raise InputError("load_splits: expected at least one row to train on, found none")
    state = PartialState()
    share = range(state.process_index, len(rows), state.num_processes)
    shares = gather_object([_check_share(rows, share, to_conversation, processor, args, split)])
    faults = [checked.fault for checked in shares if checked.fault]
    if faults:
        raise ScriptError(min(faults)[1])
    bad = sorted((row for checked in shares for row in checked.bad), key=lambda row: row.index)
    _refuse_bad_rows(bad, len(rows), args, purpose)
    known = sorted((pair for checked in shares for pair in checked.fingerprints), key=lambda pair: pair[0])
    check_unique_ids((found.id for _, found in known), lambda number: where(rows[known[number][0]], known[number][0]))
    lengths = _in_order(pair for checked in shares for pair in checked.lengths)
    fingerprints = [found for _, found in known]
    if bad:
        left_out = {row.index for row in bad}
        kept = [index for index in range(len(rows)) if index not in left_out]
        rows = select(rows, kept)
    skip = args.on_bad_row == "skip"
    return ConversationDataset(
        rows,
        to_conversation,
        processor,
        lengths,
        args.max_length,
        args.seed,
        fingerprints if state.is_main_process else (),
        bad,
        skip,
    )


def _in_order(pairs) -> list:
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


def _check_share(rows, share, to_conversation, processor, args: DataArguments, split: str) -> _Checked:
    checked, skip = _Checked(), args.on_bad_row == "skip"
    for index in share:
        row = rows[index]
        place, name = where(row, index), row_id(row)
        name = place if name is None else f"{place} (id {printable(name)})"
        try:
            length, known = _check_row(row, to_conversation, processor, args, skip and split == "eval")
            if index == share[0] and fingerprint(to_conversation(row), args.data_dir) != known:
                raise InputError(
                    "to_conversation: expected the same conversation each time that it gets the same row, found another; "
                    "several acceptable answers go into Turn(answers=[...])"
                )
        except InputError as error:
            checked.bad.append(BadRow(split, index, place, f"{place}: {error}"))
            if not skip:
                break
            continue
        except Exception as error:
            text = describe_script_error(error, name)
            if text is None:
                raise
            checked.fault = index, text
            break
        if index >= ROWS_WITH_TEXT:
            known.text = ""
        checked.lengths.append((index, length))
        checked.fingerprints.append((index, known))
    return checked


def _check_row(row, to_conversation, processor, args: DataArguments, decode: bool) -> tuple[int, Fingerprint]:
    """The row's length in tokens, with its longest answers, and its fingerprint."""
    conversation = to_conversation(row)
    check_conversation(conversation, control_tokens(processor.tokenizer))
    length = count_tokens(conversation, processor)
    check_length(length, args.max_length, f"sample {printable(conversation.id)}")
    if decode:
        load_images(conversation)
    return length, fingerprint(conversation, args.data_dir)


def _refuse_bad_rows(bad: list[BadRow], count: int, args: DataArguments, purpose: str) -> None:
    if not bad:
        return
    if args.on_bad_row == "stop":
        raise InputError(bad[0].message)
    most = int(count * MAX_BAD_ROWS) if args.max_bad_rows is None else args.max_bad_rows
    if PartialState().is_main_process:
        for row in bad:
            print(f"skipped: {row.message}", flush=True)
        print(f"skipped {len(bad)} of {count} rows {purpose}", flush=True)
    if len(bad) > most:
        raise InputError(
            f"expected at most {most} bad rows of {count} {purpose}, found {len(bad)}, first {bad[0].message}; --max_bad_rows "
            f"{len(bad)} takes them all"
        )
    if len(bad) == count:
        raise InputError(f"expected at least one row {purpose} that can be used, found none: {bad[0].message}")


class StartEpoch(TrainerCallback):
    """Tells the training data set which epoch begins. accelerate's data loader tells a data set only in some set-ups."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        """A resumed run begins in the middle of an epoch: `state.epoch` is then a fraction."""
        train_dataloader.dataset.start_epoch(int(state.epoch or 0))
