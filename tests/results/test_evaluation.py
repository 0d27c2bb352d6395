"""Answers of all ranks: every question once, in order, whatever the number of ranks and rows in a batch."""

import json
import os
import socket
from dataclasses import asdict
from pathlib import Path

import pytest
import recipe
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate.state import PartialState

from finetuning.data.conversation import Conversation, Turn
from finetuning.results.evaluation import Prediction, evaluate, generate_answers, remove_stage
from finetuning.training.loading import load_processor

own_process = pytest.fixture(autouse=True)(recipe.own_process)

SEVERAL = 3  # row with three turns
SIZES = [(60, 40), (28, 60), (30, 30), (90, 20)]


def to_conversation(number: int) -> Conversation:
    image = tiny.picture(*SIZES[number % 4], seed=number)
    if number == SEVERAL:
        turns = [
            Turn("First?", ["one", "1"], [image]),
            Turn("Second?", ["two"], [tiny.picture(30, 40, seed=99)]),
            Turn("Third?", ["three"]),
        ]
        return Conversation("several", turns)
    # one row in four is text only
    return Conversation(
        f"r{number}", [Turn("What is it?" * (1 + number % 3), [str(number)], [image] if number % 4 else [])]
    )


ROWS = list(range(7))  # 9 questions
QUESTIONS = [
    (f"r{n}", 0) if n != SEVERAL else ("several", turn) for n in ROWS for turn in range(3 if n == SEVERAL else 1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("model") / "tiny")


def arguments(folder: Path, output: Path, batch: int):
    # Not the full strategy: nothing is trained here, and DeepSpeed need not start.
    flags = ["--use_lora", "--batch_size", "6", "--max_new_tokens", "6", "--dataloader_num_workers", "0"]
    flags += ["--output_dir", str(output), "--per_device_eval_batch_size", str(batch)]
    return recipe.arguments(folder, *flags)


def answer(folder, output, batch=2, rows=ROWS, stage="before", function=to_conversation):
    args = arguments(folder, output, batch)
    processor = load_processor(args)
    return generate_answers(tiny.model(), processor, rows, function, args, stage)


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def one_by_one(folder, tmp_path):
    return answer(folder, tmp_path / "one", batch=1)


def test_every_question_is_answered_once_and_in_order(one_by_one):
    assert [(item.id, item.turn) for item in one_by_one] == QUESTIONS
    # a model whose answers were all alike would show nothing
    assert len({item.answer for item in one_by_one}) > 5


@pytest.mark.parametrize("batch", [2, 4, 16])
def test_a_batch_answers_as_one_by_one(folder, tmp_path, one_by_one, batch):
    assert answer(folder, tmp_path / "batch", batch) == one_by_one


def test_an_answer_is_what_generate_gives(one_by_one):
    processor = tiny.processor(2)
    prompt = "<|user|>\n<|image_1|>\nWhat is it?What is it?<|end|>\n<|assistant|>\n"
    inputs = processor(prompt, [tiny.picture(*SIZES[1], seed=1)])
    output = tiny.model().generate(**inputs, max_new_tokens=6, do_sample=False)
    text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert one_by_one[1].answer == text


def test_a_later_turn_is_asked_after_the_first_answers_of_the_earlier_ones(one_by_one):
    processor = tiny.processor(2)
    prompt = (
        "<|user|>\n<|image_1|>\nFirst?<|end|>\n<|assistant|>\none<|end|>\n"
        "<|user|>\n<|image_2|>\nSecond?<|end|>\n<|assistant|>\ntwo<|end|>\n<|user|>\nThird?<|end|>\n<|assistant|>\n"
    )
    inputs = processor(prompt, [tiny.picture(*SIZES[3], seed=3), tiny.picture(30, 40, seed=99)])
    output = tiny.model().generate(**inputs, max_new_tokens=6, do_sample=False)
    text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    (third,) = [item for item in one_by_one if item.turn == 2]
    assert (third.question, third.references, third.answer) == ("Third?", ["three"], text)


IMAGES = [tiny.picture(60, 40, seed=1), tiny.picture(30, 30, seed=2)]


@pytest.mark.parametrize(
    ("turns", "prompt", "shown"),
    [
        (
            [Turn("What is on <|image_1|>?", ["one"], IMAGES), Turn("And on <|image_2|>?", ["two"])],
            "What is on <|image_1|>?",
            IMAGES[:1],
        ),
        (
            [Turn("What is on <|image_2|>?", ["two"], IMAGES), Turn("And on <|image_1|>?", ["one"])],
            "What is on <|image_1|>?",
            IMAGES[1:],
        ),
        ([Turn("Look.", ["I do"], IMAGES[:1]), Turn("What is on <|image_1|>?", ["one"])], "Look.", None),
    ],
    ids=["the second image later", "the first image later", "any image later"],
)
def test_an_early_turn_is_asked_as_it_was_trained_where_texts_hold_their_own_tags(
    folder, tmp_path, turns, prompt, shown
):
    # The model must see what the training text shows up to there: no image that only a later turn names.
    found = answer(folder, tmp_path / "out", rows=[0], function=lambda _: Conversation("x", turns))
    processor = tiny.processor(2)
    inputs = processor(f"<|user|>\n{prompt}<|end|>\n<|assistant|>\n", shown)
    output = tiny.model().generate(**inputs, max_new_tokens=6, do_sample=False)
    text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert found[0].answer == text


# ---- ranks


def rank_main(rank: int, folder: Path, output: Path, port: int):
    """A process of `test_ranks_share_the_questions`: rank of 3, then of 2."""
    torch.set_num_threads(1)
    for ranks in (3, 2):
        if rank >= ranks:
            return
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port + ranks)}
        found = answer(folder, output / f"{ranks}", batch=2)
        (output / f"{ranks}-{rank}.json").write_text(json.dumps([asdict(item) for item in found]))
        dist.destroy_process_group()
        PartialState._reset_state()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_ranks_share_the_questions(folder, tmp_path, one_by_one):
    # 9 questions, 2 a batch: neither 2 nor 3 ranks divide them, and the last rank has none in the last round.
    torch.multiprocessing.spawn(rank_main, (folder, tmp_path, free_port()), nprocs=3)
    for ranks in (2, 3):
        for rank in range(ranks):
            found = [Prediction(**item) for item in json.loads((tmp_path / f"{ranks}-{rank}.json").read_text())]
            assert found == one_by_one
        assert written(tmp_path / f"{ranks}") == [{"stage": "before", **asdict(item)} for item in one_by_one]


# ---- files


def score(predictions) -> dict[str, float]:
    return {"length": sum(len(item.answer) for item in predictions) / len(predictions), "length/first": 1.0}


def run_evaluation(folder, output, stage, rows=ROWS):
    args = arguments(folder, output, 4)
    return evaluate(tiny.model(), load_processor(args), rows, to_conversation, score, args, stage)


def test_eval_file_and_predictions(folder, tmp_path, one_by_one, capsys):
    result = run_evaluation(folder, tmp_path / "out", "before")
    stored = json.loads((tmp_path / "out" / "eval_before.json").read_text(encoding="utf-8"))
    assert stored == result
    assert list(stored)[0] == "length"
    assert stored["length"] == score(one_by_one)["length"]
    assert stored["num_answers"] == len(QUESTIONS)
    assert stored["ids"] == [identity for identity, _ in QUESTIONS]
    assert stored["generated_texts_unique"] == [item.answer for item in one_by_one]
    assert stored["answers_unique"] == [item.references for item in one_by_one]
    assert stored["seconds"] > 0
    assert written(tmp_path / "out") == [{"stage": "before", **asdict(item)} for item in one_by_one]
    printed = capsys.readouterr().out
    assert f"before training: length {stored['length']:.4f} (9 answers" in printed
    assert "length/first" not in printed


def test_an_evaluation_that_died_goes_on_where_it_was(folder, tmp_path):
    whole = run_evaluation(folder, tmp_path / "whole", "before")
    run_evaluation(folder, tmp_path / "out", "before")
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    # Five whole lines, one round and a half, the first of them another answer than the model gives, and half of a sixth.
    lines[0] = json.dumps({**json.loads(lines[0]), "answer": "kept"})
    (tmp_path / "out" / "predictions.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])
    (tmp_path / "out" / "eval_before.json").unlink()
    again = run_evaluation(folder, tmp_path / "out", "before")
    assert again["generated_texts_unique"] == ["kept", *whole["generated_texts_unique"][1:]]
    assert [item["answer"] for item in written(tmp_path / "out")] == again["generated_texts_unique"]


def test_answers_to_other_questions_are_not_taken(folder, tmp_path):
    run_evaluation(folder, tmp_path / "out", "before", ROWS[1:])
    (tmp_path / "out" / "eval_before.json").unlink()
    assert run_evaluation(folder, tmp_path / "out", "before")["ids"][0] == "r0"
    assert written(tmp_path / "out")[0]["id"] == "r0"


def test_a_finished_evaluation_is_read_again(folder, tmp_path):
    first = run_evaluation(folder, tmp_path / "out", "before")
    assert run_evaluation(folder, tmp_path / "out", "before") == first


def test_removing_a_stage_keeps_the_other(folder, tmp_path):
    run_evaluation(folder, tmp_path / "out", "before", ROWS[:1])
    run_evaluation(folder, tmp_path / "out", "after", ROWS[:1])
    remove_stage(tmp_path / "out", "before")
    assert [item["stage"] for item in written(tmp_path / "out")] == ["after"]
    assert not (tmp_path / "out" / "eval_before.json").exists()
    assert (tmp_path / "out" / "eval_after.json").exists()


def test_predictions_are_written_as_they_come(folder, tmp_path):
    # The run dies at row 4: what was answered before is there.
    def dying(number):
        conversation = to_conversation(number)
        if number == 4:
            conversation.turns[0].images = ["gone.png"]
        return conversation

    with pytest.raises(Exception, match=r"gone\.png"):
        answer(folder, tmp_path / "out", batch=1, function=dying)
    assert [item["id"] for item in written(tmp_path / "out")] == ["r0", "r1", "r2", "several", "several", "several"]


def test_a_run_that_died_in_the_middle_of_a_line_can_be_repeated(folder, tmp_path):
    answer(folder, tmp_path / "out", rows=ROWS[:2])
    path = tmp_path / "out" / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    answer(folder, tmp_path / "out", rows=ROWS[:2])
    assert [item["id"] for item in written(tmp_path / "out")] == ["r0", "r1"]


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\x1c", "\n"], ids=ascii)
def test_unusual_line_ends_in_a_text_break_no_line(folder, tmp_path, character):
    def function(number):
        return Conversation(f"r{number}", [Turn("What?", [f"a{character}b"])])

    for _ in range(2):
        answer(folder, tmp_path / "out", rows=ROWS[:2], function=function)
    assert [item["references"] for item in written(tmp_path / "out")] == [[f"a{character}b"]] * 2


def test_no_rows_no_evaluation(folder, tmp_path):
    assert run_evaluation(folder, tmp_path / "out", "before", []) is None
    assert not (tmp_path / "out" / "eval_before.json").exists()


# ---- closed questions


def test_choices_of_a_closed_question_get_the_log_probability_of_the_whole_answer(folder, tmp_path):
    def function(number):
        # another question beside it, without choices, and of another length
        choices = ["yes", "no", "not at all"] if number else []
        image = tiny.picture(*SIZES[number % 4], seed=number)
        return Conversation(f"r{number}", [Turn("Is it?" * (1 + number % 3), ["yes"], [image], choices)])

    found = answer(folder, tmp_path / "out", batch=3, rows=ROWS[:5], function=function)
    assert found[0].choices == {}
    model, processor = tiny.model(), tiny.processor(2)
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    for number in (1, 4):
        for choice, value in found[number].choices.items():
            question = "Is it?" * (1 + number % 3)
            text = f"<|user|>\n<|image_1|>\n{question}<|end|>\n<|assistant|>\n{choice}<|end|>"
            inputs = processor(text, [tiny.picture(*SIZES[number % 4], seed=number)])
            ids = inputs["input_ids"][0]
            start = ids.tolist().index(processor.tokenizer.convert_tokens_to_ids("<|assistant|>"))
            with torch.no_grad():
                logs = model(**inputs).logits[0].log_softmax(-1)
            expected = logs[start:-1].gather(-1, ids[start + 1 :, None]).sum()
            assert ids[-1] == end
            assert value == pytest.approx(expected.item(), abs=1e-4)
