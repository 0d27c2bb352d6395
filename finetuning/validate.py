"""Checks a folder of data before anyone pays for a GPU, and turns other formats into the native one.

    python -m finetuning.validate DATA_DIR --num_crops 4 --max_length 4096
    python -m finetuning.validate MEMES_DIR --task hateful_memes
    python -m finetuning.validate LLAVA_DIR --convert OUT
    python -m finetuning.validate pages.csv --columns image=path question=frage answer=antwort

It reads what finetune_hf_trainer_own_data.py reads (docs/own-data.md); with --task those of a script, by the script's own
`to_conversation`, and counts with its number of crops. What it passes is what training takes: one reader, one limit of
pixels, one count of tokens.

Exit status: 0, or 2 for a fault: the first one, or all with --all, as `FILE:LINE: sample ID: expected ..., found ...`.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from tqdm import tqdm
from transformers import AutoProcessor
from transformers.utils import logging

from phi3v import Phi3VImageProcessor, Phi3VProcessor
from phi3v.image_processing_phi3_v import MAX_NUM_CROPS, hd_size, padded_size
from phi3v.processing_phi3_v import find_tags

from .command_line import CommandParser
from .data.clips import Frame, most_crops
from .data.conversation import check_conversation, control_tokens, to_messages
from .data.formats import (
    SPLITS,
    Fault,
    Sample,
    convert,
    find_files,
    image_name,
    read_samples,
    refuse_existing,
    split_of,
)
from .data.images import image_size, load_image
from .data.lengths import conversation_lengths
from .data.shown import printable
from .environment import MAX_IMAGE_PIXELS, limit_pixels
from .errors import InputError
from .own_data_arguments import MOST_FRAMES, NUM_FRAMES, parse_columns
from .task_script import OWN_DATA, TASKS, load_script

BATCH = 1000  # samples checked together: images by all cores, texts by one call of the tokenizer
PERCENTILES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
# Control tokens of the official tokenizer, for where it cannot be loaded.
CONTROL_TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|image|>",
]


@dataclass(slots=True)
class ImageFigures:
    """An image file: its size in bytes, its crops and image tokens (None: not opened), and what is wrong with it."""

    bytes: int | None = None
    crops: int = 0
    tokens: int = 0
    fault: str | None = None


@dataclass
class SplitFigures:
    """What is counted in a split; the lists hold a number for each sample."""

    files: set[Path] = field(default_factory=set)
    turns: int = 0
    images: list[int] = field(default_factory=list)
    crops: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def load_processor(name: str, num_crops: int) -> tuple[Any, list[str]]:
    """Processor of a model; where there is none, its image processor with a tokenizer of None, and a remark on it."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        try:
            processor = AutoProcessor.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        except OSError:
            # Where the hub is out of reach, from_pretrained tries for two minutes; this asks once.
            if os.path.isdir(name) or not HfApi().file_exists(name, "tokenizer.json"):
                raise
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        if not isinstance(processor, Phi3VProcessor):
            raise ValueError(f"expected the processor of a Phi-3-vision model, found {type(processor).__name__}")
        remarks = []
    except Exception as error:  # the hub client raises a dozen kinds
        processor = SimpleNamespace(image_processor=Phi3VImageProcessor(), tokenizer=None)
        reason = str(error).strip().splitlines()[0].rstrip(".")
        remarks = [
            f"--model_name_or_path {name}: expected a tokenizer, found none; text tokens are not counted ({reason})"
        ]
    finally:
        logging.set_verbosity(level)
    processor.image_processor.num_crops = num_crops
    return processor, remarks


def check_folder(
    folder: Path,
    processor: Any,
    images: str = "decode",
    max_length: int | None = None,
    everything: bool = True,
    to_conversation: Callable[[Any], Any] | None = None,
    only: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    num_frames: int = NUM_FRAMES,
) -> tuple[list[Fault], list[str], dict[str, SplitFigures]]:
    """Checks all files of a folder, or one file, a batch of samples at a time.

    Args:
        folder (Path): the folder or file, see `formats.find_files`.
        processor: as `load_processor` gives it; its image processor's num_crops counts.
        images (str): "decode" reads every image to its end, "headers" its size alone, "paths" looks whether it is there.
        max_length (int, optional): longest sample allowed, in tokens.
        everything (bool): goes on after the first batch with a fault.
        to_conversation (Callable, optional): a script's own, for rows of its task.
        only (Sequence[str], optional): names of the splits to check; by default all.
        columns (Mapping[str, str], optional): field of a known form -> name of the column that holds it.
        num_frames (int): frames of a clip.

    Returns:
        tuple: faults in the order of files and lines, remarks, and the figures of each split over its good samples.

    Raises:
        InputError: if the folder holds no file with rows.
    """
    files = find_files(folder)
    control = control_tokens(processor.tokenizer) if processor.tokenizer else CONTROL_TOKENS
    faults: list[Fault] = []
    remarks: list[str] = []
    splits: dict[str, SplitFigures] = {}
    ids: dict[tuple[str, str], str] = {}
    pictures: dict[str, ImageFigures] = {}
    uses: list[tuple] = []
    native = False
    items = iter(
        tqdm(
            read_samples(files, to_conversation, only, columns, num_frames), unit=" samples", leave=False, disable=None
        )
    )
    with ThreadPool(len(os.sched_getaffinity(0))) as pool:
        while batch := list(islice(items, BATCH)):
            for fault in (item for item in batch if isinstance(item, Fault)):
                faults.append(fault)
                if (split := split_of(Path(fault.file))) in SPLITS:  # a split with faults alone is there as well
                    splits.setdefault(split, SplitFigures())
            samples, good = [item for item in batch if isinstance(item, Sample)], []
            new = {name: source for sample in samples for name, source in sample.images.items() if name not in pictures}
            inspected = pool.map(lambda source: inspect_image(source, images, processor.image_processor), new.values())
            pictures.update(zip(new, inspected, strict=True))
            for sample in samples:
                found, here = check_sample(sample, control, pictures), f"{sample.file.name}:{sample.line}"
                first = ids.setdefault((sample.split, sample.conversation.id), here)
                if first != here:
                    found.append(sample.fault(f"id: expected an id of its own, found that of {first}"))
                faults += found
                if not found:
                    good.append(sample)
                splits.setdefault(sample.split, SplitFigures()).files.add(sample.file)
                # A tuple of texts alone, as millions of them may stay.
                uses.append((sample.split, str(sample.file), sample.line, sample.conversation.id, *sample.image_names))
                native = native or sample.native
            faults += count_batch(good, splits, processor, pictures, max_length)
            if faults and not everything:
                break
        else:
            faults += find_leaks(uses, pictures, pool)
            if only is None:
                unread = check_splits(folder, files, splits)
            else:
                unread = [
                    Fault(str(folder), None, f"expected the split {name}, found none")
                    for name in only
                    if name not in splits
                ]
            faults, remarks = (faults + unread, []) if native else (faults, [str(fault) for fault in unread])
    order = {str(path): number for number, path in enumerate(files)}
    return sorted(faults, key=lambda fault: (order.get(fault.file, -1), fault.line or 0)), remarks, splits


def inspect_image(
    source: str | dict[str, Any] | Frame, images: str, image_processor: Phi3VImageProcessor
) -> ImageFigures:
    """Size, crops and tokens of an image, or what is wrong with it; `images` as in `check_folder`."""
    try:
        size = len(source["bytes"]) if isinstance(source, dict) else None
        if isinstance(source, str | os.PathLike) and os.path.isfile(source):
            size = os.path.getsize(source)
        if images == "paths" and (size is not None or (isinstance(source, Frame) and os.path.isfile(source.path))):
            return ImageFigures()
        width, height = load_image(source).size if images == "decode" else image_size(source)
    except InputError as error:
        return ImageFigures(fault=str(error))
    crop, [most] = image_processor.crop_size, most_crops([source], image_processor.num_crops)
    width_padded, height_padded = padded_size(*hd_size(width, height, most, crop), crop)
    tokens = image_processor.calc_num_image_tokens_from_image_size(width, height, most)
    return ImageFigures(size, 1 + width_padded * height_padded // crop**2, tokens)


def check_sample(sample: Sample, control: Sequence[str], pictures: dict[str, ImageFigures]) -> list[Fault]:
    """Faults of one sample: its texts and tags, and each of its images."""
    faults, seen = [], set()
    for number, turn in enumerate(sample.conversation.turns, 1):
        for index, name in enumerate(map(image_name, turn.images)):
            if (fault := pictures[name].fault) and name not in seen:
                seen.add(name)
                place = f"sample {printable(sample.conversation.id)}, turn {number}: images[{index}]"
                faults.append(Fault(str(sample.file), sample.line, f"{place}: {fault}"))
    try:
        check_conversation(sample.conversation, control)
    except InputError as error:
        faults.append(Fault(str(sample.file), sample.line, str(error)))
    return faults


def count_batch(
    samples: list[Sample],
    splits: dict[str, SplitFigures],
    processor: Any,
    pictures: dict[str, ImageFigures],
    max_length: int | None,
) -> list[Fault]:
    """Adds samples to the figures of their splits; returns a fault for each one over `max_length` tokens."""
    faults = []
    conversations = [sample.conversation for sample in samples]
    image_tokens = [[pictures[name].tokens for name in sample.image_names] for sample in samples]
    lengths = [0] * len(samples)
    if processor.tokenizer:
        lengths = conversation_lengths(conversations, image_tokens, processor)
    for sample, length, tokens in zip(samples, lengths, image_tokens, strict=True):
        names, figures = sample.image_names, splits[sample.split]
        turns = to_messages(sample.conversation, [turn.answers[0] for turn in sample.conversation.turns])
        # A picture may be shown more than once.
        shown = [number - 1 for number in find_tags("\n".join(turn["content"] for turn in turns), len(names))]
        figures.turns += len(sample.conversation.turns)
        figures.images.append(len(names))
        figures.crops.append(sum(pictures[names[index]].crops for index in shown))
        figures.image_tokens.append(sum(tokens[index] for index in shown))
        figures.tokens.append(length if processor.tokenizer else figures.image_tokens[-1])
        if max_length is not None and figures.tokens[-1] > max_length:
            cure = "lower --num_crops, raise --max_length or leave the sample out"
            faults.append(sample.fault(f"expected at most {max_length} tokens, found {figures.tokens[-1]}; {cure}"))
    return faults


def find_leaks(uses: list[tuple], pictures: dict[str, ImageFigures], pool: ThreadPool) -> list[Fault]:
    """Faults of the samples outside train with an image of train: the same path or the same bytes.

    Args:
        uses (list[tuple]): split, file, line, id and names of the images of each sample.
        pictures (dict[str, ImageFigures]): those of unknown size in bytes are compared by path alone.
        pool (ThreadPool): reads files.
    """
    train = {
        name: f"{Path(file).name}:{line}"
        for split, file, line, _, *names in reversed(uses)
        for name in names
        if split == "train"
    }
    others = {name for split, _, _, _, *names in uses for name in names if split != "train"}
    # Only files of equal size can be equal.
    sizes = {pictures[name].bytes for name in train} & {pictures[name].bytes for name in others} - {None}
    candidates = [name for name in {*train, *others} if pictures[name].bytes in sizes]
    content = dict(zip(candidates, pool.map(_digest, candidates), strict=True))
    origin = {content.get(name, name): name for name in train}
    faults = []
    for split, file, line, sample, *names in uses:
        leaked = [name for name in names if split != "train" and content.get(name, name) in origin]
        if leaked:
            twin = origin[content.get(leaked[0], leaked[0])]
            same = "" if twin == leaked[0] else f" as {twin}"
            message = f"sample {printable(sample)}: expected images that train does not hold, found {leaked[0]}, in train{same}, "
            faults.append(Fault(file, line, f"{message}{train[twin]} ({len(leaked)} of {len(names)} images)"))
    return faults


def _digest(name: str) -> str:
    """SHA-256 of a file; the name of a data URI's image begins with it."""
    if not os.path.dirname(name):
        return name.partition(".")[0]
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_splits(folder: Path, files: list[Path], splits: dict[str, SplitFigures]) -> list[Fault]:
    """What `reading.read_splits` would refuse, or leave unread without a word."""
    faults = []
    rows = [path.name for path in files if path.name.startswith("rows")]
    if rows and len(rows) < len(files):
        others = ", ".join(path.name for path in files if path.name not in rows)
        faults.append(
            f"expected rows*.jsonl or a file for each split, found {rows[0]} and {others}; move one kind away"
        )
    for split, figures in splits.items():
        if not rows and len(figures.files) > 1:
            names = ", ".join(sorted(path.name for path in figures.files))
            faults.append(f"expected one file for the split {split}, found {names}; join them")
    missing = [] if "train" in splits else ["train"]
    missing += [] if splits.keys() - {"train"} else ["test"]
    for split in missing:
        found = ", ".join(splits) or "none"
        faults.append(f"expected a split {split}, found {found}; name a file {split}.jsonl or NAME_{split}.jsonl")
    return [Fault(str(folder), None, fault) for fault in faults]


def summarise(figures: SplitFigures, max_length: int | None, texts: bool, images: bool) -> dict[str, Any]:
    """Figures of a split by name; None for what was not counted, which `texts` and `images` say."""
    over = None if max_length is None else sum(length > max_length for length in figures.tokens)
    return {
        "samples": len(figures.tokens),
        "turns": figures.turns,
        "images": sum(figures.images),
        "images_per_sample": _spread(figures.images, ("mean", "max")),
        "crops_per_sample": _spread(figures.crops, ("mean", "max")) if images else None,
        "tokens_per_sample": _spread(figures.tokens, ("mean", *PERCENTILES)) if texts or images else None,
        "over_max_length": over if texts or images else None,
        "tokens_per_epoch": sum(figures.tokens) if texts or images else None,
        "image_tokens_per_epoch": sum(figures.image_tokens) if images else None,
    }


def _spread(values: list[int], names: tuple[str, ...]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(names)
    found = {"mean": round(sum(values) / len(values), 1)}
    found |= {name: int(np.percentile(values, share, method="higher")) for name, share in PERCENTILES.items()}
    return {name: found[name] for name in names}


def format_table(summaries: dict[str, dict[str, Any]]) -> str:
    """The figures as a table with a column for each split, without what was not counted."""
    columns: list[dict[str, Any]] = []
    for summary in summaries.values():
        columns.append({})
        for key, value in summary.items():
            for part, figure in value.items() if isinstance(value, dict) else [("", value)]:
                columns[-1][f"{key.replace('_', ' ')}{', ' * bool(part)}{part}"] = figure
    rows = [["", *summaries]]
    for title in columns[0]:
        if any(column[title] is not None for column in columns):
            rows.append([title, *("-" if column[title] is None else f"{column[title]:,}" for column in columns)])
    first, width = (max(len(row[0]) for row in rows), max(10, *(len(cell) for row in rows for cell in row[1:])))
    return "\n".join(row[0].ljust(first) + "".join(f"  {cell:>{width}}" for cell in row[1:]) for row in rows)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags of `python -m finetuning.validate`."""
    parser = CommandParser("validate", __doc__)
    add = parser.add_argument
    add("data_dir", type=Path, help="folder with jsonl, json, csv or Parquet files, or one such file")
    task = f"rows of a task's own form: {', '.join(TASKS)}, or the path of a script of your own"
    add("--task", help=task)
    named = "names of columns that are called otherwise, such as image=path question=frage answer=antwort"
    add("--columns", nargs="+", metavar="FIELD=COLUMN", help=named)
    only = "check only these splits, such as the two that training reads (default: all files)"
    add("--splits", nargs="+", metavar="NAME", help=only)
    crops = "most crops of an image, as in training (default: 16, or what the script of --task takes)"
    add("--num_crops", type=int, choices=range(1, MAX_NUM_CROPS + 1), metavar="N", help=crops)
    pixels = f"largest image that is opened, in pixels, as in training (default {MAX_IMAGE_PIXELS:,})"
    frames = "frames of a clip, evenly spread (default: 8)"
    add("--num_frames", type=int, choices=range(1, MOST_FRAMES + 1), default=NUM_FRAMES, metavar="N", help=frames)
    add("--max_image_pixels", type=int, default=MAX_IMAGE_PIXELS, help=pixels)
    add("--max_length", type=int, help="longest sample allowed, in tokens (default: what the model can take)")
    add("--model_name_or_path", default="microsoft/Phi-3.5-vision-instruct", help="model whose tokenizer counts")
    modes = "read every image to its end (default), its size alone, or only look whether the file is there"
    add("--images", default="decode", choices=("decode", "headers", "paths"), help=modes)
    add("--all", action="store_true", help="list all faults, not only the first")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--convert", type=Path, metavar="OUT", help="write a clean folder in the native form to the new folder OUT")
    args = parser.parse_args(argv)
    for name in ("max_length", "max_image_pixels"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name} {value}: expected at least 1 {'token' if name == 'max_length' else 'pixel'}")
    if args.convert and args.task not in (None, OWN_DATA):
        raise InputError("--convert and --task: expected one of them; scripts read the rows of their task as they are")
    return args


def main(argv: list[str] | None = None) -> int:
    """Checks what the command line says; exit status 0 for a clean folder, 2 for a fault or a bad call."""
    try:
        args = parse_args(argv)
        if not args.data_dir.exists():
            raise InputError(f"{printable(str(args.data_dir))}: expected a folder or a file, found no such path")
        columns = parse_columns(args.columns)
        if args.convert:
            refuse_existing(args.convert)
        script = load_script(args.task) if args.task not in (None, OWN_DATA) else None
        num_crops = args.num_crops or getattr(script, "NUM_CROPS", 16)
        limit_pixels(args.max_image_pixels)
        processor, remarks = load_processor(args.model_name_or_path, num_crops)
        max_length = args.max_length or getattr(processor.tokenizer, "model_max_length", None)
        to_conversation = getattr(script, "to_conversation", None)
        faults, more, splits = check_folder(
            args.data_dir,
            processor,
            args.images,
            max_length,
            args.all,
            to_conversation,
            args.splits,
            columns,
            args.num_frames,
        )
        remarks += more
        if args.images == "paths":
            remarks.append("--images paths: no image was opened; crops and image tokens are not counted")
        if args.convert and not faults:
            convert(args.data_dir, args.convert, columns, args.num_frames)
        if args.convert:
            remarks.append(
                f"--convert {args.convert}: " + ("nothing written: expected no fault" if faults else "written")
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    complete = args.all or not faults
    faults = faults if args.all else faults[:1]
    counted = (processor.tokenizer is not None, args.images != "paths")
    names = sorted(splits, key=lambda split: split != "train") if complete else []
    summaries = {name: summarise(splits[name], max_length, *counted) for name in names}
    if args.json:
        report = {"data_dir": str(args.data_dir), "num_crops": num_crops, "max_length": max_length}
        report |= {"complete": complete, "faults": [asdict(fault) for fault in faults], "remarks": remarks}
        print(json.dumps({**report, "splits": summaries}, ensure_ascii=False))
        return 2 if faults else 0
    print(*faults, *(f"remark: {remark}" for remark in remarks), sep="\n", end="\n" if faults or remarks else "")
    if summaries:
        print(format_table(summaries))
    limit = f"num_crops {num_crops}, max length {max_length:,} tokens" if max_length else f"num_crops {num_crops}"
    found = f"{len(faults)} fault(s)" if complete else "stopped at the first fault, --all lists all"
    print(f"{printable(str(args.data_dir))}: {found if faults else 'clean'} ({limit})")
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
