"""Preferences: conversations whose last turn has two answers, the chosen one and then the rejected one, for TRL's DPO."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from phi3v.modeling_phi3_v import IGNORE_INDEX

from ..errors import InputError
from .collator import DataCollatorForPhi3V
from .conversation import Conversation
from .dataset import ConversationDataset
from .encoding import encode_conversation
from .shown import printable, shown
from .trl_rows import LazyDataset


def one_message(value: Any) -> Any:
    """The text of a list with one message {"role", "content"}, as TRL's data sets hold it; any other value as it is.

    Its content is a text, or parts of which those of type image only say that pictures are shown before the text.
    """
    if not (isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and "content" in value[0]):
        return value
    content = value[0]["content"]
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return texts[0] if len(texts) == 1 else content


def check_preference(conversation: Conversation) -> Conversation:
    """The conversation, if its two answers differ.

    Raises:
        InputError: if they are the same: nothing could be learnt from them.
    """
    chosen, rejected = conversation.turns[-1].answers
    if chosen == rejected:
        raise InputError(
            f"sample {printable(conversation.id)}: rejected: expected another answer than chosen, found the same, {shown(chosen)}"
        )
    return conversation


def preference_dataset(dataset: ConversationDataset) -> LazyDataset:
    """Pairs of features, `chosen` and `rejected`; the column `images`, empty, tells TRL to leave the encoding to us."""

    def make_row(number: int) -> dict[str, Any]:
        conversation = dataset.to_conversation(dataset.rows[number])
        chosen, rejected = (_with_answer(conversation, which) for which in (0, 1))
        encoded = encode_conversation(chosen, dataset.processor, dataset.max_length)
        other = encode_conversation(rejected, dataset.processor, dataset.max_length)
        return {"images": [], "chosen": encoded, "rejected": other}

    return LazyDataset(len(dataset), make_row)


def _with_answer(conversation: Conversation, which: int) -> Conversation:
    last = conversation.turns[-1]
    return replace(conversation, turns=[*conversation.turns[:-1], replace(last, answers=[last.answers[which]])])


@dataclass
class PreferenceCollator:
    """Makes the batch that TRL's DPOTrainer reads of pairs of features; TRL's own would begin each answer with a BOS.

    Args:
        pad_token_id (int): fills short rows.
    """

    pad_token_id: int

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates B pairs of up to N tokens.

        Returns:
            dict: input_ids, attention_mask and completion_mask, int64, (2 B, N), first the chosen answers and then the
            rejected ones; pixel_values and image_sizes in the same order, see `DataCollatorForPhi3V`. completion_mask is 1
            where the recipes train: the answer, its `<|end|>` and the final `<|endoftext|>`.
        """
        features = [pair[name] for name in ("chosen", "rejected") for pair in pairs]
        found = DataCollatorForPhi3V(self.pad_token_id)(features)
        # Without the names of samples and sources, which no model takes.
        batch = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        batch["completion_mask"] = (batch.pop("labels") != IGNORE_INDEX).long()
        return batch
