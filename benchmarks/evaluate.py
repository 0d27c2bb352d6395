"""Answers a second of batched generation against batch 1, through the recipes' own evaluation.

    python -m benchmarks.evaluate
    python -m benchmarks.evaluate --model medium --num_crops 1 --batch 8

Random weights answer one question for each image, with exactly --new_tokens tokens: a 200 x 200 meme and a 1700 x 2200 page.
Image processing and tokenizing are in the time, as in a run without workers. Both ways run in turns, in this process.

Units: answers a second, of the median time over the rounds. Written: benchmarks/results/evaluate.json.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from finetuning.data.conversation import Conversation
from finetuning.data.dataset import ConversationDataset
from finetuning.errors import run_script
from finetuning.results.answering import generate_answers
from finetuning.training.loading import load_model, load_processor

from .models import base_of, build_folder, parser, recipe_arguments, sample
from .record import RESULTS, provenance, write

TARGETS = {"meme": 2.0, "page": None}  # batched over batch 1; None: written down only


def compare(args, folder: Path, image: str) -> dict:
    """Seconds for --answers answers with batch 1 and with --batch, and the ratio of the speeds."""
    flags = ["--num_crops", str(args.num_crops), "--dataloader_num_workers", "0"]
    flags += ["--max_new_tokens", str(args.new_tokens)]
    flags += ["--bf16"] if args.dtype == "bfloat16" else ["--fp16", "False"]
    recipe = recipe_arguments(folder, "frozen", *flags)
    recipe.use_cpu = args.device == "cpu"
    model, processor = load_model(recipe), load_processor(recipe)
    base_of(model).generation_config.min_new_tokens = args.new_tokens
    # Made once: its making is no part of an answer.
    turns = sample(image).turns
    seconds = {1: [], args.batch: []}
    for number in range(args.rounds + 1):
        for batch, passed in seconds.items():
            recipe.per_device_eval_batch_size = batch
            # A folder of its own: answers that are there already are not generated again.
            recipe.output_dir = tempfile.mkdtemp(dir=folder)
            # The first round is the warm-up.
            rows = range(args.answers if number else batch)
            lengths = [1] * len(rows)  # not read: nothing is trained
            pages = ConversationDataset(rows, lambda row: Conversation(f"{image}-{row}", turns), processor, lengths)
            start = time.perf_counter()
            answers = generate_answers(model, pages, recipe, "before")
            if number:
                passed.append(time.perf_counter() - start)
            assert len(answers) == len(rows)
    speeds = {batch: args.answers / statistics.median(passed) for batch, passed in seconds.items()}
    return {
        "batch_1_answers_per_s": round(speeds[1], 3),
        f"batch_{args.batch}_answers_per_s": round(speeds[args.batch], 3),
        "ratio": round(speeds[args.batch] / speeds[1], 2),
        "target": TARGETS[image],
    }


def main() -> None:
    options = parser(__doc__, default_model="tiny")
    options.add_argument("--num_crops", type=int, default=16, help="most crops of an image (16)")
    options.add_argument("--batch", type=int, default=8, help="questions at once (8)")
    options.add_argument("--answers", type=int, default=32, help="questions in a round (32)")
    options.add_argument("--new_tokens", type=int, default=10, help="tokens of each answer (10)")
    options.add_argument("--rounds", type=int, default=3, help="rounds after a warm-up (3)")
    options.add_argument("--images", nargs="+", choices=TARGETS, default=list(TARGETS), help="images to ask about")
    options.add_argument("--result", type=Path, default=RESULTS / "evaluate.json", help="file to write")
    args = options.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(args.model, args.weights or Path(temporary), getattr(torch, args.dtype), args.device)
        cases = {image: compare(args, folder, image) for image in args.images}
    for image, case in cases.items():
        print(image, *(f"{name} {value}" for name, value in case.items()))
    given = {name: value for name, value in vars(args).items() if name not in ("weights", "result", "images")}
    write(args.result, provenance("torch", "transformers") | {"given": given, "cases": cases})


if __name__ == "__main__":
    run_script(main)
