"""`validate` reads what the script for one's own data reads: the same forms, columns and faults; and converts them."""

import json
import re
from pathlib import Path

import own_inputs
import pytest
import tiny
from own_inputs import BAD_INPUTS, INPUTS, PAGES

from finetuning import validate

# Of the script's own flags, or of what it draws.
NOT_OF_VALIDATE = ("--data_dir PATH", "argument --metric", "--eval_share", "--eval_split", "expected files of one kind", "pages.csv: no test split")  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.processor().save_pretrained(folder)
    return str(folder)


def flags_of(flags: list[str]) -> list[str]:
    """The path and the columns of the script's flags."""
    columns = [word for word in flags if re.fullmatch(r"\w+=\w+", word)]
    return [flags[1], *(["--columns", *columns] if columns else [])]


@pytest.mark.parametrize("name", INPUTS)
def test_every_form_is_clean_and_becomes_native(name, tmp_path, model, capsys):
    flags, out = flags_of(INPUTS[name](tmp_path / "data")), tmp_path / "out"
    assert validate.main([*flags, "--model_name_or_path", model, "--convert", str(out)]) == 0, capsys.readouterr().out
    rows = [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()]
    shown = {}
    for row in rows:
        [turn] = row["conversations"]
        [picture] = turn["images"]
        shown[(out / "images" / picture).read_bytes()] = turn["assistant"]
    assert shown == {own_inputs.picture(number): own_inputs.answer(number) for number in range(PAGES)}
    names = {path.name for path in out.glob("*.jsonl")}
    assert names <= {"converted_train.jsonl", "converted_test.jsonl", "converted_val.jsonl"}


@pytest.mark.parametrize(
    "bad", [bad for bad in BAD_INPUTS if not bad.expected.startswith(NOT_OF_VALIDATE)], ids=lambda bad: bad.name
)
def test_a_bad_input_gets_the_line_of_training(bad, tmp_path, model, capsys):
    if bad.name == "no such path":
        expected = "none.csv: expected a folder or a file, found no such path"
    else:
        expected = re.sub(r"^\S+\.\w+(:\d+|, row \d+)?: ", "", bad.expected)
    flags = flags_of(bad.write(tmp_path / "data"))
    assert validate.main([*flags, "--model_name_or_path", model, "--all"]) == 2
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if expected in line]
    assert len(lines) == 1, printed
    assert Path(flags[0]).name in lines[0] or lines[0].startswith("error: --columns") or "--columns" in expected


def test_a_task_of_its_own_is_the_same(tmp_path, model, capsys):
    flags = flags_of(INPUTS["csv"](tmp_path / "data"))
    assert validate.main([*flags, "--task", "own_data", "--model_name_or_path", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["samples"] == PAGES
