"""Rows of every kind in one run (text alone, 1 to 3 pictures, a clip): the same on one process and on two; mixtures, gone on with.

`--mixed-rows FILE` with `-m slow` writes the table of losses that docs/mixtures-and-clips.md shows.
"""

import json
import shutil
from collections import Counter
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


def train(folder: Path, cases: list[tuple[str, str]], ranks: int) -> dict[tuple[str, str], Run]:
    given = flags(folder / "model", folder / "rows")
    calls = {
        f"{strategy} {engine} {ranks}": [*given, *STRATEGIES[strategy], "--deepspeed", ENGINES[engine]]
        for strategy, engine in cases
    }
    runs = several(calls, folder, dict.fromkeys(calls, SCRIPT), ranks=ranks)
    return dict(zip(cases, runs.values(), strict=True))


def check(alone: Run, together: Run) -> None:
    for run in (alone, together):
        assert run.status == 0, run.stdout + run.stderr
    assert len(alone.losses) == 6
    assert together.losses == pytest.approx(alone.losses, abs=2e-5)
    assert together.losses[-1] < together.losses[0]
    assert together.evaluation("after")["generated_texts_unique"] == alone.evaluation("after")["generated_texts_unique"]


def test_rows_of_every_kind_train_the_same_on_one_process_and_on_two(folder):
    alone, together = (train(folder, QUICK, ranks) for ranks in (1, 2))
    for case in QUICK:
        check(alone[case], together[case])


@pytest.mark.slow
def test_every_strategy_and_engine(folder, request):
    alone, together = (train(folder, CASES, ranks) for ranks in (1, 2))
    if path := request.config.getoption("--mixed-rows"):
        table = [
            {
                "strategy": strategy,
                "engine": engine,
                "losses": {str(ranks): found[strategy, engine].losses for ranks, found in ((1, alone), (2, together))},
            }
            for strategy, engine in CASES
        ]
        most = max(
            abs(one - two) for row in table for one, two in zip(row["losses"]["1"], row["losses"]["2"], strict=True)
        )
        kinds = "12 rows in turns: text alone, 1, 2, 3 pictures, a clip of 3 frames; 4 rows a step, one at once"
        facts = {"rows": kinds, "largest_difference": most, "table": table}
        write(Path(path), provenance("torch", "transformers", "deepspeed", "peft", "bitsandbytes") | facts)
    for case in CASES:
        check(alone[case], together[case])
