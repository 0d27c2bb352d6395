"""One question to several models, one after another, each in a conversation of its own; answers while they are written."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..data.conversation import Turn
from ..training.several import Opened
from .chat import CallbackStreamer, Chat, Reply


@dataclass
class Said:
    """A question, what a model has answered, and how both are shown.

    Args:
        turn (Turn): as the next question's prompt holds it.
        answer (str): as the model wrote it.
        note (str): how many tokens in what time.
        thumbnails (list[str]): data URIs of the question's pictures.
    """

    turn: Turn
    answer: str
    note: str = ""
    thumbnails: list[str] = field(default_factory=list)


@dataclass
class Answering:
    """How answers are made.

    Args:
        temperature (float): see `Chat`.
        max_new_tokens (int): longest answer, in tokens.
        num_crops (int, optional): most crops of a picture; by default as each model was trained.
    """

    temperature: float = 0.0
    max_new_tokens: int = 256
    num_crops: int | None = None


class SideBySide:
    """Models that answer one at a time, whoever asks: they may share weights, a processor or a GPU.

    Args:
        models (Sequence[Opened]): as `open_several` gives them.
    """

    def __init__(self, models: Sequence[Opened]):
        self.models = list(models)
        self._busy = threading.Lock()

    def ask(
        self,
        number: int,
        turns: Sequence[Turn],
        question: str,
        images: Sequence,
        how: Answering,
        stopped: Callable[[], bool],
    ) -> Iterator[str | tuple[Turn, Reply]]:
        """Asks one of the models; gives the answer's text so far, again and again, and at last the turn and the reply.

        Args:
            number (int): of the model, from 0.
            turns (Sequence[Turn]): what was asked and answered before.
            question (str): not blank.
            images (Sequence): pictures shown with it, see `open_image`.
            how (Answering): temperature, length, crops.
            stopped (Callable): asked after each token; the answer ends where it says True.

        Raises:
            InputError: see `Chat.ask`.
        """
        pieces: queue.Queue = queue.Queue()
        left = threading.Event()
        arguments = (number, turns, question, images, how, lambda: left.is_set() or stopped(), pieces.put)
        with self._busy:
            # generate() does not return before its last token: it works in a thread, and its words are handed over here.
            worker = threading.Thread(target=self._work, args=arguments)
            worker.start()
            text = ""
            try:
                while isinstance(piece := pieces.get(), str):
                    # What has come up meanwhile too: a page cannot be drawn as often as a GPU writes.
                    while not pieces.empty() and isinstance(pieces.queue[0], str):
                        piece += pieces.get()
                    text += piece
                    yield text
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
            finally:
                # Also where nobody waits for the rest: the page was closed.
                left.set()
                worker.join()

    def _work(self, number, turns, question, images, how: Answering, stopped, put) -> None:
        opened = self.models[number]
        processor = opened.processor
        crops = processor.image_processor.num_crops
        try:
            processor.image_processor.num_crops = how.num_crops or crops
            with opened.ready() as model:
                chat = Chat(model, processor, opened.dtype, how.max_new_tokens, list(turns), how.temperature)
                reply = chat.ask(question, list(images), CallbackStreamer(processor.tokenizer, put), stopped)
            put((chat.turns[-1], reply))
        except BaseException as error:  # raised again where the answer is waited for
            put(error)
        finally:
            processor.image_processor.num_crops = crops
