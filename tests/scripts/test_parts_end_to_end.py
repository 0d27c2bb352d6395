"""Any part trained on two processes, pictures on one and text on the other: resumed bit for bit, the same under ZeRO, each at its rate."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import recipe
import torch
from launch import several
from safetensors.torch import load_file
from test_deepspeed import rows

from finetuning.training.parts import FLAGS, part_below

RATES = ["--vision_learning_rate", "1e-4", "--projector_learning_rate", "5e-4"]
PROJECTOR_RATE = RATES[2:]
LORA = ["--lora_rank", "4"]
STRATEGIES = {
    "vision and projector full, language LoRA": [*LORA, *RATES, "--language", "lora"],
    "projector only": [*PROJECTOR_RATE, "--vision", "frozen", "--language", "frozen"],
    "language frozen": [*RATES, "--language", "frozen"],
    "vision LoRA only": [*LORA, *RATES[:2], "--vision", "lora", "--projector", "frozen", "--language", "frozen"],
    "QLoRA, projector full": [*LORA, *PROJECTOR_RATE, "--use_qlora", "--vision", "frozen", "--projector", "full"],
    "DoRA, LoRA+": [*LORA, "--use_lora", "--lora_kwargs", '{"use_dora": true}', "--lora_plus_ratio", "4"],
    "PiSSA": [*LORA, "--use_lora", "--lora_kwargs", '{"init_lora_weights": "pissa"}'],
}
# What each way takes by default, and two ways under the others.
DEFAULT = {
    name: "zero2" if "--use" not in " ".join(f) and "lora" not in f else "none" for name, f in STRATEGIES.items()
}
MIXED = "vision and projector full, language LoRA"
OTHERS = [(name, config) for name in (MIXED, "language frozen") for config in ("none", "zero2", "zero3")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def flags_of(folder):
    """`flags_of(strategy, config)`: the flags of a run; without a config its default."""
    model, data = recipe.model_folder(folder / "model"), rows(folder / "data")
    flags = [
        *("--model_name_or_path", str(model), "--data_dir", str(data), "--num_crops", "2", "--no-tqdm"),
        *("--batch_size", "4", "--batch_size_per_gpu", "1", "--max_steps", "4", "--save_steps", "2"),
        *("--learning_rate", "1e-3", "--warmup_steps", "0", "--logging_steps", "1", "--dataloader_num_workers", "0"),
        *("--max_new_tokens", "3", "--per_device_eval_batch_size", "1"),
    ]
    return lambda strategy, config=None: [
        *flags,
        *STRATEGIES[strategy],
        *(["--deepspeed", config] if config else []),
    ]


@pytest.fixture(scope="module")
def runs(folder, flags_of):
    return several({name: flags_of(name) for name in STRATEGIES}, folder, ranks=2)


@pytest.fixture(scope="module")
def resumed_runs(folder, flags_of, runs):
    again = {}
    for name in STRATEGIES:
        output = folder / f"{name} resumed"
        shutil.copytree(runs[name].output / "checkpoint-2", output / "checkpoint-2")
        for file in ("run.json", "run_rows.parquet"):
            shutil.copy(runs[name].output / file, output)
        again[name] = [*flags_of(name), "--output_dir", str(output)]
    return {name: replace(run, output=Path(again[name][-1])) for name, run in several(again, folder, ranks=2).items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*model*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_trains_and_saves_what_it_says(folder, runs, name):
    run = runs[name]
    assert run.status == 0, run.stdout + run.stderr
    assert ("DeepSpeed" in run.stdout) == (DEFAULT[name] == "zero2")
    if DEFAULT[name] == "none":
        assert (run.output / "adapter_config.json").exists()
        return
    # a whole model, of which just the named parts are another
    before, after = weights(folder / "model"), weights(run.output)
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    flags = dict(zip(STRATEGIES[name][::2], STRATEGIES[name][1::2], strict=True))
    trained = {part for flag, part in FLAGS.items() if flags.get(f"--{flag}") != "frozen"}
    assert {part_below(key) for key in changed} == trained
    assert after.keys() == before.keys()


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_goes_on_exactly(runs, resumed_runs, name):
    whole, resumed = runs[name], resumed_runs[name]
    assert resumed.status == 0, resumed.stdout + resumed.stderr
    assert "going on from" in resumed.stdout
    assert resumed.losses == whole.losses
    expected, found = weights(whole.output), weights(resumed.output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_each_rate_falls_by_the_same_schedule_and_is_logged(runs):
    logs = runs[MIXED].logs
    for step, entry in logs.items():
        left = 1 - (step - 1) / 4
        assert entry["learning_rate"] == pytest.approx(1e-3 * left)
        rates = {part: entry[f"learning_rate/{part}"] for part in ("vision", "projector", "language")}
        assert rates == pytest.approx({"vision": 1e-4 * left, "projector": 5e-4 * left, "language": 1e-3 * left})
    assert "learning rates   vision 0.0001, projector 0.0005, language 0.001" in runs[MIXED].stdout
    assert "strategy         vision full, projector full, language LoRA; DistributedDataParallel" in runs[MIXED].stdout
    plus = runs["DoRA, LoRA+"].logs[1]
    assert plus["learning_rate/vision_B"] == pytest.approx(4 * plus["learning_rate/vision"])


@pytest.mark.slow
def test_zero_trains_the_same_at_the_same_rates(folder, flags_of):
    found = several({f"{name}, {config}": flags_of(name, config) for name, config in OTHERS}, folder, ranks=2)
    for name, config in OTHERS:
        run, reference = found[f"{name}, {config}"], found[f"{name}, none"]
        assert run.status == 0, run.stdout + run.stderr
        assert run.losses == pytest.approx(reference.losses, abs=1e-5)
        expected, now = weights(reference.output), weights(run.output)
        assert now.keys() == expected.keys()
        assert all(torch.allclose(tensor, expected[key], atol=1e-5) for key, tensor in now.items())
        rates = {key: value for key, value in run.logs[2].items() if key.startswith("learning_rate")}
        assert rates == pytest.approx({key: reference.logs[2][key] for key in rates})
        assert len(rates) == (4 if name == MIXED else 3)
