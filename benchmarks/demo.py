"""The demo in all four strategies: ANLS on held-out pages, and the time it takes.

    python -m benchmarks.demo

Full fine-tuning first; the others go on from its weights, as `make demo STRATEGY=lora` does. Writes
benchmarks/results/demo.json.
"""

import json
import tempfile
import time
from pathlib import Path

from demo import STRATEGIES, build_data, build_model, fine_tune

from .record import RESULTS, provenance, write


def main() -> None:
    result = provenance("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes") | {"strategies": {}}
    with tempfile.TemporaryDirectory() as folder:
        build_model(Path(folder) / "model")
        build_data(Path(folder) / "data")
        for strategy in STRATEGIES:
            start = time.monotonic()
            output = fine_tune(Path(folder), strategy)
            history = json.loads((output / "trainer_state.json").read_text())["log_history"]
            result["strategies"][strategy] = {
                **{
                    f"anls_{stage}": round(json.loads((output / f"eval_{stage}.json").read_text())["anls"], 4)
                    for stage in ("before", "after")
                },
                "train_seconds": next(entry["train_runtime"] for entry in history if "train_runtime" in entry),
                "script_seconds": round(time.monotonic() - start),
            }
    write(RESULTS / "demo.json", result)
    for strategy, figures in result["strategies"].items():
        print(strategy, *(f"{name} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
