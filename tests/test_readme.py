"""What README and docs/ say is true: flags and links exist, their Python runs, their tables are those of the result files."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import readme
from benchmarks.readme import BEGIN, END, PARTS, PUBLISHED, documents
from demo import build_model
from finetuning import app, ask, compare, doubts, merge, plan, score, validate
from finetuning.arguments import GROUPS, _Parser
from finetuning.own_data_arguments import OwnDataArguments

ROOT = Path(__file__).parents[1]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in documents()}
README = TEXTS["README.md"]
# Of other programs, which have tests of their own.
OTHERS = ("docs/serving.md", "docs/trl.md")
# Flags of pip, torchrun, pytest, docker, sbatch, kubectl, az and the commands without a parser to ask.
OTHER = {
    "--nproc_per_node", "--nnodes", "--master_addr", "--master_port", "--node_rank", "--standalone", "--shutdown-timeout",
    "--max_restarts", "--no-deps", "--help", "--parity-results", "--hypothesis-profile", "--ratios", "--ipc", "--shm-size",
    "--rdzv_backend", "--rdzv_endpoint", "--rdzv_conf", "--time", "--signal", "--nodes", "--file", "--filename", "--tag", "--build-arg",
    "--out_dir", "--archive", "--video_dir", "--minutes", "--device", "--model", "--mixed-rows", "--counts",
}  # fmt: skip
# The commands of the published recipe, each as it is printed there.
RECIPE = """\
torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py      # minimal run on a mini-train split of DocVQA
torchrun --nproc_per_node=8 finetune_hf_trainer_nlvr2.py       # multi-image input

# A100 or H100, one or more nodes
torchrun --nproc_per_node=8 --nnodes=<num_nodes> \\
  --master_addr=$MASTER_ADDR --master_port=$MASTER_PORT --node_rank=$NODE_RANK \\
  finetune_hf_trainer_hateful_memes.py --output_dir <output_dir> --batch_size 64 --use_flash_attention --bf16

# 8x V100-32GB: no flash attention, no bf16: fp16 mixed precision
torchrun --nproc_per_node=8 --nnodes=<num_nodes> \\
  --master_addr=$MASTER_ADDR --master_port=$MASTER_PORT --node_rank=$NODE_RANK \\
  finetune_hf_trainer_hateful_memes.py --output_dir <output_dir> --batch_size 64

# no data-centre GPU: LoRA; on Turing and newer also QLoRA
torchrun --nproc_per_node=2 finetune_hf_trainer_hateful_memes.py --output_dir <output_dir> --batch_size 64 --use_lora
torchrun --nproc_per_node=2 finetune_hf_trainer_hateful_memes.py --output_dir <output_dir> --batch_size 64 --use_lora --use_qlora

python convert_ucf101.py --out_dir /path/to/converted_ucf101
torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir /path/to/converted_ucf101
"""


def blocks(name: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[name], re.DOTALL)


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))


def help_of(call: Callable, capsys) -> set[str]:
    """The flags that a command's --help lists."""
    with pytest.raises(SystemExit) as ended:
        call()
    assert not ended.value.code
    return flags_in(capsys.readouterr().out)


def help_of_commands(capsys, monkeypatch) -> set[str]:
    monkeypatch.setattr(sys, "argv", ["finetuning", "--help"])
    calls = [
        lambda module=module: module.parse_args(["--help"]) for module in (ask, app, merge, compare, validate, plan)
    ]
    calls.append(lambda: doubts.read_flags(["--help"]))
    return set().union(*(help_of(call, capsys) for call in (*calls, doubts.read_flags, score.main)))


def recipe_flags() -> set[str]:
    return {option for action in _Parser(OwnDataArguments)._actions for option in action.option_strings}


def anchors(text: str) -> set[str]:
    """Those that GitHub makes of the headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


def links(text: str) -> list[str]:
    """Targets of the links and pictures, code left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("readme") / "model")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("name", [*TEXTS, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_link_leads_somewhere(name):
    page = ROOT / name
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_document_is_reached_from_the_readme():
    assert {name for name in TEXTS if name != "README.md"} <= set(links(README))


def test_every_contents_list_names_all_headings():
    """A document that begins with a list of its headings leaves none out."""
    for name, text in TEXTS.items():
        listed = {link[1:] for link in re.findall(r"^- \[.*?\]\((#[^)]+)\)$", text, re.MULTILINE)}
        headings = re.findall(r"^## (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        if listed:
            assert listed == anchors("\n".join(f"## {heading}" for heading in headings)), name


@pytest.mark.parametrize("name", [name for name in TEXTS if name not in OTHERS])
def test_every_flag_that_is_named_exists(name, capsys, monkeypatch):
    commands = help_of_commands(capsys, monkeypatch)
    assert flags_in(TEXTS[name]) <= recipe_flags() | commands | OTHER


def test_every_flag_of_a_command_is_documented(capsys):
    said = flags_in(TEXTS["docs/ask-merge-score.md"]) | {"--help"}
    for module in (ask, merge, compare):
        assert help_of(lambda module=module: module.parse_args(["--help"]), capsys) <= said


def test_every_flag_of_the_recipe_is_documented():
    for name in {name for names in GROUPS.values() for name in names}:
        assert f"| `--{PUBLISHED.get(name, name)}` |" in TEXTS["docs/flags.md"], name


def test_defaults_are_shown_as_they_are_typed():
    assert [readme.show_default(value) for value in (4e-5, 180_000_000, 2, False, True, None, "stop", 0.0)] == [
        *("4e-5", "180,000,000", "2", "off", "on", "", "stop", "0"),
    ]


def test_every_file_of_the_repository_that_is_named_exists():
    written_by_the_reader = {"my_task.py", "my-val.json"}
    names = set()
    for text in TEXTS.values():
        names |= set(re.findall(r"(?:python |`)((?:ds_configs/)?\w+(?:-\w+)?\.(?:py|txt|json)\b)", text))
        names |= set(re.findall(r"requirements-\w+\.txt", text))
    assert len(names) >= 7
    for name in names - written_by_the_reader - {"answers.jsonl"}:
        assert (ROOT / name).exists(), name


def test_every_target_of_make_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in {target for text in TEXTS.values() for target in re.findall(r"(?:`|    |^)make ([\w-]+)", text)}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_module_that_is_run_exists():
    for name in {name for text in TEXTS.values() for name in re.findall(r"-m ((?:finetuning|benchmarks)\.\w+)", text)}:
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name


def test_the_published_commands_are_found_as_printed():
    for part in RECIPE.split("\n\n"):
        assert part.strip() in README


@pytest.mark.parametrize("which", [0, 1], ids=["full", "LoRA"])
def test_loading_and_asking_works_as_written(which, model_folder, tmp_path, monkeypatch, capsys):
    load, ask = blocks("docs/ask-merge-score.md")[which], blocks("docs/ask-merge-score.md")[2]
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


def worked_example() -> str:
    (script,) = (block for block in blocks("docs/a-new-task.md") if "def main():" in block)
    return script


def run_example(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    (folder / "my_task.py").write_text(worked_example(), encoding="utf-8")
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
    script = (ROOT / "finetune_hf_trainer_nlvr2.py").read_text(encoding="utf-8")
    assert worked_example().partition("def main():")[2] == script.partition("def main():")[2]


@pytest.mark.parametrize("name", PARTS)
def test_what_is_made_is_what_would_be_made(name):
    """Figures are those of the result files, flags those of --help; `python -m benchmarks.readme` writes both."""
    begin = BEGIN.format(name)
    (text,) = (text for text in TEXTS.values() if begin in text)
    assert f"{begin}{PARTS[name]()}{END}" in text


def test_the_pictures_are_there_and_small():
    pictures = [ROOT / link for link in links(README) if link.endswith(".png")]
    assert len(pictures) == 2
    for path in pictures:
        assert path.stat().st_size <= 300_000
        with Image.open(path) as picture:
            picture.verify()
