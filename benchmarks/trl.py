"""Preferences and rewards by TRL on the demo's handwritten numbers: does the margin, does the reward rise on pages held back?

    .venvs/trl/bin/python -m benchmarks.trl            # the environment of `make test-trl`; five minutes on two idle cores

Half-trains the demo's model by the DocVQA script (one pass), and goes on from there: by finetune_trl_dpo.py with pairs of the
written number and another of its length, and by finetune_trl_grpo.py with ANLS as the reward. The curves go to
benchmarks/results/trl.json.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import demo
from finetuning.errors import run_script

from .record import RESULTS, ROOT, provenance, write

PAIRS = {"train": 800, "test": 200}
COMMON = [
    *("--num_crops", "1", "--bf16", "False", "--logging_steps", "5", "--save_strategy", "no", "--disable_tqdm", "True"),
    # Nothing to save in so small a model.
    *("--gradient_checkpointing", "False", "--per_device_eval_batch_size", "40"),
]
# Found by trying; TRL's defaults are for models a thousand times as large.
RUNS = {
    "dpo": [
        *("finetune_trl_dpo.py", *COMMON, "--learning_rate", "1e-3", "--per_device_train_batch_size", "16"),
        *("--num_train_epochs", "1"),
    ],
    "grpo": [
        *("finetune_trl_grpo.py", *COMMON, "--learning_rate", "3e-3", "--per_device_train_batch_size", "128"),
        *("--num_generations", "8", "--max_completion_length", "6", "--max_steps", "60", "--eval_size", "100"),
    ],
}
FIGURES = {"dpo": ("rewards/margins", "rewards/accuracies"), "grpo": ("reward",)}


def build_pairs(data: Path, folder: Path) -> Path:
    """Pages of the demo's data, each with its number as the chosen answer and another one of its length as the rejected."""
    rng, rows = random.Random(0), {split: [] for split in PAIRS}
    for line in (data / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        chosen = rejected = row["answers"][0]
        while rejected == chosen:
            rejected = "".join(rng.choice("0123456789") for _ in chosen)
        question = f"{row['query']['en']}\nAnswer briefly."
        pair = {"prompt": question, "chosen": chosen, "rejected": rejected}
        if len(rows[row["split"]]) < PAIRS[row["split"]]:
            rows[row["split"]].append({"id": row["id"], "images": [row["image"]], **pair})
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for pair in (pair for pairs in rows.values() for pair in pairs):
        shutil.copy(data / pair["images"][0], folder / "images")
    for split, pairs in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return folder


def call(command: list[str], log: Path) -> float:
    """Runs a script of the repository, its output in a file; seconds.

    Raises:
        RuntimeError: if it fails, with the end of that file.
    """
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code:
        raise RuntimeError(
            f"{command[0]}: expected exit status 0, found {code}; end of {log}:\n{log.read_text()[-2000:]}"
        )
    return round(time.monotonic() - start, 1)


def measure(folder: Path) -> dict:
    """What the result file holds; a half-trained model that stands in the folder already is taken."""
    if not (folder / "half" / "config.json").exists():
        demo.build_model(folder / "model")
        demo.build_data(folder / "data")
        paths = ["--model_name_or_path", str(folder / "model"), "--data_dir", str(folder / "data")]
        flags = [*demo.DEMO_FLAGS, "--num_train_epochs", "1", "--output_dir", str(folder / "half")]
        call(["finetune_hf_trainer_docvqa.py", *paths, *flags], folder / "half.log")
    anls = json.loads((folder / "half" / "eval_after.json").read_text())["anls"]
    result = {**provenance("torch", "transformers", "trl", "peft"), "start": {"anls": round(anls, 4)}}
    data = {"dpo": build_pairs(folder / "data", folder / "pairs"), "grpo": folder / "data"}
    for name, (script, *flags) in RUNS.items():
        output = folder / name
        shutil.rmtree(output, ignore_errors=True)
        paths = [
            "--model_name_or_path",
            str(folder / "half"),
            "--data_dir",
            str(data[name]),
            "--output_dir",
            str(output),
        ]
        seconds = call([script, *paths, *flags], folder / f"{name}.log")
        evaluations = {stage: json.loads((output / f"eval_{stage}.json").read_text()) for stage in ("before", "after")}
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        trained = [entry for entry in history if "grad_norm" in entry]
        result[name] = {
            "script": script,
            "lines": len((ROOT / script).read_text(encoding="utf-8").splitlines()),
            "flags": " ".join(flags),
            "held_out": {
                stage: {figure: round(found[figure], 4) for figure in FIGURES[name]}
                for stage, found in evaluations.items()
            },
            "steps": [entry["step"] for entry in trained],
            **{figure: [round(entry[figure], 4) for entry in trained] for figure in FIGURES[name]},
            "seconds": seconds,
        }
        print(f"{name}: held out {result[name]['held_out']}, {seconds:.0f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, help="folder to keep models, data and runs in (default: not kept)")
    parser.add_argument("--result", type=Path, default=RESULTS / "trl.json", help="file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out_dir or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        write(args.result, measure(folder))
    print(f"-> {args.result}")


if __name__ == "__main__":
    run_script(main)
