"""A folder as a run leaves it, made without a model, and its report."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import recipe

from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import ConversationDataset
from finetuning.results.metrics import exact_match
from finetuning.results.report import write_report
from finetuning.training.identity import write_run

LOGS = [
    {"loss": 3.0 - step / 2, "grad_norm": 1.0, "learning_rate": 1e-3 / step, "step": step, "epoch": step / 4}
    for step in (1, 2, 3, 4)
] + [{"train_runtime": 1.0, "train_samples_per_second": 8.0, "step": 4}]
ATTEMPT = {
    "started": "2026-01-01T12:00",
    "command": ["torchrun", "--nproc_per_node=2", "finetune_hf_trainer_docvqa.py", "--use_lora"],
    "commit": "0123456789abcdef",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "device": "a processor, 2 cores",
    "processes": 2,
    "strategy": "LoRA",
    "model": "model",
    "data": "data",
    "train_rows": 4,
    "changed": {"use_lora": "True"},
    "state": "finished",
    "ending": "",
    "seconds": 12.0,
    "step": 4,
    "peak_bytes": 2**30,
}
RECORD = {"script": "x.py", "settings": {}, "spread": {}, "rows": {}, "started": "2026-01-01T12:00:00"}


def rows(count: int = 2, **changes) -> list[dict]:
    """Rows of one turn each; even ones are answered rightly."""
    return [
        {
            "id": f"r{number}",
            "question": "Which page?",
            "references": [str(number)],
            "answer": str(number - number % 2),
            "images": [recipe.page(str(number))],
            **changes,
        }
        for number in range(count)
    ]


def to_conversation(row: dict) -> Conversation:
    """A row of `rows`, or one with a list of turns of that form."""
    turns = [
        Turn(turn["question"], turn["references"], turn.get("images", []), turn.get("choices", []))
        for turn in row.get("turns", [row])
    ]
    return Conversation(row["id"], turns, row.get("source", ""))


def score(predictions) -> dict[str, float]:
    return {"accuracy": sum(exact_match(item.answer, item.references) for item in predictions) / len(predictions)}


def leave(
    folder: Path, rows: list[dict], answers: dict[str, Callable | str], logs=LOGS, attempt=None, summary: str = "table"
):
    """Writes what a run leaves: stage -> the answer to a turn, maybe with its choices.

    One answer to all turns, or a function of a turn: None for one that was not asked.
    """
    lines = []
    for stage, answer in answers.items():
        for row in rows:
            for number, turn in enumerate(row.get("turns", [row])):
                given = answer(turn) if callable(answer) else answer
                text, choices = given if isinstance(given, tuple) else (given, {})
                if text is not None:
                    known = {"stage": stage, "model": "x", "id": row["id"], "turn": number, "asked": "x"}
                    lines.append({**known, "answer": text, "choices": choices})
    recipe.write_jsonl(folder / "predictions.jsonl", lines)
    if logs:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    write_run(folder, {**RECORD, "summary": summary, "attempts": [{**ATTEMPT, **(attempt or {})}]})


def report(folder: Path, rows: list[dict], title: str = "DocVQA", score=score, report_rows: int = 5000) -> str:
    """The page over what `leave` left."""
    args = SimpleNamespace(output_dir=str(folder), process_index=0, report_rows=report_rows)
    write_report(args, title, ConversationDataset(rows, to_conversation, None, [9] * len(rows)), score)
    return (folder / "report.html").read_text(encoding="utf-8")
