"""Faults of the hub: seconds until a run says what is wrong, or until it has what it needs all the same.

    python -m benchmarks.hub_faults

Runs finetune_hf_trainer_docvqa.py by plain python (one process) against the hub of the tests, on the loopback, with an
empty cache unless the case says otherwise. A run that gets its data and model ends at its first row, by --max_length 1, so
that nothing is trained: then `goes_on` is true.

Unit: seconds from the start of the command to its last line, Python's start included (the healthy case shows it).
Written: benchmarks/results/hub_faults.json.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demo import build_model

from .record import RESULTS, ROOT, provenance, write

sys.path.insert(0, str(ROOT / "tests"))

from hub import Fault, Hub, docvqa, folder_files  # noqa: E402

DATA, MODEL = "nielsr/docvqa_1200_examples", "me/tiny"
TRAIN, WEIGHTS = "train-00000-of-00001.parquet", "model.safetensors"

# Of each: what goes wrong, and whether the model comes from the hub too.
CASES: dict[str, tuple[Fault | str | None, bool]] = {
    "healthy": (None, True),
    "refuses connections": ("http://127.0.0.1:9", False),
    "refuses connections, model": ("http://127.0.0.1:9", True),
    "a name without an address": ("http://hub.invalid", False),
    "accepts and never answers": (Fault("silent"), False),
    "accepts and never answers, model": (Fault("silent"), True),
    "never answers for one file": (Fault("silent", on=TRAIN), False),
    "never answers for the weights": (Fault("silent", on=WEIGHTS), True),
    "two bytes a second": (Fault("drip", on=TRAIN), False),
    "two bytes a second, weights": (Fault("drip", on=WEIGHTS), True),
    "gated (401)": (Fault("401"), False),
    "gated, only its files (401)": (Fault("401", on="/resolve/"), False),
    "terms not accepted (403)": (Fault("403", on="/resolve/"), False),
    "gated (401), model": (Fault("401"), True),
    "missing (404)": (Fault("404"), False),
    "missing (404), model": (Fault("404"), True),
    "a fault of its own (500)": (Fault("500"), False),
    "a fault of its own (500) for one file": (Fault("500", on=TRAIN), False),
    "always half of a file, as if it were all": (Fault("short", on=TRAIN), False),
    "breaks off twice": (Fault("cut", on=TRAIN, times=3), False),
    "breaks off twice by a reset, weights": (Fault("reset", on=WEIGHTS, times=3), True),
    "500 twice": (Fault("500", on=TRAIN, times=2), False),
    "half of a file once": (Fault("short", on=TRAIN, times=2), False),
    "full cache, never answers": (Fault("silent"), True),
    "full cache, refuses connections": ("http://127.0.0.1:9", True),
    "HF_HUB_OFFLINE=1 and an empty cache": (None, True),
}


def run(endpoint: str, home: Path, model: Path | str, folder: Path, **environment: str) -> dict[str, Any]:
    """One run of the script, and what it says last."""
    script = ROOT / "finetune_hf_trainer_docvqa.py"
    command = [sys.executable, script, "--model_name_or_path", model, "--num_crops", "1", "--max_length", "1"]
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True)
    seconds = time.monotonic() - start
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    line = lines[0].replace(endpoint, "HUB").replace(str(home), "HF_HOME") if lines else ""
    return {
        "seconds": round(seconds, 1),
        "goes_on": "--max_length" in line,
        "status": done.returncode,
        "error_lines": len(lines),
        "line": line,
    }


def measure(case: str, folder: Path) -> dict[str, Any]:
    fault, from_hub = CASES[case]
    folder.mkdir()
    build_model(folder / "model")
    home = folder / "home"
    model: Path | str = MODEL if from_hub else folder / "model"
    with Hub() as hub:
        hub.put(f"datasets/{DATA}", docvqa(train=6, test=3, side=200))
        hub.put(MODEL, folder_files(folder / "model"))
        if case.startswith("full cache"):
            run(hub.endpoint, home, model, folder)
        hub.fault = fault if isinstance(fault, Fault) else None
        endpoint = fault if isinstance(fault, str) else hub.endpoint
        environment = {"HF_HUB_OFFLINE": "1"} if case.startswith("HF_HUB_OFFLINE") else {}
        return run(endpoint, home, model, folder, **environment)


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as home:
        for number, case in enumerate(CASES):
            results[case] = measure(case, Path(home) / str(number))
            found = results[case]
            print(f"{found['seconds']:6.1f} s  {case}: {found['line']}", flush=True)
    versions = provenance("huggingface_hub", "datasets", "transformers", "hf_xet")
    write(RESULTS / "hub_faults.json", {**versions, "unit": "seconds until the line", "cases": results})


if __name__ == "__main__":
    main()
