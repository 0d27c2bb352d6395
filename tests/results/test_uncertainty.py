"""Intervals of scores: as wide as theory says, the same each time, drawn by conversation, for figures of any kind."""

import random
import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from finetuning.results.metrics import exact_match
from finetuning.results.predictions import Prediction
from finetuning.results.uncertainty import EXACT_MATCH, intervals, mean_interval, paired_difference, score_rows


def predictions(count: int, right: float = 0.5, turns: int = 1) -> list[Prediction]:
    """Answers of `count` conversations; all turns of one are right or all are wrong."""
    rng = random.Random(0)
    found = []
    for number in range(count):
        answer = "yes" if rng.random() < right else "no"
        chance = rng.random()
        choices = {"yes": chance, "no": 1 - chance}
        found += [Prediction(str(number), turn, "q", ["yes"], answer, choices) for turn in range(turns)]
    return found


def accuracy(items) -> dict[str, float]:
    return {"accuracy": sum(exact_match(item.answer, item.references) for item in items) / len(items)}


def with_auroc(items) -> dict[str, float]:
    figures, labels = accuracy(items), [item.answer == "yes" for item in items]
    if len(set(labels)) == 2:
        figures["auroc"] = float(roc_auc_score(labels, [item.choices["yes"] for item in items]))
    return figures


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    low, high = intervals(accuracy, predictions(400))["accuracy"]
    value = accuracy(predictions(400))["accuracy"]
    half = 1.96 * (value * (1 - value) / 400) ** 0.5
    assert low == pytest.approx(value - half, abs=0.01)
    assert high == pytest.approx(value + half, abs=0.01)


def test_intervals_cover_the_true_value_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = mean_interval((rng.random(60) < 0.7).astype(float).tolist(), [1] * 60)
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_same_answers_give_the_same_interval():
    assert intervals(with_auroc, predictions(80)) == intervals(with_auroc, predictions(80))


def test_turns_of_a_conversation_are_drawn_together():
    # Ten equal turns tell no more than one.
    one, ten = intervals(accuracy, predictions(100)), intervals(accuracy, predictions(100, turns=10))
    assert ten["accuracy"] == pytest.approx(one["accuracy"], abs=1e-9)


def test_conversations_of_many_turns_weigh_more():
    low, high = mean_interval([0.0, 10.0, 0.0, 10.0], [1, 10, 1, 10])
    assert 0 <= low < 20 / 22 < high <= 1


def test_a_figure_that_is_no_mean_is_scored_again_on_each_resample():
    found = intervals(with_auroc, predictions(200))
    value = with_auroc(predictions(200))["auroc"]
    assert found["auroc"][0] < value < found["auroc"][1]
    assert 0.1 < found["auroc"][1] - found["auroc"][0] < 0.25


def test_five_thousand_rows_take_about_a_second():
    found, start = predictions(5000), time.process_time()
    intervals(accuracy, found)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_draw_gives_no_interval(count):
    assert intervals(accuracy, predictions(count)) == {}


def test_details_with_a_slash_have_none():
    assert list(intervals(lambda items: accuracy(items) | {"accuracy/yes": 1.0}, predictions(5))) == ["accuracy"]


def test_an_answer_has_the_main_figure_of_it_alone():
    values, name = score_rows(with_auroc, predictions(5))
    assert name == "accuracy"
    assert values == [accuracy([item])["accuracy"] for item in predictions(5)]


def fails_alone(items):
    if len(items) < 2:
        raise ValueError
    return {"accuracy": 0.5}


def another_figure_alone(items):
    return {"auroc": 0.5} if len(items) > 1 else {"accuracy": 1.0}


@pytest.mark.parametrize("score", [fails_alone, another_figure_alone])
def test_where_a_figure_needs_more_rows_exact_match_scores_each(score):
    values, name = score_rows(score, predictions(5))
    assert name == EXACT_MATCH
    assert values == [accuracy([item])["accuracy"] for item in predictions(5)]


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    first = (rng.random(300) < 0.5).astype(float)
    second = first.copy()
    second[:15] = 1.0
    difference, (low, high) = paired_difference(first, second, [1] * 300)
    assert difference == pytest.approx((second - first).mean())
    assert 0 < low < difference < high
    single_low, single_high = mean_interval(first.tolist(), [1] * 300)
    assert high - low < (single_high - single_low) / 2


def test_a_difference_of_one_row_has_no_interval():
    assert paired_difference([1.0], [0.0], [1]) == (-1.0, None)
