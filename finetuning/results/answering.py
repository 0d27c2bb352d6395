"""Generates answers over all ranks, each question exactly once, in the data set's order."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch.utils.data import Dataset

from phi3v import Phi3VProcessor
from phi3v.processing_phi3_v import IMAGE_TAG

from ..arguments import RecipeArguments
from ..data.clips import most_crops
from ..data.conversation import Conversation, Turn, to_messages
from ..data.dataset import ConversationDataset
from ..data.fingerprint import digest, identify_picture
from ..data.images import load_images
from ..errors import RunError, Stopped
from ..training.progress import answers_bar
from ..training.signals import stop_signals
from .predictions import PREDICTIONS, STEP, Prediction, answering_model, keep_answers, rewrite, to_line, with_answer
from .rounds import answer_in_rounds


class Prompts(Dataset):
    """(prompt, images, most crops of each) of each question; earlier turns of its conversation are given with their first answers.

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
                    Prediction(
                        conversation.id,
                        number,
                        turn.user,
                        list(turn.answers),
                        choices=choices,
                        asked=asked,
                        source=conversation.source,
                    )
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
        crops = most_crops(shown.images, self.dataset.processor.image_processor.num_crops)
        return prompt, load_images(Conversation(conversation.id, [shown])), crops

    def collate(self, prompts):
        texts, images, crops = zip(*prompts, strict=True)
        of_each = [most for of_row in crops for most in of_row]
        return self.dataset.processor(list(texts), list(images), padding=True, padding_side="left", num_crops=of_each)


# Compiled layers answer as they are: each length of a cache would be another graph, and training would find their number used up.
@torch.compiler.set_stance("force_eager")
def generate_answers(model, dataset: ConversationDataset, args: RecipeArguments, stage: str) -> list[Prediction]:
    """Answers every turn of every row greedily, on all ranks together.

    The ranks answer batch after batch side by side, and each batch is appended to `predictions.jsonl` in the output
    folder at once, in the data set's order, with `stage` as its first field. Answers that stand there already are not
    generated again: those of a run that was stopped, and, where a conversation was changed since, those of all others.

    Args:
        model: the model or PEFT model, on the run's device; None where all answers are known to be kept.
        dataset (ConversationDataset): the rows to answer.
        args (RecipeArguments): per_device_eval_batch_size, max_new_tokens, output_dir, precision.
        stage (str): "before", "after", or "step N" while training.

    Returns:
        list[Prediction]: one for each question, on every rank.
    """
    prompts = Prompts(dataset, args.data_dir)
    size, ranks, rank = args.per_device_eval_batch_size, args.world_size, args.process_index
    path = Path(args.output_dir) / PREDICTIONS
    by = from_first_rank(answering_model(args, stage) if rank == 0 else "", args)
    kept = from_first_rank(keep_answers(path, stage, by, prompts.questions, ranks * size) if rank == 0 else None, args)
    predictions = {number: with_answer(prompts.questions[number], kept[number]) for number in kept}
    todo = [number for number in range(len(prompts)) if number not in predictions]
    if todo:
        model.eval()
    if todo and kept and rank == 0:
        print(
            f"{moment(args, stage)}: {len(todo)} of {len(prompts)} questions are asked, the other answers are kept",
            flush=True,
        )
    bar = answers_bar(len(prompts), len(kept), f"answers {moment(args, stage)}", args.disable_tqdm)

    def answer(batch, inputs):
        return _generate(model, dataset.processor, inputs, [prompts.questions[number] for number in batch], args)

    workers = args.dataloader_num_workers
    # The other ranks write nothing.
    with open(path if rank == 0 else os.devnull, "a", encoding="utf-8") as file, precision(model, args.compute_dtype):
        for found in answer_in_rounds(prompts, prompts.collate, todo, size, workers, answer):
            predictions.update(found)
            bar.update(len(found))
            if rank == 0:
                # One write for a round: of a round that is cut short nothing is kept.
                file.write("".join(to_line(stage, by, prediction) for _, prediction in found))
                file.flush()
            if signum := stop_signals.agree(args.device):
                raise Stopped(signum, f"{len(predictions)} of {len(prompts)} answers {moment(args, stage)} are written")
    bar.close()
    answered = [predictions[number] for number in range(len(prompts))]
    if rank == 0 and kept and todo:
        rewrite(path, stage, by, answered)
    return answered


def moment(args: RecipeArguments, stage: str) -> str:
    """A stage in words."""
    if not args.do_train and args.resume_from_checkpoint is None:
        return "without training"
    return f"at {stage}" if stage.startswith(STEP) else f"{stage} training"


def from_first_rank(value: Any, args: RecipeArguments) -> Any:
    """The first rank's value, on all of them: files that it alone writes may come into sight later on others."""
    return broadcast_object_list([value])[0] if args.world_size > 1 else value


def precision(model, dtype: torch.dtype):
    """What the model answers within: autocast where an adapter, kept in float32, lies over a base in 16 bits, as in training."""
    mixed = isinstance(model, PeftModel) and dtype != torch.float32
    return torch.autocast(model.device.type, dtype=dtype) if mixed else nullcontext()


@torch.no_grad()
def _generate(model, processor: Phi3VProcessor, inputs, asked: list[Prediction], args) -> list[Prediction]:
    inputs = inputs.to(args.device)
    try:
        texts = greedy_answers(model, processor, inputs, args.max_new_tokens)
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error, len(asked)) from error
    predictions = [replace(question, answer=text) for question, text in zip(asked, texts, strict=True)]
    for choice in sorted({choice for question in asked for choice in question.choices}):
        scores = _log_probability(model, processor, inputs, choice)
        for prediction, value in zip(predictions, scores, strict=True):
            if choice in prediction.choices:
                prediction.choices[choice] = value
    return predictions


def _out_of_memory(error: BaseException, size: int) -> RunError:
    cure = "a smaller --num_crops, --use_qlora or a larger GPU"
    if size > 1:
        cure = f"--per_device_eval_batch_size {size // 2} instead of {size} takes less"
    first = next((line for line in str(error).splitlines() if line.strip()), "out of memory")
    return RunError(
        f"answering ran out of GPU memory: {first:.200} {cure}; the same command goes on from the kept answers"
    )


@torch.no_grad()
def greedy_answers(model, processor: Phi3VProcessor, inputs, max_new_tokens: int) -> list[str]:
    """Greedy answers to a left-padded batch of prompts, which lies on the model's device."""
    # Each rank holds all weights, and answers as many batches as it has.
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, synced_gpus=False)
    texts = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


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
