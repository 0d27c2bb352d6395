"""What a person looks at after a run, finished or not: report.html, one page with its scores, curves and answers."""

import json
import math
import resource
import signal
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_curve

from ..arguments import RecipeArguments
from ..data.dataset import ConversationDataset
from ..data.shown import printable
from ..errors import Stopped
from ..training.checkpoint import find_checkpoints
from ..training.identity import read_run, write_run
from .charts import Chart, Line, finite, heat, line_chart, matrix_chart, roc_chart, smooth
from .metrics import exact_match
from .page import write_page
from .plots import OTHER, count_answers, plot_confusion, plot_curves
from .predictions import PREDICTIONS, Prediction, read_predictions
from .provenance import command, commit, machine, versions
from .rows import (
    LEFT_OUT,
    UNREADABLE,
    Row,
    answers_of,
    best_score,
    closed_classes,
    difference_between,
    join_rows,
    picture_sources,
    plain_row,
    score_stages,
    size_of,
    stage_order,
    sums_of,
    worst_first,
)
from .thumbnails import thumbnails
from .uncertainty import Interval, Score, intervals

REPORT = "report.html"
MOST_BYTES = 20_000_000 - 300_000  # of a page; the rest for what surrounds the rows
# torchrun ends a process that stops 30 seconds after its signal.
SECONDS_FOR_PICTURES_OF_A_STOPPED_RUN = 8
LARGEST_TABLE = 12  # classes; a larger confusion matrix is a picture
MOST_CONFUSED = 10


class report_at_end:
    """Writes report.html at the end of a `with` block, however it ends: finished, stopped or failed.

    Only the first rank writes, from files and from what the Trainer has logged, so that it waits for no other rank. Where the
    run itself failed, a report that fails too is one line, and the run's error goes on its way.

    Args:
        trainer (RecipeTrainer): its arguments, logs and rows to train on.
        doc (str): the script's docstring; its first line is the title.
        eval_dataset (ConversationDataset): the rows that are answered.
        score (Callable): the task's own; its first figure is the main one.
    """

    def __init__(self, trainer, doc: str, eval_dataset: ConversationDataset, score: Score):
        self.trainer, self.args, self.doc, self.eval_dataset, self.score = (
            trainer,
            trainer.args,
            doc,
            eval_dataset,
            score,
        )
        self._start = time.monotonic()

    def __enter__(self):
        if self.args.process_index == 0:
            self._write_attempt(_describe_attempt(self.args, len(self.trainer.train_dataset)), new=True)
        return self

    def __exit__(self, kind, error, traceback):
        if self.args.process_index:
            return
        if error is None:
            self._finish("finished", "")
            return
        if threading.current_thread() is threading.main_thread():
            # torchrun sends it as soon as another rank has ended; a second Ctrl-C still ends this one at once.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        state = "stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "failed"
        try:
            self._finish(state, _describe_error(error), SECONDS_FOR_PICTURES_OF_A_STOPPED_RUN)
        except Exception as failure:
            print(f"the report could not be written: {printable(str(failure) or repr(failure))}", flush=True)

    def _finish(self, state: str, ending: str, seconds: float | None = None) -> None:
        on_gpu = self.args.device.type == "cuda"
        peak = (
            torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        self._write_attempt(
            {
                "state": state,
                "ending": ending,
                "seconds": round(time.monotonic() - self._start, 1),
                "step": self.trainer.state.global_step,
                "peak_bytes": peak,
            }
        )
        write_report(self.args, self.doc, self.eval_dataset, self.score, self.trainer.state.log_history, seconds)

    def _write_attempt(self, facts: dict[str, Any], new: bool = False) -> None:
        """Keeps in run.json what each start of the run was and came to."""
        output = Path(self.args.output_dir)
        record = read_run(output)
        if record is not None:
            attempts = record.get("attempts", [])
            attempts = [*attempts, facts] if new else [*attempts[:-1], {**attempts[-1], **facts}]
            write_run(output, {**record, "attempts": attempts})


def _describe_attempt(args: RecipeArguments, train_rows: int) -> dict[str, Any]:
    on_gpu = args.device.type == "cuda"
    return {
        "started": datetime.now().isoformat(timespec="minutes"),
        "command": command(),
        "commit": commit(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if on_gpu else machine(),
        "processes": args.world_size,
        "strategy": args.strategy,
        "model": args.model_name_or_path,
        "data": args.data_dir or "",
        "train_rows": train_rows,
        "changed": {name: str(value) for name, value in args.changed.items()},
    }


def _describe_error(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT"
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = f"{lines[0]} ... {lines[-1]}" if len(lines) > 1 else "".join(lines) or type(error).__name__
    return printable(text, 500)


def write_report(
    args: RecipeArguments,
    doc: str,
    dataset: ConversationDataset,
    score: Score,
    log_history: list[dict[str, Any]] | None = None,
    seconds: float | None = None,
) -> None:
    """Writes report.html, curves.png and, for closed classes, confusion.png, from what the run has left in its output folder.

    The first rank alone writes. Every text is escaped, and the page holds only pictures that are drawn here.

    Args:
        args (RecipeArguments): output_dir, report_rows.
        doc (str): heading of the page; of a longer text its first line.
        dataset (ConversationDataset): the rows that were answered.
        score (Callable): the task's own.
        log_history (list[dict], optional): what the Trainer has logged; else that of the folder or of its newest checkpoint.
        seconds (float, optional): most time for the pictures.
    """
    if args.process_index:
        return
    folder, title = Path(args.output_dir), doc.splitlines()[0]
    run = read_run(folder) or {}
    logs = log_history or _read_logs(folder)
    if figure := plot_curves(logs):
        figure.savefig(folder / "curves.png", dpi=120)
    rows, stages = join_rows(dataset, read_predictions(folder / PREDICTIONS))
    scored_by = score_stages(rows, stages, score)
    found = {stage: _score_stage(folder, stage, answers_of(rows, stage), score) for stage in stages}
    last = stages[-1] if stages else ""
    classes = closed_classes(rows, found[last]["figures"]) if stages else []
    answered = {stage: answers_of(rows, stage) for stage in stages}
    counts = [[0]]
    if classes:
        final = answered[last]
        counts = count_answers(classes, [item.references for item in final], [item.answer for item in final])
        plot_confusion(classes, counts).savefig(folder / "confusion.png", dpi=120)
    shown = worst_first(rows)[: args.report_rows]
    data: dict[str, Any] = {
        "columns": stages,
        "merge": True,
        "best": best_score(rows),
        "order": "worst first",
        "filters": _filters(shown, stages),
        "classes": classes,
        "total": len(rows),
        "left_out": _left_out(len(rows), len(shown)),
    }
    charts = _charts(logs, stages, found, answered)
    for number, (_, chart, _) in enumerate(charts):
        chart.data["id"] = number
    attempts = run.get("attempts", [])
    summary = _summary(attempts, logs)
    stats = {stage: _plain_figures(found[stage]) for stage in stages}
    data |= {
        "charts": [chart.data for _, chart, _ in charts],
        # For `finetuning.compare`.
        "run": {
            "name": folder.resolve().name,
            "scored_by": scored_by,
            "stages": stats,
            "sums": sums_of(rows, last),
            "history": [entry for entry in _plain_logs(logs) if "loss" in entry],
            "attempt": attempts[-1] if attempts else {},
            **{name: summary[name] for name in ("duration", "speed", "memory", "strategy")},
        },
    }
    data["rows"], data["pictures"] = _with_pictures(dataset, shown, stages, classes, size_of(data), seconds)
    write_page(
        folder / REPORT,
        "report.html",
        title=title,
        run=_describe_run(run, attempts),
        score=_headline(stages, found, rows),
        facts=_facts(summary, rows, found, stages),
        charts=charts,
        figures=list(dict.fromkeys(name for stage in stages for name in stats[stage]["figures"])),
        stages=[
            {
                "name": stage,
                "values": {name: show(value) for name, value in stats[stage]["figures"].items()},
                "intervals": {name: show_interval(value) for name, value in stats[stage]["intervals"].items()},
                "count": f"{len(answered[stage]):,}",
            }
            for stage in stages
        ],
        classes=_class_tables(classes, counts, answered, stages) if classes else None,
        data=data,
    )
    print(f"report -> {folder / REPORT}", flush=True)


def _read_logs(folder: Path) -> list[dict[str, Any]]:
    for place in (folder, *find_checkpoints(folder)):
        with suppress(OSError, ValueError, KeyError):
            return json.loads((place / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return []


def _plain_logs(logs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Loss and evaluations by step, as JSON can hold them."""
    return [
        {name: value for name, value in entry.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        for entry in logs
    ]


def _score_stage(folder: Path, stage: str, predictions: list[Prediction], score: Score) -> dict[str, Any]:
    """Figures of a stage with their intervals: those of its file where it was answered to the end."""
    found: dict[str, Any] = {"figures": {}, "intervals": {}, "seconds": None}
    with suppress(Exception):  # a user's function, maybe given some of the rows only
        found["figures"] = {name: float(value) for name, value in score(predictions).items()}
        found["intervals"] = intervals(score, predictions)
    with suppress(OSError, ValueError):
        result = json.loads((folder / f"eval_{stage.replace(' ', '_')}.json").read_text(encoding="utf-8"))
        found["seconds"] = result.get("seconds")
    found["count"] = len(predictions)
    return found


def _plain_figures(found: dict[str, Any]) -> dict[str, Any]:
    figures = {name: value for name, value in found["figures"].items() if "/" not in name}
    return {"figures": figures, "intervals": found["intervals"], "count": found["count"]}


# ---- the first screen


def show(value: float | None) -> str:
    """A figure as people compare it."""
    return "" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def show_interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    return "all rows alike" if low == high else f"{show(low)} – {show(high)}"


def show_difference(difference: float, interval: Interval | None) -> str:
    low, high = interval or (difference, difference)
    spread = "" if low == high else f" ({low:+.3f} – {high:+.3f})".replace("-", "−")
    return f"{difference:+.3f}".replace("-", "−") + spread


def show_seconds(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _headline(stages: list[str], found: dict[str, Any], rows: list[Row]) -> dict[str, Any] | None:
    """The main figure before and at the end."""
    scored = [stage for stage in stages if found[stage]["figures"]]
    if not scored:
        return None
    name = next(iter(found[scored[-1]]["figures"]))

    def describe(stage: str) -> dict[str, str]:
        interval, value = found[stage]["intervals"].get(name), found[stage]["figures"][name]
        count = f"{found[stage]['count']:,} answers"
        return {
            "stage": stage,
            "value": show(value),
            "interval": f"{show_interval(interval)}{interval and ', ' or ''}{count}",
        }

    first = scored[0] if len(scored) > 1 and name in found[scored[0]]["figures"] else None
    difference = None
    if first:
        paired = difference_between(sums_of(rows, first), sums_of(rows, scored[-1]))
        change = found[scored[-1]]["figures"][name] - found[first]["figures"][name]
        # Only where the figure is the mean of the rows' own scores do those tell its difference.
        if paired and abs(paired[0] - change) < 1e-6:
            difference = show_difference(paired[0], paired[1])
    return {
        "name": name.upper() if len(name) <= 5 else name.replace("_", " "),
        "first": describe(first) if first else None,
        "last": describe(scored[-1]),
        "difference": difference,
    }


def _summary(attempts: list[dict[str, Any]], logs: list[dict[str, Any]]) -> dict[str, str]:
    attempt = attempts[-1] if attempts else {}
    done = [entry["seconds"] for entry in attempts if "seconds" in entry]
    training: dict[str, Any] = next((entry for entry in reversed(logs) if "train_runtime" in entry), {})
    speed = ""
    # The Trainer divides all samples by the time since the last start.
    if len(attempts) == 1 and training.get("train_samples_per_second"):
        speed = f"{training['train_samples_per_second']:.3g} samples/s"
    peaks = [entry["peak_bytes"] for entry in attempts if "peak_bytes" in entry]
    starts = f" in {len(attempts)} starts" if len(attempts) > 1 else ""
    unfinished = " and more" if len(done) < len(attempts) else ""
    return {
        "duration": show_seconds(sum(done)) + unfinished + starts if done else "",
        "training": show_seconds(training["train_runtime"]) if training and len(attempts) == 1 else "",
        "speed": speed,
        "memory": f"{max(peaks) / 2**30:.2f} GiB" if peaks else "",
        "strategy": attempt.get("strategy", ""),
        "model": attempt.get("model", ""),
        "data": attempt.get("data") or ("the Hugging Face hub" if attempt else ""),
        "device": f"{attempt['processes']} × {attempt['device']}" if attempt else "",
        "train_rows": f"{attempt['train_rows']:,} rows" if attempt else "",
    }


def _facts(summary: dict[str, str], rows: list[Row], found: dict[str, Any], stages: list[str]) -> list[tuple[str, str]]:
    seconds = found[stages[-1]]["seconds"] if stages else None
    answering = f"{len(rows):,} rows" + (f" in {show_seconds(seconds)}" if seconds else "")
    training = " in ".join(part for part in (summary["train_rows"], summary["training"]) if part)
    facts = [
        ("strategy", summary["strategy"]),
        ("trained on", training),
        ("answered", answering if rows else ""),
        ("model", summary["model"]),
        ("data", summary["data"]),
        ("whole run", summary["duration"]),
        ("training speed", summary["speed"]),
        ("peak memory, first process", summary["memory"]),
        ("processes", summary["device"]),
    ]
    return [(name, value) for name, value in facts if value]


def _describe_run(run: dict[str, Any], attempts: list[dict[str, Any]]) -> dict[str, Any]:
    attempt = attempts[-1] if attempts else {}
    state = attempt.get("state", "unfinished" if attempt else "finished")
    step = f"at step {attempt['step']}: " if attempt.get("step") else ""
    made_with = [("commit", attempt.get("commit", "")), *attempt.get("versions", {}).items()]
    return {
        "started": run.get("started", "").replace("T", " ")[:16],
        "state": state,
        "ending": f"{state} {step}{attempt.get('ending') or 'no end of this run was recorded'}",
        "command": attempt.get("command", ""),
        "made_with": [(name, value) for name, value in made_with if value],
        "changed": list(attempt.get("changed", {}).items()),
        "summary": run.get("summary", ""),
    }


# ---- charts


def _charts(logs, stages: list[str], found: dict[str, Any], answered) -> list[tuple[str, Chart, str]]:
    logs = _plain_logs(logs)
    charts = []
    lines = loss_lines(logs)
    if lines:
        charts.append(("Loss", line_chart("loss by optimizer step", lines), ""))
    if chart := _score_chart(logs, stages, found):
        charts.append(chart)
    curves = {stage: curve for stage in stages if (curve := roc_of(answered[stage]))}
    if curves:
        charts.append(("ROC curve", roc_chart(curves), f"probability of “{_positive(answered[stages[-1]])}”"))
    for key, heading in (("grad_norm", "Gradient norm"), ("learning_rate", "Learning rate")):
        points = finite([(entry["step"], entry[key]) for entry in logs if key in entry])
        if len(points) > 1:
            charts.append((heading, line_chart(f"{heading} by optimizer step", [Line("", points, 5)]), ""))
    return charts


def loss_lines(logs: list[dict[str, float]]) -> list[Line]:
    """The lines of the loss chart: as logged, smoothed, and of the evaluations."""
    raw: list[tuple[float, ...]] = [(entry["step"], entry["loss"]) for entry in logs if "loss" in entry]
    evaluated: list[tuple[float, ...]] = [(entry["step"], entry["eval_loss"]) for entry in logs if "eval_loss" in entry]
    smoothed: list[tuple[float, ...]] = [*smooth(raw)]
    lines = [Line("training, each log" if smoothed else "training", raw, 0, "faint" if smoothed else "")]
    lines += [Line("training, smoothed", smoothed, 0), Line("evaluation", evaluated, 1, "dots")]
    return [line for line in lines if line.points]


def _score_chart(logs, stages: list[str], found: dict[str, Any]) -> tuple[str, Chart, str] | None:
    """The main figure by step: before, at the evaluations while it trained, after."""
    scored = [stage for stage in stages if found[stage]["figures"]]
    if not scored:
        return None
    name = next(iter(found[scored[-1]]["figures"]))
    last_step = max((entry["step"] for entry in logs if "step" in entry), default=1)
    points: dict[float, tuple[float, ...]] = {
        entry["step"]: (entry["step"], entry[f"eval_{name}"]) for entry in logs if f"eval_{name}" in entry
    }
    ends = []
    for stage in scored:
        value, interval = found[stage]["figures"].get(name), found[stage]["intervals"].get(name)
        step = min(max(stage_order(stage)[0], 0), last_step)
        if value is None:
            continue
        point = (step, value, *(interval or ()))
        if stage in ("before", "after"):
            ends.append(point)
        else:
            points[step] = point
    lines = []
    counts = sorted({found[stage]["count"] for stage in scored})
    note = "whiskers: 95% intervals"
    if points:
        lines.append(Line("while it trained", sorted(points.values()), 1, "dots"))
        if len(counts) > 1:
            note += f"; while it trained {counts[0]:,} answers, before and after {counts[-1]:,}"
    if ends:
        lines.append(Line("before and after", ends, 0, "dashed dots" if len(ends) > 1 else "dots"))
    values = [value for line in lines for point in line.points for value in point[1:]]
    bounds = (0, 1) if values and min(values) >= 0 and max(values) <= 1 else None
    return name.upper() if len(name) <= 5 else name, line_chart(f"{name} by optimizer step", lines, bounds), note


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


# ---- answers and classes


def _filters(rows: list[Row], stages: list[str]) -> list[dict[str, Any]]:
    labels = {"wrong": "Wrong"}
    if len(stages) > 1:
        labels |= {"changed": "Changed by training", "better": "Became better", "worse": "Became worse"}
    counts = {key: sum(key in row.flags for row in rows) for key in labels}
    filters = [{"key": "all", "label": "All", "count": len(rows)}]
    return filters + [{"key": key, "label": label, "count": counts[key]} for key, label in labels.items()]


def _left_out(total: int, shown: int) -> str:
    return (
        "" if shown == total else f"The {shown:,} worst of {total:,} rows are listed; --report_rows {total} lists all."
    )


def _with_pictures(
    dataset, rows: list[Row], stages: list[str], classes: list[str], taken: int, seconds: float | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and pictures for the page's script: the pictures get what the texts leave of the page."""
    plain = [plain_row(row, stages, classes, []) for row in rows]
    count = sum(row.pictures for row in rows)
    budget = max(0, MOST_BYTES - taken - size_of(plain))
    made = thumbnails(picture_sources(dataset, rows), count, budget, seconds)
    pictures: list[str] = []
    for row, item in zip(rows, plain, strict=True):
        for _ in range(row.pictures):
            uri = next(made)
            item["pictures"].append(len(pictures) if uri else LEFT_OUT if uri is None else UNREADABLE)
            if uri:
                pictures.append(uri)
    return plain, pictures


def _class_tables(classes: list[str], counts: list[list[int]], answered, stages: list[str]) -> dict[str, Any]:
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
        rows.append({"name": name, "count": f"{sum(counts[number]):,}", "values": [show(value) for value in values]})
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
