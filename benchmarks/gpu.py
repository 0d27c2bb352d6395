"""The full-size model on one GPU: four strategies, attention and batching, with and without compilation, largest micro-batch.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --model tiny --device cpu --steps 1 --largest 2

For each strategy, on page samples of some 2,443 tokens and 17 crops: sdpa, padding-free, both compiled; then micro-batches that
double until memory is short; then, with the best of these, less recomputation. Random weights; each case in a process of its own
(benchmarks.train_step, whose docstring gives units, model FLOPs and MFU). Full fine-tuning on one GPU takes 8-bit paged AdamW
and bfloat16 weights: ZeRO-2 has nobody to share the float32 states with.

The goals: images a second on one H100 (five times the published rate of one A100, and 7 with frozen vision), 55% MFU.
Written after each case: benchmarks/results/gpu.json.
"""

import tempfile
from pathlib import Path

import torch

from finetuning.errors import RunError, run_script

from .models import STRATEGIES, build_folder, parser
from .record import RESULTS, provenance, write
from .train_step import run_case

# Images a second; the published rates of 8 A100, by RECIPE's table, are 8.657, 12.127 and 10.545.
GOALS = {"full": 5.41, "frozen": 7.0, "lora": 7.58, "qlora": 6.59}
OPTIMIZER = {
    "full": "paged_adamw_8bit",
    "frozen": "paged_adamw_8bit",
    "lora": "adamw_torch_fused",
    "qlora": "adamw_torch_fused",
}
WAYS = {
    "sdpa": [],
    "sdpa, compiled": ["--compile"],
    "padding-free": ["--padding_free", "--micro_batch", "2"],
    "padding-free, compiled": ["--padding_free", "--micro_batch", "2", "--compile"],
}


def main() -> None:
    options = parser(__doc__, default_model="full")
    options.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="what is trained (all)"
    )
    options.add_argument("--largest", type=int, default=16, help="largest micro-batch that is tried (16)")
    options.add_argument("--steps", type=int, default=5, help="steps measured of each case (5)")
    options.add_argument("--result", type=Path, default=RESULTS / "gpu.json", help="file to write")
    args = options.parse_args()
    args.dtype = args.dtype or "bfloat16"
    record = provenance("torch", "transformers", "peft", "bitsandbytes") | {"goals_img_per_s": GOALS, "cases": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(args.model, args.weights or Path(temporary), getattr(torch, args.dtype), args.device)

        def measure(strategy: str, way: str, *flags: str) -> float:
            """Images a second; 0 if memory is short."""
            case = {"strategy": strategy, "way": way, "flags": flags}
            record["cases"].append(case)
            try:
                case["result"] = result = run_case(
                    folder,
                    *("--model", args.model, "--device", args.device, "--dtype", args.dtype, "--image", "page"),
                    *("--strategy", strategy, "--optim", OPTIMIZER[strategy]),
                    *("--steps", str(args.steps), "--warmup", "2", *flags),
                )
            except RunError as error:
                # Borrowed time: the other cases go on.
                case["error"] = str(error)
                print(f"{strategy:8}{way:44} {error}", flush=True)
                return 0.0
            finally:
                write(args.result, record)
            if result is None:
                print(f"{strategy:8}{way:44} out of memory", flush=True)
                return 0.0
            print(
                f"{strategy:8}{way:44}{result['img_per_s']:8.3f} img/s (goal {GOALS[strategy]}){result['mfu']:7.1%} MFU"
                f"{result['memory_peak']:10.0f} MiB  " + " ".join(f"{k} {v:.3f}" for k, v in result["split"].items()),
                flush=True,
            )
            return result["img_per_s"]

        for strategy in args.strategies:
            measure(strategy, "the official way", "--reference")
            speeds = {way: measure(strategy, way, "--recompute", "full", *flags) for way, flags in WAYS.items()}
            compiled = ["--compile"] if speeds["padding-free, compiled"] > speeds["padding-free"] else []
            for recompute in ("full", "vision", "none"):
                size = 2 if recompute != "full" else 4
                while size <= args.largest:
                    flags = ["--recompute", recompute, "--padding_free", "--micro_batch", str(size), *compiled]
                    if not measure(
                        strategy, f"recompute {recompute}, micro-batch {size}{', compiled' * bool(compiled)}", *flags
                    ):
                        break
                    size *= 2
    print(f"{record['machine']} -> {args.result}")


if __name__ == "__main__":
    run_script(main)
