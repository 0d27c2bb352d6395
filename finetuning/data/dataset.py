"""Rows of a task, checked before a model is loaded, as the features of a training data set."""

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback
from xxhash import xxh3_64_intdigest

from phi3v import Phi3VProcessor

from ..errors import InputError, ScriptError
from .checking import BLOCK, BadRow, Checked, Checker, join
from .conversation import Conversation, check_unique_ids
from .encoding import encode_conversation
from .fingerprint import Fingerprint, Fingerprints
from .length_cache import UNKNOWN, LengthCache, cache_file
from .mixture import Mixture
from .reading import sample_rows, select, spread, where

# Rows whose texts are kept to show what has changed; of all others the digests are.
ROWS_WITH_TEXT = 10_000
MAX_BAD_ROWS = 0.01  # share of the rows
SAMPLED_ROWS = 10_000  # of --check sample
BLOCKS = 50  # blocks of each rank between two exchanges of what was found


class DataArguments(Protocol):
    """The flags that `build_dataset` reads: do_train, max_length in tokens, eval_size in rows, and so on (see --help)."""

    do_train: bool
    data_dir: Any  # a folder, several of them, or None
    max_length: int | None
    seed: int
    eval_size: int | None
    on_bad_row: str
    max_bad_rows: int | None


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
        mixture (Mixture, optional): which rows an epoch trains; by default every row once.
        sources (Mapping[str, int], optional): name of each place that rows come from, see `Conversation.source` -> its rows.
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
        mixture: Mixture | None = None,
        sources: Mapping[str, int] | None = None,
    ):
        self.rows, self.to_conversation, self.processor = rows, to_conversation, processor
        self.lengths, self.max_length, self.seed = lengths, max_length, seed
        self.fingerprints, self.bad_rows, self.skip_bad = Fingerprints.of(fingerprints), list(bad_rows), skip_bad
        self.mixture, self.sources = mixture, dict(sources or {})
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

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch."""
        return len(self.rows) if self.mixture is None else len(self.mixture)

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
        # What `load_dataset(streaming=True)` gives: too large for a list, or it would not be streamed.
        streamed = type(rows).__name__ == "IterableDataset"
        cure = "load_dataset without streaming=True keeps the rows on the disk" if streamed else "list(...) makes one"
        raise InputError(
            f"load_splits: expected a list or datasets.Dataset of rows {purpose}, found {type(rows).__name__}; {cure}"
        )
    if split == "eval":
        rows = sample_rows(rows, args.eval_size)
    if split == "train" and args.do_train and not len(rows):
        raise InputError("load_splits: expected at least one row to train on, found none")
    given = getattr(args, "data_dir", None) or os.path.basename(sys.argv[0])
    places = [os.path.realpath(place) for place in ([given] if isinstance(given, str) else given)]
    cache = LengthCache(cache_file(processor, *places, split))
    checker = Checker(rows, to_conversation, processor, args, split, cache, ROWS_WITH_TEXT)
    # Else a quarter of the time is the garbage collector's, which looks at all that the libraries have made again and again.
    gc.freeze()
    try:
        found = _check_together(checker, args)
    finally:
        gc.unfreeze()
    _refuse_bad_rows(found.bad, len(rows), args, purpose)
    numbers = found.numbers
    hashes = np.fromiter((xxh3_64_intdigest(name.encode()) for (name,) in found.fingerprints.values("id")), np.uint64)
    if len(np.unique(hashes)) < len(numbers):
        ids = (name for (name,) in found.fingerprints.values("id"))
        check_unique_ids(ids, lambda place: where(rows[int(numbers[place])], int(numbers[place])))
    _keep_lengths(cache, found)
    return ConversationDataset(
        select(rows, numbers.tolist()) if found.bad else rows,
        to_conversation,
        processor,
        _known_lengths(found.lengths),
        args.max_length,
        args.seed,
        found.fingerprints if PartialState().is_main_process else (),
        found.bad,
        args.on_bad_row == "skip",
        _mixture(found.sources, args) if split == "train" else None,
        Counter(found.sources),
    )


def _mixture(sources: Sequence[str], args: DataArguments) -> Mixture | None:
    """None where every row is trained once."""
    shares = getattr(args, "shares", {})
    if shares is not None and all(share == 1 for share in shares.values()):
        return None
    return Mixture(sources, shares, args.seed)


def _check_together(checker: Checker, args: DataArguments) -> Checked:
    """What all ranks find of all rows, each of its blocks: in rounds, so that the first bad row is told before all are read."""
    state, size = PartialState(), len(checker.rows)
    counted = _counted(getattr(args, "check", "all"), size)
    # Few rows are dealt to all ranks too.
    block = max(1, min(BLOCK, -(-size // state.num_processes)))
    rounds = [checker.check([], counted)]
    for start in range(0, size, block * state.num_processes * BLOCKS):
        mine = []
        for turn in range(BLOCKS):
            first = start + (turn * state.num_processes + state.process_index) * block
            mine.append(checker.check(range(first, min(first + block, size)), counted))
            if mine[-1].fault or (mine[-1].bad and args.on_bad_row == "stop"):
                break
        shares = gather_object([mine])
        # As they were dealt: the first block of each rank, the second of each, ...
        dealt = [blocks[turn] for turn in range(BLOCKS) for blocks in shares if turn < len(blocks)]
        faults = [found.fault for found in dealt if found.fault]
        if faults:
            raise ScriptError(min(faults)[1])
        rounds.append(join(dealt))
        # Many small tables hold several times the memory of one.
        rounds[-1].fingerprints = Fingerprints(rounds[-1].fingerprints.table.combine_chunks())
        if args.on_bad_row == "stop" and rounds[-1].bad:
            break
    return join(rounds)


def _counted(check: str, size: int) -> Callable[[int], bool]:
    """Whether the picture of a row is opened and its tokens are counted, by its number."""
    if check == "sample" and size > SAMPLED_ROWS:
        return set(spread(SAMPLED_ROWS, size)).__contains__
    return lambda _: check != "none"


def _keep_lengths(cache: LengthCache, found: Checked) -> None:
    """Writes the lengths for the next start, on the first rank of each machine; a run goes on where it cannot."""
    known = found.lengths != UNKNOWN
    if os.environ.get("LOCAL_RANK", "0") != "0" or not found.counted:
        return
    try:
        cache.write(found.keys[known], found.lengths[known])
        problem = f"{cache.path} was damaged ({cache.damage}): all lengths were counted anew" if cache.damage else None
    except OSError as error:
        problem = f"{cache.path.parent}: lengths cannot be kept for the next start ({error.strerror})"
    if problem:
        print(f"warning: {problem}", flush=True)


def _known_lengths(lengths: np.ndarray) -> list[int]:
    """The lengths, in place of one that was not counted the mean of the others; each number is held once."""
    known = lengths[lengths != UNKNOWN]
    mean = int(known.mean()) if len(known) else 1
    filled = np.where(lengths == UNKNOWN, mean, lengths)
    shared = list(range(int(filled.max(initial=0)) + 1))
    return [shared[length] for length in filled]


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
