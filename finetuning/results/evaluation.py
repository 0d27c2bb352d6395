"""Generates answers over all ranks, each question exactly once, in the data set's order; keeps and scores them."""

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from phi3v import Phi3VProcessor
from phi3v.processing_phi3_v import IMAGE_TAG

from ..arguments import RecipeArguments
from ..data.conversation import Conversation, Turn, to_messages
from ..data.dataset import ConversationDataset
from ..data.fingerprint import digest, identify_picture
from ..data.images import load_images
from ..errors import InputError, ScriptError, Stopped, describe_script_error
from ..training.checkpoint import read_manifest
from ..training.identity import read_run
from ..training.signals import stop_signals

PREDICTIONS = "predictions.jsonl"


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
    """

    id: str
    turn: int
    question: str
    references: list[str]
    answer: str = ""
    choices: dict[str, float] = field(default_factory=dict)
    asked: str = ""


class _Prompts(Dataset):
    """(prompt, images) of each question; earlier turns of its conversation are given with their first answers.

    Holds no image: rows are read again when their turn comes.
    """

    def __init__(self, dataset: ConversationDataset, folder: str | None):
        self.dataset = dataset
        self.questions, self.places = [], []
        for index, row in enumerate(dataset.rows):
            conversation = dataset.to_conversation(row)
            # All pictures, since a tag may name one of a later turn.
            shown: list[Any] = [[identify_picture(source, folder) for source in conversation.images]]
            for number, turn in enumerate(conversation.turns):
                shown.append((turn.user, list(turn.choices)))
                asked, choices = digest(shown).hex(), dict.fromkeys(turn.choices, 0.0)
                self.questions.append(
                    Prediction(conversation.id, number, turn.user, list(turn.answers), "", choices, asked)
                )
                self.places.append((index, number))
                shown.append(turn.answers[0])

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        row, turn = self.places[index]
        conversation = self.dataset.to_conversation(self.dataset.rows[row])
        earlier = [turn.answers[0] for turn in conversation.turns[:turn]]
        messages = to_messages(conversation, earlier)
        prompt = self.dataset.processor.apply_chat_template(messages, add_generation_prompt=True)
        # This turn and the ones before it may name some of the images only.
        numbers = sorted({int(number) for number in IMAGE_TAG.findall(prompt)})
        prompt = IMAGE_TAG.sub(lambda tag: f"<|image_{numbers.index(int(tag[1])) + 1}|>", prompt)
        shown = Turn("", [], [conversation.images[number - 1] for number in numbers])
        return prompt, load_images(Conversation(conversation.id, [shown]))

    def collate(self, prompts):
        if not prompts:
            return None
        texts, images = zip(*prompts, strict=True)
        return self.dataset.processor(list(texts), list(images), padding=True, padding_side="left")


def generate_answers(model, dataset: ConversationDataset, args: RecipeArguments, stage: str) -> list[Prediction]:
    """Answers every turn of every row greedily, on all ranks together.

    The ranks answer batch after batch side by side, and each batch is appended to `predictions.jsonl` in the output
    folder at once, in the data set's order, with `stage` as its first field. Answers that stand there already are not
    generated again: those of a run that was stopped, and, where a conversation was changed since, those of all others.

    Args:
        model: the model or PEFT model, on the run's device; None where all answers are known to be kept.
        dataset (ConversationDataset): the rows to answer.
        args (RecipeArguments): per_device_eval_batch_size, max_new_tokens, output_dir, precision.
        stage (str): "before" or "after".

    Returns:
        list[Prediction]: one for each question, on every rank.
    """
    prompts = _Prompts(dataset, args.data_dir)
    size, ranks, rank = args.per_device_eval_batch_size, args.world_size, args.process_index
    path = Path(args.output_dir) / PREDICTIONS
    by = _from_first(answering_model(args, stage) if rank == 0 else "", args)
    kept = _from_first(_keep_answers(path, stage, by, prompts.questions, ranks * size) if rank == 0 else None, args)
    predictions = {number: _answered(prompts.questions[number], kept[number]) for number in kept}
    todo = [number for number in range(len(prompts)) if number not in predictions]
    # Round k covers the next `ranks x size` questions; a rank without any in the last round still takes part.
    starts = range(rank * size, -(-len(todo) // (ranks * size)) * ranks * size, ranks * size)
    batches = [todo[start : start + size] for start in starts]
    loader = DataLoader(
        prompts,
        batch_sampler=batches,
        collate_fn=prompts.collate,
        num_workers=args.dataloader_num_workers if todo else 0,
    )
    if todo:
        model.eval()
    if todo and kept and rank == 0:
        print(
            f"{stage} training: {len(todo)} of {len(prompts)} questions are asked, the other answers are kept",
            flush=True,
        )
    bar = tqdm(
        total=len(prompts), initial=len(kept), desc=f"answers {stage} training", disable=args.disable_tqdm or rank > 0
    )
    # The other ranks write nothing.
    with open(path if rank == 0 else os.devnull, "a", encoding="utf-8") as file, _precision(args):
        for batch, inputs in zip(batches, loader, strict=True):
            asked = [prompts.questions[index] for index in batch]
            found = _generate(model, dataset.processor, inputs, asked, args) if batch else []
            pairs = list(zip(batch, found, strict=True))
            gathered = gather_object(pairs) if ranks > 1 else pairs
            predictions.update(gathered)
            bar.update(len(gathered))
            if rank == 0:
                # One write for a round: of a round that is cut short nothing is kept.
                file.write("".join(_line(stage, by, prediction) for _, prediction in gathered))
                file.flush()
            if signum := stop_signals.agree(args.device):
                raise Stopped(signum, f"{len(predictions)} of {len(prompts)} answers {stage} training are written")
    bar.close()
    answered = [predictions[number] for number in range(len(prompts))]
    if rank == 0 and kept and todo:
        _rewrite(path, stage, by, answered)
    return answered


def _answered(question: Prediction, kept: dict[str, Any]) -> Prediction:
    return replace(question, answer=kept["answer"], choices=kept["choices"])


def answering_model(args: RecipeArguments, stage: str) -> str:
    """What the model that answers at a stage is known by: the run's settings, after training the final weights too."""
    output = Path(args.output_dir)
    run, manifest = read_run(output), read_manifest(output)
    weights = None
    if stage != "before" and manifest:
        weights = {name: entry for name, entry in manifest["files"].items() if name.endswith(".safetensors")}
    return digest(
        [run and sorted(run["settings"].items()), weights and sorted(weights.items()), args.max_new_tokens]
    ).hex()


def _line(stage: str, by: str, prediction: Prediction) -> str:
    return json.dumps({"stage": stage, "model": by, **asdict(prediction)}, ensure_ascii=False) + "\n"


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


def _from_first(value: Any, args: RecipeArguments) -> Any:
    """The first rank's value, on all of them: files that it alone writes may come into sight later on others."""
    return broadcast_object_list([value])[0] if args.world_size > 1 else value


def _replace(path: Path, items: list[dict[str, Any]]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    aside.replace(path)


def _rewrite(path: Path, stage: str, by: str, predictions: list[Prediction]) -> None:
    """Puts the answers of a stage, some of them kept and some new, into the data set's order."""
    others = [item for item in read_predictions(path) if item["stage"] != stage]
    _replace(path, others + [{"stage": stage, "model": by, **asdict(prediction)} for prediction in predictions])


def kept_answers(folder: Path, stage: str, by: str, questions: list[Prediction]) -> dict[int, dict[str, Any]]:
    """Number of a question -> the answer that stands in predictions.jsonl, of this model to exactly what is asked now."""
    found = {
        (item["id"], item["turn"], item["asked"]): item
        for item in read_predictions(folder / PREDICTIONS)
        if item["stage"] == stage and item["model"] == by
    }
    places = {number: (question.id, question.turn, question.asked) for number, question in enumerate(questions)}
    return {number: found[place] for number, place in places.items() if place in found}


def _keep_answers(
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


def _precision(args: RecipeArguments):
    # As in training: adapters are kept in float32 beside a base in 16 bits, and autocast brings the two together.
    mixed = args.use_lora and args.compute_dtype != torch.float32
    return torch.autocast(args.device.type, dtype=args.compute_dtype) if mixed else nullcontext()


@torch.no_grad()
def _generate(model, processor: Phi3VProcessor, inputs, asked: list[Prediction], args) -> list[Prediction]:
    inputs = inputs.to(args.device)
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, use_cache=True)
    texts = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    predictions = [replace(question, answer=text.strip()) for question, text in zip(asked, texts, strict=True)]
    for choice in sorted({choice for question in asked for choice in question.choices}):
        scores = _log_probability(model, processor, inputs, choice)
        for prediction, value in zip(predictions, scores, strict=True):
            if choice in prediction.choices:
                prediction.choices[choice] = value
    return predictions


def _log_probability(model, processor: Phi3VProcessor, inputs, choice: str) -> list[float]:
    """Log-probability of `choice` and its `<|end|>` as the whole answer to each prompt of a left-padded batch."""
    start = len(processor.tokenize("<|assistant|>\n"))
    answer = torch.tensor(
        processor.tokenize(f"<|assistant|>\n{choice}<|end|>")[start:], device=inputs["input_ids"].device
    )
    answer = answer.expand(len(inputs["input_ids"]), -1)
    longer = {
        **inputs,
        "input_ids": torch.cat((inputs["input_ids"], answer), dim=1),
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(answer)), dim=1),
    }
    logits = model(**longer, logits_to_keep=answer.shape[1] + 1).logits[:, :-1]  # (B, answer, V)
    return logits.float().log_softmax(-1).gather(-1, answer[..., None]).sum((1, 2)).tolist()


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
    earlier = _from_first(_read_evaluation(path), args)
    start = time.monotonic()
    predictions = generate_answers(model, dataset, args, stage)
    figures = _score(score, predictions)
    if _is_of(earlier, figures, predictions):
        return earlier
    seconds = round(time.monotonic() - start, 2)
    result = {
        **figures,
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
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if "/" not in name)
        print(f"{stage} training: {shown} ({len(predictions)} answers, {seconds:.0f} s) -> {path}", flush=True)
    return result


def _is_of(evaluation: dict[str, Any], figures: dict[str, float], predictions: list[Prediction]) -> bool:
    """Whether a file `eval_<stage>.json` says just these figures and answers."""
    lists = {"ids", "answers_unique", "generated_texts_unique", "num_answers", "seconds"}
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


def _score(score: Callable[[list[Prediction]], dict[str, float]], predictions: list[Prediction]) -> dict[str, float]:
    try:
        figures = score(predictions)
    except (InputError, ScriptError):
        raise
    except Exception as error:
        text = describe_script_error(error)
        if text is None:
            raise
        raise ScriptError(
            f"{text}\nThe answers are kept: with the fault mended, the same command goes on from them"
        ) from None
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
    return {name: float(value) for name, value in figures.items()}


def score_again(
    dataset: ConversationDataset, score: Callable[[list[Prediction]], dict[str, float]], args: RecipeArguments
) -> bool:
    """For a finished run: scores its kept answers with today's `score`, if they are all there; else returns False."""
    questions = _Prompts(dataset, args.data_dir).questions
    folder, stages = Path(args.output_dir), ("before", "after")
    found = None
    if args.process_index == 0:
        found = {stage: kept_answers(folder, stage, answering_model(args, stage), questions) for stage in stages}
    kept_by_stage = _from_first(found, args)
    if any(len(kept) < len(questions) for kept in kept_by_stage.values()):
        return False
    if args.process_index == 0:
        print(
            f"this run is finished, nothing is trained or asked; --overwrite_output_dir starts afresh ({folder})",
            flush=True,
        )
    for stage in stages if questions else ():
        path = folder / f"eval_{stage}.json"
        earlier = _from_first(_read_evaluation(path), args)
        kept = kept_by_stage[stage]
        predictions = [_answered(question, kept[number]) for number, question in enumerate(questions)]
        if not _is_of(earlier, _score(score, predictions), predictions):
            if args.process_index == 0:
                print(f"{stage} training: the kept answers are scored again", flush=True)
            evaluate(None, dataset, score, args, stage)
    return True
