"""One epoch over samples of mixed length: padding-free micro-batches against padded ones of the same samples.

    python -m benchmarks.epoch
    python -m benchmarks.epoch --model tiny --samples 16 --lengths log

Text samples of 10 to 2,500 tokens, evenly spread (or evenly on a logarithmic scale: mostly short ones), shuffled, in
micro-batches of 8; random weights, frozen vision, activation checkpointing as in the recipes' default. Without images: their
crops cost the same both ways. Each micro-batch is one optimizer step of fused AdamW.

Units: seconds an epoch, the median over the rounds; both ways in turns. Written: benchmarks/results/epoch.json.
"""

import random
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.errors import run_script
from finetuning.training.loading import load_model

from .models import build_folder, parser, recipe_arguments
from .record import RESULTS, provenance, write

SHORTEST, LONGEST = 10, 2500  # tokens
TARGET = 0.6  # seconds padding-free over padded
WAYS = {"padded": [], "padding_free": ["--padding_free"]}


def spread(count: int, lengths: str) -> list[int]:
    """`count` lengths from SHORTEST to LONGEST, in a random order that is always the same."""
    places = [number / (count - 1) for number in range(count)]
    if lengths == "log":
        found = [round(SHORTEST * (LONGEST / SHORTEST) ** place) for place in places]
    else:
        found = [round(SHORTEST + (LONGEST - SHORTEST) * place) for place in places]
    random.Random(0).shuffle(found)
    return found


def text_sample(length: int, seed: int) -> dict:
    """Features of a text of this many random tokens, the last 8 of them to be learned."""
    # Below 259 the tokenizer holds bytes only, and 0 to 2 are control tokens.
    ids = random.Random(seed).choices(range(3, 259), k=length)
    return {"id": str(seed), "input_ids": ids, "labels": [-100] * (length - 8) + ids[-8:]}


def train(model, batches: list[dict], args) -> float:
    """Trains on the batches; seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    start = time.perf_counter()
    for batch in batches:
        inputs = {
            name: value.to(args.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name != "ids"
        }
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(args.device, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext():
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def epochs(args, folder: Path) -> dict:
    """Seconds of an epoch both ways; `args` are the command's."""
    precision = ["--bf16"] if args.dtype == "bfloat16" else ["--fp16", "False"]
    samples = [text_sample(length, seed) for seed, length in enumerate(spread(args.samples, args.lengths))]
    batches, models = {}, {}
    for way, flags in WAYS.items():
        recipe = recipe_arguments(folder, "frozen", *precision, *flags)
        recipe.use_cpu = args.device == "cpu"
        models[way] = load_model(recipe).train()
        models[way].activation_checkpointing_enable()
        collate = DataCollatorForPhi3V(models[way].config.pad_token_id, recipe.padding_free)
        starts = range(0, args.samples, args.micro_batch)
        batches[way] = [collate(samples[start : start + args.micro_batch]) for start in starts]
    seconds = {way: [] for way in WAYS}
    for way in WAYS:
        short = DataCollatorForPhi3V(models[way].config.pad_token_id, way == "padding_free")
        train(models[way], [short([text_sample(64, 0), text_sample(32, 1)])], args)
    for _ in range(args.rounds):
        for way in WAYS:
            seconds[way].append(train(models[way], batches[way], args))
    result = {way: round(statistics.median(passed), 3) for way, passed in seconds.items()}
    return {
        "tokens": sum(len(item["input_ids"]) for item in samples),
        "tokens_padded": sum(batch["input_ids"].numel() for batch in batches["padded"]),
        "seconds": result,
        "kernel": {way: model.config._attn_implementation for way, model in models.items()},
        "ratio": round(result["padding_free"] / result["padded"], 3),
        "target": TARGET,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=16, help="samples of the epoch (16)")
    options.add_argument("--micro_batch", type=int, default=8, help="samples of a micro-batch (8)")
    options.add_argument("--lengths", choices=["even", "log"], default="even", help="spread of the lengths (even)")
    options.add_argument("--rounds", type=int, default=1, help="epochs each way (1)")
    options.add_argument("--result", type=Path, default=RESULTS / "epoch.json", help="file to write")
    args = options.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(args.model, args.weights or Path(temporary), getattr(torch, args.dtype), args.device)
        result = epochs(args, folder)
    for name, value in result.items():
        print(f"{name:14} {value}")
    given = {name: value for name, value in vars(args).items() if name not in ("weights", "result")}
    write(args.result, provenance("torch", "transformers") | {"given": given} | result)


if __name__ == "__main__":
    run_script(main)
