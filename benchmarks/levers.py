"""What each lever of speed and memory gives, alone and together, in a training step of the medium model on the CPU.

    python -m benchmarks.levers

The levers that the product always takes are given to the reference one by one (see benchmarks.train_step), then all together;
those that it leaves to a flag are given to the product, or taken from it. Full fine-tuning in bfloat16 of one 640 x 480 photo at
num_crops 16, no recomputed layers unless said; each case in a process of its own, with the same weights and data.

Units: a ratio is the lever's over its base's, of the median seconds of a step (time) and of the peak of torch's allocations in
it (memory). Written: benchmarks/results/levers.json.
"""

import tempfile
from pathlib import Path

import torch

from finetuning.errors import run_script

from .models import IMAGES, build_folder, parser
from .record import RESULTS, provenance, write
from .train_step import LEVERS, run_case

RATIOS = {"time": "seconds", "memory": "memory_step"}
# Of the reference, by the names of `LEVERS`.
ALWAYS = {
    "crops": "only the crops that an image needs are encoded",
    "layers": "CLIP stops at the layer that is used",
    "labels": "logits and loss at the labels only",
    "sdpa": "fused attention (sdpa) instead of eager",
}
# Of the product: what it does, flags, strategy, whether it is kept and why.
FLAGS = {
    "frozen": ("frozen vision: no autograd in the tower", [], "frozen", "kept: --freeze_vision_model"),
    "recompute vision": ("vision layers computed again", ["--recompute", "vision"], "full", "kept: --recompute vision"),
    "recompute full": (
        "all layers computed again",
        ["--recompute", "full"],
        "full",
        "kept: the default, the safest start",
    ),
    "compile": ("layers compiled", ["--compile"], "full", "kept: --torch_compile"),
    "float32 weights": (
        "float32 weights under autocast, as published, instead of bfloat16 ones",
        ["--float32_weights"],
        "full",
        "not kept: ZeRO-2 holds float32 copies for the optimizer, split over the GPUs",
    ),
    "unfused AdamW": (
        "AdamW without the fused kernel",
        ["--optim", "adamw_torch"],
        "full",
        "not kept: fused is the default",
    ),
    "8-bit AdamW": (
        "8-bit paged AdamW (memory within the step; the states take a quarter besides)",
        ["--optim", "paged_adamw_8bit"],
        "full",
        "kept: --optim paged_adamw_8bit, for one GPU; its rounding trains differently",
    ),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=2, help="steps measured of each case (2)")
    options.add_argument("--image", choices=IMAGES, default="photo", help="what the sample shows (photo)")
    options.add_argument("--result", type=Path, default=RESULTS / "levers.json", help="file to write")
    args = options.parse_args()
    args.dtype = args.dtype or "bfloat16"
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(args.model, args.weights or Path(temporary), torch.float32)
        common = ["--model", args.model, "--device", args.device, "--dtype", args.dtype, "--image", args.image]
        common += ["--steps", str(args.steps)]

        def measure(lever: str, base: dict | None, verdict: str, *flags: str) -> dict:
            result = run_case(folder, *common, *flags)
            entry = {"lever": lever, "seconds": result["seconds"], "memory_step": result["memory_step"]}
            if base:
                entry |= {name: round(result[key] / base[key], 3) for name, key in RATIOS.items()} | {
                    "verdict": verdict
                }
            found.append(entry)
            ratios = "".join(f"  {name} {entry[name]:.3f}" for name in RATIOS if name in entry)
            print(f"{result['seconds']:8.3f} s {result['memory_step']:9.1f} MiB  {lever}{ratios}", flush=True)
            return result

        reference = measure("the official way", None, "", "--reference")
        for name in LEVERS:
            measure(ALWAYS[name], reference, "kept: always", "--reference", "--with", name)
        product = measure("all of these together: the product", reference, "")
        for what, flags, strategy, verdict in FLAGS.values():
            measure(what, product, verdict, "--strategy", strategy, *flags)
    given = {name: value for name, value in vars(args).items() if name not in ("weights", "result")}
    write(args.result, provenance("torch", "transformers", "bitsandbytes") | {"given": given, "levers": found})


if __name__ == "__main__":
    run_script(main)
