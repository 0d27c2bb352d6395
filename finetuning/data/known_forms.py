"""Rows of the forms that people have, as conversations: native, LLaVA, ShareGPT, OpenAI's and TRL's messages, questions and answers.

Two steps, since only the first one knows the folder: `locate_pictures` makes paths whole, `known_conversation` checks and reads.
"""

import base64
import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlparse

from pydantic import ValidationError

from ..errors import InputError
from .conversation import Conversation, Turn
from .rows import resolve_images
from .schemas import (
    ChatMessage,
    ChatPart,
    ChatRow,
    ConvertedRow,
    QuestionRow,
    chat_format,
    describe_fault,
    parse_row,
    sample_name,
)
from .shown import printable, shown

MARK = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
CURE = "--columns question=NAME and so on say which column is which"


def is_question(row: Mapping[str, Any]) -> bool:
    """Whether a row seems to be a question with its answer in columns."""
    return not {"question", "answer", "answers"}.isdisjoint(row) and "query" not in row


def known_conversation(row: Mapping[str, Any]) -> Conversation:
    """The conversation in a row of any of the forms, an `id` among its fields.

    Raises:
        InputError: with the row's id and the field, if it is of no form that is known or a field does not fit.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"expected a row with named fields, found {shown(row)}")
    if chat_format(row):
        return _chat(row)
    if "conversations" in row:
        return parse_row(row, ConvertedRow).to_conversation()
    if is_question(row):
        return _question(row)
    found = printable(", ".join(map(str, row)), 120) or "no field"
    raise InputError(
        f'{sample_name(row)}expected the field "conversations" (native, LLaVA, ShareGPT), "messages" (OpenAI, TRL), or "question" '
        f'and "answer", found {found}; {CURE}'
    )


def locate_pictures(row: Mapping[str, Any], folder: str | os.PathLike) -> dict[str, Any]:
    """The row with whole paths of its pictures, and the bytes of those that are data URIs.

    In the native form a path is relative to images/ in the folder; in all others to the folder or to its images/.

    Raises:
        InputError: with the field, if a path leaves the folder or is none that can be read.
    """
    if chat_format(row) is None and not is_question(row):
        return resolve_images(row, folder)
    row = dict(row)
    for key in ("image", "images"):
        if key in row:
            row[key] = _located(row[key], folder, key)
    for key in ("messages", "conversations"):
        if isinstance(row.get(key), list):
            row[key] = [_located_in(message, folder, f"{key}[{n}]") for n, message in enumerate(row[key])]
    return row


def _located_in(message: Any, folder: str | os.PathLike, place: str) -> Any:
    """A message with the pictures among its parts located."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    parts = []
    for number, part in enumerate(content):
        if isinstance(part, dict):
            field = f"{place}: content[{number}]."
            part = {
                key: _located(value, folder, field + key) if key in ("image", "image_url") else value
                for key, value in part.items()
            }
        parts.append(part)
    return {**message, "content": parts}


def _located(value: Any, folder: str | os.PathLike, field: str) -> Any:
    """The value with a whole path wherever it is one; what is no picture is left for the row's model."""
    if isinstance(value, list):
        return [_located(item, folder, f"{field}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, dict) and isinstance(value.get("url"), str):
        value = value["url"]
    if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
        value = value["path"]
    if not isinstance(value, str) or not value:
        return value
    try:
        return _locate(value, folder)
    except InputError as error:
        raise InputError(f"{field}: {error}") from None


def _locate(source: str, folder: str | os.PathLike) -> str | dict[str, Any]:
    """Whole path of a picture; of a data URI {"bytes", "path"}, the path made of its SHA-256."""
    if source.startswith(("http://", "https://")):
        raise InputError(
            f"expected a path, file:// or data: as image, found {shown(source)}; download what is on the web"
        )
    if source.startswith("data:"):
        match = re.fullmatch(r"data:image/(\w+);base64,(.+)", source, re.DOTALL)
        try:
            content = base64.b64decode(match[2], validate=True) if match else b""
        except ValueError:
            content = b""
        if not match or not content:
            raise InputError(f"expected data:image/TYPE;base64,..., found {shown(source)}")
        return {"bytes": content, "path": f"{hashlib.sha256(content).hexdigest()}.{match[1]}"}
    if source.startswith("file://"):
        source = unquote(urlparse(source).path)
    path = _inside(source, folder)
    if not os.path.exists(path) and os.path.exists(os.path.join(folder, "images", source)):
        path = _inside(os.path.join("images", source), folder)
    return path


def _inside(path: str, folder: str | os.PathLike) -> str:
    try:
        return resolve_images({"image": path}, folder)["image"]
    except InputError as error:
        raise InputError(str(error).removeprefix("image: ")) from None


def _chat(row: Mapping[str, Any]) -> Conversation:
    try:
        chat = ChatRow.model_validate(dict(row))
    except ValidationError as error:
        raise InputError(f"{sample_name(row)}{describe_fault(error, row)}") from None
    field = "messages" if "messages" in row else "conversations"
    return Conversation(chat.id, _ChatReader(chat, field, sample_name(row)).turns())


def _question(row: Mapping[str, Any]) -> Conversation:
    try:
        asked = QuestionRow.model_validate(dict(row))
    except ValidationError as error:
        cure = f"; {CURE}" if error.errors()[0]["type"] == "missing" else ""
        raise InputError(f"{sample_name(row)}{describe_fault(error, row)}{cure}") from None
    turn = Turn(asked.question, asked.answers, asked.images)
    if MARK in asked.question and asked.images:
        messages = [
            ChatMessage(role="user", content=asked.question),
            ChatMessage(role="assistant", content=asked.answers[0]),
        ]
        chat = ChatRow(id=asked.id, images=asked.images, messages=messages)
        [turn] = _ChatReader(chat, "question", sample_name(row)).turns()
        turn.answers = asked.answers
    return Conversation(asked.id, [turn])


class _ChatReader:
    """The turns of a chat: `<image>` and parts without a path take the next picture, a tag `<|image_N|>` stands in their place.

    Args:
        chat (ChatRow): the row.
        field (str): name of the field with the messages, for error messages.
        where (str): what error messages begin with.
    """

    def __init__(self, chat: ChatRow, field: str, where: str):
        self.chat, self.field, self.where = chat, field, where
        self.sources: list[Any] = []
        self.waiting = list(chat.images)

    def turns(self) -> list[Turn]:
        """Questions and answers, system messages before the first question.

        Raises:
            InputError: if roles, or pictures and `<image>`, do not fit.
        """
        system = [self.chat.system] if self.chat.system else []
        turns: list[Turn] = []
        for index, message in enumerate(self.chat.messages):
            place = f"{self.where}{self.field}[{index}]"
            placed = len(self.sources) if turns else 0
            role, answered = ROLES[message.role], not turns or bool(turns[-1].answers)
            try:
                text = self._text(message)
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
            if role == "system" and not turns:
                system.append(text)
            elif role == "user" and answered:
                turns.append(Turn("\n\n".join([*system, text]), [], self.sources[placed:]))
                system = []
            elif role == "assistant" and not answered:
                turns[-1].answers = [text]
            else:
                expected = "user" if answered else "assistant"
                raise InputError(f"{place}: expected a message of the {expected}, found one of {message.role}")
        if turns and not turns[-1].answers:
            raise InputError(
                f"{self.where}{self.field}: expected an answer to the last message of the user, found none"
            )
        self._check_marks(turns)
        return turns

    def _check_marks(self, turns: list[Turn]) -> None:
        left = sum(text.count(MARK) for turn in turns for text in (turn.user, *turn.answers))
        # Images that stand as parts of messages leave `<image>` a text like any other.
        if self.waiting or (left and len(self.sources) == len(self.chat.images)):
            count, found = len(self.chat.images), len(self.chat.images) - len(self.waiting) + left
            raise InputError(f"{self.where}expected {count} placeholder(s) {MARK} for {count} image(s), found {found}")

    def _tag(self, source: Any) -> str:
        self.sources.append(source)
        return f"<|image_{len(self.sources)}|>"

    def _text(self, message: ChatMessage) -> str:
        if isinstance(message.content, str):
            return re.sub(
                MARK, lambda mark: self._tag(self.waiting.pop(0)) if self.waiting else mark[0], message.content
            )
        return "".join(map(self._part, message.content))

    def _part(self, part: ChatPart) -> str:
        if part.type == "text":
            return part.text or ""
        source = part.image if part.type == "image" else part.image_url
        if source is None and self.waiting:
            source = self.waiting.pop(0)
        if source is None:
            raise InputError(f"expected a path, file:// or data: in the part of type {part.type}, found none")
        # A line break after the tag, as in the processor's chat template.
        return self._tag(source) + "\n"
