"""How near the planner's memory is to that of full-size steps on fake tensors, and what the planner goes by.

    python -m benchmarks.plan --fit
    python -m benchmarks.plan

With --fit: takes steps of a few layers of the official sizes, in each way to train and with samples of several sizes, and writes
what their memory depends on into finetuning/training/activations.json. To be run again when the model's code changes, which a
test tells. Without: takes steps of all layers in 40 settings, compares, and times the planner. Needs no GPU and no weights.

Units: GiB. `activations` are those of a micro-batch (see finetuning/training/fake_step.py), `peak` is with weights, gradients,
optimizer and buffers of the setting; the deviation is the plan's from the full step's. Written: benchmarks/results/plan.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.arguments import RecipeArguments, parse_args
from finetuning.errors import run_script
from finetuning.plan import command, make_plan
from finetuning.plan import parse_args as parse_plan
from finetuning.training.fake_step import Batch, FakeModel, Segment, repeated, whole
from finetuning.training.memory import (
    GIB,
    STORED,
    Activations,
    course_name,
    features,
    plan_memory,
    sizes_of,
)
from finetuning.training.speed import CARDS
from phi3v import Phi3VConfig

from .models import STRATEGIES
from .record import RESULTS, ROOT, provenance, write

# A Letter page at num_crops 16, a photo at num_crops 4, a clip of eight frames, a small picture with a long answer.
PAGE, PHOTO, CLIP, SMALL = (2529, 17, 12), (840, 5, 12), (3072, 24, 8), (400, 2, 200)
WAYS = {"full": [], "frozen": ["--freeze_vision_model"], "lora": ["--use_lora"]}
ENGINES = {"autocast": ["--deepspeed", "none"], "DeepSpeed": ["--deepspeed", "ds_configs/zero2.json"]}
RECOMPUTE = ("full", "vision", "none")
# Samples, and rows of them, whose steps the fit goes by; the last ones padded.
FITTED = [
    *(Batch(rows, *sample) for rows, sample in ((1, PAGE), (2, PAGE), (1, PHOTO), (4, PHOTO), (1, CLIP), (2, SMALL))),
    *(Batch(rows, *sample, masked=True) for rows, sample in ((2, PAGE), (3, PHOTO))),
]
# What a setting's plan is held against: another number of rows, lengths and crops than the fit's.
COMPARED = [
    Batch(1, 2443, 17, 10),
    Batch(4, *PAGE),
    Batch(3, 1500, 10, 30, masked=True),
    Batch(5, 700, 4, 12, packed=True),
]


HARDWARE = {
    "8x A100-80": ["--gpus", "8", "--gpu", "A100"],
    "8x V100-32": ["--gpus", "8", "--gpu", "V100"],
    "4x 48 GB": ["--gpus", "4", "--gpu_memory", "48"],
    "2x 24 GB": ["--gpus", "2", "--gpu_memory", "24"],
    "1x 80 GB": ["--gpus", "1", "--gpu_memory", "80"],
    "1x 24 GB": ["--gpus", "1", "--gpu_memory", "24"],
}


def arguments(*flags: str) -> RecipeArguments:
    """Of a run in bfloat16, which need no weights."""
    given = ["--model_name_or_path", "official/sizes", "--output_dir", tempfile.gettempdir(), "--bf16"]
    return parse_args([*given, *flags])


def official() -> Phi3VConfig:
    """The official sizes; those of `Phi3VConfig` itself."""
    return Phi3VConfig()


def fit(config: Phi3VConfig) -> dict[str, Any]:
    """Bytes of a micro-batch as the largest of a few linear functions of what it holds, for each way to train."""
    found: dict[str, Any] = {"sizes": sizes_of(config), "lora_rank": 64, "courses": {}}
    for (way, flags), (engine, more) in product(WAYS.items(), ENGINES.items()):
        args = arguments(*flags, *more)
        model = FakeModel(config, args)
        for recompute in RECOMPUTE:
            start = time.perf_counter()
            steps = [model.step(batch, recompute) for batch in FITTED]
            course = found["courses"].setdefault(course_name(args), {})
            course[recompute] = lines(config, steps)
            print(f"{way:7}{engine:10}{recompute:7}{time.perf_counter() - start:6.1f} s", flush=True)
    return found


def lines(config: Phi3VConfig, steps: list[list[Segment]]) -> dict[str, Any]:
    """The peak of steps of `FITTED` as the largest of several linear functions of their features, and their traffic as one."""
    # In each segment by itself, where there is one thing at a time and all is linear; relative to the step's size.
    rows = np.array([features(batch) for batch in FITTED])
    weights = 1 / np.array([whole(config, step).peak for step in steps])

    def solve(values: list[float]) -> np.ndarray:
        # Columns of like size, so that small factors are not taken for none.
        scale = np.abs(rows).max(0)
        factors, *_ = np.linalg.lstsq(rows / scale * weights[:, None], np.array(values) * weights, rcond=1e-9)
        return factors / scale

    segments = [
        [solve([getattr(step[number], name) for step in steps]) for name in ("change", "peak")]
        for number in range(len(steps[0]))
    ]
    live, candidates = np.zeros(rows.shape[1]), []
    for number, times in repeated(config, steps[0]):
        change, peak = segments[number]
        # Of like layers one after the other, the first or the last is the fullest.
        candidates += [live + peak, live + (times - 1) * change + peak]
        live = live + times * change
    traffic = solve([whole(config, step).traffic for step in steps])
    # Those that are the largest for some micro-batch.
    every = np.array(
        [
            features(Batch(count, length, crops, labels, masked=masked))
            for count, length, crops, labels, masked in product(
                (1, 2, 4, 8, 16), (64, 256, 1024, 2529, 8192), (2, 5, 17, 60), (4, 64, 512), (False, True)
            )
        ]
    )
    best = sorted(set(np.argmax(every @ np.array(candidates).T, axis=1).tolist()))
    return {
        "peak": [[float(f"{value:.6g}") for value in candidates[number]] for number in best],
        "traffic": [float(f"{value:.6g}") for value in traffic],
    }


def settings() -> list[tuple[str, str, Batch]]:
    """Strategy, recomputation and micro-batch of 40 settings."""
    found = [
        (strategy, recompute, batch) for strategy in STRATEGIES for recompute in RECOMPUTE for batch in COMPARED[:3]
    ]
    # Padding-free.
    return found + [(strategy, "full", COMPARED[3]) for strategy in STRATEGIES]


def compare(config: Phi3VConfig, result: dict[str, Any], path: Path) -> None:
    """Adds the settings, each with its plan and its full step, to `result`; writes it as it grows."""

    @cache
    def both(strategy: str):
        args = arguments(*STRATEGIES[strategy])
        clip: Any = config.vision_config
        return (
            args,
            Activations(config, args),
            FakeModel(config, args, config.num_hidden_layers, clip.num_hidden_layers),
        )

    for strategy, recompute, batch in settings():
        args, planned, model = both(strategy)
        start = time.perf_counter()
        found = whole(config, model.step(batch, recompute)).peak
        seconds = time.perf_counter() - start
        sizes = {"plan": planned.of(batch, recompute).peak, "full step": found}
        entry: dict[str, Any] = {"strategy": strategy, "recompute": recompute, "batch": vars(batch)}
        for name, size in sizes.items():
            memory = plan_memory(args, planned.parameters, size, 8, config.hidden_size)
            entry[name] = {"activations": round(size / GIB, 3), "peak": round(memory.peak / GIB, 3)}
        for name in ("activations", "peak"):
            entry[f"{name} deviation"] = round(entry["plan"][name] / entry["full step"][name] - 1, 4)
        result["settings"].append({**entry, "seconds": round(seconds, 1)})
        deviations = [abs(entry["peak deviation"]) for entry in result["settings"]]
        result["largest deviation"], result["mean deviation"] = max(deviations), round(statistics.mean(deviations), 4)
        write(path, result)
        print(
            f"{strategy:7}{recompute:7}{batch.rows} x {batch.tokens:5} tokens {batch.crops:3} crops"
            f"{' masked' * batch.masked}{' padding-free' * batch.packed}: {entry['plan']['peak']:8.2f} GiB planned, "
            f"{entry['full step']['peak']:8.2f} in full size, {entry['peak deviation']:+.2%} "
            f"(activations {entry['activations deviation']:+.2%})",
            flush=True,
        )


def hardware() -> dict[str, Any]:
    """What the planner recommends for the machines of `HARDWARE`."""
    found = {}
    for name, flags in HARDWARE.items():
        own, args = parse_plan([*flags, "--batch_size", "64"])
        plan = make_plan(own, args)
        best = plan.best
        assert best is not None, "LoRA fits on each of them"
        bf16 = CARDS[plan.card].bf16
        found[name] = {
            "command": command(args, best.setting, plan.planner.gpus, bf16, None),
            "peak_gib": round(best.memory.peak / GIB, 1),
            "usable_gib": round(plan.usable / GIB, 1),
            "parts_gib": {part: round(size / GIB, 1) for part, size in vars(best.memory).items()},
            "samples_per_second": round(args.batch_size / plan.seconds(best.setting), 1),
        }
        print(f"{name:12}{found[name]['peak_gib']:6.1f} GiB  {found[name]['command']}", flush=True)
    return found


def planner_seconds() -> dict[str, float]:
    """Seconds of one call of the planner, by the clock and of the processor, imports included."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "finetuning.plan", *HARDWARE["8x A100-80"]], cwd=ROOT, check=True, capture_output=True
    )
    used, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(wall, 1), "processor": round(processor, 1)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--fit", action="store_true", help="write what the planner goes by, and end")
    options.add_argument("--keep_settings", action="store_true", help="keep the 40 settings that the result file has")
    options.add_argument("--result", type=Path, default=RESULTS / "plan.json", help="file to write")
    args = options.parse_args()
    config = official()
    if args.fit:
        found = fit(config)
        STORED.write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(f"-> {STORED}")
        return
    result = provenance("torch", "transformers", "peft", "deepspeed")
    result |= {"planner_seconds": planner_seconds(), "hardware": hardware(), "settings": []}
    if args.keep_settings:
        kept = json.loads(args.result.read_text(encoding="utf-8"))
        names = ("settings", "largest deviation", "mean deviation", "settings_of")
        result |= {name: kept[name] for name in names if name in kept}
        result.setdefault("settings_of", {name: kept[name] for name in ("date", "commit", "machine")})
        write(args.result, result)
    else:
        compare(config, result, args.result)
    print(f"largest deviation {result['largest deviation']:.2%}, mean {result['mean deviation']:.2%} -> {args.result}")


if __name__ == "__main__":
    run_script(main)
