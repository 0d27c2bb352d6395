"""A conversation with a model: several turns, several pictures, answers as they are written."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

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


class CallbackStreamer(TextStreamer):
    """Gives an answer to a function, piece by piece, while it is written."""

    def __init__(self, tokenizer, receive: Callable[[str], object]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.receive = receive

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.receive(text)


class StopWhen(StoppingCriteria):
    """Ends an answer after the token at which a function says so."""

    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device)


@dataclass
class Chat:
    """A conversation that goes on.

    Args:
        model: model or PEFT model, on its device.
        processor (Phi3VProcessor): its num_crops counts.
        dtype (torch.dtype): what the model computes in.
        max_new_tokens (int): longest answer, in tokens.
        turns (list[Turn]): what was asked and answered before.
        temperature (float): 0 always takes the likeliest token; above, tokens are drawn, the more evenly the higher it is.
    """

    model: Any
    processor: Phi3VProcessor
    dtype: torch.dtype
    max_new_tokens: int
    turns: list[Turn] = field(default_factory=list)
    temperature: float = 0.0

    def ask(
        self,
        question: str,
        images: list | None = None,
        streamer: TextStreamer | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> Reply:
        """Answers, knowing all earlier turns, and keeps the turn; one that cannot be asked is not kept.

        Args:
            question (str): not blank.
            images (list, optional): pictures shown with it, see `open_image`.
            streamer (TextStreamer, optional): gets the answer while it is written.
            stopped (Callable, optional): asked after each token; the answer ends where it says True.

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
        drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        criteria = StoppingCriteriaList([StopWhen(stopped)]) if stopped else None
        self.model.eval()
        with torch.no_grad(), precision(self.model, self.dtype):
            output = self.model.generate(
                **inputs,
                **drawn,
                max_new_tokens=self.max_new_tokens,
                use_cache=True,
                streamer=streamer,
                stopping_criteria=criteria,
            )
        seconds, written = time.monotonic() - start, output[0, length:]
        text = self.processor.tokenizer.decode(written, skip_special_tokens=True).strip()
        # What the model writes is text, whatever it looks like: a tag of its own names no picture.
        plain = re.sub("|".join(map(re.escape, control)), "", IMAGE_TAG.sub("", text)).strip()
        self.turns.append(Turn(question, [plain or UNKNOWN], turn.images))
        return Reply(text, len(written), seconds)
