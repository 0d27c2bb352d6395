"""What is trained: the parts of the model, and the table that a run prints."""

import math
import os
from collections import defaultdict

import torch

from ..arguments import RecipeArguments
from ..data.dataset import ConversationDataset

PARTS = ("vision tower", "projector", "language model", "adapters")


def part_of(name: str) -> str:
    """The part of the model, one of `PARTS`, that a parameter belongs to."""
    if "lora_" in name:
        return "adapters"
    if ".img_processor." in name:
        return "vision tower"
    return "projector" if ".vision_embed_tokens." in name else "language model"


def describe(model, args: RecipeArguments, dataset: ConversationDataset) -> str:
    """What will be trained, and how, as a table to print before training."""
    counts = defaultdict(lambda: [0, 0, set()])
    for name, parameter in model.named_parameters():
        # Two 4-bit weights are packed in one byte.
        size = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
        trainable, frozen, dtypes = counts[part_of(name)]
        counts[part_of(name)][0 if parameter.requires_grad else 1] += size
        dtypes.add("nf4" if parameter.dtype == torch.uint8 else str(parameter.dtype).removeprefix("torch."))
    lines = [f"{'part':<16}{'trainable':>16}{'frozen':>16}  dtype"]
    for part in PARTS:
        trainable, frozen, dtypes = counts[part]
        if trainable + frozen:
            lines.append(f"{part:<16}{trainable:>16,}{frozen:>16,}  {', '.join(sorted(dtypes))}")
    total = sum(count[0] + count[1] for count in counts.values())
    trained = sum(count[0] for count in counts.values())
    lines.append(f"{'all':<16}{trained:>16,}{total - trained:>16,}  {trained / total:.2%} trainable")
    ranks, micro = args.world_size, args.per_device_train_batch_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(len(dataset) // args.batch_size * args.num_train_epochs)
    again = len(dataset) - len(dataset.rows)
    kernel = args.kernel
    if args.use_flash_attention and kernel.startswith("sdpa"):
        kernel = f"{kernel} (flash-attn is not installed: PyTorch's own flash kernel)"
    engine = (
        f"DeepSpeed, {os.path.relpath(args.deepspeed)}"
        if args.deepspeed
        else "DistributedDataParallel"
        if ranks > 1
        else "one process"
    )
    lines += [
        f"strategy         {args.strategy}; {engine}",
        f"device           {_device_name(args)}; compute {str(args.compute_dtype).removeprefix('torch.')}; attention {kernel}; recomputed: {args.recompute}"
        + ("; layers compiled" if args.compile_options else ""),
        f"effective batch  {args.batch_size} = {ranks} rank(s) x {micro} micro-batch x {args.gradient_accumulation_steps} accumulation",
        f"steps            {steps}, the first {args.get_warmup_steps(steps)} of them warm-up",
        f"rows             {len(dataset.rows)}"
        + (f", {again} of them twice in each epoch to fill its last step" if again else ""),
    ]
    if args.device.type == "cuda" and torch.cuda.device_count() > int(ranks):
        lines.append(
            f"note             {torch.cuda.device_count()} GPUs here, {ranks} used: torchrun --nproc_per_node=N uses more"
        )
    return "\n".join(lines)


def _device_name(args: RecipeArguments) -> str:
    return torch.cuda.get_device_name() if args.device.type == "cuda" else str(args.device)
