"""Answers beside what was asked, and the file that keeps them: predictions.jsonl."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..arguments import RecipeArguments
from ..data.fingerprint import digest
from ..training.checkpoint import read_manifest
from ..training.identity import read_run

PREDICTIONS = "predictions.jsonl"
# A stage while training is "step N".
STEP = "step "


@dataclass
class Prediction:
    """A generated answer beside what was asked.

    Args:
        id (str): id of the conversation.
        turn (int): turn of the conversation, from 0.
        question (str): text of the user in this turn.
        references (list[str]): acceptable answers.
        answer (str): generated answer.
        choices (dict[str, float]): log-probability that the model gives to each choice of a closed question as its whole
            answer, in nats; empty for an open question.
        asked (str): digest of all that the model was shown: texts, earlier answers, pictures, choices.
        source (str): that of the conversation.
    """

    id: str
    turn: int
    question: str
    references: list[str]
    answer: str = ""
    choices: dict[str, float] = field(default_factory=dict)
    asked: str = ""
    source: str = ""


def answering_model(args: RecipeArguments, stage: str) -> str:
    """What the model that answers at a stage is known by: the run's settings, after training the final weights too.

    While training it is the run itself: its rows, settings and script.
    """
    output = Path(args.output_dir)
    run, manifest = read_run(output), read_manifest(output)
    if stage.startswith(STEP):
        return digest([run and run.get("identity"), args.max_new_tokens]).hex()
    weights = None
    if stage != "before" and manifest:
        weights = {name: entry for name, entry in manifest["files"].items() if name.endswith(".safetensors")}
    return digest(
        [run and sorted(run["settings"].items()), weights and sorted(weights.items()), args.max_new_tokens]
    ).hex()


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Lines of predictions.jsonl; one that a run left half-written when it died is left out."""
    items = []
    if path.exists():
        # Bytes, since a line may end inside a letter; not splitlines, since an answer may hold other line separators.
        for line in path.read_bytes().split(b"\n"):
            with suppress(ValueError):
                item = json.loads(line)
                if (
                    isinstance(item, dict)
                    and {"stage", "model", "id", "turn", "answer", "choices", "asked"} <= item.keys()
                ):
                    items.append(item)
    return items


def kept_answers(folder: Path, stage: str, by: str, questions: list[Prediction]) -> dict[int, dict[str, Any]]:
    """Number of a question -> the answer that stands in predictions.jsonl, of this model to exactly what is asked now."""
    found = {
        (item["id"], item["turn"], item["asked"]): item
        for item in read_predictions(folder / PREDICTIONS)
        if item["stage"] == stage and item["model"] == by
    }
    places = {number: (question.id, question.turn, question.asked) for number, question in enumerate(questions)}
    return {number: found[place] for number, place in places.items() if place in found}


def keep_answers(
    path: Path, stage: str, by: str, questions: list[Prediction], per_round: int
) -> dict[int, dict[str, Any]]:
    """The answers that are not generated again.

    While a stage is under way these are whole rounds from the first question on, so that the others are batched as they
    would have been: padding changes the last bits of the logits. Once it was complete, every answer to the same question.
    """
    kept = kept_answers(path.parent, stage, by, questions)
    if not (path.parent / f"eval_{stage}.json").exists():
        first_missing = next((number for number in range(len(questions)) if number not in kept), len(questions))
        whole = first_missing if first_missing == len(questions) else first_missing - first_missing % per_round
        kept = {number: item for number, item in kept.items() if number < whole}
    if path.exists():
        others = [item for item in read_predictions(path) if item["stage"] != stage]
        _replace(path, others + [kept[number] for number in sorted(kept)])
    return kept


def with_answer(question: Prediction, kept: dict[str, Any]) -> Prediction:
    return replace(question, answer=kept["answer"], choices=kept["choices"])


def to_line(stage: str, by: str, prediction: Prediction) -> str:
    return json.dumps({"stage": stage, "model": by, **asdict(prediction)}, ensure_ascii=False) + "\n"


def _replace(path: Path, items: list[dict[str, Any]]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    aside.replace(path)


def rewrite(path: Path, stage: str, by: str, predictions: list[Prediction]) -> None:
    """Puts the answers of a stage, some of them kept and some new, into the data set's order."""
    others = [item for item in read_predictions(path) if item["stage"] != stage]
    _replace(path, others + [{"stage": stage, "model": by, **asdict(prediction)} for prediction in predictions])
