"""What each lever of speed and memory gives: counted in full size, and measured in a step of the medium model on the CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.levers
    python -m benchmarks.levers --counts

The levers that the product always takes are given to the official way one by one (see benchmarks.train_step), then all together;
those that it leaves to a flag are given to the product, or taken from it. All in bfloat16, no recomputed layers unless said.

Counted, not timed: a micro-batch of the official sizes on fake tensors (finetuning/training/fake_step.py), without optimizer. The official
way and its levers by a 640 x 480 photo (13 crops of 17 are real), the others by a Letter page of 2,529 tokens and 17 crops. tflop:
products of matrices and attention; gb: 10^9 bytes that all other kernels read and write. Of compiled layers the bytes are
those of the kernels that inductor makes of one layer of each kind, whose weights are real.

Measured: a photo at num_crops 6 (5 crops of 7 are real), each case in a process of its own, with the same weights and data.
time: the lever's seconds of the processor in a step over its base's, which no other program's load enlarges much; memory: the
peak of torch's allocations in a step, in the same way. Each base is measured before and after its levers; how far these two
are apart (noise) is what a ratio may be off.

Written: benchmarks/results/levers.json; with --counts the times that it has are kept.
"""

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._inductor import metrics
from torch._inductor.compile_fx import inductor_metrics_log
from torch._inductor.scheduler import ExternKernelSchedulerNode

from finetuning.errors import run_script
from finetuning.training.fake_step import Batch, FakeModel, Live, StepBytes, whole
from phi3v import Phi3VConfig, Phi3VForCausalLM

from .models import build_folder, parser
from .plan import arguments, official
from .record import RESULTS, provenance, write
from .train_step import LEVERS, run_case

PAGE, PHOTO = Batch(1, 2529, 17, 12), Batch(1, 1941, 13, 12)
# The photo's crops as the official code pads them, and logits at every position.
PADDED, EVERYWHERE = {"crops": 17}, {"labels": PHOTO.tokens - 1}


@dataclass(frozen=True)
class Lever:
    """A lever, or a base that levers are held against.

    Args:
        what (str): in words.
        verdict (str): whether it is kept, and why.
        flags (list): of benchmarks.train_step; None: not measured.
        count (Callable): takes its step on fake tensors; None: not counted, since it does not change the micro-batch.
    """

    what: str
    verdict: str
    flags: list[str] | None
    count: Callable[[], StepBytes] | None


@dataclass(frozen=True)
class Group:
    """Levers that are held against the same base."""

    base: Lever
    levers: list[Lever] = field(default_factory=list)


def step(*flags: str, batch: Batch = PAGE, recompute: str = "none", peft: bool = False) -> Callable[[], StepBytes]:
    """Takes a step of the product; `peft`: with LoRA as PEFT computes it."""

    def count() -> StepBytes:
        config = official()
        fake = FakeModel(config, arguments("--deepspeed", "none", *flags))
        for layer in fake.model.modules() if peft else ():
            if isinstance(layer, LoraLayer):
                layer.lora_variant, layer.cast_input_dtype_enabled = {}, True
        return whole(config, fake.step(batch, recompute))

    return count


def official_step(*levers: str) -> Callable[[], StepBytes]:
    """Takes a step as the official code does, but for some of `LEVERS`."""

    def count() -> StepBytes:
        config: Any = official()
        if "layers" not in levers:
            config.vision_config.num_hidden_layers += 1  # the product leaves the last one out
        sizes = ({} if "crops" in levers else PADDED) | ({} if "labels" in levers else EVERYWHERE)
        kernel = "sdpa" if "sdpa" in levers else "eager"
        fake = FakeModel(config, arguments("--deepspeed", "none", "--attn_implementation", kernel))
        return whole(config, fake.step(Batch(**vars(PHOTO) | sizes), "none"))

    return count


def several(count: int) -> Callable[[], StepBytes]:
    """Takes a step of several samples in one row, and gives the share of one."""

    def share() -> StepBytes:
        found = step("--padding_free", batch=Batch(count, 2529, 17, 12, packed=True))()
        return StepBytes(found.peak / count, found.traffic / count, found.flops / count)

    return share


def compiled() -> StepBytes:
    """A step whose layers are compiled: less by what one layer of each kind has less, as often as it is there."""
    config: Any = official()
    found, times = step()(), (config.num_hidden_layers, config.vision_config.num_hidden_layers - 1)
    saved = sum(
        count * (layer["eager"] - layer["compiled"]) for count, layer in zip(times, layers_gb().values(), strict=True)
    )
    return StepBytes(found.peak, found.traffic - 1e9 * saved, found.flops)


@cache
def layers_gb() -> dict[str, dict[str, float]]:
    """Of a page, by the kind of layer: 10^9 bytes that kernels other than products read and write, eager and compiled."""
    return {
        type(layer).__name__: {
            "eager": round(eager_bytes(layer, call) / 1e9, 3),
            "compiled": round(inductor_bytes(layer, call) / 1e9, 3),
        }
        for layer, call in layers(official())
    }


def layers(config: Phi3VConfig) -> list[tuple[nn.Module, Callable]]:
    """A layer of the language model and one of CLIP, each with a call that takes a page through them."""
    small: Any = Phi3VConfig(**{**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 32064})
    small.vision_config.num_hidden_layers = 2
    model: Any = Phi3VForCausalLM._from_config(small, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    positions = torch.arange(PAGE.tokens)[None]
    states = torch.randn(1, PAGE.tokens, small.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rope = model.model.rotary_emb(states, positions)
    clip = small.vision_config
    patches = torch.randn(PAGE.crops, (clip.image_size // clip.patch_size) ** 2 + 1, clip.hidden_size).bfloat16()
    tower = next(module for name, module in model.named_modules() if name.endswith("vision_model.encoder.layers.0"))
    return [
        (model.model.layers[0], lambda layer: layer(states, position_embeddings=rope)),
        (tower, lambda layer: layer(patches.requires_grad_(), attention_mask=None)),
    ]


def eager_bytes(layer: nn.Module, call: Callable) -> float:
    """Bytes of a forward and backward pass of a layer, counted as fake steps are."""
    live = Live()
    live.begin(layer)
    with live, torch.autocast("cpu", torch.bfloat16):
        call(layer).sum().backward()
        live.mark("both")
    return live.segments[0].traffic


def inductor_bytes(layer: nn.Module, call: Callable) -> float:
    """Those of the kernels that inductor makes of it."""
    inductor_metrics_log.setLevel(logging.INFO)  # then it counts them
    inductor_metrics_log.propagate = False
    metrics.reset()
    layer.compile(dynamic=False)
    # Kernels that come out of a cache are not counted.
    with torch._inductor.config.patch(force_disable_caches=True), torch.autocast("cpu", torch.bfloat16):
        call(layer).sum().backward()
    assert metrics.nodes_num_elem, "inductor has made no kernel"
    return 4.0 * sum(count for node, count in metrics.nodes_num_elem if not isinstance(node, ExternKernelSchedulerNode))


GROUPS = [
    Group(
        Lever("the official way: full fine-tuning, a photo", "", ["--reference"], official_step()),
        [
            Lever("only the crops that an image needs are encoded", "kept: always", ["--reference", "--with", "crops"], official_step("crops")),
            Lever("CLIP stops at the layer that is used", "kept: always", ["--reference", "--with", "layers"], official_step("layers")),
            Lever("logits and loss at the labels only", "kept: always", ["--reference", "--with", "labels"], official_step("labels")),
            Lever("fused attention (sdpa) instead of eager", "kept: always", ["--reference", "--with", "sdpa"], official_step("sdpa")),
            Lever("all of these together: the product", "", [], official_step(*LEVERS)),
        ],
    ),
    Group(
        Lever("the product: full fine-tuning, nothing recomputed, a page", "", [], step()),
        [
            Lever("vision layers computed again", "kept: --recompute vision", ["--recompute", "vision"], step(recompute="vision")),
            Lever("all layers computed again", "kept: --recompute full", ["--recompute", "full"], step(recompute="full")),
            Lever("layers compiled", "kept: --torch_compile", ["--compile"], compiled),
            Lever("four samples in a row: a sample's share", "kept: --padding_free --batch_size_per_gpu 4", None, several(4)),
            Lever("frozen vision: no autograd in the tower", "kept: --freeze_vision_model", ["--strategy", "frozen"], step("--freeze_vision_model")),
            Lever("float32 weights under autocast, as published, instead of bfloat16 ones", "not kept: ZeRO-2 holds float32 copies for the optimizer, split over the GPUs", ["--float32_weights"], None),
            Lever("AdamW without the fused kernel", "not kept: fused is the default", ["--optim", "adamw_torch"], None),
            Lever("8-bit paged AdamW (its states take a quarter besides)", "kept: --optim paged_adamw_8bit, for one GPU; its rounding trains differently", ["--optim", "paged_adamw_8bit"], None),
        ],
    ),
    Group(
        Lever("LoRA as PEFT computes it, a page", "", ["--strategy", "lora", "--lora_of_peft"], step("--use_lora", peft=True)),
        [
            Lever("its second product, scaling and sum in one, nothing copied to float32: the product", "kept: always", ["--strategy", "lora"], step("--use_lora")),
            Lever("the same, vision layers computed again", "kept: --recompute vision", ["--strategy", "lora", "--recompute", "vision"], step("--use_lora", recompute="vision")),
            Lever("the same, all layers computed again", "kept: --recompute full", ["--strategy", "lora", "--recompute", "full"], step("--use_lora", recompute="full")),
        ],
    ),
]  # fmt: skip


def count(lever: Lever) -> dict[str, float]:
    """What its entry says of the official sizes."""
    if lever.count is None:
        return {}
    found = lever.count()
    entry = {"tflop": round(found.flops / 1e12, 1), "gb": round(found.traffic / 1e9, 1)}
    print(f"{entry['tflop']:8.1f} TFLOP {entry['gb']:8.1f} GB  {lever.what}", flush=True)
    return entry


def measure_group(group: Group, folder: Path, *common: str) -> dict[str, dict[str, float]]:
    """Seconds of the processor and MiB of a step, and their ratios to the base's, by the lever's words."""

    def run(lever: Lever) -> dict[str, float]:
        result = run_case(folder, *common, *(lever.flags or []))
        assert result is not None, "no GPU's memory is in use"
        print(f"{result['cpu_seconds']:8.3f} s {result['memory_step']:9.1f} MiB  {lever.what}", flush=True)
        return {"seconds": result["cpu_seconds"], "memory_step": result["memory_step"]}

    before = run(group.base)
    found = {lever.what: run(lever) for lever in group.levers if lever.flags is not None}
    after = run(group.base)
    seconds = (before["seconds"] + after["seconds"]) / 2
    for entry in found.values():
        entry |= {
            "time": round(entry["seconds"] / seconds, 3),
            "memory": round(entry["memory_step"] / before["memory_step"], 3),
        }
    noise = round(abs(before["seconds"] / after["seconds"] - 1), 3)
    return {group.base.what: {**before, "seconds": round(seconds, 4), "noise": noise}, **found}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=2, help="steps measured of each case (2)")
    options.add_argument("--counts", action="store_true", help="count only")
    options.add_argument("--result", type=Path, default=RESULTS / "levers.json", help="file to write")
    args = options.parse_args()
    result = provenance("torch", "transformers", "peft", "bitsandbytes")
    kept = json.loads(args.result.read_text(encoding="utf-8")) if args.counts and args.result.exists() else {}
    times = {entry["lever"]: entry for entry in kept.get("levers", []) if "base" in entry}
    result["given"] = kept.get("given", {"model": args.model, "dtype": "bfloat16", "steps": args.steps})
    entries = {}
    for group in GROUPS:
        for lever in (group.base, *group.levers):
            entry = {"lever": lever.what, "base": group.base.what, "verdict": lever.verdict}
            entries[lever.what] = {**times.get(lever.what, {}), **entry, **count(lever)}
    result |= {"layers_gb": layers_gb(), "levers": list(entries.values())}
    write(args.result, result)
    if args.counts:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(args.model, args.weights or Path(temporary), torch.float32)
        common = ["--model", args.model, "--device", "cpu", "--dtype", "bfloat16", "--image", "photo"]
        common += ["--num_crops", "6", "--steps", str(args.steps)]
        for group in GROUPS:
            for what, figures in measure_group(group, folder, *common).items():
                entries[what].update(figures)
            write(args.result, result)


if __name__ == "__main__":
    run_script(main)
