"""Scores the answers of a stage, and those of a finished run again."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import IntervalStrategy

from ..arguments import RecipeArguments
from ..data.dataset import ConversationDataset
from ..data.fingerprint import digest
from ..errors import InputError, ScriptError, describe_script_error
from .answering import Prompts, from_first_rank, generate_answers, moment
from .by_source import score_sources
from .likelihood import measure_loss
from .predictions import STEP, Prediction, answering_model, kept_answers, with_answer

# Beside the scores, where --metric is a flag of the script.
MEASURED = ("loss", "token_accuracy")


def evaluate(
    model,
    dataset: ConversationDataset,
    score: Callable[[list[Prediction]], dict[str, float]],
    args: RecipeArguments,
    stage: str,
) -> dict[str, Any] | None:
    """Answers all rows as far as their answers are not kept, scores them and writes `eval_<stage>.json`.

    Args: see `generate_answers`; `score` gives the task's figures by name, first the main one; names with a slash are
    details that are written but not printed.

    Returns:
        dict: the figures, num_answers, seconds, answers_unique and generated_texts_unique (first references and answers
        in the data set's order, once each row, as the published recipe names them); None if there are no rows, or
        after training if nothing was trained.

    Raises:
        ScriptError: if `score` fails.
        InputError: if it gives anything but figures.
    """
    trained = args.do_train or args.resume_from_checkpoint is not None
    if not len(dataset) or (stage != "before" and not trained):
        return None
    path = Path(args.output_dir) / f"eval_{stage}.json"
    earlier = from_first_rank(_read_evaluation(path), args)
    start = time.monotonic()
    predictions = generate_answers(model, dataset, args, stage)
    figures = _score(score, predictions)
    measured: dict[str, Any] | None = {}
    if args.measures_loss:
        asked = [(prediction.asked, prediction.references) for prediction in predictions]
        own = digest([answering_model(args, stage), asked]).hex() if args.process_index == 0 else ""
        by = from_first_rank(own, args)
        measured = _measured(earlier, by)
    if _is_of(earlier, figures, predictions) and measured is not None:
        return earlier
    if measured is None:
        # A finished run is scored again without its model.
        measured = {**measure_loss(model, dataset, args), "measured_by": by} if model is not None else {}
    seconds = round(time.monotonic() - start, 2)
    result = {
        **figures,
        **measured,
        "num_answers": len(predictions),
        # A run that is started again keeps its answers, and the time that they took.
        "seconds": max(seconds, earlier.get("seconds", 0)) if earlier else seconds,
        "ids": [prediction.id for prediction in predictions],
        "answers_unique": [prediction.references for prediction in predictions],
        "generated_texts_unique": [prediction.answer for prediction in predictions],
    }
    if args.process_index == 0:
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
        said = {**figures, **{name: value for name, value in measured.items() if name in MEASURED}}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in said.items() if "/" not in name)
        print(f"{moment(args, stage)}: {shown} ({len(predictions)} answers, {seconds:.0f} s) -> {path}", flush=True)
    return result


def _measured(evaluation: dict[str, Any], by: str) -> dict[str, Any] | None:
    """What a file `eval_<stage>.json` says of the loss, None if it says nothing, or of another model or other rows."""
    if evaluation.get("measured_by") != by or not evaluation.keys() >= set(MEASURED):
        return None
    return {name: evaluation[name] for name in (*MEASURED, "measured_by")}


def _is_of(evaluation: dict[str, Any], figures: dict[str, float], predictions: list[Prediction]) -> bool:
    """Whether a file `eval_<stage>.json` says just these figures and answers."""
    lists = {"ids", "answers_unique", "generated_texts_unique", "num_answers", "seconds", "measured_by"}
    lists |= set(MEASURED) - figures.keys()
    return (
        {name: value for name, value in evaluation.items() if name not in lists} == figures
        and evaluation.get("ids") == [prediction.id for prediction in predictions]
        and evaluation.get("answers_unique") == [prediction.references for prediction in predictions]
        and evaluation.get("generated_texts_unique") == [prediction.answer for prediction in predictions]
    )


def _read_evaluation(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def check_score(
    dataset: ConversationDataset, score: Callable[[list[Prediction]], dict[str, float]], args: RecipeArguments
) -> None:
    """Scores made-up answers, half of them right, before a model is loaded: is `score` sound, and is the best model's figure its?

    Args:
        dataset (ConversationDataset): the rows to answer.
        score (Callable): the task's own.
        args (RecipeArguments): eval_strategy, metric_for_best_model.

    Raises:
        ScriptError: if `score` fails.
        InputError: if it gives anything but figures, or none that is asked for.
    """
    if not len(dataset):
        if args.eval_strategy != IntervalStrategy.NO:
            raise InputError(
                f"--eval_strategy {IntervalStrategy(args.eval_strategy).value}: expected rows to answer, found none; raise --eval_size"
            )
        return
    # Some rows: each of them is read for it.
    questions = Prompts(dataset.sample(args.eval_rows_during_training), args.data_dir).questions
    made_up = [
        replace(question, answer="" if number % 2 else question.references[0])
        for number, question in enumerate(questions)
    ]
    figures = ["loss", *(name for name in _score(score, made_up, "") if "/" not in name)]
    figures += ["token_accuracy"] * args.measures_loss
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in figures:
        raise InputError(
            f"--metric_for_best_model {args.metric_for_best_model}: expected a figure of this task ({', '.join(figures)})"
        )


def score_while_training(
    score: Callable[[list[Prediction]], dict[str, float]], args: RecipeArguments
) -> Callable[[Any, ConversationDataset, int], tuple[dict[str, float], list[Prediction]]]:
    """What RecipeTrainer calls at each evaluation: (model, rows, step) -> figures and answers, which are kept."""

    def answer_and_score(model, dataset: ConversationDataset, step: int):
        predictions = generate_answers(model, dataset, args, f"{STEP}{step}")
        figures = _score(score, predictions)
        if args.measures_loss:
            # The Trainer has measured the loss.
            figures["token_accuracy"] = measure_loss(model, dataset, args)["token_accuracy"]
        return figures, predictions

    return answer_and_score


KEPT = "\nThe answers are kept: with the fault mended, the same command goes on from them"


def _score(
    score: Callable[[list[Prediction]], dict[str, float]], predictions: list[Prediction], advice: str = KEPT
) -> dict[str, float]:
    try:
        figures = score(predictions)
    except (InputError, ScriptError):
        raise
    except Exception as error:
        text = describe_script_error(error)
        if text is None:
            raise
        raise ScriptError(f"{text}{advice}") from None
    expected = 'expected figures by name such as {"accuracy": 0.5}'
    if not isinstance(figures, dict) or not figures:
        raise InputError(f"score: {expected}, found {figures!r:.100}")
    for name, value in figures.items():
        try:
            finite = isinstance(name, str) and not isinstance(value, str) and abs(float(value)) < float("inf")
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise InputError(f"score: {expected}, finite numbers, found {name!r:.50}: {value!r:.50}")
    return {name: float(value) for name, value in figures.items()} | score_sources(score, predictions)


def score_again(
    dataset: ConversationDataset, score: Callable[[list[Prediction]], dict[str, float]], args: RecipeArguments
) -> bool:
    """For a finished run: scores its kept answers with today's `score`, if they are all there; else returns False."""
    questions = Prompts(dataset, args.data_dir).questions
    folder, stages = Path(args.output_dir), ("before", "after")
    found = None
    if args.process_index == 0:
        found = {stage: kept_answers(folder, stage, answering_model(args, stage), questions) for stage in stages}
    kept_by_stage = from_first_rank(found, args)
    if any(len(kept) < len(questions) for kept in kept_by_stage.values()):
        return False
    if args.process_index == 0:
        print(
            f"this run is finished, nothing is trained or asked; --overwrite_output_dir starts afresh ({folder})",
            flush=True,
        )
    for stage in stages if questions else ():
        path = folder / f"eval_{stage}.json"
        earlier = from_first_rank(_read_evaluation(path), args)
        kept = kept_by_stage[stage]
        predictions = [with_answer(question, kept[number]) for number, question in enumerate(questions)]
        if not _is_of(earlier, _score(score, predictions), predictions):
            if args.process_index == 0:
                print(f"{stage} training: the kept answers are scored again", flush=True)
            evaluate(None, dataset, score, args, stage)
    return True
