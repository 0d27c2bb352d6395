"""Scores of each source by itself, in figures and on the pages."""

import made_run
import pytest

from finetuning import compare
from finetuning.results.by_source import by_source, score_sources, sources_of
from finetuning.results.predictions import Prediction


def answers(*found: tuple[str, bool]) -> list[Prediction]:
    """(source, whether the answer is right) of each."""
    return [
        Prediction(str(number), 0, "?", ["yes"], "yes" if right else "no", source=source)
        for number, (source, right) in enumerate(found)
    ]


def score(predictions: list[Prediction]) -> dict[str, float]:
    right = [item.answer in item.references for item in predictions]
    return {"accuracy": sum(right) / len(right), "accuracy/yes": 1.0}


def test_each_source_has_the_figures_of_its_own_rows():
    found = answers(("a", True), ("b", True), ("a", False), ("b", True))
    assert score_sources(score, found) == {"accuracy/a": 0.5, "accuracy/b": 1.0}
    assert sources_of(found) == ["a", "b"]


@pytest.mark.parametrize("found", [answers(), answers(("", True), ("", False)), answers(("a", True))])
def test_one_source_is_not_told_apart(found):
    assert score_sources(score, found) == {}
    assert by_source({"after": found}, score) == []


def test_a_figure_that_a_source_alone_does_not_have_is_left_out():
    def picky(predictions):
        if len(predictions) < 2:
            raise ValueError
        return {"accuracy": 0.5, "auroc": float("nan") if len(predictions) < 4 else 1.0}

    found = answers(("a", True), ("a", True), ("b", True), ("c", True), ("c", False))
    assert score_sources(picky, found) == {"accuracy/a": 0.5, "accuracy/c": 0.5}
    assert [(source["name"], source["values"]) for source in by_source({"after": found}, picky)] == [
        ("a", [0.5]), ("b", [None]), ("c", [0.5]),
    ]  # fmt: skip


def test_report_and_comparison_list_the_sources(tmp_path):
    rows = [
        {**row, "images": [], "source": "docs" if number < 2 else "receipts"}
        for number, row in enumerate(made_run.rows(5))
    ]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made_run.leave(tmp_path / name, rows, {"after": lambda turn: turn["answer"]})
        page = made_run.report(tmp_path / name, rows)
        assert "Accuracy by source" in page
        assert '<th scope="row">docs</th><td>2</td><td>0.500</td>' in page
        assert '<th scope="row">receipts</th><td>3</td><td>0.667</td>' in page
    assert compare.main([str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "c.html")]) == 0
    page = (tmp_path / "c.html").read_text()
    assert "accuracy after, by source" in page
    assert '<th scope="row">receipts</th><td>0.667</td><td>0.667</td>' in page
