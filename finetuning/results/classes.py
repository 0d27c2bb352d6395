"""Closed classes: whether a task has them, how often each is answered for each, and the tables of a report."""

from typing import Any

from .charts import heat, matrix_chart
from .metrics import find_class
from .overview import show
from .rows import Row

OTHER = "other"
LARGEST_TABLE = 12  # classes; a larger confusion matrix is a picture
MOST_CONFUSED = 10


def closed_classes(rows: list[Row], figures: dict[str, float]) -> list[str]:
    """The classes of a task that says that they are closed; else none.

    It says so by the same `Turn.choices` in every turn, or by figures of its classes (`accuracy/Archery`) for all references.
    """
    turns = [turn.question for row in rows for turn in row.turns]
    choices = {tuple(question.choices) for question in turns}
    named = list(dict.fromkeys(name.partition("/")[2] for name in figures if "/" in name))
    classes = list(choices.pop()) if len(choices) == 1 and () not in choices else named
    whole = len(classes) > 1 and all(find_class(classes, question.references) is not None for question in turns)
    return classes if whole else []


def count_answers(classes: list[str], references: list[list[str]], answers: list[str]) -> list[list[int]]:
    """How often each class is answered for each class.

    Args:
        classes (list[str]): the closed classes.
        references (list[list[str]]): acceptable answers to each question.
        answers (list[str]): the answer to each question.

    Returns:
        list[list[int]]: a row for each expected class, a column for each answered one and a last one for anything else.
    """
    counts = [[0] * (len(classes) + 1) for _ in classes]
    for expected, answer in zip(references, answers, strict=True):
        row = find_class(classes, expected)
        if row is not None:
            column = find_class(classes, [answer])
            counts[row][len(classes) if column is None else column] += 1
    return counts


def class_tables(classes: list[str], counts: list[list[int]], answered, stages: list[str]) -> dict[str, Any]:
    ends = [stages[0], stages[-1]] if len(stages) > 1 else stages[-1:]
    by_stage = {
        stage: count_answers(
            classes, [item.references for item in answered[stage]], [item.answer for item in answered[stage]]
        )
        for stage in ends
    }
    rows = []
    for number, name in enumerate(classes):
        values = [
            table[number][number] / sum(table[number]) if sum(table[number]) else None for table in by_stage.values()
        ]
        rows.append({"name": name, "count": f"{sum(counts[number]):,}", "figures": [show(value) for value in values]})
    order = sorted(range(len(classes)), key=lambda number: counts[number][number] / (sum(counts[number]) or 1))
    columns = [*classes, OTHER]
    confused = [
        (classes[y], columns[x], count)
        for y, row in enumerate(counts)
        for x, count in enumerate(row)
        if x != y and count
    ]
    small = len(classes) <= LARGEST_TABLE
    return {
        "stages": ends,
        "stage": stages[-1],
        "rows": [rows[number] for number in order],
        "columns": columns,
        "matrix": [
            {
                "name": name,
                "cells": [
                    {"count": count, "heat": heat(count, sum(counts[y])), "right": x == y, "place": f"{y}-{x}"}
                    for x, count in enumerate(counts[y])
                ],
            }
            for y, name in enumerate(classes)
        ]
        if small
        else None,
        "picture": None if small else matrix_chart("confusion matrix", classes, counts),
        "confused": sorted(confused, key=lambda entry: -entry[2])[:MOST_CONFUSED],
    }
