"""Questions as TRL's GRPO asks them, and the processor that it asks them with."""

from typing import Any

from transformers.image_processing_base import BatchFeature

from phi3v import Phi3VProcessor
from phi3v.processing_phi3_v import IMAGE_TAG

from ..errors import InputError
from .conversation import Conversation
from .dataset import ConversationDataset
from .images import load_images
from .shown import printable
from .trl_rows import LazyDataset


class GroupProcessor(Phi3VProcessor):
    """Phi3VProcessor in the way in which GRPOTrainer deals with pictures: a row of pixel_values for each, and ids as lists.

    GRPO asks a question several times, shuffles the answers and cuts them into micro-batches. It finds an answer's pictures by
    their number, so that one with several crops in a row each would get those of another.
    """

    def __call__(self, text, images=None, return_tensors=None, **kwargs) -> BatchFeature:  # type: ignore[override]
        """As [`Phi3VProcessor`], with the official layout of pixel_values, and lists unless tensors are asked for."""
        return super().__call__(text, images, return_tensors=return_tensors, pad_crops=True, **kwargs)


def question_dataset(dataset: ConversationDataset, seed: int | None = None) -> LazyDataset:
    """A row {prompt, images, id, question, references} for each turn; earlier turns stand in its prompt with their first answers.

    Args:
        dataset (ConversationDataset): checked rows.
        seed (int, optional): see `LazyDataset`.

    Raises:
        InputError: if a question has image tags of its own.
    """
    places = []
    for index, row in enumerate(dataset.rows):
        conversation = dataset.to_conversation(row)
        for turn in conversation.turns:
            if tag := IMAGE_TAG.search(turn.user):
                raise InputError(
                    f"sample {printable(conversation.id)}: expected a question without image tags, found {tag[0]}; GRPO shows "
                    "pictures before the text of their turn"
                )
        places += [(index, number) for number in range(len(conversation.turns))]

    def make_row(number: int) -> dict[str, Any]:
        index, last = places[number]
        conversation = dataset.to_conversation(dataset.rows[index])
        shown = Conversation(conversation.id, conversation.turns[: last + 1])
        asked = shown.turns[last]
        return {
            "prompt": _messages(shown),
            "images": load_images(shown),
            "id": conversation.id,
            "question": asked.user,
            "references": list(asked.answers),
        }

    return LazyDataset(len(places), make_row, seed)


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Chat messages whose contents are lists of parts, up to the question of the last turn."""
    messages: list[dict[str, Any]] = []
    for turn in conversation.turns:
        pictures: list[dict[str, str]] = [{"type": "image"} for _ in turn.images]
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": turn.user}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answers[0]}]})
    return messages[:-1]
