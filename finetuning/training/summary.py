"""What is trained: the parts of the model, and the table that a run prints and keeps."""

import math
import os
import shutil
from collections import defaultdict
from pathlib import Path

import torch

from ..arguments import RecipeArguments
from ..data.dataset import ConversationDataset
from ..errors import InputError
from .fitting import settle_memory
from .identity import read_run, write_run
from .parts import PARTS, model_part
from .rates import describe_rates, has_rates


def print_summary(model, args: RecipeArguments, dataset: ConversationDataset) -> None:
    """Prints, on the first rank, what will be trained and how; keeps it for the report; checks the disk.

    Raises:
        InputError: if not even one checkpoint fits on the disk.
    """
    planned = settle_memory(model, args, dataset)
    text = describe(model, args, dataset)
    if planned:
        text += f"\npeak memory      {planned}"
    if args.process_index == 0:
        print(text, flush=True)
        output = Path(args.output_dir)
        write_run(output, {**(read_run(output) or {}), "summary": text})
    if args.do_train:
        check_disk(model, args, dataset)


def count_steps(args: RecipeArguments, rows: int) -> int:
    """Optimizer steps of the run, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * steps_per_epoch(args, rows))


def steps_per_epoch(args: RecipeArguments, rows: int) -> int:
    """Optimizer steps of an epoch; the last one holds what is left."""
    return max(1, rows // args.batch_size if args.dataloader_drop_last else math.ceil(rows / args.batch_size))


def describe(model, args: RecipeArguments, dataset: ConversationDataset) -> str:
    """What will be trained, and how, as a table to print before training; with --do_train False what answers."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    dtypes: dict[str, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            # The base's own, of which PEFT trains a copy.
            continue
        # Two 4-bit weights are packed in one byte.
        packed = parameter.dtype == torch.uint8
        counts[model_part(name)][0 if parameter.requires_grad else 1] += parameter.numel() * (2 if packed else 1)
        dtypes[model_part(name)].add("nf4" if packed else str(parameter.dtype).removeprefix("torch."))
    compute, attention = str(args.compute_dtype).removeprefix("torch."), _attention_name(args)
    if not args.do_train:
        total = sum(sum(count) for count in counts.values())
        return "\n".join(
            [
                f"model            {args.model_name_or_path}, {total:,} parameters; nothing is trained",
                f"device           {_device_name(args)}; compute {compute}; attention {attention}",
                f"output           {args.output_dir}",
            ]
        )
    lines = [f"{'part':<16}{'trainable':>16}{'frozen':>16}  dtype"]
    for part in PARTS:
        trainable, frozen = counts[part]
        if trainable + frozen:
            lines.append(f"{part:<16}{trainable:>16,}{frozen:>16,}  {', '.join(sorted(dtypes[part]))}")
    total = sum(sum(count) for count in counts.values())
    trained = sum(count[0] for count in counts.values())
    lines.append(f"{'all':<16}{trained:>16,}{total - trained:>16,}  {trained / total:.2%} trainable")
    ranks, micro, rows = args.world_size, args.per_device_train_batch_size, dataset.epoch_size
    compiled = "; layers compiled" if args.compile_options else ""
    places = ranks * micro * args.gradient_accumulation_steps
    empty = f"; {places - args.batch_size} of {places} places stay empty" if places > args.batch_size else ""
    lines += [
        f"strategy         {args.strategy}; {_engine(args)}",
        *[f"learning rates   {describe_rates(args)}"] * has_rates(args),
        f"device           {_device_name(args)}; compute {compute}; attention {attention}; recomputed: {args.recompute}{compiled}",
        f"effective batch  {args.batch_size} = {ranks} rank(s) x {micro} micro-batch x {args.gradient_accumulation_steps} "
        f"accumulation{empty}",
        *_describe_rows(dataset),
        f"steps            {_describe_steps(args, rows)}",
        f"output           {args.output_dir}",
    ]
    if args.device.type == "cuda" and torch.cuda.device_count() > int(ranks):
        lines.append(
            f"note             {torch.cuda.device_count()} GPUs here, {ranks} used: torchrun --nproc_per_node=N uses more"
        )
    return "\n".join(lines)


def _describe_rows(dataset: ConversationDataset) -> list[str]:
    mixture = dataset.mixture
    if mixture is None:
        several = ", ".join(f"{rows:,} of {name}" for name, rows in dataset.sources.items())
        return [
            f"rows             {len(dataset)}, each once an epoch{f': {several}' if len(dataset.sources) > 1 else ''}"
        ]
    total = f"rows             {len(dataset)}, of which an epoch takes {dataset.epoch_size} samples"
    if len(mixture.names) < 2:
        return [f"{total} ({dataset.epoch_size / len(dataset):.4g} times each)"]
    lines = [f"{total}:"]
    for name, rows, samples in zip(mixture.names, mixture.rows, mixture.samples, strict=True):
        lines.append(f"                 {samples:,} of {name}, which has {rows:,} ({samples / rows:.4g} times each)")
    return lines


def _attention_name(args: RecipeArguments) -> str:
    if args.use_flash_attention and args.attention.startswith("sdpa"):
        return f"{args.attention} (flash-attn is not installed: PyTorch's own flash kernel)"
    return args.attention


def _describe_steps(args: RecipeArguments, rows: int) -> str:
    steps, an_epoch, left = count_steps(args, rows), steps_per_epoch(args, rows), rows % args.batch_size
    text = f"{steps}, {an_epoch} an epoch"
    if left:
        text += (
            f"; its last step is left out ({left} samples)"
            if args.dataloader_drop_last
            else f"; its last step has {left} sample(s)"
        )
    warmup = args.get_warmup_steps(steps)
    if steps > 1 and warmup >= steps:
        return (
            f"{text}\nwarning          all {steps} steps are warm-up (--warmup_steps {args.warmup_steps:g}): the learning rate never "
            f"reaches {args.learning_rate:g}; --warmup_steps 0.1 makes it a tenth of the steps"
        )
    return f"{text}; warm-up over the first {warmup}"


def _engine(args: RecipeArguments) -> str:
    if args.deepspeed_config:
        return (
            f"DeepSpeed, {'inline JSON' if isinstance(args.deepspeed, dict) else os.path.relpath(str(args.deepspeed))}"
        )
    return "DistributedDataParallel" if args.world_size > 1 else "one process"


def _device_name(args: RecipeArguments) -> str:
    return torch.cuda.get_device_name() if args.device.type == "cuda" else str(args.device)


def check_disk(model, args: RecipeArguments, dataset: ConversationDataset) -> None:
    """Compares the free disk space with what the run will write: checkpoints kept, one being written, final weights.

    Raises:
        InputError: if the final weights, or not even one checkpoint beside them, fit.
    """
    weights, checkpoint = estimate_bytes(model, args)
    steps = count_steps(args, dataset.epoch_size)
    every = args.save_steps if args.save_steps >= 1 else max(1, args.save_steps * steps)
    written = {"no": 0, "epoch": math.ceil(args.num_train_epochs)}.get(
        str(getattr(args.save_strategy, "value", args.save_strategy)), math.ceil(steps / every)
    )
    kept = min(written, (args.save_total_limit or written) + 1)
    needed, least, free = (
        weights + kept * checkpoint,
        weights + min(kept, 1) * checkpoint,
        shutil.disk_usage(args.output_dir).free,
    )
    if args.process_index or free >= needed:
        return
    sizes = f"a checkpoint of about {_gigabytes(checkpoint)}, final weights of {_gigabytes(weights)}"
    if free < least:
        raise InputError(
            f"--output_dir {args.output_dir}: expected {_gigabytes(least)} of free disk space ({sizes}), found {_gigabytes(free)}; "
            "choose another disk, or --save_strategy no"
        )
    print(
        f"warning          {args.output_dir}: {_gigabytes(free)} of disk space are free, {_gigabytes(needed)} may be written "
        f"({sizes}, {kept} checkpoints with the one being written); --save_total_limit 1 keeps fewer",
        flush=True,
    )


def estimate_bytes(model, args: RecipeArguments) -> tuple[int, int]:
    """Bytes of the final weights (or adapter), and of a checkpoint with its optimizer states."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if args.use_lora else list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    states = 2 if "8bit" in str(args.optim) else 8  # two moments of each trained weight
    optimizer = sum(
        parameter.numel() * (states + 4 if args.deepspeed_config else states / 4 * parameter.element_size())
        for parameter in trained
    )
    # DeepSpeed keeps the weights a second time, in a file of its own.
    return weights, int(weights * (2 if args.deepspeed_config else 1) + optimizer)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
