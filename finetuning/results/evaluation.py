"""Generates answers over all ranks, each row exactly once, in the data set's order."""

import json
import time
from collections.abc import Callable, Sequence
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
from ..data.images import load_images
from ..errors import Stopped
from ..training.signals import stop_signals


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
    """

    id: str
    turn: int
    question: str
    references: list[str]
    answer: str = ""
    choices: dict[str, float] = field(default_factory=dict)


class _Prompts(Dataset):
    """(prompt, images) of each question; earlier turns of its conversation are given with their first answers.

    Holds no image: rows are read again when their turn comes.
    """

    def __init__(self, rows: Sequence, to_conversation: Callable[[Any], Conversation], processor: Phi3VProcessor):
        self.rows, self.to_conversation, self.processor = rows, to_conversation, processor
        self.questions, self.places = [], []
        for index, row in enumerate(rows):
            conversation = to_conversation(row)
            for turn, asked in enumerate(conversation.turns):
                choices = dict.fromkeys(asked.choices, 0.0)
                self.questions.append(Prediction(conversation.id, turn, asked.user, asked.answers, "", choices))
                self.places.append((index, turn))

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        row, turn = self.places[index]
        conversation = self.to_conversation(self.rows[row])
        earlier = [turn.answers[0] for turn in conversation.turns[:turn]]
        prompt = self.processor.apply_chat_template(to_messages(conversation, earlier), add_generation_prompt=True)
        # This turn and the ones before it may name some of the images only.
        numbers = sorted({int(number) for number in IMAGE_TAG.findall(prompt)})
        prompt = IMAGE_TAG.sub(lambda tag: f"<|image_{numbers.index(int(tag[1])) + 1}|>", prompt)
        shown = Turn("", [], [conversation.images[number - 1] for number in numbers])
        return prompt, load_images(Conversation(conversation.id, [shown]))

    def collate(self, prompts):
        if not prompts:
            return None
        texts, images = zip(*prompts, strict=True)
        return self.processor(list(texts), list(images), padding=True, padding_side="left")


def generate_answers(
    model,
    processor: Phi3VProcessor,
    rows: Sequence,
    to_conversation: Callable[[Any], Conversation],
    args: RecipeArguments,
    stage: str,
) -> list[Prediction]:
    """Answers every turn of every row greedily, on all ranks together.

    The ranks answer batch after batch side by side, and each batch is appended to `predictions.jsonl` in the output
    folder at once, in the data set's order, with `stage` as its first field.

    Args:
        model: the model or PEFT model, on the run's device.
        processor (Phi3VProcessor): as for training.
        rows (Sequence): rows of the data set.
        to_conversation (Callable): row -> Conversation, the same as for training.
        args (RecipeArguments): per_device_eval_batch_size, max_new_tokens, output_dir, precision.
        stage (str): "before" or "after".

    Returns:
        list[Prediction]: one for each question, on every rank.
    """
    prompts = _Prompts(rows, to_conversation, processor)
    size, ranks, rank = args.per_device_eval_batch_size, args.world_size, args.process_index
    # Round k covers the next `ranks x size` questions; a rank without any in the last round still takes part.
    starts = range(rank * size, -(-len(prompts) // (ranks * size)) * ranks * size, ranks * size)
    batches = [list(range(len(prompts))[start : start + size]) for start in starts]
    path = Path(args.output_dir) / "predictions.jsonl"
    predictions = _answered(path, stage, prompts.questions, ranks * size) if rank == 0 else None
    predictions = _from_first(predictions, args)
    batches = batches[len(predictions) // (ranks * size) :] if len(predictions) < len(prompts) else []
    loader = DataLoader(
        prompts, batch_sampler=batches, collate_fn=prompts.collate, num_workers=args.dataloader_num_workers
    )
    model.eval()
    bar = tqdm(
        total=len(prompts),
        initial=len(predictions),
        desc=f"answers {stage} training",
        disable=args.disable_tqdm or rank > 0,
    )
    with open(path, "a", encoding="utf-8") if rank == 0 else nullcontext() as file, _precision(args):
        for batch, inputs in zip(batches, loader, strict=True):
            asked = [prompts.questions[index] for index in batch]
            found = _generate(model, processor, inputs, asked, args) if batch else []
            gathered = gather_object(found) if ranks > 1 else found
            predictions += gathered
            bar.update(len(gathered))
            if rank == 0:
                lines = [json.dumps({"stage": stage, **asdict(item)}, ensure_ascii=False) + "\n" for item in gathered]
                file.writelines(lines)
                file.flush()
            if signum := stop_signals.agree(args.device):
                raise Stopped(signum, f"{len(predictions)} of {len(prompts)} answers {stage} training are written")
    bar.close()
    return predictions


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Lines of predictions.jsonl; one that a run left half-written when it died is left out."""
    items = []
    if path.exists():
        # Not splitlines: an answer may hold one of the other characters that end a line.
        for line in path.read_text(encoding="utf-8").split("\n"):
            with suppress(json.JSONDecodeError):
                items.append(json.loads(line))
    return items


def _from_first(value: Any, args: RecipeArguments) -> Any:
    """The first rank's value, on all of them: files that it alone writes may come into sight later on others."""
    return broadcast_object_list([value])[0] if args.world_size > 1 else value


def remove_stage(folder: Path, stage: str) -> None:
    """Drops what an earlier run into the same folder answered at this stage."""
    path = folder / "predictions.jsonl"
    _write_predictions(path, [item for item in read_predictions(path) if item["stage"] != stage])
    (folder / f"eval_{stage}.json").unlink(missing_ok=True)


def _write_predictions(path: Path, items: list[dict[str, Any]]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    aside.replace(path)


def _answered(path: Path, stage: str, questions: list[Prediction], per_round: int) -> list[Prediction]:
    """What a run that was stopped has answered: whole rounds, so that the others are batched as they would have been."""
    items = read_predictions(path)
    found = [item for item in items if item["stage"] == stage]
    same = [
        (item["id"], item["turn"], item["question"]) == (question.id, question.turn, question.question)
        for item, question in zip(found, questions, strict=False)
    ]
    count = same.index(False) if False in same else len(same)
    count = count if count == len(questions) else count - count % per_round
    _write_predictions(path, [item for item in items if item["stage"] != stage] + found[:count])
    return [
        replace(question, answer=item["answer"], choices=item["choices"])
        for question, item in zip(questions, found[:count], strict=False)
    ]


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
    processor: Phi3VProcessor,
    rows: Sequence,
    to_conversation: Callable[[Any], Conversation],
    score: Callable[[list[Prediction]], dict[str, float]],
    args: RecipeArguments,
    stage: str,
) -> dict[str, Any] | None:
    """Answers all rows, scores the answers and writes `eval_<stage>.json`.

    Args: see `generate_answers`; `score` gives the task's figures by name, first the main one; names with a slash are
    details that are written but not printed.

    Returns:
        dict: the figures, num_answers, seconds, answers_unique and generated_texts_unique (first references and answers
        in the data set's order, once each row, as the published recipe names them); None if there are no rows.
    """
    if not len(rows):
        return None
    path = Path(args.output_dir) / f"eval_{stage}.json"
    if _from_first(path.exists(), args):
        # Of this run, before it was started again; `begin` has removed any other.
        return json.loads(path.read_text(encoding="utf-8"))
    start = time.monotonic()
    predictions = generate_answers(model, processor, rows, to_conversation, args, stage)
    figures = score(predictions)
    result = {
        **figures,
        "num_answers": len(predictions),
        "seconds": round(time.monotonic() - start, 2),
        "ids": [prediction.id for prediction in predictions],
        "answers_unique": [prediction.references for prediction in predictions],
        "generated_texts_unique": [prediction.answer for prediction in predictions],
    }
    if args.process_index == 0:
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if "/" not in name)
        print(
            f"{stage} training: {figures} ({len(predictions)} answers, {result['seconds']:.0f} s) -> {path}", flush=True
        )
    return result
