"""A checkpoint is gone on from only if it is whole and of the run's kind."""

import json
import shutil

import pytest
import recipe
import torch
from safetensors.torch import save_file

from finetuning.data.dataset import ConversationDataset
from finetuning.errors import InputError
from finetuning.training.checkpoint import begin, check_checkpoint


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
    torch.save({"state": {0: torch.zeros(3)}}, folder / "optimizer.pt")
    return folder


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(3)}, folder / "adapter_model.safetensors")
    torch.save({"state": {0: torch.zeros(3)}}, folder / "optimizer.pt")
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


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors.index.json", "model-2.safetensors", "optimizer.pt"]
)
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


# ---- where a run begins


class Harmful:
    """Pickled, it would write a file when it is loaded."""

    def __reduce__(self):
        return print, ("code of a checkpoint ran",)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "rng_state.pth", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"]
)
def test_a_pickle_that_would_run_code_is_refused(checkpoint, name, capsys):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    torch.save({"state": Harmful()}, checkpoint / name)
    with pytest.raises(InputError, match=r"expected tensors, found a pickle of .*print"):
        check_checkpoint(checkpoint, adapter=False)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../elsewhere", "link"])
def test_deepspeed_reads_nothing_outside_the_checkpoint(checkpoint, name):
    outside = checkpoint.parent / "elsewhere"
    outside.mkdir()
    torch.save({"state": Harmful()}, outside / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (checkpoint / "link").symlink_to(outside)
    (checkpoint / "latest").write_text(name)
    with pytest.raises(InputError, match="expected a folder of this checkpoint"):
        check_checkpoint(checkpoint, adapter=False)


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    yield from recipe.own_process(tmp_path, monkeypatch)


@pytest.fixture
def start(tmp_path):
    """`start("--seed", "1")`: what `begin` settles for these flags; the run's folder is output/."""
    folder = recipe.model_folder(tmp_path / "model")
    rows = [{"id": f"r{number}"} for number in range(4)]

    def begin_run(*flags, train=rows, answer=rows[:2]):
        args = recipe.arguments(folder, "--use_lora", *flags)
        datasets = [ConversationDataset(found, None, None) for found in (train, answer)]
        begin(args, *datasets)
        return args.resume_from_checkpoint

    return begin_run


def leave(output, *steps, report=False):
    """What a LoRA run has left in its folder."""
    for step in steps:
        folder = output / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "adapter_config.json").write_text("{}")
        save_file({"a": torch.zeros(3)}, folder / "adapter_model.safetensors")
        torch.save({}, folder / "optimizer.pt")
        shutil.copy(output / "run.json", folder / "run.json")
    items = [{"stage": stage, "id": "r0", "answer": "x"} for stage in ("before", "after")]
    recipe.write_jsonl(output / "predictions.jsonl", items)
    for stage in ("before", "after"):
        (output / f"eval_{stage}.json").write_text("{}")
    if report:
        (output / "report.html").write_text("")


def stages(output) -> list[str]:
    return [json.loads(line)["stage"] for line in (output / "predictions.jsonl").read_text().splitlines()]


def test_a_new_folder_is_begun(start, tmp_path):
    assert start() is None
    assert json.loads((tmp_path / "output" / "run.json").read_text())["seed"] == "42"


def test_the_same_command_goes_on_from_the_newest_checkpoint(start, tmp_path, capsys):
    start()
    leave(tmp_path / "output", 5, 10)
    assert start().endswith("checkpoint-10")
    assert "going on from" in capsys.readouterr().out
    assert stages(tmp_path / "output") == ["before", "after"]


def test_a_checkpoint_that_is_cut_short_is_skipped_and_named(start, tmp_path, capsys):
    start()
    leave(tmp_path / "output", 5, 10)
    path = tmp_path / "output" / "checkpoint-10" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "output" / ".saving" / "checkpoint-12").mkdir(parents=True)
    assert start().endswith("checkpoint-5")
    assert "checkpoint-10: expected a checkpoint that was written to its end" in capsys.readouterr().out
    # --save_total_limit no longer counts it, and what was answered from it does not hold
    names = {found.name for found in (tmp_path / "output").iterdir()}
    assert {"checkpoint-5", "unfinished-checkpoint-10"} <= names
    assert not {"checkpoint-10", ".saving", "eval_after.json"} & names
    assert stages(tmp_path / "output") == ["before"]


def test_a_finished_run_says_so_and_ends(start, tmp_path, capsys):
    start()
    leave(tmp_path / "output", 10, report=True)
    with pytest.raises(SystemExit) as ended:
        start()
    assert not ended.value.code
    assert "this run is finished" in capsys.readouterr().out


def test_a_finished_run_can_be_asked_something_else(start, tmp_path, capsys):
    start()
    leave(tmp_path / "output", 10, report=True)
    assert start(answer=[{"id": "other"}]).endswith("checkpoint-10")
    assert "changed: rows to answer" in capsys.readouterr().out
    assert stages(tmp_path / "output") == []


def test_overwriting_starts_afresh(start, tmp_path):
    start()
    leave(tmp_path / "output", 5, 10, report=True)
    assert start("--overwrite_output_dir") is None
    names = {found.name for found in (tmp_path / "output").iterdir()}
    assert not {"checkpoint-5", "checkpoint-10", "report.html", "eval_before.json", "eval_after.json"} & names
    assert stages(tmp_path / "output") == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--learning_rate", "1e-3"], "learning_rate 0.001 instead of 4e-05"),
        (["--batch_size", "8"], "batch_size 8 instead of 16"),
        (["--freeze_vision_model"], "LoRA with frozen vision instead of LoRA"),
        (["--num_train_epochs", "2"], "num_train_epochs 2.0 instead of 1"),
        (["--bf16"], "bfloat16"),
    ],
)
@pytest.mark.parametrize("report", [True, False], ids=["finished", "unfinished"])
def test_other_settings_are_another_run(start, tmp_path, flags, named, report):
    start()
    leave(tmp_path / "output", 5, report=report)
    with pytest.raises(InputError, match=named) as caught:
        start(*flags)
    assert "--overwrite_output_dir" in str(caught.value)
    assert stages(tmp_path / "output") == ["before", "after"]


def test_other_data_are_another_run(start, tmp_path):
    start()
    leave(tmp_path / "output", 5)
    with pytest.raises(InputError, match="rows to train on 1 with ids"):
        start(train=[{"id": "r0"}])


def test_the_micro_batch_may_change(start, tmp_path, capsys):
    start()
    leave(tmp_path / "output", 5)
    assert start("--batch_size_per_gpu", "4").endswith("checkpoint-5")
    assert "changed: batch_size_per_gpu 4 instead of 1" in capsys.readouterr().out


def test_without_a_checkpoint_other_settings_begin_anew(start, tmp_path):
    start()
    leave(tmp_path / "output")
    assert start("--learning_rate", "1e-3") is None
    assert stages(tmp_path / "output") == []
    assert start("--learning_rate", "1e-3") is None


def test_checkpoints_of_weights_alone_are_left_where_they_are(start, tmp_path):
    start("--save_only_model")
    leave(tmp_path / "output", 5)
    with pytest.raises(InputError, match="--save_only_model"):
        start("--save_only_model")
    assert (tmp_path / "output" / "checkpoint-5").is_dir()


def test_a_named_checkpoint_is_taken(start, tmp_path):
    start()
    leave(tmp_path / "output", 5, 10, report=True)
    assert start("--resume_from_checkpoint", "output/checkpoint-5").endswith("checkpoint-5")
    assert stages(tmp_path / "output") == ["before"]
    with pytest.raises(InputError, match="expected a whole checkpoint-N"):
        start("--resume_from_checkpoint", "--output_dir", "another")
