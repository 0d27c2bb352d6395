"""Proof of `finetuning.doubts`: answers swapped by a seed, and how many of them it puts first.

    python -m benchmarks.doubts
    python -m benchmarks.doubts --only receipts --seeds 3 --out_dir doubts_output

5% of the training answers of a data set get the answer of another of them, a model is trained on all rows with the real script,
and the rows are listed by that model, and by the halves of `--folds 2`:

- demo: demo.py's 4,000 pages; trained as `make demo` does it, from random weights, which the halves cannot be the LoRA runs for that
  they are by default: they are trained in full too, in twice the epochs, so as many steps.
- demo_lora: the same pages, LoRA for model and halves, over a model that has read 4,000 other pages once.
- receipts: the 39 questions about 12 receipts of ../shared/data/docvqa, of which 5% are 2, so several seeds; in full from random
  weights, as no model that can read is at hand.

Units: found_in_worst, share of the swapped rows among the 5% and 10% that are listed first, 0 to 1, beside that of a random order;
seconds that passed; memory, the largest process, MB. Written: benchmarks/results/doubts.json.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demo import DEMO_FLAGS, build_data, build_model
from finetuning.data.perceptual import WORDS
from finetuning.errors import run_script
from finetuning.results.twins import near_pairs

from .record import RESULTS, ROOT, provenance, write

SHARE = 0.05
WORST = (0.05, 0.10)
RECEIPTS = ROOT.parent / "shared" / "data" / "docvqa"
TASK = "docvqa"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
RECEIPT_FLAGS = [
    *("--num_crops", "4", "--batch_size", "8", "--batch_size_per_gpu", "8", "--learning_rate", "3e-3", "--num_train_epochs", "30"),
    *("--recompute", "none", "--save_strategy", "no", "--per_device_eval_batch_size", "13", "--max_new_tokens", "48"),
    *("--no-tqdm",),
]  # fmt: skip


def swap_answers(rows: list[dict[str, Any]], seed: int) -> list[str]:
    """Gives 5% of the rows the answers of another of them; returns their ids."""
    rng = random.Random(seed)
    while True:
        chosen = rng.sample(range(len(rows)), max(2, round(SHARE * len(rows))))
        answers = [rows[number]["answers"] for number in chosen]
        given = answers[1:] + answers[:1]
        if all(set(old).isdisjoint(new) for old, new in zip(answers, given, strict=True)):
            break
    for number, answer in zip(chosen, given, strict=True):
        rows[number]["answers"] = answer
    return [rows[number]["id"] for number in chosen]


def run(command: list[str], log: Path) -> dict[str, float]:
    """Runs a module of the repository, its output in a file; seconds, and MB of its largest process.

    Raises:
        RuntimeError: if it fails, with the last lines of that file.
    """
    start = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        process = os.posix_spawn(
            sys.executable,
            [sys.executable, *command],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)],
        )
        _, status, usage = os.wait4(process, 0)
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise RuntimeError("\n".join((f"{' '.join(command)} failed; end of {log}:", *lines)))
    return {"seconds": round(time.monotonic() - start, 1), "largest_process_mb": usage.ru_maxrss // 1024}


def found_in_worst(path: Path, swapped: list[str]) -> dict[str, float]:
    """Share of the swapped rows among the first 5% and 10% of doubts.jsonl."""
    order = [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        f"{share:.0%}": round(len(set(order[: round(share * len(order))]) & set(swapped)) / len(swapped), 4)
        for share in WORST
    }


def prove(
    folder: Path, seed: int, flags: list[str], half_flags: list[str], script_flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains on the rows of folder/data with swapped answers, and lists them with and without folds.

    Args:
        folder (Path): for everything; it holds data/, and model/ to begin from.
        seed (int): of the swapped rows, the weights and the order of training.
        flags (list[str]): of all runs.
        half_flags (list[str]): of the halves alone.
        script_flags (Sequence[str]): of the model's own training alone.
    """
    path = folder / "data" / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    swapped = swap_answers(train, seed)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = [*flags, "--seed", str(seed), "--data_dir", str(folder / "data")]
    script = [f"finetune_hf_trainer_{TASK}.py", "--model_name_or_path", str(folder / "model"), *flags, *script_flags]
    found: dict[str, Any] = {"rows": len(train), "swapped": len(swapped), "seed": seed}
    found["training"] = run([*TORCHRUN, *script, "--output_dir", str(folder / "run")], folder / "run.log")
    result = folder / "run" / "eval_after.json"
    if result.exists():
        found["training"]["anls"] = round(json.loads(result.read_text(encoding="utf-8"))["anls"], 4)
    judge = ["-m", "finetuning.doubts", str(folder / "run"), *flags]
    for name, command in {
        "without_folds": [*judge, "--output_dir", str(folder / "without_folds")],
        "with_folds": [*TORCHRUN, *judge, "--folds", "2", *half_flags, "--output_dir", str(folder / "with_folds")],
    }.items():
        measured = run(command, folder / f"{name}.log")
        found[name] = {"found_in_worst": found_in_worst(folder / name / "doubts.jsonl", swapped), **measured}
        print(f"{folder.name}, seed {seed}, {name}: {found[name]}", flush=True)
    return found


def prove_demo(folder: Path, seed: int) -> dict[str, Any]:
    build_data(folder / "data", seed)
    build_model(folder / "model", seed)
    return prove(folder, seed, DEMO_FLAGS, ["--use_lora", "False", "--num_train_epochs", "6"])


def prove_demo_lora(folder: Path, seed: int) -> dict[str, Any]:
    build_data(folder / "data", seed)
    build_data(folder / "other", seed + 1)
    build_model(folder / "random", seed)
    script = [f"finetune_hf_trainer_{TASK}.py", "--model_name_or_path", str(folder / "random"), *DEMO_FLAGS]
    paths = ["--data_dir", str(folder / "other"), "--output_dir", str(folder / "model")]
    run([*TORCHRUN, *script, "--num_train_epochs", "1", *paths], folder / "model.log")
    begun = json.loads((folder / "model" / "eval_after.json").read_text(encoding="utf-8"))
    flags = [*DEMO_FLAGS, "--use_lora", "--learning_rate", "1e-3"]
    found = prove(folder, seed, flags, ["--num_train_epochs", "6"])
    return {"anls_of_the_model_below": round(begun["anls"], 4), **found}


def prove_receipts(folder: Path, seeds: int) -> list[dict[str, Any]]:
    """Several seeds: one alone swaps two rows."""
    runs = []
    for seed in range(seeds):
        place = folder / f"receipts-{seed}"
        shutil.copytree(RECEIPTS, place / "data")
        path = place / "data" / "rows.jsonl"
        rows = [json.loads(line) | {"split": "train"} for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        build_model(place / "model", seed)
        nothing_answered = ("--eval_split", "train", "--eval_size", "0")
        runs.append(prove(place, seed, RECEIPT_FLAGS, ["--use_lora", "False"], nothing_answered))
    return runs


def time_near_pairs(count: int = 100_000) -> dict[str, float]:
    """Seconds to compare the hashes of `count` pictures of one question, that are all different, and of which half are alike."""
    hashes = np.random.default_rng(0).integers(0, 2**63, (count, 1, WORDS), dtype=np.uint64)
    found: dict[str, float] = {"pictures": count}
    for name in ("all_different", "half_alike"):
        start = time.monotonic()
        near_pairs(hashes)
        found[f"{name}_seconds"] = round(time.monotonic() - start, 1)
        hashes[: count // 2] = 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("demo", "demo_lora", "receipts", "twins"), help="one of them (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the demo's data, weights and swapped rows (0)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the receipts, from 0 (3)")
    parser.add_argument("--out_dir", type=Path, help="new folder to keep everything in (default: not kept)")
    parser.add_argument("--result", type=Path, default=RESULTS / "doubts.json", help="file to write")
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.result.read_text(encoding="utf-8")) if args.result.exists() else {}
    result |= provenance("torch", "transformers", "peft", "imagehash", "pillow", "scipy")
    result["random_order"] = {f"{share:.0%}": share for share in WORST}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out_dir or Path(temporary)).resolve()
        if args.only in (None, "twins"):
            result["near_pairs"] = time_near_pairs()
        if args.only in (None, "demo"):
            result["demo"] = [prove_demo(folder / "demo", args.seed)]
        if args.only in (None, "demo_lora"):
            result["demo_lora"] = [prove_demo_lora(folder / "demo_lora", args.seed)]
        if args.only in (None, "receipts"):
            result["receipts"] = prove_receipts(folder, args.seeds)
    write(args.result, result)
    print(f"-> {args.result}")


if __name__ == "__main__":
    run_script(main)
