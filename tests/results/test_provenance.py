"""What a report says a run was made with: its command without secrets, the settings that were chosen."""

import sys

import pytest
import recipe

from finetuning.results.provenance import command, versions

own_process = pytest.fixture(autouse=True)(recipe.own_process)


def test_the_command_leaves_secrets_out(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "argv", ["my_task.py", "--hub_token", "hf_x", "--seed", "3", "--hub_token=hf_y"])
    assert command() == ["python", "my_task.py", "--seed", "3"]


def test_the_command_of_torchrun_says_processes_and_nodes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my_task.py", "--use_lora"])
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert command() == ["torchrun", "--nproc_per_node=4", "my_task.py", "--use_lora"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert command()[:3] == ["torchrun", "--nproc_per_node=4", "--nnodes=2"]


def test_a_library_that_is_not_there_has_no_version():
    assert versions(["torch", "no-such-library"]).keys() == {"python", "torch"}


def test_settings_that_were_chosen_go_by_their_published_names(tmp_path):
    folder = recipe.model_folder(tmp_path / "model")
    args = recipe.arguments(folder, "--batch_size_per_gpu", "2", "--seed", "42", "--hub_token", "hf_x")
    assert args.changed == {
        "model_name_or_path": str(folder), "num_crops": 2, "no-tqdm": True, "output_dir": "output", "batch_size_per_gpu": 2,
    }  # fmt: skip
