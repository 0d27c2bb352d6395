"""A checkpoint is gone on from only if it is whole and of the run's kind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from finetuning.checkpoint import check_checkpoint
from finetuning.errors import InputError


@pytest.fixture
def checkpoint(tmp_path):
    """Of a full run, its weights in two files."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    save_file({"a": torch.zeros(3)}, folder / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(3)}, folder / "adapter_model.safetensors")
    return folder


def test_a_whole_checkpoint_is_taken(checkpoint, adapter):
    check_checkpoint(checkpoint, adapter=False)
    check_checkpoint(adapter, adapter=True)


def test_weights_in_one_file_are_taken(checkpoint):
    (checkpoint / "model.safetensors.index.json").unlink()
    shutil.move(checkpoint / "model-1.safetensors", checkpoint / "model.safetensors")
    check_checkpoint(checkpoint, adapter=False)


def test_the_other_kind_of_weights_is_refused(checkpoint, adapter):
    with pytest.raises(InputError, match="expected an adapter, .* found the weights of a whole model"):
        check_checkpoint(checkpoint, adapter=True)
    with pytest.raises(InputError, match="expected the weights of a whole model, .* found an adapter"):
        check_checkpoint(adapter, adapter=False)


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors.index.json", "model-2.safetensors"])
@pytest.mark.parametrize("left", [None, 0, 0.5, 0.99], ids=["missing", "empty", "half", "cut"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_refused(checkpoint, name, left):
    path = checkpoint / name
    content = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(InputError, match="written to its end") as caught:
        check_checkpoint(checkpoint, adapter=False)
    assert str(checkpoint) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
