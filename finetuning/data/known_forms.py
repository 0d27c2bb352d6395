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
from .clips import Clip
from .conversation import Conversation, Turn
from .rows import Row, resolve_images
from .schemas import (
    ChatMessage,
    ChatPart,
    ChatRow,
    ConvertedRow,
    QuestionRow,
    chat_format,
    describe_fault,
    frames_of,
    parse_row,
    sample_name,
)
from .shown import printable, shown

MARK, VIDEO_MARK = "<image>", "<video>"
MARKS = re.compile(f"{MARK}|{VIDEO_MARK}")
VIDEO_FIELDS = ("video", "videos")
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
    conversation = _of_form(row)
    conversation.source = row.source if isinstance(row, Row) else ""
    return conversation


def _of_form(row: Mapping[str, Any]) -> Conversation:
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


def locate_pictures(row: Mapping[str, Any], folder: str | os.PathLike, num_frames: int) -> dict[str, Any]:
    """The row with whole paths of its pictures, the bytes of those that are data URIs, and a `Clip` for each path of a clip.

    In the native form a path of a picture is relative to images/ in the folder; all others to the folder or to its images/.

    Args:
        row (Mapping): of any form.
        folder (path): what paths are relative to.
        num_frames (int): frames of a clip.

    Raises:
        InputError: with the field, if a path leaves the folder or is none that can be read.
    """
    native = chat_format(row) is None and not is_question(row)
    row = _with_clips(resolve_images(row, folder) if native else dict(row), folder, num_frames, "")
    for key in () if native else ("image", "images"):
        if key in row:
            row[key] = _located(row[key], folder, key)
    for key in ("messages", "conversations"):
        if isinstance(row.get(key), list):
            row[key] = [_located_in(message, folder, num_frames, f"{key}[{n}]") for n, message in enumerate(row[key])]
    return row


def _located_in(message: Any, folder: str | os.PathLike, num_frames: int, place: str) -> Any:
    """A message, or a turn of the native form, with its clips and the pictures among its parts located."""
    if not isinstance(message, dict):
        return message
    message = _with_clips(message, folder, num_frames, f"{place}.")
    content = message.get("content")
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
            part = _with_clips(part, folder, num_frames, field)
        parts.append(part)
    return {**message, "content": parts}


def _with_clips(values: dict[str, Any], folder: str | os.PathLike, num_frames: int, place: str) -> dict[str, Any]:
    """The same with a `Clip` for each path in its fields of clips."""
    clips = {key: _clips_at(values[key], folder, num_frames, place + key) for key in VIDEO_FIELDS if key in values}
    return {**values, **clips}


def _clips_at(value: Any, folder: str | os.PathLike, num_frames: int, field: str) -> Any:
    """A `Clip` for a path, or one for each of a list; what is no path is left for the row's model."""
    if isinstance(value, list):
        return [_clips_at(item, folder, num_frames, f"{field}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        value = value["path"]
    if not isinstance(value, str) or not value:
        return value
    if value.startswith(("http://", "https://", "data:")):
        raise InputError(f"{field}: expected a path of a clip, found {shown(value)}; make a file of it")
    try:
        return Clip(str(_locate(value, folder)), num_frames)
    except InputError as error:
        raise InputError(f"{field}: {error}".replace("an image path", "a path")) from None


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
    turn = Turn(asked.question, asked.answers, asked.images + frames_of(asked.videos))
    if turn.images and MARKS.search(asked.question):
        messages = [
            ChatMessage(role="user", content=asked.question),
            ChatMessage(role="assistant", content=asked.answers[0]),
        ]
        chat = ChatRow(id=asked.id, images=asked.images, videos=asked.videos, messages=messages)
        [turn] = _ChatReader(chat, "question", sample_name(row)).turns()
        turn.answers = asked.answers
    return Conversation(asked.id, [turn])


class _ChatReader:
    """The turns of a chat: `<image>` and parts without a path take the next picture, a tag `<|image_N|>` stands in their place.

    `<video>` takes the next clip, whose frames' tags stand in its place. Where there are clips and no pictures, `<image>` may stand
    for a clip, as in LLaVA-Video.

    Args:
        chat (ChatRow): the row.
        field (str): name of the field with the messages, for error messages.
        where (str): what error messages begin with.
    """

    def __init__(self, chat: ChatRow, field: str, where: str):
        self.chat, self.field, self.where = chat, field, where
        self.sources: list[Any] = []
        self.given: dict[str, list[Any]] = {MARK: list(chat.images), VIDEO_MARK: list(chat.videos)}
        texts = [message.content for message in chat.messages if isinstance(message.content, str)]
        if chat.videos and not chat.images and any(MARK in text for text in texts) and VIDEO_MARK not in "".join(texts):
            self.given = {MARK: list(chat.videos), VIDEO_MARK: []}
        self.waiting = {mark: list(sources) for mark, sources in self.given.items()}
        self.in_parts: set[str] = set()

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
        for mark, waiting in self.waiting.items():
            left = sum(text.count(mark) for turn in turns for text in (turn.user, *turn.answers))
            # Images that stand as parts of messages leave `<image>` a text like any other.
            if waiting or (left and mark not in self.in_parts):
                count = len(self.given[mark])
                kind = "clip" if mark == VIDEO_MARK or isinstance(next(iter(self.given[mark]), None), Clip) else "image"
                found = count - len(waiting) + left
                raise InputError(
                    f"{self.where}expected {count} placeholder(s) {mark} for {count} {kind}(s), found {found}"
                )

    def _tag(self, source: Any) -> str:
        if isinstance(source, Clip):
            return "\n".join(map(self._tag, source.frames))
        self.sources.append(source)
        return f"<|image_{len(self.sources)}|>"

    def _text(self, message: ChatMessage) -> str:
        if isinstance(message.content, str):
            return MARKS.sub(
                lambda mark: self._tag(self.waiting[mark[0]].pop(0)) if self.waiting[mark[0]] else mark[0],
                message.content,
            )
        return "".join(map(self._part, message.content))

    def _part(self, part: ChatPart) -> str:
        if part.type == "text":
            return part.text or ""
        mark = VIDEO_MARK if part.type == "video" else MARK
        source = {"image": part.image, "video": part.video}.get(part.type, part.image_url)
        if source is not None:
            self.in_parts.add(mark)
        elif self.waiting[mark]:
            source = self.waiting[mark].pop(0)
        else:
            raise InputError(f"expected a path, file:// or data: in the part of type {part.type}, found none")
        # A line break after the tag, as in the processor's chat template.
        return self._tag(source) + "\n"
