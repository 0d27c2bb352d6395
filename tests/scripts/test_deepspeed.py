"""The four DeepSpeed configurations on two processes, with pictures on one rank and text on the other: same losses, weights, resumed."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import recipe
import torch
from launch import several
from safetensors.torch import load_file

CONFIGS = ("zero2", "zero2_offload", "zero3", "zero3_offload")
STRATEGIES = {
    "full": [],
    "frozen": ["--freeze_vision_model"],
    "lora": ["--use_lora", "--lora_rank", "4"],
    "frozen lora": ["--freeze_vision_model", "--use_lora", "--lora_rank", "4"],
}
# The other configurations only move what ZeRO-2 and ZeRO-3 hold.
CASES = [("full", config) for config in CONFIGS] + [
    (strategy, config) for strategy in ("frozen", "lora", "frozen lora") for config in ("zero2", "zero3")
]
RESUMED = [("full", config) for config in CONFIGS] + [("lora", "zero3")]


def rows(folder: Path) -> Path:
    """Converted rows: every third with a picture, so that a rank often has none; the last ones to answer."""
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", 12), ("test", 5)):
        found = []
        for number in range(count):
            images = [f"{split}-{number}.png"] if number % 3 == 0 else []
            for name in images:
                recipe.page(str(number)).save(folder / "images" / name)
            turn = {"images": images, "user": f"Which number is {number}?", "assistant": f"It is {number}."}
            found.append({"id": f"{split}-{number}", "conversations": [turn]})
        recipe.write_jsonl(folder / f"{split}.jsonl", found)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def flags_of(folder):
    """`flags_of(strategy, config)`: the flags of a run."""
    model, data = recipe.model_folder(folder / "model"), rows(folder / "data")
    flags = [
        *("--model_name_or_path", str(model), "--data_dir", str(data), "--num_crops", "2", "--no-tqdm"),
        *("--batch_size", "4", "--batch_size_per_gpu", "1", "--max_steps", "4", "--save_steps", "2"),
        *("--learning_rate", "1e-3", "--warmup_steps", "0", "--logging_steps", "1", "--dataloader_num_workers", "0"),
        # Answers while it trains, and a number of rows that two ranks do not share evenly.
        *(
            "--eval_strategy",
            "steps",
            "--eval_steps",
            "2",
            "--max_new_tokens",
            "3",
            "--per_device_eval_batch_size",
            "1",
        ),
    ]

    return lambda strategy, config: [*flags, *STRATEGIES[strategy], "--deepspeed", config]


@pytest.fixture(scope="module")
def runs(folder, flags_of):
    return several({f"{s}, {c}": flags_of(s, c) for s, c in CASES}, folder, ranks=2)


@pytest.fixture(scope="module")
def resumed_runs(folder, flags_of, runs):
    again = {}
    for strategy, config in RESUMED:
        name = f"{strategy}, {config}"
        output = folder / f"{name} resumed"
        shutil.copytree(runs[name].output / "checkpoint-2", output / "checkpoint-2")
        for file in ("run.json", "run_rows.parquet"):
            shutil.copy(runs[name].output / file, output)
        again[name] = [*flags_of(strategy, config), "--output_dir", str(output)]
    return {name: replace(run, output=Path(again[name][-1])) for name, run in several(again, folder, ranks=2).items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*model*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize(("strategy", "config"), CASES)
def test_losses_weights_and_answers_are_those_of_zero2(runs, strategy, config):
    run, reference = runs[f"{strategy}, {config}"], runs[f"{strategy}, zero2"]
    assert run.status == 0, run.stdout + run.stderr
    assert "DeepSpeed" in run.stdout
    assert run.losses[-1] < run.losses[0]
    assert run.losses == pytest.approx(reference.losses, abs=1e-5)
    assert run.eval_losses == pytest.approx(reference.eval_losses, abs=1e-5)
    assert run.evaluation("after")["answers_unique"] == reference.evaluation("after")["answers_unique"]
    assert run.evaluation("after")["generated_texts_unique"] == reference.evaluation("after")["generated_texts_unique"]
    expected, found = weights(reference.output), weights(run.output)
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in expected.items()
    }
    assert all(torch.allclose(tensor, expected[key], atol=1e-5) for key, tensor in found.items())


@pytest.mark.parametrize(("strategy", "config"), RESUMED)
def test_a_run_goes_on_exactly(runs, resumed_runs, strategy, config):
    whole, resumed = runs[f"{strategy}, {config}"], resumed_runs[f"{strategy}, {config}"]
    assert resumed.status == 0, resumed.stdout + resumed.stderr
    assert "going on from" in resumed.stdout
    assert resumed.losses == whole.losses
    expected, found = weights(whole.output), weights(resumed.output)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
