"""Conversation, what the rows of every task become: its turns, its chat messages, and what its texts may hold."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from phi3v.processing_phi3_v import IMAGE_TAG, find_tags

from ..errors import InputError
from .clips import Frame
from .shown import printable, shown


@dataclass
class Turn:
    """One question and its answer; only the answer is trained.

    Args:
        user (str): the question, not blank. Pictures are shown before it, unless user texts of the conversation hold tags:
            `<|image_1|>` then stands where the first of all its pictures belongs, and every picture needs its tag.
        answers (list[str]): acceptable answers; training picks one in each epoch, evaluation may compare with all.
        images (list): pictures of this turn: paths, PIL images, or the {"bytes", "path"} of a `datasets.Image` column; and what
            `clips.clip_frames` makes of a clip.
        choices (list[str]): for a closed question all possible answers; evaluation then records their probabilities.
    """

    user: str
    answers: list[str]
    images: list = field(default_factory=list)
    choices: list[str] = field(default_factory=list)


@dataclass
class Conversation:
    """One sample: what `to_conversation` makes of a row.

    Args:
        id (str): the row's own, no other row of its split may have it: messages, predictions and the choice among several
            answers go by it. A row without one gets it in `load_splits`, such as its number.
        turns (list[Turn]): questions and answers in order, at least one.
        source (str): where the row comes from, if there are several places: their losses and scores are told apart.
    """

    id: str
    turns: list[Turn]
    source: str = ""

    @property
    def images(self) -> list:
        return [image for turn in self.turns for image in turn.images]


def has_tags(conversation: Conversation) -> bool:
    """Whether the user texts say where the pictures belong; else each turn's stand before its text."""
    return any(IMAGE_TAG.search(turn.user) for turn in conversation.turns)


def to_messages(conversation: Conversation, answers: Sequence[str]) -> list[dict[str, str]]:
    """Chat messages of the first `len(answers) + 1` turns, or of all of them if there is an answer for each.

    Images are tagged before the text of their turn unless a user text of the conversation holds tags of its own.
    """
    tagged = has_tags(conversation)
    messages, number = [], 0
    for index, turn in enumerate(conversation.turns[: len(answers) + 1]):
        tags = ""
        if not tagged:
            tags = "".join(f"<|image_{number + n}|>\n" for n in range(1, len(turn.images) + 1))
            number += len(turn.images)
        messages.append({"role": "user", "content": tags + turn.user})
        if index < len(answers):
            messages.append({"role": "assistant", "content": answers[index]})
    return messages


@lru_cache
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Tokens of the chat format, which no text may hold; words that someone has added to the vocabulary are none."""
    added = tokenizer.added_tokens_decoder.values()
    return tuple(token.content for token in added if token.special or token.content.startswith("<"))


def check_text(value: Any) -> str:
    """The value, if it is text that is not blank.

    Raises:
        ValueError: for anything else, with what was expected and found.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected text, found {shown(value)}")
    return value


def check_picture(value: Any) -> Any:
    """The value, if it is what `images.open_image` takes; nothing is opened.

    Raises:
        ValueError: for anything else, with what was expected and found.
    """
    path = value
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes) and value["bytes"]:
            return value
        path = value.get("path")
    if path.strip() if isinstance(path, str) else isinstance(path, os.PathLike):
        return value
    if isinstance(value, Image.Image | Frame):
        return value
    raise ValueError(f"expected a picture (a path, a PIL image or an object with bytes or path), found {shown(value)}")


def check_conversation(conversation: Conversation, control: Sequence[str]) -> None:
    """Checks what `to_conversation` made, as far as that can be known without opening an image.

    Args:
        conversation (Conversation): whatever a script's own function has returned.
        control (Sequence[str]): what `control_tokens` gives.

    Raises:
        InputError: in one line, with the id, the turn and the field, for a wrong type, a missing or blank text, an image tag
            without its image, an image without its tag, or a control token inside a text.
    """
    if not isinstance(conversation, Conversation):
        raise InputError(f"to_conversation: expected it to return a Conversation, found {shown(conversation)}")
    try:
        check_text(conversation.id)
    except ValueError as error:
        raise InputError(f"Conversation.id: {error}") from None
    # Every start and every sample comes by here: what only a message needs is made where there is one.
    if not isinstance(conversation.turns, list | tuple) or not conversation.turns:
        found = f"turns: expected a list with at least one Turn, found {shown(conversation.turns)}"
        raise InputError(f"sample {printable(conversation.id)}: {found}")
    for number, turn in enumerate(conversation.turns, 1):
        try:
            _check_turn(turn, control)
        except ValueError as error:
            raise InputError(f"sample {printable(conversation.id)}, turn {number}: {error}") from None
    if not has_tags(conversation):
        return
    text = "\n".join(
        message["content"] for message in to_messages(conversation, [turn.answers[0] for turn in conversation.turns])
    )
    try:
        find_tags(text, len(conversation.images))
    except ValueError as error:
        raise InputError(f"sample {printable(conversation.id)}: {printable(str(error), 400)}") from None


def _check_turn(turn: Turn, control: Sequence[str]) -> None:
    """Raises a ValueError that begins with the field."""
    if not isinstance(turn, Turn):
        raise ValueError(f"expected a Turn, found {shown(turn)}")
    if fault := _text_fault(turn.user, control):
        raise ValueError(f"user: {fault}")
    for name, kind in (("answers", "at least one answer"), ("choices", "all possible answers")):
        texts = getattr(turn, name)
        if not isinstance(texts, list | tuple) or (name == "answers" and not texts):
            raise ValueError(f"{name}: expected a list with {kind}, found {shown(texts)}")
        for index, text in enumerate(texts):
            fault = _text_fault(text, control)
            if fault is None and IMAGE_TAG.search(text):
                fault = f"expected image tags in user texts only, found {shown(text)}"
            if fault:
                raise ValueError(f"{name}[{index}]: {fault}")
    repeated = next((text for index, text in enumerate(turn.choices) if text in turn.choices[:index]), None)
    if repeated is not None:
        raise ValueError(f"choices: expected different answers, found {shown(repeated)} twice")
    if not isinstance(turn.images, list | tuple):
        raise ValueError(f"images: expected a list of pictures, found {shown(turn.images)}")
    for index, image in enumerate(turn.images):
        try:
            check_picture(image)
        except ValueError as error:
            raise ValueError(f"images[{index}]: {error}") from None


def _text_fault(text: Any, control: Sequence[str]) -> str | None:
    """What is wrong with a text, None where nothing is."""
    try:
        check_text(text).encode()
    except UnicodeEncodeError:
        return f"expected Unicode text, found half a surrogate pair in {shown(text)}"
    except ValueError as error:
        return str(error)
    if not _any_of(tuple(control)).search(text):
        return None
    token = next(token for token in control if token in text)
    return f"expected plain text, found the control token {token}; remove it"


@lru_cache
def _any_of(tokens: tuple[str, ...]) -> re.Pattern:
    """Finds in one pass whether any of the tokens stands in a text."""
    return re.compile("|".join(map(re.escape, tokens)) if tokens else r"(?!)")


def check_unique_ids(ids: Iterable[str], place: Callable[[int], str]) -> None:
    """Checks that no two samples of a split have the same id.

    Args:
        ids (Iterable[str]): of all samples of the split, in order.
        place (Callable): number of a sample, from 0 -> where its row stands, see `reading.where`.

    Raises:
        InputError: with both places.
    """
    first: dict[str, int] = {}
    for index, name in enumerate(ids):
        if (earlier := first.setdefault(name, index)) != index:
            raise InputError(
                f"{place(index)}: sample {printable(name)}: id: expected an id of its own, found that of {place(earlier)}"
            )
