"""Parquet files as --data_dir: the same rows, samples and faults as of jsonl, by file and row; pictures inside or beside the file."""

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import recipe
import tiny

import finetune_hf_trainer_docvqa as docvqa
from finetuning.data.dataset import build_dataset
from finetuning.data.reading import load_folder, read_splits
from finetuning.errors import InputError

own_process = pytest.fixture(autouse=True)(recipe.own_process)
datasets = pytest.importorskip("datasets")

PROCESSOR = tiny.processor()
ROWS = 5


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of data sets for each test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    tiny.picture(30 + 28 * (number % 3), 20, seed=number).save(buffer, "PNG")
    return buffer.getvalue()


def question(number: int, inside: bool) -> dict:
    image = {"bytes": picture(number), "path": None} if inside else {"bytes": None, "path": f"images/{number}.png"}
    return {"id": f"r{number}", "image": image, "query": {"en": "What?"}, "answers": ["a" * (1 + number)]}


def write(path: Path, rows: list[dict], declared: bool = False) -> Path:
    """A Parquet file, its images a plain struct or declared as the hub's image feature."""
    path.parent.mkdir(exist_ok=True)
    if declared:
        found = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
        found.cast_column("image", datasets.Image()).to_parquet(path)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def start(data: Path, **changes):
    values = {"on_bad_row": "stop", "max_bad_rows": None, "eval_size": None, "data_dir": str(data), "do_train": True}
    values |= {"max_length": None, "seed": 0, "eval_split": None, "check": "all", **changes}
    args = SimpleNamespace(**values)
    rows = load_folder(args, ["test"])
    return [build_dataset(of, docvqa.to_conversation, PROCESSOR, args, split) for of, split in zip(rows, ("train", "eval"), strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    ("inside", "declared"), [(True, False), (True, True), (False, False)], ids=["bytes", "the hub's feature", "paths"]
)
def test_samples_are_those_of_jsonl(tmp_path, inside, declared):
    data, lines = tmp_path / "data", tmp_path / "lines"
    rows = [question(number, inside) for number in range(ROWS)]
    for folder in (data, lines):
        (folder / "images").mkdir(parents=True)
        for number in range(ROWS):
            (folder / "images" / f"{number}.png").write_bytes(picture(number))
    write(data / "train.parquet", rows, declared)
    write(data / "test.parquet", rows[:2], declared)
    plain = [{**row, "image": f"images/{number}.png"} for number, row in enumerate(rows)]
    recipe.write_jsonl(lines / "train.jsonl", plain)
    recipe.write_jsonl(lines / "test.jsonl", plain[:2])
    for found, expected in zip(start(data), start(lines), strict=True):
        assert len(found) == len(expected)
        assert found.lengths == expected.lengths
        for number in range(len(found)):
            one, other = found[number], expected[number]
            assert one["input_ids"] == other["input_ids"]
            assert one["labels"] == other["labels"]
            assert one["pixel_values"].equal(other["pixel_values"])


def test_a_converted_row_holds_pictures_in_its_turns(tmp_path):
    first = {"images": [{"bytes": picture(0), "path": "p.png"}], "user": "What?", "assistant": ["a"]}
    turns = [first, {"images": None, "user": "And?", "assistant": ["b"]}]
    for name in ("train", "test"):
        write(tmp_path / f"{name}.parquet", [{"id": "r", "conversations": turns}])
    [built, _] = start(tmp_path)
    assert built[0]["image_sizes"].shape == (1, 2)


def test_splits_by_a_column_by_name_and_by_the_hubs_parts(tmp_path):
    rows = [question(number, True) for number in range(ROWS)]
    one, named, parts, both = (tmp_path / name for name in ("one", "named", "parts", "both"))
    write(
        one / "rows.parquet", [{**row, "split": "test" if number == 1 else "train"} for number, row in enumerate(rows)]
    )
    write(named / "pages_train.parquet", rows[:3])
    write(named / "pages_test.parquet", rows[3:])
    write(parts / "train-00000-of-00002.parquet", rows[:2])
    write(parts / "train-00001-of-00002.parquet", rows[2:4])
    write(parts / "test-00000-of-00001.parquet", rows[4:])
    write(both / "train.parquet", rows[:2])
    recipe.write_jsonl(both / "test.jsonl", [{"id": "x"}])

    def names(folder: Path) -> list[list[str]]:
        return [[row["id"] for row in rows] for rows in read_splits(folder)]

    assert names(one) == [["r0", "r2", "r3", "r4"], ["r1"]]
    assert names(named) == [["r0", "r1", "r2"], ["r3", "r4"]]
    assert names(parts) == [["r0", "r1", "r2", "r3"], ["r4"]]
    assert names(both) == [["r0", "r1"], ["x"]]
    assert read_splits(parts)[0][2].where == f"{parts}/train-00001-of-00002.parquet, row 1"
    recipe.write_jsonl(both / "train.jsonl", [{"id": "y"}])
    with pytest.raises(InputError, match=r"expected one file for the split train, found train.jsonl, train.parquet"):
        read_splits(both)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"query": {"en": None}}, "sample r3: query.en: expected text, found null"),
        ({"answers": []}, "sample r3: answers: expected a list with at least 1 item(s), found 0"),
        ({"image": None}, "sample r3: image: expected a picture"),
        ({"image": {"bytes": b"no picture", "path": "p.png"}}, "sample r3, turn 1: images[0]: p.png: expected a JPEG"),
        ({"image": {"bytes": None, "path": "../p.png"}}, "sample r3: image: expected an image path inside"),
        ({"image": {"bytes": None, "path": "gone.png"}}, "sample r3, turn 1: images[0]: "),
        ({"id": "r1"}, "sample r1: id: expected an id of its own, found that of "),
    ],
)
def test_a_fault_names_file_and_row(tmp_path, change, found):
    rows = [question(number, True) for number in range(ROWS)]
    write(tmp_path / "train.parquet", [*rows[:3], {**rows[3], **change}, rows[4]])
    write(tmp_path / "test.parquet", rows[:1])
    with pytest.raises(InputError) as caught:
        start(tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/train.parquet, row 4: {found}")
    assert len(line.splitlines()) == 1
    if "id" not in change:
        built, _ = start(tmp_path, on_bad_row="skip", max_bad_rows=1)
        assert [(row.index, row.where) for row in built.bad_rows] == [(3, f"{tmp_path}/train.parquet, row 4")]


@pytest.mark.parametrize("content", [b"", b"no Parquet at all", b"PAR1" * 20])
def test_a_file_that_is_no_parquet_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "train.parquet").write_bytes(content)
    write(tmp_path / "test.parquet", [question(0, True)])
    with pytest.raises(InputError, match=r"train.parquet: expected a Parquet file, found: ") as caught:
        read_splits(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_rows_that_have_changed_are_read_anew(tmp_path):
    rows = [question(number, True) for number in range(ROWS)]
    write(tmp_path / "test.parquet", rows[:1])
    before = start(write(tmp_path / "train.parquet", rows).parent)[0]
    same = start(tmp_path)[0]
    assert same.fingerprints == before.fingerprints
    rows[2]["image"]["bytes"] = picture(9)
    rows[3]["query"]["en"] = "Which?"
    # Of the same size and a second later, as the coarsest file systems tell time.
    status = (tmp_path / "train.parquet").stat()
    write(tmp_path / "train.parquet", rows)
    os.utime(tmp_path / "train.parquet", (status.st_atime + 1, status.st_mtime + 1))
    after = start(tmp_path)[0]
    for number, (known, found) in enumerate(zip(before.fingerprints, after.fingerprints, strict=True)):
        changed = {part for part in ("prompts", "answers", "pictures") if getattr(known, part) != getattr(found, part)}
        assert changed == {2: {"pictures"}, 3: {"prompts"}}.get(number, set())


def test_a_cache_that_cannot_be_written_breaks_no_run(tmp_path, cache, capsys):
    cache.write_text("in the way")
    for name in ("train", "test"):
        write(tmp_path / f"{name}.parquet", [question(0, True)])
    built, _ = start(tmp_path)
    assert len(built) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("train.parquet is copied for this run alone" in line for line in lines)
    assert json.dumps(built[0]["labels"])
