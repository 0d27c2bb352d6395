"""A conversation as the features that the model trains on."""

import random
from collections.abc import Callable
from typing import Any

from transformers.image_processing_base import BatchFeature

from phi3v import Phi3VProcessor
from phi3v.image_processing_phi3_v import select_images
from phi3v.modeling_phi3_v import IGNORE_INDEX
from phi3v.processing_phi3_v import find_tags

from ..errors import InputError
from .clips import most_crops
from .conversation import Conversation, check_conversation, control_tokens, to_messages
from .images import image_size, image_sizes, load_images
from .lengths import conversation_lengths
from .shown import printable


def choose_answers(conversation: Conversation, epoch: int = 0, seed: int = 0) -> list[str]:
    """One answer for each turn, the same for the same row, epoch and seed on every rank and in every run."""
    chooser = random.Random(f"{seed}/{epoch}/{conversation.id}")
    return [chooser.choice(turn.answers) for turn in conversation.turns]


def label_answers(input_ids: list[int], processor: Phi3VProcessor) -> list[int]:
    """Labels of a trained conversation: each assistant text, its `<|end|>` and the final `<|endoftext|>`, else -100."""
    tokenizer = processor.tokenizer
    assistant, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    labels, answering = [], False
    for token in input_ids:
        labels.append(token if answering else IGNORE_INDEX)
        answering = token == assistant or (answering and token != end)
    labels[-1] = input_ids[-1]
    return labels


def training_ids(
    conversation: Conversation, answers: list[str], processor: Phi3VProcessor, tokens_of_images: list[int]
):
    """input_ids of a trained conversation: the chat template over all turns and a final `<|endoftext|>`."""
    text = processor.apply_chat_template(to_messages(conversation, answers))
    return processor.tokenize(text, tokens_of_images) + [processor.tokenizer.eos_token_id]


def encode_conversation(
    conversation: Conversation, processor: Phi3VProcessor, max_length: int | None = None, epoch: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Features of a conversation for training.

    Args:
        conversation (Conversation): any number of turns and images.
        processor (Phi3VProcessor): its image processor's num_crops counts.
        max_length (int, optional): longest sample allowed, in tokens.
        epoch, seed (int): choose among several answers.

    Returns:
        dict: id and source; input_ids and labels, list[int] of equal length; with images pixel_values, float32, (crops, 3, crop size,
        crop size), and image_sizes, int64, (images, 2), in the order of the tags.

    Raises:
        InputError: with the conversation's id, if it cannot be used.
    """
    where = f"sample {printable(conversation.id)}"
    check_conversation(conversation, control_tokens(processor.tokenizer))
    answers = choose_answers(conversation, epoch, seed)
    images, features = load_images(conversation), BatchFeature()
    if images:
        crops = most_crops(conversation.images, processor.image_processor.num_crops)
        features = processor.image_processor(images, num_crops=crops)
    ids = training_ids(conversation, answers, processor, features.get("num_img_tokens", []))
    check_length(len(ids), max_length, where)
    encoded: dict[str, Any] = {"id": conversation.id, "source": conversation.source}
    encoded |= {"input_ids": ids, "labels": label_answers(ids, processor)}
    if images:
        text = "\n".join(message["content"] for message in to_messages(conversation, answers))
        order = [number - 1 for number in find_tags(text, len(images))]
        crop_size = processor.image_processor.crop_size
        encoded["pixel_values"], encoded["image_sizes"] = select_images(features, order, crop_size)
    return encoded


def count_tokens(conversation: Conversation, processor: Phi3VProcessor) -> int:
    """Length of the trained conversation in tokens, with its longest answers, from the headers of its images alone."""
    return conversation_lengths([conversation], [image_tokens(conversation, processor)], processor)[0]


def image_tokens(
    conversation: Conversation, processor: Phi3VProcessor, size: Callable[[Any], tuple[int, int]] = image_size
) -> list[int]:
    """Image tokens of each picture of a conversation, from the headers alone; `size` as in `image_sizes`."""
    images = processor.image_processor
    crops = most_crops(conversation.images, images.num_crops)
    sizes = image_sizes(conversation, size)
    return [images.calc_num_image_tokens_from_image_size(*one, most) for one, most in zip(sizes, crops, strict=True)]


def check_length(length: int, max_length: int | None, where: str) -> None:
    if max_length is not None and length > max_length:
        raise InputError(
            f"{where}: expected at most {max_length} tokens, found {length}; lower --num_crops, raise --max_length or leave the sample out"
        )
