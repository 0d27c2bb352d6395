"""doubts.html: rows whose answers a model doubts, worst first, and the same pictures with other answers beside them."""

import os
from collections import defaultdict
from collections.abc import Sequence
from math import exp, isfinite
from pathlib import Path
from typing import Any

from ..data.dataset import ConversationDataset
from .charts import Line, line_chart
from .judging import Doubt, worst_first
from .page import write_page
from .rows import LEFT_OUT, UNREADABLE, size_of
from .thumbnails import thumbnails
from .twins import Asked, find_twins

PAGE = "doubts.html"
MOST_BYTES = 20_000_000 - 300_000  # of a page; the rest for what surrounds the rows


def add_twins(doubts: Sequence[Doubt]) -> None:
    """Fills the field `twins` of each."""
    asked = [Asked(item.question, item.answers, item.pictures) for item in doubts]
    for item, twins in zip(doubts, find_twins(asked), strict=True):
        item.twins = [_describe(doubts[twin.number]) | {"bits": twin.bits} for twin in twins]


def _describe(item: Doubt) -> dict[str, Any]:
    return {"id": item.id, "turn": item.turn, "where": item.where, "answers": item.answers}


def write_doubts_page(
    path: Path,
    doubts: Sequence[Doubt],
    dataset: ConversationDataset,
    most_rows: int,
    title: str,
    facts: dict[str, str],
    seen: bool,
) -> None:
    """Writes the page.

    Args:
        path (Path): the HTML file.
        doubts (Sequence[Doubt]): of all questions, twins filled.
        dataset (ConversationDataset): the rows, for their pictures.
        most_rows (int): most rows that are listed.
        title (str): heading.
        facts (dict[str, str]): what was judged and how, name -> words.
        seen (bool): whether the judging model may have been trained on the rows.
    """
    numbers = {dataset.to_conversation(row).id: number for number, row in enumerate(dataset.rows)}
    rows = _rows(doubts, numbers)
    shown = rows[:most_rows]
    values = [item.doubt for item in worst_first(doubts) if isfinite(item.doubt)]
    chart = line_chart("doubt of the answers, worst first", [Line("doubt", list(enumerate(values, 1)))], unit="rank")
    filters = {"all": "All", "other": "The model says something else", "twins": "Same picture, other answer"}
    data: dict[str, Any] = {
        "columns": ["the model"],
        "merge": False,
        "best": 1.0,
        "order": "worst first",
        "expected": "given",
        "mark": "doubt",
        "filters": [
            {"key": key, "label": label, "count": sum(key == "all" or key in row["flags"] for row in shown)}
            for key, label in filters.items()
        ],
        "classes": [],
        "total": len(rows),
        "left_out": ""
        if len(shown) == len(rows)
        else f"The {len(shown):,} worst of {len(rows):,} rows are listed; --report_rows {len(rows)} lists all.",
        "charts": [chart.data] if values else [],
    }
    places = [row.pop("sources") for row in shown]
    count = sum(map(len, places))
    sources = (_picture(dataset, *place) for of_row in places for place in of_row)
    made = thumbnails(sources, count, max(0, MOST_BYTES - size_of(data) - size_of(shown)))
    data["pictures"] = []
    for row, of_row in zip(shown, places, strict=True):
        for _ in of_row:
            uri = next(made)
            row["pictures"].append(len(data["pictures"]) if uri else LEFT_OUT if uri is None else UNREADABLE)
            if uri:
                data["pictures"].append(uri)
    data["rows"] = shown
    others = sum(not item.agrees for item in doubts)
    twins = sum(bool(item.twins) for item in doubts)
    write_page(
        path,
        "doubts.html",
        title=title,
        seen=seen,
        facts=facts
        | {
            "the model says something else": f"{others:,} of {len(doubts):,} answers",
            "same picture, other answer": f"{twins:,} answers",
        },
        charts=[("Doubt by rank", chart, "nats a token; where it has fallen to 0, the model says what is given")]
        if values
        else [],
        data=data,
    )


def _picture(dataset: ConversationDataset, row: int, place: int) -> Any:
    return dataset.to_conversation(dataset.rows[row]).images[place]


def _rows(doubts: Sequence[Doubt], numbers: dict[str, int]) -> list[dict[str, Any]]:
    """Rows as the page's script takes them, the one with the most doubted turn first."""
    together: dict[str, list[Doubt]] = defaultdict(list)
    for item in worst_first(doubts):
        together[item.id].append(item)
    rows = []
    for name, items in together.items():
        worst = items[0].doubt
        turns = sorted(items, key=lambda item: item.turn)
        flags = ["other"] if any(not item.agrees for item in items) else []
        sources = [(numbers[name], place) for place in range(len(items[0].images))]
        captions = [""] * len(sources)
        for twin in (twin for item in turns for twin in item.twins):
            # One that is equal in each pixel would be shown twice.
            if twin["bits"] >= 0 and (numbers[twin["id"]], 0) not in sources:
                sources.append((numbers[twin["id"]], 0))
                captions.append(twin["id"])
        if any(item.twins for item in items):
            flags.append("twins")
        rows.append(
            {
                "id": name,
                "index": numbers[name],
                "where": os.path.basename(turns[0].where),
                "score": round(worst, 3) if isfinite(worst) else None,
                "flags": flags,
                "pictures": [],
                "captions": captions,
                "sources": sources,
                "turns": [_turn(item) for item in turns],
            }
        )
    return rows


def _turn(item: Doubt) -> dict[str, Any]:
    return {
        "question": item.question,
        "references": item.answers,
        "answers": [item.model_answer],
        "scores": [1.0 if item.agrees else None],
        "chances": [_nats(item.model_log_likelihood)],
        "values": [_percent(item.model_log_likelihood)],
        "given": [_percent(max(item.log_likelihoods)), _nats(max(item.log_likelihoods))],
        "twins": [
            {
                "how": "same picture" if twin["bits"] < 0 else "looks the same",
                "exactly": "" if twin["bits"] < 0 else f"{twin['bits']} of 256 bits of the pictures' hashes differ",
                "text": " / ".join(twin["answers"]),
                "where": f"{twin['id']}, {os.path.basename(twin['where'])}",
            }
            for twin in item.twins
        ],
    }


def _percent(value: float) -> str:
    """A mean log-probability as the probability of a token: their geometric mean."""
    if not isfinite(value):
        return "?"
    share = exp(value)
    return f"{share:.1%}" if share >= 0.001 else f"{100 * share:.0e}%".replace("e-0", "e-")


def _nats(value: float) -> str:
    return f"mean log-probability {value:.3f} nats a token"
