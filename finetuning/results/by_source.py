"""Scores of each source of rows by itself, beside those of all rows together."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

from .predictions import Prediction


def sources_of(predictions: Sequence[Prediction]) -> list[str]:
    """The sources of the rows that were answered, in their order; none where there are not several."""
    names = list(dict.fromkeys(prediction.source for prediction in predictions))
    return names if len(names) > 1 else []


def of_source(predictions: Sequence[Prediction], name: str) -> list[Prediction]:
    """The answers to the rows of a source."""
    return [prediction for prediction in predictions if prediction.source == name]


def by_source(
    answered: Mapping[str, Sequence[Prediction]], score: Callable[[list[Prediction]], dict[str, float]]
) -> list[dict[str, Any]]:
    """For a page: of each source its name, its answers at the last stage, and the task's main figure at each stage, None without.

    Args:
        answered (Mapping): stage -> answers.
        score (Callable): the task's own.
    """
    figures = {stage: score_sources(score, predictions) for stage, predictions in answered.items()}
    last = next(reversed(list(answered)), "")
    return [
        {
            "name": name,
            "count": len(of_source(answered[last], name)),
            "values": [_main_figure(figures[stage], name) for stage in answered],
        }
        for name in sources_of(answered.get(last, ()))
    ]


def _main_figure(figures: Mapping[str, float], source: str) -> float | None:
    return next((value for name, value in figures.items() if name.endswith(f"/{source}")), None)


def score_sources(
    score: Callable[[list[Prediction]], dict[str, float]], predictions: Sequence[Prediction]
) -> dict[str, float]:
    """The task's figures of each source, `anls/receipts`; empty where there are not several.

    A figure that some rows alone do not have, such as AUROC of one class, is left out.
    """
    found: dict[str, float] = {}
    for name in sources_of(predictions):
        try:
            figures = score(of_source(predictions, name))
            found |= {f"{figure}/{name}": float(value) for figure, value in figures.items() if "/" not in figure}
        except Exception:  # a user's function, given a part of the rows; of all rows it was checked
            continue
    return {figure: value for figure, value in found.items() if isfinite(value)}
