"""Checkpoints prove that they are whole: a manifest written last, shared by the ranks; and nothing in them is run."""

import json
import os
import stat
import subprocess
import sys

import pytest
import recipe
import torch
from safetensors.torch import save_file

from finetuning.errors import InputError
from finetuning.training import checkpoint as module
from finetuning.training.checkpoint import (
    Damaged,
    check_checkpoint,
    final_files,
    find_checkpoints,
    find_damage,
    read_manifest,
    seal,
)

MODULE = "finetuning.training.checkpoint"

own_process = pytest.fixture(autouse=True)(recipe.own_process)


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
    (folder / "global_step2").mkdir()
    (folder / "global_step2" / "states.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(3)}, folder / "adapter_model.safetensors")
    torch.save({"state": {0: torch.zeros(3)}}, folder / "optimizer.pt")
    return folder


# ---- the seal

FACTS = {"step": 2, "identity": "abc"}


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_sealed_folder_lists_all_its_files(checkpoint):
    before = files(checkpoint)
    seal(checkpoint, FACTS)
    manifest = read_manifest(checkpoint)
    assert {"step": manifest["step"], "identity": manifest["identity"]} == FACTS
    assert set(manifest["files"]) == before
    assert manifest["files"]["trainer_state.json"]["size"] == len('{"global_step": 2}')
    assert files(checkpoint) == before | {"manifest.json"}
    assert find_damage(checkpoint) is None


def test_sealing_again_takes_what_is_there_now(checkpoint):
    seal(checkpoint, FACTS)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    assert "trainer_state.json is damaged" in find_damage(checkpoint)
    seal(checkpoint, FACTS)
    assert find_damage(checkpoint) is None
    assert "manifest.json" not in read_manifest(checkpoint)["files"]


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_the_ranks_share_the_work_and_agree(checkpoint, monkeypatch, ranks):
    seal(checkpoint, FACTS)
    alone = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").unlink()
    measured, measure = [], module._measure
    monkeypatch.setattr(module, "_measure", lambda path, **options: measured.append(path) or measure(path, **options))
    assert recipe.on_ranks(monkeypatch, MODULE, ranks, lambda _: seal(checkpoint, FACTS)) == [None] * ranks
    assert (checkpoint / "manifest.json").read_text() == alone
    # each file was read by one rank
    assert sorted(str(path.relative_to(checkpoint)) for path in measured) == sorted(read_manifest(checkpoint)["files"])
    assert recipe.on_ranks(monkeypatch, MODULE, ranks, lambda _: find_damage(checkpoint)) == [None] * ranks
    assert len(measured) == 2 * len(read_manifest(checkpoint)["files"])
    for name in ("optimizer.pt", "model-2.safetensors"):
        (checkpoint / name).write_bytes(b"")
    found = recipe.on_ranks(monkeypatch, MODULE, ranks, lambda _: find_damage(checkpoint))
    assert len(set(found)) == 1
    assert found[0].startswith("model-2.safetensors is damaged (0 bytes instead of ")


def test_the_manifest_is_written_last(checkpoint, monkeypatch):
    seen, sync = [], module._sync
    monkeypatch.setattr(module, "_sync", lambda path: seen.append((path.name, files(checkpoint))) or sync(path))
    written, measure = [], module._measure
    monkeypatch.setattr(
        module, "_measure", lambda path, through=False: written.append((path.name, through)) or measure(path, through)
    )
    seal(checkpoint, FACTS)
    assert all(through for _, through in written)
    # under its name only after its content has reached the disk
    assert [name for name, _ in seen] == ["manifest.json.part", "checkpoint-2", checkpoint.parent.name]
    assert "manifest.json" not in seen[0][1]
    assert "manifest.json" in seen[1][1]


def test_large_files_are_read_in_pieces(tmp_path):
    content = os.urandom((1 << 24) + 7)
    (tmp_path / "large").write_bytes(content)
    size, checksum = module._measure(tmp_path / "large")
    assert size == len(content)
    assert checksum == module.xxhash.xxh3_128_hexdigest(content)


def test_checkpoints_are_found_newest_first(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "damaged-checkpoint-200", "checkpoint-x", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert find_checkpoints(tmp_path / "other") == []


def test_the_final_files_are_those_that_make_a_model(tmp_path):
    kept = {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "trainer_state.json"}
    for name in kept | {"run.json", "eval_before.json", "predictions.jsonl", "notes.txt", "curves.png"}:
        (tmp_path / name).write_text("")
    (tmp_path / "tokenizer").mkdir()
    assert {path.name for path in final_files(tmp_path)} == kept


# ---- permissions


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_have_the_permissions_that_the_umask_allows(checkpoint, monkeypatch):
    (checkpoint / "model-1.safetensors").chmod(0o600)  # as safetensors writes it
    for umask in (0o022, 0o027, 0o002):
        monkeypatch.setattr(module, "UMASK", umask)
        seal(checkpoint, FACTS)
        found = {name: mode(checkpoint / name) for name in read_manifest(checkpoint)["files"]}
        assert set(found.values()) == {0o666 & ~umask}, found


def test_the_umask_is_the_one_that_the_process_was_started_with():
    code = "import os; os.umask(0o037); from finetuning.training import checkpoint as c; print(oct(c.UMASK), oct(os.umask(0)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=recipe.ROOT)
    assert found.stdout.split() == ["0o37", "0o37"]


# ---- of which kind it is


def test_a_whole_checkpoint_is_taken(checkpoint, adapter):
    check_checkpoint(checkpoint, adapter=False)
    check_checkpoint(adapter, adapter=True)


def test_the_other_kind_of_weights_is_refused(checkpoint, adapter):
    with pytest.raises(InputError, match="expected an adapter, .* found the weights of a whole model"):
        check_checkpoint(checkpoint, adapter=True)
    with pytest.raises(InputError, match="expected the weights of a whole model, .* found an adapter"):
        check_checkpoint(adapter, adapter=False)


@pytest.mark.parametrize("layout", ["torch", "DeepSpeed"])
def test_a_checkpoint_without_optimizer_states_is_refused(checkpoint, layout):
    (checkpoint / "optimizer.pt").unlink()
    if layout == "DeepSpeed":
        (checkpoint / "latest").write_text("global_step2\n")
    with pytest.raises(InputError, match="expected optimizer states, found none: .*--save_only_model"):
        check_checkpoint(checkpoint, adapter=False)
    if layout == "DeepSpeed":
        torch.save({}, checkpoint / "global_step2" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
        check_checkpoint(checkpoint, adapter=False)


# ---- nothing in it is run


class Harmful:
    """Pickled, it would print when it is loaded."""

    def __reduce__(self):
        return print, ("code of a checkpoint ran",)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "rng_state.pth", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"]
)
def test_a_pickle_that_would_run_code_is_refused(checkpoint, name, capsys):
    torch.save({"state": Harmful()}, checkpoint / name)
    with pytest.raises(InputError, match=r"expected tensors, found a pickle of .*print"):
        check_checkpoint(checkpoint, adapter=False)
    assert "ran" not in capsys.readouterr().out


def test_a_file_that_is_no_pickle_is_damaged(checkpoint):
    (checkpoint / "optimizer.pt").write_bytes(b"no tensors")
    with pytest.raises(Damaged, match=r"optimizer.pt: expected tensors, found") as caught:
        check_checkpoint(checkpoint, adapter=False)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../elsewhere", "link"])
def test_deepspeed_reads_nothing_outside_the_checkpoint(checkpoint, name):
    outside = checkpoint.parent / "elsewhere"
    outside.mkdir()
    torch.save({"state": Harmful()}, outside / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (checkpoint / "link").symlink_to(outside)
    (checkpoint / "latest").write_text(name)
    with pytest.raises(InputError, match="expected a folder of this checkpoint"):
        check_checkpoint(checkpoint, adapter=False)
