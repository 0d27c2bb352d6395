"""Rows of every kind in one run (text alone, 1 to 3 pictures, a clip): the same on one process and on two; mixtures, gone on with.

`--mixed-rows FILE` with `-m slow` writes the table of losses that docs/mixtures-and-clips.md shows.
"""

import shutil
from pathlib import Path

import pytest
import recipe
import torch
from clips import make_clip
from launch import ROOT, Run, several
from safetensors.torch import load_file

from benchmarks.record import provenance, write

SCRIPT = ROOT / "finetune_hf_trainer_own_data.py"
STRATEGIES = {
    "full": [],
    "frozen": ["--freeze_vision_model"],
    "lora": ["--use_lora", "--lora_rank", "4"],
    "qlora": ["--use_qlora", "--lora_rank", "4"],
}
ENGINES = {"DDP": "none", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
# ZeRO-3 cannot split 4-bit weights.
CASES = [
    (strategy, engine) for strategy in STRATEGIES for engine in ENGINES if (strategy, engine) != ("qlora", "ZeRO-3")
]
QUICK = [("full", "ZeRO-3"), ("lora", "DDP")]


def mixed_rows(folder: Path, train: int = 12, test: int = 3) -> Path:
    """Rows of the five kinds in turns: with one row a micro-batch, two ranks mostly hold different ones."""
    folder.mkdir(parents=True)
    clip = make_clip(folder / "clip.mp4", 20)
    for split, count in (("train", train), ("test", test)):
        rows = []
        for number in range(count):
            row = {"id": f"{split}-{number}", "question": f"Which number is {number}?", "answer": f"It is {number}."}
            kind = number % 5
            if kind == 4:
                row["video"] = clip.name
            elif kind:
                row["images"] = [f"{split}-{number}-{picture}.png" for picture in range(kind)]
                for name in row["images"]:
                    recipe.page(str(number)).save(folder / name)
            rows.append(row)
        recipe.write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def flags(model: Path, *data: Path | str, **changes) -> list[str]:
    values = {
        "num_crops": 2, "num_frames": 3, "batch_size": 4, "batch_size_per_gpu": 1, "max_steps": 6, "learning_rate": 1e-3,
        "warmup_steps": 0, "logging_steps": 1, "dataloader_num_workers": 0, "max_new_tokens": 3, "eval_rows_during_training": 3,
        "save_steps": 6, "adam_epsilon": 1e-3, **changes,
    }  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["--model_name_or_path", str(model), "--no-tqdm", "--data_dir", *map(str, data), *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    recipe.model_folder(folder / "model")
    mixed_rows(folder / "rows")
    return folder


def run_all(folder: Path, calls: dict[str, list[str]], ranks: int = 1) -> dict[str, Run]:
    return several(calls, folder, dict.fromkeys(calls, SCRIPT), ranks=ranks)


def calls_of(folder: Path, cases: list[tuple[str, str]], ranks: int) -> dict[str, list[str]]:
    given = flags(folder / "model", folder / "rows")
    return {
        f"{strategy} {engine} {ranks}": [*given, *STRATEGIES[strategy], "--deepspeed", ENGINES[engine]]
        for strategy, engine in cases
    }


def check(alone: Run, together: Run) -> None:
    for run in (alone, together):
        assert run.status == 0, run.stdout + run.stderr
    assert len(alone.losses) == 6
    assert together.losses == pytest.approx(alone.losses, abs=2e-5)
    assert together.losses[-1] < together.losses[0]
    assert together.evaluation("after")["generated_texts_unique"] == alone.evaluation("after")["generated_texts_unique"]


@pytest.fixture(scope="module")
def mixture(folder):
    """Flags of three epochs of 12 samples, 4 a step: half of the rows of one source, and those of another twice."""
    rows = mixed_rows(folder / "half", train=12, test=2)
    twice = mixed_rows(folder / "twice", train=3, test=2)
    changes = {"max_steps": -1, "num_train_epochs": 3, "save_steps": 1, "save_total_limit": 9}
    return flags(folder / "model", f"{rows}:0.5", f"{twice}:2", **changes) + ["--use_lora", "--lora_rank", "4"]


@pytest.fixture(scope="module")
def alone(folder, mixture):
    return run_all(folder, {**calls_of(folder, QUICK, 1), "whole": mixture})


@pytest.fixture(scope="module")
def together(folder):
    return run_all(folder, calls_of(folder, QUICK, 2), 2)


@pytest.fixture(scope="module")
def again(folder, mixture, alone):
    """The mixture gone on with in the middle of its second epoch, and started again with another share."""
    output = folder / "resumed"
    shutil.copytree(alone["whole"].output / "checkpoint-4", output / "checkpoint-4")
    for file in ("run.json", "run_rows.parquet"):
        shutil.copy(alone["whole"].output / file, output)
    other = [word.replace("half:0.5", "half:0.75") for word in mixture]
    return run_all(
        folder,
        {
            "going on": [*mixture, "--output_dir", str(output)],
            "other share": [*other, "--output_dir", str(alone["whole"].output)],
        },
    )


def test_rows_of_every_kind_train_the_same_on_one_process_and_on_two(alone, together):
    for strategy, engine in QUICK:
        check(alone[f"{strategy} {engine} 1"], together[f"{strategy} {engine} 2"])


def test_a_mixture_says_what_an_epoch_takes_and_goes_on_in_its_middle_bit_by_bit(folder, alone, again):
    whole, resumed = alone["whole"], again["going on"]
    assert (whole.status, resumed.status) == (0, 0), whole.stderr + resumed.stderr
    assert "rows             15, of which an epoch takes 12 samples:" in whole.stdout
    assert "6 of half, which has 12 (0.5 times each)" in whole.stdout
    assert "6 of twice, which has 3 (2 times each)" in whole.stdout
    assert "steps            9, 3 an epoch" in whole.stdout
    assert "going on from" in resumed.stdout
    resumed = Run(folder / "resumed", 0, "", "")
    assert len(whole.losses) == 9
    assert resumed.losses == whole.losses
    expected, found = (load_file(run.output / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert {name for entry in whole.logs.values() for name in entry} >= {"loss/half", "loss/twice"}


def test_scores_are_told_by_source(alone):
    result = alone["whole"].evaluation("after")
    values = [result["anls/half"], result["anls/twice"]]
    assert result["anls"] == pytest.approx(sum(values) / 2)  # as many answers of each
    page = (alone["whole"].output / "report.html").read_text()
    assert "by source" in page


def test_another_share_is_another_run(again):
    run = again["other share"]
    assert run.status == 2
    assert "shares of the sources [0.75, 2.0] instead of [0.5, 2.0]" in run.errors[0]


@pytest.mark.slow
def test_every_strategy_and_engine(folder, request):
    runs = {ranks: run_all(folder, calls_of(folder, CASES, ranks), ranks) for ranks in (1, 2)}
    found = {
        (strategy, engine): {ranks: runs[ranks][f"{strategy} {engine} {ranks}"] for ranks in runs}
        for strategy, engine in CASES
    }
    if path := request.config.getoption("--mixed-rows"):
        table = [
            {
                "strategy": case[0],
                "engine": case[1],
                "losses": {str(ranks): run.losses for ranks, run in of_case.items()},
            }
            for case, of_case in found.items()
        ]
        differences = [
            abs(one - two) for row in table for one, two in zip(row["losses"]["1"], row["losses"]["2"], strict=True)
        ]
        kinds = "12 rows in turns: text alone, 1, 2, 3 pictures, a clip of 3 frames; 4 rows a step, one at once"
        facts = {"rows": kinds, "largest_difference": max(differences), "table": table}
        write(Path(path), provenance("torch", "transformers", "deepspeed", "peft", "bitsandbytes") | facts)
    for of_case in found.values():
        check(of_case[1], of_case[2])
