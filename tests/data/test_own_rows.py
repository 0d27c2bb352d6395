"""Files of one's own data: every form gives the same conversations, each row its line and an id, and bad ones a line."""

import json
import pickle
import re
from pathlib import Path

import own_inputs
import pytest
import recipe
import tiny
from own_inputs import BAD_INPUTS, INPUTS, PAGES

from finetuning.arguments import parse_args
from finetuning.data import json_list
from finetuning.data.csv_file import CsvFile
from finetuning.data.dataset import build_dataset
from finetuning.data.json_list import JsonListFile
from finetuning.data.known_forms import known_conversation
from finetuning.data.own_rows import open_file
from finetuning.data.own_splits import load_own_data
from finetuning.errors import InputError
from finetuning.own_data_arguments import OwnDataArguments

own_process = pytest.fixture(autouse=True)(recipe.own_process)
PROCESSOR = tiny.processor()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of Parquet files for each test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return recipe.model_folder(tmp_path_factory.mktemp("base"))


def arguments(base, *flags: str) -> OwnDataArguments:
    given = ["--model_name_or_path", str(base), "--num_crops", "1", "--no-tqdm", "--output_dir", "output"]
    return parse_args([*given, *flags], kind=OwnDataArguments)


def content(source) -> bytes:
    return source["bytes"] if isinstance(source, dict) else Path(source).read_bytes()


@pytest.mark.parametrize("name", INPUTS)
def test_every_form_gives_the_same_conversations(name, base, tmp_path):
    train, test = load_own_data(arguments(base, *INPUTS[name](tmp_path / "data")))
    assert 16 <= len(train) < PAGES
    assert len(train) + len(test) == PAGES
    shown = set()
    for row in [*train, *test]:
        [turn] = known_conversation(row).turns
        [picture] = map(content, turn.images)
        number = next(number for number in range(PAGES) if own_inputs.picture(number) == picture)
        shown.add(number)
        assert re.sub(r"\s*<\|image_1\|>\s*", "", turn.user) == own_inputs.QUESTION
        assert turn.answers == [own_inputs.answer(number)]
    assert shown == set(range(PAGES))
    # As workers of a data loader get them.
    assert pickle.loads(pickle.dumps(train))[3] == train[3]


def start(base: Path, flags: list[str]) -> None:
    """What is checked before a model is loaded."""
    args = arguments(base, *flags)
    for rows, split in zip(load_own_data(args), ("train", "eval"), strict=True):
        build_dataset(rows, known_conversation, PROCESSOR, args, split)


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_a_bad_input_is_one_line(bad, base, tmp_path):
    with pytest.raises(InputError) as caught:
        start(base, bad.write(tmp_path / "data"))
    line = str(caught.value)
    assert bad.expected in line
    assert line.isprintable()
    assert len(line) < 700


def test_there_are_enough_bad_inputs_and_no_name_is_used_twice():
    assert len({bad.name for bad in BAD_INPUTS}) == len(BAD_INPUTS) >= 30


# ---- csv

TABLE = 'image{s}question{s}answer\r\na.png{s}"What{s}\nor ""who""?"{s}x\r\n\r\n{s}plain{s}"y, z"\r\n'


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "BOM"])
def test_a_csv_file_gives_rows_by_number_with_their_lines(separator, start, tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes((start + TABLE.format(s=separator)).encode())
    rows = CsvFile(path)
    assert [rows.number(index) for index in range(len(rows))] == [2, 5]
    # The second one first.
    assert rows.values(1) == {"image": None, "question": "plain", "answer": "y, z"}
    assert rows.values(0) == {"image": "a.png", "question": f'What{separator}\nor "who"?', "answer": "x"}
    assert rows.values(1).where == f"{path}:5"


def test_line_separators_of_unicode_end_no_row(tmp_path):
    (tmp_path / "x.csv").write_text("question,answer\none\u2028two\x0bthree,a\nq,b\n", encoding="utf-8", newline="")
    assert [row["answer"] for row in CsvFile(tmp_path / "x.csv")] == ["a", "b"]


def test_plural_columns_of_a_csv_file_hold_json_lists(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "x.csv").write_text(
        'images,question,answers\n"[""a.png"", ""a.png""]",q,"[""1"", ""one""]"\na.png,q,[1\n'
    )
    rows = open_file(tmp_path / "x.csv", {}, 8)
    [turn] = known_conversation(rows[0]).turns
    assert turn.images == [str(tmp_path / "a.png")] * 2
    assert turn.answers == ["1", "one"]
    with pytest.raises(InputError, match=r"x.csv:3: answers: expected a JSON list"):
        rows[1]


# ---- json lists


@pytest.mark.parametrize("block", [8, 40, 2**22])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_gives_rows_by_number(block, indent, tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "BLOCK", block)
    rows = [{"id": n, "text": 'é日😀 ]} \\ " \n' * (n % 5), "inner": [{"a": [n, {}]}] * (n % 3)} for n in range(30)]
    text = json.dumps(rows, ensure_ascii=False, indent=indent)
    (tmp_path / "x.json").write_text("\ufeff" * (block == 40) + text, encoding="utf-8")
    found = JsonListFile(tmp_path / "x.json")
    assert [found[index] for index in reversed(range(len(found)))] == rows[::-1]
    lines = [line for line, text in enumerate(text.split("\n"), 1) if text == " {"]
    places = [f"{tmp_path}/x.json{f':{lines[n]}' if indent else f', row {n + 1}'}" for n in range(30)]
    assert [row.where for row in found] == places


# ---- ids and names of columns


def test_an_id_that_is_used_again_becomes_one_of_its_own(base, tmp_path):
    rows = [{"id": name, "question": f"{n}?", "answer": "a"} for n, name in enumerate(["x", "x", 3, None, "x"])]
    path = recipe.write_jsonl(tmp_path / "chat.jsonl", [*rows, {"question": "6?", "answer": "a"}])
    train, _ = load_own_data(arguments(base, "--data_dir", str(path), "--eval_share", "0"))
    assert [known_conversation(row).id for row in train] == ["x", "chat-2", "3", "chat-4", "chat-5", "chat-6"]


def test_ids_of_several_sources_begin_with_their_names(base, tmp_path):
    for folder in ("one/docs", "two/docs", "chat"):
        (tmp_path / folder).mkdir(parents=True)
        recipe.write_jsonl(tmp_path / folder / "train.jsonl", [{"id": "x", "question": folder, "answer": "a"}])
    places = [str(tmp_path / folder) for folder in ("one/docs", "two/docs", "chat")]
    args = arguments(base, "--data_dir", *places, "--eval_share", "0")
    assert [row["id"] for row in load_own_data(args)[0]] == ["docs-1/x", "docs-2/x", "chat/x"]


def test_a_path_that_holds_a_colon_is_the_path(base, tmp_path):
    for name in ("docs:2", "docs"):
        (tmp_path / name).mkdir()
        recipe.write_jsonl(tmp_path / name / "train.jsonl", [{"question": name, "answer": "a"}])
    args = arguments(base, "--data_dir", f"{tmp_path}/docs:2", "--eval_share", "0")
    assert load_own_data(args)[0][0]["question"] == "docs:2"
    (tmp_path / "docs:2" / "train.jsonl").unlink()
    (tmp_path / "docs:2").rmdir()
    args = arguments(base, "--data_dir", f"{tmp_path}/docs:2")
    assert [(source.path, source.share) for source in args.sources] == [(f"{tmp_path}/docs", 2)]
    with pytest.raises(InputError, match="expected a share over 0 after the colon"):
        arguments(base, "--data_dir", f"{tmp_path}/docs:0")
