"""The published quick start, as printed, in an empty folder: the hub is one on the loopback, with a tiny model under the real name."""

import json
import os
import subprocess
import sys

import pytest
import recipe
from hub import Hub, cauldron, docvqa, folder_files
from launch import ROOT, environment, free_port

MODEL = "microsoft/Phi-3.5-vision-instruct"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    model = recipe.model_folder(tmp_path_factory.mktemp("model"))
    with Hub() as found:
        found.put(MODEL, folder_files(model))
        found.put("datasets/nielsr/docvqa_1200_examples", docvqa())
        rows = {"docvqa": 8, "nlvr2": 520, "hateful_memes": 520}
        found.put("datasets/HuggingFaceM4/the_cauldron", cauldron(rows))
        yield found


def torchrun(hub, folder, processes: int, script: str, *flags: str) -> subprocess.CompletedProcess:
    settings = {**environment(), "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    settings["NO_PROXY"] = settings["no_proxy"] = "127.0.0.1,localhost"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={free_port()}", str(ROOT / script), *flags]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True, timeout=280
    )


# What is added keeps 500 answers of a tiny model from taking minutes; neither command names a folder.
FEW = ["--eval_size", "4", "--max_new_tokens", "4", "--num_crops", "2"]


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """The folder in which two published commands were given, and what they said."""
    folder, said = tmp_path_factory.mktemp("published"), {}
    for processes, task in ((4, "docvqa"), (2, "nlvr2")):
        done = torchrun(hub, folder, processes, f"finetune_hf_trainer_{task}.py", *FEW)
        assert done.returncode == 0, done.stdout + done.stderr
        said[task] = done.stdout
    return folder, said


def test_two_published_commands_in_a_row_keep_both_results(hub, published):
    folder, said = published
    for task in ("docvqa", "nlvr2"):
        assert f"output           output/{task}\n" in said[task]
        assert (folder / "output" / task / "model.safetensors").exists()
        assert json.loads((folder / "output" / task / "eval_after.json").read_text())["num_answers"] >= 3
    again = torchrun(hub, folder, 2, "finetune_hf_trainer_docvqa.py", *FEW)
    assert again.returncode == 0, again.stderr
    assert "this run is finished" in again.stdout


def test_another_script_in_the_same_folder_is_named_in_words(hub, published):
    folder, _ = published
    second = torchrun(hub, folder, 2, "finetune_hf_trainer_nlvr2.py", *FEW, "--output_dir", "output/docvqa")
    (line,) = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert "--output_dir output/docvqa holds a finished run of finetune_hf_trainer_docvqa.py of " in line
    assert "more rows to train on" in line
    assert "SHA" not in line


@pytest.mark.slow
def test_a_loop_over_the_four_scripts_keeps_four_results(hub, tmp_path):
    images = tmp_path / "converted" / "images"
    images.mkdir(parents=True)
    for split in ("train", "val", "test", "dev"):
        rows = []
        for number in range(4):
            recipe.page(str(number)).save(images / f"{split}{number}.png")
            turn = {"images": [f"{split}{number}.png"], "user": "Is it odd?", "assistant": ["No.", "Yes."][number % 2]}
            rows.append({"id": f"{split}-{number}", "conversations": [turn]})
        recipe.write_jsonl(tmp_path / "converted" / f"a_{split}.jsonl", rows)
    tasks = ("docvqa", "hateful_memes", "nlvr2", "ucf101")
    for task in tasks:
        few = ["--data_dir", "converted", "--max_new_tokens", "4", "--num_crops", "2"]
        done = torchrun(hub, tmp_path, 2, f"finetune_hf_trainer_{task}.py", *few)
        assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == sorted(tasks)
    for task in tasks:
        assert json.loads((tmp_path / "output" / task / "eval_after.json").read_text())["num_answers"] == 4
