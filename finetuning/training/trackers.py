"""What experiment trackers get beyond the figures that transformers sends them: where to write, and some answers with pictures."""

import html
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from ..arguments import RecipeArguments
from ..data.dataset import ConversationDataset
from ..data.images import load_images

COLUMNS = ["id", "picture", "question", "expected", "answer"]
PICTURE = 480  # pixels, the longest side of each


class Answered(Protocol):
    """An answer beside what was asked, such as `results.predictions.Prediction`."""

    id: str
    turn: int
    question: str
    references: list[str]
    answer: str


def write_beside_the_run(callbacks: Sequence[TrainerCallback], args: RecipeArguments) -> None:
    """Lets TensorBoard write into runs/ of the output folder: one run there, also where it was stopped and went on."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(args.output_dir) / "runs")


def log_answers(
    trainer: Trainer, predictions: Sequence[Answered], dataset: ConversationDataset, count: int = 8
) -> None:
    """Sends the answers to some rows to the trackers that take pictures: TensorBoard (images and a text), wandb (a table).

    The rows are spread evenly over the data set, so each call shows the same ones. With other trackers, on other ranks
    and before training has begun it does nothing.

    Args:
        trainer (Trainer): whose trackers, and at whose step.
        predictions (Sequence): of all turns of all rows of `dataset`.
        dataset (ConversationDataset): the rows that were answered.
        count (int): most rows that are shown.
    """
    callbacks = trainer.callback_handler.callbacks if trainer.is_world_process_zero() else []
    writers = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
    writers = [writer for writer in writers if writer is not None]
    run = sys.modules["wandb"].run if any(isinstance(callback, WandbCallback) for callback in callbacks) else None
    if not (writers or run) or not len(dataset):
        return
    rows, step = list(_chosen(predictions, dataset, count)), trainer.state.global_step
    for writer in writers:
        for found, picture in rows:
            if picture is not None and found.turn == 0:
                writer.add_image(f"answers/{found.id}", np.asarray(picture), step, dataformats="HWC")
        writer.add_text("answers", _markdown([found for found, _ in rows]), step)
        writer.flush()
    if run is not None:
        _log_table(run, rows, step)


def _chosen(
    predictions: Sequence[Answered], dataset: ConversationDataset, count: int
) -> Iterator[tuple[Answered, Image.Image | None]]:
    """Each answer to the chosen rows, with the pictures of its conversation."""
    by_place = {(found.id, found.turn): found for found in predictions}
    count = min(count, len(dataset))
    for number in range(count):
        conversation = dataset.to_conversation(dataset.rows[number * len(dataset) // count])
        images = load_images(conversation)
        picture = _side_by_side(images) if images else None
        for turn in range(len(conversation.turns)):
            yield by_place[conversation.id, turn], picture


def _side_by_side(images: list[Image.Image]) -> Image.Image:
    small = []
    for image in images:
        copy = image.convert("RGB")
        copy.thumbnail((PICTURE, PICTURE))
        small.append(copy)
    joined = Image.new("RGB", (sum(image.width for image in small), max(image.height for image in small)), "white")
    left = 0
    for image in small:
        joined.paste(image, (left, 0))
        left += image.width
    return joined


def _cells(found: Answered) -> tuple[str, str, str]:
    return found.question, " / ".join(found.references), found.answer


def _markdown(answers: list[Answered]) -> str:
    columns = [name for name in COLUMNS if name != "picture"]
    lines = [columns, ["---"] * len(columns), *([found.id, *_cells(found)] for found in answers)]
    # Nothing of a text is taken for markup.
    cells = [[html.escape(" ".join(text.split())).replace("|", "&#124;") for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _log_table(run, rows: list[tuple[Answered, Image.Image | None]], step: int) -> None:
    # Optional, and imported by its callback.
    wandb = sys.modules["wandb"]
    table = wandb.Table(columns=COLUMNS)
    for found, picture in rows:
        table.add_data(found.id, picture and wandb.Image(picture), *_cells(found))
    run.log({"eval/answers": table, "train/global_step": step})
