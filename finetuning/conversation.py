"""Conversation, what every task's rows become; how it is checked and encoded, and the data set of encoded conversations."""

import io
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import ExifTags, Image, ImageOps
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.image_processing_base import BatchFeature

from phi3v import Phi3VProcessor
from phi3v.image_processing_phi3_v import take_images
from phi3v.modeling_phi3_v import IGNORE_INDEX
from phi3v.processing_phi3_v import IMAGE_TAG, find_tags

from .errors import InputError


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


def open_image(source) -> Image.Image:
    """Opens an image; its pixels are read later, when they are needed.

    Args:
        source: path, PIL image, or {"bytes", "path"} of a `datasets.Image` column that does not decode.

    Raises:
        InputError: if it is missing or not an image.
    """
    if isinstance(source, Image.Image):
        return source
    if source is None or (isinstance(source, dict) and source.get("bytes") is None and source.get("path") is None):
        raise InputError(f"expected an image, found {source}")
    if isinstance(source, dict):
        name = source.get("path") or "image bytes"
        source = io.BytesIO(source["bytes"]) if source.get("bytes") is not None else source["path"]
    else:
        name = source
    try:
        with warnings.catch_warnings():
            # Pillow's warning at this size is an error here, at twice the size it is one anyway.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
    except FileNotFoundError:
        raise InputError(f"{name}: expected an image file, found no such file") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{name}: expected an image, found: {error}") from None
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name}: expected at most {Image.MAX_IMAGE_PIXELS} pixels (--max_image_pixels), found: {error}"
        ) from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise InputError(
            f"{name}: expected at most {Image.MAX_IMAGE_PIXELS} pixels (--max_image_pixels), found {image.width} x {image.height}"
        )
    return image


def image_size(source) -> tuple[int, int]:
    """Width and height in pixels of an image turned upright, from its header alone.

    Args:
        source: see `open_image`.

    Raises:
        InputError: if it is missing or not an image.
    """
    image = open_image(source)
    try:
        return image.size[::-1] if _orientation(image) >= 5 else image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{_name(source)}: expected a whole image, found: {error}") from None
    finally:
        if image is not source:
            image.close()


def load_images(conversation: Conversation) -> list[Image.Image]:
    """Images of a conversation, decoded and turned upright.

    Raises:
        InputError: with the conversation's id and the file, if one is missing or cannot be decoded to its end.
    """
    images = []
    for source in conversation.images:
        try:
            image = open_image(source)
            image.load()
            # What a camera wrote beside the pixels; every viewer shows the picture turned that way.
            images.append(ImageOps.exif_transpose(image) if _orientation(image) != 1 else image)
        except InputError as error:
            raise InputError(f"sample {conversation.id}: {error}") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(
                f"sample {conversation.id}: {_name(source)}: expected a whole image, found: {error}"
            ) from None
    return images


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


def training_ids(conversation: Conversation, answers: list[str], processor: Phi3VProcessor, image_tokens: list[int]):
    """input_ids of a trained conversation: the chat template over all turns and a final `<|endoftext|>`."""
    text = processor.apply_chat_template(to_messages(conversation, answers))
    return processor.tokenize(text, image_tokens) + [processor.tokenizer.eos_token_id]


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
        dict: id; input_ids and labels, list[int] of equal length; with images pixel_values, float32, (crops, 3, crop size,
        crop size), and image_sizes, int64, (images, 2), in the order of the tags.

    Raises:
        InputError: with the conversation's id, if it cannot be used.
    """
    where = f"sample {conversation.id}"
    check_conversation(conversation, control_tokens(processor.tokenizer))
    answers = choose_answers(conversation, epoch, seed)
    images, features = load_images(conversation), BatchFeature()
    if images:
        features = processor.image_processor(images)
    ids = training_ids(conversation, answers, processor, features.get("num_img_tokens", []))
    _check_length(len(ids), max_length, where)
    encoded = {"id": conversation.id, "input_ids": ids, "labels": label_answers(ids, processor)}
    if images:
        text = "\n".join(message["content"] for message in to_messages(conversation, answers))
        order = [number - 1 for number in find_tags(text, len(images))]
        crop_size = processor.image_processor.crop_size
        encoded["pixel_values"], encoded["image_sizes"] = take_images(features, order, crop_size)
    return encoded


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
    text = "\n".join(message["content"] for message in to_messages(conversation, choose_answers(conversation)))
    try:
        find_tags(text, len(conversation.images))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def count_tokens(conversation: Conversation, processor: Phi3VProcessor) -> int:
    """Length of the trained conversation in tokens, with its longest answers, from the headers of its images alone."""
    sizes = [image_size(image) for image in conversation.images]
    tokens = [processor.image_processor.calc_num_image_tokens_from_image_size(*size) for size in sizes]
    longest = [
        turn.answers[0] if len(turn.answers) == 1 else max(turn.answers, key=lambda text: len(processor.tokenize(text)))
        for turn in conversation.turns
    ]
    return len(training_ids(conversation, longest, processor, tokens))


def _check_length(length: int, max_length: int | None, where: str) -> None:
    if max_length is not None and length > max_length:
        raise InputError(
            f"{where}: expected at most {max_length} tokens, found {length}; lower --num_crops, raise --max_length or leave the sample out"
        )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation: 1 upright, 2 to 4 mirrored or upside down, 5 to 8 lying on a side; 1 if it makes no sense."""
    # Not image.getexif(): where a PNG's header holds no EXIF data, that decodes all of its pixels to look behind them.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return orientation if orientation in range(1, 9) else 1


def _name(image) -> str:
    return str((image.get("path") if isinstance(image, dict) else image) or "image")


class ConversationDataset(torch.utils.data.Dataset):
    """Rows of a task as features for training.

    Args:
        rows (Sequence): rows of the data set.
        to_conversation (Callable): row -> Conversation, the task's own.
        processor (Phi3VProcessor): its image processor's num_crops counts.
        max_length (int, optional): longest sample allowed, in tokens.
        seed (int): chooses among several answers, with the row's id and the epoch.
        batch_size (int): effective batch. The last optimizer step of an epoch is filled up with rows of the same epoch, others
            in each, so that every step sees exactly this many samples however they are split into ranks and micro-batches.
    """

    def __init__(
        self,
        rows: Sequence,
        to_conversation: Callable[[Any], Conversation],
        processor: Phi3VProcessor,
        max_length: int | None = None,
        seed: int = 0,
        batch_size: int = 1,
    ):
        self.rows, self.to_conversation, self.processor = rows, to_conversation, processor
        self.max_length, self.seed, self.batch_size = max_length, seed, batch_size
        # Of the rows, in tokens, with their longest answers; `check` counts them.
        self.lengths: list[int] | None = None
        # In shared memory, so that workers that live on from epoch to epoch see it too.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def start_epoch(self, epoch: int) -> None:
        """Makes the next epoch choose its own answers; `StartEpoch` calls it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size) * self.batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        conversation = self.to_conversation(self.rows[self._row(index)])
        try:
            return encode_conversation(conversation, self.processor, self.max_length, int(self._epoch), self.seed)
        except InputError:
            raise
        except Exception as error:
            # A worker's traceback alone does not say which row it was.
            raise RuntimeError(f"sample {conversation.id} cannot be encoded: {error!r}") from error

    def length(self, index: int) -> int:
        """Length in tokens, with its longest answers, of the row that `index` stands for in this epoch, see `check`."""
        return self.lengths[self._row(index)]

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if index < len(self.rows):
            return index
        return (index + int(self._epoch) * (len(self) - len(self.rows))) % len(self.rows)

    def check(self) -> None:
        """Checks all rows before a model is loaded, each rank its share: texts, tags, image headers, lengths, which are kept.

        Raises:
            InputError: for the first row that cannot be used, on every rank.
        """
        state, found, lengths = PartialState(), [], []
        for index in range(state.process_index, len(self.rows), state.num_processes):
            try:
                lengths.append(self._check_row(index))
            except InputError as error:
                found.append((index, str(error)))
                break
        found = gather_object(found)
        if found:
            raise InputError(min(found)[1])
        shares = gather_object([lengths])
        self.lengths = [0] * len(self.rows)
        for rank, share in enumerate(shares):
            self.lengths[rank :: len(shares)] = share

    def _check_row(self, index: int) -> int:
        """Returns the row's length in tokens, with its longest answers."""
        row = self.rows[index]
        try:
            conversation = self.to_conversation(row)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            name = f"sample {row['id']}" if "id" in row else f"row {index + 1}"
            raise InputError(
                f"{name}: expected the fields that this script's docstring names, found {', '.join(row)} ({error!r})"
            ) from None
        check_conversation(conversation, control_tokens(self.processor.tokenizer))
        try:
            length = count_tokens(conversation, self.processor)
        except InputError as error:
            raise InputError(f"sample {conversation.id}: {error}") from None
        _check_length(length, self.max_length, f"sample {conversation.id}")
        return length


class StartEpoch(TrainerCallback):
    """Tells the training data set which epoch begins. accelerate's data loader tells a data set only in some set-ups."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        """A resumed run begins in the middle of an epoch: `state.epoch` is then a fraction."""
        train_dataloader.dataset.start_epoch(int(state.epoch or 0))
