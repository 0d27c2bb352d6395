"""Batches of encoded conversations, padded or padding-free."""

from dataclasses import dataclass
from typing import Any

import torch

from phi3v.image_processing_phi3_v import join_crops
from phi3v.modeling_phi3_v import IGNORE_INDEX


@dataclass
class DataCollatorForPhi3V:
    """Makes one batch of the features that `encode_conversation` returns.

    Args:
        pad_token_id (int): fills short rows; the attention mask comes from the lengths, never from this id, because the
            model learns to write it (`<|endoftext|>`).
        padding_free (bool): join the samples in one row, their positions starting again at 0, instead of padding them.
    """

    pad_token_id: int
    padding_free: bool = False

    def __call__(self, features: list[dict[str, Any] | None]) -> dict[str, Any]:
        """Collates B samples of up to N tokens; a None among them is a place without a sample.

        Where there is no sample at all the batch holds one of two padding tokens without a label: it counts nothing, but
        takes part in the forward and backward pass, in which all ranks wait for each other.

        Returns:
            dict: input_ids and labels, int64, (B, N), with attention_mask; or, padding-free, (1, sum of the lengths) with
            position_ids and what variable-length attention kernels read (cu_seq_lens_q/k, max_length_q/k). With images,
            pixel_values (all crops, 3, crop size, crop size) and image_sizes (all images, 2). `ids` of the samples, and
            `sources`, where there are several.
        """
        samples = [feature for feature in features if feature is not None]
        empty = {"input_ids": [self.pad_token_id] * 2, "labels": [IGNORE_INDEX] * 2}
        batch = self._join(samples or [empty]) if self.padding_free else self._pad(samples or [empty])
        with_images = [sample for sample in samples if "pixel_values" in sample]
        if with_images:
            batch["pixel_values"] = join_crops([feature["pixel_values"] for feature in with_images])
            batch["image_sizes"] = torch.cat([feature["image_sizes"] for feature in with_images])
        # For messages and the log; `RecipeTrainer` takes them out before the model sees the batch.
        batch["ids"] = [sample["id"] for sample in samples]
        if any(sources := [sample.get("source", "") for sample in samples]):
            batch["sources"] = sources
        return batch

    def _pad(self, features) -> dict[str, Any]:
        lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
        shape = len(features), int(lengths.max())
        input_ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORE_INDEX)
        for row, feature in enumerate(features):
            input_ids[row, : lengths[row]] = torch.tensor(feature["input_ids"])
            labels[row, : lengths[row]] = torch.tensor(feature["labels"])
        attention_mask = (torch.arange(shape[1]) < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _join(self, features) -> dict[str, Any]:
        lengths = [len(feature["input_ids"]) for feature in features]
        # The first token of a sample is no target of the sample before it.
        labels = [label for feature in features for label in [IGNORE_INDEX, *feature["labels"][1:]]]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        return {
            "input_ids": torch.tensor([[token for feature in features for token in feature["input_ids"]]]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
