"""A start reads of each row what it needs and no more: rows stay in their files, lengths are kept, nothing kept is believed blindly."""

import json
import os
import pickle
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recipe
import tiny

from finetuning.data import checking
from finetuning.data import dataset as dataset_module
from finetuning.data import lines as lines_module
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import build_dataset
from finetuning.data.encoding import count_tokens
from finetuning.data.fingerprint import fingerprint
from finetuning.data.length_cache import UNKNOWN, LengthCache, cache_file
from finetuning.data.lines import Lines
from finetuning.data.reading import load_folder, read_splits
from finetuning.errors import InputError

own_process = pytest.fixture(autouse=True)(recipe.own_process)

PROCESSOR = tiny.processor()
MODULE = "finetuning.data.dataset"
ROWS = 7


@pytest.fixture(autouse=True)
def assets(tmp_path, monkeypatch) -> Path:
    """An empty folder of caches for each test."""
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(ROWS):
        tiny.picture(30 + 28 * (number % 3), 20, seed=number).save(folder / f"{number}.png")
        os.utime(folder / f"{number}.png", (1_000, 1_000))
        rows.append({"id": f"r{number}", "image": f"{number}.png", "question": "What?", "answer": "a" * (1 + number)})
    recipe.write_jsonl(folder / "train.jsonl", rows)
    recipe.write_jsonl(folder / "test.jsonl", rows[:2])
    return folder


def to_conversation(row) -> Conversation:
    return Conversation(row["id"], [Turn(row["question"], [row["answer"]], [row["image"]])])


def start(data: Path, function=to_conversation, processor=PROCESSOR, split="train", **changes):
    values = {"on_bad_row": "stop", "max_bad_rows": None, "eval_size": None, "data_dir": str(data), "do_train": True}
    values |= {"max_length": None, "seed": 0, "eval_split": None, "check": "all", **changes}
    args = SimpleNamespace(**values)
    return build_dataset(load_folder(args, ["test"])[split == "eval"], function, processor, args, split)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the pictures whose headers are read."""
    found = []

    def size(source):
        found.append(os.path.basename(source))
        return checking_size(source)

    checking_size = checking.image_size
    monkeypatch.setattr(checking, "image_size", size)
    return found


def lengths_of(data: Path) -> list[int]:
    return [count_tokens(to_conversation(row), PROCESSOR) for row in read_splits(data)[0]]


def edit(data: Path, number: int, **changes) -> None:
    path = data / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number] |= changes
    recipe.write_jsonl(path, rows)


def the_file(assets: Path) -> Path:
    [path] = assets.rglob("*.parquet")
    return path


# ---- lengths that are kept


def test_a_header_is_read_once_and_the_second_start_reads_none(data, opened):
    edit(data, 5, image="0.png")
    first = start(data)
    assert sorted(opened) == sorted(f"{number}.png" for number in range(ROWS) if number != 5)
    assert first.lengths == lengths_of(data)
    opened.clear()
    second = start(data)
    assert opened == []
    assert second.lengths == first.lengths
    assert second.fingerprints == first.fingerprints


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_ranks_find_what_all_of_them_have_counted(monkeypatch, data, opened, ranks):
    expected = lengths_of(data)
    for turn in range(2):
        opened.clear()
        for built in recipe.on_ranks(monkeypatch, MODULE, ranks, lambda _: start(data)):
            assert built.lengths == expected
        assert sorted(opened) == ([] if turn else [f"{number}.png" for number in range(ROWS)])


def test_a_picture_of_many_rows_is_opened_once_by_each_process_for_each_split(monkeypatch, data, opened):
    for number in range(ROWS):
        edit(data, number, image="0.png")
    shutil.copy(data / "train.jsonl", data / "test.jsonl")

    def both(_):
        return [start(data, split=split).lengths for split in ("train", "eval")]

    assert recipe.on_ranks(monkeypatch, MODULE, 2, both) == [[lengths_of(data)] * 2] * 2
    assert opened == ["0.png"] * 4
    recipe.on_ranks(monkeypatch, MODULE, 2, both)
    assert opened == ["0.png"] * 4


CHANGES = {
    "a picture by its time": (lambda data: os.utime(data / "3.png", (1_000, 2_000)), {"pictures"}),
    "a picture by its size": (lambda data: tiny.picture(200, 20).save(data / "3.png"), {"pictures"}),
    "a question": (lambda data: edit(data, 3, question="What is that?"), {"prompts"}),
    "an answer": (lambda data: edit(data, 3, answer="something longer than before"), {"answers"}),
    "another picture": (lambda data: edit(data, 3, image="4.png"), {"pictures"}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_has_changed_is_counted_and_known_anew(data, opened, case):
    change, parts = CHANGES[case]
    before = start(data)
    opened.clear()
    change(data)
    after = start(data)
    assert len(opened) == 1
    assert after.lengths == lengths_of(data)
    for number, (known, found) in enumerate(zip(before.fingerprints, after.fingerprints, strict=True)):
        changed = {part for part in ("prompts", "answers", "pictures") if getattr(known, part) != getattr(found, part)}
        assert changed == (parts if number == 3 else set())


def test_rows_that_come_go_and_move_keep_their_lengths(data, opened):
    start(data)
    opened.clear()
    lines = (data / "train.jsonl").read_text().splitlines()
    shutil.copy2(data / "2.png", data / "new.png")
    new = json.dumps({"id": "new", "image": "new.png", "question": "What?", "answer": "aaa"})
    (data / "train.jsonl").write_text("\n".join([lines[4], new, *lines[:2]]) + "\n")
    built = start(data)
    assert opened == ["new.png"]
    assert built.lengths == lengths_of(data)
    assert [known.id for known in built.fingerprints] == ["r4", "new", "r0", "r1"]


@pytest.mark.parametrize("what", ["crops", "pixels", "tokenizer", "template"])
def test_another_way_to_count_keeps_other_lengths(data, opened, monkeypatch, what):
    start(data)
    opened.clear()
    processor = tiny.processor()
    if what == "crops":
        processor.image_processor.num_crops = 1
    elif what == "pixels":
        monkeypatch.setattr("finetuning.data.length_cache.pixel_limit", lambda: 12_345)
    elif what == "tokenizer":
        processor.tokenizer = pickle.loads(pickle.dumps(processor.tokenizer))
        processor.tokenizer.add_tokens(["What"])
    else:
        processor.chat_template = "{{ 'Please. ' }}" + processor.chat_template
    built = start(data, processor=processor)
    assert len(opened) == ROWS
    assert built.lengths == [count_tokens(to_conversation(row), processor) for row in built.rows]


def test_lengths_that_another_code_has_counted_are_forgotten(data, opened, assets):
    expected = start(data).lengths
    cache = LengthCache(the_file(assets))
    cache.write(cache.keys, cache.find(cache.keys) + 1)
    opened.clear()
    assert start(data).lengths == expected
    assert len(opened) == ROWS
    assert start(data).lengths == expected


def test_a_kept_length_is_held_against_max_length(data):
    longest = max(start(data).lengths)
    with pytest.raises(InputError, match=rf"train.jsonl:\d+: sample r\d: expected at most {longest - 1} tokens"):
        start(data, max_length=longest - 1)


# ---- a cache that is damaged, cannot be written, or is written by two


def test_a_damaged_file_is_noticed_and_written_again(data, opened, assets, capsys):
    expected = start(data).lengths
    path = the_file(assets)
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[: len(whole) // 2], b"other" * 100):
        path.write_bytes(damaged)
        opened.clear()
        capsys.readouterr()
        assert start(data).lengths == expected
        assert len(opened) == ROWS
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith(f"warning: {path} was damaged (")
        assert path.read_bytes() == whole


def test_a_flipped_bit_never_gives_another_length(data, assets):
    start(data)
    path = the_file(assets)
    whole, expected = path.read_bytes(), LengthCache(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        found = LengthCache(path).find(expected.keys)
        assert set(found.tolist()) == {UNKNOWN} or (found == expected.find(expected.keys)).all(), place


@pytest.mark.parametrize("blocked", ["folder", "file"])
def test_a_folder_that_cannot_be_written_breaks_no_run(data, assets, monkeypatch, capsys, blocked):
    if blocked == "folder":
        # As a read-only home: not by permissions, which the superuser passes.
        assets.write_text("in the way")
    else:
        monkeypatch.setattr("finetuning.data.length_cache.pq.write_table", full_disk)
    assert start(data).lengths == lengths_of(data)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ")
    assert "lengths cannot be kept for the next start (" in line
    assert not [path for path in assets.rglob("*") if path.is_file()]


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_two_runs_at_once_leave_a_whole_file(tmp_path):
    path, count = tmp_path / "lengths.parquet", 20_000
    failed = []

    def write(shift: int) -> None:
        keys = np.arange(count, dtype=np.uint64) * 2
        for _ in range(10):
            LengthCache(path).write(keys, np.full(count, shift, np.int32))
            found = LengthCache(path)
            if found.damage or len(set(found.find(keys).tolist())) != 1:
                failed.append(found.damage)

    threads = [threading.Thread(target=write, args=(shift,)) for shift in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_write_that_does_not_end_leaves_the_file_as_it_was(data, assets, monkeypatch):
    start(data)
    path = the_file(assets)
    whole = path.read_bytes()
    edit(data, 3, answer="another")
    monkeypatch.setattr("finetuning.data.length_cache.os.replace", full_disk)
    start(data)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_the_splits_and_folders_keep_files_of_their_own():
    names = {cache_file(PROCESSOR, folder, split) for folder in ("a", "b") for split in ("train", "eval")}
    assert len(names) == 4


# ---- --check


def test_check_none_opens_no_picture_and_knows_the_same_rows(data, opened):
    built = start(data, check="none")
    assert opened == []
    assert len(set(built.lengths)) == 1
    everything = start(data)
    assert built.fingerprints == everything.fingerprints
    opened.clear()
    # What is known by now is used.
    assert start(data, check="none").lengths == everything.lengths
    assert opened == []


def test_check_sample_opens_some(data, opened, monkeypatch):
    monkeypatch.setattr(dataset_module, "SAMPLED_ROWS", 3)
    built = start(data, check="sample")
    assert len(opened) == 3
    expected = lengths_of(data)
    right = [number for number in range(ROWS) if built.lengths[number] == expected[number]]
    assert {int(name.split(".")[0]) for name in opened} <= set(right)
    again = start(data, check="sample")
    assert len(opened) == 3
    assert again.lengths == built.lengths


def test_a_bad_picture_that_was_not_checked_is_met_in_training(data):
    (data / "3.png").write_bytes(b"no picture")
    with pytest.raises(InputError) as told:
        start(data)
    built = start(data, check="none")
    with pytest.raises(InputError) as met:
        built[3]
    assert str(told.value) == f"{data}/train.jsonl:4: {met.value}"


@pytest.mark.parametrize("check", ["all", "sample", "none"])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"answer": ""}, "sample r3, turn 1: answers[0]: expected text"),
        ({"image": "../x.png"}, "sample r3: image: expected an image path inside"),
        ({"image": "gone.png"}, "sample r3, turn 1: images[0]: "),
    ],
)
def test_fields_texts_and_paths_are_checked_always(data, check, change, found):
    edit(data, 3, **change)
    with pytest.raises(InputError) as caught:
        start(data, check=check)
    assert str(caught.value).startswith(f"{data}/train.jsonl:4: {found}")


# ---- blocks and rounds


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_blocks_keep_the_order_of_the_rows(monkeypatch, data, ranks):
    monkeypatch.setattr(dataset_module, "BLOCK", 1)
    monkeypatch.setattr(dataset_module, "BLOCKS", 2)
    for rank, built in enumerate(recipe.on_ranks(monkeypatch, MODULE, ranks, lambda _: start(data))):
        assert built.lengths == lengths_of(data)
        assert [known.id for known in built.fingerprints] == ([] if rank else [f"r{number}" for number in range(ROWS)])


def test_the_first_bad_row_ends_the_check_early(monkeypatch, data):
    monkeypatch.setattr(dataset_module, "BLOCK", 2)
    monkeypatch.setattr(dataset_module, "BLOCKS", 1)
    edit(data, 1, answer="")
    seen = []

    def noted(row):
        seen.append(row["id"])
        return to_conversation(row)

    with pytest.raises(InputError, match="train.jsonl:2: sample r1"):
        start(data, noted)
    assert "r2" not in seen


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_the_bad_picture_before_a_bad_text_is_told_first(data, mode):
    (data / "2.png").write_bytes(b"no picture")
    edit(data, 4, answer="")
    if mode == "stop":
        with pytest.raises(InputError, match=r"train.jsonl:3: sample r2, turn 1: images\[0\]"):
            start(data)
        return
    built = start(data, on_bad_row="skip", max_bad_rows=2)
    assert [row.index for row in built.bad_rows] == [2, 4]
    assert [row["id"] for row in built.rows] == ["r0", "r1", "r3", "r5", "r6"]
    assert built.lengths == [count_tokens(to_conversation(row), PROCESSOR) for row in built.rows]


def test_a_line_that_is_no_row_is_named_by_its_place(data):
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join([lines[0], "", "{broken", *lines[1:]]) + "\n")
    with pytest.raises(InputError, match=r"train.jsonl:3: expected a JSON object, found Expecting property name"):
        start(data)
    built = start(data, on_bad_row="skip", max_bad_rows=1)
    assert len(built) == ROWS
    [row] = built.bad_rows
    assert (row.where, row.index) == (f"{data}/train.jsonl:3", 1)


# ---- lines


@pytest.mark.parametrize("size", [1, 2, 3, 7, 2**22])
@pytest.mark.parametrize(
    "text",
    ["", "a", "a\n", "a\nb", "a\r\nb\r\n", "a\rb\r", "\n\na\n \nb\n\n", "a\r\r\nb", "é\n\u00a0\nüb\n", "{}\n\t{}\n", "\ufeffa\nb"],
)  # fmt: skip
def test_lines_are_those_of_a_text_file(tmp_path, monkeypatch, text, size):
    monkeypatch.setattr(lines_module, "BLOCK", size)
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.encode())
    with open(path, encoding="utf-8") as file:
        expected = [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]
    found = Lines(path)
    assert [(number, line.strip()) for number, line in found] == expected
    assert len(found) == len(expected)
    assert [(number, line.strip()) for number, line in pickle.loads(pickle.dumps(found))] == expected


def test_a_file_that_is_changed_in_place_is_refused_and_one_that_is_replaced_stays(data):
    rows, _ = read_splits(data)
    before = list(rows)
    edit_aside = data / "aside"
    edit_aside.write_text((data / "train.jsonl").read_text().replace("What?", "Which?"))
    copied = pickle.loads(pickle.dumps(rows))
    edit_aside.replace(data / "train.jsonl")
    assert list(rows) == before
    with pytest.raises(InputError, match=r"train.jsonl:1: expected the file as it was at the start, found it changed"):
        copied[0]
    rows, _ = read_splits(data)
    with open(data / "train.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(InputError, match=r"train.jsonl:3: expected the file as it was at the start, found it changed"):
        rows[2]


def test_rows_are_taken_by_number_and_slice(data):
    rows, _ = read_splits(data)
    names = [row["id"] for row in rows]
    assert rows[-1]["id"] == names[-1]
    assert [row["id"] for row in rows[1:6:2]] == names[1:6:2]
    assert [row["id"] for row in rows[2:].select([0, 3])] == [names[2], names[5]]
    with pytest.raises(IndexError):
        rows[ROWS]
    assert rows[3].where == f"{data}/train.jsonl:4"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_splits_are_found_by_all_ranks_together(tmp_path, monkeypatch, ranks):
    names = ["test", "train", "val", "train", "train", "test", "val"]
    for number, part in enumerate((names[:4], names[4:])):
        recipe.write_jsonl(tmp_path / f"rows{number}.jsonl", [{"n": n, "split": s} for n, s in enumerate(part)])
    args = SimpleNamespace(data_dir=str(tmp_path), do_train=True, eval_split=None)
    for train, test in recipe.on_ranks(
        monkeypatch, "finetuning.data.reading", ranks, lambda _: load_folder(args, ["test"])
    ):
        assert [row.where.removeprefix(f"{tmp_path}/") for row in train] == [
            "rows0.jsonl:2",
            "rows0.jsonl:4",
            "rows1.jsonl:1",
        ]
        assert [row["n"] for row in test] == [0, 1]
    recipe.write_jsonl(tmp_path / "rows1.jsonl", [{"split": "test"}, {"n": 0}, {"split": "test"}, {"split": 7}])
    outcomes = recipe.on_ranks(monkeypatch, "finetuning.data.reading", ranks, lambda _: load_folder(args, ["test"]))
    assert {str(error) for error in outcomes} == {
        f"{tmp_path}/rows1.jsonl:2: split: expected the name of a split, such as train or test, found null"
    }


def test_the_fingerprints_are_those_of_the_rows(data):
    rows, _ = read_splits(data)
    assert start(data).fingerprints == [fingerprint(to_conversation(row), str(data)) for row in rows]
