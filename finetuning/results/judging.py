"""How much a model doubts the answers of a data set's rows: over all ranks, kept as they come, gone on with when started again."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..arguments import RecipeArguments
from ..data.dataset import ConversationDataset
from ..data.fingerprint import digest
from ..data.images import describe_source
from ..data.perceptual import identify_look
from ..data.reading import where
from ..errors import InputError, Stopped
from ..training.progress import answers_bar
from ..training.signals import stop_signals
from .answer_likelihood import answer_and_judge
from .answering import Prompts, precision
from .kept_file import open_to_append
from .rounds import answer_in_rounds

DOUBTS = "doubts.jsonl"


@dataclass
class Doubt:
    """A question with its given answers, what the model says, and how likely it finds each: a line of doubts.jsonl.

    Args:
        id (str): id of the conversation.
        turn (int): turn of the conversation, from 0.
        where (str): file and line of the row, or its number.
        images (list[str]): names of the conversation's pictures.
        question (str): text of the user in this turn.
        answers (list[str]): acceptable answers.
        log_likelihoods (list[float]): of each of them, mean over its tokens, nats.
        model_answer (str): what the model says.
        model_log_likelihood (float): of that, mean over its tokens, nats.
        doubt (float): how much likelier than the likeliest given answer that is, nats a token.
        part (int, optional): from 0, the part of the rows that the judging model was trained without.
        pictures (list): digest and perceptual hash of each picture that the model was shown.
        twins (list): filled when all are judged: {"id", "turn", "answers", "bits"} of the same question about a picture that is
            the same (bits -1) or differs in so many bits of its hash, with other answers.
        model (str): what model and settings are known by.
        asked (str): digest of all that was judged.
    """

    id: str
    turn: int
    where: str
    images: list[str]
    question: str
    answers: list[str]
    log_likelihoods: list[float]
    model_answer: str
    model_log_likelihood: float
    doubt: float
    part: int | None
    pictures: list[list[str]]
    model: str
    asked: str
    twins: list[dict[str, Any]] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether the model says one of the given answers."""
        return self.model_answer in [answer.strip() for answer in self.answers]


class JudgedPrompts(Prompts):
    """Prompts, each with the looks of its pictures, which are decoded here anyway."""

    def __init__(self, dataset: ConversationDataset, folder: str | None):
        super().__init__(dataset, folder)
        # The given answers are judged too.
        for question in self.questions:
            question.asked = digest([question.asked, question.references]).hex()

    def __getitem__(self, index):
        prompt, images, crops = super().__getitem__(index)
        return (prompt, images, crops), [list(identify_look(image)) for image in images]

    def collate(self, prompts):
        plain, looks = zip(*prompts, strict=True)
        return super().collate(plain), looks


@dataclass
class Judge:
    """A model that judges some of the questions.

    Args:
        open (Callable): opens it; called once, if there is anything to judge.
        by (str): what model and settings are known by.
        numbers (Sequence[int]): the questions.
        part (int, optional): see `Doubt`.
    """

    open: Callable[[], Any]
    by: str
    numbers: Sequence[int]
    part: int | None = None


def judge_rows(prompts: JudgedPrompts, judges: Sequence[Judge], path: Path, args: RecipeArguments) -> list[Doubt]:
    """Judges every question on all ranks together; each round is appended to a file at once.

    What stands there already of the same model about the same question is kept.

    Args:
        prompts (JudgedPrompts): the questions.
        judges (Sequence[Judge]): each question is one judge's.
        path (Path): the file, whose folder is `args.output_dir`.
        args (RecipeArguments): per_device_eval_batch_size, max_new_tokens, precision, overwrite_output_dir.

    Returns:
        list[Doubt]: in the order of the questions, on the first rank; empty on the others.

    Raises:
        InputError: if another process writes into the file.
        Stopped: by a signal, after a round.
    """
    state = PartialState()
    by = {number: judge for judge in judges for number in judge.numbers}
    with ExitStack() as stack:
        outcome: list[Any] = [None, None]
        file = None
        kept: dict[int, Doubt] = {}
        if state.is_main_process:
            try:
                file = stack.enter_context(open_to_append(path, "--output_dir"))
                kept, size = ({}, 0) if args.overwrite_output_dir else _read_kept(path, prompts, by)
                # What a run left half-written when it died.
                file.truncate(size)
                outcome[1] = list(kept)
            except InputError as error:
                outcome[0] = str(error)
        fault, there = broadcast_object_list(outcome) if state.num_processes > 1 else outcome
        if fault:
            raise InputError(fault)
        known = set(there)
        if known and state.is_main_process:
            print(f"{path}: {len(known)} of {len(prompts)} answers are judged already", flush=True)
        bar = stack.enter_context(answers_bar(len(prompts), len(known), "judged answers", args.disable_tqdm))
        done = len(known)
        for judge in judges:
            todo = [number for number in judge.numbers if number not in known]
            for found in _judged_rounds(prompts, judge, todo, args) if todo else ():
                bar.update(len(found))
                done += len(found)
                if file:
                    doubts = {number: _doubt(prompts, judge, number, *answer) for number, answer in found}
                    kept |= doubts
                    file.write("".join(map(to_line, doubts.values())).encode())
                    file.flush()
                if signum := stop_signals.agree(args.device):
                    raise Stopped(signum, f"{done} of {len(prompts)} judged answers are in {path}")
    return [kept[number] for number in sorted(kept)]


def _judged_rounds(
    prompts: JudgedPrompts, judge: Judge, todo: Sequence[int], args: RecipeArguments
) -> Iterator[list[tuple[int, tuple]]]:
    model = judge.open()
    model.eval()

    def answer(batch: Sequence[int], inputs: Any) -> list[tuple]:
        features, looks = inputs
        given = [prompts.questions[number].references for number in batch]
        found = answer_and_judge(
            model, prompts.dataset.processor, features.to(model.device), given, args.max_new_tokens
        )
        return [(*judged, look) for judged, look in zip(found, looks, strict=True)]

    with precision(model, args.compute_dtype):
        yield from answer_in_rounds(
            prompts, prompts.collate, todo, args.per_device_eval_batch_size, args.dataloader_num_workers, answer
        )


def _doubt(
    prompts: JudgedPrompts, judge: Judge, number: int, answer: str, likelihood: float, given: list[float], looks: list
) -> Doubt:
    question, index = prompts.questions[number], prompts.places[number][0]
    row = prompts.dataset.rows[index]
    images = [describe_source(image) for image in prompts.dataset.to_conversation(row).images]
    return Doubt(
        question.id,
        question.turn,
        where(row, index),
        images,
        question.question,
        question.references,
        [round(value, 5) for value in given],
        answer,
        round(likelihood, 5),
        round(likelihood - max(given), 5),
        judge.part,
        looks,
        judge.by,
        question.asked,
    )


def to_line(doubt: Doubt) -> str:
    return json.dumps(asdict(doubt), ensure_ascii=False) + "\n"


def _read_kept(path: Path, prompts: JudgedPrompts, by: dict[int, Judge]) -> tuple[dict[int, Doubt], int]:
    """Number of a question -> what stands in the file of the same model about exactly what is asked now; bytes of the whole lines."""
    found, size = {}, 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            doubt = Doubt(**json.loads(line))
        except (ValueError, TypeError):
            raise InputError(
                f"--output_dir {path.parent}: expected a new folder or one of this command, found something else in {path.name}, "
                f"line {number}; choose another"
            ) from None
        found[doubt.id, doubt.turn, doubt.asked, doubt.model] = doubt
        size += len(line)
    places = {
        number: (question.id, question.turn, question.asked, by[number].by)
        for number, question in enumerate(prompts.questions)
    }
    return {number: found[place] for number, place in places.items() if place in found}, size


def write_doubts(path: Path, doubts: Sequence[Doubt]) -> None:
    """Puts finished doubts in place of what was kept while they were judged."""
    aside = path.with_suffix(".part")
    aside.write_text("".join(map(to_line, doubts)), encoding="utf-8")
    aside.replace(path)


def worst_first(doubts: Sequence[Doubt]) -> list[Doubt]:
    """Doubts, the largest first; one that is no number, as of a model that overflows, before all."""
    return sorted(doubts, key=lambda item: -item.doubt if isfinite(item.doubt) else -inf)
