"""Each folder of bad_rows.py gets one line that names file, line and field: from what training reads, and from validate."""

import importlib
import re
from types import SimpleNamespace

import pytest
import tiny
from bad_rows import BAD_FOLDERS, BAD_ROWS, IMAGES, BadRow, write_folder

from finetuning import validate
from finetuning.data.conversation import check_conversation, check_unique_ids, control_tokens
from finetuning.data.images import image_sizes
from finetuning.data.reading import where
from finetuning.errors import InputError


def check_as_training_does(folder, task: str) -> None:
    """What a data set checks of its rows before a model is loaded."""
    script = importlib.import_module(f"finetune_hf_trainer_{task}")
    control = control_tokens(tiny.processor().tokenizer)
    for rows in script.load_splits(
        SimpleNamespace(data_dir=str(folder), eval_split=None, full_train=False, do_train=True)
    ):
        conversations = []
        for index, row in enumerate(rows):
            try:
                conversations.append(script.to_conversation(row))
                check_conversation(conversations[-1], control)
                image_sizes(conversations[-1])
            except InputError as error:
                raise InputError(f"{where(row, index)}: {error}") from None
        check_unique_ids((item.id for item in conversations), lambda index, rows=rows: where(rows[index], index))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.processor().save_pretrained(folder)
    return str(folder)


def named(bad: BadRow) -> str:
    return bad.name


@pytest.mark.parametrize("bad", [*BAD_ROWS, *BAD_FOLDERS], ids=named)
def test_training_says_it_in_one_line(bad, tmp_path):
    bad.write(tmp_path / "data")
    with pytest.raises(InputError) as caught:
        check_as_training_does(tmp_path / "data", bad.task)
    line = str(caught.value)
    assert bad.expected in line
    assert line.isprintable()
    assert len(line) < 700
    if bad in BAD_ROWS:
        assert re.match(rf"{tmp_path}/data/\w+\.jsonl:3: ", line)


@pytest.mark.parametrize("bad", BAD_ROWS, ids=named)
def test_validate_says_the_same(bad, tmp_path, model, capsys):
    bad.write(tmp_path / "data")
    status = validate.main([str(tmp_path / "data"), "--task", bad.task, "--model_name_or_path", model, "--all"])
    printed = capsys.readouterr().out
    assert status == 2
    [line] = [line for line in printed.splitlines() if line.startswith(f"{tmp_path}/data/") and ".jsonl:3: " in line]
    assert bad.expected.removeprefix("rows.jsonl:3: ") in line


@pytest.mark.parametrize("task", IMAGES)
def test_the_folders_are_good_but_for_their_fault(task, tmp_path, model, capsys):
    from bad_rows import good_row

    write_folder(tmp_path / "data", task, [good_row(task, number) for number in range(4)])
    check_as_training_does(tmp_path / "data", task)
    validate.main([str(tmp_path / "data"), "--task", task, "--model_name_or_path", model, "--all"])
    # the same images are in both splits
    faults = [line for line in capsys.readouterr().out.splitlines() if ".jsonl:" in line]
    assert all("images that train does not hold" in line for line in faults)


def test_there_are_enough_of_them_and_no_name_is_used_twice():
    names = [bad.name for bad in (*BAD_ROWS, *BAD_FOLDERS)]
    assert len(names) == len(set(names)) >= 60
