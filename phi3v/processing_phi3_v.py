"""Phi3VProcessor: numbered image tags -> image tokens, chat template, batches."""

import json
import os
import re
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import TensorType

from .image_processing_phi3_v import select_images
from .tokenizer_files import read_tokenizer_files, write_tokenizer_files

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
IMAGE_TOKEN = "<|image|>"

# Tag N stands at index N - 1. As many as fit into the model's 131,072 positions, at 313 image tokens at least, and to spare.
IMAGE_TAGS = [f"<|image_{number}|>" for number in range(1, 1001)]

# The official template takes strings only; this one gives the same text for them and also takes content parts:
# {"type": "image"} becomes the next numbered tag. What stands between the generation marks is the assistant's own, for
# `return_assistant_tokens_mask`; the marks render nothing.
CHAT_TEMPLATE = """\
{%- set images = namespace(count=0) -%}
{%- macro render(content) -%}
{%- if content is string -%}
{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' or part['type'] == 'image_url' -%}
{%- set images.count = images.count + 1 -%}
{{ '<|image_' + images.count | string + '|>\\n' }}
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- else -%}
{{ raise_exception("content part of type '" + part['type'] + "': expected 'text', 'image' or 'image_url'") }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{ render(message['content']) + '<|end|>' }}
{%- endgeneration -%}
{%- else -%}
{{ render(message['content']) + '<|end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}
{{ '<|assistant|>\\n' }}
{%- endif -%}
"""


def find_tags(text: str, num_images: int) -> list[int]:
    """Numbers of the image tags `<|image_1|>`, `<|image_2|>`, ... in the order they stand in `text`.

    Raises:
        ValueError: unless the tags name the images 1 to `num_images`, each at least once.
    """
    numbers = [int(number) for number in IMAGE_TAG.findall(text)]
    if set(numbers) != set(range(1, num_images + 1)):
        tags = ", ".join(f"<|image_{number}|>" for number in sorted(set(numbers))) or "none"
        expected = f"<|image_1|> to <|image_{num_images}|>" if num_images else "no image tag"
        raise ValueError(f"image tags {tags} for {num_images} image(s): expected {expected}")
    return numbers


class Phi3VProcessor(ProcessorMixin):
    """Turns texts with numbered image tags, and their images, into the inputs of `Phi3VForCausalLM`.

    Differences from the official processor: image positions hold the id of `<|image|>` (32044) instead of negative ids;
    the number of a tag, not its place, picks its image; batches and padding are supported.

    Args:
        image_processor (Phi3VImageProcessor): the image processor.
        tokenizer: the fast tokenizer of the model.
        chat_template (str, optional): Jinja template; by default one that gives what the official template gives for
            strings and takes content parts as well.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template: str | None = None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"the tokenizer has no token {IMAGE_TOKEN}: expected the tokenizer of a Phi-3-vision model"
            )

    def tokenize(self, text: str, num_image_tokens: list[int] | None = None) -> list[int]:
        """Ids of one text, image tags replaced by as many `<|image|>` ids as the image has tokens.

        The text between two tags is tokenized by itself and so starts with BOS: the official processor does the same,
        and the model was trained on it.

        Args:
            text (str): text with tags `<|image_N|>`.
            num_image_tokens (list[int], optional): tokens of image 1, image 2, ...

        Returns:
            list[int]: token ids.

        Raises:
            ValueError: if tags and images do not match.
        """
        return self._encode(text, num_image_tokens or [])[0]

    def _encode(self, text: str, num_image_tokens: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids as of `tokenize`, and for each its first character in `text` and the one after its last.

        BOS and image tokens have no character of their own: their span is empty.
        """
        numbers = find_tags(text, len(num_image_tokens))
        tags = [tag.span() for tag in IMAGE_TAG.finditer(text)]
        ids, spans = [], []
        for image, (start, end) in enumerate(pairwise([0, *chain(*tags), len(text)])):
            if image % 2:  # a tag
                count = num_image_tokens[numbers[image // 2] - 1]
                ids += [self.image_token_id] * count
                spans += [(start, start)] * count
            else:
                chunk = self.tokenizer(text[start:end], return_offsets_mapping=True)
                ids += chunk.input_ids
                spans += [(start + first, start + last) for first, last in chunk.offset_mapping]
        return ids, spans

    def __call__(
        self,
        text: str | list[str],
        images=None,
        padding: bool | str = False,
        padding_side: str | None = None,
        max_length: int | None = None,
        num_crops: int | Sequence[int] | None = None,
        return_tensors: str | TensorType | None = TensorType.PYTORCH,
        videos=None,
        audio=None,
        *,
        pad_to_multiple_of: int | None = None,
        truncation: bool | str | None = None,
        add_special_tokens: bool = True,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
        return_text_replacement_offsets: bool = False,
        pad_crops: bool = False,
    ) -> BatchFeature:
        """Prepares one text or a list of texts, with their images.

        Args:
            text (str | list[str]): texts with image tags `<|image_1|>`, `<|image_2|>`, ..., numbered from 1 in each text.
            images (optional): for one text an image or a list of images; for a list of texts a list with a list of
                images (empty or None where there is none) for each text. A flat list is dealt out by the tags. An image
                is whatever `to_pil` takes: PIL images, arrays, paths, data URIs.
            padding (bool | str): as in tokenizers: False, True or "longest", "max_length".
            padding_side (str, optional): "left" (for generation) or "right"; by default the tokenizer's own.
            max_length (int, optional): in tokens, for padding="max_length" and `truncation`.
            num_crops (int or list[int], optional): most HD crops of an image, instead of the image processor's own; or of each
                image, in the order of `images`.
            return_tensors (str, optional): "pt" (the default), "np" or None for lists.
            videos, audio: must be None; apply_chat_template(tokenize=True) passes them.
            pad_to_multiple_of (int, optional): as in tokenizers, in tokens.
            truncation (bool | str, optional): nothing is ever cut; where it is asked for, a text longer than `max_length`
                is refused.
            add_special_tokens (bool): taken, because others pass False for a text of the chat template; without effect,
                because the model was trained with BOS there and no template writes it.
            return_attention_mask (bool): False leaves attention_mask out.
            return_offsets_mapping (bool): adds offset_mapping, for each row a list of a pair for each token: its first
                character in the text and the one after its last, equal for BOS, image tokens and padding.
            return_text_replacement_offsets (bool): taken, because apply_chat_template passes it; without effect, because
                offsets refer to the text as it was given.
            pad_crops (bool): pixel_values in the official layout, (images, num_crops + 1, 3, crop size, crop size), each
                image filled up with zeros.

        Returns:
            BatchFeature: input_ids and attention_mask, int64, (batch, length); where there are images, pixel_values,
            float32, (total crops, 3, crop size, crop size), and image_sizes, int64, (images, 2), both in the order of the
            tags over the whole batch.

        Raises:
            ValueError: if tags and images do not match, if texts of unequal length are to become one tensor unpadded, or
                if a text would have to be cut.
        """
        if videos is not None or audio is not None:
            raise ValueError("videos and audio: expected none; give a video as a list of images, one for each frame")
        if not isinstance(text, (str, list, tuple)):
            raise TypeError(f"expected a text or a list of texts, found {type(text).__name__}")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("found no text: expected at least one")
        nested = self._nest_images(texts, images, isinstance(text, str))
        order, starts = [], [0]
        for row_text, row_images in zip(texts, nested, strict=True):
            order += [starts[-1] + number - 1 for number in find_tags(row_text, len(row_images))]
            starts.append(starts[-1] + len(row_images))
        features = BatchFeature({"num_img_tokens": []})
        if order:
            # All at once: what is gathered from several calls is copied, and a page's crops are 23 MB.
            features = self.image_processor([image for row in nested for image in row], num_crops=num_crops)
        counts = [features["num_img_tokens"][start:end] for start, end in pairwise(starts)]
        rows, spans = zip(*(self._encode(*row) for row in zip(texts, counts, strict=True)), strict=True)
        lengths = sorted(len(row) for row in rows)
        if truncation not in (None, False, "do_not_truncate"):
            limit = self.tokenizer.model_max_length if max_length is None else max_length
            if lengths[-1] > limit:
                raise ValueError(
                    f"a text of {lengths[-1]} tokens: expected at most max_length {limit}, since nothing is cut, so that no "
                    "image loses tokens; give a larger max_length, fewer num_crops or truncation=False"
                )
        if return_tensors is not None and padding is False and lengths[0] != lengths[-1]:
            raise ValueError(f"texts of {lengths[0]} to {lengths[-1]} tokens: expected padding=True to batch them")
        data = self.tokenizer.pad(
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]},
            padding=padding,
            padding_side=padding_side,
            # Given to any other padding, the tokenizer would warn that it has no effect.
            max_length=max_length if padding == "max_length" else None,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
        )
        data = dict(data)
        if return_offsets_mapping:
            side = padding_side or self.tokenizer.padding_side
            data["offset_mapping"] = [
                self._pad_spans(self._without_stripped_space(row, found), len(padded), len(row_text), side)
                for row, found, padded, row_text in zip(rows, spans, data["input_ids"], texts, strict=True)
            ]
        if not return_attention_mask:
            del data["attention_mask"]
        if order:
            pixels: Any
            image_sizes: Any
            pixels, image_sizes = select_images(features, order, self.image_processor.crop_size)
            if pad_crops:
                most = max(num_crops) if isinstance(num_crops, Sequence) else num_crops
                pixels = self.image_processor.pad_crops(pixels, image_sizes, most)
            if return_tensors is not None and TensorType(return_tensors) == TensorType.NUMPY:
                pixels, image_sizes = pixels.numpy(), image_sizes.numpy()
            data |= {"pixel_values": pixels, "image_sizes": image_sizes}
        return BatchFeature(data)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation,
        chat_template: str | None = None,
        *,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """As in [`ProcessorMixin`]; with `return_assistant_tokens_mask`, everything is a list unless return_tensors says otherwise.

        transformers gives the mask as lists then, and who asks for it (TRL) reads the ids beside it as numbers.
        """
        if return_assistant_tokens_mask:
            processor_kwargs = {"return_tensors": None, **(processor_kwargs or {})}
        return super().apply_chat_template(
            conversation,
            chat_template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    def _without_stripped_space(self, ids: list[int], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Spans in which a token such as `<|assistant|>` does not count the white space that it swallows behind it.

        Where an answer begins with a blank, `<|assistant|>` would be taken for a token of the answer.
        """
        widths = {key: len(token.content) for key, token in self.tokenizer.added_tokens_decoder.items() if token.rstrip}
        return [
            (start, min(end, start + widths[token])) if token in widths else (start, end)
            for token, (start, end) in zip(ids, spans, strict=True)
        ]

    @staticmethod
    def _pad_spans(spans: list[tuple[int, int]], length: int, end: int, side: str) -> list[tuple[int, int]]:
        # At the end of the text, not at 0, where padding is on the right: readers search the spans as a sorted list.
        missing = length - len(spans)
        return [(0, 0)] * missing + spans if side == "left" else spans + [(end, end)] * missing

    @property
    def img_tokens(self) -> list[str]:
        """Tags by image (same name as in the official processor); vLLM takes the first few."""
        return IMAGE_TAGS

    def calc_num_image_tokens_from_image_size(self, width: int, height: int, num_crops: int | None = None) -> int:
        """Image tokens of a `width` x `height` image, see [`Phi3VImageProcessor.calc_num_image_tokens_from_image_size`]."""
        return self.image_processor.calc_num_image_tokens_from_image_size(width, height, num_crops)

    @staticmethod
    def _nest_images(texts: list[str], images, single_text: bool) -> list[list]:
        if images is None:
            return [[] for _ in texts]
        if not isinstance(images, (list, tuple)):
            images = [images]
        if single_text and not any(isinstance(group, (list, tuple)) for group in images):
            return [list(images)]
        if any(group is None or isinstance(group, (list, tuple)) for group in images):
            if len(images) != len(texts):
                raise ValueError(
                    f"{len(images)} list(s) of images for {len(texts)} text(s): expected one for each text"
                )
            return [
                list(group) if isinstance(group, (list, tuple)) else [] if group is None else [group]
                for group in images
            ]
        counts = [len(set(IMAGE_TAG.findall(text))) for text in texts]
        if sum(counts) != len(images):
            raise ValueError(f"{len(images)} image(s) for {sum(counts)} image tag(s) in {len(texts)} text(s)")
        images = iter(images)
        return [[next(images) for _ in range(count)] for count in counts]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Saves everything in the layout of the official folder, which transformers 4.x and others read too.

        The tokenizer's files are those that it was loaded from; processor_config.json, in which transformers 5 writes the image
        processor as well, names only the classes, and preprocessor_config.json holds the image processor.
        """
        folder, source = Path(save_directory), read_tokenizer_files(self.tokenizer)
        files = super().save_pretrained(save_directory, **({} if push_to_hub else kwargs))
        write_tokenizer_files(self.tokenizer, folder, source, self.chat_template)
        self.image_processor.to_json_file(folder / "preprocessor_config.json")
        official = self.image_processor.to_dict()
        names = {key: official[key] for key in ("auto_map", "processor_class")}
        (folder / "processor_config.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            # Not by transformers' own save_pretrained, which would push before the files are complete.
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return files


__all__ = ["Phi3VProcessor"]
