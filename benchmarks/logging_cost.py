"""What it costs to log every step: counted, printed and sent to the trackers that are installed, against a run without any of it.

    python -m benchmarks.logging_cost

One process; the medium model, full fine-tuning, samples of one photo in a single
crop beside its global view (a short step, in which logging weighs more); runs of few steps with and without
logging in turns, the first step of each left out. Two figures, each a share of a step:

- share_of_step: the seconds within the calls that count and log (on a CPU they wait for all that they start), over the median
  step that holds them. The goal of at most 1% is held against this one, which a busy machine does not blur;
- step_ratio: medians of all steps with logging over those without, which holds what trackers do in threads of their own too;
  between two runs without logging (step_ratio_of_nothing) it says how much the machine blurs.

Unit: seconds that passed. Written: benchmarks/results/logging_cost.json.
"""

import argparse
import os
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainerCallback

from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.dataset import build_dataset
from finetuning.errors import run_script
from finetuning.training.loading import load_model, load_processor
from finetuning.training.trainer import RecipeTrainer

from .models import MODELS, build_folder, recipe_arguments, sample
from .record import RESULTS, provenance, write

GOAL = 0.01
TRACKERS = [name for name in ("tensorboard", "wandb") if find_spec(name)]


class Steps(TrainerCallback):
    """Seconds from the beginning of a step to that of the next one, logging included."""

    def __init__(self):
        self.marks: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)][1:]


class Timed(RecipeTrainer):
    """Adds up the seconds within the calls that count and log."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.logging_seconds: list[float] = []
        count = self._progress.count

        def timed(inputs) -> None:
            start = time.perf_counter()
            count(inputs)
            self.logging_seconds.append(time.perf_counter() - start)

        self._progress.count = timed

    def log(self, *args, **kwargs) -> None:
        start = time.perf_counter()
        super().log(*args, **kwargs)
        if self.logging_seconds:
            self.logging_seconds[-1] += time.perf_counter() - start


class Silent(RecipeTrainer):
    """A trainer without the counting and the lines; it logs nothing either with --logging_strategy no."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(self._progress)
        self._progress.count = lambda _: None


def train(folder: Path, logged: bool, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step but the first, and those of them that logging took."""
    flags = [
        *("--num_crops", "1"),
        "--max_steps",
        str(steps + 2),
        "--batch_size",
        "1",
        "--save_strategy",
        "no",
        "--dataloader_num_workers",
        "0",
    ]
    flags += (
        ["--logging_steps", "1", "--report_to", *TRACKERS]
        if logged
        else ["--logging_strategy", "no", "--logging_first_step", "False"]
    )
    args = recipe_arguments(folder, "full", *flags)
    processor = load_processor(args)
    rows, clock = [{"id": str(number)} for number in range(steps + 2)], Steps()
    trainer = (Timed if logged else Silent)(
        model=load_model(args),
        args=args,
        train_dataset=build_dataset(rows, lambda row: sample("photo", int(row["id"])), processor, args, "train"),
        data_collator=DataCollatorForPhi3V(processor.tokenizer.pad_token_id),
        processing_class=processor,
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds(), trainer.logging_seconds[1:-1] if logged else []


def cost(folder: Path, rounds: int, steps: int) -> dict:
    """The figures of the result file; see the module's docstring."""
    found, logging = {"with": [], "without": [], "without again": []}, []
    for _ in range(rounds):
        for way, all_seconds in found.items():
            seconds, spent = train(folder, way == "with", steps)
            all_seconds += seconds
            logging += spent
    medians = {way: statistics.median(seconds) for way, seconds in found.items()}
    return {
        "trackers": TRACKERS,
        "rounds": rounds,
        "steps": steps,
        "seconds_a_step": {way: round(seconds, 4) for way, seconds in medians.items()},
        "seconds_of_logging": {
            "median": round(statistics.median(logging), 5),
            "mean": round(statistics.mean(logging), 5),
            "most": round(max(logging), 5),
        },
        "share_of_step": round(statistics.mean(logging) / medians["with"], 5),
        "goal": GOAL,
        "step_ratio": round(medians["with"] / medians["without"], 4),
        "step_ratio_of_nothing": round(medians["without again"] / medians["without"], 4),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", choices=MODELS, default="medium", help="size of the model (medium)")
    options.add_argument("--rounds", type=int, default=3, help="runs of each kind (3)")
    options.add_argument("--steps", type=int, default=4, help="steps measured of each run (4)")
    options.add_argument("--result", type=Path, default=RESULTS / "logging_cost.json", help="file to write")
    given = options.parse_args()
    record = provenance("torch", "transformers", *TRACKERS)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": temporary, "WANDB_SILENT": "true"}
        folder = build_folder(given.model, Path(temporary) / "model", torch.float32)
        result = cost(folder, given.rounds, given.steps)
    write(given.result, record | {"model": given.model} | result)
    for name in ("seconds_a_step", "seconds_of_logging", "share_of_step", "step_ratio", "step_ratio_of_nothing"):
        print(name, result[name])


if __name__ == "__main__":
    run_script(main)
