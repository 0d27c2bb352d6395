"""vLLM's own Phi-3-vision, fed by Phi3VProcessor: the real crops of an image instead of num_crops + 1 for each."""

from itertools import groupby

import torch
from PIL import Image
from vllm.model_executor.models import phi3v as vllm_phi3v
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo, PromptReplacement, cached_encode

from .image_processing_phi3_v import count_image_tokens, to_rgb
from .processing_phi3_v import IMAGE_TAG, find_tags


def count_crops(image_sizes: torch.Tensor) -> torch.Tensor:
    """Crops of each image, global view included: height and width of the HD images in pixels (images, 2) -> (images,)."""
    return 1 + image_sizes.prod(-1) // vllm_phi3v.CLIP_VIT_LARGE_PATCH14_336_CONFIG.image_size**2


def text_of(tokenizer, token_ids: list[int]) -> str:
    """The text that these ids came from, without a BOS at its start, up to white space that tokens such as `<|end|>` swallow.

    Decoded in one piece it would show the blank that the tokenizer puts before the text after each special token.
    """
    if token_ids[:1] == [tokenizer.bos_token_id]:
        token_ids = token_ids[1:]
    added = tokenizer.added_tokens_decoder
    pieces = []
    for is_added, run in groupby(token_ids, key=added.__contains__):
        if is_added:
            pieces += [added[token].content for token in run]
        else:
            pieces.append(tokenizer.decode(list(run), clean_up_tokenization_spaces=False))
    return "".join(pieces)


class Phi3VDataParser(MultiModalDataParser):
    def _parse_image_data(self, data):
        """Makes pictures RGB as in training; vLLM would put transparent ones on white and make 16-bit greys white."""
        if isinstance(data, (list, tuple)):
            data = [self.make_rgb(item) for item in data]
        elif data is not None:
            data = self.make_rgb(data)
        return super()._parse_image_data(data)

    @staticmethod
    def make_rgb(item):
        # What a request brings is wrapped together with its bytes.
        image = getattr(item, "media", item)
        return to_rgb(image) if isinstance(image, Image.Image) and image.mode != "RGB" else item


class Phi3VProcessingInfo(vllm_phi3v.Phi3VProcessingInfo):
    def get_data_parser(self):
        return Phi3VDataParser(
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


class Phi3VMultiModalProcessor(vllm_phi3v.Phi3VMultiModalProcessor):
    def _call_hf_processor(self, hf_data, hf_kwargs):
        try:
            return super()._call_hf_processor(hf_data, hf_kwargs)
        except ValueError as error:
            if isinstance(error.__cause__, ValueError):
                # What Phi3VProcessor finds wrong with a request; vLLM would keep it from the client.
                raise error.__cause__ from None
            raise

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        sizes = hf_inputs.get("image_sizes", torch.empty(0, 2, dtype=torch.long))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", count_crops(sizes)),
            "image_sizes": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        # By the sizes that the processor found and the id that it uses; vLLM's own counts with num_crops as configured,
        # whatever a request asks for, and takes 32044 for granted.
        processor, tokenizer = self.info.get_hf_processor(**hf_processor_mm_kwargs), self.info.get_tokenizer()

        def tag(image: int) -> list[int]:
            return cached_encode(tokenizer, processor.img_tokens[image], add_special_tokens=False)

        def image_tokens(image: int) -> list[int]:
            size = out_mm_kwargs["image"][image]["image_sizes"].data.tolist()
            return [processor.image_token_id] * count_image_tokens(*size)

        return [PromptReplacement(modality="image", target=tag, replacement=image_tokens)]

    def _apply_prompt_updates(self, token_ids, mm_prompt_updates):
        # As Phi3VProcessor.tokenize does: text after an image starts with BOS. vLLM has the ids of the whole text alone.
        images = [updates[0].content.full for updates in mm_prompt_updates.get("image", [])]
        if not images:
            return token_ids, {}
        tokenizer = self.info.get_tokenizer()
        text = text_of(tokenizer, token_ids)
        if len(find_tags(text, len(images))) > len(images):
            raise ValueError(
                "an image tag stands twice in the prompt: expected each image once, since vLLM places it once"
            )
        ids, placed = [], {}
        for piece, chunk in enumerate(IMAGE_TAG.split(text)):
            if piece % 2:  # the number of a tag
                image = int(chunk) - 1
                placed[image] = PlaceholderFeaturesInfo("image", image, len(ids), images[image], None)
                ids += images[image]
            else:
                ids += tokenizer(chunk).input_ids
        return ids, {"image": [placed[image] for image in range(len(images))]}


@MULTIMODAL_REGISTRY.register_processor(
    Phi3VMultiModalProcessor,
    info=Phi3VProcessingInfo,
    dummy_inputs=vllm_phi3v.Phi3VDummyInputsBuilder,
)
class Phi3VForVLLM(vllm_phi3v.Phi3VForCausalLM):
    def embed_multimodal(self, pixel_values=None, image_sizes=None, **kwargs):
        """Features of each image, (image tokens, hidden_size), of crops (C, 3, 336, 336) and HD sizes (images, 2) in pixels."""
        if pixel_values is None:
            return []
        embedding = self.vision_embed_tokens
        features = embedding.get_img_features(pixel_values).split(count_crops(image_sizes).tolist())
        # Padded only after the tower, which is what costs time: `hd_feature_transform` reads the real ones.
        return embedding.hd_feature_transform(torch.nn.utils.rnn.pad_sequence(features, batch_first=True), image_sizes)
