"""Several saved models beside each other: each answers as it does alone, and a base is in memory once."""

import json
import shutil

import pytest
import recipe
import saved
import tiny
import torch
from peft import PeftModel

from finetuning.results.chat import Chat
from finetuning.training.loading import open_model, read_processor
from finetuning.training.saved import find_saved
from finetuning.training.several import Loading, open_several

own_process = pytest.fixture(autouse=True)(recipe.own_process)
CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path):
    """A base, two adapters over it of other ranks, and a model of its own."""
    base = recipe.model_folder(tmp_path / "base")
    first = saved.adapter_folder(base, tmp_path / "first", scale=0.2)
    second = saved.adapter_folder(base, tmp_path / "second", "--lora_rank", "8", "--freeze_vision_model", scale=0.3)
    return [base, first, second, recipe.model_folder(tmp_path / "other", seed=1)]


def loading(folder, dtype=torch.float32) -> Loading:
    return Loading(find_saved(str(folder)), dtype, False)


def answer(model, processor, dtype) -> str:
    return Chat(model, processor, dtype, 8).ask("What is it?", [tiny.picture(60, 40)]).text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_answers_as_it_does_alone_whichever_was_asked_before(folders, dtype):
    alone = []
    for folder in folders:
        found = find_saved(str(folder))
        alone.append(answer(open_model(found, dtype, False, CPU), read_processor(found), dtype))
    assert len(set(alone)) == 4
    opened = open_several([loading(folder, dtype) for folder in folders], CPU)
    assert [item.copy for item in opened] == [0, 0, 0, 1]
    assert opened[0].model is opened[1].model is opened[2].model
    for number in (0, 1, 2, 3, 1, 0, 2, 1, 3, 0):
        with opened[number].ready() as model:
            assert isinstance(model, PeftModel) == (number in (1, 2))
            assert answer(model, opened[number].processor, dtype) == alone[number], number


def test_a_base_comes_after_its_adapter_or_not_at_all(folders):
    opened = open_several([loading(folders[1]), loading(folders[0])], CPU)
    assert [item.copy for item in opened] == [0, 0]
    assert [item.adapter for item in opened] == ["adapter_0", None]
    assert open_several([loading(folders[2])], CPU)[0].adapter == "adapter_0"


@pytest.mark.parametrize("change", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_changes_the_base_itself_shares_none(folders, tmp_path, change):
    shutil.copytree(folders[1], tmp_path / "changing")
    path = tmp_path / "changing" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    opened = open_several([loading(folder) for folder in (folders[0], tmp_path / "changing", folders[2])], CPU)
    assert [item.copy for item in opened] == [0, 1, 0]


def test_an_adapter_with_parts_that_were_trained_in_full_shares_none(folders, tmp_path):
    full = saved.adapter_folder(folders[0], tmp_path / "full", "--projector", "full", "--vision", "frozen", scale=0.2)
    found = find_saved(str(full))
    alone = answer(open_model(found, torch.float32, False, CPU), read_processor(found), torch.float32)
    opened = open_several([loading(folder) for folder in (folders[0], full, folders[2])], CPU)
    assert [item.copy for item in opened] == [0, 1, 0]
    with opened[1].ready() as model:
        assert answer(model, opened[1].processor, torch.float32) == alone


def test_another_dtype_is_another_copy(folders):
    opened = open_several([loading(folders[0]), loading(folders[1], torch.bfloat16)], CPU)
    assert [item.copy for item in opened] == [0, 1]
