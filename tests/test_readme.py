"""What the README says is true: its flags exist, its Python runs, its worked example of a new task runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.readme import END, tables
from demo import build_model
from finetuning.arguments import GROUPS, RecipeArguments, _Parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Flags of pip, of torchrun and of the other programs that the README calls.
OTHER = {
    "--nproc_per_node", "--nnodes", "--master_addr", "--master_port", "--node_rank", "--no-build-isolation", "--no-deps", "--task",
    "--out", "--out_dir", "--archive", "--video_dir", "--num_frames", "--convert", "--help",
    "--shutdown-timeout", "--max_restarts", "--parity-results", "--hypothesis-profile", "--ratios",
}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("readme") / "model")


def test_every_flag_in_the_readme_exists():
    options = {option for action in _Parser(RecipeArguments)._actions for option in action.option_strings}
    assert set(re.findall(r"--[a-zA-Z][\w-]*", README)) <= options | OTHER


def test_every_flag_of_the_recipe_is_in_the_readme():
    names = {name for names in GROUPS.values() for name in names}
    published = {"per_device_train_batch_size": "batch_size_per_gpu", "weight_decay": "wd", "disable_tqdm": "no-tqdm"}
    said_in_a_sentence = {"adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"}
    for name in names - said_in_a_sentence:
        assert f"| `--{published.get(name, name)}` |" in README, name


def test_every_file_of_the_repository_that_the_readme_names_exists():
    written_by_the_reader = {"my_task.py"}
    names = set(
        re.findall(r"(?:python |`)((?:ds_configs/)?\w+(?:-\w+)?\.(?:py|txt|json)\b|requirements-\w+\.txt)", README)
    )
    assert len(names) >= 7
    for name in names - written_by_the_reader:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("which", [0, 1], ids=["full", "LoRA"])
def test_loading_and_asking_works_as_written(which, model_folder, tmp_path, monkeypatch, capsys):
    load, ask = blocks("python")[which], blocks("python")[2]
    monkeypatch.chdir(tmp_path)
    if which == 0:
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "docvqa").symlink_to(model_folder)
    else:
        from peft import LoraConfig, get_peft_model

        from phi3v import Phi3VForCausalLM, Phi3VProcessor

        model = get_peft_model(Phi3VForCausalLM.from_pretrained(model_folder), LoraConfig(target_modules=["qkv_proj"]))
        model.save_pretrained("output/docvqa")
        Phi3VProcessor.from_pretrained(model_folder).save_pretrained("output/docvqa")
        load = load.replace("microsoft/Phi-3.5-vision-instruct", str(model_folder))
    Image.new("RGB", (100, 140), "white").save("page.png")
    torch.manual_seed(0)
    exec(load + ask, {})
    assert capsys.readouterr().out


def run_example(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    (script,) = (block for block in blocks("python") if "def main():" in block)
    (folder / "my_task.py").write_text(script, encoding="utf-8")
    command = [
        sys.executable, "my_task.py", "--batch_size", "4", "--num_crops", "1", "--max_new_tokens", "4",
        "--learning_rate", "1e-3", "--use_lora", "--no-tqdm", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_worked_example_of_a_new_task_runs_in_an_empty_folder(model_folder, tmp_path):
    data = tmp_path / "my_data"
    data.mkdir()
    lines = ["file,question,answer"]
    for number in range(10):
        colour = ("red", "blue")[number % 2]
        Image.new("RGB", (40 + number, 40), colour).save(data / f"{number}.png")
        lines.append(f"{number}.png,Which colour?,{colour}")
    (data / "pictures.csv").write_text("\n".join(lines) + "\n")
    finished = run_example(tmp_path, "--data_dir", "my_data", "--model_name_or_path", str(model_folder))
    assert finished.returncode == 0, finished.stderr
    output = tmp_path / "output" / "my_task"
    assert json.loads((output / "eval_after.json").read_text())["num_answers"] == 2
    assert (output / "report.html").exists()


def test_the_worked_example_says_what_it_needs(model_folder, tmp_path):
    finished = run_example(tmp_path, "--model_name_or_path", str(model_folder))
    assert finished.returncode == 2
    assert "error: --data_dir: expected a folder with pictures.csv, found none" in finished.stderr


def test_main_of_the_worked_example_is_that_of_the_scripts():
    (example,) = (block for block in blocks("python") if "def main():" in block)
    script = (ROOT / "finetune_hf_trainer_nlvr2.py").read_text(encoding="utf-8")
    assert example.partition("def main():")[2] == script.partition("def main():")[2]


def test_the_measured_figures_are_those_of_the_result_files():
    for begin, text in tables().items():
        assert f"{begin}{text}{END}" in README
