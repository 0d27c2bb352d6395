"""Rows of jsonl files: every error names file and line, splits are found, image paths stay inside the folder."""

from itertools import pairwise

import pytest
import recipe
from datasets import Dataset

from finetuning.data.conversation import Turn
from finetuning.data.reading import iterate_rows, read_jsonl, read_splits, sample_rows
from finetuning.data.schemas import ConvertedRow, parse_row
from finetuning.errors import InputError


def test_read_jsonl_skips_empty_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": "é"}', encoding="utf-8")
    assert read_jsonl(path) == [{"a": 1}, {"a": "é"}]
    assert list(iterate_rows(path)) == [(1, {"a": 1}), (4, {"a": "é"})]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a": 1}\n\n{"a": }\n', r"rows.jsonl:3: expected a JSON object, found .*column 7"),
        (b'{"a": 1}\n[1, 2]\n', r"rows.jsonl:2: expected a JSON object, found a list \[1, 2\]"),
        (b'{"a": 1}\n"text"\n', r"rows.jsonl:2: expected a JSON object, found 'text'"),
        (b'{"a": 1}{"a": 2}\n', r"rows.jsonl:1: expected a JSON object"),
        (b"[" * 100_000 + b"\n", r"rows.jsonl:1: expected a JSON object"),
        (b'{"a": ' + b"1" * 5_000 + b"}\n", r"rows.jsonl:1: expected a JSON object, found: .*digits"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"rows.jsonl:2: expected UTF-8 text, found the byte 0xff"),
        (b'\xef\xbb\xbf{"a": 1}\n', r"rows.jsonl:1: .*BOM"),
        (b'{"a": 1}\n{"image": 3}\n', r"rows.jsonl:2: image: expected an image path, found 3"),
        (rb'{"image": "\ud800"}', r"rows.jsonl:1: image: expected an image path"),
        (b"\n \n", r"rows.jsonl: expected at least one row, found none"),
    ],
    ids=[
        "broken",
        "a list",
        "a text",
        "two in a line",
        "deep",
        "digits",
        "Latin-1",
        "byte order mark",
        "image",
        "half a surrogate pair",
        "empty",
    ],
)
def test_read_jsonl_names_file_and_line(content, found, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=found) as caught:
        read_jsonl(tmp_path / "rows.jsonl")
    assert str(caught.value).startswith(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["gone.jsonl", "."])
def test_read_jsonl_names_a_file_it_cannot_open(name, tmp_path):
    with pytest.raises(InputError, match="expected a file with rows, found") as caught:
        read_jsonl(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_image_paths_are_relative_to_the_file(tmp_path):
    turn = {"images": ["a/1.jpg", "2.jpg"], "user": "What?", "assistant": "yes"}
    rows = [{"image": "images/1.png"}, {"images": ["1.png"]}, {"conversations": [turn]}]
    one, several, converted = read_jsonl(recipe.write_jsonl(tmp_path / "rows.jsonl", rows))
    assert one["image"] == str(tmp_path / "images" / "1.png")
    assert several["images"] == [str(tmp_path / "1.png")]
    # the converted form keeps its images in a folder of their own
    assert converted["conversations"][0]["images"] == [str(tmp_path / "images" / path) for path in turn["images"]]


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "images/../../secret.png", "link/secret.png", "", "a\0b", "."]
)
def test_an_image_path_that_leaves_the_folder_is_refused(path, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path)
    rows = [{"image": "1.png"}, {"image": path}]
    with pytest.raises(InputError, match="rows.jsonl:2: image: expected an image path"):
        read_jsonl(recipe.write_jsonl(tmp_path / "data" / "rows.jsonl", rows))


def test_read_splits_of_one_file_or_of_one_each(tmp_path):
    for name in ("one", "each", "named"):
        (tmp_path / name).mkdir()
    recipe.write_jsonl(
        tmp_path / "one" / "rows.jsonl", [{"n": n, "split": s} for n, s in enumerate(("test", "train", "val", "train"))]
    )
    recipe.write_jsonl(tmp_path / "each" / "train.jsonl", [{"n": 1}])
    recipe.write_jsonl(tmp_path / "each" / "test.jsonl", [{"n": 0}])
    recipe.write_jsonl(tmp_path / "named" / "ucf101_train.jsonl", [{"n": 1}])
    recipe.write_jsonl(tmp_path / "named" / "ucf101_val.jsonl", [{"n": 2}])

    def numbers(*args):
        return [[row["n"] for row in rows] for rows in read_splits(*args)]

    assert numbers(tmp_path / "one") == [[1, 3], [0]]
    assert numbers(tmp_path / "one", "val", "train") == [[2], [1, 3]]
    assert numbers(tmp_path / "each") == [[1], [0]]
    # the first that exists
    assert numbers(tmp_path / "one", "train", ("val", "test")) == [[1, 3], [2]]
    assert numbers(tmp_path / "named", "train", ("test", "val")) == [[1], [2]]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "expected rows.jsonl with a field split, or train.jsonl"),
        ({"train.jsonl": [{}]}, "test.jsonl"),
        ({"rows.jsonl": [{"split": "train"}]}, 'rows.jsonl: expected rows with "split": "test", found none'),
        ({"rows.jsonl": [{}]}, "rows.jsonl:1: split: expected the name of a split, such as train or test, found null"),
        ({"rows.jsonl": [{"split": ["train"]}]}, "split"),
        ({"a_train.jsonl": [{}], "b_train.jsonl": [{}]}, "expected one file for the split train"),
    ],
    ids=["empty folder", "one split missing", "no test rows", "no split field", "split no text", "two of a split"],
)
def test_read_splits_says_what_is_missing(files, found, tmp_path):
    for name, rows in files.items():
        recipe.write_jsonl(tmp_path / name, rows)
    with pytest.raises(InputError) as caught:
        read_splits(tmp_path)
    assert found in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_a_sample_is_spread_over_a_file_sorted_by_class(kind):
    rows = kind([{"n": number, "class": number // 10} for number in range(57)])
    for count in (1, 6, 20, 56):
        found = [row["n"] for row in sample_rows(rows, count)]
        assert len(found) == count
        assert found == sorted(set(found))
        assert found == [row["n"] for row in sample_rows(rows, count)]
    assert {row["class"] for row in sample_rows(rows, 12)} == set(range(6))
    # not every n-th row, which a file may repeat its kinds by
    steps = [after - before for before, after in pairwise(row["n"] for row in sample_rows(rows, 12))]
    assert len(set(steps)) > 2
    assert len(sample_rows(rows, None)) == len(sample_rows(rows, 99)) == 57
    assert len(sample_rows(rows, 0)) == 0


def from_converted(row: dict):
    return parse_row(row, ConvertedRow).to_conversation()


def test_a_converted_row_becomes_a_conversation():
    first = {"images": ["a.jpg", "b.jpg"], "user": "What?", "assistant": "yes"}
    conversation = from_converted({"id": 7, "conversations": [first, {"user": "Sure?", "assistant": ["no", "not"]}]})
    assert conversation.id == "7"
    assert conversation.turns == [Turn("What?", ["yes"], ["a.jpg", "b.jpg"]), Turn("Sure?", ["no", "not"])]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"conversations": [{"user": "q", "assistant": "a"}]}, "id: expected this field"),
        ({"id": "a"}, "expected the fields conversations, found id"),
        ({"id": "a", "conversations": []}, "conversations: expected a list with at least 1"),
        ({"id": "a", "conversations": ["What?"]}, "conversations[0]: expected an object"),
        (
            {"id": "a", "conversations": [{"user": "q", "assistant": "a"}, {"assistant": "a"}]},
            "conversations[1].user: expected this field",
        ),
        (
            {"id": "a", "conversations": [{"user": "q", "assistant": "a", "images": "a.jpg"}]},
            ".images: expected a list",
        ),
    ],
)
def test_a_converted_row_with_a_wrong_field_is_refused(row, named):
    with pytest.raises(InputError) as caught:
        from_converted(row)
    assert str(caught.value).startswith("sample a: " if "id" in row else "id: ")
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
