"""The architecture in full size on a CPU, from a script's command to a merged model: random weights, bfloat16.

    python -m benchmarks.full_size [--folder DIR]
    python -m benchmarks.full_size --model tiny

For LoRA and for QLoRA: the DocVQA script on pages at 4 crops, two steps of one sample each, two questions answered before and
after; then the saved adapter answers a page (finetuning.ask), is merged (finetuning.merge), and the merged model answers it.
Nothing of it says how well the model learns: it shows that every part runs in full size, in which memory and time.
Needs 18 GB of memory, 30 GB of disk and, on two cores, about an hour. With --folder the weights are kept for the next time.

Units: seconds, and GB of resident memory (the largest of a command's processes). Written after each command:
benchmarks/results/full_size.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from demo import build_data
from finetuning.errors import RunError, run_script

from .models import MODELS, STRATEGIES, build_folder
from .record import RESULTS, ROOT, provenance, write

SCRIPT = "finetune_hf_trainer_docvqa.py"
FLAGS = [
    *("--bf16", "--num_crops", "4", "--batch_size", "1", "--max_steps", "2", "--warmup_steps", "0", "--logging_steps", "1"),
    *("--eval_size", "2", "--max_new_tokens", "8", "--save_strategy", "no", "--overwrite_output_dir", "--no-tqdm"),
]  # fmt: skip


def run(*command: str) -> dict:
    """Runs `python` with these arguments: what it printed, seconds and peak memory in GB.

    Raises:
        RunError: if it fails, with the end of what it printed.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process:
        said = process.stdout.read() if process.stdout else ""
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RunError(f"{' '.join(command)}: status {process.returncode}\n{said[-2000:]}")
    return {
        "seconds": round(time.monotonic() - start),
        "peak_memory_gb": round(used.ru_maxrss * 1024 / 1e9, 2),
        "said": said.splitlines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="full")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["lora", "qlora"])
    parser.add_argument("--folder", type=Path, help="where to build model and data (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS / "full_size.json", help="file to write")
    args = parser.parse_args()
    record = provenance("torch", "transformers", "peft", "bitsandbytes") | {"model": args.model, "commands": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        base = build_folder(args.model, folder / f"base-{args.model}", torch.bfloat16)
        data = folder / "data"
        if not data.exists():
            build_data(data)
        page = str(next(iter(sorted((data / "images").iterdir()))))

        def measure(strategy: str, step: str, *command: str, **facts) -> dict:
            found = run(*command)
            found["said"] = [line.replace(str(folder), "DIR") for line in found["said"]]
            found = {"strategy": strategy, "step": step, **found, **facts}
            record["commands"].append(found)
            write(args.out, record)
            print(f"{strategy:6}{step:16}{found['seconds']:6} s{found['peak_memory_gb']:8.2f} GB", flush=True)
            return found

        for strategy in args.strategies:
            output, merged = folder / f"output-{strategy}", folder / f"merged-{strategy}"
            shutil.rmtree(merged, ignore_errors=True)
            given = ["--model_name_or_path", str(base), "--data_dir", str(data), "--output_dir", str(output)]
            found = measure(strategy, "train", SCRIPT, *given, *STRATEGIES[strategy], *FLAGS)
            log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            found["losses"] = [line["loss"] for line in log if "loss" in line]
            found["gradient_norms"] = [line["grad_norm"] for line in log if "loss" in line]
            for stage in ("before", "after"):
                found[f"eval_{stage}"] = json.loads((output / f"eval_{stage}.json").read_text(encoding="utf-8"))
            found["saved_gb"] = round(sum(path.stat().st_size for path in output.glob("*.safetensors")) / 1e9, 2)
            ask = ["What is the handwritten number?", "--image", page, "--max_new_tokens", "8", "--num_crops", "4"]
            measure(strategy, "ask the adapter", "-m", "finetuning.ask", str(output), *ask)
            measure(strategy, "merge", "-m", "finetuning.merge", str(output), str(merged))
            measure(strategy, "ask the merged", "-m", "finetuning.ask", str(merged), *ask)
            shutil.rmtree(merged)
    write(args.out, record)


if __name__ == "__main__":
    run_script(main)
