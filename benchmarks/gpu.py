"""The recipe in full size on one GPU: right numbers, then speed and memory; the most telling cases first.

    python -m benchmarks.gpu --out $OUT --minutes 9
    python -m benchmarks.gpu --model tiny --device cpu --out gpu_on_cpu --minutes 30

Each case is a process of its own with a time limit of its own, and whatever becomes of it the next one runs. After each case all
that is known is in --out/gpu.json; a second call with the same --out leaves out what is done. Model (random weights) and pages
are made once, in --weights.

The cases: benchmarks.gpu_checks (are the numbers right on this device?); 12 steps of the DocVQA script itself on Letter pages of
2,529 tokens and 17 crops, in each strategy, with larger micro-batches, compiled; a step driven as the official code does
(benchmarks.train_step --reference); single levers; float16; a run that is killed and goes on.

Units: images a second, seconds a step, GB (10^9 bytes) of GPU memory at most, MFU as docs/benchmarks.md has it; of a script's
steps the median of all but the first two. The goals: five times the published rate of one A100.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetuning.errors import run_script

from .models import STRATEGIES, build_folder, parser, picture
from .record import ROOT, provenance, write

SCRIPT = str(ROOT / "finetune_hf_trainer_docvqa.py")
PAGES = 8
# Images a second; the published rates of 8 A100, by RECIPE's table, are 8.657, 12.127 and 10.545.
GOALS = {"full": 5.41, "frozen": 7.0, "lora": 7.58, "qlora": 6.59}
FLAGS = [
    *("--bf16", "--num_crops", "16", "--max_steps", "12", "--logging_steps", "1", "--warmup_steps", "2", "--batch_size", "8"),
    *("--save_strategy", "no", "--overwrite_output_dir", "--no-tqdm", "--eval_size", "0", "--max_new_tokens", "16"),
]  # fmt: skip
# One GPU has nobody to share the optimizer's float32 states with.
IN_8_BITS = ["--optim", "paged_adamw_8bit"]
LARGER = ["--padding_free", "--batch_size_per_gpu"]
STEP = ["-m", "benchmarks.train_step", "--image", "page", "--steps", "4", "--warmup", "2", "--dtype", "bfloat16"]


@dataclass
class Case:
    """A case: its name, its limit in seconds, `python`'s arguments, and how its figures are read."""

    name: str
    limit: int
    command: list[str]
    read: Callable[[], dict[str, Any]]
    # Killed (-9) when this file is there; the same command then goes on.
    killed_at: Path | None = None
    # A folder that must not be there when it begins.
    fresh: Path | None = None


def find_cases(folder: Path, out: Path, device: str, model: str) -> list[Case]:
    """All cases, in the order in which they are run."""

    def script(name: str, strategy: str, *flags: str, limit: int = 100, **options) -> Case:
        output = folder / "output" / name.replace(" ", "-").replace(",", "")
        given = [
            "--model_name_or_path",
            str(folder / model),
            "--data_dir",
            str(folder / "pages"),
            "--output_dir",
            str(output),
        ]
        adamw = IN_8_BITS if strategy in ("full", "frozen") else []
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", SCRIPT]
        on_cpu = ["--use_cpu"] if device == "cpu" else []
        command = [*launcher, *given, *FLAGS, *STRATEGIES[strategy], *adamw, *on_cpu, *flags]
        return Case(name, limit, command, lambda: read_log(output), **options)

    def step(name: str, strategy: str, *flags: str, limit: int = 80) -> Case:
        given = ["--device", device, "--model", model, "--weights", str(folder / model), "--strategy", strategy]
        adamw = IN_8_BITS if strategy in ("full", "frozen") else []
        result = out / "step.json"
        return Case(name, limit, [*STEP, *given, *adamw, *flags, "--result", str(result)], lambda: read_step(result))

    checks = Case(
        "checks",
        120 if device == "cuda" else 900,
        ["-m", "benchmarks.gpu_checks", "--device", device, "--out", str(out / "checks.json")],
        lambda: {"checks": json.loads((out / "checks.json").read_text())["checks"]},
    )
    killed = folder / "output" / "lora-killed"
    found = [
        checks,
        script("lora", "lora", "--eval_size", "2"),
        script("full", "full"),
        script("qlora", "qlora"),
        script("frozen", "frozen"),
        script("lora, micro-batch 4", "lora", *LARGER, "4"),
        script("full, micro-batch 4", "full", *LARGER, "4"),
        script("lora, compiled", "lora", "--torch_compile", *LARGER, "4", limit=200),
        step("lora, the official way", "lora", "--reference", "--recompute", "full"),
        step("lora, a step", "lora", "--recompute", "full"),
        step("lora, a step, PEFT's own products", "lora", "--recompute", "full", "--lora_of_peft"),
        script("full, compiled", "full", "--torch_compile", *LARGER, "4", limit=200),
        step("full, the official way", "full", "--reference", "--recompute", "full"),
        script("lora, nothing recomputed", "lora", "--recompute", "none"),
        script("full, nothing recomputed", "full", "--recompute", "none"),
        script("frozen, micro-batch 8", "frozen", *LARGER, "8"),
        script("lora, micro-batch 8", "lora", *LARGER, "8"),
        script("full, ZeRO-3", "full", "--deepspeed", "zero3"),
        script("full, optimizer in main memory", "full", "--deepspeed", "zero2_offload", "--optim", "adamw_torch_fused"),
        script("qlora, micro-batch 8", "qlora", *LARGER, "8"),
        script("lora, killed", "lora", "--save_strategy", "steps", "--save_steps", "4", "--overwrite_output_dir", "False",
               limit=200, killed_at=killed / "checkpoint-4" / "manifest.json", fresh=killed),
    ]  # fmt: skip
    if device == "cuda":
        found.insert(7, script("lora, float16", "lora", "--bf16", "False", "--fp16"))
        found.insert(8, script("lora, flash attention", "lora", "--use_flash_attention", *LARGER, "4"))
    return found


def read_log(output: Path) -> dict[str, Any]:
    """Figures of a run by what it has logged."""
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    names = ("img_per_second", "tokens_per_second", "seconds_per_step", "peak_memory_gb", "mfu")
    figures = {name: [entry[name] for entry in steps[2:] if name in entry] for name in names}
    found: dict[str, Any] = {name: statistics.median(values) for name, values in figures.items() if values}
    return {**found, "losses": [entry["loss"] for entry in steps]}


def read_step(path: Path) -> dict[str, Any]:
    """Figures of a step of benchmarks.train_step, by the names of a run's log."""
    result = json.loads(path.read_text(encoding="utf-8"))
    return {
        "img_per_second": result["img_per_s"],
        "seconds_per_step": result["seconds"],
        "peak_memory_gb": round(result["memory_peak"] * 2**20 / 1e9, 2),
        "mfu": result["mfu"],
        "split": result["split"],
        "losses": [result["loss"]],
    }


def run_case(case: Case, limit: float) -> dict[str, Any]:
    """Runs a case for at most `limit` seconds: what it found, or why it found nothing, and the end of what it printed."""
    if case.fresh:
        # Of an earlier call that was ended in this case.
        shutil.rmtree(case.fresh, ignore_errors=True)
    start = time.monotonic()
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"gpu-case-{os.getpid()}.log"
    runs = [case.killed_at, None] if case.killed_at else [None]
    result: dict[str, Any] = {"command": " ".join(case.command).replace(str(ROOT) + "/", "")}
    with log.open("w") as file:
        for kill_at in runs:
            process = subprocess.Popen(
                [sys.executable, *case.command], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )
            try:
                while process.poll() is None and time.monotonic() - start < limit:
                    if kill_at is not None and kill_at.exists():
                        break
                    time.sleep(0.2)
            finally:
                ended = process.poll()
                kill_tree(process)
            if kill_at is None and ended is None:
                result["error"] = f"over its limit of {limit:.0f} s"
            elif ended:
                result["error"] = f"status {ended}"
    said = [line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    result |= {"seconds": round(time.monotonic() - start, 1), "said": said[-25:]}
    if "error" not in result or case.name == "checks":
        with suppress(OSError, ValueError, KeyError):
            result |= case.read()
    return result


def kill_tree(process: subprocess.Popen) -> None:
    """Ends a process with its children, those in sessions of their own (torchrun's workers) too."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()


def build_pages(folder: Path) -> None:
    """Letter pages in a converted folder, to train on and two to answer."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", PAGES), ("test", 2)):
        rows = []
        for number in range(count):
            name = f"{split}-{number}.png"
            if not (folder / "images" / name).exists():
                picture("page", number).save(folder / "images" / name)
            turn = {"images": [name], "user": "What is the number?\nAnswer briefly.", "assistant": "1,234.50"}
            rows.append({"id": f"{split}-{number}", "conversations": [turn]})
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    options = parser(__doc__, default_model="full")
    options.add_argument("--out", type=Path, required=True, help="folder for gpu.json; what is done there is left out")
    options.add_argument("--minutes", type=float, default=9, help="no case begins or goes on after them (9)")
    options.add_argument("--only", nargs="+", help="names of cases (all)")
    args = options.parse_args()
    end = time.monotonic() + 60 * args.minutes
    folder = args.weights or Path("gpu_weights").absolute()
    result = args.out / "gpu.json"
    args.out.mkdir(parents=True, exist_ok=True)
    record = json.loads(result.read_text()) if result.exists() else {"goals_img_per_s": GOALS, "cases": {}}
    record |= provenance("torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes")
    record["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    build_folder(args.model, folder / args.model, torch.bfloat16, args.device)
    build_pages(folder / "pages")
    for case in find_cases(folder, args.out, args.device, args.model):
        done = record["cases"].get(case.name)
        left = end - time.monotonic()
        if (done and "error" not in done) or (args.only and case.name not in args.only) or left < 20:
            continue
        record["cases"][case.name] = found = run_case(case, min(case.limit, left))
        write(result, record)
        shown = " ".join(
            f"{name} {found[name]:.4g}"
            for name in ("img_per_second", "seconds_per_step", "peak_memory_gb", "mfu")
            if name in found
        )
        if "checks" in found:
            shown = f"{sum(check['holds'] for check in found['checks'])} of {len(found['checks'])} hold"
        print(f"{case.name:36}{found['seconds']:7.1f} s  {found.get('error', '')} {shown}", flush=True)
    print(f"{record['machine']} -> {result}")


if __name__ == "__main__":
    # A case ends with the call that runs it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run_script(main)
