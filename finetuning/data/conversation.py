"""Conversation, what the rows of every task become: its turns, its chat messages, and what its texts may hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from phi3v.processing_phi3_v import IMAGE_TAG, find_tags

from ..errors import InputError


@dataclass
class Turn:
    """One question and its answer.

    Args:
        user (str): the question. Image tags `<|image_1|>`, ... are put before it unless it holds its own.
        answers (list[str]): acceptable answers; training picks one in each epoch, evaluation may compare with all.
        images (list): images of this turn: paths, PIL images, or the {"bytes", "path"} of a `datasets.Image` column.
        choices (list[str]): for a closed question all possible answers; evaluation then records their probabilities.
    """

    user: str
    answers: list[str]
    images: list = field(default_factory=list)
    choices: list[str] = field(default_factory=list)


@dataclass
class Conversation:
    """Turns of one sample; image tags count over all of its turns."""

    id: str
    turns: list[Turn]

    @property
    def images(self) -> list:
        return [image for turn in self.turns for image in turn.images]


def from_jsonl(row: dict[str, Any]) -> Conversation:
    """Conversation of a row of a converted folder: {"id", "conversations": [{"images", "user", "assistant"}]}.

    Raises:
        InputError: with the row's id, if a field is missing or of another type.
    """
    where = f"sample {row.get('id')}"
    if not isinstance(row.get("id"), (str, int)):
        raise InputError(f'{where}: expected "id" with a text or number, found {row.get("id")!r}')
    if not isinstance(row.get("conversations"), list) or not row["conversations"]:
        raise InputError(f'{where}: expected "conversations" with a list of turns, found {row.get("conversations")!r}')
    turns = []
    for number, turn in enumerate(row["conversations"], 1):
        if not isinstance(turn, dict):
            raise InputError(f"{where}, turn {number}: expected an object, found {turn!r}")
        user, answers, images = turn.get("user"), turn.get("assistant"), turn.get("images", [])
        if not isinstance(user, str):
            raise InputError(f'{where}, turn {number}: expected "user" with a text, found {user!r}')
        if not isinstance(images, list):
            raise InputError(f'{where}, turn {number}: expected "images" with a list of paths, found {images!r}')
        turns.append(Turn(user, answers if isinstance(answers, list) else [answers], images))
    return Conversation(str(row["id"]), turns)


def to_messages(conversation: Conversation, answers: Sequence[str]) -> list[dict[str, str]]:
    """Chat messages of the first `len(answers) + 1` turns, or of all of them if there is an answer for each.

    Images are tagged before the text of their turn unless a user text of the conversation holds tags of its own.
    """
    tagged = any(IMAGE_TAG.search(turn.user) for turn in conversation.turns)
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


def check_conversation(conversation: Conversation, control: Sequence[str]) -> None:
    """Checks what can be known without opening an image; `control` is what `control_tokens` gives.

    Raises:
        InputError: with the conversation's id and turn, if there is no turn, no answer, an answer that is not text, an
            image tag without its image, or a control token inside a text.
    """
    where = f"sample {conversation.id}"
    if not conversation.turns:
        raise InputError(f"{where}: expected at least one turn, found none")
    for number, turn in enumerate(conversation.turns, 1):
        if not isinstance(turn.answers, (list, tuple)) or not turn.answers:
            raise InputError(
                f"{where}, turn {number}: expected a list with at least one answer, found {turn.answers!r}"
            )
        for answer in turn.answers:
            if not isinstance(answer, str) or not answer.strip():
                raise InputError(f"{where}, turn {number}: expected a text as answer, found {answer!r}")
            if IMAGE_TAG.search(answer):
                raise InputError(
                    f"{where}, turn {number}: expected image tags in user texts only, found one in the answer {answer!r}"
                )
        for text in (turn.user, *turn.answers):
            if not isinstance(text, str):
                raise InputError(f"{where}, turn {number}: expected text, found {text!r}")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"{where}, turn {number}: expected Unicode text, found half a surrogate pair in {text!r}"
                ) from None
            token = next((token for token in control if token in text), None)
            if token is not None:
                raise InputError(
                    f"{where}, turn {number}: expected plain text, found the control token {token}; remove it"
                )
    text = "\n".join(
        message["content"] for message in to_messages(conversation, [turn.answers[0] for turn in conversation.turns])
    )
    try:
        find_tags(text, len(conversation.images))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
