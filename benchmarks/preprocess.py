"""Images a second of the image processor on one core, and how many workers keep one GPU busy.

    python -m benchmarks.preprocess
    python -m benchmarks.preprocess --img_per_s 7

A 1700 x 2200 page at num_crops 16 and a 640 x 480 photo at num_crops 4, from the decoded image to pixel_values, one thread;
beside it decoding each from a JPEG in memory. The reference takes the official processor's steps (transposed portraits, all
channels at once, padded to num_crops + 1 crops) and must give the same crops, bit for bit; both run in turns. The seconds that
were given for the official processor, measured earlier on this kind of machine, are written beside it.

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

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from finetuning.errors import RunError, run_script
from phi3v import Phi3VImageProcessor
from phi3v.image_processing_phi3_v import WHITE, hd_size, padded_size

from .models import IMAGES, picture
from .record import RESULTS, provenance, write

SIDE = 336  # of a crop, in pixels
# num_crops, and the official processor's seconds an image, as given.
CASES = {"page": (16, 0.053), "photo": (4, 0.009)}
TARGET = 1.5  # images a second over the official ones


def reference(image: Image.Image, num_crops: int) -> torch.Tensor:
    """pixel_values of one RGB image, (1, num_crops + 1, 3, 336, 336), by the official processor's steps."""
    portrait = image.height > image.width
    if portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    width, height = hd_size(*image.size, num_crops)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    full_width, full_height = padded_size(width, height)
    top = (full_height - height) // 2
    image = ImageOps.expand(image, (0, top, full_width - width, full_height - height - top), WHITE)
    if portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
    pixels = (pixels - torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    view = torch.nn.functional.interpolate(pixels[None], size=(SIDE, SIDE), mode="bicubic")
    tiles = pixels.view(3, image.height // SIDE, SIDE, image.width // SIDE, SIDE)
    crops = torch.cat((view, tiles.permute(1, 3, 0, 2, 4).reshape(-1, 3, SIDE, SIDE)))
    return torch.cat((crops, crops.new_zeros(num_crops + 1 - len(crops), 3, SIDE, SIDE)))[None]


def median_seconds(jobs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of one call of each job, in turns, after a call that does not count."""
    seconds = [[] for _ in jobs]
    for number in range(rounds + 1):
        for job, found in zip(jobs, seconds, strict=True):
            start = time.perf_counter()
            job()
            if number:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def measure(name: str, rounds: int, img_per_s: float) -> dict:
    """Figures of one case of `CASES`."""
    num_crops, given = CASES[name]
    image, file = picture(name), io.BytesIO()
    image.save(file, "JPEG", quality=90)
    process = Phi3VImageProcessor(num_crops=num_crops)
    crops = process(image)["pixel_values"]
    if not torch.equal(reference(image, num_crops)[0, : len(crops)], crops):
        raise RunError(f"{name}: the reference's crops are others")
    seconds, official, decoding = median_seconds(
        [
            lambda: process(image),
            lambda: reference(image, num_crops),
            lambda: Image.open(io.BytesIO(file.getvalue())).convert("RGB"),
        ],
        rounds,
    )
    return {
        "size": "x".join(map(str, IMAGES[name])),
        "num_crops": num_crops,
        "seconds": round(seconds, 5),
        "img_per_s": round(1 / seconds, 2),
        "reference_seconds": round(official, 5),
        "ratio": round(official / seconds, 2),
        "official_seconds_given": given,
        "ratio_to_given": round(given / seconds, 2),
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
    columns = ("seconds", "img_per_s", "reference_seconds", "ratio", "ratio_to_given", "decoding_seconds", "workers")
    print(f"{'':8}" + "".join(f"{column:>18}" for column in columns))
    for name, case in cases.items():
        print(f"{name:8}" + "".join(f"{case[column]:18.4g}" for column in columns))
    write(
        args.result,
        provenance("torch", "pillow") | {"rounds": args.rounds, "gpu_img_per_s": args.img_per_s, "cases": cases},
    )
    print(f"workers for {args.img_per_s:g} images a second -> {args.result}")


if __name__ == "__main__":
    run_script(main)
