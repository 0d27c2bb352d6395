"""A task's own score as the reward of each answer."""

import math
from collections.abc import Callable
from typing import Any

from ..errors import InputError
from .predictions import Prediction

Score = Callable[[list[Prediction]], dict[str, float]]


def reward_of(score: Score, task: str) -> Callable[..., list[float]]:
    """What GRPOTrainer calls for the answers of a batch: for each the first figure that `score` gives for it alone; named so.

    Args:
        score (Callable): a task script's own.
        task (str): its name, for messages.

    Raises:
        InputError: if `score` gives no figure for a right answer alone, as one that needs several answers would.
    """

    def reward(completions, id: list[str], question: list[str], references: list[list[str]], **_: Any) -> list[float]:
        answers = [messages[0]["content"] for messages in completions]
        # Each stands alone, so that it is the first question of its conversation.
        asked = map(Prediction, id, [0] * len(id), question, references, answers)
        return [_first_figure(score, prediction, task)[1] for prediction in asked]

    # TRL names its figures by the function.
    reward.__name__, _ = _first_figure(score, Prediction("1", 0, "What is written there?", ["7"], "7"), task)
    return reward


def _first_figure(score: Score, prediction: Prediction, task: str) -> tuple[str, float]:
    figures = score([prediction])
    name, figure = next(iter(figures.items()), ("", None)) if isinstance(figures, dict) else ("", None)
    if not isinstance(figure, int | float) or not math.isfinite(figure):
        raise InputError(
            f"--task {task}: score: expected a dict whose first value is the figure of a single answer, found {figures!r:.80}"
        )
    return name, float(figure)
