"""A conversation with a model: several turns, several pictures, answers as they are written."""

import re
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer

from phi3v import Phi3VProcessor
from phi3v.processing_phi3_v import IMAGE_TAG

from ..data.clips import most_crops
from ..data.conversation import Conversation, Turn, check_conversation, control_tokens, to_messages
from ..data.encoding import check_length
from ..data.images import load_images
from ..data.shown import escape
from .answering import precision

# In the place of answers that are not known yet.
UNKNOWN = "-"


@dataclass
class Reply:
    """An answer, how many tokens it has, and the seconds that it took from the question on."""

    text: str
    tokens: int
    seconds: float

    @property
    def speed(self) -> str:
        return f"{self.tokens} token{'s' * (self.tokens != 1)} in {self.seconds:.1f} s, {self.tokens / max(self.seconds, 1e-9):.1f} tokens/s"


class TerminalStreamer(TextStreamer):
    """Prints an answer while it is written; nothing in it acts on the terminal."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        lines = [escape(line) for line in text.split("\n")]
        print("\n".join(lines), end="\n" if stream_end else "", flush=True)


@dataclass
class Chat:
    """A conversation that goes on.

    Args:
        model: model or PEFT model, on its device.
        processor (Phi3VProcessor): its num_crops counts.
        dtype (torch.dtype): what the model computes in.
        max_new_tokens (int): longest answer, in tokens.
    """

    model: Any
    processor: Phi3VProcessor
    dtype: torch.dtype
    max_new_tokens: int
    turns: list[Turn] = field(default_factory=list)

    def ask(self, question: str, images: list | None = None, streamer: TextStreamer | None = None) -> Reply:
        """Answers greedily, knowing all earlier turns, and keeps the turn; one that cannot be asked is not kept.

        Args:
            question (str): not blank.
            images (list, optional): pictures shown with it, see `open_image`.
            streamer (TextStreamer, optional): gets the answer while it is written.

        Raises:
            InputError: for a picture that cannot be read, a text with a control token, or a conversation that grew too long.
        """
        turn = Turn(question, [UNKNOWN], list(images or []))
        conversation, control = Conversation("chat", [*self.turns, turn]), control_tokens(self.processor.tokenizer)
        check_conversation(conversation, control)
        messages = to_messages(conversation, [turn.answers[0] for turn in self.turns])
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        crops = most_crops(conversation.images, self.processor.image_processor.num_crops)
        inputs = self.processor(prompt, load_images(conversation) or None, num_crops=crops).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        limit = self.model.config.max_position_embeddings - self.max_new_tokens
        check_length(length, limit, "the conversation")
        start = time.monotonic()
        self.model.eval()
        with torch.no_grad(), precision(self.model, self.dtype):
            output = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, use_cache=True, streamer=streamer
            )
        seconds, written = time.monotonic() - start, output[0, length:]
        text = self.processor.tokenizer.decode(written, skip_special_tokens=True).strip()
        # What the model writes is text, whatever it looks like: a tag of its own names no picture.
        plain = re.sub("|".join(map(re.escape, control)), "", IMAGE_TAG.sub("", text)).strip()
        self.turns.append(Turn(question, [plain or UNKNOWN], turn.images))
        return Reply(text, len(written), seconds)
