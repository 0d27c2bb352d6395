"""Runs that are killed at rare moments, and started again: bit for bit the runs that nothing happened to."""

from dataclasses import replace
from pathlib import Path

import pytest
import recipe
import torch
from kill_at import MOMENTS
from launch import Run, script, several
from safetensors.torch import load_file

KILLER = Path(__file__).parent / "kill_at.py"
STRATEGIES = {
    "full": ["--deepspeed", "none"],
    "full, ZeRO-2": [],
    "LoRA with dropout": ["--use_lora", "--lora_rank", "4", "--lora_dropout", "0.2"],
}
KILLED = 128 + 9


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


# The others are left to `make test-all`.
USUAL = ("LoRA with dropout", 1)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, ranks), marks=[] if (name, ranks) == USUAL else pytest.mark.slow, id=f"{name}, {ranks}")
        for ranks in (1, 2)
        for name in STRATEGIES
    ],
)
def runs(request, tmp_path_factory) -> dict[str, tuple[Run, Run]]:
    """Moment -> the undisturbed run, and the one that was killed and started again."""
    strategy, ranks = request.param
    folder = tmp_path_factory.mktemp("kills")
    model, data = recipe.model_folder(folder / "model"), recipe.docvqa_rows(folder / "data", 9, 5)
    flags = [
        *("--model_name_or_path", str(model), "--data_dir", str(data), "--num_crops", "2", "--no-tqdm"),
        *("--batch_size", "4", "--num_train_epochs", "2", "--save_steps", "2", "--save_total_limit", "1"),
        *("--learning_rate", "1e-2", "--warmup_steps", "0", "--max_new_tokens", "4", "--dataloader_num_workers", "0"),
        *("--logging_steps", "3", "--logging_first_step", "False", "--per_device_eval_batch_size", "2"),
    ]
    flags += STRATEGIES[strategy]
    whole = several({"whole": flags}, folder, ranks=ranks)["whole"]
    outputs = {moment: folder / moment.replace(" ", "-") for moment in MOMENTS}
    again = {moment: [*flags, "--output_dir", str(output)] for moment, output in outputs.items()}
    killed = {moment: [moment, script("docvqa"), *call] for moment, call in again.items()}
    for moment, run in several(killed, folder, dict.fromkeys(killed, KILLER), ranks=ranks).items():
        assert run.status in (KILLED, -9), f"{moment}: {run.status} {run.stdout} {run.stderr}"
    second = several(again, folder, ranks=ranks)
    return {moment: (whole, replace(run, output=outputs[moment])) for moment, run in second.items()}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_if_nothing_had_happened(runs, moment):
    whole, run = runs[moment]
    assert run.status == 0, run.stdout + run.stderr
    expected, found = weights(whole.output), weights(run.output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert run.losses == whole.losses
    for stage in ("before", "after"):
        then, now = whole.evaluation(stage), run.evaluation(stage)
        assert {**now, "seconds": 0} == {**then, "seconds": 0}
    assert (run.output / "report.html").exists()
    assert not list(run.output.glob("*.part"))
