"""What is checked of each row before a model is loaded, and what a start keeps of it: its fingerprint and its length."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from phi3v import Phi3VProcessor

from ..errors import InputError, describe_script_error
from .conversation import Conversation, check_conversation, control_tokens
from .encoding import check_length, count_tokens, image_tokens
from .fingerprint import Fingerprint, Fingerprints, fingerprint
from .images import image_size, image_sizes, load_images
from .length_cache import UNKNOWN, LengthCache, key_of
from .lengths import conversation_lengths
from .rows import where
from .schemas import row_id
from .shown import printable

BLOCK = 1000  # rows checked together: their texts go to the tokenizer in one call


@dataclass
class BadRow:
    """A row that cannot be used: its split, its number from 0, where it stands, and what is wrong with it."""

    split: str
    index: int
    where: str
    message: str


@dataclass
class Checked:
    """What is found of some rows: number, length in tokens (`UNKNOWN`: not counted), key and source of each good one, and the bad ones."""

    numbers: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    sources: list[str]
    fingerprints: Fingerprints
    bad: list[BadRow] = field(default_factory=list)
    fault: tuple[int, str] | None = None  # of the script's own code
    counted: int = 0  # lengths that were not in the cache


@dataclass
class _Good:
    index: int
    where: str
    conversation: Conversation
    known: Fingerprint


class Checker:
    """Checks rows of a split, a block at a time: fields, texts and tags, image headers, lengths.

    Args:
        rows (Sequence): rows of the split.
        to_conversation (Callable): row -> Conversation, the task's own.
        processor (Phi3VProcessor): as for training.
        args (DataArguments): see `build_dataset`.
        split (str): "train" or "eval".
        cache (LengthCache): lengths that were counted before.
        rows_with_text (int): rows whose texts are kept.
    """

    def __init__(
        self, rows, to_conversation, processor: Phi3VProcessor, args, split, cache: LengthCache, rows_with_text
    ):
        self.rows, self.to_conversation, self.processor, self.args = rows, to_conversation, processor, args
        self.split, self.cache, self.rows_with_text = split, cache, rows_with_text
        self.skip = args.on_bad_row == "skip"
        self._control = control_tokens(processor.tokenizer)
        # Many rows may show the same picture.
        self._sizes = lru_cache(maxsize=10_000)(image_size)
        self._begun = False

    def check(self, numbers: Iterable[int], counted: Callable[[int], bool]) -> Checked:
        """What is found of the rows with these numbers; with --on_bad_row stop only of those before the first bad one.

        Args:
            numbers (Iterable[int]): in order.
            counted (Callable): whether a row's pictures are opened and its tokens counted, if its length is not kept.
        """
        good: list[_Good] = []
        bad: dict[int, BadRow] = {}
        fault = None

        def refuse(index: int, place: str, message: str) -> None:
            # The first fault of a row is told.
            bad.setdefault(index, BadRow(self.split, index, place, message))

        for index in numbers:
            row, place = None, where(None, index)
            try:
                row = self.rows[index]
            except InputError as error:  # names its place itself
                refuse(index, str(error).split(": ")[0], str(error))
            else:
                place = where(row, index)
                try:
                    good.append(self._know(row, index, place))
                    continue
                except InputError as error:
                    refuse(index, place, f"{place}: {error}")
                except Exception as error:
                    name = row_id(row)
                    given = place if name is None else f"{place} (id {printable(name)})"
                    text = describe_script_error(error, given)
                    if text is None:
                        raise
                    fault = index, text
                    break
            if not self.skip:
                break
        lengths, keys, new = self._count(good, counted, refuse)
        kept = [place for place, item in enumerate(good) if item.index not in bad]
        return Checked(
            np.array([good[place].index for place in kept], np.int64),
            lengths[kept],
            keys[kept],
            [good[place].conversation.source for place in kept],
            Fingerprints.of(good[place].known for place in kept),
            [bad[index] for index in sorted(bad)],
            fault,
            new,
        )

    def _know(self, row: Any, index: int, place: str) -> _Good:
        conversation = self.to_conversation(row)
        check_conversation(conversation, self._control)
        try:
            known = fingerprint(conversation, self.args.data_dir)
        except InputError:
            image_sizes(conversation)  # says the same with turn and image
            raise
        if not self._begun:
            self._begun = True
            if fingerprint(self.to_conversation(row), self.args.data_dir) != known:
                raise InputError(
                    "to_conversation: expected the same conversation each time that it gets the same row, found another; "
                    "several acceptable answers go into Turn(answers=[...])"
                )
            self._try_cache(conversation, known)
        if index >= self.rows_with_text:
            known.text = ""
        return _Good(index, place, conversation, known)

    def _try_cache(self, conversation: Conversation, known: Fingerprint) -> None:
        """Forgets all kept lengths if that of one row is not what is counted now: the code may count in another way."""
        length = self.cache.find([key_of(known)])[0]
        if length != UNKNOWN and length != count_tokens(conversation, self.processor):
            self.cache.forget()

    def _count(self, good: list[_Good], counted, refuse) -> tuple[np.ndarray, np.ndarray, int]:
        """Lengths and keys of the rows, and how many lengths were not kept; refuses rows that are too long or cannot be shown."""
        keys = np.array([key_of(item.known) for item in good], np.uint64)
        lengths = self.cache.find(keys)
        missing, tokens = [], []
        for place in np.flatnonzero(lengths == UNKNOWN).tolist():
            item = good[place]
            if not counted(item.index):
                continue
            try:
                tokens.append(image_tokens(item.conversation, self.processor, self._size))
                missing.append(place)
            except InputError as error:
                refuse(item.index, item.where, f"{item.where}: {error}")
        lengths[missing] = conversation_lengths([good[place].conversation for place in missing], tokens, self.processor)
        # A damaged picture that is to be answered is left out now, not met in the middle of an evaluation.
        decoded = self.skip and self.split == "eval"
        most = self.args.max_length
        longer = np.flatnonzero(lengths > most).tolist() if most is not None else []
        for place in range(len(good)) if decoded else longer:
            item = good[place]
            try:
                check_length(int(lengths[place]), most, f"sample {printable(item.conversation.id)}")
                if decoded and counted(item.index):
                    load_images(item.conversation)
            except InputError as error:
                refuse(item.index, item.where, f"{item.where}: {error}")
        return lengths, keys, len(missing)

    def _size(self, source: Any) -> tuple[int, int]:
        return self._sizes(source) if isinstance(source, str) else image_size(source)


def join(parts: Sequence[Checked]) -> Checked:
    """What was found of all rows, from that of blocks in their order."""
    return Checked(
        np.concatenate([part.numbers for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.keys for part in parts]),
        [source for part in parts for source in part.sources],
        Fingerprints(pa.concat_tables([part.fingerprints.table for part in parts])),
        [row for part in parts for row in part.bad],
        counted=sum(part.counted for part in parts),
    )
