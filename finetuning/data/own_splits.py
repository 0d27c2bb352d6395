"""Rows of one's own data to train on and to answer: by their splits, or else a share of them drawn by picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub.constants import HF_HUB_CACHE
from xxhash import xxh3_64_intdigest

from ..errors import InputError
from .drawing import draw_rows
from .hub import load_hub_splits
from .own_rows import EVALUATION, TRAIN, OwnRows, data_files, open_file, split_of
from .parquet import ArrowRows
from .reading import check_split
from .rows import Row, Rows
from .schemas import row_id
from .shown import printable

if TYPE_CHECKING:
    from ..own_data_arguments import OwnDataArguments


@dataclass
class OwnSource:
    """The rows of a folder, a file or a data set on the hub.

    Args:
        name (str): what messages call it.
        files (list[OwnRows]): all that it holds.
        splits (dict[str, Rows]): its rows by split.
        train, evaluation (Rows): those to train on and to answer.
    """

    name: str
    files: list[OwnRows]
    splits: dict[str, Rows]

    def __post_init__(self):
        self.train = self.evaluation = Rows([])


def load_own_data(args: "OwnDataArguments") -> tuple[Sequence[Row], Sequence[Row]]:
    """Rows of --data_dir or --dataset to train on, none where nothing is trained, and to answer; on all ranks together.

    Args:
        args (OwnDataArguments): sources, dataset, column_of, eval_split, eval_share, do_train.

    Raises:
        InputError: if there are no rows, or none of the split that is asked for.
    """
    sources = read_sources(args)
    train, evaluation = (Rows([getattr(source, side) for source in sources]) for side in ("train", "evaluation"))
    return train if args.do_train else [], evaluation


def read_sources(args: "OwnDataArguments") -> list[OwnSource]:
    """Each source of --data_dir, or the one of --dataset, with its rows to train on and to answer; see `load_own_data`."""
    sources = [_from_hub(args)] if args.dataset else [_from_files(source.path, args) for source in args.sources]
    for field in args.column_of:
        missing = [file.missing.get(field) for source in sources for file in source.files]
        if all(missing):
            raise InputError(str(missing[0]))
    for source, called in zip(sources, args.source_names, strict=False):
        for file in source.files:
            file.source = called
    names = [args.eval_split] if args.eval_split else list(EVALUATION)
    found = [next((name for name in names if name in source.splits), None) for source in sources]
    # Where a source is a test file, the others are to be trained.
    draws = not any(name and TRAIN not in source.splits for name, source in zip(found, sources, strict=True))
    for split, source in zip(found, sources, strict=True):
        source.train = source.splits.get(TRAIN, source.train)
        if split:
            source.evaluation = source.splits[split]
        elif args.eval_split and draws:
            there = ", ".join(printable(split, 40) for split in source.splits)
            raise InputError(
                f"--eval_split {args.eval_split}: expected rows of this split in {source.name}, found {there}"
            )
        elif draws:
            _draw(source, args)
        if args.dataset:
            hub, _, config = args.dataset.partition(":")
            used = [TRAIN, *([split] if split else [])]
            args.hub_data = [{"name": hub, "config": config or None, "split": name} for name in used]
    if args.do_train and not any(len(source.train) for source in sources):
        there = ", ".join(printable(split, 40) for source in sources for split in source.splits)
        raise InputError(
            f"{sources[0].name}: expected rows to train on, found the split(s) {there} alone; --do_train False scores them"
        )
    return sources


def _draw(source: OwnSource, args: "OwnDataArguments") -> None:
    rows, state = source.train, PartialState()
    try:
        train, drawn = draw_rows(rows, args.eval_share, (state.process_index, state.num_processes))
    except InputError as error:
        raise InputError(f"{source.name}: no test split: {error}") from None
    source.train, source.evaluation = rows.select(train), rows.select(drawn)
    if state.is_main_process and args.eval_share:
        said = f"{len(drawn)} of {len(rows)} rows are answered and not trained, drawn by picture (--eval_share {args.eval_share:g})"
        print(f"{source.name}: no test split: {said}", flush=True)


def _from_files(path: str, args: "OwnDataArguments") -> OwnSource:
    names = [args.eval_split] if args.eval_split else []
    paths = data_files(Path(path))
    files = [open_file(file, args.column_of, args.num_frames) for file in paths]
    of_file = [split_of(file, (*EVALUATION, *names)) for file in paths]
    return OwnSource(printable(path), files, _sort_rows(files, of_file))


def _from_hub(args: "OwnDataArguments") -> OwnSource:
    name, _, config = str(args.dataset).partition(":")
    splits = load_hub_splits(args, name, config or None)
    # A picture that is a file of the repository lies in the cache.
    files = [
        OwnRows(ArrowRows(rows, f"{name} ({split})"), split, HF_HUB_CACHE, args.column_of, args.num_frames)
        for split, rows in splits.items()
    ]
    return OwnSource(str(args.dataset), files, _sort_rows(files, list(splits)))


def _sort_rows(files: list[OwnRows], of_file: list[str]) -> dict[str, Rows]:
    """The rows of each split: by the field `split` where the first row of a file has one, else by the file's name.

    A row whose id another one before it has gets one of its own.
    """
    rows, state = Rows(files), PartialState()
    ends = np.cumsum([len(file) for file in files])
    by_field = ["split" in _first(file) for file in files]
    share = range(
        len(rows) * state.process_index // state.num_processes,
        len(rows) * (state.process_index + 1) // state.num_processes,
    )
    names = {name: code for code, name in enumerate(dict.fromkeys(of_file))}
    splits, ids = np.zeros(len(share), np.int16), np.zeros(len(share), np.uint64)
    fault = None
    for place, number in enumerate(share):
        file = int(np.searchsorted(ends, number, side="right"))
        splits[place] = names[of_file[file]]
        ids[place] = xxh3_64_intdigest(f"row {number}".encode())
        try:
            row = rows.values(number, only=("id", "split"))
        except InputError:  # told when all rows are checked
            continue
        if name := row_id(row):
            ids[place] = xxh3_64_intdigest(f"id {name}".encode())
        if by_field[file]:
            try:
                splits[place] = names.setdefault(check_split(row), len(names))
            except InputError as error:
                fault = str(error)
                break
    found = [(names, splits, ids, fault)]
    shares = gather_object(found) if state.num_processes > 1 else found
    for *_, fault in shares:
        if fault:
            raise InputError(fault)
    _rename(files, ends, np.concatenate([ids for _, _, ids, _ in shares]))
    ordered = list(dict.fromkeys(name for names, *_ in shares for name in names))
    mapped = [np.array([ordered.index(name) for name in names])[codes] for names, codes, *_ in shares]
    of_row = np.concatenate(mapped)
    sorted_rows = {name: rows.select(np.flatnonzero(of_row == code)) for code, name in enumerate(ordered)}
    return {name: part for name, part in sorted_rows.items() if len(part)}


def _first(file: OwnRows) -> Row | dict:
    try:
        return file.values(0)
    except InputError:
        return {}


def _rename(files: list[OwnRows], ends: np.ndarray, ids: np.ndarray) -> None:
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    if counts.max(initial=1) == 1:
        return
    repeated = np.setdiff1d(np.arange(len(ids)), first)
    for number in repeated.tolist():
        file = int(np.searchsorted(ends, number, side="right"))
        files[file].renamed.add(number - int(ends[file] - len(files[file])))
