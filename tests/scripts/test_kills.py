"""Runs that are killed at rare moments, and started again: bit for bit the runs that nothing happened to."""

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


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["1 process", "2 processes"])
def runs(request, tmp_path_factory) -> dict[str, tuple[Run, Run]]:
    """Strategy and moment -> the undisturbed run, and the one that was killed and started again."""
    folder = tmp_path_factory.mktemp("kills")
    model, data = recipe.model_folder(folder / "model"), recipe.docvqa_rows(folder / "data", 9, 5)
    flags = [
        *("--model_name_or_path", str(model), "--data_dir", str(data), "--num_crops", "2", "--no-tqdm"),
        *("--batch_size", "4", "--num_train_epochs", "2", "--save_steps", "2", "--save_total_limit", "1"),
        *("--learning_rate", "1e-2", "--warmup_steps", "0", "--max_new_tokens", "4", "--dataloader_num_workers", "0"),
        *("--logging_steps", "3", "--logging_first_step", "False", "--per_device_eval_batch_size", "2"),
    ]
    calls = {strategy: [*flags, *more] for strategy, more in STRATEGIES.items()}
    whole = several(calls, folder, ranks=request.param)
    killed, again = {}, {}
    for strategy in STRATEGIES:
        for moment in MOMENTS:
            name = f"{strategy}: {moment}"
            output = ["--output_dir", str(folder / name.replace(" ", "-"))]
            killed[name] = [moment, script("docvqa"), *calls[strategy], *output]
            again[name] = [*calls[strategy], *output]
    first = several(killed, folder, dict.fromkeys(killed, KILLER), ranks=request.param)
    second = several(again, folder, ranks=request.param)
    for name, run in first.items():
        assert run.status in (KILLED, -9), f"{name}: {run.status} {run.stdout} {run.stderr}"
    return {
        name: (whole[name.partition(":")[0]], Run(Path(again[name][-1]), run.status, run.stdout, run.stderr))
        for name, run in second.items()
    }


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_ends_as_if_nothing_had_happened(runs, strategy, moment):
    whole, run = runs[f"{strategy}: {moment}"]
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
