"""How sure a score is: each row's own score, bootstrap intervals over rows, and paired differences."""

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from .metrics import exact_match
from .predictions import Prediction

Score = Callable[[list[Prediction]], dict[str, float]]
Interval = tuple[float, float]

LEVEL = 0.95
RESAMPLES, FEWEST_RESAMPLES = 2_000, 200
DRAWS = 20_000_000  # rows drawn in all resamples together: a second or so
# Where only `score` itself can tell: milliseconds a call.
CALLS, FEWEST_CALLS, ROWS_IN_ALL_CALLS = 1_000, 100, 500_000
CHUNK = 2_000_000  # rows drawn at once, to bound the memory
EXACT_MATCH = "exact match"


def score_rows(score: Score, predictions: list[Prediction]) -> tuple[list[float], str]:
    """Each answer's own score, and what it is: the task's main figure of that answer alone, or else exact match.

    Some figures need many rows (AUROC), or other rows than this one; then every answer is compared with its references.

    Args:
        score (Callable): the task's own; the first of its figures is the main one.
        predictions (list[Prediction]): answers, each by itself.
    """
    try:
        name = next(iter(score(predictions)))
        return [float(score([prediction])[name]) for prediction in predictions], name
    except Exception:  # whatever a user's function raises when it is given a single row
        return [float(exact_match(item.answer, item.references)) for item in predictions], EXACT_MATCH


def by_conversation(predictions: list[Prediction]) -> list[list[Prediction]]:
    """The answers of each conversation together: turns of one row are no independent draws."""
    return [list(group) for _, group in groupby(predictions, key=lambda item: item.id)]


def intervals(score: Score, predictions: list[Prediction]) -> dict[str, Interval]:
    """95% bootstrap interval over conversations of each figure whose name has no slash; the same for the same answers.

    A figure that is the mean of the answers' own scores takes numpy a moment; any other is scored again on each resample.

    Args:
        score (Callable): the task's own.
        predictions (list[Prediction]): answers in the data set's order; with fewer than two conversations there is nothing
            to draw.
    """
    groups = by_conversation(predictions)
    if len(groups) < 2:
        return {}
    figures = {name: value for name, value in score(predictions).items() if "/" not in name}
    own, _ = score_rows(score, predictions)
    found, counts = {}, [len(group) for group in groups]
    for name, value in figures.items():
        if abs(float(np.mean(own)) - value) < 1e-9:
            found[name] = mean_interval(_sums(own, counts), counts)
    others = [name for name in figures if name not in found]
    return {**found, **(_resample(score, groups, others) if others else {})}


def _sums(values: Sequence[float], counts: Sequence[int]) -> list[float]:
    ends = np.cumsum(counts)
    return [float(np.sum(values[end - count : end])) for end, count in zip(ends, counts, strict=True)]


def _resample(score: Score, groups: list[list[Prediction]], names: list[str]) -> dict[str, Interval]:
    rng, size = np.random.default_rng(0), len(groups)
    calls = min(CALLS, max(FEWEST_CALLS, ROWS_IN_ALL_CALLS // size))
    values: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(calls):
        drawn = [item for number in rng.integers(0, size, size) for item in groups[number]]
        try:
            figures = score(drawn)
        except Exception:  # of rows that do not give every figure, such as all of one class
            continue
        for name in names:
            if name in figures:
                values[name].append(figures[name])
    return {name: _bounds(np.array(found)) for name, found in values.items() if len(found) >= FEWEST_CALLS // 2}


def mean_interval(sums: Sequence[float], counts: Sequence[int]) -> Interval:
    """95% bootstrap interval of a mean over answers, drawn by conversation.

    Args:
        sums (Sequence[float]): sum of the scores of each conversation.
        counts (Sequence[int]): number of answers of each.
    """
    return _bounds(_means(np.asarray(sums, float), np.asarray(counts, float)))


def paired_difference(
    first: Sequence[float], second: Sequence[float], counts: Sequence[int]
) -> tuple[float, Interval | None]:
    """Mean of `second` less that of `first` over the same answers, and its 95% bootstrap interval.

    Args:
        first, second (Sequence[float]): sum of the scores of each conversation, in the same order.
        counts (Sequence[int]): number of answers of each.
    """
    difference = np.asarray(second, float) - np.asarray(first, float)
    interval = mean_interval(difference.tolist(), counts) if len(difference) > 1 else None
    return float(difference.sum() / np.sum(counts)), interval


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    rng, size = np.random.default_rng(0), len(sums)
    resamples = min(RESAMPLES, max(FEWEST_RESAMPLES, DRAWS // size))
    at_once = max(1, CHUNK // size)
    means = []
    for start in range(0, resamples, at_once):
        drawn = rng.integers(0, size, (min(at_once, resamples - start), size))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def _bounds(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
