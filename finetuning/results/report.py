"""What a person looks at after a run, finished or not: report.html, one page with its scores, curves and answers."""

import json
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..arguments import RecipeArguments
from ..data.dataset import ConversationDataset
from ..data.shown import printable
from ..errors import Stopped
from ..training.checkpoint import find_checkpoints
from ..training.identity import read_run, write_run
from ..training.upload import upload_run
from .by_source import by_source
from .card import write_card
from .charts import smooth, thin
from .classes import class_tables, closed_classes, count_answers
from .curves import finite_logs, more_charts, points_of, run_charts, score_points
from .evaluation import MEASURED
from .overview import describe_run, describe_score, list_facts, show, show_interval, summarise
from .page import write_page
from .plots import plot_confusion, plot_curves
from .predictions import PREDICTIONS, Prediction, read_predictions
from .provenance import command, commit, machine, versions
from .rows import (
    LEFT_OUT,
    UNREADABLE,
    Row,
    answers_of,
    best_score,
    join_rows,
    picture_sources,
    plain_row,
    score_stages,
    size_of,
    sums_of,
    worst_first,
)
from .thumbnails import thumbnails
from .uncertainty import Score, intervals

REPORT = "report.html"
MOST_BYTES = 20_000_000 - 300_000  # of a page; the rest for what surrounds the rows
# torchrun ends a process that stops 30 seconds after its signal.
SECONDS_FOR_PICTURES_OF_A_STOPPED_RUN = 8


class report_at_end:
    """Writes report.html at the end of a `with` block, however it ends: finished, stopped or failed.

    Only the first rank writes, from files and from what the Trainer has logged, so that it waits for no other rank. Where the
    run itself failed, a report that fails too is one line, and the run's error goes on its way.

    Args:
        trainer (RecipeTrainer): its arguments, logs and rows to train on.
        doc (str, optional): the script's docstring; its first line is the title.
        eval_dataset (ConversationDataset): the rows that are answered.
        score (Callable): the task's own; its first figure is the main one.
    """

    def __init__(self, trainer, doc: str | None, eval_dataset: ConversationDataset, score: Score):
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
            self._write_attempt(_describe_attempt(self.args, self.trainer.train_dataset), new=True)
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


def _describe_attempt(args: RecipeArguments, train: ConversationDataset) -> dict[str, Any]:
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
        "data": " ".join(args.data_paths),
        "train_rows": len(train),
        "epoch_size": train.epoch_size,
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
    doc: str | None,
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
    folder = Path(args.output_dir)
    # A script may have no docstring.
    title = next(iter((doc or "").strip().splitlines()), Path(sys.argv[0]).name)
    run = read_run(folder) or {}
    logs = log_history or _read_logs(folder)
    if figure := plot_curves(logs):
        figure.savefig(folder / "curves.png", dpi=120)
    logs = finite_logs(logs)
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
    charts, more = run_charts(logs, stages, found, answered), more_charts(logs)
    attempts = run.get("attempts", [])
    summary = summarise(attempts, logs)
    loss = points_of(logs, "loss")
    _, during, ends = score_points(logs, stages, found)
    stats = {stage: _plain_figures(found[stage]) for stage in stages}
    data |= {
        "charts": [chart.data for _, chart, _ in charts + more],
        # For `finetuning.compare`.
        "run": {
            "name": folder.resolve().name,
            "scored_by": scored_by,
            "stages": stats,
            "sums": sums_of(rows, last),
            "sources": by_source({last: answered[last]} if stages else {}, score),
            "losses": [thin(loss), thin(smooth(loss))],
            "score_by_step": sorted(during + ends),
            "attempt": attempts[-1] if attempts else {},
            **{name: summary[name] for name in ("duration", "speed", "memory", "strategy")},
        },
    }
    data["rows"], data["pictures"] = _with_pictures(dataset, shown, stages, classes, size_of(data), seconds)
    write_page(
        folder / REPORT,
        "report.html",
        title=title,
        run=describe_run(run, attempts),
        score=describe_score(stages, found, rows),
        facts=list_facts(summary, rows, found, stages),
        charts=charts,
        more=more,
        figures=list(dict.fromkeys(name for stage in stages for name in stats[stage]["figures"])),
        stages=[
            {
                "name": stage,
                "values_of": {name: show(value) for name, value in stats[stage]["figures"].items()},
                "intervals": {name: show_interval(value) for name, value in stats[stage]["intervals"].items()},
                "count": f"{len(answered[stage]):,}",
            }
            for stage in stages
        ],
        sources=[
            {**source, "values": [show(value) for value in source["values"]]} for source in by_source(answered, score)
        ],
        classes=class_tables(classes, counts, answered, stages) if classes else None,
        data=data,
    )
    print(f"report -> {folder / REPORT}", flush=True)
    write_card(args, title, logs, stats)
    upload_run(args)


def _read_logs(folder: Path) -> list[dict[str, Any]]:
    for place in (folder, *find_checkpoints(folder)):
        with suppress(OSError, ValueError, KeyError):
            return json.loads((place / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return []


def _score_stage(folder: Path, stage: str, predictions: list[Prediction], score: Score) -> dict[str, Any]:
    """Figures of a stage with their intervals: those of its file where it was answered to the end."""
    found: dict[str, Any] = {"figures": {}, "intervals": {}, "seconds": None}
    with suppress(Exception):  # a user's function, maybe given some of the rows only
        found["figures"] = {name: float(value) for name, value in score(predictions).items()}
        found["intervals"] = intervals(score, predictions)
    with suppress(OSError, ValueError):
        result = json.loads((folder / f"eval_{stage.replace(' ', '_')}.json").read_text(encoding="utf-8"))
        found["seconds"] = result.get("seconds")
        if found["figures"] and "measured_by" in result:
            found["figures"] |= {name: result[name] for name in MEASURED}
    found["count"] = len(predictions)
    return found


def _plain_figures(found: dict[str, Any]) -> dict[str, Any]:
    figures = {name: value for name, value in found["figures"].items() if "/" not in name}
    return {"figures": figures, "intervals": found["intervals"], "count": found["count"]}


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
