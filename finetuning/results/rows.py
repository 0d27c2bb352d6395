"""Rows of a run with all their answers: what the page lists, worst first."""

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import exp
from typing import Any

from ..data.conversation import Conversation
from ..data.dataset import ConversationDataset
from .metrics import find_class
from .predictions import Prediction
from .uncertainty import Interval, Score, paired_difference, score_rows

UNREADABLE, LEFT_OUT = -1, -2  # in place of a picture's number


@dataclass
class Answered:
    """A turn of a row with its answers: stage -> Prediction, and stage -> that answer's own score."""

    question: Prediction
    answers: dict[str, Prediction] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class Row:
    """A row that was answered: its place in the data set, its turns, how many pictures it has, and its score at the end."""

    id: str
    index: int
    turns: list[Answered]
    pictures: int = 0
    score: float | None = None
    flags: list[str] = field(default_factory=list)


def stage_order(stage: str) -> tuple[float, str]:
    """Key that puts stages in order: before, step N by its number, after."""
    name, _, number = stage.partition(" ")
    if name == "step" and number.isdigit():
        return float(number), stage
    return {"before": -1.0, "after": float("inf")}.get(stage, float(2**53)), stage


def join_rows(dataset: ConversationDataset, items: list[dict[str, Any]]) -> tuple[list[Row], list[str]]:
    """The rows of a data set with the answers of predictions.jsonl, and the stages that occur there.

    Args:
        dataset (ConversationDataset): the rows that were to be answered.
        items (list[dict]): lines of predictions.jsonl; a stage may hold answers to some of the rows only.
    """
    waiting: dict[tuple, deque] = defaultdict(deque)
    for item in items:
        # A line for each; ids that repeat are told apart by their order.
        waiting[item["stage"], item["id"], item["turn"]].append(item)
    stages = sorted({item["stage"] for item in items}, key=stage_order)
    rows = []
    for index, row in enumerate(dataset.rows):
        conversation: Conversation = dataset.to_conversation(row)
        turns = []
        for number, turn in enumerate(conversation.turns):
            question = Prediction(conversation.id, number, turn.user, list(turn.answers), source=conversation.source)
            question.choices = dict.fromkeys(turn.choices, 0.0)
            turns.append(Answered(question))
            for stage in stages:
                if found := waiting[stage, conversation.id, number]:
                    item = found.popleft()
                    turns[-1].answers[stage] = replace(question, answer=item["answer"], choices=item["choices"])
        rows.append(Row(conversation.id, index, turns, len(conversation.images)))
    return rows, stages


def answers_of(rows: list[Row], stage: str) -> list[Prediction]:
    """All answers of a stage, in the data set's order."""
    return [turn.answers[stage] for row in rows for turn in row.turns if stage in turn.answers]


def score_stages(rows: list[Row], stages: list[str], score: Score) -> str:
    """Gives every answer its own score and every row its score of the last stage and its flags; returns what scores them.

    All stages go by the same figure, else they could not be compared.
    """
    predictions = [
        turn.answers[stage] for row in rows for turn in row.turns for stage in stages if stage in turn.answers
    ]
    values, name = score_rows(score, predictions) if predictions else ([], "")
    given = iter(values)
    for row in rows:
        for turn in row.turns:
            turn.scores = {stage: next(given) for stage in stages if stage in turn.answers}
    best = best_score(rows)
    for row in rows:
        _judge(row, stages, best)
    return name


def best_score(rows: list[Row]) -> float:
    """The score of an answer that is all right: 1, or the highest that occurs where the scores go beyond."""
    return max([1.0, *(value for row in rows for turn in row.turns for value in turn.scores.values())])


def _judge(row: Row, stages: list[str], best: float) -> None:
    if not stages:
        return
    first, last = stages[0], stages[-1]
    final = [turn.scores[last] for turn in row.turns if last in turn.scores]
    if not final:
        return
    row.score = sum(final) / len(final)
    both = [turn for turn in row.turns if {first, last} <= turn.scores.keys()] if first != last else []
    facts = {
        "wrong": any(value < best - 1e-9 for value in final),
        "changed": any(turn.answers[first].answer != turn.answers[last].answer for turn in both),
        "worse": any(turn.scores[last] < turn.scores[first] - 1e-9 for turn in both),
        "better": any(turn.scores[last] > turn.scores[first] + 1e-9 for turn in both),
    }
    row.flags = [name for name, holds in facts.items() if holds]


def worst_first(rows: list[Row]) -> list[Row]:
    """Rows by their score at the end, those that training made worse before others, those without an answer last."""
    return sorted(rows, key=lambda row: (row.score is None, row.score or 0, "worse" not in row.flags, row.index))


def sums_of(rows: list[Row], stage: str) -> list[list[Any]]:
    """[number of the row, id, sum of its turns' scores, answered turns] of each row that was answered at a stage."""
    found = []
    for row in rows:
        values = [turn.scores[stage] for turn in row.turns if stage in turn.scores]
        if values:
            found.append([row.index, row.id, round(sum(values), 6), len(values)])
    return found


def common_sums(lists: list[list[list[Any]]]) -> list[list[list[Any]]]:
    """Lists of `sums_of`, each with only the rows, in the same order, that all of them hold."""
    found = [_by_id(entries) for entries in lists]
    keys = [
        key for key, entry in found[0].items() if all(key in other and other[key][3] == entry[3] for other in found)
    ]
    return [[entries[key] for key in keys] for entries in found]


def difference_between(first: list[list[Any]], second: list[list[Any]]) -> tuple[float, Interval | None] | None:
    """Mean score of `second` less that of `first`, lists of `sums_of`, over the rows that both hold, with its interval."""
    before, after = common_sums([first, second])
    if not before:
        return None
    return paired_difference(
        [entry[2] for entry in before], [entry[2] for entry in after], [entry[3] for entry in before]
    )


def _by_id(entries: list[list[Any]]) -> dict[tuple[str, int], list[Any]]:
    seen: dict[str, int] = defaultdict(int)
    found = {}
    for entry in entries:
        found[entry[1], seen[entry[1]]] = entry
        seen[entry[1]] += 1
    return found


def plain_row(row: Row, stages: list[str], classes: list[str], pictures: list[int]) -> dict[str, Any]:
    """A row as the page's script takes it; answers and scores are lists in the order of `stages`."""
    last = stages[-1] if stages else ""
    turns = []
    for turn in row.turns:
        item: dict[str, Any] = {
            "question": turn.question.question,
            "references": turn.question.references,
            "answers": [turn.answers[stage].answer if stage in turn.answers else None for stage in stages],
            "scores": [_rounded(turn.scores.get(stage)) for stage in stages],
        }
        if classes:
            answered = find_class(classes, [turn.answers[last].answer]) if last in turn.answers else None
            item["class"] = find_class(classes, turn.question.references)
            item["answered"] = len(classes) if answered is None else answered
        if turn.question.choices:
            item["chances"] = [_chances(turn.answers.get(stage)) for stage in stages]
        turns.append(item)
    return {
        "id": row.id, "index": row.index, "score": _rounded(row.score), "flags": row.flags, "pictures": pictures, "turns": turns,
    }  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _chances(prediction: Prediction | None) -> str | None:
    """The probabilities of a closed question's choices among each other, in words."""
    if prediction is None or not prediction.choices:
        return None
    highest = max(prediction.choices.values())
    weights = {name: exp(value - highest) for name, value in prediction.choices.items()}
    return ", ".join(f"{name} {value / sum(weights.values()):.0%}" for name, value in weights.items())


def picture_sources(dataset: ConversationDataset, rows: list[Row]) -> Iterator[Any]:
    """The pictures of the rows, one row of the data set after another: they are not all held at once."""
    for row in rows:
        yield from dataset.to_conversation(dataset.rows[row.index]).images


def size_of(value: Any) -> int:
    """Bytes of a value as JSON."""
    return len(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
