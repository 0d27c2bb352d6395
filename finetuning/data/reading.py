"""Rows of the files of a folder: which split they belong to, and some of them."""

import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from ..errors import InputError
from .jsonl import JsonlFile
from .jsonl import iterate_rows as iterate_rows
from .jsonl import read_jsonl as read_jsonl
from .parquet import ParquetFile
from .rows import Row, Rows
from .rows import resolve_images as resolve_images
from .rows import where as where
from .schemas import chat_format, conversion_advice, sample_name
from .shown import printable, shown

if TYPE_CHECKING:
    from ..arguments import RecipeArguments

KINDS = {".jsonl": JsonlFile, ".parquet": ParquetFile}


def load_folder(args: "RecipeArguments", evaluation: Sequence[str]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Rows of --data_dir to train on, none where nothing is trained, and to answer, see `read_splits`; on all ranks together.

    Args:
        args (RecipeArguments): data_dir, eval_split, do_train.
        evaluation (Sequence[str]): the task's usual names of the split to answer, the best first.
    """
    assert args.data_dir is not None, "the scripts ask"
    state = PartialState()
    ranks = state.process_index, state.num_processes
    return read_splits(args.data_dir, "train" if args.do_train else None, args.eval_split or evaluation, ranks)


def read_splits(
    data_dir: str | os.PathLike,
    train: str | None = "train",
    evaluation: str | Sequence[str] = "test",
    ranks: tuple[int, int] = (0, 1),
) -> tuple[Sequence[Row], Sequence[Row]]:
    """Rows of a folder to train on and to answer; each is read when it is asked for, and what is wrong with it told then.

    Args:
        data_dir (path): folder with `rows*.jsonl`, whose rows then have a field `split`, or with `SPLIT.jsonl` or
            `NAME_SPLIT.jsonl` for each split; or the same with .parquet, where a split may also be
            `SPLIT-00000-of-00002.parquet` and so on.
        train (str, optional): name of the split to train on; None for no rows.
        evaluation (str | Sequence[str]): name of the split to answer, or several, of which the first that exists is taken.
        ranks (tuple): this rank and how many there are that call this together: each looks for the splits of a share.

    Raises:
        InputError: if files or rows of a split are missing, or a row has no split; with the command that converts the folder
            where it holds a known chat format.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise InputError(f"--data_dir {printable(str(folder))}: expected a folder, found no such folder")
    wanted = [evaluation] if isinstance(evaluation, str) else list(evaluation)
    asked = [wanted] if train is None else [[train], wanted]
    paths = sorted(path for kind in KINDS for path in folder.glob(f"rows*{kind}"))
    found: dict[str, Sequence[Row]] = {}
    if paths:
        splits = _split_rows(_open_files(paths), *ranks)
        found = {name: splits[name] for names in asked for name in names if name in splits}
        files = ", ".join(path.name for path in paths)
        for names in asked:
            if not any(name in found for name in names):
                expected = f'expected rows with "split": "{" or ".join(names)}"'
                there = ", ".join(printable(name, 40) for name in list(splits)[:5])
                raise InputError(f"{printable(str(folder / files))}: {expected}, found none (only {there})")
    else:
        for names in asked:
            candidates = ((name, paths) for name in names if (paths := _split_files(folder, name)))
            name, paths = next(candidates, (names[0], []))
            if not paths:
                others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
                missing = f"expected rows.jsonl with a field split, or {names[0]}.jsonl, found neither{others}"
                raise InputError(f"--data_dir {printable(str(folder))}: {missing}{_advice(folder)}")
            found[name] = _open_files(paths)
    return found[train] if train else [], next(found[name] for name in wanted if name in found)


def _open_files(paths: Iterable[Path]) -> Rows:
    return Rows([KINDS[path.suffix](path) for path in paths])


def _split_rows(rows: Rows, rank: int, ranks: int) -> dict[str, Rows]:
    """The rows of each split, by the field `split`, in the order in which the splits occur."""
    share = range(len(rows) * rank // ranks, len(rows) * (rank + 1) // ranks)
    names: dict[str, int] = {}
    fault, codes = None, np.zeros(len(share), np.int16)
    for place, number in enumerate(share):
        try:
            codes[place] = names.setdefault(check_split(rows.values(number)), len(names))
        except InputError as error:
            fault = str(error)
            break
    found = [(names, codes, fault)]
    shares = gather_object(found) if ranks > 1 else found
    for _, _, fault in shares:
        if fault:
            raise InputError(fault)
    ordered = list(dict.fromkeys(name for names, _, _ in shares for name in names))
    # From each rank's numbers of the names to those of all.
    mapped = [np.array([ordered.index(name) for name in names] or [0])[codes] for names, codes, _ in shares]
    of_row = np.concatenate(mapped)
    return {name: rows.select(np.flatnonzero(of_row == code)) for code, name in enumerate(ordered)}


def check_split(row: Row) -> str:
    """The name in the field `split` of a row.

    Raises:
        InputError: with file and line, if it is missing or no name.
    """
    split = row.get("split")
    if not isinstance(split, str) or not split.strip():
        expected = "split: expected the name of a split, such as train or test"
        raise InputError(f"{row.where}: {sample_name(row)}{expected}, found {shown(split)}")
    return split


def _advice(folder: Path) -> str:
    """What a folder holds instead of splits, if its first row is of a known chat format or its files are tables."""
    if tables := sorted([*folder.glob("*.csv"), *folder.glob("*.tsv")]):
        return (
            f"; {printable(tables[0].name)} is for finetune_hf_trainer_own_data.py --data_dir {printable(str(folder))}"
        )
    for path in sorted(folder.glob("*.jsonl")) or sorted(folder.glob("*.json")):
        try:
            _, row = next(iterate_rows(path), (0, None))
        except InputError:
            continue
        if name := chat_format(row):
            return f"; {conversion_advice(f'{name} in {printable(path.name)}')}"
    return ""


def _split_files(folder: Path, split: str) -> list[Path]:
    paths = [path for kind in KINDS if (path := folder / f"{split}{kind}").exists()]
    paths = paths or sorted(path for kind in KINDS for path in folder.glob(f"*_{split}{kind}"))
    # As the hub names the parts of a split.
    paths = paths or sorted(folder.glob(f"{split}-*-of-*.parquet"))
    if len(paths) > 1 and "-of-" not in paths[0].name:
        names = printable(", ".join(path.name for path in paths))
        raise InputError(f"{printable(str(folder))}: expected one file for the split {split}, found {names}")
    return paths


def spread(count: int, size: int) -> list[int]:
    """Numbers of `count` of `size` rows, evenly spread, so that a file sorted by class gives of every class; always the same."""
    rng = random.Random(0)
    return [rng.randrange(part * size // count, (part + 1) * size // count) for part in range(count)]


def sample_rows(rows: Sequence, count: int | None) -> Sequence:
    """`count` rows of a list or of a `datasets.Dataset`, see `spread`; all of them without a count."""
    if count is None or count >= len(rows):
        return rows
    return select(rows, spread(count, len(rows)))


def select(rows: Sequence, numbers: Sequence[int]) -> Sequence:
    """The rows with these numbers."""
    return rows.select(numbers) if hasattr(rows, "select") else [rows[number] for number in numbers]
