"""The curves of a report: loss, the score by step, ROC, gradient norm and learning rate."""

import math
from typing import Any

from sklearn.metrics import roc_curve

from .charts import COLOURS, Chart, Line, line_chart, roc_chart, smooth
from .metrics import exact_match
from .overview import show_name
from .predictions import Prediction
from .rows import stage_order

Points = list[tuple[float, ...]]


def finite_logs(logs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Loss and evaluations by step, as JSON can hold them."""
    return [
        {name: value for name, value in entry.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        for entry in logs
    ]


def run_charts(
    logs: list[dict[str, float]],
    stages: list[str],
    found: dict[str, Any],
    answered: dict[str, list[Prediction]],
) -> list[tuple[str, Chart, str]]:
    """The charts of a run, each with its heading and a note.

    Args:
        logs (list[dict]): what `finite_logs` gives.
        stages (list[str]): in order.
        found (dict): stage -> its figures, their intervals and the number of answers.
        answered (dict): stage -> its answers.
    """
    charts = []
    lines = loss_lines(logs)
    if lines:
        charts.append(("Loss", line_chart("loss by optimizer step", lines), ""))
    if lines := source_lines(logs):
        charts.append(("Loss by source", line_chart("loss of each source by optimizer step", lines), "smoothed"))
    if chart := _score_chart(logs, stages, found):
        charts.append(chart)
    curves = {stage: curve for stage in stages if (curve := roc_of(answered[stage]))}
    if curves:
        charts.append(("ROC curve", roc_chart(curves), f"probability of “{_positive(answered[stages[-1]])}”"))
    return charts


def more_charts(logs: list[dict[str, float]]) -> list[tuple[str, Chart, str]]:
    """Gradient norm and learning rate, as `run_charts` gives its own."""
    charts = []
    for key, heading in (("grad_norm", "Gradient norm"), ("learning_rate", "Learning rate")):
        points = points_of(logs, key)
        if len(points) > 1:
            charts.append((heading, line_chart(f"{heading} by optimizer step", [Line("", points, 0)]), ""))
    return charts


def points_of(logs: list[dict[str, float]], key: str) -> Points:
    """(step, value) of a figure that was logged."""
    return [(entry["step"], entry[key]) for entry in logs if key in entry and "step" in entry]


def loss_lines(logs: list[dict[str, float]]) -> list[Line]:
    """The lines of the loss chart: as logged, smoothed, and of the evaluations."""
    raw, evaluated = points_of(logs, "loss"), points_of(logs, "eval_loss")
    smoothed = smooth(raw)
    lines = [Line("training, each log" if smoothed else "training", raw, 0, "faint" if smoothed else "")]
    lines += [Line("training, smoothed", smoothed, 0), Line("evaluation", evaluated, 1, "dots")]
    return [line for line in lines if line.points]


def source_lines(logs: list[dict[str, float]]) -> list[Line]:
    """A line for the loss of each of the first sources of rows, as many as there are colours; none where there are not several."""
    keys = dict.fromkeys(key for entry in logs for key in entry if key.startswith("loss/"))
    found = {key.removeprefix("loss/"): points_of(logs, key) for key in list(keys)[:COLOURS]}
    return [Line(name, smooth(points) or points, number) for number, (name, points) in enumerate(found.items())]


def score_points(logs: list[dict[str, float]], stages: list[str], found: dict[str, Any]) -> tuple[str, Points, Points]:
    """The main figure by step, (step, value) or with its interval: its name, while the run trained, before and after."""
    scored = [stage for stage in stages if found[stage]["figures"]]
    if not scored:
        return "", [], []
    name = next(iter(found[scored[-1]]["figures"]))
    last_step = max((entry["step"] for entry in logs if "step" in entry), default=1)
    during: dict[float, tuple[float, ...]] = {point[0]: point for point in points_of(logs, f"eval_{name}")}
    ends: Points = []
    for stage in scored:
        value, interval = found[stage]["figures"].get(name), found[stage]["intervals"].get(name)
        step = min(max(stage_order(stage)[0], 0), last_step)
        if value is not None and stage in ("before", "after"):
            ends.append((step, value, *(interval or ())))
        elif value is not None:
            during[step] = (step, value, *(interval or ()))
    return name, sorted(during.values()), ends


def _score_chart(logs, stages: list[str], found: dict[str, Any]) -> tuple[str, Chart, str] | None:
    name, during, ends = score_points(logs, stages, found)
    counts = sorted({found[stage]["count"] for stage in stages})
    note = "whiskers: 95% intervals"
    if during and len(counts) > 1:
        note += f"; while it trained {counts[0]:,} answers, before and after {counts[-1]:,}"
    if not during and not ends:
        return None
    lines = [Line("", sorted(during + ends), 5, "faint dashed")] if len(during + ends) > 1 else []
    lines += [Line("while it trained", during, 1, "dots alone")] if during else []
    if ends:
        names = " and ".join(stage for stage in ("before", "after") if stage in stages)
        lines.append(Line(names, ends, 0, "dots alone"))
    return show_name(name), line_chart(f"{name} by optimizer step", lines, bounds_of(lines)), note


def bounds_of(lines: list[Line]) -> tuple[float, float] | None:
    """0 to 1 for scores that keep within it, so that charts of several runs can be compared; else none."""
    values = [value for line in lines for point in line.points for value in point[1:]]
    return (0.0, 1.0) if values and min(values) >= 0 and max(values) <= 1 else None


def _positive(predictions: list[Prediction]) -> str:
    return [*predictions[0].choices][-1]


def roc_of(predictions: list[Prediction]) -> list[tuple[float, float]] | None:
    """ROC curve of a question with two choices, the second the positive one; None for any other."""
    if not predictions or any(len(item.choices) != 2 for item in predictions):
        return None
    positive = _positive(predictions)
    labels = [exact_match(positive, item.references) for item in predictions]
    if len(set(labels)) < 2:
        return None
    values = [item.choices[positive] - sum(item.choices.values()) / 2 for item in predictions]
    false_positive, true_positive, _ = roc_curve(labels, values)
    return list(zip(false_positive.tolist(), true_positive.tolist(), strict=True))
