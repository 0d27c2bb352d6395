"""The first screen of a report in words: the score, how the run went, what it was made with."""

import shlex
from typing import Any

from .rows import Row, difference_between, sums_of
from .uncertainty import Interval


def show(value: float | None) -> str:
    """A figure as people compare it."""
    return "" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def show_name(name: str) -> str:
    """A figure's name as a heading: short ones are abbreviations."""
    return name.upper() if len(name) <= 5 else name.replace("_", " ").capitalize()


def show_interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    return "all rows alike" if low == high else f"{show(low)} – {show(high)}"


def show_difference(difference: float, interval: Interval | None) -> str:
    low, high = interval or (difference, difference)
    spread = "" if low == high else f" ({low:+.3f} to {high:+.3f})".replace("-", "−")
    return f"{difference:+.3f}".replace("-", "−") + spread


def show_seconds(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def describe_score(stages: list[str], found: dict[str, Any], rows: list[Row]) -> dict[str, Any] | None:
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
        "name": show_name(name),
        "first": describe(first) if first else None,
        "last": describe(scored[-1]),
        "difference": difference,
    }


def summarise(attempts: list[dict[str, Any]], logs: list[dict[str, Any]]) -> dict[str, str]:
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
        "train_rows": _describe_rows(attempt) if attempt else "",
    }


def _describe_rows(attempt: dict[str, Any]) -> str:
    rows, samples = attempt["train_rows"], attempt.get("epoch_size", attempt["train_rows"])
    return f"{rows:,} rows" + (f", {samples:,} samples an epoch" if samples != rows else "")


def list_facts(
    summary: dict[str, str], rows: list[Row], found: dict[str, Any], stages: list[str]
) -> list[tuple[str, str]]:
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


def _by_flag(command: list[str]) -> list[str]:
    """A command in the pieces between which a line may end: each flag with its values."""
    pieces: list[list[str]] = []
    for word in command:
        if pieces and not (word.startswith("--") and any(part.endswith(".py") for piece in pieces for part in piece)):
            pieces[-1].append(word)
        else:
            pieces.append([word])
    return [shlex.join(piece) for piece in pieces]


def describe_run(run: dict[str, Any], attempts: list[dict[str, Any]]) -> dict[str, Any]:
    attempt = attempts[-1] if attempts else {}
    state = attempt.get("state", "unfinished" if attempt else "finished")
    step = f"At step {attempt['step']}: " if attempt.get("step") else ""
    made_with = [("commit", attempt.get("commit", "")), *attempt.get("versions", {}).items()]
    return {
        "started": run.get("started", "").replace("T", " ")[:16],
        "state": state,
        "ending": step + (attempt.get("ending") or "no end of this run was recorded"),
        "command": _by_flag(attempt.get("command", [])),
        "made_with": [(name, value) for name, value in made_with if value],
        "changed": list(attempt.get("changed", {}).items()),
        "summary": run.get("summary", ""),
    }
