"""Answers about pictures that nobody has labelled: answers.jsonl, over all ranks, gone on with where it was stopped."""

import glob
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from pydantic import Field

from ..data.conversation import Conversation, Turn
from ..data.dataset import ConversationDataset
from ..data.reading import read_jsonl
from ..data.schemas import Picture, RowId, RowModel, Text, parse_row
from ..data.shown import printable
from ..errors import InputError, Stopped
from ..training.progress import answers_bar
from ..training.signals import stop_signals
from .answering import Prompts, greedy_answers, precision
from .kept_file import open_to_append
from .rounds import answer_in_rounds

# Of the formats that `images.open_image` takes.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


class UnlabelledRow(RowModel):
    """A question about pictures, or without any."""

    id: RowId
    image: Picture | None = None
    images: list[Picture] = Field(default_factory=list)
    question: Text


def find_rows(data: str, question: str | None) -> Sequence[dict[str, Any]]:
    """Rows to answer: the pictures of a folder and its subfolders or of a glob, each by itself, or the lines of a jsonl file.

    Args:
        data (str): folder, glob pattern, or file.jsonl with rows {"id", "image" or "images", "question"}, whose paths are
            relative to its folder.
        question (str, optional): asked about each picture, and in rows that hold none.

    Raises:
        InputError: if there is nothing to answer, or a row has no question.
    """
    if data.endswith(".jsonl"):
        rows = read_jsonl(data)
        for number, row in enumerate(rows):
            row.setdefault("id", str(number + 1))
            if row.get("question") is None:
                row["question"] = _needed(question, f"{row.where}: it holds no question")
        return rows
    asked = _needed(question, f"--data {printable(data)}: pictures alone hold no question")
    pattern = os.path.join(glob.escape(data), "**") if os.path.isdir(data) else data
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if path.lower().endswith(ENDINGS))
    if not paths:
        raise InputError(
            f"--data {printable(data)}: expected a folder or a pattern of pictures ({' '.join(ENDINGS)}), or a jsonl file, found none"
        )
    return [{"id": path, "image": path, "question": asked} for path in paths]


def _needed(question: str | None, why: str) -> str:
    if question is None:
        raise InputError(f"{why}: expected one for all; give it beside the folder")
    return question


def to_conversation(row: dict) -> Conversation:
    """One turn whose answer is not known."""
    parsed = parse_row(row, UnlabelledRow)
    images = [*([] if parsed.image is None else [parsed.image]), *parsed.images]
    return Conversation(parsed.id, [Turn(parsed.question, ["-"], images)])


def answer_unlabelled(
    model,
    dataset: ConversationDataset,
    path: Path,
    by: str,
    dtype: torch.dtype,
    max_new_tokens: int,
    batch_size: int,
    workers: int,
) -> int:
    """Answers rows greedily on all ranks together; each round's answers are appended to a file at once, in the rows' order.

    What stands there already is kept. A line: {"id", "images", "question", "answer", "model", "asked"}.

    Args:
        model: model or PEFT model, on its device.
        dataset (ConversationDataset): rows of `find_rows`, checked by `build_dataset`.
        path (Path): the file.
        by (str): what model and settings are known by.
        dtype (torch.dtype): what the model computes in.
        max_new_tokens (int): longest answer, in tokens.
        batch_size (int): rows at once on each rank.
        workers (int): processes of each rank that prepare pictures.

    Returns:
        int: how many were kept.

    Raises:
        InputError: if the file holds something else, or another process writes into it.
        Stopped: by a signal, after a round.
    """
    prompts, state = Prompts(dataset, None), PartialState()
    with ExitStack() as stack:
        outcome: list[Any] = [None, None]
        file = None
        if state.is_main_process:
            try:
                file = stack.enter_context(open_to_append(path, "--out"))
                outcome[1] = _read_answers(path, by)
                # What a run left half-written when it died.
                file.truncate(outcome[1][1])
            except InputError as error:
                outcome[0] = str(error)
        fault, kept = broadcast_object_list(outcome) if state.num_processes > 1 else outcome
        if fault:
            raise InputError(fault)
        todo = [number for number, question in enumerate(prompts.questions) if question.asked not in kept[0]]
        done = len(prompts) - len(todo)
        if done and state.is_main_process:
            print(f"{path}: {done} of {len(prompts)} answers are there, {len(todo)} are asked", flush=True)
        model.eval()

        def answer(_: Sequence[int], inputs: Any) -> list[str]:
            return greedy_answers(model, dataset.processor, inputs.to(model.device), max_new_tokens)

        bar = stack.enter_context(answers_bar(len(prompts), done, "answers"))
        stack.enter_context(precision(model, dtype))
        for found in answer_in_rounds(prompts, prompts.collate, todo, batch_size, workers, answer):
            bar.update(len(found))
            done += len(found)
            if file:
                file.write("".join(_line(dataset, prompts, number, text, by) for number, text in found).encode())
                file.flush()
            if signum := stop_signals.agree(state.device):
                raise Stopped(signum, f"{done} of {len(prompts)} answers are in {path}")
    return len(prompts) - len(todo)


def _line(dataset: ConversationDataset, prompts: Prompts, number: int, answer: str, by: str) -> str:
    question, row = prompts.questions[number], prompts.places[number][0]
    images = [str(image) for image in dataset.to_conversation(dataset.rows[row]).images]
    line = {"id": question.id, "images": images, "question": question.question, "answer": answer}
    return json.dumps({**line, "model": by, "asked": question.asked}, ensure_ascii=False) + "\n"


def _read_answers(path: Path, by: str) -> tuple[set[str], int]:
    """What was asked in the whole lines of the file, and the bytes of them."""
    asked, size = set(), 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        item = None
        with suppress(ValueError):
            item = json.loads(line)
        if not isinstance(item, dict) or not {"asked", "model", "answer"} <= item.keys():
            raise InputError(
                f"--out {path}: expected answers of this command or a new file, found something else in line {number}"
            )
        if item["model"] != by:
            raise InputError(
                f"--out {path}: expected answers of this model and these settings, found those of another in line {number}; "
                "choose another file"
            )
        asked.add(item["asked"])
        size += len(line)
    return asked, size
