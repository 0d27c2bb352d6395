"""Speed, memory and model FLOPs of one training step, and how they compare with the official way of doing it.

    python -m benchmarks.train_step --model tiny --strategy full
    python -m benchmarks.train_step --model full --strategy lora --image page --micro_batch 4 --padding_free
    python -m benchmarks.train_step --model medium --strategy full --image photo --reference
    python -m benchmarks.train_step --compare benchmarks/results/train_step_medium_full_photo.json
    python -m benchmarks.train_step --ratios

A step is forward, backward, clipping and fused AdamW on one micro-batch of images of one size, each with a short question and
answer; random weights, one process. Medians over the steps after a warm-up. Preparing the data is timed apart: workers do it
meanwhile. cpu_seconds are those of the processor, all threads together.

Units: images and tokens for each second of a step (img_per_s, tokens_per_s); seconds of each part (split); MiB. memory_step is
the peak of torch's allocations within a step, above what was allocated before it (weights, optimizer states): on a GPU by the
allocator's own count, on a CPU in one more step under torch's profiler. memory_peak is that peak with what was there before; on
a CPU the most resident memory that the process has had. One process measures one case.

Model FLOPs are counted as finetuning/training/flops.py says. MFU is model FLOPs a second over the rate of a large square matrix
product in the same process and dtype.

--reference drives the same weights as the official code does: each image padded to num_crops + 1 crops, all CLIP layers run,
float32 logits at every position, eager attention, batch 1; --with gives it single levers of `LEVERS`. --ratios runs it and the
product in turns on the CPU, in bfloat16 unless --dtype says otherwise, without recomputed layers, and writes
benchmarks/results/train_step_ratios.json; any other call writes benchmarks/results/train_step_MODEL_STRATEGY_IMAGE.json (with
_reference at the end), or --result.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer

from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.encoding import encode_conversation
from finetuning.errors import RunError, run_script
from finetuning.training import flops, parts
from finetuning.training.callbacks import keep_text_activations
from finetuning.training.flops import matmul_rate
from finetuning.training.loading import load_model, load_processor
from phi3v import Phi3VConfig

from .models import IMAGES, STRATEGIES, base_of, build_folder, parser, recipe_arguments, sample
from .record import RESULTS, ROOT, provenance, write

MIB = 2**20
# Strategy, image: most memory and time allowed of the reference's; None: written down only.
TARGETS = {
    ("full", "photo"): (0.35, 0.85),
    ("frozen", "photo"): (0.2, 0.7),
    ("full", "meme"): (None, None),
}


# What `--reference --with` may take over from the product: only real crops, CLIP cut at the used layer, logits at the labels
# alone, the fused attention.
LEVERS = ("crops", "layers", "labels", "sdpa")


def step_flops(
    config: Phi3VConfig, lengths: list[int], crops: int, labels: int, strategy: str, rank: int = 64
) -> dict[str, int]:
    """`flops.step_flops` of samples of these lengths in tokens and of a strategy of `STRATEGIES`."""
    squares = sum(length**2 for length in lengths)
    return flops.step_flops(config, sum(lengths), squares, crops, labels, parts.STRATEGIES[strategy], rank)


class Clock:
    """Seconds between marks, by the name of what came before the mark. On a GPU by events, which do not hold it up."""

    def __init__(self, device: str):
        self.device, self.marks = device, []
        self.mark("")

    def mark(self, name: str) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def split(self) -> dict[str, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = {}
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            passed = start.elapsed_time(end) / 1000 if self.device == "cuda" else end - start
            seconds[name] = seconds.get(name, 0) + passed
        return seconds


def peak_memory(device: str, step: Callable[[], object]) -> int:
    """Most bytes that torch allocates within `step`, above what was allocated before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def product_loss(model, batch: dict[str, Any], clock: Clock) -> torch.Tensor:
    """The model's own loss."""
    base = base_of(model)
    vision = base.model.vision_embed_tokens
    hooks = [
        vision.register_forward_pre_hook(lambda *_: clock.mark("language model")),
        vision.register_forward_hook(lambda *_: clock.mark("vision")),
        base.model.register_forward_hook(lambda *_: clock.mark("language model")),
    ]
    loss = model(**batch).loss
    clock.mark("loss")
    for hook in hooks:
        hook.remove()
    return loss


def reference_loss(model, batch: dict[str, Any], clock: Clock, levers: Sequence[str] = ()) -> torch.Tensor:
    """The same loss as the official code arrives at it; `batch` holds the crops of one image, `levers` are some of `LEVERS`."""
    base = base_of(model)
    embedding = base.model.vision_embed_tokens
    inputs = base.model.embed_tokens(batch["input_ids"])
    clock.mark("language model")
    tower = embedding.img_processor
    pixels = batch["pixel_values"].flatten(0, 1)
    if "layers" in levers:
        patches = tower(pixels)
    else:
        patches = tower.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    merged = embedding._merge(patches)
    ((height, width),) = batch["image_sizes"].tolist()
    rows, columns = height // embedding.crop_size, width // embedding.crop_size
    crops, view = (
        embedding._assemble(merged[1 : 1 + rows * columns], rows, columns),
        embedding._assemble(merged[:1], 1, 1),
    )
    features = embedding.img_projection(torch.cat((crops, embedding.glb_GN[0], view)))
    clock.mark("vision")
    is_image = batch["input_ids"] == base.config.image_token_id
    inputs = inputs.masked_scatter(is_image[..., None], features.to(inputs.dtype))
    hidden = base.model(inputs_embeds=inputs, attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
    clock.mark("language model")
    if "labels" in levers:
        loss = base._loss(hidden, batch["labels"], None)
    else:
        logits = base.lm_head(hidden).float()
        # The copy is what models of 2024 make, too.
        shifted = logits[:, :-1].contiguous().flatten(0, 1)
        loss = nn.functional.cross_entropy(shifted, batch["labels"][:, 1:].flatten())
    clock.mark("loss")
    return loss


def pad_crops(pixel_values: torch.Tensor, num_crops: int) -> torch.Tensor:
    """The official layout of one image: (crops, 3, S, S) -> (1, num_crops + 1, 3, S, S)."""
    missing = num_crops + 1 - len(pixel_values)
    return torch.cat((pixel_values, pixel_values.new_zeros(missing, *pixel_values.shape[1:])))[None]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs one case in this process; `args` are the command's. Returns what the result file holds."""
    bf16 = args.dtype == "bfloat16"
    flags = ["--num_crops", str(args.num_crops), "--batch_size_per_gpu", str(args.micro_batch), "--optim", args.optim]
    flags += (["--bf16"] if bf16 else ["--fp16", "False"]) + (["--padding_free"] if args.padding_free else [])
    flags += ["--torch_compile"] if args.compile else []
    recipe = recipe_arguments(folder, args.strategy, *flags)
    if args.device == "cpu":
        recipe.use_cpu = True
    processor, model = load_processor(recipe), load_model(recipe).train()
    if args.float32_weights:
        model.float()
    if args.lora_of_peft:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_variant, layer.cast_input_dtype_enabled = {}, True
    loss_of = product_loss
    if args.reference:
        base_of(model).set_attn_implementation("sdpa" if "sdpa" in args.with_ else "eager")
        loss_of = partial(reference_loss, levers=args.with_)
    if args.recompute != "none":
        model.activation_checkpointing_enable()
    if args.recompute == "vision":
        keep_text_activations(model)
    collate = DataCollatorForPhi3V(processor.tokenizer.pad_token_id, args.padding_free)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(recipe, model)
    optimizer = kind(trained, weight_decay=recipe.weight_decay, **options)

    def prepare(number: int) -> tuple[dict[str, Any], list[int], int]:
        numbers = range(number * args.micro_batch, (number + 1) * args.micro_batch)
        features = [encode_conversation(sample(args.image, number), processor) for number in numbers]
        batch = collate(features)
        del batch["ids"]
        crops = len(batch["pixel_values"])
        if args.reference:
            padded = crops - 1 if "crops" in args.with_ else args.num_crops
            batch["pixel_values"] = pad_crops(batch["pixel_values"], padded)
        lengths = [len(feature["input_ids"]) for feature in features]
        return {n: v.to(args.device) if torch.is_tensor(v) else v for n, v in batch.items()}, lengths, crops

    def step(batch: dict[str, Any]) -> tuple[dict[str, float], float, float]:
        optimizer.zero_grad(set_to_none=True)
        clock, begun = Clock(args.device), time.process_time()
        with torch.autocast(args.device, torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of(model, batch, clock)
        loss.backward()
        clock.mark("backward")
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        clock.mark("optimizer")
        split = clock.split()
        return split, loss.item(), time.process_time() - begun

    splits, losses, of_the_processor = [], [], []
    for number in range(args.warmup + args.steps):
        start = time.perf_counter()
        batch, lengths, crops = prepare(number)
        data = time.perf_counter() - start
        split, loss, busy = step(batch)
        losses.append(loss)
        if number >= args.warmup:
            splits.append({"data": data, **split})
            of_the_processor.append(busy)
    resident = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else int(resident[1]) * 1024
    optimizer.zero_grad(set_to_none=True)
    memory = peak_memory(args.device, lambda: step(batch))
    seconds = statistics.median(sum(split.values()) - split["data"] for split in splits)
    labels = int((batch["labels"][:, 1:] != -100).sum())
    needed = step_flops(base_of(model).config, lengths, crops, labels, args.strategy, recipe.lora_rank)["step"]
    rate = matmul_rate(args.device, getattr(torch, args.dtype), args.matmul_size)
    return {
        "case": {name: value for name, value in vars(args).items() if name in CASE},
        "kernel": base_of(model).config._attn_implementation,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "parameters": sum(parameter.numel() for parameter in base_of(model).parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "tokens": sum(lengths),
        "crops": crops,
        "seconds": round(seconds, 4),
        "cpu_seconds": round(statistics.median(of_the_processor), 4),
        "img_per_s": round(args.micro_batch / seconds, 4),
        "tokens_per_s": round(sum(lengths) / seconds, 1),
        "model_gflop": round(needed / 1e9, 3),
        "matmul_gflop_per_s": round(rate / 1e9, 1),
        "mfu": round(needed / seconds / rate, 4),
        "memory_step": round(memory / MIB, 1),
        "memory_peak": round(peak / MIB, 1),
        "split": {name: round(statistics.median(split[name] for split in splits), 4) for name in splits[0]},
        "loss": losses[0],
    }


# The flags that make a case.
CASE = (
    *("model", "strategy", "image", "device", "dtype", "num_crops", "micro_batch", "padding_free"),
    *("recompute", "compile", "optim", "float32_weights", "lora_of_peft", "reference", "with_", "steps", "warmup"),
)


def table(result: dict[str, Any]) -> str:
    """The result as lines of a name, a figure and a unit."""
    units = {
        "seconds": "s a step",
        "img_per_s": "images / s",
        "tokens_per_s": "tokens / s",
        "model_gflop": "GFLOP a step",
        "matmul_gflop_per_s": "GFLOP / s, large matrix product",
        "mfu": "of it",
        "memory_step": "MiB above what was there before",
        "memory_peak": "MiB",
    }
    lines = [f"{name:22}{result[name]:14.4g}  {unit}" for name, unit in units.items()]
    lines += [f"  {name:20}{seconds:14.4g}  s" for name, seconds in result["split"].items()]
    return "\n".join(lines)


def compare(result: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Ratios of the main figures to those of another result."""
    names = ("seconds", "img_per_s", "tokens_per_s", "mfu", "memory_step", "memory_peak")
    return {name: round(result[name] / other[name], 3) for name in names if other[name]}


def run_case(folder: Path, *flags: str) -> dict[str, Any] | None:
    """Result of one case in a process of its own, with the model in `folder`; None if it runs out of a GPU's memory."""
    result = folder / "result.json"
    command = [sys.executable, "-m", "benchmarks.train_step", *flags, "--weights", str(folder), "--result", str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and "out of memory" in done.stderr:
        return None
    if done.returncode:
        raise RunError(f"{' '.join(command)} ended with exit status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(result.read_text())


def ratios(rounds: int, steps: int, folder: Path, model: str, dtype: str) -> dict[str, Any]:
    """Product over reference in the cases of `TARGETS`, each run in a process of its own, in turns; medians over rounds."""
    build_folder(model, folder, torch.float32)
    found = {}
    for (strategy, image), (most_memory, most_time) in TARGETS.items():
        flags = ["--model", model, "--strategy", strategy, "--image", image, "--device", "cpu", "--dtype", dtype]
        runs = {"product": [], "reference": []}
        for _ in range(rounds):
            for way, results in runs.items():
                results.append(
                    run_case(folder, *flags, "--steps", str(steps), *(["--reference"] * (way == "reference")))
                )
        case = {"loss_difference": abs(runs["product"][0]["loss"] - runs["reference"][0]["loss"])}
        for name in ("memory_step", "seconds"):
            product, reference = (statistics.median(run[name] for run in runs[way]) for way in runs)
            case[name] = {"product": product, "reference": reference, "ratio": round(product / reference, 3)}
        case["memory_step"]["target"], case["seconds"]["target"] = most_memory, most_time
        case["split"] = {way: results[0]["split"] for way, results in runs.items()}
        found[f"{strategy} {image}"] = case
        for name, unit in (("memory_step", "MiB"), ("seconds", "s")):
            figures = case[name]
            print(
                f"{strategy} {image:8}{name:12}{figures['product']:9.4g} {unit}, reference {figures['reference']:9.4g}: "
                f"{figures['ratio']} (target {figures['target'] or 'none'})",
                flush=True,
            )
    return {"model": model, "dtype": dtype, "rounds": rounds, "steps": steps, "cases": found}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--strategy", choices=STRATEGIES, default="full", help="what is trained (full)")
    options.add_argument("--image", choices=IMAGES, default="page", help="what each sample shows (page)")
    options.add_argument("--num_crops", type=int, default=16, help="most crops of an image (16)")
    options.add_argument("--micro_batch", type=int, default=1, help="samples a step (1)")
    options.add_argument("--padding_free", action="store_true", help="join the samples in one row")
    options.add_argument(
        "--recompute", choices=["none", "vision", "full"], default="none", help="layers computed again (none)"
    )
    options.add_argument("--steps", type=int, default=5, help="steps measured (5)")
    options.add_argument("--warmup", type=int, default=1, help="steps before (1)")
    options.add_argument("--reference", action="store_true", help="drive the model as the official code does")
    options.add_argument("--with", dest="with_", nargs="+", choices=LEVERS, default=[], help="levers for --reference")
    options.add_argument("--compile", action="store_true", help="torch.compile of the layers")
    options.add_argument(
        "--optim", default="adamw_torch_fused", help="the Trainer's name of the optimizer (fused AdamW)"
    )
    options.add_argument("--lora_of_peft", action="store_true", help="LoRA as PEFT computes it")
    options.add_argument("--float32_weights", action="store_true", help="float32 weights under autocast")
    options.add_argument("--compare", type=Path, help="result file to print the ratios to")
    options.add_argument("--ratios", action="store_true", help="product against reference in all cases with a target")
    options.add_argument("--rounds", type=int, default=1, help="processes of each kind for --ratios (1)")
    options.add_argument("--result", type=Path, help="file to write")
    args = options.parse_args()
    # The ratios in bfloat16 on a CPU too: it is what is trained in, and float32 logits weigh more beside it.
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" or args.ratios else "float32")
    args.matmul_size = 8192 if args.device == "cuda" else 4096
    if args.reference and (args.micro_batch > 1 or args.padding_free):
        options.error("--reference: expected --micro_batch 1 without --padding_free, as the official code runs")
    libraries = "torch", "transformers", "peft"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.weights or Path(temporary)
        if args.ratios:
            result = provenance(*libraries) | ratios(args.rounds, args.steps, folder, args.model, args.dtype)
            path = args.result or RESULTS / "train_step_ratios.json"
            write(path, result)
            print(f"{result['machine']} -> {path}")
            return
        build_folder(args.model, folder, getattr(torch, args.dtype), args.device)
        result = provenance(*libraries) | measure(args, folder)
    name = f"train_step_{args.model}_{args.strategy}_{args.image}{'_reference' if args.reference else ''}.json"
    print(table(result))
    print(json.dumps(result))
    if args.compare:
        print("ratios to", args.compare, json.dumps(compare(result, json.loads(args.compare.read_text()))))
    write(args.result or RESULTS / name, result)


if __name__ == "__main__":
    run_script(main)
