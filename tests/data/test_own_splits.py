"""What is trained and what is answered of one's own data: splits by name, and a share that leaves no picture on both sides."""

import random
from pathlib import Path

import numpy as np
import pytest
import recipe
import tiny

from finetuning.arguments import parse_args
from finetuning.data import drawing
from finetuning.data.drawing import draw_rows
from finetuning.data.own_splits import load_own_data
from finetuning.errors import InputError
from finetuning.own_data_arguments import OwnDataArguments

own_process = pytest.fixture(autouse=True)(recipe.own_process)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return recipe.model_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [str(folder / f"{number}.png") for number in range(400)]
    for number, path in enumerate(paths):
        tiny.picture(4, 4, seed=number).save(path)
    return paths


def row(number: int, *images) -> dict:
    return {"id": str(number), "images": list(images), "question": f"{number}?", "answer": "a"}


def sides(rows: list[dict], share: float) -> tuple[set[str], set[str]]:
    train, drawn = draw_rows(rows, share)
    assert sorted([*train, *drawn]) == list(range(len(rows)))
    return tuple({rows[number]["id"] for number in numbers} for numbers in (train, drawn))


def test_about_the_share_is_drawn_whatever_the_order(pictures):
    rows = [row(number, path) for number, path in enumerate(pictures)]
    train, drawn = sides(rows, 0.1)
    assert 20 <= len(drawn) <= 60
    random.Random(0).shuffle(rows)
    assert sides(rows, 0.1) == (train, drawn)
    # A larger share holds the smaller one.
    assert drawn < sides(rows, 0.3)[1]


def test_no_picture_is_on_both_sides_not_by_way_of_a_third_row(pictures):
    chooser = random.Random(1)
    # Of every 10 pictures the rows show one to three.
    rows = []
    for number in range(600):
        start = 10 * chooser.randrange(40)
        rows.append(row(number, *chooser.sample(pictures[start : start + 10], chooser.randint(1, 3))))
    train, drawn = draw_rows(rows, 0.2)
    shown = [{path for number in numbers for path in rows[number]["images"]} for numbers in (train, drawn)]
    assert len(drawn) >= 30
    assert not shown[0] & shown[1]


def test_a_copy_of_a_picture_is_the_picture_as_a_file_or_as_bytes(pictures, tmp_path):
    rows = []
    for number, path in enumerate(pictures[:100]):
        copy = tmp_path / f"copy-{number}.png"
        copy.write_bytes(Path(path).read_bytes())
        rows += [row(number, path), row(1000 + number, str(copy))]
    train, drawn = sides(rows, 0.3)
    assert drawn
    assert {int(name) % 1000 for name in train}.isdisjoint({int(name) % 1000 for name in drawn})
    inside = [
        row(n, {"bytes": Path(path).read_bytes(), "path": f"{n}.png"}) for n, path in enumerate(pictures[:40])
    ] * 2
    train, drawn = sides(inside, 0.3)
    assert drawn
    assert not train & drawn


def test_rows_without_pictures_go_by_what_they_ask():
    rows = [{**row(number), "question": f"{number % 50}?"} for number in range(150)]
    train, drawn = draw_rows(rows, 0.2)
    assert {rows[number]["question"] for number in train}.isdisjoint({rows[number]["question"] for number in drawn})
    assert 0 < len(drawn) < 75


def test_few_rows_and_a_picture_of_most_rows(pictures):
    # The logo of all pages but five draws none of them.
    rows = [row(number, pictures[number], pictures[-1]) for number in range(95)]
    rows += [row(95 + number, pictures[200 + number]) for number in range(5)]
    train, drawn = sides(rows, 0.05)
    assert drawn
    assert drawn <= {"95", "96", "97", "98", "99"}
    for seed in range(20):
        two = [row(number, pictures[2 * seed + number]) for number in range(2)]
        assert [len(side) for side in sides(two, 0.05)] == [1, 1]
    with pytest.raises(InputError, match="all 2 belong together"):
        draw_rows([row(0, pictures[0]), row(1, pictures[0])], 0.05)
    assert [len(side) for side in sides([row(0, pictures[0])], 0)] == [1, 0]


def test_large_groups_are_not_drawn_first(pictures):
    # The least of many hashes is small: groups of 20 pictures would all fall below the share.
    rows = [row(10 * group + n, *pictures[20 * group : 20 * group + 20]) for group in range(20) for n in range(10)]
    assert len(draw_rows(rows, 0.5)[1]) in range(40, 161)


def test_ranks_draw_together(pictures, monkeypatch):
    rows = [row(number, pictures[number % 150]) for number in range(301)]
    sent = []
    monkeypatch.setattr(drawing, "gather_object", lambda found: sent.extend(found) or found)
    for rank in range(3):
        draw_rows(rows, 0.1, (rank, 3))
    monkeypatch.setattr(drawing, "gather_object", lambda _: sent)
    for found, expected in zip(draw_rows(rows, 0.1, (1, 3)), draw_rows(rows, 0.1), strict=True):
        np.testing.assert_array_equal(found, expected)


# ---- splits by name


def write(folder: Path, **files: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        recipe.write_jsonl(folder / f"{name.replace('__', '-')}.jsonl", rows)
    return folder


def asked(rows) -> list[str]:
    return [found["question"] for found in rows]


def questions(*texts: str, **fields) -> list[dict]:
    return [{"question": text, "answer": "a", **fields} for text in texts]


def load(base, *flags: str):
    given = ["--model_name_or_path", str(base), "--num_crops", "1", "--no-tqdm", "--output_dir", "output"]
    return load_own_data(parse_args([*given, *flags], kind=OwnDataArguments))


@pytest.mark.parametrize(
    ("files", "flags", "train", "test"),
    [
        ({"a_train": "ab", "a_test": "c"}, [], "ab", "c"),
        ({"docs__train": "ab", "docs__val": "c", "docs__test": "d"}, [], "ab", "d"),
        ({"train": "ab", "val": "c", "test": "d"}, ["--eval_split", "val"], "ab", "c"),
        ({"chats": "ab", "more": "c", "test": "d"}, [], "abc", "d"),
        ({"train": "ab", "holdout": "c"}, ["--eval_split", "holdout"], "ab", "c"),
        ({"train": "ab", "test": "c"}, ["--do_train", "False"], "", "c"),
    ],
)
def test_a_file_is_of_the_split_in_its_name(base, tmp_path, files, flags, train, test):
    folder = write(tmp_path / "data", **{name: questions(*texts) for name, texts in files.items()})
    found = load(base, "--data_dir", str(folder), *flags)
    assert [asked(rows) for rows in found] == [list(train), list(test)]


def test_the_field_split_comes_first(base, tmp_path):
    rows = questions("a", split="train") + questions("b", split="validation") + questions("c", split="train")
    found = load(base, "--data_dir", str(write(tmp_path / "data", anything=rows) / "anything.jsonl"))
    assert [asked(rows) for rows in found] == [["a", "c"], ["b"]]
    rows[2].pop("split")
    write(tmp_path / "data", anything=rows)
    with pytest.raises(InputError, match="anything.jsonl:3: split: expected the name of a split|anything-3"):
        load(base, "--data_dir", str(tmp_path / "data"))


def test_a_train_file_and_a_test_file_may_be_named_one_by_one(base, tmp_path):
    folder = write(tmp_path / "data", train=questions("a", "b"), test=questions("c"))
    found = load(base, "--data_dir", str(folder / "train.jsonl"), str(folder / "test.jsonl"))
    assert [asked(rows) for rows in found] == [["a", "b"], ["c"]]
    with pytest.raises(InputError, match="expected rows to train on, found the split.s. test alone; --do_train False"):
        load(base, "--data_dir", str(folder / "test.jsonl"))
    assert asked(load(base, "--data_dir", str(folder / "test.jsonl"), "--do_train", "False")[1]) == ["c"]


def test_each_source_without_a_test_split_gives_its_share(base, tmp_path, capsys):
    write(tmp_path / "docs", train=questions("a", "b"), test=questions("c"))
    write(tmp_path / "chat", rows=questions(*map(str, range(60))))
    train, test = load(base, "--data_dir", str(tmp_path / "docs"), str(tmp_path / "chat"), "--eval_share", "0.2")
    assert asked(test)[0] == "c"
    assert len(train) + len(test) == 63
    said = f"{tmp_path}/chat: no test split: {len(test) - 1} of 60 rows are answered and not trained, drawn by picture"
    assert said in capsys.readouterr().out
