"""The metric of data of one's own, where none is named."""

from collections.abc import Callable, Sequence

from accelerate import PartialState

from ..data.conversation import Conversation
from ..data.reading import sample_rows
from ..errors import InputError
from .metrics import usual_metric

ROWS = 500  # whose answers' lengths are looked at


def choose_metric(rows: Sequence, to_conversation: Callable[[dict], Conversation]) -> list[str]:
    """The one metric that fits the length of the answers, which is said, see `usual_metric`.

    Args:
        rows (Sequence): the rows to answer.
        to_conversation (Callable): row -> Conversation.
    """
    answers: list[str] = []
    for row in _readable(sample_rows(rows, ROWS)):
        try:
            answers += [turn.answers[0] for turn in to_conversation(row).turns]
        except InputError:  # told when all rows are checked
            continue
    name = usual_metric(answers)
    if answers and PartialState().is_main_process:
        print(f"metric: {name}, which fits the length of the answers (--metric takes others)", flush=True)
    return [name]


def _readable(rows: Sequence):
    for index in range(len(rows)):
        try:
            yield rows[index]
        except InputError:
            continue
