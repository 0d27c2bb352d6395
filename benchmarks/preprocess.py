"""Images a second of the image processor on one core, and how many workers keep one GPU busy.

    python -m benchmarks.preprocess
    python -m benchmarks.preprocess --img_per_s 7

A 1700 x 2200 page at num_crops 16 and a 640 x 480 photo at num_crops 4, from the decoded image to pixel_values, one thread;
beside it decoding each from a JPEG in memory. The official processor's seconds are given, not measured here: they come from an
earlier measurement on this kind of machine, without decoding.

Units: seconds an image, the median over the rounds; images a second on one core; workers are processes with one core each
that together prepare --img_per_s images a second, decoding included. Written: benchmarks/results/preprocess.json.
"""

import argparse
import io
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from finetuning.errors import run
from phi3v import Phi3VImageProcessor

from .models import IMAGES, picture
from .record import RESULTS, provenance, write

# num_crops, and the official processor's seconds an image, as given.
CASES = {"page": (16, 0.053), "photo": (4, 0.009)}
TARGET = 1.5  # images a second over the official ones


def median_seconds(job: Callable[[], object], rounds: int) -> float:
    """Seconds of one call, after one that does not count."""
    job()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(name: str, rounds: int, img_per_s: float) -> dict:
    """Figures of one case of `CASES`."""
    num_crops, official = CASES[name]
    image, file = picture(name), io.BytesIO()
    image.save(file, "JPEG", quality=90)
    process = Phi3VImageProcessor(num_crops=num_crops)
    seconds = median_seconds(lambda: process(image), rounds)
    decoding = median_seconds(lambda: Image.open(io.BytesIO(file.getvalue())).convert("RGB"), rounds)
    return {
        "size": "x".join(map(str, IMAGES[name])),
        "num_crops": num_crops,
        "seconds": round(seconds, 5),
        "img_per_s": round(1 / seconds, 2),
        "official_seconds_given": official,
        "ratio": round(official / seconds, 2),
        "target": TARGET,
        "decoding_seconds": round(decoding, 5),
        "workers": math.ceil(img_per_s * (seconds + decoding)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="images of each kind (50)")
    parser.add_argument("--img_per_s", type=float, default=10.0, help="images a second that one GPU trains on (10)")
    parser.add_argument("--result", type=Path, default=RESULTS / "preprocess.json", help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {name: measure(name, args.rounds, args.img_per_s) for name in CASES}
    print(f"{'':8}{'s / image':>12}{'images / s':>12}{'official s':>12}{'ratio':>8}{'decoding s':>12}{'workers':>9}")
    for name, case in cases.items():
        figures = f"{case['seconds']:12.4f}{case['img_per_s']:12.1f}{case['official_seconds_given']:12.3f}"
        print(f"{name:8}{figures}{case['ratio']:8.2f}{case['decoding_seconds']:12.4f}{case['workers']:9}")
    write(
        args.result,
        provenance("torch", "pillow") | {"rounds": args.rounds, "gpu_img_per_s": args.img_per_s, "cases": cases},
    )
    print(f"official s: given, not measured here; workers for {args.img_per_s:g} images a second -> {args.result}")


if __name__ == "__main__":
    run(main)
