"""Seconds and memory that a script's start takes before a model is loaded, by the number of rows, the first and the second time.

    python -m benchmarks.startup                  # 1k, 100k, 1M rows, and 100k rows with a picture each
    python -m benchmarks.startup --label before   # the same, recorded beside it, for another commit

Two processes under torchrun with one core each, `OMP_NUM_THREADS=1`: the DocVQA script's own `load_splits` and
`to_conversation`, from `load_splits` up to `begin_or_resume`, everything before `load_model`. Rows stand in train.jsonl and
test.jsonl (100 rows); their pictures are 1,000 small JPEG files, or one file a row where a case says "own pictures". The
tokenizer is the demo's. The first time the folder of caches and the output folder are empty, the second time they are as the first
one left them; the files are in the system's page cache both times.

Units: seconds that passed, the slower process (a machine that others use makes them longer), and seconds of computing of the busier
process; memory of a process in GB (10^9 bytes), the larger one: the most that was resident (RSS: pages of libraries that both
processes share count in each), what that was before `load_splits` (Python and the libraries), and what is its own at the end with
shared pages dealt out among those that share them (PSS). Written: benchmarks/results/startup.json.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .record import RESULTS, ROOT, provenance, write

RESULT = RESULTS / "startup.json"
RANKS, EVAL_ROWS, PICTURES = 2, 100, 1000
CASES = {
    "1,000 rows": (1_000, False),
    "100,000 rows": (100_000, False),
    "100,000 rows, own pictures": (100_000, True),
    "1,000,000 rows": (1_000_000, False),
}
TIMES = ("first", "second")
OUT = "BENCHMARK_STARTUP_OUT"  # where a process that is measured writes its figures


def build_data(folder: Path, count: int, own: bool) -> Path:
    """A data folder of the DocVQA script with `count` rows to train on."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    pictures = count if own else PICTURES
    for number in range(pictures):
        size = (64 + number % 97, 64 + number % 89)  # pixels
        image = Image.new("RGB", size, (number % 256, number // 256 % 256, number // 65536))
        image.save(folder / "images" / f"{number}.jpg")
    for split, rows in (("train", count), ("test", EVAL_ROWS)):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for number in range(rows):
                question = {"en": f"What is the total of invoice {number}, and on which day of the month is it due?"}
                picture = f"images/{number % pictures}.jpg"
                row = {"id": f"{split}-{number}", "image": picture, "query": question, "answers": [f"{number}.00 EUR"]}
                file.write(json.dumps(row) + "\n")
    return folder


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def own_gb() -> float:
    """Memory of this process; pages that several share count in each for its part."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("Pss:"))


def start(out: str) -> None:
    """What a script does before it loads a model; each rank writes its figures to OUT.RANK.json."""
    from accelerate import PartialState

    import finetune_hf_trainer_docvqa as script
    from finetuning.arguments import parse_args
    from finetuning.data.dataset import build_dataset
    from finetuning.results.evaluation import check_score
    from finetuning.training.loading import load_processor
    from finetuning.training.resume import begin_or_resume

    args = parse_args()
    processor = load_processor(args)
    base, marks, cpu = peak_gb(), [("", time.perf_counter())], time.process_time()

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    train_rows, eval_rows = script.load_splits(args)
    mark("load_splits")
    train = build_dataset(train_rows, script.to_conversation, processor, args, split="train")
    mark("build_dataset, train")
    evaluation = build_dataset(eval_rows, script.to_conversation, processor, args, split="eval")
    mark("build_dataset, eval")
    check_score(evaluation, script.score, args)
    mark("check_score")
    begin_or_resume(args, train, evaluation)
    mark("begin_or_resume")
    cpu, state = time.process_time() - cpu, PartialState()
    # Both are there while each reads what they share.
    state.wait_for_everyone()
    own = own_gb()
    state.wait_for_everyone()
    found = {
        "seconds": marks[-1][1] - marks[0][1],
        "cpu_seconds": cpu,
        "stages": {name: end - marks[index][1] for index, (name, end) in enumerate(marks[1:])},
        "peak_gb": peak_gb(),
        "base_gb": base,
        "own_gb": own,
    }
    Path(f"{out}.{args.process_index}.json").write_text(json.dumps(found))


def measure(model: Path, data: Path, folder: Path) -> dict[str, dict]:
    """The first and the second start over a data folder."""
    found = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_DATASETS_CACHE", "HF_ASSETS_CACHE"):
        environment.pop(name, None)
    for turn in TIMES:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
        command += ["-m", "benchmarks.startup", "--model_name_or_path", str(model)]
        command += ["--data_dir", str(data), "--output_dir", str(folder / "output"), "--no-tqdm", "--use_cpu"]
        environment[OUT] = str(folder / turn)
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stdout + run.stderr)
        ranks = [json.loads(Path(f"{folder / turn}.{rank}.json").read_text()) for rank in range(RANKS)]
        slowest = max(ranks, key=lambda rank: rank["seconds"])
        found[turn] = {
            "seconds": round(slowest["seconds"], 2),
            "cpu_seconds": round(max(rank["cpu_seconds"] for rank in ranks), 2),
            **{name: round(max(rank[name] for rank in ranks), 3) for name in ("peak_gb", "base_gb", "own_gb")},
            "stages": {name: round(value, 2) for name, value in slowest["stages"].items()},
        }
        print(turn, json.dumps(found[turn]), flush=True)
    cached = [path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()]
    found["cache_mb"] = round(sum(cached) / 1e6, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="after", help="name under which the figures are recorded")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--work", help="folder for data, which is kept there and used again (default: a temporary one)")
    args = parser.parse_args()
    from demo import build_model

    work = Path(args.work or tempfile.mkdtemp(prefix="startup-"))
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    recorded = result.setdefault(args.label, {"cases": {}})
    try:
        model = build_model(work / "model")
        for name in args.cases:
            data = work / name.replace(", ", "-").replace(" ", "-").replace(",", "")
            if not data.exists():
                build_data(data, *CASES[name])
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=work))
            print(name, flush=True)
            cases = recorded["cases"] | {name: measure(model, data, folder)}
            recorded["cases"] = {case: cases[case] for case in CASES if case in cases}
            shutil.rmtree(folder)
            recorded |= provenance("torch", "transformers", "accelerate", "datasets", "pyarrow")
            write(RESULT, result)
    finally:
        if not args.work:
            shutil.rmtree(work)


if __name__ == "__main__":
    start(os.environ[OUT]) if OUT in os.environ else main()
