"""Kills and stops a two-process run at random moments, starts it again, and compares with an undisturbed one.

    python -m benchmarks.interrupt
    python -m benchmarks.interrupt --kills 3 --stops 1 --strategy lora

For full fine-tuning (ZeRO-2) and LoRA: one undisturbed run of the DocVQA script on a tiny model; then the same command, all
its processes killed (-9) at random moments, before training, while saving and while answering too, and started again each
time until it ends; then the same with SIGTERM to torchrun; and once one of the two ranks is killed. Compared are the final
weights, bit for bit, every logged loss, and every answer before and after.

Unit: seconds that passed. Written: benchmarks/results/interrupt.json.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from demo import build_data, build_model
from finetuning.training.checkpoint import find_checkpoints, find_damage, read_manifest

from .record import RESULTS, ROOT, provenance, write

STRATEGIES = {"full": [], "lora": ["--use_lora", "--lora_rank", "4", "--lora_dropout", "0.1"]}
FLAGS = [
    *(
        "--batch_size",
        "8",
        "--num_train_epochs",
        "2",
        "--learning_rate",
        "1e-3",
        "--warmup_steps",
        "0",
        "--num_crops",
        "1",
    ),
    *("--save_steps", "1", "--logging_steps", "3", "--max_new_tokens", "16", "--per_device_eval_batch_size", "2"),
    *("--dataloader_num_workers", "1", "--no-tqdm"),
]
KILLS_OF_A_RUN = 3


class Run:
    """The script under torchrun on two processes."""

    def __init__(self, folder: Path, output: Path, flags: list[str]):
        self.output = output
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("finetune_hf_trainer_docvqa.py", "--model_name_or_path", str(folder / "model")),
            *("--data_dir", str(folder / "data"), "--output_dir", str(output), *FLAGS, *flags),
        ]
        self.start = time.monotonic()
        with open(output.with_suffix(".log"), "a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float | None = None) -> int | None:
        """Exit status; None if it still runs after `seconds`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def kill(self) -> None:
        launcher = psutil.Process(self.process.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.kill()
        self.process.wait()

    def phase(self) -> str:
        """What the run is at, by its files."""
        answered = {"before": 0, "after": 0}
        if (self.output / "predictions.jsonl").exists():
            for line in (self.output / "predictions.jsonl").read_text(errors="replace").splitlines():
                answered["after" if '"stage": "after"' in line else "before"] += 1
        if (self.output / "eval_after.json").exists():
            return "reporting"
        if answered["after"]:
            return "answering after"
        if any(read_manifest(path) is None for path in find_checkpoints(self.output)):
            return "saving"
        if (self.output / "eval_before.json").exists():
            return "training"
        return "answering before" if answered["before"] else "starting"


def results(output: Path) -> dict:
    """What must not depend on interruptions."""
    weights = next(path for name in ("model", "adapter_model") if (path := output / f"{name}.safetensors").exists())
    answers = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]
    return {"weights": weights.read_bytes(), "losses": losses, "answers": answers}


def compare(output: Path, expected: dict) -> dict[str, bool]:
    found = results(output)
    return {f"{name}_equal": found[name] == expected[name] for name in expected}


def newest(output: Path) -> str | None:
    found = find_checkpoints(output)
    return found[0].name if found else None


def measure(folder: Path, strategy: str, kills: int, stops: int, chooser: random.Random) -> dict:
    """All interruptions of one strategy."""
    flags = STRATEGIES[strategy]
    whole = Run(folder, folder / f"{strategy}-whole", flags)
    assert whole.wait() == 0, whole.output.with_suffix(".log")
    seconds, expected = time.monotonic() - whole.start, results(whole.output)
    result = {"undisturbed_seconds": round(seconds, 1), "kills": [], "ends": [], "stops": []}

    while len(result["kills"]) < kills:
        # Up to three kills, at any moment between the first second of work and the end; then it may come to its end.
        output = folder / f"{strategy}-killed-{len(result['ends'])}"
        for _ in range(KILLS_OF_A_RUN):
            run = Run(folder, output, flags)
            delay = chooser.uniform(0.35, 0.9) * seconds
            if run.wait(delay) is not None or len(result["kills"]) == kills:
                break
            moment = {"run": len(result["ends"]), "seconds": round(delay, 1), "phase": run.phase()}
            run.kill()
            result["kills"].append({**moment, "checkpoint": newest(output)})
            print(strategy, "kill", result["kills"][-1], flush=True)
        status = run.wait() if run.process.returncode in (None, 0) else Run(folder, output, flags).wait()
        result["ends"].append({"status": status, **compare(output, expected)})
        print(strategy, "end", result["ends"][-1], flush=True)

    for number in range(stops):
        output = folder / f"{strategy}-stopped-{number}"
        run = Run(folder, output, flags)
        delay = chooser.uniform(0.45, 0.9) * seconds
        if run.wait(delay) is not None:
            continue
        moment, begun = run.phase(), time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        run.wait()
        took, checkpoint = time.monotonic() - begun, newest(output)
        if checkpoint:
            assert find_damage(output / checkpoint) is None
        again = Run(folder, output, flags).wait()
        stop = {"seconds": round(delay, 1), "phase": moment, "seconds_until_exit": round(took, 1)}
        stop |= {"checkpoint": checkpoint, "status_when_started_again": again, **compare(output, expected)}
        result["stops"].append(stop)
        print(strategy, "stop", stop, flush=True)

    run = Run(folder, folder / f"{strategy}-rank", flags)
    while run.phase() not in ("training", "saving"):
        time.sleep(0.2)
    time.sleep(1)
    begun = time.monotonic()
    run.ranks()[1].kill()
    status = run.wait()
    result["rank_killed"] = {"seconds_until_all_ended": round(time.monotonic() - begun, 1), "status": status}
    print(strategy, "rank killed", result["rank_killed"], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=(*STRATEGIES, "all"), default="all")
    parser.add_argument("--kills", type=int, default=20, help="kills of each strategy (20)")
    parser.add_argument("--stops", type=int, default=5, help="SIGTERMs of each strategy (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--result", type=Path, default=RESULTS / "interrupt.json", help="file to write")
    args = parser.parse_args()
    result = provenance("torch", "transformers", "accelerate", "deepspeed", "peft")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_model(folder / "model")
        build_data(folder / "data", num_train=80, num_test=60)
        for strategy in STRATEGIES if args.strategy == "all" else [args.strategy]:
            result[strategy] = measure(folder, strategy, args.kills, args.stops, random.Random(args.seed))
            write(args.result, result)


if __name__ == "__main__":
    main()
