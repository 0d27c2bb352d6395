"""Rows that a run got wrong, each ready to be asked again: question and earlier turns as in the run, pictures from its data folder."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.clips import Frame
from ..data.conversation import Conversation, Turn
from ..data.files import check_regular_file
from ..data.images import open_image
from ..errors import InputError
from ..training.identity import read_run
from .page import read_data
from .report import REPORT

MOST = 24  # of a run
SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif"}  # of all other formats the suffix is the name


@dataclass
class Example:
    """A turn that was answered wrongly.

    Args:
        id (str): of the row.
        earlier (list[Turn]): turns before it, with the answers that the run was shown for them.
        turn (Turn): the question, its acceptable answers, its pictures.
        answers (dict[str, str]): name of a run -> its answer.
        thumbnail (str): data URI of the row's first picture as the report shows it; empty where there is none.
    """

    id: str
    earlier: list[Turn]
    turn: Turn
    answers: dict[str, str]
    thumbnail: str


def wrong_rows(folder: Path, read_rows: Callable[[dict[str, Any]], tuple[Sequence, Callable]]) -> list[Example]:
    """The worst rows of a run's report whose data are still there, worst first.

    Args:
        folder (Path): the run's output folder.
        read_rows (Callable): run.json's content -> the rows that the run answered, and its to_conversation.

    Raises:
        InputError: with the reason why there is none.
    """
    run, data = read_run(folder), read_data(folder / REPORT)
    if run is None or data is None or "run" not in data:
        raise InputError(f"{folder}: expected {REPORT} of a finished run, found none")
    wrong = [row for row in data["rows"] if "wrong" in row["flags"]]
    if not wrong:
        return []
    rows, to_conversation = read_rows(run)
    found = []
    for row, conversation in _with_conversations(wrong, rows, to_conversation):
        number = next(
            number
            for number, turn in enumerate(row["turns"])
            if turn["scores"][-1] is not None and turn["scores"][-1] < data["best"] - 1e-9
        )
        earlier = [Turn(turn.user, turn.answers[:1], turn.images) for turn in conversation.turns[:number]]
        pictures = [data["pictures"][place] for place in row["pictures"] if place >= 0]
        answers = {folder.resolve().name: row["turns"][number]["answers"][-1]}
        found.append(Example(row["id"], earlier, conversation.turns[number], answers, next(iter(pictures), "")))
        if len(found) == MOST:
            break
    return found


def join_examples(runs: Sequence[Sequence[Example]]) -> list[Example]:
    """The examples of several runs, a turn that more than one of them got wrong once, with all their answers."""
    found: dict[tuple, Example] = {}
    for example in (example for examples in runs for example in examples):
        key = (example.id, len(example.earlier), example.turn.user, str(example.turn.images))
        if key in found:
            found[key].answers.update(example.answers)
        else:
            found[key] = example
    return list(found.values())


def _with_conversations(
    wrong: list[dict[str, Any]], rows: Sequence, to_conversation: Callable[[Any], Conversation]
) -> Iterator[tuple[dict[str, Any], Conversation]]:
    """The rows of the report beside what they are made from; without those that are gone or were changed since."""
    places: dict[str, int] | None = None
    for row in wrong:
        place = row["index"]
        conversation = to_conversation(rows[place]) if place < len(rows) else None
        if conversation is None or conversation.id != row["id"]:
            # Where rows were sampled or left out, numbers are others than in the file.
            places = places or {to_conversation(item).id: number for number, item in enumerate(rows)}
            if row["id"] not in places:
                continue
            conversation = to_conversation(rows[places[row["id"]]])
        if [turn.user for turn in conversation.turns] == [turn["question"] for turn in row["turns"]]:
            yield row, conversation


def copy_picture(source: Any, target: Path) -> Path:
    """Copies a picture, byte for byte where it is not held decoded, under a name of its own; for a frame of a clip the clip.

    Args:
        source: see `open_image`.
        target (Path): without a suffix; its folder exists.

    Raises:
        InputError: see `open_image`.
    """
    if isinstance(source, Frame):
        check_regular_file(source.path, "a video file")
        return Path(shutil.copyfile(source.path, target.with_suffix(Path(source.path).suffix.lower())))
    image = open_image(source)
    if isinstance(source, Image.Image):
        target = target.with_suffix(".png")
        image.save(target)
        return target
    target = target.with_suffix(SUFFIXES.get(image.format or "", f".{image.format or ''}".lower()))
    image.close()
    if isinstance(source, dict):
        target.write_bytes(source["bytes"] if source.get("bytes") else Path(source["path"]).read_bytes())
    else:
        target.write_bytes(Path(source).read_bytes())
    return target
