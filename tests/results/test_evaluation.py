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
from finetuning.data.dataset import ConversationDataset
from finetuning.errors import InputError, ScriptError
from finetuning.results.answering import generate_answers
from finetuning.results.evaluation import check_score, evaluate, score_again
from finetuning.results.predictions import Prediction, read_predictions
from finetuning.training.checkpoint import seal
from finetuning.training.identity import write_run
from finetuning.training.loading import load_processor
from finetuning.training.lora import add_lora

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
    return generate_answers(tiny.model(), dataset(args, rows, function), args, stage)


def dataset(args, rows=ROWS, function=to_conversation) -> ConversationDataset:
    return ConversationDataset(rows, function, load_processor(args), [9] * len(rows))


def written(folder: Path) -> list[dict]:
    """Lines of predictions.jsonl, without the model that answered."""
    return [{name: value for name, value in item.items() if name != "model"} for item in lines(folder)]


def lines(folder: Path) -> list[dict]:
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


@pytest.mark.parametrize(
    ("flags", "mixed"), [(["--use_lora", "--bf16"], True), (["--use_lora"], False), (["--bf16"], False)]
)
def test_adapters_answer_under_autocast_as_they_are_trained(folder, tmp_path, monkeypatch, flags, mixed):
    seen = []

    def generate(_model, _processor, _inputs, asked, _args):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return asked

    monkeypatch.setattr("finetuning.results.answering._generate", generate)
    more = ["--output_dir", str(tmp_path / "run"), "--dataloader_num_workers", "0", "--deepspeed", "none"]
    args = recipe.arguments(folder, *more, *flags)
    model = add_lora(tiny.model(), args) if args.use_lora else tiny.model()
    generate_answers(model, dataset(args), args, "before")
    assert {enabled for enabled, _ in seen} == {mixed}
    assert not mixed or {dtype for _, dtype in seen} == {torch.bfloat16}


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
            assert lines(tmp_path / f"{ranks}")[0]["model"]
        assert written(tmp_path / f"{ranks}") == [{"stage": "before", **asdict(item)} for item in one_by_one]


# ---- files


def score(predictions) -> dict[str, float]:
    return {"length": sum(len(item.answer) for item in predictions) / len(predictions), "length/first": 1.0}


def run_evaluation(folder, output, stage, rows=ROWS, function=to_conversation, score=score, model=None):
    args = arguments(folder, output, 4)
    return evaluate(model or tiny.model(), dataset(args, rows, function), score, args, stage)


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


class Asked:
    """A model that counts the questions that it is asked; `run_evaluation(..., model=Asked())`."""

    def __init__(self):
        self.model, self.count = tiny.model(), 0

    def eval(self):
        self.model.eval()

    def generate(self, input_ids, **kwargs):
        self.count += len(input_ids)
        return self.model.generate(input_ids=input_ids, **kwargs)

    def __call__(self, **kwargs):
        return self.model(**kwargs)


def test_an_evaluation_that_died_goes_on_where_it_was(folder, tmp_path):
    whole = run_evaluation(folder, tmp_path / "whole", "before")
    run_evaluation(folder, tmp_path / "out", "before")
    stored = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    # Five whole lines, one round and a half, the first of them another answer than the model gives, and half of a sixth.
    stored[0] = json.dumps({**json.loads(stored[0]), "answer": "kept"})
    (tmp_path / "out" / "predictions.jsonl").write_text("\n".join(stored[:5]) + "\n" + stored[5][:20])
    (tmp_path / "out" / "eval_before.json").unlink()
    model = Asked()
    again = run_evaluation(folder, tmp_path / "out", "before", model=model)
    assert again["generated_texts_unique"] == ["kept", *whole["generated_texts_unique"][1:]]
    assert [item["answer"] for item in written(tmp_path / "out")] == again["generated_texts_unique"]
    # whole rounds are kept, so that the others are batched as before
    assert model.count == len(QUESTIONS) - 4


@pytest.mark.parametrize("character", ["é", "日", "😀"])
@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_line_that_is_torn_inside_a_letter_is_asked_again(folder, tmp_path, character, back):
    def function(number):
        return Conversation(f"r{number}", [Turn("What?", [character * 9])])

    whole = run_evaluation(folder, tmp_path / "out", "before", ROWS[:6], function)
    path = tmp_path / "out" / "predictions.jsonl"
    content = path.read_bytes()
    inside = content.rindex(character.encode()) + len(character.encode()) - min(back, len(character.encode()) - 1)
    path.write_bytes(content[:inside])
    (tmp_path / "out" / "eval_before.json").unlink()
    assert len(read_predictions(path)) == 5
    model = Asked()
    again = run_evaluation(folder, tmp_path / "out", "before", ROWS[:6], function, model=model)
    assert model.count == 2  # of two rounds of four the second
    assert again["generated_texts_unique"] == whole["generated_texts_unique"]
    assert path.read_bytes() == content


def test_answers_are_kept_by_the_model_that_gave_them(folder, tmp_path):
    output = tmp_path / "out"
    record = {"script": "x.py", "settings": {"seed": 1}, "spread": {}, "rows": {}, "started": ""}
    output.mkdir()

    def ask(stage) -> int:
        model = Asked()
        run_evaluation(folder, output, stage, model=model)
        return model.count

    write_run(output, record)
    assert [ask("before"), ask("before")] == [9, 0]
    # other settings may be another model
    write_run(output, {**record, "settings": {"seed": 2}})
    assert [ask("before"), ask("before")] == [9, 0]
    # the answers after training belong to the final weights
    for content in (b"one", b"two"):
        (output / "model.safetensors").write_bytes(content)
        seal(output, {"step": 1}, [output / "model.safetensors"])
        assert [ask("after"), ask("after")] == [9, 0]
        assert ask("before") == 0
    assert len(lines(output)) == 18


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        ({}, 0),
        ({"answers": ["another reference"]}, 0),
        ({"id": "other"}, 1),
        ({"user": "What is that?"}, 1),
        ({"images": [tiny.picture(30, 30, seed=77)]}, 1),
        ({"choices": ["yes", "no"]}, 1),
    ],
    ids=lambda value: ", ".join(value) or "nothing" if isinstance(value, dict) else str(value),
)
def test_a_changed_conversation_alone_is_asked_again(folder, tmp_path, change, asked):
    before = run_evaluation(folder, tmp_path / "out", "before")

    def function(number):
        conversation = to_conversation(number)
        if number == 5:
            conversation.id = change.get("id", conversation.id)
            for name in set(change) - {"id"}:
                setattr(conversation.turns[0], name, change[name])
        return conversation

    model = Asked()
    after = run_evaluation(folder, tmp_path / "out", "before", function=function, model=model)
    assert model.count == asked
    others = [number for number in range(len(QUESTIONS)) if QUESTIONS[number][0] != "r5"]
    assert all(after["generated_texts_unique"][n] == before["generated_texts_unique"][n] for n in others)
    # in the data set's order
    assert [item["id"] for item in written(tmp_path / "out")] == after["ids"]
    # and the references are today's
    if "answers" in change:
        assert ["another reference"] in after["answers_unique"]


def test_an_earlier_answer_that_is_shown_asks_the_later_turns_again(folder, tmp_path):
    run_evaluation(folder, tmp_path / "out", "before")

    def function(number):
        conversation = to_conversation(number)
        if number == SEVERAL:
            conversation.turns[1].answers = ["zwei"]
        return conversation

    model = Asked()
    run_evaluation(folder, tmp_path / "out", "before", function=function, model=model)
    assert model.count == 1


def test_a_finished_evaluation_is_read_again(folder, tmp_path):
    first = run_evaluation(folder, tmp_path / "out", "before")
    model = Asked()
    again = run_evaluation(folder, tmp_path / "out", "before", model=model)
    assert again == first
    assert model.count == 0


# ---- the score


BAD_SCORES = {
    "a text": (lambda _: "0.5", "'0.5'"),
    "a number": (lambda _: 0.5, "0.5"),
    "None": (lambda _: None, "None"),
    "nothing in it": (lambda _: {}, "{}"),
    "a text in it": (lambda _: {"accuracy": "0.5"}, "'accuracy': '0.5'"),
    "nan in it": (lambda _: {"accuracy": float("nan")}, "'accuracy': nan"),
    "infinity in it": (lambda _: {"accuracy": float("inf")}, "'accuracy': inf"),
    "None in it": (lambda _: {"accuracy": None}, "'accuracy': None"),
    "a list in it": (lambda _: {"accuracy": [1]}, "'accuracy': [1]"),
    "a name that is no text": (lambda _: {1: 0.5}, "1: 0.5"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_a_score_that_is_no_figure_is_refused_and_the_answers_are_kept(folder, tmp_path, case):
    function, named = BAD_SCORES[case]
    with pytest.raises(InputError, match=r"^score: expected figures by name") as caught:
        run_evaluation(folder, tmp_path / "out", "before", ROWS[:2], score=function)
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(written(tmp_path / "out")) == 2
    assert not (tmp_path / "out" / "eval_before.json").exists()


def test_a_score_that_fails_shows_its_lines_and_the_answers_are_kept(folder, tmp_path):
    def broken(predictions):
        return {"accuracy": sum(item.correct for item in predictions)}

    with pytest.raises(ScriptError) as caught:
        run_evaluation(folder, tmp_path / "out", "before", ROWS[:2], score=broken)
    text = str(caught.value)
    assert text.startswith("error in broken of test_evaluation.py:\n")
    assert "item.correct" in text
    assert "AttributeError: 'Prediction' object has no attribute 'correct'" in text
    assert text.splitlines()[-1].startswith("The answers are kept")
    model = Asked()
    assert run_evaluation(folder, tmp_path / "out", "before", ROWS[:2], model=model)["length"]
    assert model.count == 0


def test_figures_of_other_libraries_are_figures(folder, tmp_path):
    figures = {"a": torch.tensor(0.5), "b": 1, "c": True}
    result = run_evaluation(folder, tmp_path / "out", "before", ROWS[:1], score=lambda _: figures)
    assert (result["a"], result["b"], result["c"]) == (0.5, 1.0, 1.0)
    assert json.loads((tmp_path / "out" / "eval_before.json").read_text())["a"] == 0.5


@pytest.fixture
def finished(folder, tmp_path):
    """`finished(score=..., function=...)`: what `score_again` does for a finished run."""
    output = tmp_path / "out"
    for stage in ("before", "after"):
        run_evaluation(folder, output, stage)

    def again(score=score, function=to_conversation, rows=ROWS) -> bool:
        args = arguments(folder, output, 4)
        return score_again(dataset(args, rows, function), score, args)

    return again


def figures(tmp_path) -> list[dict]:
    return [json.loads((tmp_path / "out" / f"eval_{stage}.json").read_text()) for stage in ("before", "after")]


def test_a_finished_run_with_the_same_score_is_left_as_it_is(finished, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != ".lock"}
    capsys.readouterr()
    assert finished() is True
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("this run is finished, nothing is trained or asked")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_score_needs_no_model(finished, tmp_path, capsys):
    old = figures(tmp_path)
    assert finished(score=lambda found: {"letters": float(len(found[0].answer))}) is True
    said = capsys.readouterr().out
    assert "before training: the kept answers are scored again" in said
    assert "after training: the kept answers are scored again" in said
    new = figures(tmp_path)
    assert all("length" not in item and item["letters"] > 0 for item in new)
    assert [item["generated_texts_unique"] for item in new] == [item["generated_texts_unique"] for item in old]
    # the time that the answers took
    assert [item["seconds"] for item in new] == [item["seconds"] for item in old]


def test_other_references_are_scored_again(finished, tmp_path):
    def function(number):
        conversation = to_conversation(number)
        conversation.turns[-1].answers = ["new"]
        return conversation

    assert finished(function=function) is True
    assert all(["new"] in item["answers_unique"] for item in figures(tmp_path))


def test_a_score_that_fails_on_a_finished_run_leaves_its_figures(finished, tmp_path):
    old = figures(tmp_path)
    with pytest.raises(ScriptError):
        finished(score=lambda found: {"x": found[0].missing})
    with pytest.raises(InputError, match="score: expected figures"):
        finished(score=lambda _: None)
    assert figures(tmp_path) == old


def test_where_an_answer_is_missing_the_model_is_needed(finished, tmp_path):
    assert finished(rows=[*ROWS, 7]) is False
    path = tmp_path / "out" / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert finished() is True  # only the line end
    path.write_bytes(path.read_bytes()[:-2])
    assert finished() is False


def test_predictions_are_written_as_they_come(folder, tmp_path):
    # The run dies at row 4, whose picture is damaged behind its header: what was answered before is there.
    path = tmp_path / "cut.jpg"
    tiny.picture(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:-2000])

    def dying(number):
        conversation = to_conversation(number)
        if number == 4:
            conversation.turns[0].images = [str(path)]
        return conversation

    with pytest.raises(Exception, match=r"cut\.jpg"):
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


# ---- before the model loads


def length(predictions) -> dict[str, float]:
    return {"length": sum(len(item.answer) for item in predictions) / len(predictions), "length/detail": 1.0}


def checked(folder, *flags, score=length, rows=ROWS):
    args = recipe.arguments(folder, "--use_lora", "--output_dir", "out", *flags)
    check_score(dataset(args, rows), score, args)


EVALUATES = ("--eval_strategy", "steps", "--eval_steps", "1")


@pytest.mark.parametrize("metric", ["loss", "eval_loss", "length", "eval_length"])
def test_a_figure_of_the_task_may_choose_the_best_model(folder, metric):
    checked(folder, *EVALUATES, "--metric_for_best_model", metric)


@pytest.mark.parametrize("metric", ["anls", "length/detail", "eval_runtime"])
def test_a_figure_that_the_task_has_not_is_refused_with_those_that_it_has(folder, metric):
    with pytest.raises(InputError, match=f"--metric_for_best_model {metric}: expected .* \\(loss, length\\)$"):
        checked(folder, *EVALUATES, "--metric_for_best_model", metric)


def test_rows_are_needed_to_evaluate(folder):
    checked(folder, rows=[])
    with pytest.raises(InputError, match="--eval_strategy steps: expected rows to answer, found none"):
        checked(folder, *EVALUATES, rows=[])


def test_a_score_that_fails_is_shown_before_anything_is_answered(folder):
    def broken(predictions):
        return {"length": sum(item.anwser for item in predictions)}

    with pytest.raises(ScriptError, match="anwser") as caught:
        checked(folder, score=broken)
    assert "answers are kept" not in str(caught.value)
    with pytest.raises(InputError, match="score: expected figures by name"):
        checked(folder, score=lambda predictions: len(predictions))


def test_made_up_answers_are_right_and_wrong(folder):
    seen = []
    checked(folder, score=lambda predictions: seen.extend(predictions) or {"x": 1.0})
    assert {item.answer == item.references[0] for item in seen} == {True, False}


def test_answers_while_training_are_of_the_run_that_gave_them(folder, tmp_path):
    """Those of another run in the same folder, with other rows to train on, are not taken."""
    record = {"script": "x", "settings": {}, "spread": {}, "rows": {}, "started": "", "identity": "one"}
    (tmp_path / "out").mkdir()
    write_run(tmp_path / "out", record)
    first = answer(folder, tmp_path / "out", stage="step 3")
    changed = [{**item, "answer": "kept"} for item in lines(tmp_path / "out")]
    recipe.write_jsonl(tmp_path / "out" / "predictions.jsonl", changed)
    assert {item.answer for item in answer(folder, tmp_path / "out", stage="step 3")} == {"kept"}
    write_run(tmp_path / "out", {**record, "identity": "two"})
    assert answer(folder, tmp_path / "out", stage="step 3") == first
