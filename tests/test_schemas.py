"""Rows as models: nothing but text reaches a prompt, every fault is one line with its field, whatever the row came from."""

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as hateful_memes
import finetune_hf_trainer_nlvr2 as nlvr2
import finetune_hf_trainer_ucf101 as ucf101
from finetuning.data.conversation import Conversation, Turn, check_conversation, check_unique_ids, control_tokens
from finetuning.data.reading import Row, where
from finetuning.data.schemas import (
    BREVITY_HINTS,
    ConvertedRow,
    Picture,
    RowId,
    RowModel,
    Text,
    chat_format,
    parse_row,
)
from finetuning.data.shown import printable, shown
from finetuning.errors import InputError

CONTROL = control_tokens(tiny.processor().tokenizer)


class Question(RowModel):
    id: RowId
    image: Picture
    question: Text
    answers: list[Text] = Field(min_length=1)


GOOD = {"id": "a", "image": "a.png", "question": "q", "answers": ["x"]}


def refusal(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    line = str(caught.value)
    assert line.isprintable()
    return line


# ---- fields


def test_a_good_row_is_what_it_was():
    row = parse_row({**GOOD, "id": 17, "other": float("nan")}, Question, ConvertedRow)
    assert (row.id, row.image, row.question, row.answers) == ("17", "a.png", "q", ["x"])


NO_TEXT = [None, float("nan"), 0, 1.5, True, [], ["q"], {}, {"en": "q"}, "", " \n", b"q"]


@pytest.mark.parametrize("value", NO_TEXT, ids=repr)
def test_nothing_else_becomes_text(value):
    assert refusal(parse_row, {**GOOD, "question": value}, Question).startswith(
        "sample a: question: expected text, found "
    )
    assert "answers[1]: expected text, found " in refusal(parse_row, {**GOOD, "answers": ["x", value]}, Question)


@pytest.mark.parametrize("value", [None, float("nan"), 1.5, True, [], {}, "", " "], ids=repr)
def test_nothing_else_becomes_an_id(value):
    assert refusal(parse_row, {**GOOD, "id": value}, Question).startswith("id: expected text or a whole number, found ")


@pytest.mark.parametrize(
    "value",
    ["a.png", Path("a.png"), tiny.picture(3, 3), {"bytes": b"x", "path": None}, {"bytes": None, "path": "a.png"}],
    ids=type,
)
def test_what_a_picture_may_be(value):
    assert parse_row({**GOOD, "image": value}, Question).image is value


@pytest.mark.parametrize(
    "value", [None, "", " ", 3, True, [], ["a.png"], {}, {"bytes": None, "path": None}, {"bytes": "x"}, b"x"], ids=repr
)
def test_what_no_picture_is(value):
    assert refusal(parse_row, {**GOOD, "image": value}, Question).startswith("sample a: image: expected a picture")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({}, "expected the fields image, question, answers; or conversations, found no field"),
        ({"id": 3}, "sample 3: expected the fields image, question, answers; or conversations, found id"),
        ({"id": 3, "question": "q"}, "sample 3: image: expected this field, found id, question"),
        ({"id": 3, "conversations": [], "question": "q"}, "sample 3: conversations: expected a list with at least 1"),
        ([], "expected a row with named fields, found an empty list"),
        (None, "expected a row with named fields, found null"),
    ],
)
def test_the_form_that_is_nearest_is_the_one_that_is_expected(row, found):
    assert refusal(parse_row, row, Question, ConvertedRow).startswith(found)


def test_the_form_goes_by_the_required_fields_and_the_first_is_taken():
    both = {**GOOD, "conversations": [{"user": "q", "assistant": "a"}]}
    assert isinstance(parse_row(both, Question, ConvertedRow), Question)
    assert isinstance(parse_row(both, ConvertedRow, Question), ConvertedRow)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "OpenAI messages"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "LLaVA / ShareGPT"),
        ({"conversations": [{"role": "user", "content": "q"}]}, "LLaVA / ShareGPT"),
        ({"conversations": [{"user": "q", "assistant": "a"}]}, None),
        ({"conversations": []}, None),
        ({"conversations": "q"}, None),
        (GOOD, None),
        (None, None),
    ],
)
def test_a_known_chat_format_is_named(row, name):
    assert chat_format(row) == name
    if name:
        line = refusal(parse_row, row, Question, ConvertedRow)
        assert f"found {name}" in line
        assert "python -m finetuning.validate DIR --convert OUT" in line


def test_a_script_may_read_messages_by_a_model_of_its_own():
    class Message(RowModel):
        content: Text

    class Chat(RowModel):
        messages: list[Message]

    assert parse_row({"messages": [{"content": "q"}]}, Chat).messages[0].content == "q"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "en", "user", "x"]), inner),
    max_leaves=8,
)


@given(st.sampled_from(list(GOOD)), JSON)
def test_any_value_in_any_field(field, value):
    found, line = None, ""
    try:
        found = parse_row({**GOOD, field: value}, Question, ConvertedRow)
    except InputError as error:
        line = str(error)
    if found is None:
        assert line.isprintable()
        assert f"{field}" in line
        assert len(line) < 600
    else:
        assert all(isinstance(text, str) and text.strip() for text in (found.id, found.question, *found.answers))


# ---- rows of the hub and of files


def test_rows_of_the_hub_are_parsed_as_they_come(tmp_path):
    tiny.picture(30, 20).save(tmp_path / "a.png")
    features = Features(
        {
            "images": List(Image(decode=False)),
            "texts": [{"user": Value("string"), "assistant": Value("string"), "source": Value("string")}],
            "id": Value("string"),
        }
    )
    picture = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    text = {"user": "Are both the same?\nAnswer yes or no.", "assistant": "Yes.", "source": "NLVR2"}
    rows = Dataset.from_list(
        [
            {"images": [picture] * 2, "texts": [text, text], "id": "train-0"},
            {"images": [picture], "texts": [text], "id": "train-1"},
            {"images": [picture] * 2, "texts": [{**text, "assistant": None}], "id": "train-2"},
        ],
        features,
    )
    good = nlvr2.to_conversation(rows[0])
    check_conversation(good, CONTROL)
    assert [len(turn.images) for turn in good.turns] == [2, 0]
    assert refusal(nlvr2.to_conversation, rows[1]).startswith("sample train-1: images: expected a list with at least 2")
    assert "texts[0].assistant: expected text, found null" in refusal(nlvr2.to_conversation, rows[2])
    assert where(rows[2], 2) == "row 3"
    assert hateful_memes.to_conversation(rows[1]).turns[0].answers == ["Yes."]


def test_a_row_knows_where_it_stands():
    row = Row(GOOD, "data/train.jsonl:17")
    assert row == GOOD
    for same in (row, copy.copy(row), pickle.loads(pickle.dumps(row))):
        assert where(same, 3) == "data/train.jsonl:17"
        assert dict(same) == GOOD
    assert where(dict(row), 16) == "row 17"


# ---- the scripts' own rows


def cauldron(user: str, assistant: str = "12.") -> Conversation:
    return docvqa.to_conversation({"id": 1, "images": ["a.png"], "texts": [{"user": user, "assistant": assistant}]})


@pytest.mark.parametrize(
    ("user", "question"),
    [
        ("What is\nthe total?\nAnswer briefly.", "What is\nthe total?"),
        ("What is the total?\nGive a very brief answer.", "What is the total?"),
        ("What is the total?\nEnsure brevity in your answer. ", "What is the total?"),
        ("What is\nthe total?", "What is\nthe total?"),
        ("What is\n\nthe total? ", "What is\n\nthe total? "),
        ("Answer briefly.", "Answer briefly."),
        ("What is it? Answer briefly.", "What is it? Answer briefly."),
    ],
)
def test_only_a_known_last_line_is_taken_from_a_question(user, question):
    (turn,) = cauldron(user).turns
    assert turn.user == f"{question}\nAnswer briefly."
    assert turn.answers == ["12"]


@pytest.mark.parametrize("hint", BREVITY_HINTS)
def test_each_known_last_line_is_taken(hint):
    assert cauldron(f"Which?\n{hint}").turns[0].user == "Which?\nAnswer briefly."


def test_the_scripts_take_the_forms_that_their_docstrings_name():
    page = {"id": 1, "image": "a.png", "query": {"en": "Which?", "de": None}, "answers": ["a", "b"]}
    turn = Turn("Which?\nAnswer briefly.", ["a", "b"], ["a.png"])
    assert docvqa.to_conversation(page) == Conversation("1", [turn])
    meme = {"id": 42, "img": "a.png", "label": 1, "text": 'a "b" {c}'}
    turn = Turn('The text in this meme is "a "b" {c}". Is the meme hateful?\nAnswer yes or no.', ["Yes."], ["a.png"])
    turn.choices = hateful_memes.CHOICES
    assert hateful_memes.to_conversation(meme) == Conversation("42", [turn])
    converted = {"id": "c", "conversations": [{"images": ["a.png"], "user": "q", "assistant": "a"}]}
    for script in (docvqa, nlvr2, ucf101):
        assert script.to_conversation(converted) == Conversation("c", [Turn("q", ["a"], ["a.png"])])
    assert hateful_memes.to_conversation(converted).turns[0].choices == hateful_memes.CHOICES


# ---- what a script's own function may return


def turn(**changes) -> Turn:
    return Turn(**{"user": "q", "answers": ["a"], **changes})


WRONG = {
    "nothing": (None, "to_conversation: expected it to return a Conversation, found null"),
    "a dict": ({"id": "x"}, "to_conversation: expected it to return a Conversation, found an object"),
    "no id": (Conversation(None, [turn()]), "Conversation.id: expected text, found null"),
    "a number as id": (Conversation(3, [turn()]), "Conversation.id: expected text, found 3"),
    "turns null": (Conversation("x", None), "sample x: turns: expected a list with at least one Turn, found null"),
    "one turn": (Conversation("x", turn()), "sample x: turns: expected a list with at least one Turn, found Turn("),
    "no turn": (Conversation("x", []), "sample x: turns: expected a list with at least one Turn, found an empty list"),
    "a turn null": (Conversation("x", [turn(), None]), "sample x, turn 2: expected a Turn, found null"),
    "a turn a dict": (Conversation("x", [{"user": "q"}]), "sample x, turn 1: expected a Turn, found an object"),
    "user null": (Conversation("x", [turn(user=None)]), "sample x, turn 1: user: expected text, found null"),
    "user NaN": (Conversation("x", [turn(user=float("nan"))]), "turn 1: user: expected text, found NaN"),
    "user blank": (Conversation("x", [turn(user="")]), "turn 1: user: expected text, found ''"),
    "answers a text": (Conversation("x", [turn(answers="a")]), "answers: expected a list with at least one answer, found 'a'"),
    "answers null": (Conversation("x", [turn(answers=None)]), "answers: expected a list with at least one answer, found null"),
    "an answer null": (Conversation("x", [turn(answers=["a", None])]), "turn 1: answers[1]: expected text, found null"),
    "images a text": (Conversation("x", [turn(images="a.png")]), "turn 1: images: expected a list of pictures, found 'a.png'"),
    "images null": (Conversation("x", [turn(images=None)]), "turn 1: images: expected a list of pictures, found null"),
    "an image null": (Conversation("x", [turn(images=["a.png", None])]), "turn 1: images[1]: expected a picture"),
    "choices a text": (Conversation("x", [turn(choices="Yes.")]), "choices: expected a list with all possible answers, found 'Yes.'"),
    "choices null": (Conversation("x", [turn(choices=None)]), "choices: expected a list with all possible answers, found null"),
    "a choice null": (Conversation("x", [turn(choices=["Yes.", None])]), "turn 1: choices[1]: expected text, found null"),
    "a choice twice": (Conversation("x", [turn(choices=["a", "b", "a"])]), "choices: expected different answers, found 'a' twice"),
    "a control token in a choice": (Conversation("x", [turn(choices=["<|end|>"])]), "choices[0]: expected plain text, found the control token <|end|>"),
    "an id of control characters": (Conversation("\x1b[2J\n", []), r"sample \x1b[2J\n: turns: expected a list"),
    "a long answer of no kind": (Conversation("x", [turn(answers="y" * 10_000)]), "found 'yyyy"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_to_conversation_may_not_return(case):
    conversation, found = WRONG[case]
    line = refusal(check_conversation, conversation, CONTROL)
    assert found in line
    assert len(line) < 400


def test_an_id_used_twice_is_named_with_both_places():
    rows = [Row({"id": name}, f"train.jsonl:{number}") for number, name in enumerate("abca", 1)]

    def place(index: int) -> str:
        return where(rows[index], index)

    line = refusal(check_unique_ids, (row["id"] for row in rows), place)
    assert line == "train.jsonl:4: sample a: id: expected an id of its own, found that of train.jsonl:1"
    check_unique_ids("abc", place)


# ---- what is shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (float("nan"), "NaN"),
        (3, "3"),
        ("a", "'a'"),
        ("\x1b[2J\n", r"'\x1b[2J\n'"),
        ("\u202egnp.exe", r"'\u202egnp.exe'"),
        ("\ud800", r"'\ud800'"),
        ([], "an empty list"),
        ({}, "an empty object"),
        ([None], "a list [None]"),
        ({"a": 1}, "an object {'a': 1}"),
        (b"123", "3 bytes"),
        pytest.param(10**5000, "int", id="thousands of digits"),
    ],
)
def test_values_as_they_are_shown(value, text):
    assert shown(value) == text


@given(st.text() | st.text(alphabet="\x1b\n\r\x85\u2028\U000e0001\ud800a", min_size=200), st.integers(10, 60))
def test_a_text_is_shown_on_one_line_and_short(text, limit):
    for line in (printable(text, limit), shown(text, limit)):
        assert line.isprintable()
        assert len(line) <= 2 * limit
    if text.isprintable() and len(text) <= limit:
        assert printable(text, limit) == text


def test_huge_values_cost_nothing():
    huge = {"a": [list(range(1000))] * 1000, "b": "x" * 1_000_000}
    for _ in range(100):
        assert len(shown(huge)) < 200
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert len(shown(deep)) < 200


def test_what_the_scripts_read_is_json(tmp_path):
    # the splits of a script come with their places
    (tmp_path / "train.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "test.jsonl").write_text("\n" + json.dumps(GOOD) + "\n")
    train, test = nlvr2.load_splits(SimpleNamespace(data_dir=str(tmp_path), eval_split=None, do_train=True))
    assert [row.where for row in (*train, *test)] == [f"{tmp_path}/train.jsonl:1", f"{tmp_path}/test.jsonl:2"]
