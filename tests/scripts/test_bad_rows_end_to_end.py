"""Every bad row and folder of bad_rows.py, and bad flags, given to the task's own script: one line, status 2, nothing trained."""

from pathlib import Path

import pytest
import recipe
from bad_rows import BAD_FOLDERS, BAD_ROWS
from launch import record_bad_inputs, script, several

pytestmark = pytest.mark.slow

CASES = {f"{bad.task}: {bad.name}": bad for bad in (*BAD_ROWS, *BAD_FOLDERS)}
FLAGS = {
    "--seed -1": "--seed -1",
    "--data_seed -1": "--data_seed -1",
    "--max_steps 0": "--max_steps 0",
    "--do_predict": "--do_predict",
    "--lora_rank 100000 --use_lora": "--lora_rank 100000",
    "--batch_size 10000000": "--batch_size 10000000",
    "--max_new_tokens 1000000": "--max_new_tokens 1000000",
    "--lr_scheduler_kwargs {broken": "--lr_scheduler_kwargs",
    '--lr_scheduler_kwargs {"nonsense":1}': "--lr_scheduler_kwargs",
    "--optim_args nonsense=1": "--optim_args nonsense=1",
    "--optim nonsense": "--optim",
    "--learnin_rate 1": "did you mean --learning_rate",
    "--label_smoothing_factor 2": "--label_smoothing_factor 2",
    "--deepspeed {broken": "--deepspeed",
    "--deepspeed nowhere.json": "--deepspeed nowhere.json",
    '--deepspeed {"gradient_accumulation_steps":7}': "gradient_accumulation_steps",
    "--on_bad_row perhaps": "--on_bad_row",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("bad-rows")
    model, good = recipe.model_folder(folder / "model"), recipe.docvqa_rows(folder / "good", 3, 2)
    usual = ["--model_name_or_path", str(model), "--num_crops", "2", "--no-tqdm", "--dataloader_num_workers", "0"]
    calls, paths = {}, {}
    for number, (name, bad) in enumerate(CASES.items()):
        data = folder / f"data-{number}"
        bad.write(data)
        calls[name] = [*usual, "--data_dir", str(data), "--output_dir", str(folder / f"output-{number}")]
        paths[name] = Path(script(bad.task))
    for number, flags in enumerate(FLAGS):
        output = ["--output_dir", str(folder / f"flags-{number}")]
        calls[flags] = [*usual, "--data_dir", str(good), *output, *flags.split(" ")]
    found = several(calls, folder, paths)
    if path := request.config.getoption("--bad-inputs"):
        record_bad_inputs(Path(path), found, str(folder))
    return found


@pytest.mark.parametrize("name", [*CASES, *FLAGS])
def test_it_is_one_line_and_nothing_is_trained(runs, name):
    run = runs[name]
    assert run.status == 2, run.stdout + run.stderr
    (line,) = run.errors
    expected = CASES[name].expected if name in CASES else FLAGS[name]
    assert expected in line
    assert "Traceback" not in run.stderr
    assert "rows  " not in run.stdout
