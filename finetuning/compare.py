"""Lays finished runs over each other on one page: scores with intervals, paired differences, curves, rows where they disagree.

    python -m finetuning.compare output/full output/lora
    python -m finetuning.compare run-1 run-2 run-3 --out compare.html

A run is an output folder with its report.html, or such a page that somebody has sent; its answers after training, their
scores, its pictures and its curves are read from there. Differences are to the first run, over the rows that all have answered.

Exit status: 0, or 2 for a bad call.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .command_line import CommandParser
from .data.shown import printable
from .errors import InputError
from .results.charts import COLOURS, Chart, Line, line_chart
from .results.curves import bounds_of
from .results.overview import show, show_difference, show_interval
from .results.page import read_data, write_page
from .results.rows import common_sums, difference_between

REPORT = "report.html"
MOST_RUNS = COLOURS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line, checked."""
    parser = CommandParser("compare", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders, or report.html files, at least two")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="page that is written")
    args = parser.parse_args(argv)
    if not 2 <= len(args.runs) <= MOST_RUNS:
        raise InputError(f"expected 2 to {MOST_RUNS} runs, found {len(args.runs)}")
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise InputError(f"--out {printable(str(args.out))}: expected a file in a folder that exists")
    return args


def read_runs(paths: list[Path]) -> list[dict[str, Any]]:
    """The data of each run's report, each run with a name of its own.

    Raises:
        InputError: for a run without a report, or runs whose rows were scored by different figures.
    """
    runs = []
    for path in paths:
        page = path if path.is_file() else path / REPORT
        data = read_data(page)
        if data is None or "run" not in data:
            raise InputError(
                f"{printable(str(page))}: expected the page that a run writes at its end, found "
                f"{'another file' if page.exists() else 'none'}; the run's command, started again, writes it"
            )
        if not data["run"]["sums"]:
            raise InputError(f"{printable(str(page))}: expected a run with answers, found none")
        runs.append(data)
    names = [data["run"]["name"] for data in runs]
    for data, path in zip(runs, paths, strict=True):
        if names.count(data["run"]["name"]) > 1:
            data["run"]["name"] = os.path.normpath(path)
    first = runs[0]["run"]["scored_by"]
    for data in runs:
        if data["run"]["scored_by"] != first:
            found = f"{data['run']['scored_by']} in {data['run']['name']}"
            raise InputError(f"expected runs whose answers have the same score, found {first} in the first, {found}")
    return runs


def compare(runs: list[dict[str, Any]], out: Path) -> None:
    """Writes the page over the data of several reports.

    Raises:
        InputError: if no row was answered by all of them.
    """
    sums = common_sums([data["run"]["sums"] for data in runs])
    if not sums[0]:
        raise InputError("expected runs that answered the same rows, found no row that all of them have")
    names = [data["run"]["name"] for data in runs]
    table = [_describe(number, data, sums) for number, data in enumerate(runs)]
    rows, pictures = _join(runs)
    best = max(data["best"] for data in runs)
    for row in rows:
        _judge(row, best)
    rows.sort(key=lambda row: (-_spread(row), row["score"], row["index"]))
    charts = _charts(runs)
    filters = [("all", "All"), ("disagree", "They disagree"), ("any", "Wrong in any"), ("every", "Wrong in all")]
    shown_in_all = len(rows)
    data = {
        "columns": names,
        "merge": False,
        "best": best,
        "order": "largest disagreement first",
        "filters": [
            {"key": key, "label": label, "count": sum(key == "all" or key in row["flags"] for row in rows)}
            for key, label in filters
        ],
        "classes": runs[0]["classes"] if all(data["classes"] == runs[0]["classes"] for data in runs) else [],
        "total": len(sums[0]),
        "left_out": ""
        if shown_in_all == len(sums[0])
        else f"{shown_in_all:,} of {len(sums[0]):,} rows are listed: those that all reports list.",
        "charts": [chart.data for _, chart, _ in charts],
        "rows": rows,
        "pictures": pictures,
    }
    write_page(
        out,
        "compare.html",
        title=", ".join(names[:-1]) + " and " + names[-1],
        name=next(iter(_last(runs[0])["figures"]), "score"),
        runs=table,
        common=f"{len(sums[0]):,}",
        remark=f"Each answer is scored by {runs[0]['run']['scored_by']}.",
        charts=charts,
        sources=_sources(runs),
        settings=_settings(runs),
        data=data,
    )


def _last(data: dict[str, Any]) -> dict[str, Any]:
    return data["run"]["stages"][data["columns"][-1]]


def _describe(number: int, data: dict[str, Any], sums: list[list[list[Any]]]) -> dict[str, Any]:
    """A line of the table of runs."""
    run = data["run"]
    name = next(iter(_last(data)["figures"]), "")

    def figure(stage: str | None) -> dict[str, str]:
        found = run["stages"].get(stage, {"figures": {}, "intervals": {}})
        return {
            "value": show(found["figures"].get(name)),
            "interval": show_interval(found["intervals"].get(name)),
        }

    difference = {"value": "", "interval": ""}
    if number and (paired := difference_between(sums[0], sums[number])):
        value, _, spread = show_difference(paired[0], paired[1]).partition(" (")
        difference = {"value": value, "interval": spread.rstrip(")")}
    return {
        "name": run["name"],
        "colour": number,
        "state": run["attempt"].get("state", "finished"),
        "before": figure("before"),
        "after": figure(data["columns"][-1] if data["columns"][-1] != "before" else None),
        "difference": difference,
        **{key: run[key] for key in ("strategy", "duration", "speed", "memory")},
    }


def _join(runs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows that all reports list, with the last answer of each run; pictures are those of the first."""
    listed = [{(row["id"], len(row["turns"])): row for row in data["rows"]} for data in runs]
    rows = []
    for key, row in listed[0].items():
        same = [others.get(key) for others in listed]
        if any(other is None for other in same):
            continue
        turns = []
        for number, turn in enumerate(row["turns"]):
            found = [other["turns"][number] for other in same if other]
            item = {
                "question": turn["question"],
                "references": turn["references"],
                "answers": [each["answers"][-1] for each in found],
                "scores": [each["scores"][-1] for each in found],
            }
            if "class" in turn:
                item |= {"class": turn["class"], "answered": turn["answered"]}
            turns.append(item)
        rows.append({**row, "turns": turns})
    return rows, runs[0]["pictures"]


def _judge(row: dict[str, Any], best: float) -> None:
    """The row's mean score over all runs, and which filters it passes."""
    scores = [[value for value in turn["scores"] if value is not None] for turn in row["turns"]]
    wrong = [[value < best - 1e-9 for value in values] for values in scores]
    flat = [value for values in scores for value in values]
    row["score"] = sum(flat) / len(flat) if flat else 0
    facts = {
        "disagree": _spread(row) > 1e-9,
        "any": any(any(values) for values in wrong),
        "every": any(values and all(values) for values in wrong),
    }
    row["flags"] = [name for name, holds in facts.items() if holds]


def _spread(row: dict[str, Any]) -> float:
    values = [[value for value in turn["scores"] if value is not None] for turn in row["turns"]]
    return max((max(found) - min(found) for found in values if found), default=0)


def _charts(runs: list[dict[str, Any]]) -> list[tuple[str, Chart, str]]:
    losses, scores = [], []
    for number, data in enumerate(runs):
        run = data["run"]
        raw, smoothed = ([tuple(point) for point in points] for points in run["losses"])
        if raw:
            losses += [Line("", raw, number, "faint")] if smoothed else []
            losses.append(Line(run["name"], smoothed or raw, number))
        if run["score_by_step"]:
            scores.append(Line(run["name"], [tuple(point) for point in run["score_by_step"]], number, "dashed dots"))
    charts = []
    if losses:
        charts.append(("Loss", line_chart("loss by optimizer step", losses), "smoothed; pale: each log"))
    if scores:
        chart = line_chart("score by optimizer step", scores, bounds_of(scores))
        charts.append(("Score", chart, "whiskers: 95% intervals"))
    return charts


def _sources(runs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The main figure of each source of rows at the end of each run; empty where a run does not have the source."""
    # Of a page of an earlier version there are none.
    values = [{source["name"]: source["values"][-1] for source in data["run"].get("sources", [])} for data in runs]
    names = dict.fromkeys(name for found in values for name in found)
    return [(name, [show(found.get(name)) for found in values]) for name in names]


def _settings(runs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs; empty where a run keeps the default."""
    changed = [data["run"]["attempt"].get("changed", {}) for data in runs]
    names = dict.fromkeys(name for settings in changed for name in settings if name != "output_dir")
    table = [(name, [settings.get(name, "default") for settings in changed]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def main(argv: list[str] | None = None) -> int:
    """Compares the runs of the command line; exit status 0, or 2 for a bad call."""
    try:
        args = parse_args(argv)
        compare(read_runs(args.runs), args.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"comparison -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
